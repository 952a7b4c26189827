"""What all tests share: the path to the modules, one thread, and helpers that make small inputs.

One thread: tiny networks gain nothing from more, and on a busy machine waiting for each other costs
them minutes. Tests that are marked slow are left out unless asked for, with -m slow.
"""
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

# Before torch is imported, in any test; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: several runs or processes; left out unless asked for, with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"


def save_checkpoint(path, kind, net, vae=None, classes=None):
    """Write an untrained network as a run of train.py would."""
    carried = None
    if vae:
        carried = {"config": asdict(vae.config), "weights": vae.state_dict()}
    torch.save({"format": 1, "kind": kind, "size": "tiny", "config": asdict(net.config),
                "ema": net.state_dict(), "step": 1, "classes": classes, "vae": carried}, path)


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

    return SimpleNamespace(kind=kind, size="tiny", path="", step=None, vae=None, net=net, hop=hop,
                           channels=2 * hop, window=window, encode=to_frames, decode=to_audio)
