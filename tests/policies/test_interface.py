"""The contract between rooms."""

import pytest

from policies.interface import DataSchema
from policies.lerobot_format import camera_name, image_key

SCHEMA = DataSchema({"top": (48, 64), "wrist": (32, 32)}, state_dim=7, action_dim=7, fps=10.0)


def test_a_schema_survives_its_plain_values():
    assert DataSchema.from_dict(SCHEMA.to_dict()) == SCHEMA


def test_differences_name_what_a_policy_depends_on():
    other = DataSchema({"top": (48, 64)}, state_dim=7, action_dim=6, fps=50.0)
    assert [line.split(":")[0] for line in SCHEMA.differences(other)] == ["cameras", "action_dim"]
    assert SCHEMA.differences(SCHEMA) == []


def test_an_environment_state_matters_only_to_a_policy_that_reads_it():
    offering = DataSchema(SCHEMA.cameras, 7, 7, environment_state_dim=16)
    assert SCHEMA.differences(offering) == []
    assert offering.differences(SCHEMA) == ["environment_state_dim: 16 != 0"]


@pytest.mark.parametrize(
    "key",
    [
        "observation.image",
        "observation.images.top",
        "observation.images.image",
        "observation.image2",
        "observation.wrist_image",
        "observation.images.observation.image",
        "observation.images.left.rgb",
    ],
)
def test_every_lerobot_camera_key_comes_back(key):
    assert image_key(camera_name(key)) == key


def test_usual_cameras_have_short_names():
    assert camera_name("observation.images.top") == "top"
    assert camera_name("observation.image") == "image"
