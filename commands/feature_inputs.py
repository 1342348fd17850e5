"""What the commands on features are given: a policy, its autoencoder, and demonstrations."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.inputs import device, episode_lengths, load_policies, task_for

if TYPE_CHECKING:
    from torch import Tensor

    from autoencoders.files import LoadedAutoencoder
    from autoencoders.sae import SparseAutoencoder
    from datamodules.activations import ActivationDataModule
    from envs.task import Task
    from features.concepts import Concepts
    from features.record import FeatureRecord
    from features.taps import TokenPosition
    from policies.interface import Batch, PolicyView
    from policies.loading import LoadedPolicy

FRAME = "frame"
"""Name of the only token of an autoencoder whose vectors are whole frames."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all commands on features take that write one folder."""
    add_subject_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output_dir")


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`open_subject` needs beside the shared options."""
    parser.add_argument(
        "--sae_path",
        metavar="PATH",
        help="folder of an autoencoder (ours, or SAELens's), or of a run that trained one "
        "(default: the one that the policy's own run left)",
    )
    parser.add_argument(
        "--layer",
        help="where the policy is tapped, for an autoencoder that does not say (default: encoder)",
    )
    parser.add_argument(
        "--other_policy",
        action="store_true",
        help="use the autoencoder on another policy than the one that it was trained on",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=128,
        metavar="N",
        help="frames that go through the policy together; changes no result",
    )


def add_queries(parser: argparse.ArgumentParser, when: str = "") -> None:
    """Add the chunk steps that effects are measured on."""
    parser.add_argument(
        "--queries",
        type=int,
        nargs="+",
        default=[0],
        metavar="K",
        help=f"{when}chunk steps whose actions effects are measured on (default: 0)",
    )


def run_folder(policy_path: str) -> Path | None:
    """The folder of the run that a path leads to; None for what is no run of ours."""
    path = Path(policy_path).expanduser()
    if path.is_file():
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return path if (path / "checkpoints").is_dir() else None


def own_autoencoder(policy_path: str, policy: "LoadedPolicy") -> Path | None:
    """The autoencoder that a policy's run left, of its own step or else the newest, said then.

    Args:
        policy_path: As given on the command line.
        policy: What it led to.

    Returns:
        Its folder; None where there is none.
    """
    from autoencoders.files import AUTOENCODER_FOLDER, CONFIG_FILE
    from policies.checkpoint_files import read_checkpoint

    folder = run_folder(policy_path)
    if folder is None or policy.kind != "policyscope":
        return None
    if (folder / AUTOENCODER_FOLDER / CONFIG_FILE).is_file():
        return folder / AUTOENCODER_FOLDER
    found = {
        int(file.parts[-4].removeprefix("step_")): file.parent
        for file in folder.glob(f"media/step_*/*/{AUTOENCODER_FOLDER}/{CONFIG_FILE}")
    }
    if not found:
        return None
    step = read_checkpoint(policy.source)["global_step"]
    if step not in found:
        newest = max(found)
        print(f"{folder}: left no autoencoder of step {step}, the policy's; taking step {newest}")
        step = newest
    return found[step]


@dataclass(frozen=True)
class Subject:
    """A policy, the autoencoder of its activations, and demonstrations that it sees."""

    data: "ActivationDataModule"
    loaded: "LoadedAutoencoder"
    device: str
    split: dict[str, list[int]]
    """Episodes of the data set that the autoencoder ``train``ed on, ``calibration``, ``val``."""
    split_note: str
    """Where the split comes from."""
    lengths: dict[int, int]
    """Steps of every episode of the data set."""

    @property
    def sae(self) -> "SparseAutoencoder":
        """The autoencoder."""
        return self.loaded.sae

    @property
    def view(self) -> "PolicyView":
        """The policy."""
        return self.data.policy

    @property
    def layer(self) -> str:
        """Where the policy is tapped."""
        return self.data.layer

    @property
    def positions(self) -> "tuple[TokenPosition, ...]":
        """What each recorded token stands for."""
        from features.taps import TokenPosition

        return (TokenPosition(FRAME),) if self.data.per == "frame" else self.data.tokens.positions

    def require_tokens(self, purpose: str) -> None:
        """Refuse an autoencoder whose vectors are not the policy's own.

        Raises:
            ValueError: If they are whole frames, or means of several tokens.
        """
        if self.data.per == "frame" or self.data.token_sampler.method == "block_average":
            what = "whole frames" if self.data.per == "frame" else "means of blocks of tokens"
            raise ValueError(
                f"the autoencoder is of {what}: {purpose} needs one of single tokens (per: token, "
                "and a token_sampling other than block_average)"
            )

    def load(self, episodes: Sequence[int]) -> None:
        """Read the frames of some episodes; once."""
        numbers = sorted(episodes)
        self.data.episodes = numbers
        # Which episodes trained and which measure was decided by others.
        self.data.split = dict.fromkeys(("train", "calibration", "val"), numbers)
        self.data.setup()

    def vectors(self, episodes: Sequence[int]) -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
        """Activations of each episode as the autoencoder takes them, with its keys."""
        from einops import rearrange

        for number in episodes:
            frames = self.data.frames([number])
            activations = frames.activations.float().to(self.device)
            if self.data.per == "frame":
                activations = rearrange(activations, "frame token dim -> frame 1 (token dim)")
            yield activations, frames.episode_index, frames.frame_index

    def record(self, episodes: Sequence[int], title: str) -> "FeatureRecord":
        """All activity of all features in some episodes."""
        from datamodules.progress import progress_bar
        from features.record import record_features

        n_frames = sum(self.lengths[number] for number in episodes)
        with progress_bar(title, n_frames, True) as advance:

            def watched() -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
                for each in self.vectors(episodes):
                    yield each
                    advance(len(each[1]))

            return record_features(self.sae, watched(), self.positions, self.metadata)

    @property
    def metadata(self) -> dict[str, Any]:
        """Where results come from, in plain values."""
        return {
            "policy": str(self.data.loaded_policy.source),
            "policy_hash": self.data.policy_hash,
            "autoencoder": str(self.loaded.source),
            "architecture": self.sae.architecture,
            "layer": self.layer,
            "data": self.data.data_name,
        }

    def batch(self, episodes: Sequence[int], n_frames: int) -> "Batch":
        """Frames spread evenly over some episodes, on the policy's device."""
        from callbacks.feature_findings import spread_frames

        return spread_frames(self.data.demonstrations, episodes, n_frames).to(self.device)

    def least_effect(self, task: "Task | None") -> float:
        """How far an action moves at least that has moved, in data units.

        A share of the widest of the action's ranges: that which the task gives, or else that of the
        demonstrations.
        """
        from envs.task import DescribedActions
        from features.effects import ZERO_EFFECT_SHARE

        if isinstance(task, DescribedActions):
            widest = max(each.high - each.low for each in task.action_dimensions)
        else:
            action = self.data.demonstrations.statistics.action
            widest = float((action.max - action.min).max())
        return ZERO_EFFECT_SHARE * widest

    def concepts(self, record: "FeatureRecord", task: "Task | None") -> "Concepts":
        """What is known of the frames of a record; at least the time in the episode."""
        from callbacks.feature_findings import states_of
        from envs.concepts import known_concepts
        from features.concepts import Concepts, time_in_episode

        numbers = list(dict.fromkeys(record.episode_index.tolist()))
        states = states_of(self.data.demonstrations, numbers)
        known = known_concepts(task, states, record.episode_index, record.frame_index)
        if known is not None:
            return known
        time = time_in_episode(record.episode_index, record.frame_index)
        return Concepts(("time",), time.float()[:, None], (False,), ("1",))


