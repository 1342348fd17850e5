"""Our ACT equals LeRobot's, given its weights: forward, loss, gradients, ensembling."""

from dataclasses import replace

import pytest
import torch

from policies.act import ACTPolicy
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import Batch, Observation
from policies.lerobot_format import lerobot_name, load_lerobot_weights, network_to_lerobot

CHUNK, STATE, ACTION, BATCH = 7, 3, 2, 5


def build_pair(**changes):
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy as LeRobotACTPolicy

    torch.manual_seed(0)
    cameras = changes.pop("cameras", {"front": (96, 96), "side": (64, 128)})
    environment = changes.pop("environment_state_dim", 0)
    lerobot_changes = {
        "pre_norm": changes.get("pre_norm", False),
        "n_decoder_layers": changes.get("n_decoder_layers", 1),
        "use_vae": changes.get("use_latent", True),
        "feedforward_activation": changes.get("feedforward_activation", "relu"),
        "dropout": changes.get("dropout", 0.0),
    }
    inputs = {
        f"observation.images.{name}": PolicyFeature(type=FeatureType.VISUAL, shape=(3, *size))
        for name, size in cameras.items()
    }
    inputs["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(STATE,))
    if environment:
        inputs["observation.environment_state"] = PolicyFeature(
            type=FeatureType.ENV, shape=(environment,)
        )
    theirs = LeRobotACTPolicy(
        ACTConfig(
            input_features=inputs,
            output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION,))},
            chunk_size=CHUNK,
            n_action_steps=CHUNK,
            pretrained_backbone_weights=None,
            dim_model=32,
            n_heads=4,
            dim_feedforward=48,
            latent_dim=6,
            device="cpu",
            push_to_hub=False,
            **lerobot_changes,
        )
    )
    # Frozen norms start as the identity; give them values so that folding is really tested.
    for name, buffer in theirs.model.backbone.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith(("running_mean", "bias")):
            buffer.normal_(std=0.1)
        elif name.endswith("weight"):
            buffer.uniform_(0.5, 1.5)
    ours = ACTPolicy(
        cameras={name: list(size) for name, size in cameras.items()},
        state_dim=STATE,
        action_dim=ACTION,
        environment_state_dim=environment,
        chunk_size=CHUNK,
        dim_model=32,
        n_heads=4,
        dim_feedforward=48,
        latent_dim=6,
        **{"dropout": 0.0, **changes},
    )
    load_lerobot_weights(ours.network, theirs.state_dict())
    return ours, theirs


def identity_normaliser(policy):
    for feature in policy.normaliser.modules():
        if hasattr(feature, "offset"):
            feature.set(torch.zeros_like(feature.offset), torch.ones_like(feature.scale))


def random_batch(policy):
    generator = torch.Generator().manual_seed(3)
    schema = policy.data_schema
    observation = Observation(
        images={
            name: torch.rand(BATCH, 3, *size, generator=generator)
            for name, size in schema.cameras.items()
        },
        state=torch.randn(BATCH, STATE, generator=generator),
        environment_state=torch.randn(BATCH, schema.environment_state_dim, generator=generator)
        if schema.environment_state_dim
        else None,
    )
    is_pad = torch.zeros(BATCH, CHUNK, dtype=torch.bool)
    is_pad[1, 4:] = True
    is_pad[2, 1:] = True
    return Batch(
        observation=observation,
        actions=torch.randn(BATCH, CHUNK, ACTION, generator=generator),
        action_is_pad=is_pad,
        episode_index=torch.zeros(BATCH, dtype=torch.long),
        frame_index=torch.arange(BATCH),
    )


def to_lerobot(batch):
    values = {
        f"observation.images.{name}": image for name, image in batch.observation.images.items()
    }
    values["observation.state"] = batch.observation.state
    if batch.observation.environment_state is not None:
        values["observation.environment_state"] = batch.observation.environment_state
    values["action"] = batch.actions
    values["action_is_pad"] = batch.action_is_pad
    return values


VARIANTS = {
    "default": {},
    "pre_norm": {"pre_norm": True, "feedforward_activation": "gelu"},
    "two_decoder_layers": {"n_decoder_layers": 2},
    "no_latent": {"use_latent": False},
    "environment_state": {"environment_state_dim": 4},
    "one_camera": {"cameras": {"image": (96, 96)}},
}


