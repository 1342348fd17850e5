"""How each family of LeRobot's policies turns an observation into action chunks, without state.

All of it works on normalised values and LeRobot's own batch keys.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from policies.lerobot_config import STATE_KEY, refuse_without_chunks

Generators = list[torch.Generator] | torch.Generator
"""One generator per row, or one for the whole batch."""

_QUEUES = ("_queues", "_action_queue")
_IMAGES_KEY = "observation.images"


@runtime_checkable
class ChunkSource(Protocol):
    """How one family of policies turns a normalised observation into normalised chunks."""

    chunk_size: int
    n_action_steps: int
    needs_step_axis: bool
    """Whether the observation has an ``obs_step`` axis even when it is one step long."""
    is_random: bool
    """Whether two predictions for one observation may differ."""

    def encode(self, batch: dict[str, Any]) -> Any:
        """Do what is the same for all samples of an observation."""
        ...

    def sample(
        self,
        encoded: Any,
        n_samples: int,
        generators: Generators,
        noise: Tensor | None,
    ) -> Tensor:
        """Draw chunks, (batch * n_samples, chunk, action), samples of an observation together."""
        ...


class DiffusionChunks:
    """Diffusion Policy: denoise from Gaussian noise, given one encoding of the observation."""

    needs_step_axis = True
    is_random = True

    def __init__(self, policy: Any):
        self.policy = policy
        config = policy.config
        self.first = config.n_obs_steps - 1
        self.chunk_size = config.horizon - self.first
        self.n_action_steps = config.n_action_steps
        self.noise_shape = (config.horizon, config.action_feature.shape[0])

    def encode(self, batch: dict[str, Any]) -> Float[Tensor, "batch condition"]:
        """Pictures and states of all observed steps as one vector."""
        batch = dict(batch)
        if self.policy.config.image_features:
            pictures = [batch[key] for key in self.policy.config.image_features]
            batch[_IMAGES_KEY] = torch.stack(pictures, dim=-4)
        return self.policy.diffusion._prepare_global_conditioning(batch)

    def sample(
        self,
        encoded: Float[Tensor, "batch condition"],
        n_samples: int,
        generators: Generators,
        noise: Tensor | None,
    ) -> Tensor:
        """Denoise; the first steps lie before the observed instant and are left out."""
        return self.denoise(encoded, n_samples, generators, noise)[:, self.first :]

    def denoise(
        self,
        encoded: Float[Tensor, "batch condition"],
        n_samples: int,
        generators: Generators,
        noise: Tensor | None,
    ) -> Float[Tensor, "row horizon action"]:
        """Draw whole horizons, which begin ``n_obs_steps - 1`` steps before the observed instant.

        Raises:
            ValueError: If ``noise`` has the wrong shape.
        """
        condition = repeat(encoded, "batch ... -> (batch sample) ...", sample=n_samples)
        if noise is None:
            noise = _gaussian(generators, len(condition), self.noise_shape)
        if noise.shape != (len(condition), *self.noise_shape):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, expected "
                f"{(len(condition), *self.noise_shape)}: batch, horizon, action"
            )
        return self.policy.diffusion.conditional_sample(
            len(condition),
            global_cond=condition,
            # The sampler of diffusers takes one generator for all rows, or one per row.
            generator=generators,
            noise=noise.to(condition.device, condition.dtype),
        )

    @property
    def noise_levels(self) -> Float[Tensor, " timestep"]:
        """Noise over signal, ``sqrt((1 - abar_t) / abar_t)`` at every training timestep, float64.

        DDPM and DDIM share it; what they do between two levels plays no part here.
        """
        signal = self.policy.diffusion.noise_scheduler.alphas_cumprod.double()
        return ((1 - signal) / signal).sqrt()

    def predict_noise(
        self,
        encoded: Float[Tensor, "row condition"],
        noised: Float[Tensor, "row horizon action"],
        level: float,
    ) -> Float[Tensor, "row horizon action"]:
        """Predict eps in ``noised = horizon + level * eps``; gradients flow.

        Between two training timesteps the network is asked at a fractional one: it sees its
        timestep through smooth sinusoids, and ``atan(level)`` is nearly linear in the timestep.
        ``clip_sample`` belongs to LeRobot's sampler, not to the prediction, and is left out.

        Raises:
            ValueError: If the level lies outside those the network was trained on.
        """
        levels = self.noise_levels.cpu().numpy()
        if not levels[0] * (1 - 1e-9) <= level <= levels[-1] * (1 + 1e-9):
            raise ValueError(f"noise level {level} must lie in {levels[0]:.4g}..{levels[-1]:.4g}")
        timestep = float(np.interp(np.arctan(level), np.arctan(levels), np.arange(len(levels))))
        # Networks see sqrt(abar) horizon + sqrt(1 - abar) eps: unit variance, not unit signal.
        scaled = (noised / math.hypot(1, level)).to(encoded.dtype)
        timesteps = torch.full((len(scaled),), timestep, device=scaled.device)
        predicted = self.policy.diffusion.unet(scaled, timesteps, global_cond=encoded).to(noised)
        if self.policy.config.prediction_type == "sample":
            return (noised - predicted) / level
        return predicted


class VQBeTChunks:
    """VQ-BeT: draw one code of each quantiser, add its offset; torch's global generator decides."""

    needs_step_axis = True
    is_random = True

    def __init__(self, policy: Any):
        self.policy = policy
        self.chunk_size = self.n_action_steps = policy.config.action_chunk_size

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Stack the cameras."""
        pictures = [batch[key] for key in self.policy.config.image_features]
        return {STATE_KEY: batch[STATE_KEY], _IMAGES_KEY: torch.stack(pictures, dim=-4)}

    def sample(
        self,
        encoded: dict[str, Any],
        n_samples: int,
        generators: Generators,
        noise: Tensor | None,
    ) -> Tensor:
        """Draw chunks, samples of an observation together."""
        _refuse_noise(noise, self.policy)
        batch = _repeat_rows(encoded, n_samples)
        with _global_generator(generators, self.policy):
            return self.policy.vqbet(batch, rollout=True)[:, : self.chunk_size]


class DirectChunks:
    """Any policy whose ``predict_action_chunk`` needs nothing but the observation (ACT, VLAs)."""

    needs_step_axis = False

    def __init__(self, policy: Any):
        self.policy = policy
        config = policy.config
        self.chunk_size = getattr(config, "chunk_size", None) or len(config.action_delta_indices)
        self.n_action_steps = getattr(config, "n_action_steps", self.chunk_size)
        self.is_random = config.type != "act"

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Nothing can be done beforehand."""
        return batch

    def sample(
        self,
        encoded: dict[str, Any],
        n_samples: int,
        generators: Generators,
        noise: Tensor | None,
    ) -> Tensor:
        """Draw chunks, samples of an observation together."""
        _refuse_noise(noise, self.policy)
        batch = _repeat_rows(encoded, n_samples)
        with _global_generator(generators, self.policy), _queues_kept(self.policy):
            return self.policy.predict_action_chunk(batch)


