"""Look at data sets and finished policies: ``python analyze.py <command> --help``.

A command lives in the room it belongs to, as a module with ``add_arguments(parser)`` and
``run(args) -> int`` (the exit status). It is imported only when it is called, so that ``--help``
does not wait for torch.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """One analysis."""

    module: str
    """Where ``add_arguments`` and ``run`` are."""
    summary: str
    """What it is for."""
    required: tuple[str, ...] = ()
    """Shared options that must be given."""
    optional: tuple[str, ...] = ()
    """Shared options that may be given."""
    several: tuple[str, ...] = ()
    """Shared options that take more than one value."""


MAP_OPTIONS = ("dataset_repo_id", "episode_idx", "task", "device", "revision", "stats_from_data")
"""Shared options of the commands that draw maps over what a policy sees."""

COMMANDS = {
    "inspect": Command(
        "datamodules.inspect",
        "what a data set holds and what is wrong with it; exit status 1 when it is unusable",
        required=("dataset_repo_id",),
        optional=("output_dir",),
    ),
    "convert": Command(
        "datamodules.convert",
        "HDF5 to a LeRobot data set, or back, with the loss stated",
        required=("dataset_repo_id", "output_dir"),
    ),
    "repack": Command(
        "datamodules.repack",
        "HDF5 written anew with a checksum on every chunk, one picture per chunk; compared",
        required=("dataset_repo_id", "output_dir"),
    ),
    "verify": Command(
        "datamodules.verify",
        "compare the checksums of a data set or frame cache; exit status 1 where one differs, or "
        "there is none",
        required=("dataset_repo_id",),
    ),
    "rollout": Command(
        "commands.rollout",
        "let a policy act: success and score with intervals, videos, one row per variant",
        required=("policy_path", "output_dir"),
        optional=("task", "device", "revision"),
    ),
    "merge": Command(
        "commands.merge",
        "join the shards of a rollout into one table",
        required=("output_dir",),
    ),
    "transfer": Command(
        "commands.transfer",
        "a policy of one arm acts with another, with and without the flip: success, pictures",
        required=("policy_path", "output_dir"),
        optional=("dataset_repo_id", "task", "device", "revision"),
    ),
    "landscape": Command(
        "commands.landscape",
        "what a policy would do everywhere on the board: densities, videos, calibration",
        required=("policy_path", "dataset_repo_id", "output_dir"),
        optional=("episode_idx", "task", "device", "revision", "stats_from_data"),
        several=("policy_path", "episode_idx"),
    ),
    "attention": Command(
        "commands.attention",
        "where ACT looks, along recorded episodes or while it acts: maps, shares, videos",
        required=("policy_path", "output_dir"),
        optional=MAP_OPTIONS,
        several=("episode_idx",),
    ),
    "saliency": Command(
        "commands.saliency",
        "what an action depends on, by gradients or by covering the picture: maps, videos",
        required=("policy_path", "output_dir"),
        optional=MAP_OPTIONS,
        several=("episode_idx",),
    ),
    "features record": Command(
        "commands.features_record",
        "activity of an autoencoder's features on every frame of a data set: Parquet",
        required=("policy_path", "dataset_repo_id", "output_dir"),
        optional=("episode_idx", "device", "revision", "stats_from_data"),
        several=("episode_idx",),
    ),
    "features describe": Command(
        "commands.features_describe",
        "what features mean: strongest frames, simulator quantities, effect on the action",
        required=("policy_path", "dataset_repo_id", "output_dir"),
        optional=("task", "device", "revision", "stats_from_data"),
    ),
    "features steer": Command(
        "commands.features_steer",
        "scale, ablate or clamp features inside the policy: actions, rollouts, videos",
        required=("policy_path", "dataset_repo_id", "output_dir"),
        optional=("episode_idx", "task", "device", "revision", "stats_from_data"),
        several=("episode_idx",),
    ),
    "features ood": Command(
        "commands.features_ood",
        "tell unfamiliar frames from the policy's own activations, at a stated false-alarm rate",
        required=("policy_path", "dataset_repo_id", "output_dir"),
        optional=("task", "device", "revision", "stats_from_data"),
    ),
    "symmetry": Command(
        "commands.symmetry",
        "is the second arm the mirror image of the first: replays, cameras, flips; exit status 1 "
        "when it is not",
        required=("output_dir",),
        optional=("dataset_repo_id", "episode_idx", "task"),
        several=("episode_idx",),
    ),
    "browse": Command(
        "commands.browse",
        "a page on this computer: features with their clips and effects, landscapes by hand",
        required=("policy_path",),
        optional=(
            "dataset_repo_id",
            "output_dir",
            "task",
            "device",
            "revision",
            "stats_from_data",
        ),
        several=("policy_path",),
    ),
    "report": Command(
        "commands.report",
        "one page of a run, or of several side by side: pictures, curves, tables, config",
        optional=("output_dir",),
    ),
    "workspace": Command(
        "commands.workspace",
        "what W&B shows of a run: panels in sections, and a report on how to read them",
        required=("output_dir",),
    ),
    "sweep": Command(
        "commands.sweep",
        "train many configurations and say which is best: Optuna, Ray Tune, or a file for W&B",
        required=("output_dir",),
    ),
    "export": Command(
        "commands.export",
        "write a policy trained here as a LeRobot folder",
        required=("policy_path", "output_dir"),
    ),
}


def episode_number(text: str) -> int | str:
    """Parse one value of ``--episode_idx``, a number or the word all."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither the number of an episode nor the word all"
        ) from error


