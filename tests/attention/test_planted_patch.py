"""Every method must find the one patch that a planted policy looks at."""

import pytest
import torch
from planted import CAMERAS, STRIDE, planted_pictures, planted_policy, window

from attention.method import Target
from attention.methods import METHODS
from policies.interface import Observation

PLACES = [
    (1, "top", (1, 2)),
    (2, "top", (0, 1)),
    (2, "wrist", (2, 0)),
    (3, "front", (3, 1)),
]
SETTINGS = {"integrated_gradients": {"n_steps": 10}, "occlusion": {"patch_px": 8}}
"""Cheaper than the defaults."""


@pytest.mark.parametrize(("n_cameras", "camera", "cell"), PLACES)
def test_the_planted_policy_depends_on_its_cell_alone(n_cameras, camera, cell):
    policy = planted_policy(n_cameras, camera, cell)
    seen = planted_pictures(n_cameras, camera, cell)
    action = policy.predict_chunk(seen)
    other = planted_pictures(n_cameras, camera, cell, seed=1)
    window(other.images[camera], cell).copy_(window(seen.images[camera], cell))
    torch.testing.assert_close(policy.predict_chunk(other), action, rtol=0, atol=0.6)
    dark = {name: images.clone() for name, images in seen.images.items()}
    window(dark[camera], cell).zero_()
    assert (action - policy.predict_chunk(Observation(dark, seen.state))).min() > 10


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("n_cameras", "camera", "cell"), PLACES)
def test_every_method_finds_the_planted_patch(name, n_cameras, camera, cell):
    policy = planted_policy(n_cameras, camera, cell)
    seen = planted_pictures(n_cameras, camera, cell)
    found = METHODS[name](**SETTINGS.get(name, {})).attribute(policy, seen, Target(queries=(0, 2)))
    assert list(found.maps) == list(CAMERAS)[:n_cameras]

    density = found.densities()
    peaks = {one: pixels.flatten(1).amax(1) for one, pixels in density.items()}
    for one, peak in peaks.items():
        assert one == camera or (peak < 0.5 * peaks[camera]).all(), one
    top = found.top_cells()[camera] * found.cells_px[camera] + found.cells_px[camera] / 2
    expected = STRIDE * torch.tensor(cell)
    assert ((top >= expected) & (top < expected + STRIDE)).all()

    # Grad-CAM shows brightness wherever it is: what raises the action is not where it is read.
    least = 0.25 if name == "grad_cam" else 0.85
    assert window(density[camera], cell).sum((1, 2)).min() > least
    states = [share for one, share in found.shares().items() if one in ("latent", "state")]
    assert all((share < 0.05).all() for share in states)
