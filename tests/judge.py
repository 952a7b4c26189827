"""A listener that never guides and is no network: statistics of spectra, and linear discriminants between tracks."""
import math
from pathlib import Path

import torch

import sample
import tasks
from sample import SAMPLE_RATE

EXCERPTS, DIRECTIONS, SHRINKAGE = 12, 32, 0.3       # of a track; of the embedding; of the scatter within tracks
BANDS, CEPSTRA = 48, 11


def statistics(audio):
    """(B, 2, n) at 44.1 kHz -> (B, 210), the same at any level: of 48 log-mel bands the mean, the deviation and the
    mean change from frame to frame, and how their cepstra vary together."""
    mono = tasks.resample(audio.mean(1), SAMPLE_RATE, 32000)
    X = torch.stft(mono, 1024, 512, window=torch.hann_window(1024), return_complex=True).abs().square()
    mel = (tasks.mel_triangles(BANDS, 30, 14000, 513) @ X + 1e-6).log()                         # (B, bands, frames)
    mel = (mel - mel.mean((1, 2), keepdim=True)).double()
    mean, spread = mel.mean(2), [mel.std(2), mel.diff(dim=2).abs().mean(2)]
    cosines = torch.cos(math.pi / BANDS * torch.arange(1, CEPSTRA + 1)[:, None] * (torch.arange(BANDS) + 0.5)).double()
    cepstra = BANDS**-0.5 * cosines @ (mel - mean[..., None])
    row, column = torch.triu_indices(CEPSTRA, CEPSTRA)
    together = (cepstra @ cepstra.mT / mel.shape[-1])[:, row, column]
    return torch.cat([mean, *(x.clamp(min=1e-3).log() for x in spread), together.sign() * together.abs().sqrt()], 1)


def means_and_scatter(x, groups):
    """x (n, d) in groups (n,) -> means (groups, d); covariance within groups, shrunk towards a multiple of I."""
    means = torch.stack([x[groups == group].mean(0) for group in groups.unique()])
    within = (x - means[groups]).T.cov()
    return means, torch.lerp(within, within.diag().mean() * torch.eye(len(within)).to(x), SHRINKAGE)


class Judge:
    """Made from folders of training music, of excerpts of so many seconds; the classes are the names of the folders."""

    def __init__(self, folders, seconds):
        paths, n = [Path(path) for path in sample.find_files(folders)], round(seconds * SAMPLE_RATE)
        self.classes, heard = sorted({path.parent.name for path in paths}), []
        for path in sample.progress(paths, "judge", unit="track"):
            audio = sample.to_stereo_44k(*sample.read_audio(path))
            if audio.shape[1] < n:
                raise sample.UserError(f"{path} is shorter than {seconds:g} s: take it out of --train")
            starts = torch.linspace(0, audio.shape[1] - n, EXCERPTS).long()
            heard.append(statistics(torch.stack([audio[:, start:start + n] for start in starts])))
        label = torch.tensor([self.classes.index(path.parent.name) for path in paths]).repeat_interleave(EXCERPTS)
        x = torch.cat(heard)
        self.centre, self.scale = x.mean(0), x.std(0)
        x = (x - self.centre) / self.scale
        means, within = means_and_scatter(x, torch.arange(len(paths)).repeat_interleave(EXCERPTS))
        values, vectors = torch.linalg.eigh(within)
        whiten = vectors / values.sqrt()
        self.directions = whiten @ torch.linalg.eigh((means @ whiten).T.cov())[1][:, -DIRECTIONS:]      # Fisher's
        means, within = means_and_scatter(x @ self.directions, label)
        self.weights = torch.linalg.solve(within, means.T)
        self.bias = -(means.T * self.weights).sum(0) / 2

    def listen(self, audio):
        """(B, 2, n) at 44.1 kHz -> log-probabilities (B, classes), up to a constant, and embedding (B, 32)."""
        embedding = ((statistics(audio) - self.centre) / self.scale) @ self.directions
        return embedding @ self.weights + self.bias, embedding
