"""Puts the repository's root on the path, so that the tests import the modules as a user's script would; writes the
checkpoints that tests start from; and leaves out what is marked slow.

One thread: tiny networks gain nothing from more, and on a busy machine waiting for each other costs them minutes.
"""
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported; subprocesses inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: several runs or processes; left out unless asked for, with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"


def save_checkpoint(path, kind, net, vae=None, classes=None):
    """Write an untrained network as a run of train.py would."""
    import torch                        # not earlier: the line above must come first
    carried = {"config": asdict(vae.config), "weights": vae.state_dict()} if vae else None
    torch.save({"format": 1, "kind": kind, "size": "tiny", "config": asdict(net.config), "ema": net.state_dict(),
                "step": 1, "classes": classes, "vae": carried}, path)
