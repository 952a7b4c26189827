"""The measures and tables of tests/sanity.py."""
import math
import shutil
from types import SimpleNamespace

import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

import sanity
import sample
from judge import Judge

T = torch.arange(3 * 44100) / 44100
NOISE = torch.randn(2, len(T), generator=torch.Generator().manual_seed(0)) / 10


def tones(*frequencies):
    return sum(torch.sin(2 * torch.pi * f * T) for f in frequencies).expand(2, -1) / 10


def measured(audio, context, *others):
    chromas = []
    for clip in (context, *others):
        _, at_peaks, f = sanity.peaks(clip.mean(0).double())
        chromas.append(sanity.chroma(at_peaks, f))
    values = sanity.likeness(audio, chromas[0], torch.stack(chromas[1:]))
    return dict(zip(("tonal", "pitch", "beat", "flux"), values.tolist()))


# ---- likeness ------------------------------------------------------------------------------------

def test_a_chord_is_tonal_and_noise_is_not():
    """Sines are all peaks; white noise hardly has one."""
    a, b = tones(220, 275, 330), tones(233, 294, 349)
    assert measured(a, a, b)["tonal"] > 0.99
    assert measured(NOISE, a, b)["tonal"] < 0.02


def test_pitch_tells_the_own_context_from_another():
    """1 for the notes of the own context alone, -1 for those of the other; octaves are equal."""
    a, b = tones(220, 440), tones(311.1)
    assert measured(tones(880), a, b)["pitch"] == pytest.approx(1, abs=0.01)
    assert measured(tones(622.3), a, b)["pitch"] == pytest.approx(-1, abs=0.01)


def test_regular_bursts_have_a_beat_and_uneven_flux():
    """Bursts of noise twice a second against the same noise, steady."""
    bursts = NOISE * (torch.exp(-20 * (T % 0.5)) + 1e-3)
    a = tones(220)
    assert measured(bursts, a, a)["beat"] > 0.8
    assert measured(NOISE, a, a)["beat"] < 0.3
    assert measured(bursts, a, a)["flux"] > 5 * measured(NOISE, a, a)["flux"]


def test_silence_has_none_of_it(capsys):
    """As the repeated context of a gap between very short contexts; no row divides by it."""
    silence, a = 0 * NOISE, tones(220)
    assert measured(silence, a, tones(311.1)) == {"tonal": 0, "pitch": 0, "beat": 0, "flux": 0}
    options = SimpleNamespace(task="continuation")
    study = SimpleNamespace(options=options, clips=[silence])
    sanity.show_attacks(study, "attacks", {"real": [silence], "model": [a]})
    assert capsys.readouterr().out.splitlines()[2].split()[1:] == ["0.00", "-", "0.00", "-"]


# ---- attacks -------------------------------------------------------------------------------------

PARTIALS = [250 * 2 ** (k / 3 + 1 / 6) for k in range(15)]      # one in each third of an octave


def clicks(rate, jitter=0.0, seed=0):
    """Clicks of half a millisecond, moved by up to `jitter` of their distance at random."""
    moves = 2 * torch.rand(100, generator=torch.Generator().manual_seed(seed)) - 1
    audio = torch.zeros(2, len(T))
    for i in range(int(2.9 * rate)):
        start = round((i + 0.5 + jitter * moves[i].item()) / rate * 44100)
        audio[:, start:start + 22] = 0.5
    return audio


def notes(rate):
    """A chord with a partial in every band, struck `rate` times a second, that decays."""
    return tones(*PARTIALS) * torch.exp(-5 * rate * (T % (1 / rate)))


@pytest.mark.parametrize("rate", (2, 4, 6))
def test_attacks_counts_clicks_and_notes(rate):
    """Within a tenth, also under soft hiss; the first note has nothing before it."""
    hiss = 0.01 * NOISE
    for audio in (clicks(rate), clicks(rate) + hiss):
        assert sanity.attacks(audio)[0] == pytest.approx(int(2.9 * rate) / 3, rel=0.1)
    assert sanity.attacks(notes(rate))[0] == pytest.approx(rate - 1 / 3, rel=0.1)