def in_float64(policy_or_batch):
    if isinstance(policy_or_batch, torch.nn.Module):
        return policy_or_batch.double()
    observation = policy_or_batch.observation
    environment = observation.environment_state
    return replace(
        policy_or_batch,
        observation=Observation(
            images={name: image.double() for name, image in observation.images.items()},
            state=observation.state.double(),
            environment_state=None if environment is None else environment.double(),
        ),
        actions=policy_or_batch.actions.double(),
    )


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, torch.float32) for variant in VARIANTS]
    # In float64 the bound is tight: agreement is a law, not a matter of rounding.
    + [("default", torch.float64), ("two_decoder_layers", torch.float64)],
)
def test_equals_lerobot_in_eval_and_training(variant, dtype):
    ours, theirs = build_pair(**VARIANTS[variant])
    identity_normaliser(ours)
    batch = random_batch(ours)
    bound = 1e-5
    if dtype == torch.float64:
        ours, theirs, batch = in_float64(ours), in_float64(theirs), in_float64(batch)
        bound = 1e-12
    if dtype == torch.float32:  # LeRobot's inference path is float32 only
        ours.eval()
        theirs.eval()
        with torch.no_grad():
            expected = theirs.predict_action_chunk(to_lerobot(batch))
            torch.testing.assert_close(
                ours.predict_chunk(batch.observation), expected, atol=bound, rtol=bound
            )
            for queries in ([0], [6, 2], [0, 3, 5]):
                torch.testing.assert_close(
                    ours.predict_chunk(batch.observation, queries),
                    expected[:, queries],
                    atol=bound,
                    rtol=bound,
                )

    ours.train()
    theirs.train()
    torch.manual_seed(11)
    expected_loss, parts = theirs(to_lerobot(batch))
    expected_loss.backward()
    torch.manual_seed(11)
    loss = ours.loss(batch, kl_weight=theirs.config.kl_weight)
    loss.total.backward()
    torch.testing.assert_close(loss.total, expected_loss, atol=bound, rtol=bound)
    assert loss.l1.item() == pytest.approx(parts["l1_loss"], abs=bound)
    if ours.network.posterior is not None:
        assert loss.kl.item() == pytest.approx(parts["kld_loss"], abs=bound)

    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(g.abs().max().item() for g in their_gradients.values() if g is not None)
    errors = {}
    for name, parameter in ours.network.named_parameters():
        expected_gradient = their_gradients.pop(lerobot_name(f"network.{name}"))
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        if expected_gradient is None:
            expected_gradient = torch.zeros_like(parameter)
        error = (gradient - expected_gradient).abs().max().item()
        errors[name] = error
    assert not their_gradients
    assert len(errors) == len(list(theirs.named_parameters()))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound * largest, (worst, errors[worst], largest)


def test_state_dict_maps_one_to_one_both_ways():
    ours, theirs = build_pair()
    exported = network_to_lerobot(ours.network)
    assert set(exported) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(exported[name], value, atol=1e-6, rtol=0)


def test_loading_names_every_tensor_that_does_not_fit():
    ours, theirs = build_pair()
    weights = dict(theirs.state_dict())
    weights["model.action_head.wieght"] = weights.pop("model.action_head.weight")
    weights["model.action_head.bias"] = torch.zeros(9)
    with pytest.raises(
        ValueError, match=r"wieght.*missing tensor model.action_head.weight"
    ) as error:
        load_lerobot_weights(ours.network, weights)
    assert "model.action_head.bias has shape (9,), expected (2,)" in str(error.value)


def test_weights_without_the_posterior_load():
    ours, theirs = build_pair()
    weights = {k: v for k, v in theirs.state_dict().items() if "vae_encoder" not in k}
    load_lerobot_weights(ours.network, weights)


def test_dropout_on_constant_values_has_the_full_computations_moments():
    """The shortcut of the first decoder layer must not change what dropout does."""
    torch.manual_seed(0)
    ours, _ = build_pair(dropout=0.3)
    layer = ours.network.decoder.layers[0]
    attention = layer.self_attention.train()
    torch.nn.init.normal_(attention.in_proj_bias)
    positions = ours.network.query_positions
    zeros = torch.zeros(6000, CHUNK, 32)
    with torch.no_grad():
        full = attention((zeros + positions), (zeros + positions), zeros)
        short = attention.with_constant_value(positions[None], torch.zeros(32), batch=6000)
    torch.testing.assert_close(short.mean(0), full.mean(0), atol=0.05, rtol=0.05)
    torch.testing.assert_close(short.std(0), full.std(0), atol=0.03, rtol=0.1)
    # Per head and query the scale is shared by the head's dimensions, never across samples.
    assert short.std(0).min() > 0


@pytest.mark.parametrize("coefficient", [0.01, 0.0, -0.3, 2.0])
def test_ensembler_equals_lerobots(coefficient):
    from lerobot.policies.act.modeling_act import ACTTemporalEnsembler

    theirs = ACTTemporalEnsembler(coefficient, CHUNK)
    ours = TemporalEnsembler(coefficient, CHUNK)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        theirs.reset()
        ours.reset()
        for _ in range(3 * CHUNK):
            chunk = torch.randn(4, CHUNK, ACTION, generator=generator)
            torch.testing.assert_close(ours.step(chunk), theirs.update(chunk), atol=0, rtol=0)


def test_ensembling_leaves_agreeing_predictions_unchanged():
    ensembler = TemporalEnsembler(0.37, CHUNK)
    truth = torch.randn(40, ACTION)
    for step in range(40 - CHUNK):
        action = ensembler.step(truth[None, step : step + CHUNK])
        torch.testing.assert_close(action[0], truth[step])


def test_queue_plays_each_chunk_in_order_and_asks_when_empty():
    queue = ActionQueue(3)
    queue.reset(2)
    played = []
    for step in range(7):
        chunk = torch.full((2, CHUNK, 1), 10.0 * step) + torch.arange(CHUNK)[:, None]
        played.append(queue.step(chunk if queue.wants_prediction() else None)[0].item())
    assert played == [0, 1, 2, 30, 31, 32, 60]


def test_queue_refuses_what_it_cannot_play():
    queue = ActionQueue(3)
    with pytest.raises(ValueError, match="empty"):
        queue.step(None)
    with pytest.raises(ValueError, match="exceeds the chunk of 2"):
        queue.step(torch.zeros(1, 2, 1))
