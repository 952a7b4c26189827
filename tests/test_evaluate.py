"""The metrics, the rows and the driver of Table 1 (evaluate.py)."""
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import dit
import evaluate
import golden
import sample
import unet1d
import vae
from conftest import save_checkpoint
from evaluate import VGGish, frechet_distance, gaussian, kl_divergence, mel_distance, realism
from tasks import PASST_PRESETS, PaSST, PaSSTConfig, load_official, mel_triangles, resample

METRICS = Path(__file__).resolve().parents[2] / "shared" / "metrics"


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fad(x, y):
    return frechet_distance(*gaussian(x), *gaussian(y))


# ---- metrics --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(not (METRICS / "check_metrics.py").exists(), reason="no golden vectors beside the checkout")
def test_metrics_agree_with_the_reference_codes():
    """The golden vectors made with the original metric codes, every part."""
    adapter = Path(__file__).with_name("metrics_adapter.py")
    command = [sys.executable, METRICS / "check_metrics.py", "--golden", METRICS / "golden", "--adapter", adapter]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "failed: 0" in done.stdout, done.stdout + done.stderr


def loaded(net, shapes):
    net.load_state_dict({key: torch.from_numpy(array) for key, array in golden.weights(shapes).items()})
    return net.eval().requires_grad_(False)


def test_metrics_agree_with_golden_vectors():
    """What tests/golden.py computes from the formulas, in numpy and float64, comes out here in torch."""
    expected = {name: torch.from_numpy(array) for name, array in np.load(golden.FILE).items()}
    found = {"frechet": torch.tensor(fad(*map(torch.from_numpy, golden.embeddings()))),
             "kl": kl_divergence(*map(torch.from_numpy, golden.posteriors()))}
    one, two = map(torch.from_numpy, golden.embeddings())
    found |= {"realism": realism(one, two), "realism_all": realism(one, two, k=5, prune=False)}
    x, y = (torch.from_numpy(golden.signal(name, 44100, 0.3)).float() for name in "xy")
    found["mel_distance"] = torch.stack([mel_distance(x, z, 44100) for z in (y, x / 2, 0 * x)])
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-5)


def test_listeners_agree_with_golden_vectors():
    """The front ends and networks of VGGish and PaSST, with random weights under the official keys."""
    expected = {name: torch.from_numpy(array) for name, array in np.load(golden.FILE).items()}
    mono = {name: torch.from_numpy(golden.signal(name, rate, seconds).mean(0)).float()[None]
            for name, rate, seconds in (("v", 16000, 1.0), ("p", 32000, 0.5))}
    net = loaded(VGGish(), golden.vggish_shapes())
    patches = net.patches(mono["v"])[0]
    torch.testing.assert_close(patches[:, ::8], expected["vggish_patches"], rtol=0, atol=2e-4)
    torch.testing.assert_close(net(patches), expected["vggish"].float(), rtol=1e-4, atol=1e-4)
    audio = normal(1, 2, 44100, dtype=torch.float32)
    torch.testing.assert_close(net.listen(audio, 44100)[0], net(net.patches(resample(audio.mean(1), 44100, 16000))[0]))
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
    found = frechet_distance(m, torch.diag(s1**2), torch.zeros(6, dtype=torch.float64), torch.diag(s2**2))
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
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), abs=1e-5)
    assert kl_divergence(q, q).item() == pytest.approx(0, abs=1e-5)
    assert kl_divergence(torch.tensor([1.0, 0.0]).double(), p).item() == pytest.approx(math.log(2), abs=1e-5)


def test_mel_distance_is_zero_symmetric_and_per_clip():
    """0 for equal audio; d(x, y) = d(y, x); a batch gives what its clips give."""
    x, y = normal(3, 2, 9000, dtype=torch.float32) / 10, normal(3, 2, 9000, seed=1, dtype=torch.float32) / 10
    assert mel_distance(x, x, 44100).tolist() == [0, 0, 0]
    torch.testing.assert_close(mel_distance(x, y, 44100), mel_distance(y, x, 44100))
    torch.testing.assert_close(mel_distance(x, y, 44100)[1], mel_distance(x[1], y[1], 44100))


