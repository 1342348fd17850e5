"""From what a method found, and what the cameras saw, to scenes that can be drawn."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, UInt8
from torch import Tensor

from attention.attribution import Attribution
from policies.backbones import to_unit_range
from policies.interface import Observation
from rendering.attention import AttentionScene, CameraMap, episode_range

TITLES = {
    "cross_attention": "cross-attention",
    "encoder_attention": "encoder attention",
    "rollout": "attention rollout",
    "relevancy": "relevancy (Chefer)",
    "grad_cam": "Grad-CAM",
    "integrated_gradients": "integrated gradients",
    "occlusion": "occlusion",
}
"""What pictures call the methods."""


def newest_pictures(
    images: Tensor,
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Turn pictures of a camera, as policies see them, into arrays; the newest of a history.

    Args:
        images: (batch, [obs_step,] 3, height, width), ``uint8`` or floats in 0..1.

    Raises:
        ValueError: If floats lie outside 0..1, as after a normalisation.
    """
    newest = images if images.ndim == 4 else images[:, -1]
    if newest.dtype != torch.uint8:
        unit = to_unit_range(newest.detach())
        low, high = float(unit.min()), float(unit.max())
        if low < -0.01 or high > 1.01:
            raise ValueError(
                f"pictures with values {low:.2f} to {high:.2f}: give them as they are before "
                "normalisation, as uint8 or in 0..1"
            )
        newest = (unit.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(
        rearrange(newest.cpu().numpy(), "batch rgb height width -> batch height width rgb")
    )


def attention_scenes(
    attribution: Attribution,
    observation: Observation,
    captions: Sequence[str] = (),
    masks: Mapping[str, Bool[Tensor, "batch height width"]] | None = None,
    title: str | None = None,
) -> Iterator[AttentionScene]:
    """Put maps on the pictures that they explain, frame by frame.

    Args:
        attribution: Of the frames.
        observation: What the policy saw there.
        captions: One line of ASCII for each frame.
        masks: Objects to outline, by name; they belong to the first camera.
        title: Of the method; :data:`TITLES` when None.

    Raises:
        ValueError: If pictures are not in 0..1.
    """
    found = attribution.cpu()
    pictures = {name: newest_pictures(observation.images[name]) for name in found.maps}
    maps = {name: values.numpy() for name, values in found.maps.items()}
    shares = {name: values.numpy() for name, values in found.shares().items()}
    outlines = {name: mask.cpu().numpy() for name, mask in (masks or {}).items()}
    first = next(iter(maps), None)
    for row in range(len(found)):
        cameras = {
            name: CameraMap(
                pictures[name][row],
                values[row],
                round(found.cells_px[name]),
                [mask[row] for mask in outlines.values()] if name == first else (),
            )
            for name, values in maps.items()
        }
        parts = {name: float(values[row]) for name, values in shares.items()}
        # Without vectors the shares say nothing but that all lies in the pictures.
        has_shares = bool(found.vectors)
        yield AttentionScene(
            title=title or TITLES.get(found.method, found.method),
            cameras=cameras,
            shares=parts if has_shares else {},
            caption=captions[row] if captions else "",
        )


def value_range_of(attribution: Attribution) -> tuple[float, float]:
    """Find the range of colours of an episode, over all cameras."""
    return episode_range([values.float().cpu().numpy() for values in attribution.maps.values()])
