"""A tap is exact: what is read there decides the action, and what is put back changes nothing."""

from collections.abc import Sequence

import pytest
import torch
from tiny_act import CHUNK, frames, tiny_act
from torch import Tensor, nn

from features.taps import (
    SITES,
    TokenPosition,
    capture_activations,
    continue_from,
    edit_activations,
    find_tap,
    read_activations,
)
from policies.interface import DataSchema, Observation

TWO_CAMERAS = {"cameras": {"top": [32, 48], "wrist.left": [17, 32]}}
VARIANTS = {
    "plain": {},
    "pre_norm": {"pre_norm": True},
    "two decoder layers": {"n_decoder_layers": 2, "n_encoder_layers": 2},
    "no latent": {"use_latent": False},
    "relative": {"relative_actions": True},
    "two cameras": TWO_CAMERAS,
    "no camera": {"cameras": {}, "environment_state_dim": 1},
}


def observe(policy, n: int = 5) -> Observation:
    generator = torch.Generator().manual_seed(n)
    seen = frames(n).observation
    images = {
        name: torch.randint(256, (n, 3, *size), dtype=torch.uint8, generator=generator)
        for name, size in policy.data_schema.cameras.items()
    }
    return Observation(images, seen.state, seen.environment_state)


@pytest.fixture(params=VARIANTS, scope="module")
def policy(request):
    return tiny_act(**VARIANTS[request.param])


