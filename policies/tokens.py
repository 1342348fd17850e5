"""Which token of ACT's encoder is what: the latent, the states, the cells of each camera."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from policies.act import ACT
from policies.backbones import grid_size
from policies.lerobot_format import camera_name

if TYPE_CHECKING:
    from lerobot.policies.act import modeling_act

LATENT, STATE, ENVIRONMENT_STATE = "latent", "state", "environment_state"
LEROBOT_TOKEN_STRIDE = 32
"""Image px per token: LeRobot's ACT takes the output of a ResNet's layer 4, without dilation."""


@dataclass(frozen=True)
class TokenLayout:
    """Order and meaning of the tokens: [latent, (state), (environment state), camera 1, ...].

    The cells of a camera are row-major; cameras may differ in size.

    Raises:
        ValueError: If a camera is called as a vector token is.
    """

    vectors: tuple[str, ...]
    """Tokens that are no pictures: ``latent``, then ``state`` and ``environment_state`` if any."""
    image_sizes: Mapping[str, tuple[int, int]]
    """Camera name to (height, width) in px, in token order."""
    token_stride: int
    """Image px per cell; the last row and column overhang a size that is no multiple of it."""

    def __post_init__(self) -> None:
        if both := set(self.vectors) & set(self.image_sizes):
            raise ValueError(f"camera {both.pop()!r}: has the name of a token; rename the camera")

    @classmethod
    def of(
        cls,
        network: "ACT | modeling_act.ACT | nn.Module",
        image_sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> "TokenLayout":
        """Read the layout off a network: our ACT, or LeRobot's ``ACTPolicy.model``.

        Args:
            network: Whose tokens.
            image_sizes: Camera name to (height, width) in px of the observed pictures; those of the
                network's own configuration when None. LeRobot's ACT takes any size.

        Raises:
            TypeError: If the network is neither.
            ValueError: If a camera is missing or unknown, or has a size that our ACT does not take.
        """
        if isinstance(network, ACT):
            configured = dict(network.cameras)
            present = (
                (LATENT, True),
                (STATE, network.state_projection is not None),
                (ENVIRONMENT_STATE, network.environment_state_projection is not None),
            )
            stride = network.token_stride
        elif _is_lerobot_act(network):
            config = cast("modeling_act.ACT", network).config
            configured = {
                camera_name(key): (int(feature.shape[1]), int(feature.shape[2]))
                for key, feature in config.image_features.items()
            }
            present = (
                (LATENT, True),
                (STATE, bool(config.robot_state_feature)),
                (ENVIRONMENT_STATE, bool(config.env_state_feature)),
            )
            stride = LEROBOT_TOKEN_STRIDE
        else:
            raise TypeError(
                f"{type(network).__name__}: attention maps need an ACT network, ours or LeRobot's "
                "(ACTPolicy.network, ACTPolicy.model)"
            )
        vectors = tuple(name for name, is_there in present if is_there)
        if image_sizes is None:
            return cls(vectors, configured, stride)
        if set(image_sizes) != set(configured):
            raise ValueError(
                f"the observation has cameras {list(image_sizes)}, the policy looks through "
                f"{list(configured)}: give exactly these"
            )
        observed = {name: image_sizes[name] for name in configured}
        if isinstance(network, ACT) and observed != configured:
            raise ValueError(
                f"pictures of {observed} px, the policy was made for {configured}: resize them"
            )
        return cls(vectors, observed, stride)

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Camera name to (rows, columns) of its cells."""
        return {
            name: grid_size(*size, self.token_stride) for name, size in self.image_sizes.items()
        }

    @property
    def n_tokens(self) -> int:
        """Length of the encoder's sequence."""
        return len(self.vectors) + sum(rows * columns for rows, columns in self.grids.values())

    def index(self, name: str, cell: tuple[int, int] | None = None) -> int:
        """Place of a token in the sequence.

        Args:
            name: A vector token, or a camera.
            cell: (row, column) in the camera; none for a vector token.

        Raises:
            ValueError: If there is no such token.
        """
        if name in self.vectors and cell is None:
            return self.vectors.index(name)
        start = len(self.vectors)
        for camera, (rows, columns) in self.grids.items():
            if camera == name and cell is not None:
                row, column = cell
                if 0 <= row < rows and 0 <= column < columns:
                    return start + row * columns + column
            start += rows * columns
        raise ValueError(
            f"no token {name!r}, cell {cell}: there are {list(self.vectors)} and cells of "
            f"{self.grids}"
        )

    def split(
        self, values: Float[Tensor, "*leading token"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Separate what belongs to single tokens from what belongs to the cells of each camera.

        Returns:
            Vector token to values (``*leading``), and camera to values
            (``*leading row column``).

        Raises:
            ValueError: If there are more or fewer values than tokens.
        """
        self.check(values.shape[-1])
        vectors = {name: values[..., place] for place, name in enumerate(self.vectors)}
        cameras = {}
        start = len(self.vectors)
        for name, (rows, columns) in self.grids.items():
            cameras[name] = rearrange(
                values[..., start : start + rows * columns],
                "... (row column) -> ... row column",
                row=rows,
            )
            start += rows * columns
        return vectors, cameras

    def check(self, n_tokens: int) -> None:
        """Refuse a sequence of another length.

        Raises:
            ValueError: Naming both lengths.
        """
        if n_tokens != self.n_tokens:
            raise ValueError(
                f"the network attends to {n_tokens} tokens, the layout has {self.n_tokens}: "
                f"{list(self.vectors)} and {self.grids} cells of {self.token_stride} px; give the "
                "sizes of the pictures that the network saw"
            )


def _is_lerobot_act(network: nn.Module) -> bool:
    """Tell LeRobot's network by its class, without importing LeRobot."""
    return any(
        kind.__name__ == "ACT" and kind.__module__.startswith("lerobot.")
        for kind in type(network).__mro__
    )
