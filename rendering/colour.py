"""Numbers in, colours out: any of matplotlib's colour maps as a table, without its figures."""

from difflib import get_close_matches
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8


@cache
def colour_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """RGB of a matplotlib colour map from its low to its high end; shared, hence read-only.

    Args:
        name: As matplotlib calls it (``--colormap``): viridis, plasma, coolwarm, ...

    Raises:
        ValueError: When matplotlib has no map of that name.
    """
    from matplotlib import colormaps

    if name not in colormaps:
        by_lower_case = {known.lower(): known for known in colormaps}
        close = get_close_matches(name.lower(), by_lower_case)
        known = [by_lower_case[match] for match in close] or ["viridis", "plasma", "cividis"]
        raise ValueError(f"colormap {name!r}: matplotlib has none of that name; try {known}")
    table = np.ascontiguousarray(colormaps[name](np.linspace(0, 1, 256), bytes=True)[:, :3])
    table.flags.writeable = False
    return table


def colours(
    values: Float[np.ndarray, "row column"],
    value_range: tuple[float, float],
    table: UInt8[np.ndarray, "256 3"],
) -> UInt8[np.ndarray, "row column 3"]:
    """Look values up, in 256 equal steps of a fixed range as matplotlib does; no NaN.

    Args:
        values: Those beyond the range take the colour of its end.
        value_range: Values at the low and the high end of the table.
        table: From :func:`colour_table`.
    """
    low, high = value_range
    steps = (np.asarray(values, np.float64) - low) * (256 / (high - low))
    # Truncation is the floor here: nothing is negative any more.
    return table[np.clip(steps, 0, 255).astype(np.uint8)]
