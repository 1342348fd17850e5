"""Keep the newest autoencoder in the run, as a folder that loads alone."""

from pathlib import Path
from typing import override

from lightning.pytorch import LightningModule, Trainer

from autoencoders.files import AUTOENCODER_FOLDER
from callbacks.schedule import Diagnostic
from lightning_modules.sae import SAEModule
from policies.interface import Findings


class AutoencoderFolder(Diagnostic):
    """Write ``<run>/autoencoder/`` at checkpoints, readable here and by SAELens.

    Args:
        every_n_validations: Validations from one folder to the next; the last always writes one.
        strict: Let an error stop the run.
    """

    def __init__(self, every_n_validations: int = 1, strict: bool = True):
        super().__init__(every_n_validations=every_n_validations, strict=strict)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse runs that train no autoencoder.

        Raises:
            TypeError: Naming what is trained.
        """
        if not isinstance(pl_module, SAEModule):
            raise TypeError(
                f"{type(pl_module).__name__} trains no autoencoder: leave "
                "callbacks.autoencoder_folder.AutoencoderFolder out"
            )

    @override
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Write the folder; there is nothing to log."""
        assert isinstance(module, SAEModule)
        module.save_autoencoder(Path(trainer.default_root_dir) / AUTOENCODER_FOLDER)
        return Findings()
