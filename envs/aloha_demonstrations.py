"""Demonstrations of ALOHA's transfer cube by the scripted expert, in the layout of the ACT paper.

Layout (``aloha``): a folder of ``episode_{i}.hdf5``, each with attributes ``sim``, ``fps``,
``seed``, ``source`` and ``settings``:

============================  =======  =============  =============================================
observations/qpos             float32  (T, 14)        per arm six joints in rad, gripper 0..1
observations/qvel             float32  (T, 14)        their velocities, per second
observations/images/{camera}  uint8    (T, H, W, 3)   RGB
observations/simulator_state  float64  (T, 67)        what resets the simulator; others ignore it
action                        float32  (T, 14)        targets of the joints, as qpos
rewards                       float32  (T,)           gym-aloha's, 0 to 4, after the action
============================  =======  =============  =============================================

T is 400, as in the paper: an episode goes on after the cube is handed over. Row t holds what was
seen at t and the action taken then. Images are chunked by frame, because training reads frames in
random order, and deflated at level 1.
"""

import hashlib
import json
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float

from envs.aloha import FULL_HEIGHT_PX, MAX_REWARD, AlohaTransferCube, AlohaTransferCubeTask
from envs.aloha_expert import EXPERT_VERSION, AlohaExpert, AlohaExpertConfig
from envs.collecting import alone_with, solved_episodes, worker_count
from policies.atomic_files import sync

FORMAT_VERSION = 1
"""Raise whenever the same settings would give other values: caches depend on it."""
SOURCE = "scripted ALOHA expert"


@dataclass(frozen=True)
class AlohaLook:
    """What the expert's episodes are seen with."""

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    """Height and width in px."""


@dataclass(frozen=True)
class AlohaEpisode:
    """What came of one episode; its file is written where it was played."""

    seed: int
    solved: bool
    """Whether the benchmark counts the episode as solved."""
    file: Path
    """There only when it is solved."""


@dataclass(frozen=True)
class AlohaCollection:
    """What a collection brought home."""

    path: Path
    n_episodes: int
    failed_seeds: tuple[int, ...]
    """Seeds that the expert did not solve; the next seeds took their place."""
    wall_s: float


@lru_cache(maxsize=1)
def _stage(look: AlohaLook, config: AlohaExpertConfig) -> tuple[AlohaTransferCube, AlohaExpert]:
    return AlohaTransferCube(look.cameras, look.image_size), AlohaExpert(config)


def play(
    env: AlohaTransferCube, expert: AlohaExpert, seed: int
) -> tuple[Float[np.ndarray, "step 14"], Float[np.ndarray, " step"]]:
    """Let the expert play one episode that nobody watches.

    Args:
        env: Is reset to the start of ``seed``.
        expert: Plans it.
        seed: Of the start and of what varies from plan to plan.

    Returns:
        The actions, and the reward after each.
    """
    env.reset(seed)
    # Rounded as they are stored, so that what was stored is what was done.
    actions = np.asarray(expert.plan(env, seed), np.float32).astype(np.float64)
    return actions, np.array([env.step(action).reward for action in actions])


def demonstrate(
    seed: int, folder: Path, look: AlohaLook, config: AlohaExpertConfig, settings: str
) -> AlohaEpisode:
    """Play one episode, and where it is solved write its file.

    Args:
        seed: Of the start and of what varies from plan to plan.
        folder: Where the file goes.
        look: What is seen.
        config: How the expert plans.
        settings: JSON of all that decides the content, for the file's attributes.
    """
    import h5py

    env, expert = _stage(look, config)
    path = folder / f"seed_{seed}.hdf5"
    # Drawing takes much longer than playing, and is for what is kept.
    actions, rewards = play(env, expert, seed)
    if rewards.max() < MAX_REWARD:
        return AlohaEpisode(seed, False, path)
    env.reset(seed)
    n_steps = len(actions)
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs["sim"] = True
        file.attrs["fps"] = AlohaTransferCubeTask().fps
        file.attrs["seed"] = seed
        file.attrs["source"] = SOURCE
        file.attrs["settings"] = settings
        observations = file.create_group("observations")
        images = observations.create_group("images")
        frame = (*look.image_size, 3)
        pictures = {
            camera: images.create_dataset(
                camera,
                shape=(n_steps, *frame),
                dtype=np.uint8,
                chunks=(1, *frame),
                compression="gzip",
                compression_opts=1,
                fletcher32=True,
            )
            for camera in look.cameras
        }
        joints, velocities, states = [], [], []
        for step, action in enumerate(actions):
            joints.append(env.joints())
            velocities.append(env.joint_velocities())
            states.append(env.state())
            for camera, shown in pictures.items():
                shown[step] = env.image(camera)
            env.step(action)
        observations.create_dataset("qpos", data=np.array(joints, np.float32), fletcher32=True)
        observations.create_dataset("qvel", data=np.array(velocities, np.float32), fletcher32=True)
        observations.create_dataset("simulator_state", data=np.array(states), fletcher32=True)
        file.create_dataset("action", data=actions.astype(np.float32), fletcher32=True)
        file.create_dataset("rewards", data=rewards.astype(np.float32), fletcher32=True)
    return AlohaEpisode(seed, True, path)


