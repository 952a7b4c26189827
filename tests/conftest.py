"""Puts the repository's root on the path, so that the tests import the modules as a user's script would."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(min(2, torch.get_num_threads()))
