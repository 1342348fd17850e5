"""The one contract between rooms: what a policy sees, what it answers, and how axes are called.

Axis names used in every signature of the project:

=============  ======================================================================
batch          independent samples
obs_step       steps of observation history, oldest first (absent when a policy sees one step)
chunk          steps of an action chunk; 0 is the action to execute now
action         action dimensions
state          proprioceptive dimensions (qpos)
height, width  image rows (downwards) and columns (rightwards), origin at the upper left
token          inputs of the transformer encoder
query          decoded chunk steps (a subset of chunk)
latent         dimensions of the CVAE latent z
=============  ======================================================================

Units: images are RGB, ``uint8`` in 0..255 or floating point in 0..1. States and actions outside a
network are always in the units of the data (PushT: px on the 512 x 512 board); normalised values
never leave ``policies/``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one instant, or over the last ``obs_step`` instants."""

    images: Mapping[str, Num[Tensor, "batch *obs_step 3 height width"]]
    """Camera name to RGB pictures, in token order; cameras may differ in size."""
    state: Float[Tensor, "batch *obs_step state"] | None = None
    """Proprioception (qpos)."""
    environment_state: Float[Tensor, "batch *obs_step environment"] | None = None
    """Privileged simulator features, only for policies that ask for them."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Observation":
        """Return a copy on ``device``; dtypes stay."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            images={
                name: image.to(device, non_blocking=non_blocking)
                for name, image in self.images.items()
            },
            state=move(self.state),
            environment_state=move(self.environment_state),
        )

    def rows(self, index: slice | Int[Tensor, " row"]) -> "Observation":
        """Some of the samples."""
        return replace(
            self,
            images={name: image[index] for name, image in self.images.items()},
            state=None if self.state is None else self.state[index],
            environment_state=(
                None if self.environment_state is None else self.environment_state[index]
            ),
        )


@dataclass(frozen=True)
class Batch:
    """Training samples: an observation, the demonstrated chunk, and where they come from."""

    observation: Observation
    actions: Float[Tensor, "batch chunk action"]
    """Demonstrated actions from the observed step on; past the end the last one repeats."""
    action_is_pad: Bool[Tensor, "batch chunk"]
    """True where ``actions`` repeats beyond the end of the episode."""
    episode_index: Int[Tensor, " batch"]
    """Number of the episode in the data set."""
    frame_index: Int[Tensor, " batch"]
    """Step within the episode."""
    simulator_state: Float[Tensor, "batch simulator"] | None = None
    """State that resets the simulator to the observed instant, where the data set has one."""

    def __len__(self) -> int:
        return len(self.actions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return a copy on ``device`` (Lightning moves batches through this method)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            observation=self.observation.to(device, non_blocking),
            actions=move(self.actions),
            action_is_pad=move(self.action_is_pad),
            episode_index=move(self.episode_index),
            frame_index=move(self.frame_index),
            simulator_state=None if self.simulator_state is None else move(self.simulator_state),
        )

    def rows(self, index: slice | Int[Tensor, " row"]) -> "Batch":
        """Some of the samples."""
        return replace(
            self,
            observation=self.observation.rows(index),
            actions=self.actions[index],
            action_is_pad=self.action_is_pad[index],
            episode_index=self.episode_index[index],
            frame_index=self.frame_index[index],
            simulator_state=None if self.simulator_state is None else self.simulator_state[index],
        )

    @classmethod
    def concatenate(cls, batches: "Sequence[Batch]") -> "Batch":
        """Join batches of one data set, in order."""
        first = batches[0]

        def join(tensors: "Sequence[Tensor | None]") -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(present) if present else None

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(tensors))

        return cls(
            observation=Observation(
                images={
                    name: joined([batch.observation.images[name] for batch in batches])
                    for name in first.observation.images
                },
                state=join([batch.observation.state for batch in batches]),
                environment_state=join([batch.observation.environment_state for batch in batches]),
            ),
            actions=joined([batch.actions for batch in batches]),
            action_is_pad=joined([batch.action_is_pad for batch in batches]),
            episode_index=joined([batch.episode_index for batch in batches]),
            frame_index=joined([batch.frame_index for batch in batches]),
            simulator_state=join([batch.simulator_state for batch in batches]),
        )


