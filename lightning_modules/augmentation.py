"""Random changes to training samples, on the device, reproducible from (seed, step)."""

from dataclasses import replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from policies.backbones import to_unit_range
from policies.interface import Batch, DataSchema, DataStatistics, Observation
from policies.mirror import AntiDiagonal, Mirror, XFlip

MirrorKind = Literal["x_flip", "anti_diagonal"]
"""A mirror by the name that hyper-parameters can hold."""
MIRRORS: dict[MirrorKind, type[Mirror]] = {"x_flip": XFlip, "anti_diagonal": AntiDiagonal}


class ImageAugmentation:
    """Shift, brighten and sharpen or flatten contrast, each sample by its own amount.

    Args:
        shift_px: Largest shift along each axis; the border is repeated into the gap.
        brightness: Largest relative change of brightness, e.g. 0.2 for a factor in 0.8..1.2.
        contrast: Largest relative change of contrast around the picture's mean.
    """

    def __init__(self, shift_px: int = 0, brightness: float = 0.0, contrast: float = 0.0):
        if shift_px < 0 or not 0 <= brightness < 1 or not 0 <= contrast < 1:
            raise ValueError(
                f"shift_px={shift_px} must be >= 0; brightness={brightness} and "
                f"contrast={contrast} must lie in [0, 1)"
            )
        self.shift_px = shift_px
        self.brightness = brightness
        self.contrast = contrast

    @property
    def is_active(self) -> bool:
        """Whether any change is asked for."""
        return bool(self.shift_px or self.brightness or self.contrast)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the batch with changed pictures; the generator is on the CPU."""
        images = {
            name: self._change(image, generator) for name, image in batch.observation.images.items()
        }
        return replace(batch, observation=replace(batch.observation, images=images))

    def _change(self, image: Tensor, generator: torch.Generator) -> Tensor:
        n_samples = len(image)
        if self.shift_px:
            reach = (-self.shift_px, self.shift_px + 1)
            shift = torch.randint(*reach, (n_samples, 2), generator=generator)
            image = shift_image(image, shift.to(image.device))
        if self.brightness or self.contrast:
            factors = 2 * torch.rand(n_samples, 2, generator=generator) - 1
            factors = factors.to(image.device).reshape(n_samples, 2, *[1] * (image.ndim - 1))
            image = to_unit_range(image)
            mean = image.mean(dim=(-3, -2, -1), keepdim=True)
            image = mean + (image - mean) * (1 + self.contrast * factors[:, 1])
            image = (image * (1 + self.brightness * factors[:, 0])).clamp(0, 1)
        return image


class MirrorAugmentation:
    """Mirror each sample with probability 1/2, all that is seen and all that is done together.

    Args:
        mirror: Of the task whose demonstrations these are.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return the batch with some samples mirrored; the generator is on the CPU.

        States of the simulator are left out: no policy reads them, and they are no longer true.
        """
        is_mirrored = torch.rand(len(batch), generator=generator) < 0.5
        is_mirrored = is_mirrored.to(batch.actions.device)
        seen, mirrored = batch.observation, self.mirror.observation(batch.observation)

        def mixed(there: Tensor, here: Tensor) -> Tensor:
            chosen = is_mirrored.reshape(-1, *[1] * (here.ndim - 1))
            return torch.where(chosen, there, here)

        def mixed_column(there: Tensor | None, here: Tensor | None) -> Tensor | None:
            return None if there is None or here is None else mixed(there, here)

        observation = Observation(
            images={name: mixed(mirrored.images[name], seen.images[name]) for name in seen.images},
            state=mixed_column(mirrored.state, seen.state),
            environment_state=mixed_column(mirrored.environment_state, seen.environment_state),
        )
        actions = mixed(self.mirror.vectors(batch.actions), batch.actions)
        return replace(batch, observation=observation, actions=actions, simulator_state=None)


def mirror_for_training(
    kind: MirrorKind,
    extent: float,
    schema: DataSchema,
    point_order: tuple[int, ...] | None = None,
) -> MirrorAugmentation:
    """Build the augmentation for a policy, after checking that its columns can be mirrored.

    Args:
        kind: Which mirror.
        extent: Width and height of the board, in the unit of the data.
        schema: What the policy reads and predicts.
        point_order: Of keypoints in the environment state, as for :class:`policies.mirror.Mirror`.

    Raises:
        ValueError: If a column cannot be points (x, y) of a board, pictures are not square, or
            keypoints have no order.
    """
    dims = {
        "state": schema.state_dim,
        "action": schema.action_dim,
        "environment_state": schema.environment_state_dim,
    }
    if odd := {name: dim for name, dim in dims.items() if dim % 2}:
        raise ValueError(
            f"mirror {kind}: {odd} dimensions are no points (x, y) of a board; a mirror is for "
            "tasks whose states and actions are: set mirror to null"
        )
    slanted = {name: size for name, size in schema.cameras.items() if size[0] != size[1]}
    if kind == "anti_diagonal" and slanted:
        raise ValueError(
            f"mirror anti_diagonal: pictures {slanted} (height, width) are not square; set "
            "image_size in the data, or mirror to x_flip"
        )
    if schema.environment_state_dim and point_order is None:
        raise ValueError(
            f"mirror {kind}: the policy reads an environment state of "
            f"{schema.environment_state_dim}, whose points may change places in a mirror; set "
            "mirror_point_order (PushT: [1, 0, 3, 2, 5, 4, 7, 6]; [] where they keep theirs)"
        )
    if point_order and 2 * len(point_order) != schema.environment_state_dim:
        raise ValueError(
            f"mirror_point_order names {len(point_order)} points, and the environment state has "
            f"{schema.environment_state_dim} numbers; name each point once"
        )
    return MirrorAugmentation(MIRRORS[kind](extent, point_order or ()))


def require_points(extent: float, statistics: DataStatistics) -> None:
    """Refuse to mirror numbers that are not points of the board.

    Args:
        extent: Width and height of the board.
        statistics: Of the training split.

    Raises:
        ValueError: If states or actions leave the board, states stay in the half of it next to 0,
            or actions in that quarter: joint angles, or another unit.
    """
    for name, column, least in (
        ("state", statistics.state, extent / 2),
        ("action", statistics.action, extent / 4),
    ):
        if column is None:
            continue
        low, high = float(column.q01.min()), float(column.q99.max())
        if low < 0 or not least <= high <= extent:
            raise ValueError(
                f"mirror: 98 % of the data's {name}s lie in {low:.4g}..{high:.4g}, which are no "
                f"points of a board of 0..{extent:g}; set mirror_extent to the board's width, or "
                "mirror to null"
            )


def shift_image(image: Tensor, shift: Int[Tensor, "batch 2"]) -> Tensor:
    """Move each picture by its (rows, columns), downwards and rightwards, repeating the border."""
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=image.device) - shift[:, :1]
    columns = torch.arange(width, device=image.device) - shift[:, 1:]
    rows = rows.clamp(0, height - 1)[:, :, None]
    columns = columns.clamp(0, width - 1)[:, None, :]
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    channels_last = rearrange(image, "batch ... channel row column -> batch row column ... channel")
    moved = channels_last[sample, rows, columns]
    return rearrange(moved, "batch row column ... channel -> batch ... channel row column")
