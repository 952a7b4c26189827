"""What all tests share: the root on the path, as for a user's script; checkpoints to start from.

Tests marked slow are left out. One thread: tiny networks gain nothing from more, and on a busy
machine threads that wait for each other cost minutes.
"""
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: several runs or processes; run with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"


def save_checkpoint(path, kind, net, vae=None, classes=None):
    """Write an untrained network as a run of train.py would."""
    carried = None
    if vae:
        carried = {"config": asdict(vae.config), "weights": vae.state_dict()}
    torch.save({"format": 1, "kind": kind, "size": "tiny", "config": asdict(net.config),
                "ema": net.state_dict(), "step": 1, "classes": classes, "vae": carried}, path)


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    """A folder with tiny untrained models and music, `test` and `train`, of one second a track.

    `train` has a short, an empty and an unreadable file too.
    """
    import numpy as np
    import soundfile

    import dit
    import tasks
    import unet1d
    import vae

    root = tmp_path_factory.mktemp("studio")
    torch.manual_seed(1)
    classifier = tasks.PaSST(tasks.PASST_PRESETS["tiny"])
    for p in classifier.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.manual_seed(2)
    coder = vae.VAE(vae.PRESETS["tiny"])
    net = dit.DiT(dit.PRESETS["tiny"])
    unet = unet1d.UNet1D(unet1d.PRESETS["tiny"])
    for p in (*coder.parameters(), *net.parameters(), *unet.parameters()):
        p.data += 0.02 * torch.randn_like(p)        # many layers do nothing as they are initialised
    save_checkpoint(root / "classifier.pt", "classifier", classifier, classes=list("abcdefghi"))
    save_checkpoint(root / "latent.pt", "latent", net, coder)
    save_checkpoint(root / "waveform.pt", "waveform", unet)

    t = np.arange(44100) / 44100
    for folder, count in (("test", 3), ("train", 6)):
        (root / folder).mkdir()
        for i in range(count):
            chord = sum(np.sin(2 * np.pi * 110 * (i + 2) * k * t) / k for k in (1, 2, 3))
            noise = np.random.default_rng([i, count]).standard_normal((44100, 2))
            audio = 0.1 * chord[:, None] + 0.02 * noise
            soundfile.write(root / folder / f"{i}.wav", audio, 44100)
    soundfile.write(root / "train" / "short.wav", np.zeros((2000, 2)), 44100)
    (root / "train" / "empty.wav").touch()
    (root / "train" / "text.wav").write_text("words")
    return root


# ---- helpers of test_sample, test_tasks and test_guidance ----------------------------------------

def seeded(seed=0):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers that depend on the shape and the seed alone."""
    return torch.randn(*shape, dtype=dtype, generator=seeded(seed))


def wake(net, seed=0):
    """Zero-initialised layers get small weights, so that an untrained network does something."""
    generator = seeded(seed)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02, generator=generator)
    return net


def neighbours(x_t, t):
    """v of a smooth model without weights: each position depends on the next one, and on t."""
    return 0.5 * torch.tanh(x_t + x_t.roll(1, -1)) * t[:, None, None]


def toy(net=neighbours, decode=lambda x: x, hop=128, window=512, kind="waveform"):
    """What sampling needs of a sample.Checkpoint, without weights: it encodes by taking blocks.

    A frame of its space (B, 2 * hop, frames) holds the 2 * hop samples of audio (B, 2, n).
    decode      a change of the decoded audio (B, 2, n)
    """
    def to_frames(audio):
        return audio.unflatten(-1, (-1, hop)).transpose(2, 3).flatten(1, 2)

    def to_audio(x):
        return decode(x.unflatten(1, (2, hop)).transpose(2, 3).flatten(2))

    def estimate(x_t, t, settings):
        return net(x_t, t).float()

    return SimpleNamespace(kind=kind, size="tiny", path="", step=None, vae=None, net=net, weak=None,
                           estimate=estimate, hop=hop, channels=2 * hop, window=window,
                           encode=to_frames, decode=to_audio)
