"""Pictures of an episode: the simulator where it can be put into the states, else the recording."""

import numpy as np
import pytest
import torch
from einops import rearrange

from envs.push_t import PushTTask
from envs.replay import can_replay, episode_pictures, replay
from policies.interface import Batch, Observation

STATES = torch.tensor([[150.0, 300.0, 256.0, 300.0, 0.4], [170.0, 310.0, 250.0, 280.0, 0.9]])
ACTIONS = torch.tensor([[[160.0, 305.0], [0.0, 0.0]], [[400.0, 100.0], [0.0, 0.0]]])


def batch(images: torch.Tensor, states: torch.Tensor | None = STATES) -> Batch:
    return Batch(
        observation=Observation({"top": images}, torch.zeros(2, 2)),
        actions=ACTIONS,
        action_is_pad=torch.zeros(2, 2, dtype=torch.bool),
        episode_index=torch.zeros(2, dtype=torch.long),
        frame_index=torch.arange(2),
        simulator_state=states,
    )


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def test_states_of_the_tasks_simulator_are_drawn_with_the_action_of_now():
    task, frames = PushTTask(), batch(noise(8, 8))
    expected = replay(task, STATES.double().numpy(), ACTIONS[:, 0].double().numpy(), 96)
    for picture, same in zip(episode_pictures(task, frames, 96), expected, strict=True):
        np.testing.assert_array_equal(picture, same)


@pytest.mark.parametrize(
    ("task", "states"),
    [(None, STATES), (PushTTask(), None), (PushTTask(), torch.zeros(2, 14))],
    ids=["no task", "no states", "states of another simulator"],
)
def test_else_the_recording_is_enlarged_pixel_by_pixel(task, states):
    images = noise(8, 12)
    frames = batch(images, states)
    assert not can_replay(task, frames)
    pictures = np.stack(list(episode_pictures(task, frames, 32)))
    assert pictures.shape == (2, 32, 48, 3)
    blocks = rearrange(pictures, "t (h a) (w b) c -> t h w (a b) c", a=4, b=4)
    expected = rearrange(images, "t c h w -> t h w 1 c").numpy()
    np.testing.assert_array_equal(blocks, np.broadcast_to(expected, blocks.shape))


def test_a_larger_recording_is_averaged():
    """Picking single pixels of fine noise would keep its contrast."""
    images = noise(64, 64)
    pictures = np.stack(list(episode_pictures(None, batch(images), 16))).astype(float)
    cells = rearrange(images.double(), "t c (h a) (w b) -> t h w c (a b)", a=4, b=4)
    np.testing.assert_allclose(pictures, cells.mean(-1), atol=0.51)
