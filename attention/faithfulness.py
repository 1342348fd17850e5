"""Is the picture true? Numbers that say whether to believe a map of relevance.

A map may look sensible and be wrong: it can follow edges, or the middle of the picture, whatever
the policy does. Here maps are held against what the policy does in altered pictures (deletion,
insertion, occlusion), against the objects of the simulator and the effects of taking them away, and
against the maps of a copy whose weights are shuffled.

Every result keeps its values per frame, and :meth:`Faithfulness.rows` picks frames, so that callers
can resample whole episodes.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from attention.attribution import Attribution
from attention.baseline import Baseline, baseline_pictures
from attention.counterfactuals import CounterfactualEffects
from attention.method import Target
from policies.interface import Observation, PolicyView

TIE = 1e-6
"""Values that differ by a smaller share of themselves are equal: rounding would else rank them."""
N_PATCHES_ALONG = 12
"""Patches along the shorter side of a picture: 8 px each of a 96 px picture."""


@dataclass(frozen=True)
class DeletionInsertion:
    """How fast the action changes when the relevant goes first, and comes back when it comes first.

    Petsiuk et al. 2018 (arXiv:1806.07421), for actions: the change is the L1 distance to the action
    on the original picture, summed over the target's dimensions, mean over its queries, in data
    units. Areas under curves (AUC) are means of the change over the altered fraction.
    """

    fractions: Float[Tensor, " fraction"]
    """Share of the patches that were altered, from 0 to 1."""
    deletion_px: Float[Tensor, "batch fraction"]
    """Change when the most relevant patches are gone."""
    insertion_px: Float[Tensor, "batch fraction"]
    """Change when only the most relevant patches are there."""
    random_px: Float[Tensor, "batch fraction"]
    """Change when patches are gone in random order, mean over orders; the same for all methods.
    Insertion in random order walks this curve backwards, so that both have the same AUC."""

    def rows(self, index: slice | Int[Tensor, " row"]) -> "DeletionInsertion":
        """Some of the frames."""
        return replace(
            self,
            deletion_px=self.deletion_px[index],
            insertion_px=self.insertion_px[index],
            random_px=self.random_px[index],
        )

    @property
    def deletion_auc_px(self) -> Float[Tensor, " batch"]:
        """Large for a true map."""
        return torch.trapezoid(self.deletion_px, self.fractions)

    @property
    def insertion_auc_px(self) -> Float[Tensor, " batch"]:
        """Small for a true map."""
        return torch.trapezoid(self.insertion_px, self.fractions)

    @property
    def random_auc_px(self) -> Float[Tensor, " batch"]:
        """What chance achieves, in deletion and in insertion."""
        return torch.trapezoid(self.random_px, self.fractions)

    @property
    def deletion_ratio(self) -> float:
        """Own over random AUC, each summed over frames; above 1 is better than chance.

        A ratio of sums: frames where the picture hardly matters hardly count. NaN where it matters
        in none.
        """
        return float(self.deletion_auc_px.sum() / self.random_auc_px.sum())

    @property
    def insertion_ratio(self) -> float:
        """Random over own AUC, each summed over frames; above 1 is better than chance."""
        return float(self.random_auc_px.sum() / self.insertion_auc_px.sum())


@dataclass(frozen=True)
class ObjectScores:
    """How well a map finds one object. NaN in frames that do not show it."""

    mass: Float[Tensor, " batch"]
    """Share of the camera's map that lies on the object's mask."""
    area_share: Float[Tensor, " batch"]
    """Share of the picture that the mask covers: mass of a map that prefers nothing, and chance
    level of the pointing game."""
    lift_ceiling: Float[Tensor, " batch"]
    """Largest lift of any map on the same cells: all mass on the cell that the mask covers most. On
    3 x 3 cells it is low, however well a map points."""
    pointing: Float[Tensor, " batch"]
    """Pointing game (Zhang et al. 2018): 1 where the centre of the most relevant cell lies in the
    mask, else 0; the share of hits where several cells are the most relevant ones."""

    @property
    def lift(self) -> Float[Tensor, " batch"]:
        """Mass over area share: 1 for a map that prefers nothing."""
        return self.mass / self.area_share

    def rows(self, index: slice | Int[Tensor, " row"]) -> "ObjectScores":
        """Some of the frames."""
        return ObjectScores(
            mass=self.mass[index],
            area_share=self.area_share[index],
            lift_ceiling=self.lift_ceiling[index],
            pointing=self.pointing[index],
        )


@dataclass(frozen=True)
class CounterfactualAgreement:
    """What a map says of each object, beside the effect of taking the object away."""

    map_shares: Float[Tensor, "batch object"]
    """Mass on each object over the mass on all; NaN where none lies on an object. A pixel of
    several masks counts for each in equal parts, so that nothing counts twice."""
    effect_shares: Float[Tensor, "batch object"]
    """Expected: :attr:`CounterfactualEffects.shares`."""

    @property
    def total_variation(self) -> Float[Tensor, " batch"]:
        """``sum_o |map_o - effect_o| / 2``: 0 where they agree, 1 where they share nothing."""
        return (self.map_shares - self.effect_shares).abs().sum(-1) / 2

    @property
    def spearman(self) -> float:
        """Rank correlation over all frames and objects pooled; NaN where one side is constant."""
        is_known = self.map_shares.isfinite().all(-1)
        shares = (
            rearrange(each[is_known], "batch object -> 1 (batch object)")
            for each in (self.map_shares, self.effect_shares)
        )
        return float(spearman(*shares))

    def rows(self, index: slice | Int[Tensor, " row"]) -> "CounterfactualAgreement":
        """Some of the frames."""
        return CounterfactualAgreement(self.map_shares[index], self.effect_shares[index])


@dataclass(frozen=True)
class Faithfulness:
    """All that was measured of one method on some frames; what was not is None or empty."""

    method: str
    """As ``--method`` calls it."""
    curves: DeletionInsertion | None = None
    spearman_occlusion: Float[Tensor, " batch"] | None = None
    """:func:`patch_agreement` with occlusion."""
    objects: Mapping[str, ObjectScores] = field(default_factory=dict)
    """Object name to scores. PushT's goal never moves, so that a policy may know it by heart: its
    scores are a report, no requirement."""
    counterfactual: CounterfactualAgreement | None = None
    ssim_randomised: Float[Tensor, " batch"] | None = None
    """:func:`map_ssim` with the map of a :func:`randomised` copy: near 1, the map does not depend
    on what the policy has learnt."""
    completeness_error: Float[Tensor, " batch"] | None = None
    """:attr:`Attribution.completeness_error`."""

    def rows(self, index: slice | Int[Tensor, " row"]) -> "Faithfulness":
        """Some of the frames, e.g. those of resampled episodes."""

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return replace(
            self,
            curves=None if self.curves is None else self.curves.rows(index),
            spearman_occlusion=pick(self.spearman_occlusion),
            objects={name: scores.rows(index) for name, scores in self.objects.items()},
            counterfactual=(
                None if self.counterfactual is None else self.counterfactual.rows(index)
            ),
            ssim_randomised=pick(self.ssim_randomised),
            completeness_error=pick(self.completeness_error),
        )

    def scalars(self) -> dict[str, float]:
        """One number for each metric; what was not measured, or has no value, gives no key.

        Means over the frames where a metric is defined; the ratios are ratios of sums, and
        ``spearman_counterfactual`` is pooled. ``spearman_occlusion_frames`` is the number of frames
        in the mean. ``area_<object>`` is the chance level of ``mass_<object>`` and
        ``pointing_<object>``.
        """
        found: dict[str, float] = {}
        if self.curves is not None:
            found["deletion_auc_px"] = float(self.curves.deletion_auc_px.mean())
            found["insertion_auc_px"] = float(self.curves.insertion_auc_px.mean())
            found["random_auc_px"] = float(self.curves.random_auc_px.mean())
            found["deletion_ratio"] = self.curves.deletion_ratio
            found["insertion_ratio"] = self.curves.insertion_ratio
        if self.spearman_occlusion is not None:
            found["spearman_occlusion"] = float(self.spearman_occlusion.nanmean())
            found["spearman_occlusion_frames"] = float(self.spearman_occlusion.isfinite().sum())
        for name, scores in self.objects.items():
            found[f"mass_{name}"] = float(scores.mass.nanmean())
            found[f"area_{name}"] = float(scores.area_share.nanmean())
            found[f"lift_{name}"] = float(scores.lift.nanmean())
            found[f"lift_{name}_ceiling"] = float(scores.lift_ceiling.nanmean())
            found[f"pointing_{name}"] = float(scores.pointing.nanmean())
        if self.counterfactual is not None:
            found["spearman_counterfactual"] = self.counterfactual.spearman
            found["tv_counterfactual"] = float(self.counterfactual.total_variation.nanmean())
        if self.ssim_randomised is not None:
            found["ssim_randomised"] = float(self.ssim_randomised.mean())
        if self.completeness_error is not None:
            found["completeness_error"] = float(self.completeness_error.mean())
        return {name: value for name, value in found.items() if abs(value) < float("inf")}


def patch_grid(
    image_sizes: Mapping[str, tuple[int, int]], n_along: int = N_PATCHES_ALONG
) -> dict[str, tuple[int, int]]:
    """Cut pictures into even patches, as square as their sides allow and no smaller than a pixel.

    Args:
        image_sizes: Camera name to (height, width) in px.
        n_along: Patches along the shorter side of each picture.

    Returns:
        Camera name to (rows, columns).

    Raises:
        ValueError: If ``n_along`` is not positive.
    """
    if n_along < 1:
        raise ValueError(f"n_along {n_along}: give at least one patch along the shorter side")
    grid = {}
    for name, size in image_sizes.items():
        patch_px = max(min(size) / n_along, 1.0)
        grid[name] = (round(size[0] / patch_px), round(size[1] / patch_px))
    return grid


@torch.no_grad()
def deletion_insertion(
    view: PolicyView,
    observation: Observation,
    attributions: Mapping[str, Attribution],
    target: Target,
    baseline: Baseline = "mean",
    n_steps: int = 20,
    n_random: int = 3,
    n_along: int = N_PATCHES_ALONG,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, DeletionInsertion]:
    """Take pictures away patch by patch, and give them back, in each method's order of relevance.

    Patches of all cameras stand in one order, the one with most mass first. Equally relevant ones
    stand in a random order, the first of the baseline's, so that a map that prefers nothing is as
    good as chance. Each method costs ``2 n_steps`` forward passes, chance ``n_random n_steps``.

    Args:
        view: In evaluation mode, on the device of the frames.
        observation: Frames; a patch is taken out of all their ``obs_step`` pictures.
        attributions: Name to relevance in these frames.
        target: Which part of the predicted chunk is watched; its aggregation plays no part.
        baseline: What a patch without content looks like.
        n_steps: Steps from the whole to the empty picture.
        n_random: Random orders whose mean is chance, drawn anew for each frame.
        n_along: Patches along the shorter side of each picture.
        seed: Of the random orders.
        batch_size: Frames that go through the network together.

    Raises:
        ValueError: If an attribution is of other frames or cameras, a number is not positive, or
            the target is not of the policy.
    """
    for name, number in (("n_steps", n_steps), ("n_random", n_random), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} {number}: give at least 1")
    target.check(view)
    empty = baseline_pictures(view, observation, baseline)
    image_sizes = {name: _size(images) for name, images in empty.items()}
    n_frames = len(next(iter(empty.values()), ()))
    if not n_frames:
        raise ValueError(f"{n_frames} frames, cameras {list(empty)}: there is nothing to alter")
    for name, attribution in attributions.items():
        _check_frames(name, attribution, image_sizes, n_frames)
    grid = patch_grid(image_sizes, n_along)
    alterations = _Alterations(view, observation, empty, grid, target, batch_size)

    n_patches = sum(rows * columns for rows, columns in grid.values())
    steps = sorted({round(step * n_patches / n_steps) for step in range(n_steps + 1)})
    device = next(iter(empty.values())).device
    drawn = torch.rand(
        n_frames, n_random, n_patches, generator=torch.Generator().manual_seed(seed)
    ).to(device)
    random_places = drawn.argsort(-1).unbind(1)
    unaltered = alterations.actions(torch.zeros_like(random_places[0], dtype=torch.bool))

    def change_px(is_removed: Bool[Tensor, "batch patch"]) -> Float[Tensor, " batch"]:
        return (alterations.actions(is_removed) - unaltered).abs().sum(-1).mean(-1)

    nothing = torch.zeros(n_frames, dtype=torch.float64, device=device)
    everything = change_px(torch.ones_like(random_places[0], dtype=torch.bool))

    def deleted(places: Int[Tensor, "batch patch"]) -> Float[Tensor, "batch fraction"]:
        between = [change_px(places < step) for step in steps[1:-1]]
        return torch.stack([nothing, *between, everything], dim=-1)

    def inserted(places: Int[Tensor, "batch patch"]) -> Float[Tensor, "batch fraction"]:
        between = [change_px(places >= step) for step in steps[1:-1]]
        return torch.stack([everything, *between, nothing], dim=-1)

    random_px = torch.stack([deleted(places) for places in random_places]).mean(0)
    found = {}
    for name, attribution in attributions.items():
        relevance = patch_densities(attribution, grid).to(device)
        places = _falling_places(relevance, random_places[0])
        found[name] = DeletionInsertion(
            fractions=torch.tensor(steps, dtype=torch.float64, device=device) / n_patches,
            deletion_px=deleted(places),
            insertion_px=inserted(places),
            random_px=random_px,
        )
    return found


def patch_densities(
    attribution: Attribution, grid: Mapping[str, tuple[int, int]]
) -> Float[Tensor, "batch patch"]:
    """Mass of every patch of all cameras, one camera after another, row-major.

    Args:
        attribution: On any cells.
        grid: Camera name to (rows, columns), as :func:`patch_grid` gives them.
    """
    densities = _in_double(attribution).densities(grid)
    return torch.cat(
        [rearrange(densities[name], "batch row column -> batch (row column)") for name in grid],
        dim=-1,
    )


def patch_agreement(
    attribution: Attribution, other: Attribution, n_along: int = N_PATCHES_ALONG
) -> Float[Tensor, " batch"]:
    """Rank correlation of two methods over the patches of all cameras, e.g. with occlusion.

    Args:
        attribution: On any cells.
        other: Of the same frames, on any cells.
        n_along: Patches along the shorter side of each picture.

    Returns:
        Spearman's rho of each frame; NaN where one of them prefers nothing.

    Raises:
        ValueError: If they are of other frames or cameras.
    """
    _check_frames(attribution.method, attribution, other.image_sizes, len(other))
    grid = patch_grid(attribution.image_sizes, n_along)
    one = patch_densities(attribution, grid)
    return spearman(one, patch_densities(other, grid).to(one.device))


def spearman(
    one: Float[Tensor, "batch value"], other: Float[Tensor, "batch value"]
) -> Float[Tensor, " batch"]:
    """Spearman's rank correlation of each row: Pearson's, of ranks; ties share their mean rank.

    Returns:
        -1 to 1; NaN where a row is constant.
    """
    ranks = [_mean_ranks(values) for values in (one, other)]
    x, y = (values - values.mean(-1, keepdim=True) for values in ranks)
    scale = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return ((x * y).sum(-1) / scale).clamp(-1, 1)


def object_scores(
    attribution: Attribution,
    masks: Mapping[str, Bool[Tensor, "batch height width"]],
    camera: str | None = None,
) -> dict[str, ObjectScores]:
    """Hold a map against the places of objects: how much of it lies on each, and where it points.

    Only the map of the one camera counts, whatever lies on others.

    Args:
        attribution: On any cells; where it finds nothing relevant it prefers nothing.
        masks: Object name to its pixels, dilated where being near is to count.
        camera: Whose pictures the masks are of; the first when None.

    Raises:
        ValueError: If there is no such camera, or masks have another shape than its pictures.
    """
    one = _one_camera(attribution, camera, masks)
    return {name: _object_scores(one, mask.to(_device(one))) for name, mask in masks.items()}


def counterfactual_agreement(
    attribution: Attribution,
    masks: Mapping[str, Bool[Tensor, "batch height width"]],
    effects: CounterfactualEffects,
    camera: str | None = None,
) -> CounterfactualAgreement:
    """Hold a map's mass on objects against what the policy does without them.

    Mass, not lift: an object that is twice as large may well draw twice the relevance.

    Args:
        attribution: On any cells, of the frames of the effects.
        masks: Object name to its pixels, at least of the objects of the effects.
        effects: Of the same policy and queries.
        camera: Whose pictures the masks are of; the first when None.

    Raises:
        ValueError: If an object has no mask, there is no such camera, or there are other frames.
    """
    objects = list(effects.effect_px)
    if missing := [name for name in objects if name not in masks]:
        raise ValueError(f"objects {missing}: have no mask; there are masks of {list(masks)}")
    one = _one_camera(attribution, camera, {name: masks[name] for name in objects})
    if len(effects.shares) != len(one):
        raise ValueError(
            f"effects in {len(effects.shares)} frames, maps of {len(one)}; give the same frames"
        )
    stacked = torch.stack([masks[name] for name in objects]).to(_device(one)).double()
    split = stacked / reduce(stacked, "object ... -> ...", "sum").clamp_min(1)
    mass = torch.stack([_mass(one, _coverage(one, mask)) for mask in split], dim=-1)
    return CounterfactualAgreement(
        # 0 / 0 is NaN, as it should be.
        map_shares=mass / mass.sum(-1, keepdim=True),
        effect_shares=effects.shares.to(mass),
    )


def randomised[Policy: nn.Module](policy: Policy, seed: int) -> Policy:
    """Return a copy that has learnt nothing: each parameter tensor's values are shuffled.

    The sanity check of Adebayo et al. 2018 (arXiv:1810.03292). Shuffling keeps the scale of every
    layer, so that activations stay in range; buffers, statistics of the data among them, stay. A
    method whose maps hardly change shows the picture, not the policy.

    Args:
        policy: Stays as it is.
        seed: Of the permutations.
    """
    copy = deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copy


def map_ssim(one: Attribution, other: Attribution) -> Float[Tensor, " batch"]:
    """Structural similarity of two methods' or policies' maps, as they are looked at.

    Maps are brought to the size of the picture bilinearly and scaled to 0..1, each by itself; SSIM
    of Wang et al. 2004 with a Gaussian window of 11 px. A flat map has no structure: it has
    similarity 1 to another flat one and 0 to any other.

    Args:
        one: On any cells.
        other: Of the same frames, on any cells.

    Returns:
        Mean over cameras, at most 1.

    Raises:
        ValueError: If they are of other frames or cameras.
    """
    _check_frames(one.method, one, other.image_sizes, len(other))
    similarities = []
    for name in one.maps:
        a, b = (_as_looked_at(each, name).float().to(_device(one)) for each in (one, other))
        structure = structural_similarity_index_measure(
            a[:, None], b[:, None], reduction="none", data_range=1.0
        )
        assert isinstance(structure, Tensor)
        flat_a, flat_b = (reduce(each, "batch ... -> batch", "max") == 0 for each in (a, b))
        # Torchmetrics drops the batch axis of a single picture.
        similarity = torch.where(flat_a | flat_b, 0, structure.reshape(len(one)))
        similarities.append(torch.where(flat_a & flat_b, 1, similarity))
    return torch.stack(similarities).mean(0)


@dataclass(frozen=True)
class _Alterations:
    """Frames to take patches out of."""

    view: PolicyView
    observation: Observation
    empty: Mapping[str, Tensor]
    """Camera name to pictures without content."""
    grid: Mapping[str, tuple[int, int]]
    target: Target
    batch_size: int

    def actions(
        self, is_removed: Bool[Tensor, "batch patch"]
    ) -> Float[Tensor, "batch query dimension"]:
        """What the policy does without some patches, data units.

        The same frames always go through the network together: the noise of some policies hangs on
        the whole batch.
        """
        parts = [
            self.view.predict_chunk(
                self._without(is_removed, slice(start, start + self.batch_size)),
                self.target.queries,
            )
            for start in range(0, len(is_removed), self.batch_size)
        ]
        actions = torch.cat(parts).double()
        chosen = self.target.dimensions
        return actions if chosen is None else actions[..., list(chosen)]

    def _without(self, is_removed: Bool[Tensor, "batch patch"], index: slice) -> Observation:
        observation = self.observation.rows(index)
        images = dict(observation.images)
        sizes = [rows * columns for rows, columns in self.grid.values()]
        per_camera = is_removed[index].split(sizes, dim=-1)
        for (name, (rows, columns)), patches in zip(self.grid.items(), per_camera, strict=True):
            image = images[name]
            height, width = _size(image)
            down = _cell_of_pixels(height, height / rows, rows).to(image.device)
            right = _cell_of_pixels(width, width / columns, columns).to(image.device)
            pixels = rearrange(patches, "batch (row column) -> batch row column", row=rows)
            pixels = pixels[:, down][:, :, right]
            # One axis for the colours, another one where there is a history.
            pixels = pixels[:, *[None] * (image.ndim - 3)]
            images[name] = torch.where(pixels, self.empty[name][index], image)
        return replace(observation, images=images)


def _falling_places(
    relevance: Float[Tensor, "batch patch"], tie_places: Int[Tensor, "batch patch"]
) -> Int[Tensor, "batch patch"]:
    """Place of every patch when the most relevant stands first; ties stand as in ``tie_places``."""
    levels = _levels(relevance)
    key = (levels.amax(-1, keepdim=True) - levels) * levels.shape[-1] + tie_places
    return key.argsort(-1).argsort(-1)


def _levels(values: Float[Tensor, "batch value"]) -> Int[Tensor, "batch value"]:
    """Rank from 0 upwards of every value among the different values of its row."""
    ordered, order = values.double().sort(-1)
    size = torch.maximum(ordered[:, 1:].abs(), ordered[:, :-1].abs())
    is_step = ordered.diff(dim=-1) > TIE * size
    levels = F.pad(is_step.long().cumsum(-1), (1, 0))
    return torch.zeros_like(order).scatter(-1, order, levels)


def _mean_ranks(values: Float[Tensor, "batch value"]) -> Float[Tensor, "batch value"]:
    """Rank from 0 upwards; equal values have the mean of the ranks that they take up."""
    levels = _levels(values)
    counts = torch.zeros_like(levels).scatter_add(-1, levels, torch.ones_like(levels))
    first = counts.cumsum(-1) - counts
    return (first + (counts - 1) / 2).double().gather(-1, levels)


def _one_camera(
    attribution: Attribution, camera: str | None, masks: Mapping[str, Tensor]
) -> Attribution:
    """The map of a camera, in double precision.

    Raises:
        ValueError: If there is no such camera, or masks have another shape than its pictures.
    """
    name = next(iter(attribution.maps), None) if camera is None else camera
    if name is None or name not in attribution.maps:
        raise ValueError(f"camera {name!r}: there are maps of {list(attribution.maps)}")
    shape = (len(attribution), *attribution.image_sizes[name])
    for object_name, mask in masks.items():
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"mask of {object_name}: shape {tuple(mask.shape)}, the pictures of camera "
                f"{name!r} have {shape}"
            )
    return _in_double(replace(attribution, maps={name: attribution.maps[name]}))


def _object_scores(
    one_camera: Attribution, mask: Bool[Tensor, "batch height width"]
) -> ObjectScores:
    area_share = reduce(mask.double(), "batch height width -> batch", "mean")
    coverage = _coverage(one_camera, mask.double())
    ceiling = reduce(coverage, "batch row column -> batch", "max") / area_share

    def where_shown(values: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return torch.where(area_share > 0, values, torch.nan)

    return ObjectScores(
        mass=where_shown(_mass(one_camera, coverage)),
        area_share=where_shown(area_share),
        lift_ceiling=where_shown(ceiling),
        pointing=where_shown(_pointing(one_camera, mask)),
    )


def _mass(
    one_camera: Attribution, coverage: Float[Tensor, "batch row column"]
) -> Float[Tensor, " batch"]:
    (mass,) = one_camera.picture_mass().values()
    return einsum(mass, coverage, "batch row column, batch row column -> batch")


def _coverage(
    one_camera: Attribution, mask: Float[Tensor, "batch height width"]
) -> Float[Tensor, "batch row column"]:
    """Share of each cell, as far as it lies in the picture, that a mask covers.

    A pixel lies where its centre does.
    """
    ((name, values),) = one_camera.maps.items()
    down, right = (
        F.one_hot(_cell_of_pixels(n_px, one_camera.cells_px[name], n_cells), n_cells).to(mask)
        for n_px, n_cells in zip(mask.shape[1:], values.shape[1:], strict=True)
    )
    covered = einsum(
        down, mask, right, "height row, batch height width, width column -> batch row column"
    )
    n_px = einsum(down, right, "height row, width column -> row column")
    return covered / n_px.clamp_min(1)


def _pointing(
    one_camera: Attribution, mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Share of the most relevant cells whose centre lies in the mask."""
    ((name, values),) = one_camera.maps.items()
    down, right = (
        _centre_pixels(n_cells, one_camera.cells_px[name], n_px).to(mask.device)
        for n_cells, n_px in zip(values.shape[1:], mask.shape[1:], strict=True)
    )
    is_top = values >= reduce(values, "batch row column -> batch 1 1", "max") * (1 - TIE)
    is_hit = mask[:, down][:, :, right] & is_top
    hits, tops = (
        reduce(each.double(), "batch row column -> batch", "sum") for each in (is_hit, is_top)
    )
    return hits / tops


