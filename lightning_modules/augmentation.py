"""Random changes to training pictures, on the device, reproducible from (seed, step)."""

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from policies.backbones import to_unit_range
from policies.interface import Batch


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
