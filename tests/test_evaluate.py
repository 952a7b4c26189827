"""The metrics, the rows and the driver of Table 1 (evaluate.py)."""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import evaluate
import golden
import sample
from evaluate import VGGish, frechet_distance, gaussian, kl_divergence, mel_distance, realism
from tasks import PaSST, PaSSTConfig, load_official, mel_triangles, resample

METRICS = Path(__file__).resolve().parents[2] / "shared" / "metrics"


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fad(x, y):
    return frechet_distance(*gaussian(x), *gaussian(y))


# ---- metrics -------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(not (METRICS / "check_metrics.py").exists(), reason="no golden vectors here")
def test_metrics_agree_with_the_reference_codes():
    """The golden vectors made with the original metric codes, every part."""
    adapter = Path(__file__).with_name("metrics_adapter.py")
    command = [sys.executable, METRICS / "check_metrics.py", "--golden", METRICS / "golden",
               "--adapter", adapter]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "failed: 0" in done.stdout, done.stdout + done.stderr


def loaded(net, shapes):
    weights = golden.weights(shapes)
    net.load_state_dict({key: torch.from_numpy(array) for key, array in weights.items()})
    return net.eval().requires_grad_(False)


def test_metrics_agree_with_golden_vectors():
    """What tests/golden.py computes from the formulas in numpy and float64, torch gives too."""
    expected = {name: torch.from_numpy(array) for name, array in np.load(golden.FILE).items()}
    found = {"frechet": torch.tensor(fad(*map(torch.from_numpy, golden.embeddings()))),
             "kl": kl_divergence(*map(torch.from_numpy, golden.posteriors()))}
    one, two = map(torch.from_numpy, golden.embeddings())
    found |= {"realism": realism(one, two), "realism_all": realism(one, two, k=5, prune=False)}
    x, y = (torch.from_numpy(golden.signal(name, 44100, 0.3)).float() for name in "xy")
    found["mel_distance"] = torch.stack([mel_distance(x, z, 44100) for z in (y, x / 2, 0 * x)])
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-5)


def test_vggish_and_passt_agree_with_golden_vectors():
    """The front ends and networks, with random weights under the official keys."""
    expected = {name: torch.from_numpy(array) for name, array in np.load(golden.FILE).items()}
    mono = {name: torch.from_numpy(golden.signal(name, rate, seconds).mean(0)).float()[None]
            for name, rate, seconds in (("v", 16000, 1.0), ("p", 32000, 0.5))}
    net = loaded(VGGish(), golden.vggish_shapes())
    patches = net.patches(mono["v"])[0]
    torch.testing.assert_close(patches[:, ::8], expected["vggish_patches"], rtol=0, atol=2e-4)
    torch.testing.assert_close(net(patches), expected["vggish"].float(), rtol=1e-4, atol=1e-4)
    audio = normal(1, 2, 44100, dtype=torch.float32)
    patches = net.patches(resample(audio.mean(1), 44100, 16000))[0]
    torch.testing.assert_close(net.embed(audio, 44100)[0], net(patches))
    net = loaded(PaSST(PaSSTConfig(**golden.PASST)), golden.passt_shapes(**golden.PASST))
    mel = net.mel(mono["p"])
    torch.testing.assert_close(mel[0, :, ::5], expected["passt_mel"], rtol=0, atol=1e-3)
    for value, name in zip(net(mel), ("passt_logits", "passt_embedding")):
        torch.testing.assert_close(value[0], expected[name].float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [2, 20, 500])
def test_fad_of_a_set_with_itself_is_zero(n):
    """Also with fewer samples than dimensions, where the covariance is singular."""
    assert 0 <= fad(normal(n, 128), normal(n, 128)) < 1e-9


