"""Capture is a pure observer of our ACT and of LeRobot's, and says the truth about both."""

import copy

import pytest
import torch
from einops import rearrange
from lerobot_folders import SCHEMA, episode, lerobot_policy, to_lerobot

from attention.capture import attention_layers, capture_attention, open_attention
from attention.maps import captured_weights, query_attention, roll_out, self_attention
from policies.act import ACTPolicy
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import DataSchema, Observation
from policies.lerobot_format import load_lerobot_weights
from policies.tokens import TokenLayout

N_STEPS = 200


def our_policy(schema: DataSchema = SCHEMA, **changes) -> ACTPolicy:
    """A small ACT that works in the data's own units."""
    torch.manual_seed(1)
    policy = ACTPolicy(
        cameras={name: list(size) for name, size in schema.cameras.items()},
        state_dim=schema.state_dim,
        action_dim=schema.action_dim,
        environment_state_dim=schema.environment_state_dim,
        **{
            "chunk_size": 7,
            "n_action_steps": 5,
            "latent_dim": 6,
            "dim_model": 32,
            "n_heads": 4,
            "dim_feedforward": 48,
            "n_encoder_layers": 2,
            "n_posterior_layers": 1,
            "backbone": "small_cnn",
            "backbone_width": 16,
            "token_stride": 16,
            **changes,
        },
    ).eval()
    for feature in policy.normaliser.modules():
        if hasattr(feature, "offset"):
            feature.set(torch.zeros_like(feature.offset), torch.ones_like(feature.scale))
    return policy


def hooks(network) -> int:
    """Hooks of all kinds in a network."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()
    )


@pytest.mark.parametrize("controller", ["queue", "ensembler"])
def test_our_actions_are_the_same_bits_when_somebody_looks(controller):
    policy = our_policy()
    observations = episode(N_STEPS)

    def act(looking: bool) -> torch.Tensor:
        ours = ActionQueue(5) if controller == "queue" else TemporalEnsembler(0.01, 7)
        actions = []
        for observation in observations:
            chunk = None
            if ours.wants_prediction():
                if looking:
                    with torch.no_grad(), capture_attention(policy.network) as capture:
                        chunk = policy.predict_chunk(observation)
                    assert capture.weights.cross()[0].shape == (1, 4, 7, 6)
                else:
                    with torch.no_grad():
                        chunk = policy.predict_chunk(observation)
            actions.append(ours.step(chunk))
        return torch.cat(actions)

    plain = act(looking=False)
    assert plain.std(0).min() > 0
    assert torch.equal(plain, act(looking=True))


@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_lerobots_actions_are_the_same_bits_when_somebody_looks(coefficient):
    more = {} if coefficient is None else {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}
    policy, preprocessor, _ = lerobot_policy("act", **more)
    batches = [preprocessor(to_lerobot(observation)) for observation in episode(N_STEPS)]

    def act(looking: bool) -> torch.Tensor:
        policy.reset()
        actions, n_forwards = [], 0
        for batch in batches:
            if looking:
                with capture_attention(policy.model) as capture:
                    actions.append(policy.select_action(dict(batch)))
                n_forwards += capture.take() is not None
            else:
                actions.append(policy.select_action(dict(batch)))
        # No forward pass of its own: one for each chunk that was asked for.
        assert n_forwards == (looking and (N_STEPS if coefficient else N_STEPS // 5))
        return torch.cat(actions)

    plain = act(looking=False)
    assert plain.std(0).min() > 0
    assert torch.equal(plain, act(looking=True))


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("whose", ["ours", "lerobot"])
def test_nothing_is_left_behind_by_an_exception(whose, differentiable):
    network = our_policy().network if whose == "ours" else lerobot_policy("act")[0].model
    before, state = hooks(network), set(network.__dict__)

    def fail() -> None:
        with capture_attention(network, differentiable=differentiable):
            assert hooks(network) > before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert hooks(network) == before
    assert set(network.__dict__) == state


def test_a_wrong_layer_is_refused_before_any_hook():
    network = our_policy().network
    with (
        pytest.raises(ValueError, match=r"encoder\.7.*encoder\.0"),
        capture_attention(network, ["encoder.0", "encoder.7"]),
    ):
        pass
    assert hooks(network) == 0
    with pytest.raises(TypeError, match="ACT"):
        attention_layers(torch.nn.Linear(2, 2))


def test_a_capture_without_a_forward_pass_says_so():
    policy = our_policy()
    with capture_attention(policy.network) as capture:
        assert capture.take() is None
        with pytest.raises(RuntimeError, match="queue"):
            _ = capture.weights
        policy.predict_chunk(episode(1)[0])
        assert capture.take() is not None
        assert capture.take() is None


@pytest.fixture(scope="module")
def pair():
    """LeRobot's ACT with two cameras of different sizes, and ours with its weights."""
    cameras = {"front": (96, 96), "side": (64, 130)}
    schema = DataSchema(cameras=cameras, state_dim=2, action_dim=2)
    from policies.lerobot_config import build_config, build_policy

    config = build_config(
        "act",
        {
            "n_action_steps": 5,
            "dim_model": 32,
            "n_heads": 4,
            "dim_feedforward": 48,
            "n_encoder_layers": 2,
            "n_decoder_layers": 2,
        },
        schema,
        7,
    )
    torch.manual_seed(0)
    theirs = build_policy(config).eval()
    ours = our_policy(
        schema, backbone="resnet18", token_stride=32, n_decoder_layers=2, latent_dim=32
    )
    # Weights of the posterior play no part here.
    given = {
        name: value for name, value in theirs.state_dict().items() if "vae_encoder" not in name
    }
    load_lerobot_weights(ours.network, given)
    observation = Observation(
        images={name: torch.rand(3, 3, *size) for name, size in cameras.items()},
        state=torch.randn(3, 2),
    )
    return ours, theirs, observation


