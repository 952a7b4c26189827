"""Music made by a program, to try everything out without data: labelled, endless, free of rights.

A piece has a style (its label), a tempo, a key, a chord progression, drums, bass, chords and a
lead, panned in a small room; 44.1 kHz, stereo. Clip k is a function of (seed, k), and takes about a
hundredth of its length to make.

    audio, style = clip(seed=0, k=3, seconds=5.9)       # (2, n) float32 in (-1, 1); STYLES[style]

`python examples/synthetic.py out.wav --seed 3 --seconds 12` writes a file.
"""
import argparse
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SAMPLE_RATE = 44100
TABLE = 4096                                    # samples in one period of a timbre
MAJOR = (0, 2, 4, 5, 7, 9, 11)                  # semitones above the key note
MINOR = (0, 2, 3, 5, 7, 8, 10)
PROGRESSIONS = (                                # scale degrees
    (0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 0, 4), (5, 3, 0, 4), (0, 6, 5, 6), (0, 2, 3, 4))


@dataclass(frozen=True)
class Style:
    """Patterns of one bar, a character per sixteenth note: "x" strikes, "-" holds, "." rests."""
    tempo: tuple[int, int]                      # beats a minute
    scale: tuple[int, ...]
    kick: str
    snare: str
    hat: str
    bass: str
    chords: str
    timbres: tuple[str, str, str]               # bass, chords, lead
    lead: float                                 # how often the lead plays a note, 0 to 1
    room: float                                 # how loud the room's echoes are


_STYLES = {
    "ambient": Style(
        (60, 80), MAJOR,
        kick="................", snare="................", hat="................",
        bass="x---------------", chords="x---------------",
        timbres=("sine", "strings", "bell"), lead=0.15, room=0.9),
    "chiptune": Style(
        (130, 170), MAJOR,
        kick="x...x...x...x...", snare="....x.......x...", hat="x.x.x.x.x.x.x.x.",
        bass="x.x.x.x.x.x.x.x.", chords="xxxxxxxxxxxxxxxx",
        timbres=("triangle", "square", "square"), lead=0.7, room=0.1),
    "dub": Style(
        (66, 78), MINOR,
        kick="........x.......", snare="........x.......", hat="x..xx..xx..xx..x",
        bass="x--.x-..x-.x----", chords="....x.......x...",
        timbres=("sine", "organ", "organ"), lead=0.15, room=0.6),
    "house": Style(
        (118, 128), MINOR,
        kick="x...x...x...x...", snare="....x.......x...", hat="..x...x...x...x.",
        bass="..x-..x-..x-..x-", chords="x--x--x---x--x--",
        timbres=("saw", "strings", "organ"), lead=0.25, room=0.4),
    "rock": Style(
        (96, 140), MINOR,
        kick="x.....x.x.x.....", snare="....x.......x...", hat="x.x.x.x.x.x.x.x.",
        bass="x.x.x.x.x.x.x.x.", chords="x---x---x-x-x---",
        timbres=("saw", "saw", "saw"), lead=0.35, room=0.3),
    "waltz": Style(
        (80, 110), MAJOR,
        kick="x...........", snare="............", hat="....x...x...",
        bass="x-----------", chords="....x-..x-..",
        timbres=("organ", "bell", "triangle"), lead=0.45, room=0.5),
}
STYLES = tuple(_STYLES)
_OVERTONES = {                                  # amplitude of harmonic h
    "sine": lambda h: (h == 1) + 0.1 * (h == 2),
    "triangle": lambda h: (h % 2) / h**2,
    "square": lambda h: (h % 2) / h,
    "saw": lambda h: 1 / h,
    "strings": lambda h: 1 / h**1.5,
    "organ": lambda h: np.isin(h, (1, 2, 3, 4, 6, 8)) / h,
    "bell": lambda h: np.isin(h, (1, 4, 7, 11)) / h**0.8,
}


# ---- Sounds: mono arrays -------------------------------------------------------------------------