@dataclass(frozen=True)
class DataSchema:
    """What the columns of a data set are; saved in checkpoints and compared when one is loaded."""

    cameras: dict[str, tuple[int, int]]
    """Camera name to (height, width) in px, in token order."""
    state_dim: int
    """Dimensions of qpos; 0 when the data set has none."""
    action_dim: int
    """Dimensions of one action."""
    fps: float | None = None
    """Control frequency in Hz, when the data set states it."""
    environment_state_dim: int = 0
    """Dimensions of the privileged environment state offered to policies; 0 for none."""

    def to_dict(self) -> dict:
        """Plain values only, so that a checkpoint holding it loads with ``weights_only=True``."""
        return {
            "cameras": {name: list(size) for name, size in self.cameras.items()},
            "state_dim": self.state_dim,
            "action_dim": self.action_dim,
            "fps": self.fps,
            "environment_state_dim": self.environment_state_dim,
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> "DataSchema":
        """Inverse of :meth:`to_dict`."""
        cameras = {name: (int(h), int(w)) for name, (h, w) in values["cameras"].items()}
        return cls(**{**values, "cameras": cameras})

    def differences(self, other: "DataSchema") -> list[str]:
        """Name every field a policy depends on that differs, as ``field: mine != theirs``.

        An environment state that the data offers and this policy does not read is no difference.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        ignored = {"fps"} if self.environment_state_dim else {"fps", "environment_state_dim"}
        return [
            f"{key}: {mine[key]} != {theirs[key]}"
            for key in mine
            if key not in ignored and mine[key] != theirs[key]
        ]


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments and range of one feature over the training split, one value per dimension."""

    mean: Float[Tensor, " dim"]
    std: Float[Tensor, " dim"]
    min: Float[Tensor, " dim"]
    max: Float[Tensor, " dim"]
    q01: Float[Tensor, " dim"]
    """1 % quantile."""
    q99: Float[Tensor, " dim"]
    """99 % quantile."""


@dataclass(frozen=True)
class DataStatistics:
    """Statistics of the training split, in data units; image channels in 0..1."""

    images: Mapping[str, FeatureStatistics]
    """Per camera, over RGB channels (dim = 3)."""
    state: FeatureStatistics | None
    action: FeatureStatistics
    """Absolute actions, padding excluded."""
    relative_action: FeatureStatistics | None = None
    """Actions minus the state observed at the start of the chunk, over all unpadded chunk steps;
    None when state and action dimensions differ."""
    environment_state: FeatureStatistics | None = None


@runtime_checkable
class PolicyView(Protocol):
    """What rollouts and diagnostics may ask of any policy, ours or LeRobot's. Stateless."""

    @property
    def data_schema(self) -> DataSchema:
        """The data the policy was made for."""
        ...

    @property
    def chunk_size(self) -> int:
        """Steps in a predicted chunk."""
        ...

    @property
    def n_action_steps(self) -> int:
        """Steps of a chunk to execute before the next prediction, unless a caller says else."""
        ...

    @property
    def n_obs_steps(self) -> int:
        """Steps of observation history the policy sees; 1 means no ``obs_step`` axis."""
        ...

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        """Predict actions in data units, deterministically where the policy allows (ACT: z = 0).

        Args:
            observation: What the policy sees, on the policy's device.
            queries: Chunk steps to predict; all when None.
        """
        ...


@runtime_checkable
class SamplingPolicyView(PolicyView, Protocol):
    """A policy that can draw action chunks: what action landscapes are made of."""

    def sample_chunks(
        self,
        observation: Observation,
        n_samples: int,
        seed: int = 0,
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch sample query action"]:
        """Draw action chunks in data units.

        Sample j of every observation comes from the same random numbers, and equal seeds give equal
        samples, so that differences between observations and between checkpoints are theirs.

        Args:
            observation: What the policy sees, on the policy's device.
            n_samples: Chunks per observation.
            seed: Of the random numbers.
            queries: Chunk steps to return; all when None.
        """
        ...


class WrappedPolicy:
    """What a policy around another policy answers for it; a subclass says how it predicts.

    Args:
        view: The policy within.
    """

    def __init__(self, view: PolicyView) -> None:
        self.view = view

    @property
    def data_schema(self) -> DataSchema:
        """The data the policy was made for."""
        return self.view.data_schema

    @property
    def chunk_size(self) -> int:
        """Steps in a predicted chunk."""
        return self.view.chunk_size

    @property
    def n_action_steps(self) -> int:
        """Steps of a chunk to execute before the next prediction."""
        return self.view.n_action_steps

    @property
    def n_obs_steps(self) -> int:
        """Steps of observation history."""
        return self.view.n_obs_steps

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        """Predict actions in data units, as the policy within does.

        Args:
            observation: What the policy sees, on the policy's device.
            queries: Chunk steps to predict; all when None.
        """
        return self.view.predict_chunk(observation, queries)


@dataclass(frozen=True)
class Table:
    """Rows to sort and filter, e.g. one for each episode, whose cells JSON can say.

    Raises:
        ValueError: If rows differ from the columns in length, columns share a name, or a column
            mixes text, numbers and truth values.
    """

    columns: tuple[str, ...]
    """Names, with units where they could be mistaken."""
    rows: tuple[tuple[str | int | float | bool | None, ...], ...]
    """Cells in the order of ``columns``; None for what was not measured."""

    def __post_init__(self) -> None:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns {self.columns}: each needs a name of its own")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row}: has {len(row)} cells for columns {self.columns}")
        for name, cells in zip(self.columns, zip(*self.rows, strict=True), strict=False):
            kinds = {type(cell) for cell in cells} - {type(None)}
            # A bool is an int to isinstance, and a NumPy number is neither to JSON.
            if foreign := kinds - {str, int, float, bool}:
                raise ValueError(
                    f"column {name!r}: {foreign.pop().__name__} is no plain value; convert it with "
                    "float(), int(), bool() or str()"
                )
            if len(kinds) > 1 and kinds != {int, float}:
                raise ValueError(
                    f"column {name!r}: mixes {sorted(kind.__name__ for kind in kinds)}; "
                    "use one kind, and None for a gap"
                )


@dataclass(frozen=True)
class Findings:
    """What a diagnostic hands to the logging room: numbers, and files already on disk.

    A key belongs to one diagnostic and one kind, and stays the same at every checkpoint.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    """Metric name to value, e.g. ``rollout/mean_max_coverage``."""
    images: dict[str, str] = field(default_factory=dict)
    """Media name to PNG path."""
    videos: dict[str, str] = field(default_factory=dict)
    """Media name to mp4 path (H.264, yuv420p)."""
    tables: dict[str, Table] = field(default_factory=dict)
    """Table name to at most 10 000 rows."""
    histograms: dict[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Name to (edges, counts): rising edges, one more than the at most 512 counts."""
    arrays: dict[str, str] = field(default_factory=dict)
    """Artifact name to path of an npz or Parquet file: what numbers and pictures were made from."""


def in_unit(name: str, unit: str) -> str:
    """Put the unit of a policy's actions into the name of a number about them, ``..._px``."""
    stem = name.removesuffix("_px")
    return name if stem == name else f"{stem}_{unit}"