def lerobot_forward(policy, observation: Observation) -> torch.Tensor:
    batch = to_lerobot(observation) | {
        f"observation.images.{name}": image for name, image in observation.images.items()
    }
    batch["observation.images"] = [batch[key] for key in policy.config.image_features]
    return policy.model(batch)[0]


@pytest.mark.parametrize("differentiable", [False, True])
def test_the_same_weights_come_from_both_networks(pair, differentiable):
    ours, theirs, observation = pair
    with torch.no_grad():
        with capture_attention(ours.network, differentiable=differentiable) as mine:
            ours.predict_chunk(observation)
        with capture_attention(theirs.model, differentiable=differentiable) as other:
            lerobot_forward(theirs, observation)
    assert list(mine.weights.by_layer) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    for name, weights in mine.weights.by_layer.items():
        torch.testing.assert_close(weights, other.weights.by_layer[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert weights.std() > 1e-4


def test_attention_in_the_open_equals_torchs():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4).double().eval()
    query, key, value = (torch.randn(n, 3, 32, dtype=torch.float64) for n in (5, 9, 9))
    is_pad = torch.zeros(3, 9, dtype=torch.bool)
    is_pad[1, 6:] = True
    output, weights = open_attention(attention, query, key, value, is_pad)
    expected, mean_weights = attention(query, key, value, key_padding_mask=is_pad)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.mean(1), mean_weights)


@pytest.mark.parametrize("whose", ["ours", "lerobot"])
def test_actions_depend_on_weights_that_are_captured_for_gradients(pair, whose):
    ours, theirs, observation = pair
    network = ours.network if whose == "ours" else theirs.model
    with capture_attention(network, differentiable=True) as capture:
        actions = (
            ours.predict_chunk(observation)
            if whose == "ours"
            else lerobot_forward(theirs, observation)
        )
    for weights in capture.weights.by_layer.values():
        (gradient,) = torch.autograd.grad(actions.sum(), weights, retain_graph=True)
        assert gradient.abs().max() > 0


def test_layouts_of_known_networks(pair):
    ours, theirs, _ = pair
    one = our_policy(
        DataSchema({"top": (96, 96)}, 2, 2), backbone="resnet18", token_stride=32
    ).network
    assert TokenLayout.of(one).grids == {"top": (3, 3)}
    assert TokenLayout.of(one).n_tokens == 11
    assert TokenLayout.of(ours.network) == TokenLayout.of(theirs.model)
    assert TokenLayout.of(theirs.model).grids == {"front": (3, 3), "side": (2, 5)}
    aloha = {"left": (480, 640), "right": (480, 640)}
    seen = {"front": aloha["left"], "side": aloha["right"]}
    assert TokenLayout.of(theirs.model, seen).n_tokens == 602


@pytest.mark.parametrize(
    ("state_dim", "environment_state_dim", "vectors"),
    [
        (0, 0, ("latent",)),
        (1, 0, ("latent", "state")),
        (0, 3, ("latent", "environment_state")),
        (2, 3, ("latent", "state", "environment_state")),
    ],
)
def test_layout_counts_the_tokens_that_the_network_sees(state_dim, environment_state_dim, vectors):
    schema = DataSchema({"a": (40, 50), "b": (32, 16)}, state_dim, 2, None, environment_state_dim)
    policy = our_policy(schema)
    layout = TokenLayout.of(policy.network)
    assert layout.vectors == vectors
    with torch.no_grad(), capture_attention(policy.network, ["decoder.0"]) as capture:
        policy.predict_chunk(episode(1, schema)[0])
    layout.check(capture.weights.layer("decoder.0").shape[-1])


