"""Between data units and the network's units: one affine map per feature, kept in the weights."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from policies.interface import DataStatistics, FeatureStatistics

NormalisationMode = Literal["mean_std", "min_max", "identity"]

STD_FLOOR = 1e-2
"""Smallest scale, in data units, for a dimension that (almost) never moves; as in ACT's own code.

Without it a constant dimension would turn sensor noise into huge inputs."""


class AffineFeature(nn.Module):
    """``normalised = (x - offset) / scale`` for one feature; a buffer pair, saved with the weights.

    mean_std: offset = mean, scale = std. min_max: the range maps to [-1, 1]. identity: no change.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("offset", torch.full((dim,), torch.nan))
        self.register_buffer("scale", torch.full((dim,), torch.nan))

    def fit(self, statistics: FeatureStatistics, mode: NormalisationMode) -> None:
        """Take offset and scale from the training split's statistics."""
        if mode == "mean_std":
            offset, scale = statistics.mean, statistics.std
        elif mode == "min_max":
            offset = (statistics.max + statistics.min) / 2
            scale = (statistics.max - statistics.min) / 2
        else:
            offset, scale = torch.zeros_like(self.offset), torch.ones_like(self.scale)
        self.set(offset, scale.clamp_min(STD_FLOOR))

    def set(self, offset: Float[Tensor, " dim"], scale: Float[Tensor, " dim"]) -> None:
        """Set the map directly, e.g. from a checkpoint's own statistics."""
        if offset.shape != self.offset.shape or scale.shape != self.scale.shape:
            raise ValueError(
                f"statistics have {tuple(offset.shape)} dimensions, "
                f"the policy expects {tuple(self.offset.shape)}"
            )
        self.offset.copy_(offset)
        self.scale.copy_(scale)

    @property
    def is_fitted(self) -> bool:
        """Whether offset and scale hold real values."""
        return bool(torch.isfinite(self.offset).all() and torch.isfinite(self.scale).all())

    def normalise(self, x: Float[Tensor, "*leading dim"]) -> Float[Tensor, "*leading dim"]:
        """Map data units to network units, feature dimension last."""
        return (x - self.offset) / self.scale

    def unnormalise(self, x: Float[Tensor, "*leading dim"]) -> Float[Tensor, "*leading dim"]:
        """Map network units back to data units, feature dimension last."""
        return x * self.scale + self.offset

    def normalise_image(
        self, image: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        """Map pictures in 0..1, channel dimension second."""
        return (image - self.offset[:, None, None]) / self.scale[:, None, None]


class Normaliser(nn.Module):
    """The affine maps of all features of one policy."""

    def __init__(
        self, cameras: list[str], state_dim: int, action_dim: int, environment_state_dim: int = 0
    ):
        super().__init__()
        self.images = nn.ModuleDict({camera_key(name): AffineFeature(3) for name in cameras})
        self.state = AffineFeature(state_dim) if state_dim else None
        self.environment_state = (
            AffineFeature(environment_state_dim) if environment_state_dim else None
        )
        self.action = AffineFeature(action_dim)

    def image(self, camera: str) -> AffineFeature:
        """The map of one camera's RGB channels."""
        feature = self.images[camera_key(camera)]
        assert isinstance(feature, AffineFeature)
        return feature

    def fit(
        self,
        statistics: DataStatistics,
        *,
        relative_actions: bool,
        image_mode: NormalisationMode = "mean_std",
        state_mode: NormalisationMode = "mean_std",
        action_mode: NormalisationMode = "mean_std",
    ) -> None:
        """Fit every map to the training split.

        Raises:
            ValueError: If a feature the policy needs has no statistics.
        """
        for name in self.images:
            feature = self.images[name]
            assert isinstance(feature, AffineFeature)
            by_key = {camera_key(camera): value for camera, value in statistics.images.items()}
            if name not in by_key:
                raise ValueError(f"no statistics for camera {name!r}; the data has {list(by_key)}")
            feature.fit(by_key[name], image_mode)
        if self.state is not None:
            if statistics.state is None:
                raise ValueError("the policy reads a state, but the data has no state statistics")
            self.state.fit(statistics.state, state_mode)
        if self.environment_state is not None:
            if statistics.environment_state is None:
                raise ValueError("the policy reads an environment state, but the data has none")
            self.environment_state.fit(statistics.environment_state, state_mode)
        action = statistics.relative_action if relative_actions else statistics.action
        if action is None:
            raise ValueError(
                "relative actions need a state with as many dimensions as the action: "
                "set relative_actions to false"
            )
        self.action.fit(action, action_mode)

    @property
    def is_fitted(self) -> bool:
        """Whether every map holds real values."""
        return all(m.is_fitted for m in self.modules() if isinstance(m, AffineFeature))


def camera_key(camera: str) -> str:
    """A camera's name as a module name, which may not hold a dot."""
    return camera.replace(".", "_")