def n_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_the_decoders_states_are_all_that_the_actions_depend_on(policy):
    observation = observe(policy)
    states = read_activations(policy, observation, "decoder")
    head = policy.network.action_head
    by_hand = states @ head.weight.T + head.bias
    torch.testing.assert_close(
        policy.unnormalise_actions(by_hand, observation), policy.predict_chunk(observation)
    )


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
@pytest.mark.parametrize("queries", [None, [0], [4, 1]])
def test_going_on_from_what_was_read_is_predicting(policy, layer, queries):
    observation = observe(policy)
    went_on = continue_from(
        policy, layer, read_activations(policy, observation, layer), observation, queries
    )
    predicted = policy.predict_chunk(observation, queries)
    if queries is None or layer == "encoder":
        assert torch.equal(went_on, predicted)
    torch.testing.assert_close(went_on, predicted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_going_on_takes_activations_of_another_dtype(layer):
    policy = tiny_act().float()
    observation = observe(policy)
    activations = read_activations(policy, observation, layer)
    assert activations.dtype == torch.float32
    went_on = continue_from(policy, layer, activations.double(), observation)
    torch.testing.assert_close(went_on, policy.predict_chunk(observation))


@pytest.mark.parametrize("layer", [*SITES, "network.encoder.layers.0.norm1", "network.backbone"])
def test_an_edit_that_changes_nothing_is_exact_to_the_last_bit(layer):
    policy = tiny_act()
    observation = observe(policy)
    expected = policy.predict_chunk(observation)
    for edit in (lambda x: x, lambda x: x.clone()):
        with edit_activations(policy, layer, edit):
            assert torch.equal(policy.predict_chunk(observation), expected)
    with edit_activations(policy, layer, lambda x: x + 0.1):
        assert not torch.equal(policy.predict_chunk(observation), expected)
    assert torch.equal(policy.predict_chunk(observation), expected)


@pytest.mark.parametrize("layer", ["encoder", "decoder", "backbone"])
def test_putting_in_what_was_read_elsewhere_carries_the_action_over(layer):
    """Activations of one observation, put into another, give the first one's actions.

    At ``backbone`` the state is not among them, so both have the same.
    """
    policy = tiny_act(**TWO_CAMERAS)
    one, other = observe(policy, 5), observe(policy, 6)
    other = other.rows(slice(0, 5))
    if layer == "backbone":
        other = Observation(other.images, one.state)
    activations = read_activations(policy, one, layer)
    with edit_activations(policy, layer, lambda _: activations):
        carried = policy.predict_chunk(other)
    torch.testing.assert_close(carried, policy.predict_chunk(one))


def test_editing_in_place_counts():
    policy = tiny_act()
    observation = observe(policy)
    for layer in (*SITES, "network.backbone"):
        with edit_activations(policy, layer, lambda x: x.mul_(0)):
            silenced = policy.predict_chunk(observation)
        with edit_activations(policy, layer, lambda x: x * 0):
            assert torch.equal(policy.predict_chunk(observation), silenced)


def test_a_decoder_tap_has_all_steps_when_only_some_are_decoded(policy):
    observation = observe(policy)
    everything = read_activations(policy, observation, "decoder")
    seen = []
    with (
        capture_activations(policy, "network.decoder.norm") as outer,
        edit_activations(policy, "decoder", lambda x: seen.append(x.shape) or x),
        capture_activations(policy, "decoder") as inner,
    ):
        some = policy.predict_chunk(observation, [3, 0])
        # What another pass asked for must not choose from what goes on from here.
        whole = continue_from(policy, "decoder", everything, observation)
        for capture in (outer, inner):
            assert torch.equal(capture.take(), everything)
    assert seen == [everything.shape]
    assert everything.shape[1] == whole.shape[1] == CHUNK
    torch.testing.assert_close(some, policy.predict_chunk(observation, [3, 0]))
    torch.testing.assert_close(some, whole[:, [3, 0]])


def test_a_capture_gives_each_pass_once_and_disturbs_nothing(policy):
    first, second = observe(policy, 4), observe(policy, 3)
    plain, expected = policy.predict_chunk(second), read_activations(policy, second, "encoder")
    with capture_activations(policy, "encoder") as capture:
        assert capture.take() is None
        policy.predict_chunk(first)
        assert torch.equal(policy.predict_chunk(second), plain)
        assert torch.equal(capture.take(), expected)
        assert capture.take() is None


def test_positions_name_each_token_of_all_cameras():
    policy = tiny_act(**TWO_CAMERAS, environment_state_dim=1)
    observation = observe(policy)
    # ceil(32/16) x ceil(48/16) and ceil(17/16) x ceil(32/16) cells of 16 px
    cells = [TokenPosition("top", row, column) for row in range(2) for column in range(3)]
    cells += [TokenPosition("wrist.left", row, column) for row in range(2) for column in range(2)]
    vectors = [TokenPosition(name) for name in ("latent", "state", "environment_state")]
    expected = {
        "encoder": vectors + cells,
        "network.encoder.layers.0": vectors + cells,
        "decoder": [TokenPosition("query", step) for step in range(CHUNK)],
        "backbone": cells,
        "network.backbone": cells,
        "network.state_projection": [TokenPosition("token")],
    }
    for layer, positions in expected.items():
        tap = find_tap(policy, layer)
        assert list(tap.positions) == positions
        activations = read_activations(policy, observation, layer)
        assert activations.shape == (5, len(positions), tap.dim)


def test_a_token_is_the_cell_that_its_position_names():
    policy = tiny_act(**TWO_CAMERAS)
    observation = observe(policy)
    activations = read_activations(policy, observation, "network.backbone")
    for token, place in enumerate(find_tap(policy, "network.backbone").positions):
        feature = policy.normaliser.image(place.name)
        image = feature.normalise_image(observation.images[place.name].double() / 255)
        features = policy.network.backbone(image)
        torch.testing.assert_close(activations[:, token], features[:, :, place.row, place.column])


def test_pictures_enter_the_encoder_as_they_leave_the_projection():
    policy = tiny_act(**TWO_CAMERAS)
    observation = observe(policy)
    features = read_activations(policy, observation, "network.backbone")
    projection = policy.network.image_projection
    weight = projection.weight[:, :, 0, 0]
    torch.testing.assert_close(
        read_activations(policy, observation, "backbone"), features @ weight.T + projection.bias
    )


def test_the_posterior_is_never_tapped():
    policy = tiny_act(dropout=0.0)
    batch = frames(4)
    with capture_activations(policy, "encoder") as capture:
        policy.encode_posterior(batch)
        assert capture.take() is None
        policy.loss(batch, 1.0)
        assert capture.take().shape[1] == len(find_tap(policy, "encoder").positions)
    for layer in ("network.posterior.encoder", "network.posterior"):
        with pytest.raises(ValueError, match="calls it 0 times"):
            find_tap(policy, layer)


def test_nothing_is_left_behind(policy):
    policy.train()
    policy.network.action_head.eval()
    modes = [module.training for module in policy.modules()]
    observation = observe(policy)
    broken = Observation({}, None)
    for layer in ("encoder", "decoder"):
        with pytest.raises(ValueError, match=r"reads|missing"):
            read_activations(policy, broken, layer)
        with (
            pytest.raises(ZeroDivisionError),
            edit_activations(policy, layer, lambda x: x / (0 // 0)),
        ):
            policy.predict_chunk(observation)
        with pytest.raises(KeyError), capture_activations(policy, layer):
            raise KeyError
        with (
            pytest.raises(ValueError, match="same shape"),
            edit_activations(policy, layer, lambda x: x[:, :1]),
        ):
            policy.predict_chunk(observation)
        assert not n_hooks(policy)
    random = torch.get_rng_state()
    read_activations(policy, observation, "encoder")
    find_tap(policy, "decoder")
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in policy.modules()] == modes
    policy.eval()


def test_dropout_is_off_while_reading():
    policy = tiny_act(dropout=0.5)
    observation = observe(policy)
    calm = read_activations(policy, observation, "encoder")
    assert torch.equal(read_activations(policy.train(), observation, "encoder"), calm)


def test_gradients_flow_through_edits_and_continuations():
    policy = tiny_act()
    observation = observe(policy)
    for layer in SITES:
        offset = torch.zeros(find_tap(policy, layer).dim, dtype=torch.float64, requires_grad=True)
        with edit_activations(policy, layer, lambda x, offset=offset: x + offset):
            policy.predict_chunk(observation)[:, 0, 0].sum().backward()
        assert offset.grad.abs().max() > 0
        if layer != "backbone":
            activations = read_activations(policy, observation, layer)
            again = torch.zeros_like(offset, requires_grad=True)
            moved = continue_from(policy, layer, activations + again, observation)
            moved[:, 0, 0].sum().backward()
            torch.testing.assert_close(again.grad, offset.grad)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("encodr", "'encoder'"),
        ("network.encoder.layers.7", r"network\.encoder\.layers\.0"),
        ("network.encoder.layers", "calls it 0 times"),
        ("network.encoder.layers.0.self_attention.mix", "not vectors"),
        ("network.encoder.layers.0.feed_forward.dropout", None),
    ],
)
def test_a_place_that_cannot_be_tapped_is_named_with_the_mend(layer, message):
    policy = tiny_act()
    if message is None:
        assert find_tap(policy, layer).dim == 16
        return
    for call in (
        lambda: find_tap(policy, layer),
        lambda: read_activations(policy, observe(policy), layer),
        lambda: capture_activations(policy, layer).__enter__(),
        lambda: edit_activations(policy, layer, lambda x: x).__enter__(),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not n_hooks(policy)


def test_cameras_that_pass_one_by_one_cannot_be_edited_together():
    policy = tiny_act(**TWO_CAMERAS)
    with (
        pytest.raises(ValueError, match="each of 2 cameras"),
        edit_activations(policy, "network.backbone", lambda x: x),
    ):
        pass
    observation = observe(policy)
    with capture_activations(policy, "network.backbone") as capture:
        policy.predict_chunk(observation)
        assert torch.equal(
            capture.take(), read_activations(policy, observation, "network.backbone")
        )


def test_only_two_places_can_be_gone_on_from():
    policy = tiny_act()
    observation = observe(policy)
    cells = read_activations(policy, observation, "backbone")
    with pytest.raises(ValueError, match="'encoder' and 'decoder'"):
        continue_from(policy, "backbone", cells, observation)
    with pytest.raises(ValueError, match="6 tokens, the activations 4"):
        continue_from(policy, "encoder", cells, observation)
    with pytest.raises(ValueError, match=r"0\.\.5"):
        continue_from(
            policy, "decoder", read_activations(policy, observation, "decoder"), observation, [6]
        )


class Foreign(nn.Module):
    """Another policy: a trunk over two steps of history, whose head is called three times."""

    chunk_size = 3
    n_action_steps = 1
    n_obs_steps = 2
    data_schema = DataSchema({"eye": (4, 6)}, state_dim=2, action_dim=2)

    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(6, 5, 2, stride=2)
        self.wide = nn.LSTM(5, 4, batch_first=True)
        self.narrow = nn.LSTM(5, 4)
        self.head = nn.Linear(4, 2)

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Tensor:
        features = self.trunk(observation.images["eye"].float().flatten(1, 2))
        cells = features.flatten(2)
        mixed, _ = self.wide(cells.mT)
        turned, _ = self.narrow(cells.permute(2, 0, 1))
        mixed = mixed + turned.transpose(0, 1)
        return torch.stack([self.head(mixed[:, step]) for step in range(3)], dim=1)


class Wrapped:
    """A view that keeps its modules inside, as LeRobot's policies are seen."""

    def __init__(self, policy: Foreign):
        self.policy = policy
        self.n_action_steps = self.chunk_size = 3
        self.n_obs_steps = policy.n_obs_steps
        self.data_schema = policy.data_schema

    def predict_chunk(self, observation, queries=None):
        return self.policy.predict_chunk(observation, queries)


@pytest.mark.parametrize("prefix", ["", "policy."])
def test_any_policy_is_tapped_by_its_modules_names(prefix):
    torch.manual_seed(0)
    foreign = Foreign()
    view = Wrapped(foreign) if prefix else foreign
    images = {"eye": torch.randint(256, (4, 2, 3, 4, 6), dtype=torch.uint8)}
    observation = Observation(images, torch.zeros(4, 2, 2))
    cells = [TokenPosition("token", row, column) for row in range(2) for column in range(3)]
    assert list(find_tap(view, f"{prefix}trunk").positions) == cells
    assert list(find_tap(view, f"{prefix}wide").positions) == [TokenPosition("token")] * 6
    features = foreign.trunk(images["eye"].float().flatten(1, 2))
    torch.testing.assert_close(
        read_activations(view, observation, f"{prefix}trunk"), features.flatten(2).mT
    )
    expected = view.predict_chunk(observation)
    for layer in ("trunk", "wide"):
        with edit_activations(view, prefix + layer, lambda x: x.clone()):
            assert torch.equal(view.predict_chunk(observation), expected)
        with edit_activations(view, prefix + layer, lambda x: x + 1):
            assert not torch.equal(view.predict_chunk(observation), expected)
    with pytest.raises(ValueError, match="calls it 3 times"):
        read_activations(view, observation, f"{prefix}head")
    with pytest.raises(ValueError, match="counts 6 for a batch of 2"):
        find_tap(view, f"{prefix}narrow")
    with pytest.raises(ValueError, match="no such module"):
        find_tap(view, "encoder")
    with pytest.raises(ValueError, match="use edit_activations"):
        continue_from(view, "encoder", features.flatten(2).mT, observation)


def test_a_diffusion_policy_of_lerobot_is_tapped_where_it_looks_not_where_it_denoises():
    """Its encoder of pictures runs once, with one picture for each observed step; the denoiser
    runs once a step of denoising, and no single pass is "the" activation."""
    from lerobot_folders import episode, lerobot_policy, with_history

    from policies.lerobot_view import LeRobotPolicyView

    view = LeRobotPolicyView(*lerobot_policy("diffusion", n_obs_steps=1))
    seen = with_history(episode(3), 1, 1)
    observation = Observation({"image": seen.images["image"][:, 0]}, seen.state[:, 0])
    layer = "policy.diffusion.rgb_encoder.0"
    tap = find_tap(view, layer)
    assert tap.positions == (TokenPosition("token"),)
    activations = read_activations(view, observation, layer)
    assert activations.shape == (1, 1, tap.dim)
    expected = view.predict_chunk(observation)
    with edit_activations(view, layer, lambda x: x.clone()):
        assert torch.equal(view.predict_chunk(observation), expected)
    with edit_activations(view, layer, lambda x: x + 1):
        assert not torch.equal(view.predict_chunk(observation), expected)
    with pytest.raises(ValueError, match=r"calls it ([2-9]|\d\d+) times"):
        find_tap(view, "policy.diffusion.unet")
    with pytest.raises(ValueError, match=r"calls it 0 times.*inside it are \['0'\]"):
        find_tap(view, "policy.diffusion.rgb_encoder")
