"""What a policy would do in another picture of the same instant: the causal yardstick for maps.

The simulator draws the instant again without an object, or with an object a little elsewhere.
Only pictures change: the state vector stays the recorded one, so that an effect is what the policy
*reads off the picture*. A policy that knows the agent's position from its state alone has an
agent effect of 0, however much the agent matters to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policies.interface import Observation, PolicyView


@dataclass(frozen=True)
class PoseMove:
    """Instants drawn again with one object moved to either side."""

    name: str
    """What was changed, e.g. ``agent_x``."""
    unit: str
    """Of ``step``: ``px`` or ``deg``."""
    owner: str
    """The object that was moved."""
    step: float
    """Size of the move to either side."""
    plus: Observation
    minus: Observation


@dataclass(frozen=True)
class SceneVariants:
    """The same instants in several pictures; states are the recorded ones in all of them."""

    as_is: Observation
    """Drawn again, unchanged."""
    without: Mapping[str, Observation]
    """Object name to the instants without it."""
    moves: tuple[PoseMove, ...]
    masks: Mapping[str, Bool[Tensor, "batch height width"]]
    """Object name to its pixels in the first camera, dilated."""


@dataclass(frozen=True)
class CounterfactualEffects:
    """How much a policy's action depends on what the pictures show."""

    effect_px: Mapping[str, Float[Tensor, " batch"]]
    """Object name to the change of the action when it is gone: L1 over action dimensions in data
    units, mean over queries."""
    shares: Float[Tensor, "batch object"]
    """Each object's effect over the sum of effects, in the order of ``effect_px``; equal shares
    where nothing has an effect."""
    sensitivity: Mapping[str, Float[Tensor, " batch"]]
    """Pose parameter to ``|a(+step) - a(-step)|_1 / (2 step)``, mean over queries: px per px, or px
    per degree. An object that moves under another one counts only as far as it is seen."""
    rerender_px: Float[Tensor, " batch"] | None
    """L1 between the actions on the recorded and on the redrawn pictures, mean over queries: well
    above 0, the simulator does not show what the policy was shown. None when nothing was recorded.
    """


@torch.no_grad()
def measure_counterfactuals(
    view: PolicyView,
    variants: SceneVariants,
    queries: Sequence[int] = (0,),
    batch_size: int = 64,
    recorded: Observation | None = None,
) -> CounterfactualEffects:
    """Ask a policy about every variant, one forward pass each.

    Args:
        view: In evaluation mode, on the device of the variants.
        variants: The instants, drawn again.
        queries: Chunk steps whose actions count.
        batch_size: Instants that go through the network together.
        recorded: The same instants as the policy was shown them.

    Raises:
        ValueError: If the policy sees a history, a query lies beyond its chunk, there are no
            pictures, or ``recorded`` are other instants.
    """
    if view.n_obs_steps > 1:
        raise ValueError(
            f"the policy sees {view.n_obs_steps} steps at once, and a variant shows one instant; "
            "give a policy with n_obs_steps = 1"
        )
    if not queries or not all(0 <= query < view.chunk_size for query in queries):
        raise ValueError(
            f"queries {list(queries)}: the policy predicts chunks of {view.chunk_size}; give steps "
            f"in 0..{view.chunk_size - 1}"
        )
    n_frames = _n_frames(variants.as_is)
    if not n_frames or not variants.without:
        raise ValueError(
            f"{n_frames} pictures and {len(variants.without)} objects to take out of them"
        )
    if recorded is not None and _n_frames(recorded) != n_frames:
        raise ValueError(
            f"recorded: {_n_frames(recorded)} instants, and {n_frames} were drawn again; give the "
            "observation that the variants were made from"
        )

    def actions(observation: Observation) -> Float[Tensor, "batch query action"]:
        parts = [
            view.predict_chunk(observation.rows(slice(start, start + batch_size)), queries)
            for start in range(0, n_frames, batch_size)
        ]
        return torch.cat(parts).double()

    as_is = actions(variants.as_is)
    effect_px = {
        name: _distance(actions(observation), as_is)
        for name, observation in variants.without.items()
    }
    return CounterfactualEffects(
        effect_px=effect_px,
        shares=_shares(torch.stack(list(effect_px.values()), dim=-1)),
        sensitivity={
            move.name: _distance(actions(move.plus), actions(move.minus)) / (2 * move.step)
            for move in variants.moves
        },
        rerender_px=None if recorded is None else _distance(actions(recorded), as_is),
    )


def _n_frames(observation: Observation) -> int:
    return len(next(iter(observation.images.values()))) if observation.images else 0


def _distance(
    one: Float[Tensor, "batch query action"], other: Float[Tensor, "batch query action"]
) -> Float[Tensor, " batch"]:
    return (one - other).abs().sum(-1).mean(-1)


def _shares(effects: Float[Tensor, "batch object"]) -> Float[Tensor, "batch object"]:
    total = effects.sum(-1, keepdim=True)
    equal = torch.full_like(effects, 1 / effects.shape[-1])
    # Compared with 0 alone: what is no number stays none.
    return torch.where(total == 0, equal, effects / total)
