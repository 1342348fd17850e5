"""Settings of every test: no hub, no spinning threads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import torch

# Two threads on two shared cores wait for each other longer than one works alone.
torch.set_num_threads(1)
