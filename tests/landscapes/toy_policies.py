"""A policy whose density is known on paper: kernels at fixed centres, or around the agent."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from landscapes.density import Mixture
from policies.interface import Batch, DataSchema, Observation


class ToyPolicy:
    """K equally likely centres; sample j is centre j modulo K.

    Args:
        centres: [K, 2] at chunk step 0, data units.
        velocity: Displacement of all centres per chunk step.
        point: [2], what is executed at chunk step 0 ("z = 0"); the mean of the centres when None.
        follows_state: Whether centres and point are offsets from the observed state.
        chunk_size: Steps per chunk.
    """

    n_action_steps = 1
    n_obs_steps = 1
    data_schema = DataSchema(cameras={}, state_dim=2, action_dim=2)

    def __init__(
        self,
        centres: Sequence[Sequence[float]] | Tensor,
        velocity: Sequence[float] = (0.0, 0.0),
        point: Sequence[float] | None = None,
        follows_state: bool = False,
        chunk_size: int = 40,
    ):
        self.centres = torch.as_tensor(centres, dtype=torch.float64)
        self.velocity = torch.tensor(velocity, dtype=torch.float64)
        self.point = self.centres.mean(0) if point is None else torch.tensor(point).double()
        self.follows_state = follows_state
        self.chunk_size = chunk_size

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Tensor:
        return self._chunks(self.point[None], observation, queries)[:, 0]

    def sample_chunks(
        self,
        observation: Observation,
        n_samples: int,
        seed: int = 0,
        queries: Sequence[int] | None = None,
    ) -> Tensor:
        cycled = self.centres[torch.arange(n_samples) % len(self.centres)]
        return self._chunks(cycled, observation, queries)

    def density(self, observation: Observation, scale: float, query: int = 0) -> Mixture:
        """The exact density of each observation's action, given the kernels' scale."""
        centres = self._chunks(self.centres, observation, [query])[:, :, 0]
        return Mixture(centres, torch.full((1, 1, 2), scale, dtype=torch.float64))

    def _chunks(
        self, starts: Tensor, observation: Observation, queries: Sequence[int] | None
    ) -> Tensor:
        assert observation.state is not None
        steps = torch.tensor(list(range(self.chunk_size) if queries is None else queries))
        chunks = starts[:, None] + steps[:, None] * self.velocity
        offset = observation.state.double() * self.follows_state
        return chunks[None] + rearrange(offset, "batch action -> batch 1 1 action")


def demonstrated(
    policy: ToyPolicy,
    n_frames: int,
    scale: float,
    seed: int = 0,
    n_episodes: int = 10,
    n_steps: int | None = None,
) -> Batch:
    """Frames whose every chunk step is drawn, independently, from the policy's own density."""
    generator = torch.Generator().manual_seed(seed)
    state = 50 + 400 * torch.rand(n_frames, 2, generator=generator, dtype=torch.float64)
    observation = Observation(images={}, state=state)
    steps = range(policy.chunk_size if n_steps is None else n_steps)
    actions = torch.cat(
        [policy.density(observation, scale, step).sample(1, generator) for step in steps], dim=1
    )
    frames = torch.arange(n_frames)
    return Batch(
        observation=observation,
        actions=actions,
        action_is_pad=torch.zeros(actions.shape[:2], dtype=torch.bool),
        episode_index=frames * n_episodes // n_frames,
        frame_index=frames,
    )
