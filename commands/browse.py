"""``analyze.py browse``: a page on this computer to look through features and landscapes."""

import argparse
import contextlib
import json
import os
import tempfile
import webbrowser
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read when torch is imported. While a pose is dragged, its threads wait more than they work;
# spinning, they wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from commands import feature_inputs, features_describe
from commands.feature_inputs import Subject
from commands.inputs import device, load_policies, task_class, task_for

if TYPE_CHECKING:
    from browser.explorer import Explorer
    from browser.features import FeatureLibrary
    from browser.notes import NoteBook
    from features.record import FeatureRecord

DESCRIBE_FOLDER, NOTES_FILE, IDENTITY_FILE = "describe", "notes.json", "made_from.json"
DESCRIBE_OPTIONS = {
    "n_train_episodes": (60, "training episodes on which features are matched to concepts"),
    "n_val_episodes": (40, "held-out episodes, which the page shows"),
    "n_permutations": (100, "chance pairings of episodes as a yardstick; 0 for none"),
    "n_effect_frames": (256, "held-out frames on which features are ablated and doubled"),
    "n_behaviour_frames": (256, "held-out frames on which the policy acts on reconstructions"),
    "seed": (0, "of the pairings and of a random autoencoder"),
}
"""Of ``features describe``, with what makes a first start short."""
MATCHING_SHARE = 0.99
"""Of a recorded episode's activity that is found again when it is recorded anew; what is missing
is rounding, on another device, near the threshold."""
FORMAT = 1
"""Of the descriptions that are kept; counts up when the page needs others."""
N_STRIP_FEATURES = 16
CHANGED_VALUE = 0.02
"""Relative change of an activation up to which it is the same: stored activations are float16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    feature_inputs.add_subject_arguments(parser)
    parser.add_argument(
        "--describe_path",
        metavar="DIR",
        help="show what features describe wrote there, instead of describing at the first start",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="N",
        help="of 127.0.0.1; 0 for any that is free (default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the web browser")
    for name, (default, text) in DESCRIBE_OPTIONS.items():
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"of the first start: {text} (default: {default})",
        )
    feature_inputs.add_queries(parser, "of the first start: ")


def run(arguments: argparse.Namespace) -> int:
    """Describe the features at the first start, then serve the page until Ctrl-C.

    Raises:
        ValueError: For anything wrong with the arguments, policies, autoencoder, data or notes.
    """
    from browser.server import address, bind, create_app, serve

    feature_inputs.check_at_least(
        arguments, {name: features_describe.LEAST[name] for name in DESCRIBE_OPTIONS}
    )
    # Taken first: a port that is in use should not be said after minutes.
    with (
        bind(arguments.port) as listening,
        tempfile.TemporaryDirectory() as clips,
        contextlib.ExitStack() as at_the_end,
    ):
        try:
            session = open_session(arguments, Path(clips))
        except KeyboardInterrupt:
            print("\nstopped before the page was ready; the next start begins again")
            return 130
        if session.explorer is not None:
            at_the_end.callback(session.explorer.close)
        app = create_app(session.library, session.explorer, session.notes, session.about)
        where = address(listening)
        print(f"{where}  (Ctrl-C stops)", flush=True)
        if arguments.open:
            webbrowser.open(where)
        serve(app, listening)
    return 0


@dataclass(frozen=True)
class Session:
    """What a page shows."""

    library: "FeatureLibrary | None"
    explorer: "Explorer | None"
    notes: "NoteBook | None"
    about: Mapping[str, Any]
    """For the page's head."""


