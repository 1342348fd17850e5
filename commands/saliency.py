"""``analyze.py saliency``: which parts of the pictures, and of the state, an action depends on."""

import argparse

from commands.attention import add_common_arguments, add_method, explain_episodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    from attention.methods import SALIENCY_METHODS

    costs = (
        "a frame takes one forward pass, 50 to 450 or some 150, and with gradients each comes with "
        "a backward pass for every coordinate of actions"
    )
    add_method(parser, SALIENCY_METHODS, "integrated_gradients", costs)
    parser.add_argument(
        "--n_steps",
        type=int,
        metavar="N",
        help="of integrated_gradients, to begin with; up to nine times as many where its "
        "completeness_error stays above 3 %% (default: 50)",
    )
    parser.add_argument(
        "--baseline",
        choices=("mean", "black"),
        help="what stands for nothing: the data's mean colour, or black (default: mean)",
    )
    parser.add_argument(
        "--patch_px",
        type=int,
        metavar="PX",
        help="side of the patches of occlusion (default: about 12 along the shorter side)",
    )
    add_common_arguments(parser, "grad_cam and integrated_gradients")


def run(arguments: argparse.Namespace) -> int:
    """Explain, draw and write; print a table.

    Raises:
        ValueError: For anything wrong with the arguments, the policy or the data.
    """
    from attention.methods import SALIENCY_METHODS

    return explain_episodes(arguments, SALIENCY_METHODS)
