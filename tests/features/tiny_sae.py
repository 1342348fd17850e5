"""A small autoencoder on a small policy: untrained, with scale, centre and threshold of data."""

import torch

from autoencoders.sae import SparseAutoencoder, build_autoencoder
from features.taps import find_tap, read_activations
from policies.act import ACTPolicy
from policies.interface import Observation


def tiny_sae(
    view: ACTPolicy, layer: str, observation: Observation, n_latents: int = 48, k: int = 5
) -> SparseAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = build_autoencoder(
            "batch_topk", d_in=find_tap(view, layer).dim, n_latents=n_latents, k=k
        ).double()
    sae.initialise(read_activations(view, observation, layer).flatten(0, 1))
    return sae.requires_grad_(False)
