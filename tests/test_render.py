"""examples/render.py: the performer, the list of pieces; with fluidsynth, music from MIDI files."""
import shutil
import stat
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile as sf

from examples import render

# A scale of quarter notes, 60 a minute, with a chord at its end: (pitch, start, end).
SCALE = [(60 + i, float(i), i + 1.0) for i in range(24)] + [(48, 24.0, 26.0), (60, 24.0, 26.0)]


def play(variant=0, seed=0, notes=SCALE, **options):
    rng = render.random_numbers(seed, "piano", "scale", variant)
    return render.perform(notes, rng, **options)[0]


def install(folder, name, script, monkeypatch):
    """Put a shell script on the path, as a program of that name."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{render.os.environ['PATH']}")


# ---- the performer -------------------------------------------------------------------------------

def test_a_performance_is_a_function_of_its_seed_and_variant():
    """The same arguments give the same notes; another variant, seed, family or name others."""
    assert play() == play()
    assert play() != play(variant=1) and play() != play(seed=1)
    keys = [(0, "piano", "a", 0), (1, "piano", "a", 0), (0, "organ", "a", 0), (0, "piano", "b", 0),
            (0, "piano", "a", 1)]
    assert len({render.random_numbers(*key).random() for key in keys}) == len(keys)


def test_the_draws_keep_their_order():
    """Fixed numbers: another order of draws would make other music of the same seed."""
    rng = render.random_numbers(0, "ensemble", "name", 0)
    assert render.choose_instrument("ensemble", rng) == "choir"
    played, end = render.perform(SCALE, rng)
    assert played[0][:2] == (87, 58) and played[-1][:2] == (90, 58)
    assert np.allclose(played[0][2:], (0.0186940726, 1.0107834681), rtol=0, atol=1e-9)
    assert [note[0] for note in played[:12]] == [87, 90, 79, 92, 88, 85, 87, 85, 80, 82, 86, 85]
    assert np.isclose(end, 27.0544439406, rtol=0, atol=1e-9)
    assert np.isclose(rng.uniform(0.2, 0.6), 0.2881002378, rtol=0, atol=1e-9)


def test_plain_keeps_key_and_tempo():
    """Notes stray by less than a tenth of a second; pitches are the score's."""
    for variant in range(20):
        played = play(variant, plain=True)
        assert [note[1] for note in played] == [note[0] for note in SCALE]
        assert max(abs(note[2] - score[1]) for note, score in zip(played, SCALE)) < 0.1
        assert min(note[2] for note in played) >= 0


def test_without_plain_key_and_tempo_vary_within_bounds():
    """All of seven keys appear; tempo by up to 15%; loudness changes from note to note."""
    keys, paces = set(), []
    for variant in range(60):
        played = play(variant)
        keys |= {note[1] - score[0] for note, score in zip(played, SCALE)}
        paces.append((played[-1][2] - played[0][2]) / 24)
    assert keys == set(range(-3, 4))
    assert 0.83 < min(paces) < 0.9 and 1.1 < max(paces) < 1.17
    assert len({note[0] for note in play()}) > 5


def test_notes_stay_within_the_instrument_and_the_score():
    """Of all pitches those of a piano are left; velocities, lengths and times are valid."""
    notes = [(pitch, 0.01 * pitch, 0.01 * pitch + 0.001) for pitch in range(128)] * 4
    notes.sort(key=lambda note: note[1])
    for variant in range(10):
        played = play(variant, notes=notes)
        for velocity, pitch, start, end in played:
            assert 21 <= pitch <= 108 and 25 <= velocity <= 120 and isinstance(velocity, int)
            assert 0 <= start and end - start >= 0.06 - 1e-9
    assert len(play(notes=notes, plain=True)) == 4 * 88
    high = [(105, i / 2, i / 2 + 0.4) for i in range(800)]
    assert max(note[0] for variant in range(4) for note in play(variant, notes=high)) == 120


def test_long_scores_end_in_time():
    """Nothing starts later than `seconds`, but for what the performer is late by."""
    played = play(plain=True, seconds=10.0)
    assert len(played) == 11 and played[-1][2] < 10.1


def test_the_pedal_is_pressed_in_six_pieces_of_ten():
    """Its bars last 1, 1.5 or 2 s, and it ends with the piece."""
    pedals = [render.press_pedal(np.random.default_rng(i), 9.5) for i in range(300)]
    pressed = [pedal for pedal in pedals if pedal]
    assert 0.5 < len(pressed) / len(pedals) < 0.7
    assert {pedal[1] - pedal[0] for pedal in pressed} == {1.0, 1.5, 2.0}
    assert all(pedal[0] == 0 and pedal[-1] < 9.5 for pedal in pressed)


