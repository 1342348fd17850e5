from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange

from envs.perturbations import (
    Lighting,
    Noise,
    OccludedObject,
    PerturbedPolicy,
    ShiftedCamera,
)
from envs.push_t import PushT, PushTTask
from policies.interface import Batch, Observation

SIZE = 48
STATES = torch.tensor(
    [
        [100.0, 120.0, 300.0, 250.0, 0.5],
        [400.0, 80.0, 200.0, 330.0, 2.0],
        [256.0, 60.0, 150.0, 150.0, 5.0],
    ]
).double()


def picture(env: PushT, state: torch.Tensor) -> torch.Tensor:
    env.reset_to(state.numpy())
    return rearrange(torch.from_numpy(env.image()), "h w rgb -> rgb h w")


@pytest.fixture(scope="module")
def batch() -> Batch:
    env = PushT(SIZE)
    images = torch.stack([picture(env, state) for state in STATES])
    env.close()
    return Batch(
        observation=Observation(images={"image": images}, state=STATES[:, :2].float()),
        actions=torch.zeros(3, 4, 2),
        action_is_pad=torch.zeros(3, 4, dtype=torch.bool),
        episode_index=torch.arange(3),
        frame_index=torch.arange(3),
        simulator_state=STATES,
    )


def shown(batch: Batch) -> torch.Tensor:
    return batch.observation.images["image"]


PERTURBATIONS = [
    Lighting(gain=0.5),
    Noise(0.1),
    ShiftedCamera(right_px=3, down_px=-2),
    ShiftedCamera(rotation_deg=7),
    OccludedObject(PushTTask(image_size=SIZE)),
    OccludedObject(PushTTask(image_size=SIZE), mode="patch"),
]


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda each: each.name)
def test_only_pictures_change_and_each_by_itself(batch, perturbation):
    before = shown(batch).clone()
    changed = perturbation.apply(batch)
    assert torch.equal(shown(batch), before)
    assert shown(changed).dtype == torch.uint8
    assert (shown(changed) != before).flatten(1).any(1).all()
    for name in ("actions", "action_is_pad", "episode_index", "simulator_state"):
        assert getattr(changed, name) is getattr(batch, name)
    assert changed.observation.state is batch.observation.state
    alone = perturbation.apply(batch.rows(slice(1, 2)))
    assert torch.equal(shown(alone)[0], shown(changed)[1])
    # Pictures in 0..1 show the same, to a grey level.
    floating = replace(
        batch, observation=replace(batch.observation, images={"image": before.float() / 255})
    )
    if not isinstance(perturbation, Noise):
        torch.testing.assert_close(
            shown(perturbation.apply(floating)), shown(changed).float() / 255, atol=1 / 255, rtol=0
        )


@pytest.mark.parametrize(
    "perturbation",
    [
        Lighting(),
        Noise(0.0),
        ShiftedCamera(),
        ShiftedCamera(rotation_deg=360),
        OccludedObject(
            PushTTask(image_size=SIZE), mode="patch", object_name="agent", dilation_px=0
        ),
    ],
    ids=lambda each: each.name,
)
def test_nothing_is_nothing(batch, perturbation):
    if isinstance(perturbation, OccludedObject):
        # The agent of the middle frame, and not a pixel beyond its disc.
        different = (shown(perturbation.apply(batch)) != shown(batch)).any(1)[1]
        row, column = different.nonzero().double().mean(0).tolist()
        assert (column + 0.5) * 512 / SIZE == pytest.approx(400, abs=6)
        assert (row + 0.5) * 512 / SIZE == pytest.approx(80, abs=6)
        assert different.sum() * (512 / SIZE) ** 2 == pytest.approx(np.pi * 15**2, rel=0.4)
    else:
        assert torch.equal(shown(perturbation.apply(batch)), shown(batch))


def test_light_is_gain_and_offset(batch):
    seen = shown(batch).double() / 255
    dark = shown(Lighting(gain=0.4, offset=0.1, colour=(1.0, 0.5, 1.0)).apply(batch))
    expected = seen * 0.4 * torch.tensor([1.0, 0.5, 1.0])[:, None, None] + 0.1
    torch.testing.assert_close(dark.double() / 255, expected, atol=0.51 / 255, rtol=0)
    bright = shown(Lighting(gain=9.0).apply(batch))
    assert bright.max() == 255