def test_fad_has_the_closed_form_of_diagonal_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2."""
    s1, s2, m = normal(6).abs(), normal(6, seed=1).abs(), normal(6, seed=2)
    found = frechet_distance(m, torch.diag(s1**2), torch.zeros_like(m), torch.diag(s2**2))
    assert found == pytest.approx((m.square() + (s1 - s2).square()).sum().item(), abs=1e-10)


def test_fad_of_few_samples_is_finite_and_symmetric():
    """10 and 7 samples of 64 dimensions: no complex root, no epsilon."""
    x, y = normal(10, 64), normal(7, 64, seed=1) + 1
    assert math.isfinite(fad(x, y)) and fad(x, y) == pytest.approx(fad(y, x), rel=1e-9)


def test_a_gaussian_has_the_mean_and_covariance_of_numpy():
    """In float64, over n - 1; a single embedding has no covariance, and a sentence says so."""
    x = 3 * normal(50, 8, dtype=torch.float32) + 5
    mean, covariance = gaussian(x)
    np.testing.assert_allclose(mean, np.mean(x.double().numpy(), 0), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), atol=1e-11)
    with pytest.raises(ValueError, match="at least 2"):
        gaussian(x[:1])


def test_kl_divergence_is_reference_against_generated():
    """KL(p || q) of two coins, in nats; 0 for equal ones; zeros in p are allowed."""
    p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(p, q).item() == pytest.approx(expected, abs=1e-5)
    assert kl_divergence(q, q).item() == pytest.approx(0, abs=1e-5)
    certain = torch.tensor([1.0, 0.0]).double()
    assert kl_divergence(certain, p).item() == pytest.approx(math.log(2), abs=1e-5)


def test_mel_distance_is_zero_symmetric_and_per_clip():
    """0 for equal audio; d(x, y) = d(y, x); a batch gives what its clips give."""
    x, y = normal(2, 3, 2, 9000, dtype=torch.float32) / 10
    assert mel_distance(x, x, 44100).tolist() == [0, 0, 0]
    torch.testing.assert_close(mel_distance(x, y, 44100), mel_distance(y, x, 44100))
    torch.testing.assert_close(mel_distance(x, y, 44100)[1], mel_distance(x[1], y[1], 44100))


def test_realism_is_the_largest_radius_over_distance():
    """On a line of points one apart, the third neighbour is two away.

    At the ends it is three away: these points are pruned.
    """
    line = torch.arange(10.0)[:, None]                     # radii 3 2 2 ... 2 2 3
    assert realism(line, torch.tensor([[11.0]]), prune=False).item() == pytest.approx(3 / 2)
    assert realism(line, torch.tensor([[11.0]]), prune=True).item() == pytest.approx(2 / 3)
    assert realism(line, torch.tensor([[0.5]]), k=1, prune=False).item() == pytest.approx(1 / 0.5)


def test_realism_does_not_change_with_scale_and_survives_a_copy():
    """Distances are compared with distances; for a copy of a reference, the score is finite."""
    x, y = normal(40, 6), normal(9, 6, seed=1)
    torch.testing.assert_close(realism(x, y), realism(5 * x, 5 * y))
    assert realism(x, x[:3]).isfinite().all()
    with pytest.raises(ValueError, match="more than k = 3"):
        realism(x[:3], y)


def test_radii_that_are_known_already_are_taken():
    """The same scores; and with radii twice as large, scores twice as large."""
    x, y = normal(40, 6), normal(9, 6, seed=1)
    radii = evaluate.neighbour_radii(x)
    torch.testing.assert_close(realism(x, y, radii=radii), realism(x, y))
    torch.testing.assert_close(realism(x, y, radii=2 * radii), 2 * realism(x, y))


# ---- VGGish --------------------------------------------------------------------------------------

def front_end(dtype):
    """VGGish without weights, which would take 0.3 GB."""
    with torch.device("meta"):
        net = VGGish()
    net.window = torch.hann_window(400, dtype=dtype)
    net.triangles = mel_triangles(64, 125, 7500, 257).to(dtype)
    return net


def test_vggish_front_end_counts_whole_patches():
    """0, 1 and 5 patches for 15599 samples, 15600 and 5 s; silence is ln 0.01."""
    net = front_end(torch.float32)
    counts = [net.patches(torch.zeros(1, n)).shape[1] for n in (100, 15599, 15600, 80000)]
    assert counts == [0, 0, 1, 5]
    silence = torch.full((1, 1, 96, 64), math.log(0.01))
    torch.testing.assert_close(net.patches(torch.zeros(1, 15600)), silence)
    with pytest.raises(sample.UserError, match="0.975 s"):
        net.embed(torch.zeros(1, 2, 44100 // 2), 44100)


def test_unusable_vggish_file_ends_in_a_sentence(tmp_path):
    """It names the official file and where it is published."""
    (tmp_path / "v.pth").write_bytes(b"PK\x03\x04 cut")
    with torch.device("meta"):
        net = VGGish()
    for path in ("v.pth", "missing.pth"):
        with pytest.raises(ValueError, match="vggish-10086976.pth.*release v0.1"):
            load_official(net, tmp_path / path, evaluate.VGGISH_FILE)


def test_vggish_front_end_has_the_gradient_that_finite_differences_show():
    """From 44.1 kHz through the resampler to the log-mel patches, in float64."""
    net = front_end(torch.float64)
    audio, direction = normal(1, 44100).requires_grad_(), normal(1, 44100, seed=1)
    y = normal(1, 1, 96, 64, seed=2)

    def distance(x):
        return torch.linalg.vector_norm(net.patches(resample(x, 44100, 16000)) - y)

    gradient, = torch.autograd.grad(distance(audio), audio)
    h = 1e-6
    difference = (distance(audio + h * direction) - distance(audio - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-9)


# ---- excerpts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, rate, channels", [
    ("wav", 44100, 2), ("wav", 48000, 1), ("flac", 22050, 2), ("flac", 96000, 2), ("mp3", 44100, 2),
    ("mp3", 48000, 2), ("ogg", 44100, 2), ("ogg", 48000, 1)])
def test_an_excerpt_is_that_part_of_the_whole_file(suffix, rate, channels, tmp_path):
    """At the start, in the middle and at the end: what decoding and resampling everything gives."""
    path = tmp_path / f"x.{suffix}"
    random = np.random.default_rng(0)
    soundfile.write(path, random.uniform(-0.5, 0.5, (7 * rate, channels)), rate)
    whole = sample.to_stereo_44k(*sample.read_audio(path))
    n = 30000
    for start in (0, 77777, 4 * 44100 + 1, whole.shape[1] - n):
        audio = evaluate.read_excerpt(evaluate.Excerpt(str(path), start, n))
        torch.testing.assert_close(audio, whole[:, start:start + n], rtol=0, atol=1e-5)
    with pytest.raises(sample.UserError, match="x.* is shorter than"):
        evaluate.read_excerpt(evaluate.Excerpt(str(path), whole.shape[1] - n + 1, n))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_excerpt_with_a_bad_sample_is_left_out(value, tmp_path, capsys):
    """By name; an excerpt of the same file without one is not."""
    path, audio = str(tmp_path / "x.wav"), np.zeros((3000, 2))
    audio[2000, 1] = value
    soundfile.write(path, audio, 44100, subtype="FLOAT")
    jobs = [{0: [evaluate.Excerpt(path, 0, 1500)], 1: [evaluate.Excerpt(path, 1500, 1500)]}]
    loaded, = evaluate.read_ahead(jobs)
    assert list(loaded) == [0] and loaded[0][0].shape == (2, 1500)
    assert f"left out: {path} has samples that are not finite" in "".join(capsys.readouterr())


def test_ogg_is_decoded_from_its_start(tmp_path):
    """libsndfile lands elsewhere in about a tenth of the seeks in such a file."""
    t = np.arange(20 * 44100) / 44100
    path = str(tmp_path / "tone.ogg")
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * t), 44100)
    whole = sample.to_stereo_44k(*sample.read_audio(path))
    for start in np.random.default_rng(0).integers(0, len(t) - 2000, 40).tolist():
        audio = evaluate.read_excerpt(evaluate.Excerpt(path, start, 2000))
        torch.testing.assert_close(audio, whole[:, start:start + 2000], rtol=0, atol=1e-4)


def test_excerpts_are_counted_at_44_kHz(tmp_path):
    """A second holds 44100 samples for us, whatever the file's own rate is."""
    for rate in (22050, 48000):
        soundfile.write(tmp_path / f"{rate}.wav", np.zeros((2 * rate, 1)), rate)
    drawn = evaluate.find_excerpts(tmp_path, 44100, 100, seed=0)
    assert [(Path(path).stem, start) for path, start, _ in drawn] == [
        ("22050", 0), ("22050", 44100), ("48000", 0), ("48000", 44100)]


