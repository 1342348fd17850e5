"""``analyze.py features record``: activity of features on every frame, in Parquet."""

import argparse
import time

import numpy as np

from commands import feature_inputs
from commands.inputs import choose_episodes

METRICS_FILE = "metrics.json"
N_QUALITY_FRAMES = 2000
"""Frames on which fidelity is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    feature_inputs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record, measure and write.

    Raises:
        ValueError: For anything wrong with the arguments, the policy, the autoencoder or the data.
    """
    import torch
    from rich.console import Console

    from callbacks.feature_findings import quality_of
    from features.record import ACTIVATIONS_FILE, FRAMES_FILE, write_record
    from policies.atomic_files import write_atomically
    from policies.json_files import json_text

    files = (ACTIVATIONS_FILE, FRAMES_FILE, METRICS_FILE)
    folder = feature_inputs.output_folder(arguments, files)
    subject = feature_inputs.open_subject(arguments)
    episodes = choose_episodes(arguments.episode_idx or ["all"], list(subject.lengths))
    subject.load(episodes)
    began = time.perf_counter()
    record = subject.record(episodes, "Recording features")
    took_s = time.perf_counter() - began
    few = feature_inputs.some(
        episodes, max(1, N_QUALITY_FRAMES // max(subject.lengths[each] for each in episodes))
    )
    read = torch.cat([activations for activations, _, _ in subject.vectors(few)])
    quality = quality_of(subject.sae, read)
    write_record(folder, record)
    numbers = {
        "n_episodes": len(episodes),
        "n_frames": len(record),
        "n_tokens": len(record.positions),
        "n_active": len(record.value),
        "n_latents": record.n_latents,
        "n_live": int(np.unique(record.latent.numpy()).size),
        "l0": len(record.value) / (len(record) * len(record.positions)),
        "fvu": quality.fvu,
        "fvu_episodes": few,
        "frames_per_s": len(record) / took_s,
    }
    document = {**subject.metadata, "episodes": episodes, **numbers}
    write_atomically(folder / METRICS_FILE, json_text(document))
    console = Console(highlight=False)
    console.print(
        f"{numbers['n_frames']} frames of {numbers['n_episodes']} episodes, {numbers['n_tokens']} "
        f"tokens each: {numbers['n_active']} activations (L0 {numbers['l0']:.1f}) of "
        f"{numbers['n_live']} of {numbers['n_latents']} features; FVU {numbers['fvu']:.4f}; "
        f"{numbers['frames_per_s']:.0f} frames/s",
        soft_wrap=True,
    )
    if seen := {*episodes} & {*subject.split["train"]}:
        console.print(
            f"{len(seen)} of the episodes are ones that the autoencoder was trained on "
            f"({subject.split_note})",
            soft_wrap=True,
        )
    console.print(f"written to {folder}", soft_wrap=True)
    return 0