def test_realism_is_the_largest_radius_over_distance():
    """On a line of points one apart, the third neighbour is two away, at the ends three: these are pruned."""
    line = torch.arange(10.0)[:, None]                     # radii 3 2 2 ... 2 2 3
    assert realism(line, torch.tensor([[11.0]]), prune=False).item() == pytest.approx(3 / 2)
    assert realism(line, torch.tensor([[11.0]]), prune=True).item() == pytest.approx(2 / 3)      # the ends have gone
    assert realism(line, torch.tensor([[0.5]]), k=1, prune=False).item() == pytest.approx(1 / 0.5)


def test_realism_does_not_change_with_scale_and_survives_a_copy():
    """Distances are compared with distances; a generated clip equal to a reference gives a finite score."""
    x, y = normal(40, 6), normal(9, 6, seed=1)
    torch.testing.assert_close(realism(x, y), realism(5 * x, 5 * y))
    assert realism(x, x[:3]).isfinite().all()
    with pytest.raises(ValueError, match="more than k = 3"):
        realism(x[:3], y)


# ---- VGGish ---------------------------------------------------------------------------------------------------------

def front_end(dtype):
    """VGGish without weights, which would take 0.3 GB."""
    with torch.device("meta"):
        net = VGGish()
    net.window, net.triangles = torch.hann_window(400, dtype=dtype), mel_triangles(64, 125, 7500, 257).to(dtype)
    return net


