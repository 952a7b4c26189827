"""A judge that never guides and is no network: statistics of spectra, and Fisher's discriminants.

    judge = Judge(["path/to/train"], seconds=2.0)
    judge.scores(audio), judge.embedding(audio)         # audio (B, 2, n) at 44.1 kHz
"""
import math
from pathlib import Path

import torch

import sample
from sample import SAMPLE_RATE
from tasks import mel_triangles, resample

EXCERPTS = 12                           # of each track
DIRECTIONS = 32                         # of the embedding
SHRINKAGE = 0.3                         # of the scatter within groups, towards a multiple of I
BANDS, CEPSTRA = 48, 11


def statistics(audio):
    """(B, 2, n) at 44.1 kHz -> (B, 210), independent of the level.

    Of 48 log-mel bands: mean, deviation and mean change between frames, and the covariance of their
    cepstra.
    """
    mono = resample(audio.mean(1), SAMPLE_RATE, 32000)
    window = torch.hann_window(1024)
    power = torch.stft(mono, 1024, 512, window=window, return_complex=True).abs().square()
    mel = (mel_triangles(BANDS, 30, 14000, 513) @ power + 1e-6).log()           # (B, bands, frames)
    mel = (mel - mel.mean((1, 2), keepdim=True)).double()
    mean = mel.mean(2)
    deviation = mel.std(2).clamp(min=1e-3).log()
    change = mel.diff(dim=2).abs().mean(2).clamp(min=1e-3).log()

    # Cepstra are the cosine transform of the bands.
    k, band = torch.arange(1, CEPSTRA + 1), torch.arange(BANDS)
    cosines = torch.cos(math.pi / BANDS * k[:, None] * (band + 0.5)).double()
    cepstra = BANDS**-0.5 * cosines @ (mel - mean[..., None])                   # (B, 11, frames)
    row, column = torch.triu_indices(CEPSTRA, CEPSTRA)
    covariance = (cepstra @ cepstra.mT / mel.shape[-1])[:, row, column]
    return torch.cat([mean, deviation, change, covariance.sign() * covariance.abs().sqrt()], 1)


def means_and_scatter(x, groups):
    """x (n, d) in groups (n,), from 0 on -> means (groups, d), shrunk covariance within (d, d)."""
    means = torch.stack([x[groups == group].mean(0) for group in groups.unique()])
    within = (x - means[groups]).T.cov()
    sphere = within.diag().mean() * torch.eye(len(within)).to(x)
    return means, torch.lerp(within, sphere, SHRINKAGE)


def read_track(path):
    """The audio (2, n) at 44.1 kHz of training music. UserError if a sample is not finite."""
    audio = sample.to_stereo_44k(*sample.read_audio(path))
    if not audio.isfinite().all():
        raise sample.UserError(f"{path} has samples that are not finite: take it out of --train")
    return audio


class Judge:
    """Made from folders of training music, from excerpts of `seconds`.

    The embedding tells tracks apart. The classes are the names of the folders. UserError if there
    are fewer than two tracks, or one that is too short.
    """

    def __init__(self, folders, seconds):
        paths = [Path(path) for path in sample.find_files(folders)]
        self.classes = sorted({path.parent.name for path in paths})
        n = round(seconds * SAMPLE_RATE)
        if len(paths) < 2:
            raise sample.UserError(f"--train has {len(paths)} tracks: the judge needs two or more")

        # Statistics of equally spaced excerpts of every track.
        x = []
        for path in sample.progress(paths, "judge", unit="track"):
            audio = read_track(path)
            if audio.shape[1] < n:
                raise sample.UserError(f"{path} is shorter than {seconds:g} s: "
                                       "take it out of --train")
            starts = torch.linspace(0, audio.shape[1] - n, EXCERPTS).long()
            x.append(statistics(torch.stack([audio[:, start:start + n] for start in starts])))
        x = torch.cat(x)                                                        # (excerpts, 210)
        self.centre, self.scale = x.mean(0), x.std(0)
        x = (x - self.centre) / self.scale

        # Fisher's directions: with the scatter within tracks made I, those in which the tracks'
        # means differ most.
        track = torch.arange(len(paths)).repeat_interleave(EXCERPTS)
        means, within = means_and_scatter(x, track)
        values, vectors = torch.linalg.eigh(within)
        whiten = vectors / values.sqrt()
        _, between = torch.linalg.eigh((means @ whiten).T.cov())
        self.directions = whiten @ between[:, -DIRECTIONS:]                     # (210, 32)

        # Linear discriminants of the classes.
        label = torch.tensor([self.classes.index(path.parent.name) for path in paths])
        means, within = means_and_scatter(x @ self.directions, label.repeat_interleave(EXCERPTS))
        self.weights = torch.linalg.solve(within, means.T)                      # (32, classes)
        self.bias = -(means.T * self.weights).sum(0) / 2

    def embedding(self, audio):
        """(B, 2, n) at 44.1 kHz -> (B, 32)."""
        return ((statistics(audio) - self.centre) / self.scale) @ self.directions

    def scores(self, audio):
        """(B, 2, n) at 44.1 kHz -> log-probabilities of the classes, up to a constant."""
        return self.embedding(audio) @ self.weights + self.bias