def test_noise_steady_tones_and_swells_have_no_attacks():
    """White noise, noise that falls with frequency, a chord that lasts, a chord reversed."""
    spectrum = torch.fft.rfft(NOISE)
    pink = torch.fft.irfft(spectrum / (1 + torch.arange(spectrum.shape[1])).sqrt(), len(T))
    for audio in (NOISE, pink, tones(*PARTIALS)):
        assert sanity.attacks(audio)[0] < 0.1
    # Reversed notes, that end without a click: up to 175 dB a second.
    for rate in (2, 4):
        gate = (20 * (T % (1 / rate))).clamp(max=1)
        swells = (notes(rate) * gate).flip(1)
        assert sanity.attacks(swells)[0] < 0.5


def test_a_note_in_a_sounding_chord_counts():
    """A tone that joins a louder one in its third of an octave, once."""
    audio = tones(1060) + 0.3 * tones(1180) * (T > 1.5)
    marks = sanity.onsets(audio.mean(0).double())
    band = int(3 * math.log2(1180 / 250))
    assert marks[band].sum() == 1
    centre = marks[band].nonzero().item() * sanity.HOP + sanity.FRAME / 2
    assert centre / 44100 == pytest.approx(1.5, abs=0.03)


def test_attacks_do_not_depend_on_gain_and_equalisation():
    """20 dB less, and a filter that falls by 6 dB an octave."""
    audio = clicks(4) + notes(3) + 0.001 * NOISE
    spectrum = torch.fft.rfft(audio)
    darker = torch.fft.irfft(spectrum / (1 + torch.arange(spectrum.shape[1]) / 1000), len(T))
    rate, _ = sanity.attacks(audio)
    assert sanity.attacks(0.1 * audio)[0] == pytest.approx(rate, rel=0.02)
    assert sanity.attacks(darker)[0] == pytest.approx(rate, rel=0.1)


def test_regular_attacks_are_told_from_irregular_ones():
    """Clicks in time, clicks in between, where some intervals are equal by chance, and none."""
    assert sanity.attacks(clicks(4))[1] > 0.7
    assert sanity.attacks(clicks(4, jitter=0.5, seed=2))[1] < 0.35
    assert sanity.attacks(NOISE)[1] < 0.2


# ---- the others ----------------------------------------------------------------------------------

def test_cosine_with_the_own_aim_and_with_others():
    """Of three samples the first two have each other's aim.

    So one own cosine of 1, two of the six others, one right.
    """
    made = torch.eye(3)[[1, 0, 2]]
    assert sanity.own_and_others(made, torch.eye(3)) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_how_often_the_wanted_class_is_the_likeliest():
    """Scores count up to a constant: 3 to 1 is a probability of 3 / 4, or 1 / 4."""
    scores = torch.tensor([[3.0, 1.0], [1.0, 3.0], [30.0, 10.0]]).log()
    right, logp = sanity.wanted_class(scores, torch.tensor([0, 0, 0]))
    assert right == 2
    assert torch.allclose(logp.exp(), torch.tensor([0.75, 0.25, 0.75]))


def test_a_copied_excerpt_is_found():
    """The highest correlation of an excerpt of the track is 1, that of other noise is far lower."""
    generator = torch.Generator().manual_seed(1)
    track = torch.randn(50000, generator=generator)
    other = torch.randn(4000, generator=generator)
    best = sanity.best_correlation([track[20000:24000], other], track)
    assert best[0] == pytest.approx(1, abs=1e-3)
    assert best[1] < 0.1


