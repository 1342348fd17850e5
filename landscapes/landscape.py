"""What goes into a landscape and what comes out: frames, a policy's answers, scores on a board."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from landscapes.density import Mixture
from landscapes.grid import Grid
from landscapes.regions import CREDIBLE_LEVELS
from landscapes.space import Plane
from policies.act import ACTPolicy, prior_latents
from policies.interface import Batch, SamplingPolicyView

HORIZONS = (0, 8, 16, 32)
"""Chunk steps whose landscapes are shown, as far as a policy's chunk reaches."""


@dataclass(frozen=True)
class Predictions:
    """What a policy answered on some frames, in data units; all that most methods need of it."""

    queries: tuple[int, ...]
    """Chunk steps, ascending."""
    samples: Float[Tensor, "frame sample query action"]
    """Drawn actions, float64."""
    point: Float[Tensor, "frame query action"]
    """What the policy would execute (ACT: z = 0), float64."""
    expert: Float[Tensor, "frame query action"]
    """What the demonstrator did, float64."""
    is_valid: Bool[Tensor, "frame query"]
    """False where the demonstration has ended before that step."""

    def at(self, queries: Sequence[int]) -> "Predictions":
        """Only some of the chunk steps.

        Raises:
            ValueError: If one was not predicted.
        """
        if missing := sorted(set(queries) - set(self.queries)):
            raise ValueError(
                f"horizons {missing}: not among the predicted chunk steps {list(self.queries)}"
            )
        places = [self.queries.index(query) for query in queries]
        return Predictions(
            tuple(queries),
            self.samples[:, :, places],
            self.point[:, places],
            self.expert[:, places],
            self.is_valid[:, places],
        )

    def dimensions(self, dims: Sequence[int]) -> "Predictions":
        """Only some of the action's dimensions."""
        chosen = list(dims)
        return replace(
            self,
            samples=self.samples[..., chosen],
            point=self.point[..., chosen],
            expert=self.expert[..., chosen],
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[Predictions]") -> "Predictions":
        """Join predictions of the same queries on more frames."""
        return cls(
            parts[0].queries,
            torch.cat([part.samples for part in parts]),
            torch.cat([part.point for part in parts]),
            torch.cat([part.expert for part in parts]),
            torch.cat([part.is_valid for part in parts]),
        )

    def rows(self, index: slice | Int[Tensor, " row"]) -> "Predictions":
        """Some of the frames."""
        return replace(
            self,
            samples=self.samples[index],
            point=self.point[index],
            expert=self.expert[index],
            is_valid=self.is_valid[index],
        )

    def mixture(self, scale: Float[Tensor, "#frame query action"]) -> Mixture:
        """The density p(a_k | o) of every frame and query, given the kernels' scale b."""
        return Mixture(
            rearrange(self.samples, "frame sample query action -> frame query sample action"),
            scale[:, :, None],
        )


@torch.no_grad()
def predict(
    view: SamplingPolicyView,
    batch: Batch,
    queries: Sequence[int],
    n_samples: int = 64,
    seed: int = 0,
) -> Predictions:
    """Ask a policy about some frames.

    Args:
        view: The policy, in eval mode, on the device of ``batch``.
        batch: Frames with their demonstrated chunks.
        queries: Chunk steps; those beyond the policy's chunk are an error.
        n_samples: Action chunks drawn per frame (K).
        seed: Of the random numbers that all frames share.

    Raises:
        ValueError: If a query lies beyond the policy's or the demonstrated chunk.
    """
    queries = tuple(sorted(set(queries)))
    reach = min(view.chunk_size, batch.actions.shape[1])
    if not queries or queries[0] < 0 or queries[-1] >= reach:
        raise ValueError(f"horizons {list(queries)} must lie in 0..{reach - 1}, within the chunk")
    columns = list(queries)
    samples, point = _answers(view, batch, columns, n_samples, seed)
    return Predictions(
        queries=queries,
        samples=samples.double(),
        point=point.double(),
        expert=batch.actions[:, columns].double(),
        is_valid=~batch.action_is_pad[:, columns],
    )


def _answers(
    view: SamplingPolicyView, batch: Batch, columns: list[int], n_samples: int, seed: int
) -> tuple[Float[Tensor, "frame sample query action"], Float[Tensor, "frame query action"]]:
    """Drawn and executed actions."""
    if isinstance(view, ACTPolicy) and view.network.posterior is not None:
        # z = 0 is one latent more: the pictures are encoded once.
        latents = prior_latents(n_samples, view.network.latent_dim, seed)
        latents = torch.cat([torch.zeros_like(latents[:1]), latents])
        decoded = view.decode_latents(batch.observation, latents[None], columns)
        return decoded[:, 1:], decoded[:, 0]
    samples = view.sample_chunks(batch.observation, n_samples, seed, columns)
    return samples, view.predict_chunk(batch.observation, columns)


@dataclass(frozen=True)
class Landscape:
    """Scores of every cell of the board, with the credible regions of the policy's density."""

    method: str
    """Name of the scoring method."""
    unit: str
    """Of the scores, for the colour bar."""
    value_range: tuple[float, float]
    """Scores at the ends of the colour map: fixed, so that frames and checkpoints compare."""
    grid: Grid
    queries: tuple[int, ...]
    """Chunk steps."""
    scores: Float[Tensor, "frame query row column"]
    mass: Float[Tensor, "frame query row column"]
    """Probability of each cell under the density that belongs to the method."""
    thresholds: Float[Tensor, "frame query level"]
    """Cell mass at the border of the credible regions of :attr:`levels`."""
    levels: tuple[float, ...] = CREDIBLE_LEVELS
    """Mass of each credible region."""
    plane: Plane | None = None
    """The two dimensions that the board is over; None where actions have no others."""
