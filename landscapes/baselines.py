"""Densities that know little, to compare a policy's with.

Each is one Laplace density per chunk step, ``sum_d |a_d - c_d| / b_d + log 2 b_d`` nats, with its
scale b fitted on calibration frames as the policy's is. A policy that sees the agent has learnt
something only where it beats ``agent``; ``previous_action`` and ``linear`` know a history that most
policies do not see.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from landscapes.density import laplace_log_density, smallest_scale
from landscapes.grid import Grid
from landscapes.space import ActionSpace
from policies.interface import Batch

UNIFORM, MARGINAL, AGENT, PREVIOUS, LINEAR = BASELINES = (
    "uniform",
    "marginal",
    "agent",
    "previous_action",
    "linear",
)
"""Names of the baselines, from the least knowing on."""


@dataclass(frozen=True)
class BaselineFrames:
    """What the baselines may know of some frames, in data units."""

    queries: tuple[int, ...]
    """Chunk steps."""
    expert: Float[Tensor, "frame query action"]
    """What the demonstrator did."""
    is_valid: Bool[Tensor, "frame query"]
    """False where the demonstration has ended before that step."""
    agent: Float[Tensor, "frame action"] | None = None
    """Where the agent is observed to be; None when states are not positions like the actions."""
    previous: Float[Tensor, "frame 2 action"] | None = None
    """Demonstrated actions two and one steps ago, NaN where the episode had not begun."""

    def dimensions(self, dims: Sequence[int]) -> "BaselineFrames":
        """Only some of the action's dimensions."""
        chosen = list(dims)
        agent, previous = self.agent, self.previous
        return replace(
            self,
            expert=self.expert[..., chosen],
            agent=None if agent is None else agent[..., chosen],
            previous=None if previous is None else previous[..., chosen],
        )

    @classmethod
    def of(
        cls,
        batch: Batch,
        queries: Sequence[int],
        previous: Float[Tensor, "frame 2 action"] | None = None,
    ) -> "BaselineFrames":
        """Take from samples what the baselines may know.

        Args:
            batch: Frames with their demonstrated chunks.
            queries: Chunk steps.
            previous: Demonstrated actions two and one steps ago, for the baselines that need them.
        """
        state = batch.observation.state
        if state is not None and state.ndim == 3:
            state = state[:, -1]
        is_position = state is not None and state.shape[-1] == batch.actions.shape[-1]
        return cls(
            queries=tuple(queries),
            expert=batch.actions[:, list(queries)].double(),
            is_valid=~batch.action_is_pad[:, list(queries)],
            agent=state.double() if state is not None and is_position else None,
            previous=None if previous is None else previous.double(),
        )


@dataclass(frozen=True)
class Baselines:
    """How well the demonstrations are explained by densities that know little."""

    queries: tuple[int, ...]
    """Chunk steps."""
    nll: Mapping[str, Float[np.ndarray, "frame query"]]
    """Negative log-likelihood of the demonstrated action, nats; NaN where there is none, or where a
    baseline lacks the actions before."""
    scale: Mapping[str, Float[np.ndarray, "query action"]]
    """Fitted Laplace scale b, data units."""

    def means(self) -> dict[str, float]:
        """Mean over frames as ``k{query}/{baseline}``, where a baseline has any."""
        return {
            f"k{query}/{name}": float(np.nanmean(nll[:, place]))
            for place, query in enumerate(self.queries)
            for name, nll in self.nll.items()
            if np.isfinite(nll[:, place]).any()
        }


def baselines(
    calibration: BaselineFrames, frames: BaselineFrames, grid: Grid | ActionSpace
) -> Baselines:
    """Fit the baselines on calibration frames and score the demonstrations of other frames.

    ``uniform`` is the density of the board, or of the box of all dimensions; it is not cut off
    there, so that an action beyond the border costs what one on the board does. ``agent`` needs an
    observed position, ``previous_action`` and ``linear`` the two actions before. ``linear`` is
    ``2 a_{t-1} - a_{t-2}`` for every chunk step: further along the line is worse from k = 8 on
    (human PushT: 11.4 against 11.0 nats at k = 8, 14.2 against 12.4 at k = 32).

    Raises:
        ValueError: If a baseline has no calibration frame at some chunk step, or the two sets of
            frames do not offer the same.
    """
    if calibration.queries != frames.queries:
        raise ValueError(
            f"calibration frames have chunk steps {calibration.queries}, frames {frames.queries}"
        )
    fitted = _centres(calibration, calibration)
    scored = _centres(calibration, frames)
    if fitted.keys() != scored.keys():
        raise ValueError(
            f"calibration frames offer the baselines {list(fitted)}, frames {list(scored)}: give "
            "both the same columns"
        )
    uniform = torch.full(frames.is_valid.shape, -grid.log_uniform, dtype=torch.float64)
    nll = {UNIFORM: uniform.masked_fill(~frames.is_valid.cpu(), math.nan).numpy()}
    scale = {}
    for name, centre in fitted.items():
        b = _fit(name, calibration, centre, smallest_scale(grid.size, centre.device))
        log_density = laplace_log_density(frames.expert.double(), scored[name], b)
        nll[name] = (-log_density).masked_fill(~frames.is_valid, math.nan).cpu().numpy()
        scale[name] = b.cpu().numpy()
    return Baselines(frames.queries, nll, scale)


def _centres(
    calibration: BaselineFrames, frames: BaselineFrames
) -> dict[str, Float[Tensor, "frame query action"]]:
    """Where each baseline expects the actions of some frames."""
    shape = frames.expert.shape
    known = torch.where(calibration.is_valid[..., None], calibration.expert.double(), math.nan)
    centres = {MARGINAL: known.nanquantile(0.5, dim=0)}
    if frames.agent is not None:
        centres[AGENT] = frames.agent[:, None]
    if frames.previous is not None:
        centres[PREVIOUS] = frames.previous[:, None, 1]
        centres[LINEAR] = (2 * frames.previous[:, 1] - frames.previous[:, 0])[:, None]
    return {name: centre.double().expand(shape) for name, centre in centres.items()}


def _fit(
    name: str,
    frames: BaselineFrames,
    centres: Float[Tensor, "frame query action"],
    min_scale: Float[Tensor, " action"],
) -> Float[Tensor, "query action"]:
    """Scale of maximum likelihood: the mean absolute distance."""
    usable = frames.is_valid & centres.isfinite().all(-1)
    counts = usable.sum(0)
    if not bool((counts > 0).all()):
        missing = [frames.queries[place] for place in (counts == 0).nonzero().flatten().tolist()]
        raise ValueError(
            f"no calibration frame to fit the baseline {name} on, at chunk steps {missing}"
        )
    residual = (frames.expert.double() - centres).abs()
    total = torch.where(usable[..., None], residual, 0.0).sum(0)
    return (total / counts[:, None]).clamp_min(min_scale)
