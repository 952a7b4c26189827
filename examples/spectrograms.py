"""Spectrograms of a track before and after an edit, one above the other, as a small PNG.

    python examples/spectrograms.py before.wav after.wav continuation.png --mark 8
    python examples/spectrograms.py before.wav after.wav infill.png --mark 3.2 5 --gap

Frequency is logarithmic, 50 Hz to 16 kHz upwards; brightness is the level in dB, on one scale for
all; time, from left to right, is that of the longer file. --mark draws vertical lines at these
seconds. --gap adds a picture between the two: before, without what lies between the marks. page.py
takes its pictures from here too.
"""
import argparse
import struct
import zlib

import numpy as np
import soundfile

WIDTH, HEIGHT, GAP = 900, 208, 4            # pixels: of one spectrogram, and black between two
LOWEST, HIGHEST = 50, 16000                 # Hz
RANGE = 80                                  # dB below the loudest point of all that is black
FFT = 4096
COLOURS = (                                 # dark to light
    (0, 0, 8), (60, 15, 110), (160, 40, 110), (235, 100, 50), (252, 190, 60), (255, 255, 220))
LINE = 255                                  # the mark's entry of the palette


def spectrogram(audio, rate, seconds):
    """Level in dB (HEIGHT, WIDTH), highest frequency on top, of audio (n, channels).

    -inf where the audio has ended.
    """
    # A frame for each column of the picture.
    audio = np.pad(audio.mean(1), FFT)
    middles = (np.arange(WIDTH) + 0.5) / WIDTH * seconds * rate                 # samples
    starts = np.minimum(middles.astype(int) + FFT // 2, len(audio) - FFT)
    frames = np.stack([audio[start:start + FFT] for start in starts]) * np.hanning(FFT)
    power = np.abs(np.fft.rfft(frames)) ** 2 + 1e-12                            # (WIDTH, bins)

    # The mean power of each row's band: a difference of running sums, read between bins.
    edges = np.geomspace(LOWEST, HIGHEST, HEIGHT + 1) * FFT / rate              # bins
    running = np.cumsum(np.pad(power, ((0, 0), (1, 0))), 1)                     # (WIDTH, bins + 1)
    bins = np.arange(running.shape[1])
    sums = np.stack([np.interp(edges + 0.5, bins, column) for column in running])
    level = 10 * np.log10(np.diff(sums, axis=1) / np.diff(edges) + 1e-12)       # (WIDTH, HEIGHT)
    level[middles > len(audio) - 2 * FFT] = -np.inf
    return level.T[::-1]


def picture(level, top):
    """Entries of the palette (HEIGHT, WIDTH) uint8 for levels in dB: `top` is the brightest."""
    brightness = np.clip((level - top) / RANGE + 1, 0, 1)
    return ((LINE - 1) * brightness).astype(np.uint8) // 4 * 4


def palette():
    """256 colours (256, 3) uint8: dark to light, and a white one for the mark."""
    places = np.linspace(0, 1, LINE)
    given = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(places, given, channel) for channel in zip(*COLOURS)], 1)
    return np.concatenate([colours, [(255, 255, 255)]]).round().astype(np.uint8)


def png(pixels, colours):
    """An 8-bit PNG, bytes. pixels (height, width) uint8 are entries of colours (256, 3) uint8."""
    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)              # 8 bits, a palette
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()           # each row after its filter, 0: none
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", colours.tobytes())
            + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("before", "after", "output"):
        parser.add_argument(name)
    parser.add_argument("--mark", type=float, nargs="+", default=[], metavar="SECONDS",
                        help="vertical lines at these times")
    parser.add_argument("--gap", action="store_true",
                        help="in between, `before` without what lies between the two marks")
    options = parser.parse_args(argv)
    if options.gap and len(options.mark) != 2:
        parser.error("--gap needs two times of --mark: where the gap begins and ends")
    if not options.output.lower().endswith(".png"):         # a third track would be lost
        parser.error(f"{options.output} must end in .png")

    # The levels of both files, on one scale of time and of brightness.
    try:
        files = [soundfile.read(path, always_2d=True) for path in (options.before, options.after)]
    except soundfile.LibsndfileError as error:
        parser.error(str(error))
    seconds = max(len(audio) / rate for audio, rate in files)
    if not all(0 <= mark <= seconds for mark in options.mark):
        parser.error(f"--mark must lie within the files' {seconds:.3f} s")
    levels = [spectrogram(audio, rate, seconds) for audio, rate in files]
    columns = [min(WIDTH - 1, round(mark / seconds * WIDTH)) for mark in options.mark]
    if options.gap:
        middle = levels[0].copy()
        middle[:, columns[0]:columns[1]] = -np.inf
        levels.insert(1, middle)

    # The pictures, one above the other, with the marks.
    top = max(level.max() for level in levels)
    images = []
    for level in levels:
        image = picture(level, top)
        image[:, columns] = LINE
        images += [image, np.zeros((GAP, WIDTH), np.uint8)]
    try:
        with open(options.output, "wb") as file:
            file.write(png(np.concatenate(images[:-1]), palette()))
    except OSError as error:
        parser.error(f"{options.output} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
