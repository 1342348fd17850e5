"""Maps as numbers: one row for each frame and method, in Parquet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from attention.attribution import Attribution
from attention.faithfulness import patch_grid
from policies.atomic_files import whole_file

if TYPE_CHECKING:
    import pyarrow

MOST_CELLS = 4096
"""A map of more cells is written on patches."""
N_PATCHES_ALONG = 48
"""Patches along the shorter side of such a map's picture."""


def map_table(
    attribution: Attribution,
    episode_index: Int[Tensor, " batch"],
    frame_index: Int[Tensor, " batch"],
) -> "pyarrow.Table":
    """Write one method's findings as columns.

    Columns: ``episode_index``, ``frame_index``, ``method``, ``queries``; ``share_<input>`` of each
    kind of input; ``entropy_nats``; for each camera ``map_<camera>``, row-major relevance that adds
    up to 1 over all cameras, with ``rows_<camera>`` and ``columns_<camera>``, and the most relevant
    cell as ``top_row_<camera>`` and ``top_column_<camera>``; where known ``state``,
    ``environment_state`` (signed relevance of each dimension) and ``completeness_error``.

    Args:
        attribution: Of some frames.
        episode_index: Number of each frame's episode.
        frame_index: Its step there.
    """
    import pyarrow as pa

    n_frames = len(attribution)
    columns: dict[str, Any] = {
        "episode_index": pa.array(episode_index.tolist(), pa.int64()),
        "frame_index": pa.array(frame_index.tolist(), pa.int64()),
        "method": pa.array([attribution.method] * n_frames, pa.string()),
        "queries": pa.array([list(attribution.queries)] * n_frames, pa.list_(pa.int32())),
    }
    for name, share in attribution.shares().items():
        columns[f"share_{name}"] = pa.array(share.tolist(), pa.float32())
    if attribution.maps:
        columns["entropy_nats"] = pa.array(attribution.entropy_nats().tolist(), pa.float32())
    masses, tops = attribution.picture_mass(), attribution.top_cells()
    coarse: Mapping[str, Tensor] = {}
    if any(mass[0].numel() > MOST_CELLS for mass in masses.values()):
        coarse = attribution.densities(patch_grid(attribution.image_sizes, N_PATCHES_ALONG))
    for name, mass in masses.items():
        cells = coarse[name] if mass[0].numel() > MOST_CELLS else mass
        flat = rearrange(cells, "batch row column -> batch (row column)").float().tolist()
        columns[f"map_{name}"] = pa.array(flat, pa.list_(pa.float32()))
        for label, size in zip(("rows", "columns"), cells.shape[1:], strict=True):
            columns[f"{label}_{name}"] = pa.array([size] * n_frames, pa.int32())
        for place, label in enumerate(("top_row", "top_column")):
            columns[f"{label}_{name}"] = pa.array(tops[name][:, place].tolist(), pa.int32())
    for name, values in attribution.dimensions.items():
        columns[name] = pa.array(values.float().tolist(), pa.list_(pa.float32()))
    if attribution.completeness_error is not None:
        error = attribution.completeness_error.tolist()
        columns["completeness_error"] = pa.array(error, pa.float32())
    return pa.table(columns)


def write_maps(path: Path, tables: "Sequence[pyarrow.Table]") -> Path:
    """Write tables of several methods or episodes below each other; complete, or not at all.

    Args:
        path: Of the Parquet file; replaced when it is there.
        tables: From :func:`map_table`; what one of them lacks is null there.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with whole_file(path) as temporary:
        parquet.write_table(pa.concat_tables(tables, promote_options="default"), temporary)
    return path