SHARED: dict[str, dict] = {
    "policy_path": {
        "help": "a checkpoint of ours, a LeRobot policy folder, or a hub id",
        "metavar": "PATH",
    },
    "dataset_repo_id": {
        "help": "an HDF5 file, a folder of them, or a LeRobot data set",
        "metavar": "PATH",
    },
    "episode_idx": {
        "help": "numbers of episodes in the data set, or the word all (default: the first one; "
        "features record: all)",
        "type": episode_number,
        "metavar": "N",
    },
    "output_dir": {"help": "folder to write to; made when missing", "metavar": "DIR"},
    "task": {
        "help": "simulator to act in, or to draw recorded states that are its own "
        "(default: %(default)s)",
        "default": "envs.push_t.PushTTask",
        "metavar": "CLASS_PATH",
    },
    "device": {"help": "cpu, cuda, or auto (default)", "default": "auto"},
    "revision": {"help": "branch, tag or commit of a policy's hub id"},
    "stats_from_data": {
        "help": "scale a LeRobot policy that brings no statistics by those of the whole data set, "
        "which should be the one it was trained on; a policy's own are never replaced",
        "action": "store_true",
    },
}


GROUPS = {"features": "sparse autoencoders: record, describe and steer what they find"}
"""First words of commands that have two."""


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Parser of all commands, with the options of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="analyze.py",
        description="Look at data sets and finished policies.",
        epilog="'analyze.py COMMAND --help' lists the options of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    groups = {}
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            group = commands.add_parser(first, help=GROUPS[first], description=GROUPS[first])
            groups[first] = group.add_subparsers(
                dest="subcommand", metavar="COMMAND", required=True
            )
        below = (groups[first] if second else commands).add_parser(
            second or first, help=command.summary, description=command.summary
        )
        below.set_defaults(module=command.module)
        for option in (*command.required, *command.optional):
            more = {"nargs": "+"} if option in command.several else {}
            below.add_argument(
                f"--{option}", required=option in command.required, **SHARED[option], **more
            )
        if name == chosen:
            import_module(command.module).add_arguments(below)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; those of the process when None.

    Returns:
        Exit status: 0 for success, 1 for bad input, said in one message.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    words = [" ".join(argv[:n_words]) for n_words in (2, 1)]
    chosen = next((name for name in words if name in COMMANDS), None)
    args = build_parser(chosen).parse_args(argv)
    try:
        return import_module(args.module).run(args)
    except (ValueError, OSError) as error:
        print(f"analyze.py {chosen}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