def _as_looked_at(attribution: Attribution, camera: str) -> Float[Tensor, "batch height width"]:
    """A map in the size of the picture, from 0 to 1; all 0 where it is flat."""
    values = attribution.maps[camera].double()
    height, width = attribution.image_sizes[camera]
    # The last cells overhang the picture, and so does what is interpolated.
    size = [max(round(n * attribution.cells_px[camera]), 1) for n in values.shape[1:]]
    large = F.interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)
    large = large[:, 0, :height, :width]
    low, high = (reduce(large, "batch height width -> batch 1 1", each) for each in ("min", "max"))
    is_flat = high - low <= TIE * high
    return torch.where(is_flat, 0.0, (large - low) / torch.where(is_flat, 1.0, high - low))


def _cell_of_pixels(n_px: int, cell_px: float, n_cells: int) -> Int[Tensor, " pixel"]:
    """Along one side, the cell that the centre of each pixel lies in."""
    centres = torch.arange(n_px, dtype=torch.float64) + 0.5
    return (centres / cell_px).long().clamp(max=n_cells - 1)


def _centre_pixels(n_cells: int, cell_px: float, n_px: int) -> Int[Tensor, " cell"]:
    """Along one side, the pixel at the centre of what lies in the picture of each cell."""
    edges = (torch.arange(n_cells + 1, dtype=torch.float64) * cell_px).clamp(max=n_px)
    return ((edges[1:] + edges[:-1]) / 2).long().clamp(max=n_px - 1)


def _in_double(attribution: Attribution) -> Attribution:
    """So that equal relevances have equal masses."""
    return replace(
        attribution, maps={name: values.double() for name, values in attribution.maps.items()}
    )


def _check_frames(
    name: str, attribution: Attribution, image_sizes: Mapping[str, tuple[int, int]], n_frames: int
) -> None:
    """Refuse what was made of other frames or pictures.

    Raises:
        ValueError: Naming both.
    """
    if len(attribution) != n_frames or dict(attribution.image_sizes) != dict(image_sizes):
        raise ValueError(
            f"{name}: {len(attribution)} frames of {dict(attribution.image_sizes)} px, the others "
            f"are {n_frames} of {dict(image_sizes)} px; give maps of the same frames"
        )


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _device(attribution: Attribution) -> torch.device:
    return next(iter(attribution.maps.values())).device
