"""What is known of frames beside the policy: the ground truth that features are held against."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from features.episodes import number_episodes, starts


@dataclass(frozen=True)
class Concepts:
    """One value of each concept in each frame.

    Raises:
        ValueError: If the parts differ in length, a name comes twice, a binary concept has a value
            other than 0, 1 and NaN, or a value is infinite.
    """

    names: tuple[str, ...]
    """With units where they could be mistaken."""
    values: Float[Tensor, "frame concept"]
    """In the unit of each concept; NaN where it is not known, which leaves that frame out."""
    is_binary: tuple[bool, ...]
    """Whether a concept holds or not (1 or 0)."""
    units: tuple[str, ...]
    """E.g. ``px``; ``1`` for plain numbers."""

    def __post_init__(self) -> None:
        n = len(self.names)
        if len({*self.names}) < n:
            raise ValueError(f"concepts {self.names}: each needs a name of its own")
        if not self.values.shape[1] == len(self.is_binary) == len(self.units) == n:
            raise ValueError(
                f"{n} names for {self.values.shape[1]} columns, {len(self.is_binary)} kinds and "
                f"{len(self.units)} units; give one of each"
            )
        for name, column, is_binary in zip(
            self.names, self.values.unbind(1), self.is_binary, strict=True
        ):
            if column.isinf().any():
                raise ValueError(f"concept {name!r}: is infinite somewhere; give NaN where unknown")
            known = column[~column.isnan()]
            if is_binary and not ((known == 0) | (known == 1)).all():
                raise ValueError(
                    f"concept {name!r}: is binary, yet has values from {float(known.min())} to "
                    f"{float(known.max())}; give 0, 1 or NaN"
                )

    @property
    def places(self) -> dict[str, tuple[str, str]]:
        """Objects whose place on the board is known: names of their x and y concepts, in px."""
        objects = [name.removesuffix("_x_px") for name in self.names if name.endswith("_x_px")]
        pairs = {name: (f"{name}_x_px", f"{name}_y_px") for name in objects}
        return {name: pair for name, pair in pairs.items() if pair[1] in self.names}

    @classmethod
    def from_columns(
        cls,
        continuous: Mapping[str, tuple[Float[Tensor, " frame"], str]],
        binary: Mapping[str, Bool[Tensor, " frame"] | Float[Tensor, " frame"]],
    ) -> "Concepts":
        """Put columns side by side, in single precision.

        Args:
            continuous: Name to values and their unit.
            binary: Name to truth values, or to 1, 0 and NaN.
        """
        columns = [*(values for values, _ in continuous.values()), *binary.values()]
        return cls(
            names=(*continuous, *binary),
            values=torch.stack([column.float() for column in columns], dim=-1),
            is_binary=(False,) * len(continuous) + (True,) * len(binary),
            units=(*(unit for _, unit in continuous.values()), *["1"] * len(binary)),
        )

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> Float[Tensor, " frame"]:
        """Values of one concept.

        Raises:
            ValueError: If there is no such concept.
        """
        return self.values[:, self._place(name)]

    def rows(self, index: slice | Bool[Tensor, " frame"] | Int[Tensor, " row"]) -> "Concepts":
        """Some of the frames."""
        return replace(self, values=self.values[index])

    def of_kind(self, is_binary: bool) -> "Concepts":
        """Only the binary or only the continuous concepts."""
        return self.of(
            *(
                name
                for name, kind in zip(self.names, self.is_binary, strict=True)
                if kind == is_binary
            )
        )

    def of(self, *names: str) -> "Concepts":
        """Only some concepts, in the order given.

        Raises:
            ValueError: If there is no such concept.
        """
        kept = [self._place(name) for name in names]
        return Concepts(
            names=names,
            values=self.values[:, kept],
            is_binary=tuple(self.is_binary[place] for place in kept),
            units=tuple(self.units[place] for place in kept),
        )

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"concept {name!r}: there are {', '.join(self.names)}")
        return self.names.index(name)


def time_in_episode(
    episode_index: Int[Tensor, " frame"], frame_index: Int[Tensor, " frame"]
) -> Float[Tensor, " frame"]:
    """Share of the episode that is over: 0 at step 0, 1 at the last step that is there.

    Raises:
        ValueError: If frames are not in the order of time, episode by episode.
    """
    places = number_episodes(episode_index, frame_index)
    # In the order of time, the last step is the largest.
    last = torch.zeros(int(places[-1]) + 1 if len(places) else 0, dtype=frame_index.dtype)
    last = last.scatter_reduce(0, places.cpu(), frame_index.cpu(), "amax").to(frame_index.device)
    return frame_index / last[places].clamp_min(1)


def seconds_since_last_frame(
    episode_index: Int[Tensor, " frame"], frame_index: Int[Tensor, " frame"], fps: float
) -> Float[Tensor, " frame"]:
    """Time between each frame and the one before it; NaN in the first of an episode.

    Args:
        episode_index: Number of each frame's episode.
        frame_index: Its step there.
        fps: Steps in a second.

    Raises:
        ValueError: If frames are not in the order of time, episode by episode.
    """
    number_episodes(episode_index, frame_index)
    passed = torch.full(frame_index.shape, torch.nan, dtype=torch.float64)
    passed[1:] = frame_index.diff().double().cpu() / fps
    passed[starts(episode_index).cpu()] = torch.nan
    return passed.to(frame_index.device)


def onsets(
    holds: Bool[Tensor, " frame"], episode_index: Int[Tensor, " frame"]
) -> Float[Tensor, " frame"]:
    """Mark where something begins: 1 where it holds and did not in the frame before, else 0.

    Args:
        holds: Whether it holds, in the order of time.
        episode_index: Number of each frame's episode.

    Returns:
        NaN in the first frame of an episode, where nobody knows what was before.
    """
    begins = torch.zeros_like(holds, dtype=torch.float32)
    begins[1:] = (holds[1:] & ~holds[:-1]).float()
    begins[starts(episode_index)] = torch.nan
    return begins
