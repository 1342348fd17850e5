"""Activations that are known, for worker processes: they import this module."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.activation_store import ActivationShapes
from features.taps import TokenPosition

SHAPES = ActivationShapes(
    (0, 4, 7), (5, 9, 3), (TokenPosition("latent"), TokenPosition("top")), dim=8, frames_per_batch=4
)


def content():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPES.n_frames, SHAPES.n_tokens, SHAPES.dim, generator=generator)


@dataclass(frozen=True)
class Known:
    """Opens like a policy and its data; kills its process at a frame, the first time."""

    dies_at: int
    died: Path

    def __call__(self):
        known = content()

        def compute(frames):
            if self.dies_at in frames and not self.died.exists():
                self.died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return known[frames.start : frames.stop]

        return compute
