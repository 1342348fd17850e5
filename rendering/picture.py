"""One picture in, a file out."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8


def write_png(path: Path, picture: UInt8[np.ndarray, "height width 3"]) -> Path:
    """Write an RGB picture; the file appears complete or not at all.

    Raises:
        OSError: If the folder cannot be written to.
    """
    import cv2

    _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(encoded.tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
