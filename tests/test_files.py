"""Files and folders as people have them: joined, cut, nameless, silent on one side, on a full disk.

Nothing is lost or wrong without a word: what can be read is read whole, what cannot ends in one
sentence with the file's name and a remedy.
"""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import sample
from sample import Track, UserError

ROOT = Path(__file__).resolve().parents[1]
RATE = 44100


def music(seconds, channels=2, rate=RATE, seed=0):
    """(n, channels): a chord with some hiss."""
    t = np.arange(round(seconds * rate))[:, None] / rate
    chord = sum(np.sin(2 * np.pi * f * t + np.arange(channels)) for f in (220, 277.2, 329.6))
    return 0.1 * chord + 0.01 * np.random.default_rng(seed).standard_normal(chord.shape)


def encoded(folder, name, audio, rate=RATE, **how):
    """The bytes of a file that libsndfile writes."""
    sf.write(folder / name, audio, rate, **how)
    return (folder / name).read_bytes()


def seconds_of(path):
    audio, rate = sample.read_audio(path)
    return audio.shape[1] / rate


# ---- what is read --------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["ogg", "mp3"])
@pytest.mark.parametrize("lengths", [(1.5, 2), (1, 0.5, 1.25)])
def test_joined_files_are_read_to_their_end(tmp_path, ending, lengths):
    """As recorders of radio join them; libsndfile alone stops after the first."""
    parts = [encoded(tmp_path, f"{i}.{ending}", music(length, seed=i))
             for i, length in enumerate(lengths)]
    path = tmp_path / f"joined.{ending}"
    path.write_bytes(b"".join(parts))
    assert seconds_of(path) == pytest.approx(sum(lengths), abs=0.01)
    first, _ = sample.read_audio(tmp_path / f"0.{ending}")
    whole, _ = sample.read_audio(path)
    assert torch.equal(whole[:, :first.shape[1]], first)


def test_an_mp3_of_variable_rate_that_does_not_count_its_frames_is_read_whole(tmp_path):
    """Loud, then quiet: its length is not that of its size at its first rate."""
    audio = np.concatenate([np.random.default_rng(0).standard_normal((RATE, 2)) * 0.2,
                            music(4) * 0.01])
    data = encoded(tmp_path, "counted.mp3", audio, bitrate_mode="VARIABLE", compression_level=0)
    (start, stop, counted), = sample.mp3_parts(data)
    assert counted, "libsndfile writes a Xing frame"
    first_frame, _ = sample.mp3_frame(data, start)
    path = tmp_path / "uncounted.mp3"
    path.write_bytes(data[start + first_frame:stop])
    with sf.SoundFile(path) as file:
        assert file.frames < 4.8 * RATE, "libsndfile's estimate"
    assert seconds_of(path) == pytest.approx(5, abs=0.1)


def test_tags_and_junk_around_mp3s_are_passed_over(tmp_path):
    """ID3 before, between and after; noise before; and frames alone count."""
    one, two = (encoded(tmp_path, f"{i}.mp3", music(1 + i, seed=i)) for i in (0, 1))
    id3 = b"ID3\x04\x00\x00\x00\x00\x02\x01" + b"\xff\xfb\x90\x64" * 64 + b"x"
    junk = np.random.default_rng(0).integers(0, 255, 5000).astype(np.uint8).tobytes()
    path = tmp_path / "tagged.mp3"
    path.write_bytes(id3 + one + b"TAG" + bytes(125) + id3 + two + b"TAG" + bytes(125))
    assert seconds_of(path) == pytest.approx(3, abs=0.01)
    path.write_bytes(junk + one)
    assert seconds_of(path) == pytest.approx(1, abs=0.01)


def test_joined_recordings_of_other_rates_are_refused(tmp_path):
    """Which of the two would be the track's?"""
    parts = [encoded(tmp_path, "a.ogg", music(1)), encoded(tmp_path, "b.ogg", music(1), 22050)]
    path = tmp_path / "joined.ogg"
    path.write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="joined.ogg is several recordings of different rates"):
        sample.read_audio(path)


@pytest.mark.parametrize("data, words", [
    (b"", "it is empty"), (bytes(range(256)) * 40, "damaged, or not audio")], ids=["empty", "junk"])
