"""The measures and tables of tests/sanity.py."""
import shutil

import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

import sanity
import sample
from judge import Judge

T = torch.arange(3 * 44100) / 44100
NOISE = torch.randn(2, len(T), generator=torch.Generator().manual_seed(0)) / 10


def chord(*frequencies):
    return sum(torch.sin(2 * torch.pi * f * T) for f in frequencies).expand(2, -1) / 10


def measured(audio, context, *others):
    notes = []
    for clip in (context, *others):
        _, at_peaks, f = sanity.peaks(clip.mean(0).double())
        notes.append(sanity.chroma(at_peaks, f))
    values = sanity.likeness(audio, notes[0], torch.stack(notes[1:]))
    return dict(zip(("tonal", "pitch", "beat", "flux"), values.tolist()))


def test_a_chord_is_tonal_and_noise_is_not():
    """Sines are all peaks; white noise hardly has one."""
    a, b = chord(220, 275, 330), chord(233, 294, 349)
    assert measured(a, a, b)["tonal"] > 0.99 and measured(NOISE, a, b)["tonal"] < 0.02


def test_pitch_tells_the_own_context_from_another():
    """1 for the notes of the own context, -1 for the other's; an octave changes nothing."""
    a, b = chord(220, 440), chord(311.1)
    assert measured(chord(880), a, b)["pitch"] == pytest.approx(1, abs=0.01)
    assert measured(chord(622.3), a, b)["pitch"] == pytest.approx(-1, abs=0.01)


def test_regular_bursts_have_a_beat_and_uneven_flux():
    """Bursts of noise twice a second against the same noise, steady."""
    bursts, a = NOISE * (torch.exp(-20 * (T % 0.5)) + 1e-3), chord(220)
    assert measured(bursts, a, a)["beat"] > 0.8 > 0.3 > measured(NOISE, a, a)["beat"]
    assert measured(bursts, a, a)["flux"] > 5 * measured(NOISE, a, a)["flux"]


def test_cosine_with_the_own_aim_and_with_others():
    """Of three samples the first two have each other's aim: 1 of 3 own cosines, 2 of 6 others."""
    made = torch.eye(3)[[1, 0, 2]]
    assert sanity.own_and_others(made, torch.eye(3)) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_a_copied_excerpt_is_found():
    """The highest correlation of an excerpt of the track is 1, that of other noise is far lower."""
    generator = torch.Generator().manual_seed(1)
    track = torch.randn(50000, generator=generator)
    other = torch.randn(4000, generator=generator)
    best = sanity.best_correlation([track[20000:24000], other], track)
    assert best[0] == pytest.approx(1, abs=1e-3) and best[1] < 0.1


def test_the_judge_knows_tracks_and_classes_again(tmp_path):
    """Two classes of two tracks each, of noise in other bands; level and place do not matter."""
    def noise(seed, low, seconds=4):
        drawn = torch.randn(2, seconds * 44100, generator=torch.Generator().manual_seed(seed))
        X = torch.fft.rfft(drawn)
        shape = torch.exp(-((torch.arange(X.shape[1]) / seconds / low).clamp(min=0.01).log() ** 2))
        return torch.fft.irfft(X * shape) * 0.2
    lows = {"deep/a": 150, "deep/b": 300, "high/c": 2000, "high/d": 5000}
    for seed, (name, low) in enumerate(lows.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sf.write(tmp_path / f"{name}.wav", noise(seed, low).T.numpy(), 44100)
    judge = Judge([tmp_path], 0.5)

    def listen(seed, level):
        clips = [noise(seed + i, low, 1) * level for i, low in enumerate(lows.values())]
        return judge.listen(torch.stack(clips))
    odds, first = listen(10, 1.0)
    again, second = listen(20, 0.3)
    assert judge.classes == ["deep", "high"]
    assert odds.argmax(1).tolist() == again.argmax(1).tolist() == [0, 0, 1, 1]
    own, others, right = sanity.own_and_others(*(F.normalize(x) for x in (first, second)))
    assert right == 1 and own > others + 0.3


def test_every_table_is_printed(studio, tmp_path, capsys):
    """All six, for a tiny latent model; the v-loss again, alone, is the same."""
    classifier = str(studio / "classifier.pt")
    command = ["--checkpoint", str(studio / "latent.pt"), "--listener", classifier, "--data",
               str(studio / "train"), "--clips", "3", "--steps", "2", "--seconds", "0.3"]
    for name, path in zip("abc", (studio / "test").iterdir()):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name)
    sanity.main([*sanity.TABLES, *command, "--train", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "nan" not in printed
    for words in ("white noise", "v-loss on 6 whole windows", "own prompt wins", "training windows",
                  "by example, 3 cases", "the judge", "log-probability to the judge"):
        assert words in printed
    sanity.main(["v-loss", *command])
    assert capsys.readouterr().out.splitlines()[-1] in printed
    with pytest.raises(sample.UserError, match="--train is missing"):
        sanity.main(["memory", *command])
    with pytest.raises(sample.UserError, match="no folder a, b, c"):
        sanity.main(["class", *command, "--train", str(studio / "test")])