def open_subject(arguments: argparse.Namespace) -> Subject:
    """Load the policy and its autoencoder, and describe the data set; no frame is read yet.

    Raises:
        ValueError: If something cannot be loaded, or the autoencoder is of another policy or has
            other dimensions than the layer.
    """
    from autoencoders.files import load_autoencoder
    from datamodules.activations import ActivationDataModule

    if arguments.batch_size < 1:
        raise ValueError(f"--batch_size {arguments.batch_size}: give at least 1")
    where = device(arguments.device)
    (policy,) = load_policies(
        [arguments.policy_path],
        arguments.dataset_repo_id,
        where,
        arguments.revision,
        arguments.stats_from_data,
    )
    sae_path = arguments.sae_path or own_autoencoder(arguments.policy_path, policy)
    if sae_path is None:
        raise ValueError(
            f"--policy_path {arguments.policy_path}: its run left no autoencoder; give one with "
            "--sae_path (train.py fit -c configs/experiment/sae_act.yaml trains one)"
        )
    loaded = load_autoencoder(sae_path, where)
    made_from = loaded.metadata
    if arguments.layer and made_from.get("layer", arguments.layer) != arguments.layer:
        raise ValueError(
            f"--layer {arguments.layer}: the autoencoder was trained on layer "
            f"{made_from['layer']!r}; leave it out"
        )
    sampling = made_from.get("token_sampling", {"method": "all", "ratio": 8, "seed": 0})
    data = ActivationDataModule(
        arguments.policy_path,
        arguments.dataset_repo_id,
        layer=made_from.get("layer") or arguments.layer or "encoder",
        token_sampling=sampling["method"],
        token_ratio=sampling["ratio"],
        seed=sampling["seed"],
        per=made_from.get("per", "token"),
        dtype=made_from.get("dtype", "float16"),
        storage="stream",
        frames_per_batch=arguments.batch_size,
        device=where,
        progress=False,
    )
    # As the command line asked for it: with its revision and its scale.
    data.loaded_policy = policy
    if data.d_in != loaded.sae.d_in:
        raise ValueError(
            f"--sae_path {sae_path}: takes vectors of {loaded.sae.d_in} dimensions, "
            f"layer {data.layer!r} gives {data.d_in}; give the autoencoder of this layer"
        )
    expected = made_from.get("policy_hash")
    if expected and expected != data.policy_hash and not arguments.other_policy:
        raise ValueError(
            f"--sae_path {sae_path}: was trained on the policy {made_from['policy']}, "
            f"whose weights are not those of {arguments.policy_path}; give that one, or say "
            "--other_policy"
        )
    lengths = episode_lengths(arguments.dataset_repo_id)
    split, note = _split(arguments, made_from, data, sorted(lengths))
    return Subject(data, loaded, where, split, note, lengths)


