"""Two spectrograms, one above the other, as a small PNG: a track before an edit and after it.

    python examples/spectrograms.py before.wav after.wav examples/continuation.png --mark 8

Frequency is logarithmic, 50 Hz to 16 kHz upwards; brightness is the level in dB, the same scale for both; time, from
left to right, is that of the longer file. --mark draws a vertical line at that second. page.py has its pictures from
here too.
"""
import argparse
import struct
import zlib

import numpy as np
import soundfile

WIDTH, HEIGHT, GAP = 900, 208, 4                        # pixels: of one spectrogram, and black between the two
LOWEST, HIGHEST = 50, 16000                             # Hz
RANGE = 80                                              # dB below the loudest point of both that is black
FFT = 4096
COLOURS = (0, 0, 8), (60, 15, 110), (160, 40, 110), (235, 100, 50), (252, 190, 60), (255, 255, 220)     # dark to light
LINE = 255                                              # palette entry of the mark


def spectrogram(audio, rate, seconds):
    """Level in dB, (HEIGHT, WIDTH), highest frequency on top, of audio (n, channels); -inf where it has ended."""
    audio = np.pad(audio.mean(1), FFT)
    middles = (np.arange(WIDTH) + 0.5) / WIDTH * seconds * rate                 # samples, of the columns
    starts = np.minimum(middles.astype(int) + FFT // 2, len(audio) - FFT)
    frames = np.stack([audio[start:start + FFT] for start in starts]) * np.hanning(FFT)         # (WIDTH, FFT)
    power = np.abs(np.fft.rfft(frames)) ** 2 + 1e-12                            # (WIDTH, FFT / 2 + 1)
    edges = np.geomspace(LOWEST, HIGHEST, HEIGHT + 1) * FFT / rate              # bins, of the rows
    below = np.cumsum(np.pad(power, ((0, 0), (1, 0))), 1)                       # (WIDTH, bins + 1)
    sums = np.stack([np.interp(edges + 0.5, np.arange(below.shape[1]), row) for row in below])
    level = 10 * np.log10(np.diff(sums, axis=1) / np.diff(edges) + 1e-12)       # (WIDTH, HEIGHT): mean power of a row
    level[middles > len(audio) - 2 * FFT] = -np.inf
    return level.T[::-1]


def picture(level, top):
    """Entries of the palette (HEIGHT, WIDTH) uint8 for levels in dB: `top` is the brightest."""
    return ((LINE - 1) * np.clip((level - top) / RANGE + 1, 0, 1)).astype(np.uint8) // 4 * 4


def palette():
    """256 colours (256, 3) uint8: dark to light, and a white one for the mark."""
    place, known = np.linspace(0, 1, LINE), np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(place, known, channel) for channel in zip(*COLOURS)], 1)
    return np.concatenate([colours, [(255, 255, 255)]]).round().astype(np.uint8)


def png(pixels, colours):
    """The bytes of an 8-bit PNG: pixels (height, width) uint8 are entries of the palette colours (256, 3) uint8."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)              # 8 bits, palette
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()                           # before each row its filter, 0: none
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", colours.tobytes())
            + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("before", "after", "output"):
        parser.add_argument(name)
    parser.add_argument("--mark", type=float, metavar="SECONDS", help="a vertical line at this time")
    args = parser.parse_args(argv)
    try:
        files = [soundfile.read(path, always_2d=True) for path in (args.before, args.after)]
    except soundfile.LibsndfileError as error:
        parser.error(str(error))
    seconds = max(len(audio) / rate for audio, rate in files)
    levels = [spectrogram(audio, rate, seconds) for audio, rate in files]
    top = max(level.max() for level in levels)
    images = [picture(level, top) for level in levels]
    if args.mark is not None:
        for image in images:
            image[:, min(WIDTH - 1, round(args.mark / seconds * WIDTH))] = LINE
    gap = np.zeros((GAP, WIDTH), np.uint8)
    with open(args.output, "wb") as file:
        file.write(png(np.concatenate([images[0], gap, images[1]]), palette()))


if __name__ == "__main__":
    main()
