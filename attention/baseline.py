"""The empty picture: what stands for "nothing" wherever a method takes something away."""

from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Num
from torch import Tensor

from policies.act import ACTPolicy
from policies.backbones import to_unit_range
from policies.interface import Observation, PolicyView

Baseline = Literal["mean", "black"]
"""Mean colour, or black."""

_LARGEST_STD = 0.5
"""Of values in 0..1: a channel scaled by more is scaled by its range, or not at all."""


def baseline_pictures(
    view: PolicyView, observation: Observation, baseline: Baseline
) -> dict[str, Num[Tensor, "batch *obs_step 3 height width"]]:
    """Pictures of one colour, to put in place of what is taken away.

    ``mean`` is the mean colour of the training split where the policy holds it: our ACT with
    ``image_normalisation`` mean_std. For every other policy, and for an ACT from a LeRobot folder
    whose pictures are scaled by ImageNet's moments, by their range or not at all, it is the mean
    colour of each frame itself, so that nothing depends on the frames beside it.

    Args:
        view: Its cameras are replaced.
        observation: Frames whose pictures are to be altered.
        baseline: Which colour.

    Returns:
        Camera name to pictures of the shape, type and device of the observation's.

    Raises:
        ValueError: If a camera of the policy is missing, or there is no such baseline.
    """
    if missing := set(view.data_schema.cameras) - set(observation.images):
        raise ValueError(
            f"camera {missing.pop()!r} is missing; the observation has {list(observation.images)}"
        )
    pictures = {}
    for camera in view.data_schema.cameras:
        images = observation.images[camera]
        colour = _colour(view, camera, images, baseline).to(images.device)
        if images.dtype == torch.uint8:
            colour = (colour * 255).round()
        history = " 1" * (images.ndim - 4)
        colour = rearrange(colour.to(images.dtype), f"batch rgb -> batch{history} rgb 1 1")
        pictures[camera] = colour.expand(images.shape).contiguous()
    return pictures


def _colour(
    view: PolicyView,
    camera: str,
    images: Num[Tensor, "batch *obs_step 3 height width"],
    baseline: Baseline,
) -> Float[Tensor, "#batch rgb"]:
    """In 0..1."""
    if baseline == "black":
        return torch.zeros(1, 3)
    if baseline != "mean":
        raise ValueError(f"baseline {baseline!r}: give mean or black")
    known = _training_mean(view, camera) if isinstance(view, ACTPolicy) else None
    if known is not None:
        return known[None]
    return reduce(to_unit_range(images), "batch ... rgb height width -> batch rgb", "mean")


def _training_mean(policy: ACTPolicy, camera: str) -> Float[Tensor, " rgb"] | None:
    """What the normaliser subtracts, if that is the data's mean.

    Judged by its values as well: policies that come from LeRobot's folders are scaled as those say.
    """
    feature = policy.normaliser.image(camera)
    imagenet = feature.offset.new_tensor(policy.IMAGENET_MEAN)
    is_imagenet = torch.allclose(feature.offset, imagenet, atol=1e-3)
    is_std = bool((feature.scale < _LARGEST_STD).all())
    return (
        feature.offset
        if policy.image_normalisation == "mean_std" and is_std and not is_imagenet
        else None
    )
