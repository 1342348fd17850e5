"""Keep a LeRobot folder of the newest weights in the run, ready for ``lerobot-eval``."""

import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from callbacks.schedule import Diagnostic
from policies.interface import Findings

FOLDER = "lerobot"
POLICY = "pretrained_model"


class LeRobotFolder(Diagnostic):
    """Write ``<run>/lerobot/pretrained_model/`` at checkpoints, with the weights being validated.

    The new folder is complete before it takes the old one's place.

    Args:
        every_n_validations: Validations from one folder to the next; the last always writes one.
        strict: Let an error (a policy that LeRobot cannot represent) stop the run.
    """

    def __init__(self, every_n_validations: int = 1, strict: bool = True):
        super().__init__(every_n_validations=every_n_validations, strict=strict)

    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Write the folder; there is nothing to log."""
        export = getattr(module, "export_lerobot", None)
        if export is None:
            raise TypeError(f"{type(module).__name__} has no LeRobot form: drop this callback")
        home = Path(trainer.default_root_dir) / FOLDER
        new, old = home / f".{POLICY}.part", home / f".{POLICY}.old"
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        home.mkdir(exist_ok=True)
        export(new)
        if (home / POLICY).exists():
            (home / POLICY).rename(old)
        new.rename(home / POLICY)
        shutil.rmtree(old, ignore_errors=True)
        return Findings()