def band_noise(seed, centre, seconds=4):
    """Noise (2, n) around a frequency in Hz."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(torch.randn(2, seconds * 44100, generator=generator))
    f = torch.arange(spectrum.shape[1]) / seconds
    return torch.fft.irfft(spectrum * torch.exp(-((f / centre).clamp(min=0.01).log() ** 2))) * 0.2


def test_the_judge_tells_tracks_and_classes(tmp_path):
    """Two classes of two tracks each, of noise in other bands; level and place do not matter."""
    centres = {"deep/a": 150, "deep/b": 300, "high/c": 2000, "high/d": 5000}
    for seed, (name, centre) in enumerate(centres.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sf.write(tmp_path / f"{name}.wav", band_noise(seed, centre).T.numpy(), 44100)
    judge = Judge([tmp_path], 0.5)

    def excerpts(seed):
        tracks = enumerate(centres.values())
        return torch.stack([band_noise(seed + i, centre, 1) for i, centre in tracks])

    first, second = excerpts(10), 0.3 * excerpts(20)
    assert judge.classes == ["deep", "high"]
    for audio in (first, second):
        assert judge.scores(audio).argmax(1).tolist() == [0, 0, 1, 1]
    embeddings = [F.normalize(judge.embedding(audio)) for audio in (first, second)]
    own, others, right = sanity.own_and_others(*embeddings)
    assert right == 1
    assert own > others + 0.3


@pytest.mark.slow
def test_every_table_is_printed(studio, tmp_path, capsys):
    """For a tiny latent model; the v-loss again, alone, is the same."""
    for name, path in zip("abc", (studio / "test").iterdir()):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name)
    command = ["--checkpoint", str(studio / "latent.pt"),
               "--classifier", str(studio / "classifier.pt"), "--data", str(studio / "train"),
               "--clips", "3", "--steps", "2", "--seconds", "0.3"]
    sanity.main([*sanity.TABLES, *command, "--train", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "nan" not in printed
    for words in ("white noise", "onsets/s", "from t = 0.8, in one step",
                  "v-loss on 6 whole windows", "own prompt wins", "training windows",
                  "waveform correlation with the context repeated",
                  "by example, 3 cases", "the judge", "to the judge the wanted class",
                  "x_t is projected", "as printed", "a seed's share"):
        assert words in printed
    sanity.main(["v-loss", *command])
    assert capsys.readouterr().out.splitlines()[-1] in printed
    with pytest.raises(sample.UserError, match="--train is missing"):
        sanity.main(["memory", *command])
    with pytest.raises(sample.UserError, match="no folder a, b, c"):
        sanity.main(["class", *command, "--train", str(studio / "test")])


def test_too_little_music_is_said_before_any_work(studio, tmp_path, monkeypatch):
    """No excerpt that can be read, one alone, and training music that is too short, or too little.

    `bad` holds samples that are not finite, `one` a track of one excerpt.
    """
    for name in ("bad", "one", "short"):
        (tmp_path / name).mkdir()
    broken = torch.full((44100, 2), torch.nan).numpy()
    for name in ("a.wav", "b.wav"):
        sf.write(tmp_path / "bad" / name, broken, 44100, "FLOAT")
        sf.write(tmp_path / "short" / name, NOISE.T[:2000].numpy(), 44100)
    sf.write(tmp_path / "one" / "a.wav", NOISE.T[:44100].numpy(), 44100)
    monkeypatch.setattr(sample, "fill", lambda *_, **__: pytest.fail("music is made"))
    models = ["--checkpoint", str(studio / "latent.pt"),
              "--classifier", str(studio / "classifier.pt"), "--seconds", "0.3"]

    def refused(why, table, data, train=tmp_path / "short"):
        with pytest.raises(sample.UserError, match=why):
            sanity.main([table, *models, "--data", str(data), "--train", str(train)])

    with pytest.raises(sample.UserError, match="--trials does nothing"):
        sanity.main(["likeness", "--data", str(studio / "test"), "--trials", "4"])
    for table in ("likeness", "v-loss", "seams"):
        refused("no excerpt that can be read", table, tmp_path / "bad")
    for table in ("likeness", "prompts", "example"):
        refused("a single excerpt", table, tmp_path / "one")
    refused("--train: no usable file", "memory", studio / "test")
    refused("is shorter than 0.3 s", "example", studio / "test")
    refused("bad/a.wav has samples that are not finite", "class", studio / "test", tmp_path / "bad")
    refused("--train has 1 tracks", "class", studio / "test", tmp_path / "one")


# ---- seams ---------------------------------------------------------------------------------------

def test_a_jump_is_found_and_a_period_has_none():
    """A tone that fits into the loop goes on; one that stops before the loop's end does not."""
    n = 2 * 44100
    steady = tones(220)[:, :n] + NOISE[:, :n] / 50
    assert sanity.rank_of_jump(steady) < 0.98
    cut = torch.cat([steady[:, :n // 2], 0 * steady[:, n // 2:]], 1) + NOISE[:, :n] / 500
    assert sanity.rank_of_jump(cut) > 0.98


def test_a_cross_fade_leads_to_where_it_begins():
    """Its last sample is followed, in the stretch, by its first."""
    stretch = torch.sin(torch.arange(5 * 44100) / 50).expand(2, -1)
    loop = sanity.cross_faded(stretch)
    fade = 2 * 44100
    assert loop.shape[-1] == 3 * 44100 and torch.equal(loop[:, 0], stretch[:, fade])
    assert torch.allclose(loop[:, -1], stretch[:, fade - 1], atol=1e-3)