def test_a_part_of_the_music_is_a_part_of_every_folder(tmp_path):
    """Fewer excerpts than files: of files at random, not of those whose names sort first."""
    for name in ("ambient", "rock"):
        (tmp_path / name).mkdir()
        for i in range(20):
            soundfile.write(tmp_path / name / f"{i:02}.wav", np.zeros((5000, 2)), 44100)
    drawn = evaluate.find_excerpts(tmp_path, 2000, 20, seed=0)
    rock = sum("rock" in path for path, *_ in drawn)
    assert len({path for path, *_ in drawn}) == 20 and 4 < rock < 16
    assert set(drawn) < set(evaluate.find_excerpts(tmp_path, 2000, 30, seed=0))


def test_an_excerpt_is_paired_with_another_track():
    """Never with one of its own track, where there are others; else with one of its own."""
    excerpts = [evaluate.Excerpt(path, i, 9) for path in "abc" for i in range(5)]
    assert all(one.path != other.path for one, other in evaluate.with_another(excerpts, 0))
    assert len(evaluate.with_another(excerpts[:5], 0)) == 5


# ---- tasks and rows ------------------------------------------------------------------------------

def test_layout_has_the_times_of_the_paper():
    """2.4 s up to 6 s, the middle 2 s and 2.5 s, 5 s; whole frames; 6 s in a longer window."""
    spans = evaluate.layout(2048 * 128, 128)
    seconds = {task: [x / 44100 for x in span] for task, span in spans.items()}
    assert seconds["unconditional"] == pytest.approx([0, 5.944, 0, 5], abs=1e-3)
    assert seconds["continuation"] == pytest.approx([2.4, 5.944, 0, 5.944], abs=4e-3)
    assert seconds["infill"] == pytest.approx([1.972, 3.972, 0, 5.944], abs=4e-3)
    assert seconds["transition"][1] - seconds["transition"][0] == pytest.approx(2.5, abs=7e-3)
    for span in spans.values():
        assert span.a % 128 == 0 and span.b % 128 == 0 and span.b - span.a > 1.99 * 44100
    wide = evaluate.layout(2**19, 1)
    assert (wide["infill"].d - wide["infill"].c) / 44100 == pytest.approx(6, abs=1e-4)
    assert wide["infill"].c < wide["infill"].a < wide["infill"].b < wide["infill"].d
    assert wide["continuation"].a == int(2.4 * 44100) and wide["continuation"].d == 6 * 44100


def unspliced(studio, model, task, x, passt=None):
    """What two steps of a model make of x, from the same noise every time."""
    checkpoint = sample.load_checkpoint(studio / f"{model}.pt")
    span = evaluate.layout(checkpoint.window * checkpoint.hop, checkpoint.hop)[task]
    batch = evaluate.Batch(task, span, x, None, [torch.Generator().manual_seed(0)])
    settings = sample.Settings("ddpm", 2, 0.03)
    return evaluate.unspliced(checkpoint, batch, settings, passt), span


@pytest.mark.parametrize("model, task, same", [
    ("latent", "infill", True), ("latent", "continuation", True), ("latent", "regenerate", False),
    ("waveform", "infill", True)])
def test_edits_use_nothing_of_the_region(studio, model, task, same):
    """Infill and continuation: other audio in the region, the same result, bit for bit.

    Regenerate does change.
    """
    x = normal(1, 2, 2**15, dtype=torch.float32) / 10
    made, (a, b, *_) = unspliced(studio, model, task, x)
    changed = torch.cat([x[..., :a], 1 - x[..., a:b], x[..., b:]], -1)
    again, _ = unspliced(studio, model, task, changed)
    assert torch.equal(made, again) == same


def test_guidance_by_example_is_guided(studio, monkeypatch):
    """With no weight of the distance of embeddings, the same noise becomes other audio."""
    x = normal(1, 2, 2**15, dtype=torch.float32) / 10
    passt = sample.load_checkpoint(studio / "classifier.pt").net
    guided, _ = unspliced(studio, "latent", "embedding", x, passt)
    monkeypatch.setattr(sample, "GUIDE_STEP", 0.0)
    unguided, _ = unspliced(studio, "latent", "embedding", x, passt)
    assert (guided - unguided).abs().max() > 1e-4


def test_fillers_hold_what_their_names_say():
    """In the region: silence, noise at each clip's level, the context repeated, another track."""
    other, x = normal(2, 2, 2, 9000) * torch.tensor([0.1, 3.0])[:, None, None]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    batch = evaluate.Batch("infill", evaluate.Span(2000, 8000, 0, 9000), x, other, generators)
    made = {row.name: row.make(batch) for row in evaluate.FILLERS}
    assert list(made) == ["Silence", "White noise", "Prompt repeated", "Another track"]
    for audio in made.values():
        assert torch.equal(audio[..., :2000], x[..., :2000])
        assert torch.equal(audio[..., 8000:], x[..., 8000:])
    silence, noise, repeated, another = (audio[..., 2000:8000] for audio in made.values())
    assert not silence.any()
    torch.testing.assert_close(noise.std((1, 2)), x.std((1, 2)), rtol=0.05, atol=0)
    assert torch.equal(repeated, x[..., :2000].repeat(1, 1, 3))
    assert torch.equal(another, other[..., 2000:8000])


