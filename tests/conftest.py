"""Puts the repository's root on the path, so that the tests import the modules as a user's script would.

One thread: tiny networks gain nothing from more, and on a busy machine waiting for each other costs them minutes.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch is imported; subprocesses inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