def collect(
    path: str | Path,
    n_episodes: int = 50,
    seed: int = 0,
    cameras: tuple[str, ...] = ("top",),
    image_size: tuple[int, int] = (FULL_HEIGHT_PX, 640),
    config: AlohaExpertConfig | None = None,
    n_workers: int | None = None,
    progress: bool = True,
) -> AlohaCollection:
    """Write a folder of solved episodes; it appears whole, or not at all.

    Args:
        path: Of the folder.
        n_episodes: Solved episodes to keep.
        seed: Of the data set; different seeds share no start.
        cameras: Which are recorded.
        image_size: Height and width of the pictures, in px.
        config: How the expert plans.
        n_workers: Processes; one per core when None, this process alone when 0.
        progress: Show a progress bar.

    Raises:
        FileExistsError: When ``path`` is there.
        ValueError: When a number is out of range, the expert keeps failing, or nothing can be drawn
            on this machine.
    """
    path = Path(path)
    config = config or AlohaExpertConfig()
    look = AlohaLook(tuple(cameras), (image_size[0], image_size[1]))
    workers = worker_count(n_workers)
    if n_episodes < 1 or seed < 0 or workers < 0:
        raise ValueError(
            f"n_episodes {n_episodes}, seed {seed}, n_workers {n_workers}: give at least 1 (seed "
            "and n_workers: 0)"
        )
    if path.exists():
        raise FileExistsError(f"{path} is already there; give another path")
    # Here, not in a worker, a missing camera or graphics library is told in one line.
    trial = AlohaTransferCube(look.cameras, look.image_size)
    try:
        trial.observe()
    finally:
        trial.close()
    started = time.monotonic()
    failed: list[int] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    # Apart from what is kept: workers play ahead.
    played = unfinished / "played"
    played.mkdir()
    settings = json.dumps(_settings(n_episodes, seed, look, config), sort_keys=True)
    episodes = solved_episodes(
        demonstrate,
        (played, look, config, settings),
        n_episodes,
        seed,
        workers,
        failed,
        f"{config}; give less variation",
        progress,
    )
    try:
        with closing(episodes):
            for number, episode in enumerate(episodes):
                sync(episode.file)
                episode.file.rename(unfinished / f"episode_{number}.hdf5")
        shutil.rmtree(played)
        sync(unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync(path.parent)
    return AlohaCollection(path, n_episodes, tuple(failed), wall_s=time.monotonic() - started)


def _settings(n_episodes: int, seed: int, look: AlohaLook, config: AlohaExpertConfig) -> dict:
    """Everything that decides the content of a folder."""
    return {
        "expert_version": EXPERT_VERSION,
        "format_version": FORMAT_VERSION,
        "n_episodes": n_episodes,
        "seed": seed,
        "look": asdict(look),
        "expert": asdict(config),
    }


@dataclass(frozen=True)
class AlohaScriptedDemonstrations:
    """A data source that makes its folder on first use.

    Args:
        n_episodes: Solved episodes to keep.
        seed: Of the data set.
        cameras: Which are recorded: top, angle, front_close, left_wrist, right_wrist.
        image_size: Height and width of the pictures, in px.
        variation: Spread of the expert's plans, 0 to 1.
        cache_dir: Folder of the folder.
        n_workers: Processes; one per core when None, this process alone when 0.
        progress: Show a progress bar.
    """

    n_episodes: int = 50
    seed: int = 0
    cameras: tuple[str, ...] = ("top",)
    image_size: tuple[int, int] = (FULL_HEIGHT_PX, 640)
    variation: float = 0.0
    cache_dir: str = "data"
    n_workers: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        # Configuration files give lists.
        object.__setattr__(self, "cameras", tuple(self.cameras))
        object.__setattr__(self, "image_size", tuple(self.image_size))

    @property
    def config(self) -> AlohaExpertConfig:
        """How the expert plans."""
        return AlohaExpertConfig(variation=self.variation)

    @property
    def path(self) -> Path:
        """Of the folder: its name holds a hash of every setting and of the code's version."""
        look = AlohaLook(self.cameras, self.image_size)
        settings = _settings(self.n_episodes, self.seed, look, self.config)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        height, width = self.image_size
        name = f"aloha_transfer_cube_scripted_{self.n_episodes}x{height}x{width}_{digest}"
        return Path(self.cache_dir) / name

    def prepare(self) -> Path:
        """Return the folder, making it first where it is missing; two runs never both make it.

        Raises:
            ValueError: When episodes are missing from the cached folder.
        """
        path = self.path
        with alone_with(path):
            if path.exists():
                self._check(path)
            else:
                collect(
                    path,
                    n_episodes=self.n_episodes,
                    seed=self.seed,
                    cameras=self.cameras,
                    image_size=self.image_size,
                    config=self.config,
                    n_workers=self.n_workers,
                    progress=self.progress,
                )
        return path

    def _check(self, path: Path) -> None:
        found = len(list(path.glob("episode_*.hdf5")))
        if found != self.n_episodes:
            raise ValueError(
                f"{path}: holds {found} episodes, not {self.n_episodes}; delete it, and the next "
                "run makes it anew"
            )