def test_figures_compare_with_the_training_music_and_transitions_with_the_crossfade():
    """KLD is that of its posterior against the clips'; realism is twice the cross-fade's, half as
    far away."""
    def records(place):                     # without its ends, the music has radii of 2 up to 8
        return {j: {"fad": normal(1, 2, seed=j), "embedding": torch.tensor([place]),
                    "posterior": torch.tensor([0.2 + 0.6 * j, 0.8 - 0.6 * j]),
                    "curve": torch.ones(19)} for j in range(2)}

    music = [{"fad": normal(1, 2, seed=9 + j), "posterior": torch.tensor([1.0, 0.0]),
              "embedding": torch.tensor([float(j)])} for j in range(10)]
    reference = evaluate.Reference(music)
    found = evaluate.figures("transition", records(10.0), reference, records(12.0))
    assert found["Realism"] == [pytest.approx(2), 0, 2]
    assert found["KLD"][0] == pytest.approx(math.log(2), abs=1e-5)

    # A clip without a cross-fade counts in FAD and KLD; one clip alone gives no figures.
    one_more = records(10.0) | {7: records(10.0)[0]}
    found = evaluate.figures("transition", one_more, reference, records(12.0))
    assert found["Realism"][2] == 2 and found["KLD"][2] == 3
    assert evaluate.figures("transition", {0: one_more[0]}, reference, records(12.0)) == {}

    # With the cross-fade of one clip alone there is no realism.
    found = evaluate.figures("transition", one_more, reference, {0: records(12.0)[0]})
    assert "Realism" not in found and found["KLD"][2] == 3


def test_a_reference_of_the_same_music_has_no_realism():
    """Half of the excerpts have three copies: radii of 0, whose realism would be 0 / 0."""
    def record(place):
        return {"fad": normal(1, 2), "embedding": torch.tensor([place]),
                "posterior": torch.tensor([1.0])}
    some = [record(float(place)) for place in range(4)]
    assert evaluate.Reference(some + [record(9.0)] * 3).radii.median() > 0
    with pytest.raises(sample.UserError, match="--reference has the same music"):
        evaluate.Reference(some + [record(9.0)] * 5)


def test_the_warning_counts_both_sides(capsys):
    """FAD from enough clips, but from three excerpts of the training music."""
    music = [{"fad": normal(1, 2, seed=j), "posterior": torch.tensor([1.0]),
              "embedding": torch.tensor([float(j)])} for j in range(4)]
    reference = evaluate.Reference(music)
    results = {"Ours": {"infill": {"FAD": [1.0, None, 9]}}}
    evaluate.warn(results, reference)
    assert not capsys.readouterr().out
    reference.count = 2
    evaluate.warn(results, reference)
    assert "FAD from n = 2 embeddings of 2 dimensions" in capsys.readouterr().out


def test_of_a_long_window_the_region_within_the_clip_is_compared():
    """What was generated beyond the 6 s that are evaluated does not count."""
    x = normal(1, 2, 9000, dtype=torch.float32) / 10
    batch = evaluate.Batch("continuation", evaluate.Span(2000, 9000, 0, 6000), x, x, [])
    beyond, within = x.clone(), x.clone()
    beyond[..., 6000:] = beyond[..., :2000] = 0
    within[..., 5000:6000] = 0
    assert evaluate.compare(batch, beyond)["MR"] == 0 < evaluate.compare(batch, within)["MR"]


def test_figure_1_is_the_distance_to_the_first_track():
    """Zero all along for that track itself; for the raw cross-fade it grows from window to window,
    up to that of the other track."""
    first, other = normal(2, 1, 2, 90_000, dtype=torch.float32) / 10
    other = other / 100
    batch = evaluate.Batch("transition", evaluate.Span(10_000, 80_000, 0, 90_000), first, other, [])
    same, faded, last = (evaluate.compare(batch, x)["curve"][0] for x in (first, batch.x, other))
    assert not same.any() and (faded.diff() > 0).all() and len(faded) == 19
    assert faded[0] < 0.1 * last[0] and faded[-1] > 0.5 * last[-1]


def test_the_table_has_two_digits_and_no_empty_columns():
    """One figure for two tasks that have the same; a deviation where there is one; no "-0.00"."""
    results = {"Ours": {"infill": {"FAD": [-0.001, None, 9], "MR": [1.234, None, 9]},
                        "regenerate": {"FAD": [0.004, None, 9], "MR": [1.5, None, 9]},
                        "transition": {"Realism": [0.95, 0.12, 9]}},
               "Test set": {"transition": {"Realism": [1.0, 0.0, 9]}}, "Silence": {}}
    assert evaluate.table_lines(results) == [
        "          Infill/Regeneration FAD  MR         Transitions Realism",
        "Ours      0.00                     1.23/1.50  0.95±0.12",
        "Test set  -                        -          1.00±0.00",
        "Silence   -                        -          -"]


# ---- measuring -----------------------------------------------------------------------------------

class CountingJudges:
    """Judges whose embedding is the clip's mean power; `clips` counts what they are given."""
    names = ["counting", "counting"]

    def __init__(self):
        self.clips = 0

    def evaluate(self, audio):
        self.clips += len(audio)
        power = audio.square().mean((1, 2))[:, None]
        return {"fad": power[:, None], "posterior": torch.ones(len(audio), 1), "embedding": power}


def clips_of(studio, n=2**15, hop=128):
    spans = evaluate.layout(n, hop)
    excerpts = evaluate.find_excerpts(studio / "test", n, 3, 0)
    return [evaluate.Clip(*pair, spans) for pair in evaluate.with_another(excerpts, 0)]


def test_what_is_equal_is_made_and_evaluated_once(studio, tmp_path):
    """The VAE works on each clip once, and on each cross-fade; judges get each part once."""
    encoded = []

    def encode(audio):
        encoded.append(len(audio))
        return audio
    checkpoint = SimpleNamespace(encode=encode, decode=torch.clone, path=studio / "latent.pt")
    judges, row = CountingJudges(), evaluate.vae_row(checkpoint, evaluate.TASKS)
    evaluation = evaluate.Evaluation([row], clips_of(studio), judges, tmp_path)
    evaluation.run()
    assert encoded == [3, 3]
    assert judges.clips == 3 * 3                # the first 5 s, the whole clip, the cross-fade
    for task in evaluate.TASKS:
        assert len(evaluation.finite(row, task)) == 3


def test_records_are_kept_apart_by_all_that_they_depend_on(studio, tmp_path):
    """Other judges, seeds, settings or clips: another folder; the same again: the same one."""
    def folder(judges="counting", seed=0, xi=1, clips=3):
        row = evaluate.Row("Ours", ("infill",), evaluate.silence, facts={"xi": xi})
        judged = SimpleNamespace(names=[judges])
        evaluation = evaluate.Evaluation([row], clips_of(studio)[:clips], judged, tmp_path, seed)
        return evaluation.records["Ours", "infill"].folder

    others = [folder("others"), folder(seed=1), folder(xi=2), folder(clips=2)]
    assert folder() == folder() and len({folder(), *others}) == 5