@lru_cache(maxsize=None)
def _period(timbre, harmonics):
    """One period of a timbre, with so many harmonics, at power 1."""
    h = np.arange(1, harmonics + 1)
    spectrum = np.zeros(TABLE // 2 + 1, dtype=complex)
    phases = np.exp(1j * h * h)                 # they avoid a high peak
    spectrum[1:harmonics + 1] = _OVERTONES[timbre](h) * phases
    period = np.fft.irfft(spectrum)
    return (period / period.std()).astype(np.float32)


def note(pitch, seconds, timbre):
    """A note of that MIDI pitch, with the timbre's harmonics below 15 kHz, held and let go."""
    hertz = 440 * 2 ** ((pitch - 69) / 12)
    t = np.arange(int((seconds + 0.05) * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    place = (t * np.float32(hertz * TABLE)).astype(np.int32) % TABLE
    attack = 0.3 if timbre == "strings" and seconds > 1 else 0.006
    envelope = np.minimum(np.minimum(t / attack, 1), (t[-1] - t) / 0.05)
    if timbre != "strings":
        envelope *= np.exp(-t * (6 if timbre == "bell" else 1.5))
    return _period(timbre, max(1, min(40, int(15000 / hertz))))[place] * np.clip(envelope, 0, 1)


def drums(rng):
    """Kick, snare and hat of one piece."""
    t = np.arange(int(0.3 * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    low, noise = rng.uniform(42, 56), rng.standard_normal(len(t), dtype=np.float32)
    sweep = rng.uniform(3, 6) * (1 - np.exp(-t * 40))
    kick = np.sin(2 * np.pi * (low * t + sweep)) * np.exp(-t * 12)
    tone = np.sin(2 * np.pi * rng.uniform(170, 220) * t)
    snare = (0.6 * noise + tone) * np.exp(-t * rng.uniform(16, 26))
    hat = np.diff(noise, prepend=0) * np.exp(-t * rng.uniform(40, 90))
    return kick * 1.6, snare * 0.8, hat * 0.5


# ---- A piece -------------------------------------------------------------------------------------

class Mixer:
    """A stereo bus of n samples, of which the first sixteenth note of the piece is at `origin`."""

    def __init__(self, n, origin):
        self.bus, self.origin = np.zeros((2, n), dtype=np.float32), origin

    def add(self, sound, seconds, gain, pan=0.0):
        """Put a mono sound at a time, panned from -1 (left) to 1 (right) at constant power."""
        first = round(seconds * SAMPLE_RATE) - self.origin
        lo, hi = max(first, 0), min(first + len(sound), self.bus.shape[1])
        if lo < hi:
            angle = (pan + 1) * np.pi / 4
            part = sound[lo - first:hi - first] * np.float32(gain)
            self.bus[0, lo:hi] += np.float32(np.cos(angle)) * part
            self.bus[1, lo:hi] += np.float32(np.sin(angle)) * part

    def room(self, amount, rng):
        """Echoes, other ones on each side, and the two sides crossed."""
        dry = self.bus.copy()
        for i, delay in enumerate(np.cumsum(rng.uniform(0.011, 0.06, 7))):
            for side in (0, 1):
                shift = round((delay + rng.uniform(0, 0.01)) * SAMPLE_RATE)
                if shift < dry.shape[1]:
                    echo = dry[1 - side if i % 2 else side, :-shift]
                    self.bus[side, shift:] += np.float32(0.5 * amount * 0.75**i) * echo


def struck(pattern):
    """[(step, length in steps)] of a pattern's notes."""
    notes = []
    for i, character in enumerate(pattern):
        if character == "x":
            rest = pattern[i + 1:]
            held = len(rest) - len(rest.lstrip("-"))
            notes.append((i, 1 + held))
    return notes


def play_bar(mixer, style, bar, step, key, degree, kit, rng, pans):
    """One bar. step: a sixteenth note in seconds; degree: the scale degree of its chord."""
    def pitch(d):
        return key + 12 * (d // 7) + style.scale[d % 7]

    begin = bar * len(style.kick) * step
    for pattern, sound, pan in zip((style.kick, style.snare, style.hat), kit, (0, 0.1, pans[0])):
        for i, _ in struck(pattern):
            mixer.add(sound, begin + i * step, 0.22 * rng.uniform(0.8, 1), pan)

    bass, chords, lead = style.timbres
    for i, length in struck(style.bass):
        mixer.add(note(pitch(degree) - 24, length * step, bass), begin + i * step, 0.11)

    # A chord that is struck at every step is an arpeggio: a note at a time.
    arpeggio = len(struck(style.chords)) == len(style.chords)
    for i, length in struck(style.chords):
        for voice, offset in enumerate((0, 2, 4)):
            if not arpeggio or i % 3 == voice:
                detuned = 0.06 if voice else -0.06
                sound = note(pitch(degree + offset) + detuned, length * step, chords)
                mixer.add(sound, begin + i * step, 0.05, pans[1] * (voice - 1))

    # The lead improvises, with echoes on alternating sides.
    for i in range(0, len(style.kick), 2):
        if rng.random() < style.lead:
            degree_of_lead = degree + int(rng.integers(5, 13))
            sound = note(pitch(degree_of_lead), rng.choice((1, 2, 4)) * step, lead)
            for echo in range(3):
                pan = pans[2] * (-1) ** echo
                mixer.add(sound, begin + (i + 3 * echo) * step, 0.06 * 0.4**echo, pan)


def clip(seed, k, seconds):
    """Clip k of the endless music of `seed`: (audio (2, n) float32, index of its style in STYLES).

    The clip begins at any place of its piece, with what sounded before it.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, k])))
    index = int(rng.integers(len(STYLES)))
    style = _STYLES[STYLES[index]]
    step = 15 / rng.uniform(*style.tempo)       # seconds
    key = int(rng.integers(54, 66))
    progression = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    kit = drums(rng)
    pans = rng.uniform(0.2, 0.9, 3) * rng.choice((-1, 1), 3)

    # Playing begins one bar before the clip, whose echoes reach into it.
    length = len(style.kick) * step             # of a bar
    begin = rng.uniform(1, 5) * length
    first = int(begin // length) - 1
    mixer = Mixer(round(seconds * SAMPLE_RATE), round(begin * SAMPLE_RATE))
    for bar in range(first, int((begin + seconds) // length) + 1):
        play_bar(mixer, style, bar, step, key, progression[bar % 4], kit, rng, pans)
    mixer.room(style.room, rng)
    return np.tanh(1.2 * mixer.bus), index


def main(argv=None):
    import soundfile
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="wav or flac to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clip", type=int, default=0, metavar="K")
    parser.add_argument("--seconds", type=float, default=12)
    args = parser.parse_args(argv)
    audio, style = clip(args.seed, args.clip, args.seconds)
    try:
        soundfile.write(args.file, audio.T, SAMPLE_RATE)
    except (soundfile.LibsndfileError, ValueError, TypeError) as error:
        parser.error(f"{args.file} cannot be written: {error}")
    print(f"{args.file}: {args.seconds} s of {STYLES[style]}")


if __name__ == "__main__":
    main()
