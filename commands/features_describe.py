"""``analyze.py features describe``: what features mean, and what they do to the action."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from commands import feature_inputs
from commands.feature_inputs import Subject

if TYPE_CHECKING:
    from features.bases import BasisScore
    from features.describe import FeatureDescriptions
    from features.effects import FeatureEffects
    from features.record import FeatureRecord

TRAIN_FOLDER, HELD_OUT_FOLDER = "record_train", "record_held_out"
STRIP_FILE, CONCEPTS_FILE, DENSITY_FILE = "strip.png", "concepts.png", "density.png"
LEAST = {
    "n_train_episodes": 2,
    "n_val_episodes": 2,
    "n_permutations": 0,
    "n_effect_frames": 1,
    "n_behaviour_frames": 1,
    "n_features_shown": 1,
    "seed": 0,
}
"""Smallest values of options."""
N_CHART_FEATURES = 24
N_CALIBRATION_VECTORS = 65_536
"""For the threshold of an untrained autoencoder."""
N_NEURON_FRAMES = 6000
"""Frames on which other bases compete, at most: neurons are dense."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    feature_inputs.add_arguments(parser)
    for name, default, text in (
        ("n_train_episodes", 100, "training episodes on which features are matched to concepts"),
        ("n_val_episodes", 100, "held-out episodes on which everything is measured"),
        ("n_permutations", 200, "chance pairings of episodes as a yardstick; 0 for none"),
        ("n_effect_frames", 512, "held-out frames on which features are ablated and doubled"),
        ("n_behaviour_frames", 1024, "held-out frames on which the policy acts on reconstructions"),
        ("n_features_shown", 16, "features in the picture"),
        ("seed", 0, "of the pairings and of a random autoencoder"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    feature_inputs.add_queries(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record, describe, measure effects, draw and write; print what was found.

    Raises:
        ValueError: For anything wrong with the arguments, the policy, the autoencoder or the data.
    """
    from rich.console import Console

    from callbacks.feature_findings import quality_of
    from datamodules.progress import progress_bar
    from features.describe import SUMMARY_FILE, TABLE_FILE, describe, write_descriptions
    from features.record import write_record

    feature_inputs.check_at_least(arguments, LEAST)
    folder = feature_inputs.output_folder(arguments, (SUMMARY_FILE, TABLE_FILE, STRIP_FILE))
    subject = feature_inputs.open_subject(arguments)
    can_edit = _can_edit(subject, arguments.queries)
    train = feature_inputs.some(subject.split["train"], arguments.n_train_episodes)
    held_out = feature_inputs.some(subject.split["val"], arguments.n_val_episodes)
    subject.load([*train, *held_out])
    folder.mkdir(parents=True, exist_ok=True)
    task = feature_inputs.task_of(arguments, subject.view)
    records = {
        "train": subject.record(train, "Recording training episodes"),
        "held_out": subject.record(held_out, "Recording held-out episodes"),
    }
    write_record(folder / TRAIN_FOLDER, records["train"])
    write_record(folder / HELD_OUT_FOLDER, records["held_out"])
    concepts = {name: subject.concepts(record, task) for name, record in records.items()}
    with progress_bar("Describing features", 2 * subject.sae.n_latents, True) as advance:
        found = describe(
            records["train"],
            records["held_out"],
            concepts["train"],
            concepts["held_out"],
            subject.data.demonstrations.fps or 10.0,
            places=concepts["held_out"].places,
            n_permutations=arguments.n_permutations,
            seed=arguments.seed,
            advance=advance,
        )
    console = Console(highlight=False)
    behaviour, effects = None, None
    if can_edit:
        with console.status("Ablating and doubling features"):
            behaviour, effects = _causes(subject, held_out, found.latents.tolist(), arguments)
    with console.status("Comparing with neurons, principal directions and a random autoencoder"):
        bases = _bases(subject, train, held_out, arguments)
    few = feature_inputs.some(held_out, 20)
    quality = quality_of(subject.sae, _activations(subject, few))
    unit, least = subject.data.loaded_policy.action_unit, subject.least_effect(task)
    more = {
        "telling": _telling(found),
        "split": subject.split_note,
        "episodes": {"train": train, "held_out": held_out},
        "fidelity": {**quality.scalars(), "n_episodes": len(few)},
        "behaviour": behaviour,
        "effects": None if effects is None else _effect_numbers(effects, least, unit),
        "action_unit": unit,
        "bases": [_score(score) for score in bases],
    }
    _draw(folder, subject, records["held_out"], found, effects, quality.density, arguments)
    columns = _effect_columns(effects, unit)
    write_descriptions(folder, found, columns, more)
    _print(console, found.summary(), more, bases)
    console.print(f"written to {folder}", soft_wrap=True)
    return 0


def _can_edit(subject: Subject, queries: Sequence[int]) -> bool:
    """Whether what the autoencoder gives can be put back into the policy.

    Raises:
        ValueError: If the policy does not predict the queries.
    """
    from features.taps import edit_activations

    if not all(0 <= query < subject.view.chunk_size for query in queries):
        raise ValueError(
            f"--queries {list(queries)}: the policy predicts chunk steps 0 to "
            f"{subject.view.chunk_size - 1}"
        )
    sampling, per = subject.data.token_sampler.method, subject.data.per
    if sampling == "block_average" or (per == "frame" and sampling != "all"):
        return False
    try:
        with edit_activations(subject.view, subject.layer, lambda x: x):
            return True
    except ValueError:
        # Several cameras go through such a layer one by one.
        return False


def _causes(
    subject: Subject, episodes: Sequence[int], latents: list[int], arguments: argparse.Namespace
) -> "tuple[dict[str, Any], FeatureEffects | None]":
    """What reconstruction, and each feature, does to the action; no effects of whole frames."""
    from features.effects import FeatureProbe, behaviour_recovered, feature_effects
    from features.splice import WholeFrames
    from policies.interface import in_unit

    data = subject.data
    few = feature_inputs.some(episodes, 20)
    mean = _activations(subject, few).flatten(0, 1).mean(0)
    reconstruct = subject.sae
    if data.per == "frame":
        reconstruct = WholeFrames(subject.sae)
        mean = mean.unflatten(0, (-1, data.tap.dim))
    batch = subject.batch(episodes, arguments.n_behaviour_frames)
    recovered = behaviour_recovered(subject.view, subject.layer, reconstruct, mean, batch)
    unit = data.loaded_policy.action_unit
    behaviour = {
        in_unit(name, unit): {"value": each.value, "low": each.low, "high": each.high}
        for name, each in recovered.summary().items()
    }
    if data.per == "frame":
        return behaviour, None
    probe = FeatureProbe(
        subject.view,
        subject.layer,
        subject.sae,
        subject.batch(episodes, arguments.n_effect_frames).observation,
        latents,
        arguments.queries,
    )
    return behaviour, feature_effects(probe, n_frames_per_latent=16)


def _activations(subject: Subject, episodes: Sequence[int]):
    """Activations of some episodes as the autoencoder takes them."""
    import torch

    return torch.cat([activations for activations, _, _ in subject.vectors(episodes)])


def _effect_numbers(effects: "FeatureEffects", least: float, unit: str) -> dict[str, Any]:
    """What can be said of all features' effects together."""
    is_live = effects.n_frames > 0
    px = effects.magnitude_px[is_live].amax(-1)
    return {
        "queries": list(effects.queries),
        "n_live": int(is_live.sum()),
        f"zero_effect_below_{unit}": least,
        "zero_effect_rate_ablated": effects.zero_effect_rate(least, 0.0),
        "zero_effect_rate_doubled": effects.zero_effect_rate(least, 2.0),
        f"median_ablated_{unit}": float(px[:, 0].median()),
        f"max_ablated_{unit}": float(px[:, 0].max()),
        f"median_doubled_{unit}": float(px[:, 1].median()),
        f"max_doubled_{unit}": float(px[:, 1].max()),
    }


def _effect_columns(effects: "FeatureEffects | None", unit: str) -> dict[str, list[Any]]:
    """Columns of the table of features, for the first of the chunk steps."""
    if effects is None:
        return {}
    columns: dict[str, list[Any]] = {"n_effect_frames": effects.n_frames.tolist()}
    for place, name in enumerate(("ablated", "doubled")):
        columns[f"{name}_{unit}"] = _plain(effects.magnitude_px[:, place, 0])
        columns[f"{name}_consistency"] = _plain(effects.consistency[:, place, 0])
        columns[f"{name}_arrow_{unit}"] = [
            None if any(value != value for value in arrow) else arrow
            for arrow in effects.mean_px[:, place, 0].tolist()
        ]
    return columns


def _plain(values: Any) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]


def _bases(
    subject: Subject,
    train: Sequence[int],
    held_out: Sequence[int],
    arguments: argparse.Namespace,
) -> "Sequence[BasisScore]":
    """Do features tell concepts better than neurons, principal directions, an untrained SAE?"""
    import torch
    from einops import rearrange

    from autoencoders.sae import build_autoencoder
    from features.bases import compare_bases, principal_directions, signed_units
    from features.record import record_features

    task = feature_inputs.task_of(arguments, subject.view)
    longest = max(subject.lengths[number] for number in (*train, *held_out))
    n_episodes = max(2, N_NEURON_FRAMES // longest)
    sides = []
    for episodes in (train, held_out):
        chosen = feature_inputs.some(episodes, n_episodes)
        parts = list(subject.vectors(chosen))
        record = record_features(subject.sae, iter(parts), subject.positions)
        sides.append((parts, record, subject.concepts(record, task)))
    read = [torch.cat([activations for activations, _, _ in parts]) for parts, _, _ in sides]
    vectors = rearrange(read[0], "frame token dim -> (frame token) dim")
    directions = principal_directions(vectors)
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        untrained = build_autoencoder(subject.sae.architecture, **subject.sae.hyper_parameters)
    untrained.to(subject.device).initialise(vectors)
    untrained.calibrate([vectors[torch.randperm(len(vectors))[:N_CALIBRATION_VECTORS]]])
    at_random = [
        record_features(untrained, iter(parts), subject.positions) for parts, _, _ in sides
    ]
    live = sides[0][1].latent.unique().tolist()
    bases = {
        "features": tuple(record.frames_by_latents(live) for _, record, _ in sides),
        "neurons": tuple(signed_units(each).cpu() for each in read),
        "principal directions": tuple(signed_units(each @ directions.T).cpu() for each in read),
        "untrained autoencoder": tuple(record.frames_by_latents() for record in at_random),
    }
    return compare_bases(bases, sides[0][2], sides[1][2], min(5, len(live)))


def _telling(found: "FeatureDescriptions") -> dict[str, list[int]]:
    """Features whose best concept, chosen on training frames, holds on held-out frames.

    An AUROC of at least 0.9 (above, or below 0.1, where the feature stands for the opposite) of a
    binary concept, |r| of at least 0.7 of a continuous one, and p <= 0.05 where it is known.
    """
    telling = {}
    for name, is_binary, least in (("binary", True, 0.4), ("continuous", False, 0.7)):
        best = found.best(is_binary)
        far = (best.held_out - (0.5 if is_binary else 0.0)).abs() >= least
        by_chance = best.p > 0.05
        telling[name] = found.latents[far & ~by_chance].tolist()
    return telling


def _score(score: "BasisScore") -> dict[str, Any]:
    """One score in plain values."""
    from dataclasses import asdict

    values = asdict(score)
    return {
        name: None if isinstance(value, float) and value != value else value
        for name, value in values.items()
    }


# Pictures


def _draw(
    folder: Path,
    subject: Subject,
    record: "FeatureRecord",
    found: "FeatureDescriptions",
    effects: "FeatureEffects | None",
    density: Any,
    arguments: argparse.Namespace,
) -> None:
    """Draw features on their frames, what they tell, and how they share the work."""
    from autoencoders.metrics import density_histogram
    from callbacks.feature_findings import draw_features
    from rendering.charts import density_chart, strength_chart
    from rendering.picture import write_png

    titles = _titles(found, effects, subject.data.loaded_policy.action_unit)
    strip = draw_features(
        record,
        subject.data.demonstrations,
        subject.view,
        titles,
        arguments.n_features_shown,
        "Each row: the held-out frames where a feature is strongest, with its activation; colours "
        "from 0 to the row's largest. Concepts: chosen on training episodes, measured on these.",
    )
    if strip is not None:
        write_png(folder / STRIP_FILE, strip)
    edges, counts = density_histogram(density)
    write_png(folder / DENSITY_FILE, density_chart(edges, counts))
    shown = list(titles)[:N_CHART_FEATURES]
    if not shown:
        return
    place = {latent: row for row, latent in enumerate(found.latents.tolist())}
    associations = found.held_out_associations
    scale = np.array([2.0 if binary else 1.0 for binary in associations.is_binary])
    strengths = associations.deviation[[place[latent] for latent in shown]].numpy() * scale
    chart = strength_chart(
        strengths,
        [f"feature {latent}" for latent in shown],
        list(associations.names),
        "held out: |r| of continuous, |2 AUROC - 1| of binary concepts",
    )
    write_png(folder / CONCEPTS_FILE, chart)


def _titles(
    found: "FeatureDescriptions", effects: "FeatureEffects | None", unit: str
) -> dict[int, str]:
    """The features that tell concepts best on held-out frames, and in which words.

    The best feature of every concept comes first, as training frames chose it.
    """
    from callbacks.feature_findings import best_features, concept_titles

    best = best_features(found.train_associations, found.held_out_associations)
    titles = {}
    for row, title in concept_titles(best).items():
        if effects is not None and effects.n_frames[row] > 0:
            title += f"; ablated {float(effects.magnitude_px[row, 0, 0]):.1f} {unit}"
        titles[int(found.latents[row])] = title
    return titles


# The table on the screen


def _print(
    console: Any, summary: Mapping[str, Any], more: Mapping[str, Any], bases: Sequence[Any]
) -> None:
    """Print what was found: fidelity, behaviour, and the best feature of every concept."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    fidelity, behaviour, effects = more["fidelity"], more["behaviour"], more["effects"]
    unit = more["action_unit"]

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(
        f"{summary['n_live']} of {summary['n_latents']} features fire; FVU {fidelity['fvu']:.4f}, "
        f"L0 {fidelity['l0']:.1f} on held-out episodes"
    )
    if behaviour is None:
        say("no behaviour and no effects: reconstructions cannot be put back into the policy")
    else:
        score, moved = behaviour["action_score"], behaviour[f"sae_{unit}"]
        say(
            f"acting on reconstructions moves actions by {moved['value']:.2f} {unit}; action score "
            f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"
        )
    if effects is not None:
        say(
            f"ablating a feature moves the action by {effects[f'median_ablated_{unit}']:.3g} "
            f"{unit} in the median, {effects[f'max_ablated_{unit}']:.3g} {unit} at most; "
            f"{effects['zero_effect_rate_ablated']:.0%} move it by less than "
            f"{effects[f'zero_effect_below_{unit}']:.3g} {unit}"
        )
    binary, continuous = (len(more["telling"][kind]) for kind in ("binary", "continuous"))
    say(
        f"on held-out episodes {binary} features tell a binary concept with an AUROC of at least "
        f"0.9, {continuous} a continuous one with |r| of at least 0.7"
    )
    general = summary["general"]
    if general["share"] is not None:
        say(f"{general['share']:.0%} of the features are general: {general['rule']}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("concept", no_wrap=True)
    columns = ("best\nfeature", "measure", "held\nout", "p", "best\nneuron", "5 fea-\ntures")
    for name in (*columns, "5 neu-\nrons"):
        table.add_column(name, justify="right", no_wrap=True)
    scores = {(score.concept, score.basis): score for score in bases}

    def number(value: float | None) -> str:
        return "" if value is None or value != value else f"{value:.2f}"

    for name, entry in summary["concepts"].items():
        own, neurons = scores[name, "features"], scores[name, "neurons"]
        table.add_row(
            name,
            str(entry["latent"]),
            entry["measure"],
            number(entry["held_out"]),
            "" if entry["p"] is None else f"{entry['p']:.3f}",
            number(neurons.single),
            number(own.several),
            number(neurons.several),
        )
    console.print(table)
    say(
        "best feature and best neuron: chosen on training, measured on held-out episodes; five "
        "together: AUROC, or R2 of least squares"
    )
    say(f"episodes by {more['split']}")