def test_training_music_is_measured_again_for_other_judges_and_seeds(studio, tmp_path):
    """And what is lost of it, of one length too; each excerpt once."""
    def measured(name="counting", **changes):
        judges = CountingJudges()
        judges.names = [name, name]
        given = {"reference": studio / "train", "reference_clips": 4, "seed": 0, "batch": 2}
        found = evaluate.measure_reference([9000, 20_000], judges,
                                           SimpleNamespace(**given | changes), tmp_path, "cpu")
        assert all(len(kept.read()) == (given | changes)["reference_clips"]
                   for kept in found.values())
        return judges.clips

    assert [measured(), measured()] == [8, 0]
    next(tmp_path.glob("reference-*/9000/*.pt")).unlink()
    assert measured() == 4                              # two excerpts in both lengths
    assert [measured("others"), measured(seed=1), measured(reference_clips=3)] == [8, 8, 6]


def test_an_interrupted_run_goes_on_where_it_stopped(studio, tmp_path):
    """Stopped in the second batch, of one clip each: the first is not made again."""
    made = []

    def make(batch):
        if len(made) == 1 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        made.append(batch.x)
        return batch.x
    row = evaluate.Row("Ours", ("infill",), make)

    def run():
        evaluation = evaluate.Evaluation([row], clips_of(studio), CountingJudges(), tmp_path)
        evaluation.run(size=1)
        return evaluation
    with pytest.raises(KeyboardInterrupt):
        run()
    (tmp_path / "again").touch()
    assert len(run().finite(row, "infill")) == 3 and len(made) == 3
    assert len(run().finite(row, "infill")) == 3 and len(made) == 3


def test_processes_share_the_batches(studio, tmp_path, monkeypatch):
    """The first of two measures the first and the third of three batches, the second the rest."""
    monkeypatch.setattr(sample, "WORLD", 2)
    monkeypatch.setattr(sample, "barrier", lambda: None)
    monkeypatch.setattr(sample.dist, "broadcast_object_list", lambda objects: None)
    row = evaluate.Row("Ours", ("infill",), lambda batch: batch.x)
    judges = CountingJudges()
    evaluation = evaluate.Evaluation([row], clips_of(studio), judges, tmp_path)
    evaluation.run(size=1)
    assert list(evaluation.finite(row, "infill")) == [0, 2] and judges.clips == 2


@pytest.mark.parametrize("factor", [math.inf, 1e25])
def test_a_clip_that_cannot_be_measured_is_left_out(factor, studio, tmp_path, capsys):
    """A model that breaks on one clip of three: the other two count, and the clip is named.

    Its samples are not finite, or so large that what is measured is not.
    """
    factors = torch.tensor([1, factor, 1])[:, None, None]
    row = evaluate.Row("Broken", ("infill",), lambda batch: batch.x * factors)
    evaluation = evaluate.Evaluation([row], clips_of(studio), CountingJudges(), tmp_path)
    evaluation.run()
    kept = evaluation.finite(row, "infill")
    assert list(kept) == [0, 2] and all(record["fad"].isfinite().all() for record in kept.values())
    assert "left out: Broken, infill" in "".join(capsys.readouterr())


# ---- the command ---------------------------------------------------------------------------------

def arguments(studio, out, *more):
    steps = [] if "none" in more else ["--steps", "2"]
    return ["--checkpoint", str(studio / "latent.pt"),
            "--classifier", str(studio / "classifier.pt"),
            "--data", str(studio / "test"), "--reference", str(studio / "train"),
            "--out", str(out), "--device", "cpu", *steps, *more]


def file_arguments(studio, out, generated, originals, *more):
    return ["--generated", str(generated), "--originals", str(originals),
            "--reference", str(studio / "train"), "--classifier", str(studio / "classifier.pt"),
            "--out", str(out), "--device", "cpu", *more]


def figures(out):
    """{(row, task, metric): value} of a table"""
    found = {}
    for row, by_task in json.loads((out / "table.json").read_text())["rows"].items():
        for task, metrics in by_task.items():
            for metric, (value, _, _) in metrics.items():
                if metric != "Figure 1":
                    found[row, task, metric] = value
    return found


def measurements(out, row, task):
    """{number: record} of a row in a task"""
    folder, = (out / "records" / row).glob(f"{task}-*")
    return evaluate.Records(folder).read()


@pytest.fixture(scope="module")
def measured(studio, tmp_path_factory):
    """The folder of a run of all tasks, and what it printed."""
    out = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        evaluate.main(arguments(studio, out))
    return out, "\n".join(lines)


def test_a_run_writes_table_1(studio, measured):
    """All rows in all tasks; the test set's own figures; Figure 1 leaves the first track."""
    out, printed = measured
    assert "FAD by PaSST" in printed and "3 transition" in printed and "6 excerpts" in printed
    found = figures(out)
    assert {task for row, task, _ in found if row == "Latent DDPM 2"} == set(evaluate.TASKS)
    assert found["Test set", "infill", "MR"] == 0
    assert found["Test set", "transition", "Realism"] == pytest.approx(1)
    assert found["Latent DDPM 2", "regenerate", "MR"] != found["Latent DDPM 2", "infill", "MR"]
    assert found["VAE", "regenerate", "MR"] == found["VAE", "infill", "MR"]
    assert found["Silence", "infill", "MR"] > 2
    assert all(math.isfinite(value) for value in found.values())
    table = json.loads((out / "table.json").read_text())
    assert table["settings"]["checkpoint"] == sample.file_digest(studio / "latent.pt")
    curve, _, n = table["rows"]["Latent DDPM 2"]["transition"]["Figure 1"]
    assert n == 3 and len(curve) == 19 and curve[0] < curve[-1]


