"""Occlusion: what an action does when a part of the picture is covered. Causal, for any policy."""

from collections.abc import Callable, Iterator

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from attention.attribution import Attribution
from attention.baseline import Baseline, baseline_pictures
from attention.method import Method, Target, explained_actions
from policies.act import ACTPolicy
from policies.interface import Observation, PolicyView
from policies.lerobot_view import LeRobotPolicyView
from policies.tokens import ENVIRONMENT_STATE, STATE

N_PATCHES_ALONG = 12
"""Patches along the shorter side of a picture, unless their size is given."""
PASS_PIXELS = 2**20
"""Pixels that go through the network together, about: 110 pictures of 96 px."""


class Occlusion(Method):
    """The change of the action when a patch is replaced by one colour (Zeiler & Fergus 2014).

    Relevance of a patch: L1 distance between the actions on the covered and on the original
    picture, summed over the target's dimensions, mean over its queries, in data units. States are
    replaced by their mean, or the middle of their range, where the policy holds it (our ACT), whole
    and dimension by dimension; what relative actions are added to stays the observed state.

    Own code: captum's Occlusion explains one number, expands every camera for each patch, and
    spreads patches that overhang the picture.

    Args:
        patch_px: Side of a patch; about 12 along the shorter side of each picture when None.
        baseline: What covers: the mean colour (:func:`attention.baseline.baseline_pictures`), or
            black.

    Raises:
        ValueError: If ``patch_px`` is not positive.
    """

    name = "occlusion"

    def __init__(self, patch_px: int | None = None, baseline: Baseline = "mean"):
        if patch_px is not None and patch_px < 1:
            raise ValueError(f"patch_px {patch_px}: give at least 1")
        self.patch_px = patch_px
        self.baseline: Baseline = baseline

    def check(self, view: PolicyView) -> None:
        """Any policy with a camera."""
        if not view.data_schema.cameras:
            raise ValueError(f"method {self.name}: the policy has no camera to cover")

    @torch.no_grad()
    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """One forward pass for every patch and state dimension."""
        self.check(view)
        target.check(view)
        original = _actions(view, observation, target)
        covers = baseline_pictures(view, observation, self.baseline)
        draws_by_batch = _draws_by_batch(view)

        def change(altered: Observation, row: int) -> Float[Tensor, " variant"]:
            before = original[row]
            if draws_by_batch:
                n_variants = len(next(iter(altered.images.values())))
                before = _actions(view, _repeated(observation, row, n_variants), target)
            actions = _actions(view, altered, target) - before
            chosen = actions if target.dimensions is None else actions[..., list(target.dimensions)]
            return chosen.abs().sum(-1).mean(-1)

        maps, cells = {}, {}
        for camera in view.data_schema.cameras:
            height, width = observation.images[camera].shape[-2:]
            side = self.patch_px or max(1, round(min(height, width) / N_PATCHES_ALONG))
            n_rows, n_columns = -(-height // side), -(-width // side)
            corners = [
                (row * side, column * side) for row in range(n_rows) for column in range(n_columns)
            ]
            found = []
            for row, places in _passes(observation, len(corners)):
                altered = _repeated(observation, row, len(places))
                pictures = altered.images[camera].clone()
                for variant, place in enumerate(places):
                    top, left = corners[place]
                    window = (..., slice(top, top + side), slice(left, left + side))
                    pictures[variant][window] = covers[camera][row][window]
                altered = Observation(
                    {**altered.images, camera: pictures}, altered.state, altered.environment_state
                )
                found.append(change(altered, row))
            maps[camera] = rearrange(
                torch.cat(found),
                "(batch row column) -> batch row column",
                row=n_rows,
                column=n_columns,
            )
            cells[camera] = float(side)
        vectors, dimensions = {}, {}
        for name, mean in _state_means(view).items():
            whole, single = self._without_state(observation, name, mean, change)
            vectors[name], dimensions[name] = whole, single
        return Attribution(
            method=self.name,
            queries=target.queries,
            maps=maps,
            cells_px=cells,
            image_sizes={
                name: (images.shape[-2], images.shape[-1])
                for name, images in observation.images.items()
                if name in maps
            },
            vectors=vectors,
            dimensions=dimensions,
        )

    def _without_state(
        self,
        observation: Observation,
        name: str,
        mean: Float[Tensor, " dimension"],
        change: Callable[[Observation, int], Tensor],
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch dimension"]]:
        """Effect of putting the mean in the place of a state, whole and by dimensions."""
        given = observation.state if name == STATE else observation.environment_state
        assert given is not None
        n_frames, n_dimensions = given.shape
        # All at once, then each dimension alone.
        is_replaced = torch.cat(
            [
                torch.ones(1, n_dimensions, dtype=torch.bool),
                torch.eye(n_dimensions, dtype=torch.bool),
            ]
        ).to(given.device)
        effects = []
        for row, places in _passes(observation, len(is_replaced)):
            altered = _repeated(observation, row, len(places))
            values = torch.where(is_replaced[places], mean.to(given), given[row])
            state = values if name == STATE else altered.state
            environment_state = values if name != STATE else altered.environment_state
            effects.append(change(Observation(altered.images, state, environment_state), row))
        found = rearrange(torch.cat(effects), "(batch variant) -> batch variant", batch=n_frames)
        return found[:, 0], found[:, 1:]


def _actions(
    view: PolicyView, observation: Observation, target: Target
) -> Float[Tensor, "batch query action"]:
    """What the policy itself decides."""
    if isinstance(view, ACTPolicy):
        return explained_actions(view, observation, target.queries)
    return view.predict_chunk(observation, target.queries)


def _draws_by_batch(view: PolicyView) -> bool:
    """Whether a row's random numbers depend on its place in the batch.

    Diffusion draws them row by row, from the state, which pictures do not change.
    """
    return isinstance(view, LeRobotPolicyView) and view.policy.config.type not in (
        "act",
        "diffusion",
    )


def _passes(observation: Observation, n_variants: int) -> Iterator[tuple[int, list[int]]]:
    """Frame after frame, as many of its variants as go through the network together."""
    first = next(iter(observation.images.values()))
    pixels = sum(images[0].numel() // 3 for images in observation.images.values())
    together = max(1, PASS_PIXELS // pixels)
    for row in range(len(first)):
        for start in range(0, n_variants, together):
            yield row, list(range(start, min(start + together, n_variants)))


def _repeated(observation: Observation, row: int, times: int) -> Observation:
    """One frame, several times."""

    def each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else repeat(tensor[row], "... -> variant ...", variant=times)

    return Observation(
        {
            name: repeat(images[row], "... -> variant ...", variant=times)
            for name, images in observation.images.items()
        },
        each(observation.state),
        each(observation.environment_state),
    )


def _state_means(view: PolicyView) -> dict[str, Float[Tensor, " dim"]]:
    """Means of the states that the policy reads, where it holds them."""
    if not isinstance(view, ACTPolicy):
        return {}
    found = {STATE: view.normaliser.state, ENVIRONMENT_STATE: view.normaliser.environment_state}
    return {
        name: feature.offset
        for name, feature in found.items()
        # A state that goes unscaled into the network says nothing of its mean.
        if feature is not None and bool((feature.offset != 0).any())
    }