def _split(
    arguments: argparse.Namespace,
    made_from: Any,
    data: "ActivationDataModule",
    numbers: Sequence[int],
) -> tuple[dict[str, list[int]], str]:
    """The autoencoder's own split, if this is its data set; else one by the policy, or by seed."""
    import numpy as np

    name = made_from.get("data")
    # A copy elsewhere keeps its name; of a file made anew under it, only numbers can be compared.
    is_same = name is not None and Path(name).name == Path(arguments.dataset_repo_id).name
    known = {*numbers}
    if is_same and all({*part} <= known for part in made_from["split"].values()):
        return made_from["split"], "the autoencoder's own split"
    caveat = (
        ""
        if name is None
        else f"; the autoencoder was trained on {name}: if these are the same demonstrations under "
        "another name, it has seen held-out ones"
    )
    held_out = (data.loaded_policy.split or {}).get("val", [])
    if len(held_out) > 1 and {*held_out} <= known:
        n_calibration = max(1, len(held_out) // 3)
        return {
            "train": [number for number in numbers if number not in {*held_out}],
            "calibration": held_out[:n_calibration],
            "val": held_out[n_calibration:],
        }, f"the policy's own split{caveat}"
    order = np.random.default_rng(0).permutation(np.asarray(numbers)).tolist()
    if len(order) < 3:
        raise ValueError(
            f"--dataset_repo_id {arguments.dataset_repo_id}: has {len(order)} episodes; to train, "
            "calibrate and measure takes at least 3"
        )
    n_each = max(1, round(len(order) * 0.15))
    return {
        "train": sorted(order[2 * n_each :]),
        "calibration": sorted(order[:n_each]),
        "val": sorted(order[n_each : 2 * n_each]),
    }, f"episodes drawn at random: the policy does not say what it was trained on{caveat}"


def check_at_least(arguments: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Refuse numbers that are too small, before anything long starts.

    Args:
        arguments: Of the command.
        least: Option to its smallest value.

    Raises:
        ValueError: Naming the option.
    """
    for name, smallest in least.items():
        if getattr(arguments, name) < smallest:
            raise ValueError(f"--{name} {getattr(arguments, name)}: give at least {smallest}")


def some(episodes: Sequence[int], n_wanted: int) -> list[int]:
    """Some of the episodes, evenly spread; all where there are fewer."""
    n_there = len(episodes)
    n = min(n_wanted, n_there)
    return [episodes[round(place * (n_there - 1) / max(n - 1, 1))] for place in range(n)]


def task_of(arguments: argparse.Namespace, view: "PolicyView") -> "Task | None":
    """The task that ``--task`` names, as the policy sees it; None where it is another's."""
    return task_for(arguments.task, view.data_schema)


def output_folder(arguments: argparse.Namespace, files: Sequence[str]) -> Path:
    """The folder of ``--output_dir``, which must not hold results yet; it is not made here.

    Raises:
        ValueError: If it holds one of the files, and ``--overwrite`` is not given.
    """
    folder = Path(arguments.output_dir)
    there = [name for name in files if (folder / name).exists()]
    if there and not arguments.overwrite:
        raise ValueError(
            f"--output_dir {folder}: holds {there[0]} already; give another folder, or --overwrite"
        )
    return folder