def test_a_lost_batch_is_measured_again_and_nothing_else(studio, measured, tmp_path):
    """Also in batches of another size, with the same figures."""
    out = tmp_path / "out"
    shutil.copytree(measured[0], out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    lost, = (path for path in before if "latent-ddpm-2/infill" in path.as_posix())
    lost.unlink()
    evaluate.main(arguments(studio, out, "--tasks", "infill", "--batch", "1"))
    assert [path for path in before if not path.exists()] == [lost]
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path != lost)
    assert len(list(out.rglob("*.pt"))) == len(before) + 2
    again, all_tasks = figures(out), figures(measured[0])
    assert again == pytest.approx({key: all_tasks[key] for key in again}, abs=1e-5)
    assert {task for _, task, _ in again} == {"infill"}


def test_samplers_steps_and_settings_have_rows_of_their_own(studio, tmp_path):
    """A row for each sampler and number of steps, named by the flags that were given."""
    flags = ["--tasks", "infill", "--sampler", "ddpm", "ddim", "none", "--steps", "1", "2"]
    evaluate.main(arguments(studio, tmp_path, *flags, "--xi", "0.5"))
    found = figures(tmp_path)
    rows = [f"Latent {sampler} {n}, xi 0.5" for sampler in ("DDPM", "DDIM") for n in (1, 2)]
    assert [row for row, _, metric in found if metric == "MR"] == [
        *rows, "VAE", "Test set", *(row.name for row in evaluate.FILLERS)]
    assert len({found[row, "infill", "MR"] for row in rows}) == 4


def test_what_is_given_twice_is_measured_once(studio, tmp_path):
    """Of tasks, samplers and numbers of steps, the first of equal ones counts."""
    options = evaluate.parse(arguments(studio, tmp_path, "--tasks", "infill", "infill", "--sampler",
                                       "ddim", "none", "ddim", "--steps", "2", "1", "2"))
    assert options.tasks == ["infill"]
    assert options.sampler == ["ddim", "none"]
    assert options.steps == [2, 1]


def test_the_waveform_model_has_a_row_and_no_vae(studio, tmp_path):
    """The same rows as for the latent one, without the autoencoder's."""
    model = ["--model", "waveform", "--checkpoint", str(studio / "waveform.pt")]
    evaluate.main(arguments(studio, tmp_path, *model, "--tasks", "infill"))
    found = figures(tmp_path)
    fillers = {row.name for row in evaluate.FILLERS}
    assert {row for row, *_ in found} == {"Waveform DDPM 2", "Test set", *fillers}
    assert 0 < found["Waveform DDPM 2", "infill", "MR"] < math.inf


def test_with_a_weak_model_the_row_is_another(studio, tmp_path):
    """Its name says so, and it is measured anew."""
    state = dict(torch.load(studio / "latent.pt", weights_only=True))
    state["ema"] = {name: 2 * value for name, value in state["ema"].items()}
    torch.save(state, tmp_path / "weak.pt")
    out = tmp_path / "out"
    evaluate.main(arguments(studio, out, "--tasks", "infill"))
    alone = figures(out)["Latent DDPM 2", "infill", "MR"]
    evaluate.main(arguments(studio, out, "--tasks", "infill", "--weak", str(tmp_path / "weak.pt")))
    assert figures(out)["Latent DDPM 2, away from weak", "infill", "MR"] != alone


def test_clips_have_noise_of_their_own(studio, tmp_path):
    """A track and its copy: the test set's records are equal, those made from noise are not."""
    (tmp_path / "test").mkdir()
    for name in ("a.wav", "b.wav"):
        shutil.copy(studio / "test" / "0.wav", tmp_path / "test" / name)
    out, data = tmp_path / "out", str(tmp_path / "test")
    evaluate.main(arguments(studio, out, "--tasks", "infill", "--data", data))
    for row, equal in (("test-set", True), ("latent-ddpm-2", False), ("white-noise", False)):
        one, two = measurements(out, row, "infill").values()
        assert torch.allclose(one["embedding"], two["embedding"], atol=1e-6) == equal, row


def test_reference_excerpts_are_as_long_as_the_clips(studio, tmp_path):
    """Music against itself, the same excerpts: FAD and KLD are 0 at both lengths."""
    flags = ["--tasks", "unconditional", "infill", "--sampler", "none", "--data"]
    evaluate.main(arguments(studio, tmp_path, *flags, str(studio / "train")))
    found = figures(tmp_path)
    for task in ("unconditional", "infill"):
        for metric in ("FAD", "KLD"):
            assert found["Test set", task, metric] == pytest.approx(0, abs=1e-5), (task, metric)
    assert found["Silence", "infill", "FAD"] > 1e-3


def test_the_reference_is_made_once_for_all_rows(studio, tmp_path, monkeypatch):
    """Its radii are computed once for each length; its records are not measured again."""
    calls = []
    radii = evaluate.neighbour_radii

    def counted(*arguments):
        calls.append(1)
        return radii(*arguments)
    monkeypatch.setattr(evaluate, "neighbour_radii", counted)
    evaluate.main(arguments(studio, tmp_path, "--tasks", "transition", "--sampler", "none"))
    assert len(calls) == 2                      # of 5 s, and of the whole clip
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("reference-*/*/*.pt")}
    assert len(before) == 2
    evaluate.main(arguments(studio, tmp_path, "--tasks", "infill", "--sampler", "none"))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("reference-*/*/*.pt")}
    assert after == before


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(studio, measured, tmp_path):
    """Under torchrun they share clips and excerpts, and one of them writes the table."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", Path(evaluate.__file__), *arguments(studio, tmp_path, "--batch", "2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Latent DDPM 2") == 1
    assert figures(tmp_path) == pytest.approx(figures(measured[0]), abs=1e-5)


@pytest.mark.slow
def test_two_processes_agree_on_files_of_another_rate(studio, tmp_path):
    """At 48 kHz excerpts are resampled by the process that has them."""
    home = tmp_path / "home"
    shutil.copytree(studio, home)
    for path in home.glob("t*/[0-9].wav"):
        audio, _ = soundfile.read(path)
        soundfile.write(path, np.concatenate([audio, audio[:8000]]), 48000)
    found = []
    for count in "12":
        out = tmp_path / count
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", count, Path(evaluate.__file__),
                   *arguments(home, out, "--batch", "2")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(figures(out))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_few_clips_are_announced_with_their_number(measured):
    """Three embeddings of 32 dimensions: the warning says so."""
    assert "FAD from n = 3 embeddings of 32 dimensions" in measured[1]


# ---- files of another system ---------------------------------------------------------------------

def copy_tracks(source, folder):
    folder.mkdir()
    for path in source.glob("[0-9].wav"):
        shutil.copy(path, folder / path.name)


def test_files_of_another_system_are_evaluated_the_same_way(studio, tmp_path, capsys):
    """A short and an unreadable file are left out by name; no other file's record changes."""
    generated = tmp_path / "generated"
    copy_tracks(studio / "test", generated)
    command = file_arguments(studio, "", generated, studio / "train", "--region", "0.2", "0.7")
    at = command.index("--out") + 1
    command[at] = str(tmp_path / "clean")
    evaluate.main(command)
    soundfile.write(generated / "3.wav", np.zeros((44100, 2)), 44100)
    soundfile.write(generated / "4.wav", np.zeros((400, 2)), 44100)
    (generated / "5.wav").write_text("words")
    command[at] = str(tmp_path / "odd")
    evaluate.main(command)
    clean = measurements(tmp_path / "clean", "generated", "files")
    odd = measurements(tmp_path / "odd", "generated", "files")
    assert list(clean) == [0, 1, 2] and list(odd) == [0, 1, 2, 3]
    for j in clean:
        for name in clean[j]:
            torch.testing.assert_close(clean[j][name], odd[j][name], rtol=0, atol=1e-5)
    found = figures(tmp_path / "odd")
    assert found["Test set", "files", "MR"] == 0 < found["Generated", "files", "MR"]
    said = "".join(capsys.readouterr())
    for name in ("4.wav", "5.wav"):
        assert f"left out: {generated / name}" in said


