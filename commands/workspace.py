"""``analyze.py workspace``: define what W&B shows of a run, and save it with an account."""

import argparse
from pathlib import Path

from callbacks.loggers import PROJECT
from callbacks.workspace import (
    account_entity,
    define_report,
    define_workspace,
    plan_sections,
    read_names,
    save,
    write_definitions,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--run_dir", required=True, metavar="RUN", help="run folder, e.g. outputs/demo/last"
    )
    parser.add_argument(
        "--entity", default="", help="W&B user or team (default: the one of the account)"
    )
    parser.add_argument(
        "--project", default=PROJECT, help="W&B project of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="also save both on the W&B server; needs WANDB_API_KEY or 'wandb login'",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write both definitions, save them if asked, and say where they are.

    Raises:
        ValueError: For a folder that is no run, no account, or a server that does not save.
    """
    logged = read_names(Path(arguments.run_dir))
    entity = arguments.entity or (account_entity() if arguments.save else "")
    sections = plan_sections(logged)
    workspace = define_workspace(sections, entity, arguments.project)
    report = define_report(sections, entity, arguments.project)
    for file in write_definitions(Path(arguments.output_dir), workspace, report):
        print(file)
    panels = sum(len(section.panels) for section in sections)
    print(f"{len(logged.all)} names in {panels} panels of {len(sections)} sections")
    if arguments.save:
        for address in save(workspace, report):
            print(address)
    return 0