def test_vggish_front_end_counts_whole_patches():
    """0, 1 and 5 patches for 15599 samples, 15600 and 5 s; silence is ln 0.01."""
    net = front_end(torch.float32)
    assert [net.patches(torch.zeros(1, n)).shape[1] for n in (100, 15599, 15600, 80000)] == [0, 0, 1, 5]
    torch.testing.assert_close(net.patches(torch.zeros(1, 15600)), torch.full((1, 1, 96, 64), math.log(0.01)))
    with pytest.raises(sample.UserError, match="0.975 s"):
        net.listen(torch.zeros(1, 2, 44100 // 2), 44100)


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
    audio, direction, y = normal(1, 44100).requires_grad_(), normal(1, 44100, seed=1), normal(1, 1, 96, 64, seed=2)

    def distance(x):
        return torch.linalg.vector_norm(net.patches(resample(x, 44100, 16000)) - y)

    gradient, = torch.autograd.grad(distance(audio), audio)
    h = 1e-6
    difference = (distance(audio + h * direction) - distance(audio - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-9)


# ---- tasks ----------------------------------------------------------------------------------------------------------

def test_layout_has_the_times_of_the_paper():
    """2.4 s up to 6 s, the middle 2 s and 2.5 s, 5 s; contexts rounded inwards to frames; 6 s in a longer window."""
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


def save_classifier(path):
    torch.manual_seed(1)
    net = PaSST(PASST_PRESETS["tiny"])
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    save_checkpoint(path, "classifier", net, classes=list("abcdefghi"))


def save_models(root):
    torch.manual_seed(2)
    coder, net, unet = vae.VAE(vae.PRESETS["tiny"]), dit.DiT(dit.PRESETS["tiny"]), unet1d.UNet1D(unet1d.PRESETS["tiny"])
    for p in (*coder.parameters(), *net.parameters(), *unet.parameters()):             # many layers do nothing yet as
        p.data += 0.02 * torch.randn_like(p)                                            # they are initialised
    save_checkpoint(root / "latent.pt", "latent", net, coder)
    save_checkpoint(root / "waveform.pt", "waveform", unet)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with models, `test` and `train` music, the latter with a short, an empty and an unreadable file."""
    root = tmp_path_factory.mktemp("studio")
    save_classifier(root / "classifier.pt")
    save_models(root)
    for folder, count in (("test", 3), ("train", 6)):
        (root / folder).mkdir()
        for i in range(count):
            t = np.arange(44100) / 44100
            chord = sum(np.sin(2 * np.pi * 110 * (i + 2) * k * t) / k for k in (1, 2, 3))
            noise = np.random.default_rng([i, count]).standard_normal((44100, 2))
            soundfile.write(root / folder / f"{i}.wav", 0.1 * chord[:, None] + 0.02 * noise, 44100)
    soundfile.write(root / "train" / "short.wav", np.zeros((2000, 2)), 44100)
    (root / "train" / "empty.wav").touch()
    (root / "train" / "text.wav").write_text("words")
    return root


def arguments(studio, out, *more):
    return ["--checkpoint", str(studio / "latent.pt"), "--listener", str(studio / "classifier.pt"), "--data",
            str(studio / "test"), "--reference", str(studio / "train"), "--sampler", "ddpm", "--steps", "2",
            "--out", str(out), "--device", "cpu", *more]


def unspliced(studio, model, task, x, passt=None):
    """What two steps of a model make of x, from the same noise every time."""
    checkpoint = sample.load_checkpoint(studio / f"{model}.pt")
    span = evaluate.layout(checkpoint.window * checkpoint.hop, checkpoint.hop)[task]
    clips = evaluate.Batch(task, span, x, None, [torch.Generator().manual_seed(0)])
    return evaluate.unspliced(checkpoint, clips, evaluate.sample.Settings("ddpm", 2, 0.03), passt), span


@pytest.mark.parametrize("model, task, deaf", [("latent", "infill", True), ("latent", "continuation", True),
                                               ("latent", "regenerate", False), ("waveform", "infill", True)])
def test_edits_hear_nothing_of_the_region(studio, model, task, deaf):
    """Infill and continuation: other audio in the region, the same result, bit for bit; regenerate does change."""
    x = normal(1, 2, 2**15, dtype=torch.float32) / 10
    made, (a, b, *_) = unspliced(studio, model, task, x)
    again, _ = unspliced(studio, model, task, torch.cat([x[..., :a], 1 - x[..., a:b], x[..., b:]], -1))
    assert torch.equal(made, again) == deaf


def test_guidance_by_example_is_guided(studio, monkeypatch):
    """Without the weight of the embedding's distance the same noise becomes other audio, of the same equalisation."""
    x, passt = normal(1, 2, 2**15, dtype=torch.float32) / 10, sample.load_checkpoint(studio / "classifier.pt").net
    guided, _ = unspliced(studio, "latent", "embedding", x, passt)
    monkeypatch.setitem(evaluate.sample.XI_GUIDE, "embedding", 0.0)
    assert (guided - unspliced(studio, "latent", "embedding", x, passt)[0]).abs().max() > 1e-4


def test_fillers_hold_what_their_names_say():
    """In the region: silence, noise at each clip's own level, the context over and over, another track; the original
    around it. The last is never the track itself, where there are others."""
    other, x = normal(2, 2, 2, 9000) * torch.tensor([0.1, 3.0])[:, None, None]
    span = evaluate.Span(2000, 8000, 0, 9000)
    clips = evaluate.Batch("infill", span, x, other, [torch.Generator().manual_seed(i) for i in range(2)])
    made = {row.name: row.produce(clips) for row in evaluate.FILLERS}
    for audio in made.values():
        assert torch.equal(audio[..., :2000], x[..., :2000]) and torch.equal(audio[..., 8000:], x[..., 8000:])
    silence, noise, repeated, another = (y[..., 2000:8000] for y in made.values())
    assert list(made) == ["Silence", "White noise", "Context repeated", "Another track"] and not silence.any()
    torch.testing.assert_close(noise.std((1, 2)), x.std((1, 2)), rtol=0.05, atol=0)
    assert torch.equal(repeated, x[..., :2000].repeat(1, 1, 3)) and torch.equal(another, other[..., 2000:8000])
    excerpts = [(path, i, 9) for path in "abc" for i in range(5)]
    assert all(excerpt[0] != drawn[0] for excerpt, drawn in evaluate.with_another(excerpts, 0))


def test_figures_compare_with_the_training_music_and_transitions_with_the_crossfade():
    """KLD is that of its posterior against the clips'; realism is twice the cross-fade's at half the distance."""
    music = {"fad": normal(9, 2), "posterior": torch.tensor([1.0, 0.0]), "embedding": torch.arange(10.0)[:, None]}
    def records(row, _):                                   # without its ends, the music has radii of 2 up to 8
        place = torch.tensor([12.0 if row is evaluate.TEST_SET else 10.0])
        return {j: {"fad": normal(1, 2, seed=j), "posterior": torch.tensor([0.2 + 0.6 * j, 0.8 - 0.6 * j]),
                    "embedding": place, "curve": torch.ones(19)} for j in range(2)}
    spans = {"transition": evaluate.Span(1, 2, 0, 3)}
    evaluation = SimpleNamespace(records=records, spans=spans, reference={3: music})
    found = evaluate.Evaluation.figures(evaluation, "ours", "transition")
    assert found["Realism"] == [pytest.approx(2), 0, 2] and found["KLD"][0] == pytest.approx(math.log(2), abs=1e-5)


def figures(out):
    rows = json.loads((out / "table.json").read_text())["rows"]
    return {(row, task, metric): value for row, by_task in rows.items() for task, found in by_task.items()
            for metric, (value, _, _) in found.items() if metric != "Figure 1"}


def test_a_run_writes_table_1_and_goes_on_where_it_stopped(studio, tmp_path, capsys):
    """All tasks; a lost record is measured again and nothing else is; batches of another size give the same figures."""
    evaluate.main(arguments(studio, tmp_path / "a"))
    printed = capsys.readouterr().out
    assert "FAD by PaSST" in printed and "3 transition" in printed and "6 excerpts" in printed
    first = figures(tmp_path / "a")
    assert {task for row, task, _ in first if row == "Latent DDPM 2"} == set(evaluate.TASKS)
    assert first["Test set", "infill", "MR"] == 0 and first["Test set", "transition", "Realism"] == pytest.approx(1)
    assert first["Latent DDPM 2", "regenerate", "MR"] != first["Latent DDPM 2", "infill", "MR"]
    assert first["VAE", "regenerate", "MR"] == first["VAE", "infill", "MR"]
    assert first["Silence", "infill", "MR"] > 2
    assert all(math.isfinite(value) for value in first.values())
    table = json.loads((tmp_path / "a" / "table.json").read_text())
    assert table["settings"]["checkpoint"] == evaluate.sample.digest(studio / "latent.pt")
    curve, _, n = table["rows"]["Latent DDPM 2"]["transition"]["Figure 1"]
    assert n == 3 and len(curve) == 19 and curve[0] < curve[-1]                       # away from the first track
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.pt")}
    lost = next(path for path in records if "latent-ddpm-2/infill" in path.as_posix())
    lost.unlink()
    evaluate.main(arguments(studio, tmp_path / "a", "--tasks", "infill"))
    assert [path for path in records if path.stat().st_mtime_ns != records[path]] == [lost]
    assert figures(tmp_path / "a") == pytest.approx(first, abs=1e-6)
    evaluate.main(arguments(studio, tmp_path / "b", "--batch", "1", "--tasks", "infill"))
    alone = figures(tmp_path / "b")
    assert alone == pytest.approx({key: first[key] for key in alone}, abs=1e-5)


def test_runs_of_one_checkpoint_add_up_to_one_table(studio, tmp_path, capsys):
    """Tasks join their rows; flags make a row of its own, which they name; what was not measured is a dash. All are
    compared with the same excerpts of the training music."""
    for more in (["unconditional"], ["infill"], ["continuation"], ["infill", "--xi", "0.5"]):
        evaluate.main(arguments(studio, tmp_path, "--tasks", *more))
    measured = {}
    for row, task, _ in figures(tmp_path):
        measured.setdefault(row, set()).add(task)
    assert measured["Latent DDPM 2"] == measured["Test set"] == measured["Silence"] == {"unconditional", "infill", "continuation"}
    assert measured["Latent DDPM 2, xi 0.5"] == {"infill"}
    assert "/-" in capsys.readouterr().out and len(list(tmp_path.glob("reference-*.pt"))) == 1


def test_the_waveform_model_has_a_row_and_no_vae(studio, tmp_path):
    """The same lines as for the latent one, without the autoencoder's."""
    model = ["--model", "waveform", "--checkpoint", str(studio / "waveform.pt"), "--tasks", "infill"]
    evaluate.main(arguments(studio, tmp_path, *model))
    found = figures(tmp_path)
    assert {row for row, *_ in found} == {"Waveform DDPM 2", "Test set", *(row.name for row in evaluate.FILLERS)}
    assert 0 < found["Waveform DDPM 2", "infill", "MR"] < math.inf


def test_what_other_code_measured_is_measured_again(studio, tmp_path, monkeypatch):
    """A module that changes by a byte changes the name of every file that is kept."""
    def names():
        evaluate.code_hash.cache_clear()
        evaluate.main(arguments(studio, tmp_path / "out", "--tasks", "infill", "--sampler", "none"))
        return {path.name for path in (tmp_path / "out").rglob("*.pt")}
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    (tmp_path / "tasks.py").write_text("one")
    before = names()
    assert names() == before
    (tmp_path / "tasks.py").write_text("two")
    after = names()
    assert before < after and len(after) == 2 * len(before)
    evaluate.code_hash.cache_clear()


def test_runs_into_one_folder_make_one_table(studio, tmp_path):
    """A second run with another sampler adds its row, and measures no other again; other clips begin a new table."""
    evaluate.main(arguments(studio, tmp_path, "--tasks", "infill"))
    one = figures(tmp_path)
    evaluate.main(arguments(studio, tmp_path, "--tasks", "infill", "--sampler", "ddim"))
    both = figures(tmp_path)
    assert both == {**one, **{key: value for key, value in both.items() if key[0] == "Latent DDIM 2"}}
    assert len(both) == len(one) + 3
    evaluate.main(arguments(studio, tmp_path, "--tasks", "infill", "--sampler", "none", "--clips", "2"))
    assert {row for row, *_ in figures(tmp_path)} == {row for row, *_ in one} - {"Latent DDPM 2"}


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(studio, tmp_path):
    """Under torchrun they share the clips, and one of them writes the table."""
    more = ["--tasks", "infill", "transition"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               Path(evaluate.__file__), *arguments(studio, tmp_path / "two", *more)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("Latent DDPM 2") == 1, done.stdout + done.stderr
    evaluate.main(arguments(studio, tmp_path / "one", *more))
    assert figures(tmp_path / "two") == pytest.approx(figures(tmp_path / "one"), abs=1e-5)


def test_few_clips_are_announced_with_their_number(studio, tmp_path, capfd):
    """Three embeddings of 32 dimensions: the warning says so."""
    evaluate.say_once.cache_clear()
    evaluate.main(arguments(studio, tmp_path, "--tasks", "unconditional"))
    assert "FAD from n = 3 embeddings of 32 dimensions" in "".join(capfd.readouterr())


def test_files_of_another_system_are_scored_the_same_way(studio, tmp_path):
    """A short, an unreadable and a silent file among the others change nobody else's record."""
    generated = tmp_path / "generated"
    generated.mkdir()
    for path in (studio / "test").glob("*.wav"):
        (generated / path.name).write_bytes(path.read_bytes())
    music = str(studio / "train")
    command = ["--generated", str(generated), "--originals", music, "--reference", music, "--region", "0.2", "0.7",
               "--listener", str(studio / "classifier.pt"), "--device", "cpu", "--out"]
    evaluate.main([*command, str(tmp_path / "clean")])
    soundfile.write(generated / "3.wav", np.zeros((44100, 2)), 44100)
    soundfile.write(generated / "4.wav", np.zeros((400, 2)), 44100)
    (generated / "5.wav").write_text("words")
    evaluate.main([*command, str(tmp_path / "odd")])
    clean, odd = (sorted((tmp_path / out).glob("records/generated/files/*.pt")) for out in ("clean", "odd"))
    assert len(clean) == 3 and len(odd) == 4
    for a, b in zip(clean, odd):
        a, b = (torch.load(path, weights_only=True) for path in (a, b))
        assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    found = figures(tmp_path / "odd")
    assert found["Test set", "files", "MR"] == 0 < found["Generated", "files", "MR"]


def test_a_file_that_changed_is_measured_again(studio, tmp_path):
    """New audio under the old name gives new figures, of generated clips and of the training music alike."""
    for folder in ("made", "music"):
        (tmp_path / folder).mkdir()
        for path in (studio / "train").glob("[0-9].wav"):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())

    def measured():
        evaluate.read_excerpt.cache_clear(), evaluate.read_track.cache_clear()             # as in a new process
        evaluate.main(["--generated", str(tmp_path / "made"), "--originals", str(studio / "train"), "--reference",
                       str(tmp_path / "music"), "--listener", str(studio / "classifier.pt"), "--device", "cpu", "--out",
                       str(tmp_path / "out")])
        found = figures(tmp_path / "out")
        return found["Generated", "files", "MR"], found["Test set", "files", "FAD"]
    mel, fad = measured()
    soundfile.write(tmp_path / "made" / "0.wav", np.zeros((44100, 2)), 44100)
    assert mel == 0 and measured()[0] > 0.5 and measured()[1] == fad
    soundfile.write(tmp_path / "music" / "0.wav", np.zeros((44100, 2)), 44100)
    assert measured()[1] != fad


def test_a_part_of_the_music_is_a_part_of_every_folder(tmp_path):
    """Fewer excerpts than files: they come from files at random, not from those whose names sort first."""
    for name in ("ambient", "rock"):
        (tmp_path / name).mkdir()
        for i in range(20):
            soundfile.write(tmp_path / name / f"{i:02}.wav", np.zeros((5000, 2)), 44100)
    drawn = evaluate.find_excerpts(tmp_path, 2000, 20, seed=0)
    assert len({path for path, *_ in drawn}) == 20 and 4 < sum("rock" in path for path, *_ in drawn) < 16
    assert set(drawn) < set(evaluate.find_excerpts(tmp_path, 2000, 30, seed=0))


def test_a_clip_with_samples_that_are_no_numbers_is_left_out(studio, tmp_path):
    """A model that breaks on one clip of three: the other two are counted, and every figure stays finite."""
    options = evaluate.parse(arguments(studio, tmp_path))
    device, listeners = torch.device("cpu"), evaluate.Listeners(options, torch.device("cpu"))
    spans = {"unconditional": evaluate.Span(0, 30000, 0, 30000)}
    pairs = {"unconditional": evaluate.with_another(evaluate.find_excerpts(studio / "test", 30000, 3, 0), 0)}
    reference = evaluate.hear_reference([30000], listeners, options, tmp_path, device)
    evaluation = evaluate.Evaluation(tmp_path, pairs, spans, listeners, reference, options, device)
    row = evaluate.Row("Broken", ("unconditional",), lambda clips: clips.x / torch.tensor([1, 0, 1])[:, None, None])
    evaluation.run([row])
    found = evaluation.figures(row, "unconditional")
    assert all(math.isfinite(value) and n == 2 for value, _, n in found.values())


def test_missing_folders_and_flags_end_in_a_sentence(studio, tmp_path):
    """Folders missing or too many, no music in one, a sampler that does not exist, a checkpoint of the wrong kind."""
    command, folder = arguments(studio, tmp_path), str(studio / "test")
    at = command.index("--data")
    bare = command[:at] + command[at + 2:]
    for folders in ([], ["--generated", folder], ["--originals", folder], ["--data", folder, "--generated", folder],
                    ["--data", folder, "--generated", folder, "--originals", folder]):
        with pytest.raises(sample.UserError, match="give either --data, .* or both --generated and --originals"):
            evaluate.main(bare + folders)
    with pytest.raises(sample.UserError, match="no usable file of 0.74 s or more"):
        evaluate.main(command[:at + 1] + [str(tmp_path)] + command[at + 2:])
    with pytest.raises(sample.UserError, match="holds a latent model, not a classifier"):
        evaluate.main([*command, "--listener", str(studio / "latent.pt")])
    with pytest.raises(sample.UserError, match="holds a latent model, not a waveform"):
        evaluate.main([*command, "--model", "waveform", "--checkpoint", str(studio / "latent.pt")])
    with pytest.raises(sample.UserError, match="passt-s-f128"):
        evaluate.main([*command, "--passt", str(studio / "latent.pt")])
    with pytest.raises(sample.UserError, match="under 5 excerpts"):
        evaluate.main([*command, "--reference", folder])
    files = ["--reference", folder, "--generated", folder, "--originals", folder]
    for idle in (["--xi", "1"], ["--no-equalise"], ["--steps", "5"], ["--as-printed"], ["--k", "0.7"]):
        for doing in (files, ["--figure2", f"a={folder}", f"b={folder}"]):
            with pytest.raises(sample.UserError, match=f"^{idle[0].replace('--no-', '--')} does nothing here"):
                evaluate.parse([*doing, *idle])
    with pytest.raises(sample.UserError, match="--region does nothing here"):
        evaluate.parse([*command, "--region", "0", "1"])
    for wrong in (["--sampler", "euler"], ["--steps", "0"]):
        with pytest.raises(SystemExit):
            evaluate.main([*command, *wrong])