def test_a_layout_of_other_pictures_names_both_numbers(pair):
    ours, theirs, observation = pair
    wrong = TokenLayout.of(theirs.model, {"front": (96, 96), "side": (96, 96)})
    with torch.no_grad(), capture_attention(theirs.model) as capture:
        lerobot_forward(theirs, observation)
    with pytest.raises(ValueError, match=r"21 tokens.*20"):
        wrong.split(query_attention(capture.weights, [0]))
    with pytest.raises(ValueError, match="side"):
        TokenLayout.of(theirs.model, {"front": (96, 96)})
    with pytest.raises(ValueError, match="resize"):
        TokenLayout.of(ours.network, {"front": (96, 96), "side": (64, 64)})
    with pytest.raises(TypeError, match="ACT"):
        TokenLayout.of(torch.nn.Linear(2, 2))


def test_every_token_finds_its_place_again():
    layout = TokenLayout(("latent", "state"), {"a": (32, 64), "b": (64, 32)}, 32)
    values = torch.arange(layout.n_tokens).float()
    vectors, cameras = layout.split(values)
    assert vectors["state"] == layout.index("state")
    for name, (rows, columns) in layout.grids.items():
        for row in range(rows):
            for column in range(columns):
                assert cameras[name][row, column] == layout.index(name, (row, column))
    with pytest.raises(ValueError, match="no token"):
        layout.index("a", (1, 0))


def test_rollout_is_the_product_of_all_layers(pair):
    ours, _, observation = pair
    with torch.no_grad(), capture_attention(ours.network) as capture:
        ours.predict_chunk(observation)
    weights = capture.weights
    product = torch.eye(21).expand(3, 21, 21)
    for layer in weights.encoder():
        product = (layer.mean(1) / 2 + torch.eye(21) / 2) @ product
    start = query_attention(weights, [2, 4])
    expected = rearrange(start, "batch token -> batch 1 token") @ product
    rolled = roll_out(weights, start)
    torch.testing.assert_close(rolled, expected[:, 0])
    torch.testing.assert_close(rolled.sum(-1), torch.ones(3))


def test_one_head_and_layer_of_one_query(pair):
    ours, _, observation = pair
    with torch.no_grad(), capture_attention(ours.network) as capture:
        ours.predict_chunk(observation)
    weights = capture.weights
    torch.testing.assert_close(
        query_attention(weights, [3], layer=0, head=2), weights.layer("decoder.0")[:, 2, 3]
    )
    torch.testing.assert_close(
        self_attention(weights, token=5, layer=1, head=1), weights.layer("encoder.1")[:, 1, 5]
    )
    for wrong in ({"layer": 2}, {"head": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            query_attention(weights, [0], **wrong)
    with pytest.raises(ValueError, match="decoded"):
        query_attention(weights, [9])


def test_queries_alone_have_the_weights_that_they_have_in_the_whole_chunk():
    policy = our_policy()
    observation = episode(1)[0]
    found = []
    for queries in ([2, 4], None):
        with torch.no_grad(), capture_attention(policy.network) as capture:
            policy.predict_chunk(observation, queries)
        found.append(query_attention(capture.weights, [2, 4]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("n_decoder_layers", [1, 2])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_weights_alone_are_those_of_a_whole_prediction(n_decoder_layers, pre_norm):
    policy = our_policy(n_decoder_layers=n_decoder_layers, pre_norm=pre_norm)
    observation = Observation(
        {"image": torch.rand(3, 3, 32, 32)}, torch.randn(3, 2) if SCHEMA.state_dim else None
    )
    with torch.no_grad(), capture_attention(policy.network) as capture:
        policy.predict_chunk(observation)
    found = captured_weights(policy, observation, [1, 4])
    assert list(found.by_layer) == list(capture.weights.by_layer)
    torch.testing.assert_close(found.encoder(), capture.weights.encoder())
    torch.testing.assert_close(
        query_attention(found, [1, 4]), query_attention(capture.weights, [1, 4])
    )
    alone = captured_weights(policy, observation, [1, 4], with_encoder=False)
    assert not alone.encoder()
    torch.testing.assert_close(alone.cross(), found.cross())


def test_a_copy_of_a_network_is_captured_by_itself():
    policy = our_policy()
    other = copy.deepcopy(policy)
    with capture_attention(policy.network) as capture:
        other.predict_chunk(episode(1)[0])
        assert capture.take() is None