def open_session(arguments: argparse.Namespace, clips: Path) -> Session:
    """Load everything that the page shows, and say what is missing.

    Args:
        arguments: Of the command.
        clips: Folder for videos.

    Raises:
        ValueError: As :func:`run`.
    """
    from browser.explorer import Explorer

    where = device(arguments.device)
    data = arguments.dataset_repo_id or _training_data(arguments)
    arguments = Namespace(**{**vars(arguments), "dataset_repo_id": data})
    # Policies of its own: features are turned by hooks, which landscapes must not see.
    policies = load_policies(
        arguments.policy_path, data, where, arguments.revision, arguments.stats_from_data
    )
    names = _names(arguments.policy_path)
    library, notes = None, None
    sae_path = arguments.sae_path or feature_inputs.own_autoencoder(
        arguments.policy_path[0], policies[0]
    )
    if sae_path is None:
        print(
            f"{arguments.policy_path[0]}: left no autoencoder, so there are no features to show; "
            "give one with --sae_path (train.py fit -c configs/experiment/sae_act.yaml)"
        )
        if arguments.describe_path:
            raise ValueError(
                "--describe_path has no meaning without an autoencoder: add --sae_path"
            )
    else:
        library, notes = _open_features(arguments, str(sae_path), clips)
    try:
        explorer = Explorer.open(policies, names, data, task_class(arguments.task), where)
    except ValueError as error:
        if library is None:
            raise
        print(f"no landscapes: {error}")
        explorer = None
    about = {
        "policies": [
            {"name": name, "path": path, "kind": policy.kind}
            for name, path, policy in zip(names, arguments.policy_path, policies, strict=True)
        ],
        "data": Path(data).name,
    }
    return Session(library, explorer, notes, about)


def _names(paths: Sequence[str]) -> list[str]:
    """A short name for each policy, none twice."""
    parts = [Path(path).parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-n:]) for each in parts]
        if len({*names}) == len(names) and names != ["last"]:
            return names
    if len({*paths}) < len(paths):
        raise ValueError(f"--policy_path names a policy twice: {' '.join(paths)}")
    return list(paths)


def _training_data(arguments: argparse.Namespace) -> str:
    """The data set of the first policy's run.

    Raises:
        ValueError: If it does not say, or it is gone.
    """
    from datamodules.opening import find_training_data
    from policies.loading import load_policy

    policy = load_policy(arguments.policy_path[0], "cpu", arguments.revision)
    try:
        return find_training_data(policy)
    except ValueError as error:
        raise ValueError(
            str(error).replace("give dataset_repo_id", "give --dataset_repo_id")
        ) from error


# Features


def _open_features(
    arguments: argparse.Namespace, sae_path: str, clips: Path
) -> "tuple[FeatureLibrary, NoteBook]":
    """Descriptions, made anew where they are of something else, and the notes."""
    from browser.features import FeatureLibrary, read_descriptions
    from browser.notes import NoteBook, autoencoder_hash
    from features.record import read_record

    chosen = Namespace(
        **{**vars(arguments), "policy_path": arguments.policy_path[0], "sae_path": sae_path}
    )
    home = _home(arguments)
    subject = feature_inputs.open_subject(chosen)
    # Damaged notes are said before anything is computed.
    notes = NoteBook(home / NOTES_FILE, autoencoder_hash(subject.loaded), subject.sae.n_latents)
    if arguments.describe_path:
        folder = Path(arguments.describe_path)
        _check_is_of(folder, subject, "give the folder that belongs to them")
    else:
        folder = home / DESCRIBE_FOLDER
        subject = _described(folder, chosen, subject)
    described = read_descriptions(folder)
    record = read_record(folder / features_describe.HELD_OUT_FOLDER)
    concepts = subject.concepts(record, task_for(arguments.task, subject.view.data_schema))
    return FeatureLibrary(described, record, concepts, subject.data, subject.sae, clips), notes


def _home(arguments: argparse.Namespace) -> Path:
    """Where descriptions and notes are kept.

    Raises:
        ValueError: If the policy is no run of ours, and no folder is given.
    """
    if arguments.output_dir:
        return Path(arguments.output_dir)
    run_folder = feature_inputs.run_folder(arguments.policy_path[0])
    if run_folder is None:
        raise ValueError(
            f"--policy_path {arguments.policy_path[0]}: is no run folder, where descriptions and "
            "notes would be kept; give a folder with --output_dir"
        )
    return run_folder / "browse"


