"""Short videos of a feature on what the camera saw, made when they are asked for, and kept."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from datamodules.base import DemonstrationDataModule
from envs.replay import recorded_pictures
from features.record import FeatureRecord
from policies.act import ACTPolicy
from policies.interface import PolicyView
from rendering.attention import fit_height, overlay
from rendering.colour import colour_table
from rendering.feature_scenes import ShownFeature, feature_rows
from rendering.features import COLORMAP
from rendering.video import write_video

HEIGHT_PX = 256
MAP_WEIGHT = 0.45
"""Of the map's colours in a picture, as in strips of features."""
MAX_FILES = 512
"""Videos that are kept; the oldest go."""


@dataclass(frozen=True)
class ClipRequest:
    """A stretch of an episode, as one feature sees it."""

    latent: int
    episode: int
    first: int
    """Step in the episode."""
    last: int
    """The last step, included."""
    camera: str
    has_map: bool
    """Whether the feature's activation in each cell is drawn over the picture."""

    @property
    def file_name(self) -> str:
        """Tells it from all other requests but for the camera, whose name may be anything."""
        kind = "map" if self.has_map else "plain"
        return f"{self.latent}_{self.episode}_{self.first}_{self.last}_{kind}.mp4"


class ClipStudio:
    """Makes videos and pictures of features on recorded frames.

    Args:
        record: What the features did in the frames of some episodes.
        data: Holds what the cameras saw there.
        view: The policy; its token stride is the size of a cell.
        fps: Of the videos.
        folder: Where videos are kept; made when missing.
    """

    def __init__(
        self,
        record: FeatureRecord,
        data: DemonstrationDataModule,
        view: PolicyView,
        fps: float,
        folder: Path,
    ) -> None:
        self.record = record
        self.data = data
        self.fps = fps
        self.folder = folder
        self.cameras = tuple(view.data_schema.cameras)
        self._cell_px = view.network.token_stride if isinstance(view, ACTPolicy) else None
        self._rows = {
            key: row
            for row, key in enumerate(
                zip(record.episode_index.tolist(), record.frame_index.tolist(), strict=True)
            )
        }
        self._table = colour_table(COLORMAP)
        self._means: dict[str, Float[np.ndarray, "height width 3"]] = {}
        self._lock = threading.Lock()

    def check_camera(self, camera: str | None) -> str:
        """The camera of that name; the first one when None.

        Raises:
            ValueError: If there is no such camera.
        """
        if camera is None and self.cameras:
            return self.cameras[0]
        if camera not in self.cameras:
            raise ValueError(f"camera {camera!r}: the policy sees {list(self.cameras)}")
        return camera

    def picture(self, episode: int, frame: int, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        """What a camera showed at one step."""
        batch = self.data.dataset([episode]).__getitems__([frame])
        return next(recorded_pictures(batch.observation, camera))

    def clip(self, asked: ClipRequest, top: float) -> Path:
        """The video of a stretch, made at the first time.

        Args:
            asked: What to show.
            top: Activation at the high end of the colours.
        """
        camera_folder = self.folder / str(self.cameras.index(asked.camera))
        path = camera_folder / asked.file_name
        with self._lock:
            if not path.is_file():
                camera_folder.mkdir(parents=True, exist_ok=True)
                self._forget(camera_folder)
                write_video(path, self._pictures(asked, top), self.fps)
        return path

    def mean_map(
        self,
        values: Float[np.ndarray, "row column"] | None,
        top: float,
        episodes: Sequence[int],
        camera: str,
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Values over the mean picture of a camera in some episodes; colours from 0 to ``top``."""
        if camera not in self._means:
            pictures = (each for number in episodes for each in self._recorded(number, camera))
            total = next(pictures).astype(np.float64)
            n_pictures = 1
            for picture in pictures:
                total += picture
                n_pictures += 1
            self._means[camera] = total / n_pictures
        mean = np.rint(self._means[camera]).astype(np.uint8)
        return self._drawn(mean, values, top)

    def _recorded(self, episode: int, camera: str) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        return recorded_pictures(self.data.episode(episode).observation, camera)

    def _pictures(
        self, asked: ClipRequest, top: float
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        rows = [self._rows[asked.episode, step] for step in range(asked.first, asked.last + 1)]
        seen = list(self._recorded(asked.episode, asked.camera))

        def picture_of(episode: int, step: int) -> UInt8[np.ndarray, "height width 3"]:
            return seen[step]

        shown = ShownFeature(asked.latent, "", rows)
        (row,) = feature_rows(self.record, [shown], picture_of, asked.camera, self._cell_px)
        for frame in row.frames:
            yield self._drawn(frame.picture, frame.values if asked.has_map else None, top)

    def _drawn(
        self,
        picture: UInt8[np.ndarray, "height width 3"],
        values: Float[np.ndarray, "row column"] | None,
        top: float,
    ) -> UInt8[np.ndarray, "_ _ 3"]:
        if values is None or top <= 0:
            return fit_height(picture, HEIGHT_PX)
        return overlay(
            picture,
            values,
            (0.0, top),
            self._table,
            MAP_WEIGHT,
            cell_px=self._cell_px,
            height_px=HEIGHT_PX,
        )

    def _forget(self, folder: Path) -> None:
        """Make room for one more."""
        files = sorted(folder.glob("*.mp4"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[: max(0, len(files) - MAX_FILES + 1)]:
            file.unlink()
