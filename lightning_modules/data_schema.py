"""What data a checkpoint was made for: stored in it, and compared when it is loaded."""

from typing import Any

from lightning.pytorch import Trainer

from policies.interface import DataSchema

SCHEMA_KEY = "data_schema"


def store_schema(checkpoint: dict[str, Any], schema: DataSchema) -> None:
    """Write the schema into a checkpoint, as plain values."""
    checkpoint[SCHEMA_KEY] = schema.to_dict()


def refuse_other_data(checkpoint: dict[str, Any], trainer: Trainer | None) -> None:
    """Refuse a checkpoint that was made for other data than the trainer's; without one do nothing.

    Raises:
        ValueError: If cameras or dimensions differ from the data set's; all are named.
    """
    made_for = DataSchema.from_dict(checkpoint[SCHEMA_KEY])
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return
    differences = made_for.differences(datamodule.data_schema)
    if differences:
        raise ValueError(
            "the checkpoint was made for other data (checkpoint != data set): "
            + "; ".join(differences)
            + ". Use the data set it was trained on, or train anew without --ckpt_path."
        )
