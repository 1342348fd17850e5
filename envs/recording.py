"""Let a script act in any task, and keep what it did as demonstrations (HDF5, layout ``demos``).

Root attributes ``num_demos`` and ``fps``; one group per episode, ``demo_{i}``, with the attribute
``seed``. Row t holds what was seen at t and the action taken then:

============================  =======  ====================================
observations/images/{camera}  uint8    (T, H, W, 3), RGB
observations/qpos             float32  (T, state)
observations/state            float64  (T, simulator): resets the simulator
actions                       float32  (T, action)
rewards                       float32  (T,), after the action
============================  =======  ====================================

Every chunk has a checksum (fletcher32): a flipped bit is an error when it is read.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from envs.task import Environment, Task
from policies.atomic_files import whole_file


def record_demonstrations(
    path: str | Path, task: Task, act: Callable[[Any], np.ndarray], seeds: Iterable[int]
) -> int:
    """Play one episode for each seed, and write those that are solved.

    Args:
        path: Of the HDF5 file.
        task: Makes the environment, and says when an episode is over and whether it is solved,
            at the last threshold.
        act: The script: it may look at all of the environment, and gives the action to take.
        seeds: Of the episodes' starts.

    Returns:
        How many episodes were solved.

    Raises:
        FileExistsError: If the file is there already.
        ValueError: If no episode was solved.
    """
    import h5py

    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already: give another path, or delete the file")
    path.parent.mkdir(parents=True, exist_ok=True)
    env = task.make()
    n_kept = 0
    try:
        with whole_file(path, overwrite=False) as temporary:
            with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
                for seed in seeds:
                    rows, is_solved = _play(env, task, act, seed)
                    if not is_solved:
                        continue
                    group = file.create_group(f"demo_{n_kept}")
                    group.attrs["seed"] = seed
                    for key, values in rows.items():
                        group.create_dataset(key, data=np.stack(values), fletcher32=True)
                    n_kept += 1
                file.attrs["num_demos"] = n_kept
                file.attrs["fps"] = task.fps
            if not n_kept:
                raise ValueError(
                    f"the script solved no episode of task {task.name} within {task.max_steps} "
                    "steps: look at what it does with env.frame, or allow more steps"
                )
    finally:
        env.close()
    return n_kept


def _play(
    env: Environment, task: Task, act: Callable[[Any], np.ndarray], seed: int
) -> tuple[dict[str, list[np.ndarray]], bool]:
    """One episode: name of a data set to its rows, and whether it was solved."""
    env.reset(seed)
    rows: dict[str, list[np.ndarray]] = {}
    best = -np.inf
    for _ in range(task.max_steps):
        seen, state = env.observe(), env.state()
        action = np.asarray(act(env), np.float32)
        outcome = env.step(action)
        best = max(best, outcome.score)
        for key, value in (
            *((f"observations/images/{name}", image) for name, image in seen["images"].items()),
            ("observations/qpos", seen["state"].astype(np.float32)),
            ("observations/state", state.astype(np.float64)),
            ("actions", action),
            ("rewards", np.float32(outcome.reward)),
        ):
            rows.setdefault(key, []).append(np.asarray(value))
        if outcome.terminated:
            break
    return rows, task.is_success(best, task.success_thresholds[-1])
