"""How far our ACT acts from LeRobot's: 300 recorded steps through LeRobot's ``select_action``.

    OMP_NUM_THREADS=1 python -m benchmarks.lerobot_agreement

LeRobot's ACT at its default size, trained for a few steps, is written with LeRobot's own
``save_pretrained`` and read by :func:`policies.loading.load_policy`. Both see the same recording,
once with LeRobot's action queue and once with its temporal ensembler. Prints the largest difference
of an action in px.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from datamodules.hdf5 import HDF5DataModule
from envs.demonstrations import collect
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import Batch
from policies.lerobot_config import build_config, build_policy, lerobot_statistics
from policies.lerobot_view import LeRobotPolicyView, processors_for
from policies.loading import load_policy

CHUNK = 20
EPISODES = 5
SETTINGS: dict[str, dict] = {
    "queue": {"n_action_steps": 8},
    "ensembler": {"n_action_steps": 1, "temporal_ensemble_coeff": 0.01},
}


def train(data: HDF5DataModule, settings: dict, n_steps: int) -> LeRobotPolicyView:
    """LeRobot's ACT at its default size, after a few of LeRobot's own training steps."""
    torch.manual_seed(0)
    config = build_config("act", settings, data.data_schema, CHUNK)
    policy = build_policy(config)
    statistics = lerobot_statistics(data.statistics, data.data_schema, "imagenet")
    view = LeRobotPolicyView(policy, *processors_for(config, statistics))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    batches = iter(data.train_dataloader())
    policy.train()
    for _ in range(n_steps):
        loss = policy.forward(view.training_batch(next(batches)))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    return view


def largest_difference(theirs: LeRobotPolicyView, folder: Path, recorded: list[Batch]) -> float:
    """Act on the same recording with both policies; the largest difference in px."""
    theirs.export_lerobot(folder)
    loaded = load_policy(str(folder))
    ours, coefficient = loaded.view, loaded.temporal_ensemble_coeff
    if coefficient is None:
        controller = ActionQueue(ours.n_action_steps)
    else:
        controller = TemporalEnsembler(coefficient, ours.chunk_size)
    differences = []
    with torch.no_grad():
        for episode in recorded:
            theirs.policy.reset()  # pyright: ignore[reportCallIssue]
            controller.reset(1)
            for step in range(len(episode)):
                seen = episode.observation.rows(slice(step, step + 1))
                assert seen.state is not None
                values = {"observation.state": seen.state}
                values["observation.image"] = seen.images["image"].float() / 255
                expected = theirs.postprocessor(
                    theirs.policy.select_action(theirs.preprocessor(values))
                )
                fresh = ours.predict_chunk(seen) if controller.wants_prediction() else None
                differences.append(float((controller.step(fresh) - expected).abs().max()))
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--training_steps", type=int, default=10)
    parser.add_argument("--recorded_steps", type=int, default=300)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "lerobot_agreement.json"
    )
    args = parser.parse_args()
    results: dict = {"training_steps": args.training_steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collect(folder / "demos.hdf5", EPISODES, progress=False)
        data = HDF5DataModule(
            str(folder / "demos.hdf5"), chunk_size=CHUNK, batch_size=8, val_fraction=0.0
        )
        data.setup()
        recorded, left = [], args.recorded_steps
        for number in data.source.episode_lengths:
            recorded.append(data.episode(number).rows(slice(0, left)))
            left -= len(recorded[-1])
        assert left == 0, f"the demonstrations are {left} steps short of {args.recorded_steps}"
        results["recorded_steps"] = args.recorded_steps
        for kind, settings in SETTINGS.items():
            theirs = train(data, settings, args.training_steps)
            difference = largest_difference(theirs, folder / kind, recorded)
            results[kind] = {**settings, "largest_difference_px": difference}
            print(f"{kind:<12}{args.recorded_steps} steps, largest difference {difference:.1e} px")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