def test_a_file_without_a_partner_is_named(studio, tmp_path, capsys):
    """On either side: sample.py names its files otherwise."""
    generated = tmp_path / "generated"
    copy_tracks(studio / "test", generated)
    (generated / "2.wav").rename(generated / "2.infill.wav")
    evaluate.main(file_arguments(studio, tmp_path / "out", generated, studio / "test"))
    said = "".join(capsys.readouterr())
    assert f"left out: {generated / '2.infill.wav'}: --originals has no file of that name" in said
    assert f"left out: {studio / 'test' / '2.wav'}: --generated has no file of that name" in said


def test_a_clip_is_named_that_is_left_out_because_of_another(studio, capsys):
    """Its transition has no second track: the other file's fault, which is said."""
    found = evaluate.find_excerpts(studio / "test", 2**15, 1, 0)[0]
    gone = found._replace(path="gone.wav")
    capsys.readouterr()
    assert evaluate.read_or_skip([found, gone]) is None
    said = "".join(capsys.readouterr())
    assert said.startswith(f"left out: {found.path}, because gone.wav cannot be read")
    assert evaluate.read_or_skip([gone, found]) is None
    assert "".join(capsys.readouterr()).startswith("left out: gone.wav cannot be read")


def test_pairs_of_unequal_length_are_cut_to_what_both_have(studio, tmp_path, capsys):
    """Six lengths, one pair three samples apart: those with the region count.

    The one without is named.
    """
    lengths = {"0": (44100, 44100), "1": (44100, 44097), "2": (40000, 44100), "3": (36000, 36000),
               "4": (33000, 31000), "5": (44100, 20000)}
    for folder, place in (("orig", 0), ("made", 1)):
        (tmp_path / folder).mkdir()
        for name, pair in lengths.items():
            audio, rate = soundfile.read(studio / "train" / f"{name}.wav")
            soundfile.write(tmp_path / folder / f"{name}.wav", audio[:pair[place]], rate)
    folders = tmp_path / "made", tmp_path / "orig"
    evaluate.main(file_arguments(studio, tmp_path / "out", *folders, "--region", "0.2", "0.6"))
    table = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert table["Generated"]["files"]["MR"] == [0, None, 5]
    assert table["Generated"]["files"]["FAD"][2] == 5
    said = "".join(capsys.readouterr())
    named = re.findall(r"left out: \S*/made/(\S+)", said)
    assert named == ["5.wav"]
    evaluate.main(file_arguments(studio, tmp_path / "all", *folders))
    table = json.loads((tmp_path / "all" / "table.json").read_text())["rows"]
    # Without --region, nothing is missing; the training music is as long as the median.
    assert table["Generated"]["files"]["MR"] == [0, None, 6]
    measured, = (tmp_path / "all").glob("reference-*/*/")
    assert measured.name == "36000"


def test_files_too_short_for_vggish_are_left_out(tmp_path, capsys):
    """It needs 0.975 s, as long as one of its patches; PaSST alone takes any length."""
    for n in (42000, 43100):
        soundfile.write(tmp_path / f"{n}.wav", np.zeros((n, 2)), 44100)
    options = SimpleNamespace(originals=tmp_path, generated=tmp_path, region=None, vggish="v.pth")
    clip, = evaluate.pair_files(options)
    assert clip.excerpt.n == 43100
    assert "42000.wav (or its original) ends after 0.952 s; 0.975 s" in "".join(capsys.readouterr())
    options.vggish = None
    assert len(evaluate.pair_files(options)) == 2


def test_a_region_that_no_file_has_ends_in_a_sentence(studio, tmp_path):
    """The flags are named."""
    folder = studio / "test"
    with pytest.raises(sample.UserError, match="--generated .* no file .* --region"):
        evaluate.main(file_arguments(studio, tmp_path, folder, folder, "--region", "5", "6"))
    with pytest.raises(sample.UserError, match="--region must be two times"):
        evaluate.main(file_arguments(studio, tmp_path, folder, folder, "--region", "0.5", "0.5"))


def test_a_file_that_changed_is_measured_again(studio, tmp_path):
    """New audio under the old name: of generated clips and of the training music alike."""
    copy_tracks(studio / "train", tmp_path / "made")
    copy_tracks(studio / "train", tmp_path / "music")
    folders = tmp_path / "made", studio / "train"
    command = file_arguments(studio, tmp_path / "out", *folders, "--reference")

    def run():
        evaluate.main([*command, str(tmp_path / "music")])
        found = figures(tmp_path / "out")
        return found["Generated", "files", "MR"], found["Test set", "files", "FAD"]
    mel, fad = run()
    soundfile.write(tmp_path / "made" / "0.wav", np.zeros((44100, 2)), 44100)
    changed, same = run()
    assert mel == 0 and changed > 0.5 and same == fad
    soundfile.write(tmp_path / "music" / "0.wav", np.zeros((44100, 2)), 44100)
    assert run()[1] != fad