def test_whole_pixels_are_shifted_exactly_and_the_edge_repeats(batch):
    seen, moved = shown(batch), shown(ShiftedCamera(right_px=5, down_px=-3).apply(batch))
    assert torch.equal(moved[..., :-3, 5:], seen[..., 3:, :-5])
    assert torch.equal(moved[..., :-3, 0], seen[..., 3:, 0])
    assert torch.equal(moved[..., -1, 5:], seen[..., -1, :-5])


def test_a_quarter_turn_is_clockwise(batch):
    turned = shown(ShiftedCamera(rotation_deg=90).apply(batch))
    assert torch.equal(turned, torch.rot90(shown(batch), k=-1, dims=(-2, -1)))


def test_noise_has_its_size_and_belongs_to_the_picture(batch):
    grey = replace(
        batch,
        observation=replace(batch.observation, images={"image": torch.full((3, 3, 96, 96), 0.5)}),
    )
    noisy = shown(Noise(0.1).apply(grey)) - 0.5
    assert float(noisy[0].std()) == pytest.approx(0.1, rel=0.03)
    assert torch.equal(noisy[0], noisy[1])
    other = shown(Noise(0.1, seed=1).apply(grey)) - 0.5
    correlation = torch.corrcoef(torch.stack([noisy[0].flatten(), other[0].flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.03


def test_a_removed_block_is_nowhere(batch):
    task = PushTTask(image_size=SIZE)
    gone = OccludedObject(task).apply(batch)
    env = PushT(SIZE)
    for state, image in zip(STATES, shown(gone), strict=True):
        away = state.clone()
        away[2:4] = -1000.0
        assert torch.equal(image, picture(env, away))
    env.close()
    patched = shown(OccludedObject(task, mode="patch", grey=0.2).apply(batch))
    is_grey = (patched == 51).all(1)
    assert is_grey.flatten(1).sum(1).min() > 50
    outside = ~is_grey[:, None].expand_as(patched)
    assert torch.equal(patched[outside], shown(batch)[outside])


def test_histories_are_perturbed_at_every_instant(batch):
    history = replace(batch.observation, images={"image": torch.stack([shown(batch)] * 2, dim=1)})
    dark = Lighting(gain=0.5)
    seen = dark.observe(history).images["image"]
    assert torch.equal(seen[:, 0], shown(dark.apply(batch)))
    assert torch.equal(seen[:, 1], seen[:, 0])
    with pytest.raises(ValueError, match="show a history"):
        OccludedObject(PushTTask(image_size=SIZE)).apply(replace(batch, observation=history))


def test_a_perturbed_policy_sees_what_recorded_frames_show(batch):
    class Brightness:
        data_schema = PushTTask(image_size=SIZE).data_schema()
        chunk_size = n_action_steps = n_obs_steps = 1

        def predict_chunk(self, observation, queries=None):
            mean = observation.images["image"].double().mean((1, 2, 3))
            return mean[:, None, None].expand(-1, 1, 2)

    dark = Lighting(gain=0.5)
    policy = PerturbedPolicy(Brightness(), dark)
    found = policy.predict_chunk(batch.observation)
    assert torch.equal(found, Brightness().predict_chunk(dark.apply(batch).observation))
    assert policy.chunk_size == 1


def test_what_cannot_be_hidden_is_refused(batch):
    task = PushTTask(image_size=SIZE)
    with pytest.raises(ValueError, match="nobody knows where"):
        OccludedObject(task).apply(replace(batch, simulator_state=None))
    with pytest.raises(ValueError, match="'cup'"):
        OccludedObject(task, "cup").apply(batch)
    with pytest.raises(ValueError, match="make the task for the data"):
        OccludedObject(PushTTask(image_size=96)).apply(batch)
    with pytest.raises(ValueError, match=r"grey is 2"):
        OccludedObject(task, grey=2.0)
    with pytest.raises(ValueError, match="not be negative"):
        Noise(-0.1)
