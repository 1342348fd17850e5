"""``analyze.py export``: a LeRobot policy folder from a policy trained here."""

import argparse
from pathlib import Path

from policies.act import ACTPolicy
from policies.lerobot_format import export_lerobot_act
from policies.loading import load_policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--n_action_steps",
        type=int,
        metavar="N",
        help="steps of each chunk that LeRobot executes; the policy's own when not given",
    )
    parser.add_argument(
        "--temporal_ensemble_coeff",
        type=float,
        metavar="M",
        help="let LeRobot predict at every step and average with weights exp(-M i)",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="USER/NAME",
        help="also upload the folder to this hub repository (needs a login; never by default)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and say how to run it.

    Raises:
        ValueError: If the policy cannot be loaded or LeRobot cannot represent it.
    """
    loaded = load_policy(arguments.policy_path)
    view = loaded.view
    folder = Path(arguments.output_dir)
    if isinstance(view, ACTPolicy):
        if arguments.n_action_steps is not None:
            if not 1 <= arguments.n_action_steps <= view.chunk_size:
                raise ValueError(
                    f"--n_action_steps {arguments.n_action_steps}: the policy predicts chunks of "
                    f"{view.chunk_size}; give 1 to {view.chunk_size}"
                )
            view.n_action_steps = arguments.n_action_steps
        try:
            export_lerobot_act(view, folder, arguments.temporal_ensemble_coeff)
        except FileExistsError as error:
            raise ValueError(str(error)) from error
    else:
        from policies.lerobot_view import LeRobotPolicyView

        if not isinstance(view, LeRobotPolicyView):
            raise ValueError(f"{loaded.source}: {type(view).__name__} has no LeRobot form")
        view.export_lerobot(folder)
    if arguments.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(arguments.push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=arguments.push_to_hub, folder_path=folder)
    print(f"written to {folder}; run it with: lerobot-eval --policy.path={folder} --env.type=pusht")
    return 0