def test_instruments_are_chosen_by_their_shares():
    """An ensemble is strings in six pieces of ten; chances of every family add up to one."""
    generators = [np.random.default_rng(i) for i in range(500)]
    chosen = Counter(render.choose_instrument("ensemble", rng) for rng in generators)
    assert set(chosen) == {"strings", "choir"} and 0.53 < chosen["strings"] / 500 < 0.67
    for family, chances in render.INSTRUMENTS.items():
        assert np.isclose(sum(chances.values()), 1) and chances.keys() <= render.PROGRAMS.keys()


# ---- scores.tsv ----------------------------------------------------------------------------------

def test_the_table_of_scores_is_well_formed():
    """582 rows; a piece, a name and a hash occur once, thus in one split; every class is known."""
    rows = render.read_table()
    assert Counter(row["split"] for row in rows) == {"train": 500, "valid": 82}
    assert {row["family"] for row in rows if row["split"] == "train"} == set(render.INSTRUMENTS)
    assert {row["family"] for row in rows if row["split"] == "valid"} == set(render.INSTRUMENTS)
    for column in ("name", "path", "sha256"):
        assert len({row[column] for row in rows}) == len(rows), column
    pieces = {split: {(row["composer"], row["title"]) for row in rows if row["split"] == split}
              for split in ("train", "valid")}
    assert not pieces["train"] & pieces["valid"]
    for row in rows:
        assert all(value and value == value.strip() for value in row.values()) and None not in row
        assert row["path"].endswith(".ly")
        assert not row["path"].startswith("/") and ".." not in row["path"]
        assert len(row["sha256"]) == 16 and set(row["sha256"]) <= set("0123456789abcdef")


# ---- collecting ----------------------------------------------------------------------------------

@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A clone with a MIDI file, another version of one, and a source, of five pieces in the table.

    The fourth is missing, the fifth was collected before.
    """
    rows = []
    for name in ("ready", "other", "source", "missing", "there"):
        digest = render.hashlib.sha256(name.encode()).hexdigest()[:16]
        rows.append({"split": "train", "family": "piano", "name": f"a_{name}",
                     "path": f"A/{name}/{name}.ly", "sha256": digest})
        if name != "missing":
            (tmp_path / "clone" / "ftp" / "A" / name).mkdir(parents=True)
    folder = tmp_path / "clone" / "ftp" / "A"
    (folder / "ready" / "ready.mid").write_text("ready")
    (folder / "other" / "other.midi").write_text("a later version")
    (folder / "source" / "source.ly").write_text("music")
    (folder / "there" / "there.mid").write_text("not read")
    kept = tmp_path / "scores" / "train" / "piano" / "a_there.mid"
    kept.parent.mkdir(parents=True)
    kept.write_text("there")
    monkeypatch.setattr(render, "read_table", lambda: rows)
    return tmp_path / "clone"


def test_collecting_compiles_checks_hashes_and_names_what_is_missing(
        archive, tmp_path, monkeypatch, capsys):
    """Of a source's MIDI files, the one with the hash is taken; the archive stays as it is."""
    (tmp_path / "bin").mkdir()
    install(tmp_path / "bin", "convert-ly", 'echo new > "$2"', monkeypatch)
    script = "cat source.ly > source.midi; printf source > source-1.midi"
    install(tmp_path / "bin", "lilypond", script, monkeypatch)
    render.main([str(archive), str(tmp_path / "scores"), "--collect"])
    folder = tmp_path / "scores" / "train" / "piano"
    assert {file.stem: file.read_text() for file in folder.iterdir()} == {
        "a_ready": "ready", "a_other": "a later version", "a_source": "source", "a_there": "there"}
    assert (archive / "ftp" / "A" / "source" / "source.ly").read_text() == "music"
    said = capsys.readouterr().out
    assert "left out: A/missing/missing.ly (not in the archive)" in said
    assert "another version, its hash differs: A/other/other.ly" in said
    assert "differs: A/ready" not in said and "differs: A/source" not in said
    assert "3 of 5 pieces are new, 1 are missing" in said


