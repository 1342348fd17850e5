"""What ACT refuses, and laws of its parts that parity does not cover."""

import pytest
import torch

from policies.act import ACTPolicy
from policies.backbones import SmallCNN, build_backbone, grid_size
from policies.interface import Observation
from policies.normalisation import AffineFeature

TINY = {"dim_model": 16, "n_heads": 2, "dim_feedforward": 16, "n_posterior_layers": 1}


def tiny(**changes):
    arguments = {
        "cameras": {"image": [32, 32]},
        "state_dim": 2,
        "action_dim": 2,
        "chunk_size": 5,
        "n_encoder_layers": 1,
        "backbone": "small_cnn",
        "token_stride": 8,
        **TINY,
    }
    policy = ACTPolicy(**{**arguments, **changes}).eval()
    for module in policy.normaliser.modules():
        if isinstance(module, AffineFeature):
            module.set(torch.full_like(module.offset, 0.5), torch.full_like(module.scale, 2.0))
    return policy


def observe(n=3, size=32):
    generator = torch.Generator().manual_seed(1)
    return Observation(
        {
            "image": torch.randint(
                0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator
            )
        },
        torch.randn(n, 2, generator=generator),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"n_action_steps": 6}, "n_action_steps=6"),
        ({"relative_actions": True, "action_dim": 3}, "state_dim=2 to equal action_dim=3"),
        ({"n_heads": 3}, "dim_model=16 is not divisible by n_heads=3"),
        ({"cameras": {}}, "at least one camera"),
        ({"n_decoder_layers": 0}, "n_decoder_layers=0"),
        ({"token_stride": 6}, "power of two"),
        ({"backbone": "resnet18", "token_stride": 8}, "use 32"),
        ({"backbone_weights": "ResNet18_Weights.IMAGENET1K_V1"}, "no pretrained weights"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_group_norm_refuses_weights_of_batch_norm():
    with pytest.raises(ValueError, match="set backbone_norm to frozen_batch"):
        build_backbone("resnet18", "group", 32, 32, "ResNet18_Weights.IMAGENET1K_V1")


def test_observations_that_do_not_fit_are_refused_by_name():
    policy = tiny()
    good = observe()
    with pytest.raises(ValueError, match="camera 'image' is missing; the observation has"):
        policy.predict_chunk(Observation({"front": good.images["image"]}, good.state))
    with pytest.raises(ValueError, match=r"gives \(3, 24, 24\)"):
        policy.predict_chunk(observe(size=24))
    with pytest.raises(ValueError, match="reads a state"):
        policy.predict_chunk(Observation(good.images))
    with pytest.raises(ValueError, match="must lie in"):
        policy.predict_chunk(good, queries=[5])


def test_relative_actions_move_with_the_state():
    policy = tiny(relative_actions=True)
    with torch.no_grad():
        chunk = policy.predict_chunk(observe())
    actions = policy.normalise_actions(chunk, observe())
    torch.testing.assert_close(policy.unnormalise_actions(actions, observe()), chunk)
    absolute = tiny(relative_actions=False)
    absolute.load_state_dict(policy.state_dict())
    with torch.no_grad():
        offset = chunk - absolute.predict_chunk(observe())
    torch.testing.assert_close(offset, observe().state[:, None].expand(-1, 5, -1))


def test_pictures_as_bytes_and_as_floats_are_the_same():
    policy, observation = tiny(), observe()
    floats = Observation({"image": observation.images["image"].float() / 255}, observation.state)
    with torch.no_grad():
        torch.testing.assert_close(policy.predict_chunk(observation), policy.predict_chunk(floats))


@pytest.mark.parametrize(("height", "width", "stride"), [(96, 96, 16), (50, 33, 8), (48, 64, 32)])
def test_the_grid_has_the_size_that_is_announced(height, width, stride):
    features = SmallCNN(16, stride)(torch.zeros(1, 3, height, width))
    assert tuple(features.shape[-2:]) == grid_size(height, width, stride)
    if stride >= 16:
        resnet = build_backbone("resnet18", "group", stride, 0, None)
        features = resnet(torch.zeros(1, 3, height, width))
        assert tuple(features.shape[1:]) == (
            resnet.out_channels,
            *grid_size(height, width, stride),
        )


def test_without_a_latent_there_is_no_posterior_to_ask():
    policy = tiny(use_latent=False)
    with pytest.raises(ValueError, match="use_latent=False"):
        policy.network.encode_posterior(
            torch.zeros(1, 2), torch.zeros(1, 5, 2), torch.zeros(1, 5, dtype=torch.bool)
        )


def test_padding_does_not_reach_the_posterior_or_the_loss():
    from dataclasses import replace

    from policies.interface import Batch

    policy = tiny()
    observation = observe(2)
    is_pad = torch.zeros(2, 5, dtype=torch.bool)
    is_pad[:, 3:] = True
    index = torch.arange(2)
    batch = Batch(observation, torch.randn(2, 5, 2), is_pad, index, index)
    other = batch.actions.clone()
    other[:, 3:] = 1000.0
    with torch.no_grad():
        torch.manual_seed(0)
        first = policy.loss(batch, 1.0)
        torch.manual_seed(0)
        second = policy.loss(replace(batch, actions=other), 1.0)
    torch.testing.assert_close(first.total, second.total)
