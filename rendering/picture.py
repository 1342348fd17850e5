"""One picture in, a file out."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from policies.atomic_files import whole_file


def write_png(path: Path, picture: UInt8[np.ndarray, "height width 3"]) -> Path:
    """Write an RGB picture; the file appears complete or not at all.

    Raises:
        OSError: If the folder cannot be written to.
    """
    content = encode_png(picture)
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path


def encode_png(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """An RGB picture as the bytes of a PNG."""
    import cv2

    _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return encoded.tobytes()