def chunk_source(policy: Any) -> ChunkSource:
    """How this policy predicts chunks.

    Raises:
        ValueError: If it cannot answer an observation by itself.
    """
    refuse_without_chunks(policy.config)
    families = {"diffusion": DiffusionChunks, "vqbet": VQBeTChunks}
    return families.get(policy.config.type, DirectChunks)(policy)


def _gaussian(generators: Generators, n_rows: int, shape: tuple[int, ...]) -> Tensor:
    if isinstance(generators, torch.Generator):
        return torch.randn((n_rows, *shape), generator=generators, device=generators.device)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _repeat_rows(batch: dict[str, Any], times: int) -> dict[str, Any]:
    """Repeat every row ``times`` times, neighbours together."""
    if times == 1:
        return batch
    return {
        key: value.repeat_interleave(times, dim=0)
        if isinstance(value, Tensor)
        else [each for each in value for _ in range(times)]
        if isinstance(value, list)
        else value
        for key, value in batch.items()
    }


def _refuse_noise(noise: Tensor | None, policy: Any) -> None:
    if noise is not None:
        raise ValueError(f"noise is for diffusion only, the policy is {policy.config.type}")


@contextlib.contextmanager
def _global_generator(generators: Generators, policy: nn.Module) -> Iterator[None]:
    """Let torch's global generator play the given one (the first of several), then restore it."""
    source = generators if isinstance(generators, torch.Generator) else generators[0]
    device = next(policy.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if source.device.type == "cpu" and device.type == "cpu":
            torch.set_rng_state(source.get_state())
            yield
            source.set_state(torch.get_rng_state())
        else:
            seed = torch.randint(2**62, (), generator=source, device=source.device)
            torch.manual_seed(int(seed))
            yield


@contextlib.contextmanager
def _queues_kept(policy: nn.Module) -> Iterator[None]:
    """Give a policy empty queues for a while, then its own back."""
    kept = {name: getattr(policy, name) for name in _QUEUES if hasattr(policy, name)}
    if kept:
        policy.reset()  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        for name, queue in kept.items():
            setattr(policy, name, queue)
