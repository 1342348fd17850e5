"""Small policies on small PushT recordings, explored."""

from pathlib import Path

import torch
from pusht_runs import write_pusht
from tiny_act import CHUNK, tiny_act
from toy_policies import ToyPolicy

from browser.explorer import Explorer
from envs.push_t import PushTTask
from policies.checkpoint_files import CHECKPOINT_FORMAT, MARK_KEY
from policies.interface import DataSchema
from policies.loading import LoadedPolicy

SIZE = 32
VAL = (1, 4)


class Following(ToyPolicy):
    """Goes on as the last two states did: it sees a history."""

    n_obs_steps = 2
    data_schema = DataSchema(cameras={"image": (SIZE, SIZE)}, state_dim=2, action_dim=2)

    def __init__(self):
        super().__init__([[250.0, 250.0], [260.0, 240.0]], chunk_size=CHUNK)

    def _chunks(self, points, observation, queries):
        steps = list(range(self.chunk_size) if queries is None else queries)
        way = (observation.state[:, -1] - observation.state[:, 0]).double()
        chunk = points[None, :, None] + way[:, None, None]
        return chunk.expand(-1, -1, len(steps), -1)


def recordings(folder: Path, states: bool = True) -> Path:
    return write_pusht(folder / "demos.hdf5", SIZE, states)


def loaded(view, path: Path) -> LoadedPolicy:
    """A policy that does not say what it was trained on."""
    return LoadedPolicy(view, path, "lerobot")


def trained(view, folder: Path, data: Path) -> LoadedPolicy:
    """A policy whose checkpoint says that it held out :data:`VAL`."""
    path = folder / "trained.ckpt"
    split = {"by": "seed", "train": [0, 2, 3, 5], "val": list(VAL)}
    state = {"split": split, "source": str(data), "fingerprint": "of six episodes"}
    torch.save({MARK_KEY: {"checkpoint_format": CHECKPOINT_FORMAT}, "data": state}, path)
    return LoadedPolicy(view, path, "policyscope", split=split)


def tiny_explorer(folder: Path, states: bool = True, n_policies: int = 1) -> Explorer:
    """Untrained ACTs on six short episodes."""
    data = recordings(folder, states)
    policies = [loaded(tiny_act(), data) for _ in range(n_policies)]
    names = ["one", "two"][:n_policies]
    return Explorer.open(policies, names, str(data), PushTTask, n_samples=8)