def _described(folder: Path, arguments: argparse.Namespace, subject: Subject) -> Subject:
    """See to it that a folder describes the features; returns a subject with its frames read."""
    from policies.atomic_files import write_atomically

    settings = _settings(arguments, subject)
    reason = _why_anew(folder, settings, subject)
    if reason is None:
        return subject
    print(f"{reason}: describing the features, once", flush=True)
    # Without its identity a folder is as good as empty: it is taken away first and written last.
    (folder / IDENTITY_FILE).unlink(missing_ok=True)
    wanted = {"output_dir": str(folder), "overwrite": True, "n_features_shown": N_STRIP_FEATURES}
    features_describe.run(Namespace(**{**vars(arguments), **wanted}))
    fresh = feature_inputs.open_subject(arguments)
    fresh.load(_held_out(folder))
    identity = {**settings, "data": fresh.data.demonstrations.fingerprint}
    write_atomically(folder / IDENTITY_FILE, json.dumps(identity, indent=1) + "\n")
    return fresh


def _settings(arguments: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """What decides a description, but for the data's content; plain values."""
    from browser.notes import autoencoder_hash

    return {
        "format": FORMAT,
        "policy": subject.data.policy_hash,
        "autoencoder": autoencoder_hash(subject.loaded),
        "layer": subject.layer,
        "task": arguments.task,
        "queries": list(arguments.queries),
        **{name: getattr(arguments, name) for name in DESCRIBE_OPTIONS},
    }


def _why_anew(folder: Path, settings: Mapping[str, Any], subject: Subject) -> str | None:
    """What makes a description useless; None if it can be used, and its frames are read then."""
    try:
        made_from = json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))
        episodes = _held_out(folder)
    except (OSError, ValueError):
        return "first start"
    changed = [name for name, value in settings.items() if made_from.get(name) != value]
    if changed:
        return f"{', '.join(changed)} changed"
    if not {*episodes} <= {*subject.lengths}:
        return "data changed"
    subject.load(episodes)
    return None if subject.data.demonstrations.fingerprint == made_from["data"] else "data changed"


def _held_out(folder: Path) -> list[int]:
    from browser.features import read_descriptions

    return list(read_descriptions(folder).summary["episodes"]["held_out"])


def _check_is_of(folder: Path, subject: Subject, mend: str) -> None:
    """Refuse a description of something else; read its frames if it is not.

    Raises:
        ValueError: If policy, autoencoder or data are others.
    """
    from browser.features import read_descriptions
    from features.record import read_record

    metadata = read_descriptions(folder).summary["metadata"]
    for name, value in (("policy_hash", subject.data.policy_hash), ("layer", subject.layer)):
        if metadata.get(name) != value:
            raise ValueError(
                f"--describe_path {folder}: is of another policy or layer ({name} "
                f"{metadata.get(name)!r}, here {value!r}); {mend}"
            )
    episodes = _held_out(folder)
    if missing := sorted({*episodes} - {*subject.lengths}):
        raise ValueError(
            f"--describe_path {folder}: is of other data, with episodes {missing}; {mend}"
        )
    subject.load(episodes)
    stored = read_record(folder / features_describe.HELD_OUT_FOLDER)
    # Activity of one episode depends on policy, autoencoder and data, all of them.
    stored = stored.rows(stored.episode_index == episodes[0])
    if not _is_same(stored, subject.record(episodes[:1], "Comparing with the description")):
        raise ValueError(
            f"--describe_path {folder}: is of another autoencoder or of other data: features do "
            f"not fire in episode {episodes[0]} as it says; {mend}"
        )


def _is_same(stored: "FeatureRecord", found: "FeatureRecord") -> bool:
    """Whether two records agree but for rounding."""
    if len(stored) != len(found) or stored.n_latents != found.n_latents:
        return False
    if stored.positions != found.positions:
        return False
    sides = [
        {
            (frame, token, latent): value
            for frame, token, latent, value in zip(
                each.frame.tolist(),
                each.token.tolist(),
                each.latent.tolist(),
                each.value.tolist(),
                strict=True,
            )
        }
        for each in (stored, found)
    ]
    n_all = len(sides[0].keys() | sides[1].keys())
    n_same = sum(
        abs(sides[0][key] - sides[1][key]) <= CHANGED_VALUE * max(sides[0][key], sides[1][key])
        for key in sides[0].keys() & sides[1].keys()
    )
    return n_same >= MATCHING_SHARE * n_all
