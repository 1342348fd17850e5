"""Small ACTs: one with a real network whose latent matters, one whose decoder is linear in z."""

from collections.abc import Sequence

import torch
from torch import Tensor

from policies.act import ACTPolicy, Posterior
from policies.interface import Batch, Observation
from policies.normalisation import AffineFeature

CHUNK = 6


def tiny_act(**changes) -> ACTPolicy:
    """An untrained network in float64 that answers in px, some 100 px apart for different z."""
    arguments = {
        "cameras": {"image": [32, 32]},
        "state_dim": 2,
        "action_dim": 2,
        "chunk_size": CHUNK,
        "latent_dim": 2,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 16,
        "n_encoder_layers": 1,
        "n_posterior_layers": 1,
        "backbone": "small_cnn",
        "token_stride": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = ACTPolicy(**{**arguments, **changes}).double().eval()
    in_px = [policy.normaliser.action, policy.normaliser.state]
    for feature in policy.normaliser.modules():
        if isinstance(feature, AffineFeature):
            middle, spread = (256.0, 100.0) if feature in in_px else (0.5, 0.25)
            feature.set(
                torch.full_like(feature.offset, middle), torch.full_like(feature.scale, spread)
            )
    with torch.no_grad():
        policy.network.latent_projection.weight *= 3
    return policy


def frames(n: int, seed: int = 0, n_padded: int = 0, chunk_size: int = CHUNK) -> Batch:
    """Consecutive steps of one episode; the last one has ``n_padded`` steps after its end."""
    generator = torch.Generator().manual_seed(seed)
    position = 100 + 300 * torch.rand(n, 2, generator=generator)
    walk = 15 * torch.randn(n, chunk_size, 2, generator=generator).cumsum(1)
    is_pad = torch.zeros(n, chunk_size, dtype=torch.bool)
    is_pad[-1:, chunk_size - n_padded :] = True
    return Batch(
        observation=Observation(
            images={
                "image": torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
            },
            state=position,
            environment_state=torch.zeros(n, 1),
        ),
        actions=position[:, None] + walk,
        action_is_pad=is_pad,
        episode_index=torch.full((n,), 3),
        frame_index=torch.arange(n),
    )


class LinearACT(ACTPolicy):
    """``f(o, z) = state + z @ directions``; the posterior's mean projects a chunk onto them.

    Args:
        directions: [latent, chunk, 2] in px, orthogonal.
        posterior_std: Of every latent dimension.
    """

    def __init__(self, directions: Sequence | Tensor, posterior_std: float = 0.5):
        as_tensor = torch.as_tensor(directions, dtype=torch.float64)
        latent_dim, chunk_size, _ = as_tensor.shape
        super().__init__(
            cameras={},
            state_dim=2,
            action_dim=2,
            environment_state_dim=1,
            chunk_size=chunk_size,
            latent_dim=latent_dim,
            dim_model=4,
            n_heads=1,
            dim_feedforward=4,
            n_encoder_layers=1,
            n_posterior_layers=1,
        )
        self.eval()
        self.directions = as_tensor
        self.posterior_std = posterior_std

    def predict_chunk(self, observation, queries=None):
        latents = torch.zeros(1, 1, len(self.directions), dtype=torch.float64)
        return self.decode_latents(observation, latents, queries)[:, 0]

    def decode_latents(self, observation, latents, queries=None, max_columns=1024):
        assert observation.state is not None
        steps = list(range(self.chunk_size) if queries is None else queries)
        offset = torch.einsum("...l,lcd->...cd", latents.double(), self.directions[:, steps])
        return observation.state.double()[:, None, None] + offset

    def encode_posterior(self, batch):
        assert batch.observation.state is not None
        offset = batch.actions.double() - batch.observation.state.double()[:, None]
        norm = self.directions.square().sum((1, 2)).clamp_min(1e-9)
        mean = torch.einsum("bcd,lcd->bl", offset, self.directions) / norm
        return Posterior(mean, torch.full_like(mean, self.posterior_std).square().log())