@pytest.mark.parametrize("ending", ["wav", "mp3", "ogg", "flac"])
def test_what_is_no_audio_is_called_so(tmp_path, data, words, ending):
    """Not "does not exist", nor "internal error"."""
    path = tmp_path / f"x.{ending}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"x.{ending} cannot be read .*{words}"):
        sample.read_audio(path)
    assert words in sample.probe(path)


def test_a_name_need_not_be_utf_8(tmp_path):
    """As on disks of old machines."""
    path = os.path.join(os.fsencode(tmp_path), b"n\xe4me.wav")
    with open(path, "wb") as file:
        file.write(encoded(tmp_path, "x.wav", music(0.2)))
    name = os.fsdecode(path)
    assert seconds_of(name) == pytest.approx(0.2)
    assert sample.probe(name)[1:] == [RATE, 2] and name in sample.find_files([tmp_path])


@pytest.mark.slow
def test_a_file_is_decoded_in_little_more_memory_than_it_fills(tmp_path):
    """Ten minutes: the peak of the process grows by 1.6 times the audio's size at most."""
    path = tmp_path / "long.wav"
    with sf.SoundFile(path, "w", RATE, 2, "PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros((10 * RATE, 2), np.int16))
    script = f"""import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import sample
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
audio, _ = sample.read_audio({str(path)!r})
audio.sum()
print((peak() - before) / (audio.numel() * 4))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert float(done.stdout) < 1.6, done.stderr


# ---- what is written -----------------------------------------------------------------------------

@pytest.mark.parametrize("subtype, width", [("PCM_16", 2), ("FLOAT", 4), ("DOUBLE", 8)])
def test_a_wav_that_its_header_cannot_count_is_an_rf64(tmp_path, monkeypatch, subtype, width):
    """From 4 GiB on, which is made smaller here."""
    track = Track(torch.from_numpy(music(0.5).T.copy()).float(), RATE, subtype)
    monkeypatch.setattr(sample, "WAV_LIMIT", track.audio.numel() * width - 1)
    sample.write_track(tmp_path / "long.wav", track)
    assert sf.info(tmp_path / "long.wav").format == "RF64"
    monkeypatch.setattr(sample, "WAV_LIMIT", track.audio.numel() * width)
    sample.write_track(tmp_path / "short.wav", track)
    assert sf.info(tmp_path / "short.wav").format == "WAV"
    long, short = (sf.read(tmp_path / name)[0] for name in ("long.wav", "short.wav"))
    assert np.array_equal(long, short)


@pytest.mark.parametrize("ending, subtype", [("wav", "FLOAT"), ("flac", "PCM_24")])
@pytest.mark.parametrize("limit", [50_000, 1])
@pytest.mark.parametrize("optimise", [[], pytest.param(["-O"], marks=pytest.mark.slow)])
def test_a_full_disk_leaves_what_was_there(tmp_path, ending, subtype, optimise, limit):
    """A limit on the size of files stands for it: one line, status 1, the old file whole.

    Also where the first that fails is no write, but a seek.
    """
    path = tmp_path / f"out.{ending}"
    path.write_text("old")
    script = f"""import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import sample, torch
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
audio = torch.randn(2, 100_000) / 10
track = sample.Track(audio, 44100, {subtype!r})
sample.run(lambda: sample.write_track(Path({str(path)!r}), track))"""
    done = subprocess.run([sys.executable, *optimise, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {path} cannot be read or written: File too large")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path):
    """Nor does any other exception."""
    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        sample.write_atomic(tmp_path / "x.wav", write)
    assert not list(tmp_path.iterdir())


def test_a_users_own_part_file_stays(tmp_path):
    """Temporary files have names that no file has."""
    mine = tmp_path / "out.wav.part"
    mine.write_text("mine")
    options = sample.parse(["--task", "unconditional", "--output", str(tmp_path / "out.wav")])
    sample.output_paths(options)
    sample.write_atomic(tmp_path / "out.wav", lambda file: file.write(b"new"))
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.wav", "out.wav.part"]


def test_a_rate_that_the_format_lacks_is_refused_before_the_work(tmp_path):
    """705.6 kHz in a flac."""
    track = Track(torch.zeros(2, 10), 705600, "PCM_24")
    sample.check_format(Path("out.wav"), track)
    with pytest.raises(UserError, match="out.flac: this format has no 705600 Hz"):
        sample.check_format(Path("out.flac"), track)


# ---- what the system says ------------------------------------------------------------------------

@pytest.mark.parametrize("number, words, remedy", [
    (28, "No space left on device", True), (24, "Too many open files", False),
    (36, "File name too long", False)])
def test_the_remedy_is_named_where_it_is_one(number, words, remedy, capsys):
    """Space helps a full disk, not a name that is too long."""
    def main():
        raise OSError(number, words, "x.wav")
    with pytest.raises(SystemExit):
        sample.run(main)
    said = capsys.readouterr().err
    assert words in said and ("free some space" in said) == remedy


def test_a_name_that_is_too_long_is_refused(tmp_path):
    """In one sentence, before any work."""
    name = str(tmp_path / f"{'x' * 300}.wav")
    options = sample.parse(["--task", "unconditional", "--output", name])
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        sample.output_paths(options)


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-"])
def test_closed_streams_are_no_fault(redirect):
    """A script that is started without an output runs all the same."""
    code = "import sample; sample.run(lambda: (print(1), sample.say(chr(65))))"
    done = subprocess.run(f"{sys.executable} -c '{code}' {redirect}", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_a_closed_pipe_ends_quietly():
    """As `... | head` closes it."""
    code = "import sample; sample.run(lambda: [print(i) for i in range(100000)])"
    done = subprocess.run(f"{sys.executable} -c '{code}' | true", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert not done.stderr


def test_streams_of_random_numbers_differ():
    """Also where one has a counter of zero more, which SeedSequence alone takes for the same."""
    keys = [(0,), (0, 0), (0, 0, 0), (0, 2), (1,), (1, 0), (0, 1), (0, 1, 0)]
    drawn = {sample.random_numbers(5, *key).integers(2**62) for key in keys}
    assert len(drawn) == len(keys)


# ---- balance, offset, level ----------------------------------------------------------------------

IMAGES = {
    "left alone": [[1.0, 0.0], [0.0, 0.0]],
    "antiphase": [[1.0, 0.0], [-1.0, 0.0]],
    "panned by 20 dB": [[1.0, 0.0], [0.1, 0.0]],
    "wide": [[1.0, 0.0], [0.0, 1.0]],
    "mono": [[1.0, 0.0], [1.0, 0.0]],
}


@pytest.mark.parametrize("image", IMAGES)
def test_the_equaliser_gives_the_stereo_image_too(image):
    """Covariances of left and right become the wanted ones, within 0.5 dB of the whole power."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 1, 2, 2 * RATE, generator=generator) / 10
    given = torch.tensor([[1.0, 0.6], [0.6, 1.0]]) @ drawn[0]
    wanted = torch.tensor(IMAGES[image]) @ drawn[1]
    everywhere = torch.ones(2 * RATE)
    made = sample.equalise(given, everywhere, sample.spectrum(wanted, everywhere))
    covariances = [(x[0] @ x[0].T) / x.shape[-1] for x in (made, wanted)]
    power = covariances[1].trace()
    assert (covariances[0] - covariances[1]).abs().max() < 0.12 * power
    if image == "left alone":
        assert made[0, 1].square().mean() < 1e-6 * made[0, 0].square().mean()
    if image == "antiphase":
        assert (made[0, 0] + made[0, 1]).square().mean() < 1e-6 * power


def test_what_has_the_wanted_image_keeps_it():
    """The least change is none."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.tensor([[1.0, 0.6], [0.6, 1.0]]) @ torch.randn(1, 2, RATE, generator=generator)
    everywhere = torch.ones(RATE)
    same = sample.equalise(mixed, everywhere, sample.spectrum(mixed, everywhere))
    assert (same - mixed).square().mean() < 1e-4 * mixed.square().mean()


def test_mono_of_antiphase_stereo_is_one_of_its_channels():
    """Their mean would be silence."""
    side = torch.randn(1, 1000)
    assert torch.equal(sample.to_mono(torch.cat([side, -side])), side)
    assert torch.equal(sample.to_mono(torch.cat([side, side])), side)