def test_clips_are_paired_by_their_place_in_the_folder(tmp_path):
    """Two albums may both have a track 01; two files of one name in one place are refused."""
    for path in ("a/01.wav", "b/01.wav"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    paths = {f"{album}/01": str(tmp_path / album / "01.wav") for album in "ab"}
    assert evaluate.clips_in(tmp_path) == paths
    (tmp_path / "a" / "01.mp3").touch()
    with pytest.raises(sample.UserError, match="01.mp3 and .*01.wav have the same name"):
        evaluate.clips_in(tmp_path)


# ---- what cannot be used -------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    (["--data", "EMPTY"], "no usable file of 0.74 s or more"),
    (["--classifier", "latent.pt"], "holds a latent model, not a classifier"),
    (["--model", "waveform"], "holds a latent model, not a waveform"),
    (["--passt", "latent.pt"], "--classifier does nothing with --passt"),
    (["--vggish", "latent.pt"], "vggish-10086976"),
    (["--reference", "test"], "has 3 usable excerpts .*, and 4 are needed"),
    (["--xi", "0", "--tasks", "infill", "embedding"], "--xi 0 turns off all guidance"),
    (["--sampler", "none", "--steps", "3"], "--steps does nothing with --sampler none"),
    (["--sampler", "none", "--k", "0.5"], "--k does nothing with --sampler none"),
    (["--region", "0", "1"], "--region does nothing with --data"),
    (["--sampler", "euler"], "--sampler"),
    (["--steps", "0"], "--steps"),
    (["--clips", "1"], "a single clip has no FAD"),
    (["--out", "latent.pt"], "--out .*latent.pt cannot be written"),
    (["--generated", "test"], "give either --data, .* or both --generated and --originals"),
    (["--generated", "test", "--originals", "test"], "give either --data"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_input_that_cannot_be_used_ends_in_a_sentence(flags, said, studio, tmp_path):
    """What is wrong, and which flag or file."""
    places = {"EMPTY": tmp_path, "test": studio / "test", "latent.pt": studio / "latent.pt"}
    flags = [str(places.get(flag, flag)) for flag in flags]
    with pytest.raises(sample.UserError, match=said):
        evaluate.main(arguments(studio, tmp_path / "out", *flags))


def test_a_file_that_is_not_the_official_passt_is_refused(studio):
    """In one sentence, which names the file that is wanted."""
    options = SimpleNamespace(passt=str(studio / "latent.pt"), classifier=None, vggish=None)
    with pytest.raises(sample.UserError, match="passt-s-f128"):
        evaluate.Judges(options, "cpu")


@pytest.mark.parametrize("name", ["records/*/files-*/*.pt", "reference-*/*/*.pt",
                                  "reference-*/excerpts.json"])
def test_a_damaged_file_of_an_earlier_run_is_named(name, studio, tmp_path):
    """Once it is deleted, what it held is measured again, and the table is the same."""
    command = file_arguments(studio, tmp_path, studio / "test", studio / "train")
    evaluate.main(command)
    before = (tmp_path / "table.json").read_bytes()
    damaged = sorted(tmp_path.glob(name))[0]
    damaged.write_bytes(b"{")
    with pytest.raises(sample.UserError, match=f"{damaged} is damaged .*: delete it"):
        evaluate.main(command)
    damaged.unlink()
    evaluate.main(command)
    assert (tmp_path / "table.json").read_bytes() == before


@pytest.mark.parametrize("flags", [
    ["--xi", "0"], ["--no-equalise"], ["--steps", "5"], ["--as-printed"], ["--k", "0.7"],
    ["--sampler", "ddim"], ["--tasks", "infill"], ["--clips", "3"], ["--model", "latent"],
    ["--checkpoint", "x.pt"]], ids=lambda flags: flags[0])
def test_flags_for_a_model_are_refused_for_files(flags, studio, tmp_path):
    """No flag is ignored without a word."""
    command = file_arguments(studio, tmp_path, studio / "test", studio / "test")
    flag = flags[0].replace("--no-", "--")
    with pytest.raises(sample.UserError, match=f"^{flag} does nothing with --generated"):
        evaluate.parse([*command, *flags])


@pytest.mark.parametrize("flags, tasks", [
    (["--trials", "4"], ["unconditional", "infill"]), (["--k", "0.7"], ["embedding"]),
    (["--xi", "1"], ["unconditional", "embedding"]), (["--no-equalise"], ["unconditional"])],
    ids=lambda value: value[0])
def test_settings_that_no_chosen_task_uses_are_refused(flags, tasks, studio, tmp_path):
    """Its row would be named by what it does not have; with one more task it has."""
    command = arguments(studio, tmp_path, *flags, "--tasks", *tasks)
    flag = flags[0].replace("--no-", "--")
    with pytest.raises(sample.UserError, match=f"^{flag} does nothing with --tasks {tasks[0]}"):
        evaluate.parse(command)
    assert evaluate.parse([*command, *evaluate.TASKS]).given


@pytest.mark.parametrize("folders", [[], ["--generated"], ["--originals"]], ids=str)
def test_folders_that_are_missing_are_named(folders):
    """Of one or the other way to call it."""
    flags = [word for flag in folders for word in (flag, "somewhere")]
    with pytest.raises(sample.UserError, match="give either --data, .* or both --generated"):
        evaluate.parse(["--reference", "music", *flags])
    with pytest.raises(sample.UserError, match="--reference"):
        evaluate.parse(["--data", "music"])


def test_help_prints_the_defaults(capsys):
    """Those that the code has."""
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    defaults = ("(100)", "(10000)", "(latent)", f"({sample.Settings.sampler})",
                f"({sample.Settings.steps})", "clips at a time (8)")
    assert all(default in said for default in defaults)