def test_collecting_without_lilypond_says_what_is_needed(archive, tmp_path, monkeypatch, capsys):
    """Pieces with a MIDI file are collected all the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    render.main([str(archive), str(tmp_path / "scores"), "--collect"])
    said = capsys.readouterr().out
    assert "A/source/source.ly (LilyPond is needed to compile it: apt-get install lilypond)" in said
    assert (tmp_path / "scores" / "train" / "piano" / "a_ready.mid").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(render.UserError, match="no piece can be had from .*empty: not in the arch"):
        render.main([str(tmp_path / "empty"), str(tmp_path / "elsewhere"), "--collect"])


# ---- bad input -----------------------------------------------------------------------------------

def test_bad_folders_end_in_a_sentence(tmp_path):
    """No folder, no MIDI files, an unknown family, two scores for one file: nothing is written."""
    out = tmp_path / "out"
    for name in ("empty", "unknown/flute", "same/piano", "same/harpsichord"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("unknown/flute", "same/piano", "same/harpsichord"):
        (tmp_path / name / "a.mid").touch()
    for folder, said in (("none", "is no folder"), ("empty", "has no FAMILY.NAME.mid"),
                         ("unknown", "flute is no known family"),
                         ("same", "would both be .*piano")):
        with pytest.raises(render.UserError, match=said) as error:
            render.main([str(tmp_path / folder), str(out), "--variants", "9"])
        assert error.value.status == 2
    assert not out.exists()


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    """pretty_midi, then fluidsynth, then the soundfont; a folder that cannot be made."""
    scores, out = tmp_path / "scores", tmp_path / "out"
    (scores / "organ").mkdir(parents=True)
    (scores / "organ" / "a.mid").touch()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pretty_midi", None)
        with pytest.raises(render.UserError, match="pip install pretty_midi"):
            render.main([str(scores), str(out)])
    monkeypatch.setattr(render, "midi_library", lambda: None)
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        with pytest.raises(render.UserError, match="apt-get install fluidsynth"):
            render.main([str(scores), str(out)])
    install(tmp_path, "fluidsynth", "exit 1", monkeypatch)
    with pytest.raises(render.UserError, match="--font .*none.sf2 does not exist"):
        render.main([str(scores), str(out), "--font", str(tmp_path / "none.sf2")])
    (tmp_path / "file").touch()
    with pytest.raises(render.UserError, match="file.out cannot be written"):
        render.main([str(scores), str(tmp_path / "file" / "out"), "--font", __file__])
    assert not out.exists()


# ---- end to end ----------------------------------------------------------------------------------

@pytest.fixture
def scores(tmp_path):
    """SCORES/organ/scale.mid, and a damaged file, for a fluidsynth that is there."""
    pytest.importorskip("pretty_midi")
    if not shutil.which("fluidsynth") or not render.Path(render.FONT).exists():
        pytest.skip("needs fluidsynth and musescore-general-soundfont")
    folder = tmp_path / "scores" / "organ"
    folder.mkdir(parents=True)
    played = [(80, pitch, start / 4, end / 4) for pitch, start, end in SCALE]
    render.write_midi(folder / "scale.mid", "organ", played, [])
    return tmp_path / "scores"


@pytest.mark.slow
def test_a_score_becomes_music(scores, tmp_path, capsys):
    """Two variants, stereo, 44.1 kHz, at the same level; a damaged MIDI file is left out by name.

    A second run keeps what is there, and makes what is missing as it was.
    """
    (scores / "organ" / "damaged.mid").write_bytes(b"MThd, but not for long")
    render.main([str(scores), str(tmp_path / "out"), "--variants", "2"])
    files = sorted((tmp_path / "out").rglob("*.*"))
    assert files == [tmp_path / "out" / "organ" / f"scale.{i}.flac" for i in (0, 1)]
    said = capsys.readouterr().out
    assert "damaged.mid (no readable MIDI file" in said and "2 files are new" in said
    (first, rate), (second, _) = (sf.read(file) for file in files)
    assert rate == 44100 and first.shape[1] == 2 and 4 < len(first) / rate < 12
    assert np.isclose(np.sqrt((first**2).mean()), 0.1, rtol=0.01) and np.abs(first).max() <= 0.95
    assert first.shape != second.shape or not np.allclose(first, second)

    files[0].write_bytes(b"kept")
    files[1].unlink()
    render.main([str(scores), str(tmp_path / "out"), "--variants", "2"])
    assert files[0].read_bytes() == b"kept" and np.array_equal(sf.read(files[1])[0], second)
    (scores / "organ" / "scale.mid").unlink()
    with pytest.raises(render.UserError, match="no MIDI file of"):
        render.main([str(scores), str(tmp_path / "other")])


def test_a_plain_score_keeps_its_notes(scores):
    """read_notes gives back what write_midi wrote, to a tick."""
    notes = render.read_notes(scores / "organ" / "scale.mid")
    assert [note[0] for note in notes] == [note[0] for note in SCALE]
    expected = [(start / 4, end / 4) for _, start, end in SCALE]
    assert np.allclose([note[1:] for note in notes], expected, atol=0.003)


def test_a_damaged_soundfont_is_refused(scores, tmp_path):
    """fluidsynth would take its default instead, and say so to nobody."""
    font = tmp_path / "damaged.sf2"
    font.write_text("no soundfont")
    with pytest.raises(render.UserError, match="damaged.sf2 plays no sound"):
        render.main([str(scores), str(tmp_path / "out"), "--font", str(font)])
    assert not list((tmp_path / "out").rglob("*.flac*"))
