"""Gradients say what they should: against captum, full matrices, and policies that are known."""

from dataclasses import replace

import captum.attr
import pytest
import torch
from tiny_act import tiny_act
from torch import Tensor

from attention import gradients
from attention.capture import capture_attention
from attention.gradients import GradCAM, IntegratedGradients, Relevancy, crowded_edges
from attention.method import Target, explained_actions
from attention.methods import ATTENTION_METHODS, METHODS, SALIENCY_METHODS
from policies.act import ACTPolicy
from policies.interface import Observation
from policies.tokens import TokenLayout

CAMERAS = {"top": [32, 48], "wrist": [48, 32]}
FOLLOWING = {
    "relevancy": Relevancy,
    "grad_cam": GradCAM,
    "integrated_gradients": lambda: IntegratedGradients(4, max_steps=12),
}


def observe(policy: ACTPolicy, n_frames: int = 3, seed: int = 0) -> Observation:
    """Noise in what the policy reads."""
    generator = torch.Generator().manual_seed(seed)
    schema = policy.data_schema

    def vector(dim: int) -> Tensor | None:
        return 512 * torch.rand(n_frames, dim, generator=generator).double() if dim else None

    return Observation(
        images={
            name: torch.randint(256, (n_frames, 3, *size), dtype=torch.uint8, generator=generator)
            for name, size in schema.cameras.items()
        },
        state=vector(schema.state_dim),
        environment_state=vector(schema.environment_state_dim),
    )


class Linear(ACTPolicy):
    """``a = sum of weights * pixels + state @ gains``, growing with the chunk step."""

    def __init__(self, relative_actions: bool = False):
        super().__init__(
            cameras={"top": [6, 8], "wrist": [4, 5]},
            state_dim=2,
            action_dim=2,
            chunk_size=3,
            relative_actions=relative_actions,
            dim_model=4,
            n_heads=1,
            dim_feedforward=4,
            n_encoder_layers=1,
            n_posterior_layers=1,
            backbone="small_cnn",
            token_stride=16,
        )
        generator = torch.Generator().manual_seed(1)
        self.double().eval()
        self.weights = {
            name: torch.randn(2, 3, *size, generator=generator).double()
            for name, size in self.data_schema.cameras.items()
        }
        self.gains = torch.tensor([[0.5, -1.0], [0.0, 2.0]], dtype=torch.float64)
        for feature, middle in (
            (self.normaliser.image("top"), 0.25),
            (self.normaliser.image("wrist"), 0.5),
            (self.normaliser.state, 256.0),
            (self.normaliser.action, 0.0),
        ):
            assert feature is not None
            feature.set(
                torch.full_like(feature.offset, middle), torch.full_like(feature.scale, 0.2)
            )

    def predict_chunk(self, observation, queries=None):
        seen = sum(
            torch.einsum("acij,bcij->ba", weight, self._unit(observation.images[name]))
            for name, weight in self.weights.items()
        )
        assert observation.state is not None
        seen = seen + observation.state @ self.gains
        steps = torch.tensor(list(range(self.chunk_size) if queries is None else queries))
        actions = seen[:, None] * (1 + steps[:, None])
        return actions + observation.state[:, None] if self.relative_actions else actions

    @staticmethod
    def _unit(images: Tensor) -> Tensor:
        return images.double() / 255 if images.dtype == torch.uint8 else images


# What the project's own attention and its gradients equal.


def test_our_actions_are_the_same_when_attention_is_written_out():
    policy = tiny_act(n_encoder_layers=2, n_decoder_layers=2, cameras=CAMERAS)
    observation = observe(policy)
    expected = policy.predict_chunk(observation)
    with capture_attention(policy.network, differentiable=True):
        found = policy.predict_chunk(observation)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["each", "sum", "norm"])
@pytest.mark.parametrize("relative", [False, True])
def test_relevancy_is_chefers_formula_with_full_matrices(aggregation, relative):
    policy = tiny_act(n_encoder_layers=3, cameras=CAMERAS, relative_actions=relative)
    observation = observe(policy)
    target = Target((1, 4), None, aggregation)
    found = Relevancy().attribute(policy, observation, target)

    layout = TokenLayout.of(policy.network)
    with torch.enable_grad(), capture_attention(policy.network, differentiable=True) as capture:
        actions = explained_actions(policy, observation, target.queries)
        outputs = target.aggregate(target.coordinates(actions))
    layers = [*capture.weights.encoder(), capture.weights.cross()[-1]]
    expected = torch.zeros(3, layout.n_tokens).double()
    for frame in range(3):
        for output in outputs[frame]:
            slopes = torch.autograd.grad(output, layers, retain_graph=True)
            *encoder, cross = (
                (slope[frame] * layer[frame]).clamp_min(0).mean(0)
                for slope, layer in zip(slopes, layers, strict=True)
            )
            through = torch.eye(layout.n_tokens).double()
            for layer in encoder:
                through = through + layer @ through
            expected[frame] += (cross @ through).sum(0) / outputs.shape[1]
    vectors, maps = layout.split(expected)
    for name, values in {**vectors, **maps}.items():
        torch.testing.assert_close({**found.vectors, **found.maps}[name], values)
    assert found.shares()["top"].std() > 0


def test_grad_cam_is_captums_where_captum_has_one_camera():
    policy = tiny_act(n_encoder_layers=2)
    observation = observe(policy)
    target = Target((0, 3))
    found = GradCAM().attribute(policy, observation, target).maps["image"]

    def coordinates(images: Tensor) -> Tensor:
        seen = Observation({"image": images}, observation.state.repeat(len(images) // 3, 1))
        return target.coordinates(explained_actions(policy, seen, target.queries))

    explainer = captum.attr.LayerGradCam(coordinates, policy.network.backbone)
    images = observation.images["image"].double() / 255
    expected = torch.stack(
        [explainer.attribute(images, target=j, relu_attributions=True)[:, 0] for j in range(4)]
    ).mean(0)
    assert expected.max() > 0
    torch.testing.assert_close(found, expected.detach())


def test_grad_cam_weighs_each_camera_by_its_own_gradients():
    """A camera that the action does not depend on gets nothing, whatever it shows."""
    policy = tiny_act(backbone_width=16, cameras=CAMERAS)
    observation = observe(policy)
    before = GradCAM().attribute(policy, observation, Target())
    assert before.maps["wrist"].max() > 0
    assert before.maps["top"].shape[1:] == (2, 3)
    assert before.maps["wrist"].shape[1:] == (3, 2)
    cross = policy.network.decoder.layers[0].cross_attention
    with torch.no_grad():
        # Nothing but the state's and the latent's token is attended to: no picture matters.
        for name in CAMERAS:
            policy.network.get_buffer(f"position_{name}").fill_(0)
        cross.in_proj_weight[32:].zero_()
    after = GradCAM().attribute(policy, observation, Target())
    assert all((values == 0).all() for values in after.maps.values())


def test_with_even_nodes_integrated_gradients_are_captums(monkeypatch):
    monkeypatch.setattr(gradients, "crowded_edges", lambda at, n: crowded_edges(at, n, 1.0))
    policy = tiny_act(backbone_width=16, cameras=CAMERAS, environment_state_dim=3)
    observation = observe(policy)
    target = Target((0, 2), (1,))
    found = IntegratedGradients(7, "black", max_steps=7).attribute(policy, observation, target)

    def coordinates(top: Tensor, wrist: Tensor, state: Tensor, environment: Tensor) -> Tensor:
        seen = Observation({"top": top, "wrist": wrist}, state, environment)
        return target.coordinates(explained_actions(policy, seen, target.queries))

    inputs = tuple(
        [observation.images[name].double() / 255 for name in CAMERAS]
        + [observation.state, observation.environment_state]
    )
    means = (policy.normaliser.state.offset, policy.normaliser.environment_state.offset)
    starts = (*(torch.zeros_like(each) for each in inputs[:2]), *(mean[None] for mean in means))
    explainer = captum.attr.IntegratedGradients(coordinates)
    expected = [
        explainer.attribute(inputs, starts, output, n_steps=7, method="riemann_middle")
        for output in range(2)
    ]
    for place, name in enumerate(CAMERAS):
        pixels = torch.stack([each[place].sum(1).abs() for each in expected]).mean(0)
        torch.testing.assert_close(found.maps[name], pixels, rtol=1e-3, atol=1e-5)
    for place, name in ((2, "state"), (3, "environment_state")):
        parts = torch.stack([each[place] for each in expected])
        torch.testing.assert_close(found.dimensions[name], parts.mean(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            found.vectors[name], parts.abs().sum(-1).mean(0), rtol=1e-3, atol=1e-5
        )
    totals = torch.stack([sum(part.flatten(1).sum(1) for part in each) for each in expected])
    with torch.no_grad():
        begin = (start.expand_as(end) for start, end in zip(starts, inputs, strict=True))
        ends = coordinates(*inputs) - coordinates(*begin)
    error = (totals.T - ends).abs().sum(1) / ends.abs().sum(1)
    torch.testing.assert_close(found.completeness_error, error, rtol=1e-4, atol=1e-7)


# What adds up.


@pytest.mark.parametrize(
    ("baseline", "means"), [("black", (0, 0)), ("mean", (64 / 255, 128 / 255))]
)
def test_one_step_is_exact_for_a_linear_policy(baseline, means):
    policy = Linear()
    observation = observe(policy)
    target = Target((0, 2))
    found = IntegratedGradients(1, baseline).attribute(policy, observation, target)
    # Outputs are 1, 1, 3 and 3 times the two actions of chunk step 0.
    growth = torch.tensor([1.0, 3.0]).double()
    for (name, weight), mean in zip(policy.weights.items(), means, strict=True):
        pixels = observation.images[name].double() / 255 - mean
        expected = (weight[:, None] * pixels).sum(2).abs().mean(0) * growth.mean()
        torch.testing.assert_close(found.maps[name], expected)
        assert found.cells_px[name] == 1
    parts = (observation.state - 256)[:, :, None] * policy.gains
    torch.testing.assert_close(found.dimensions["state"], parts.mean(-1) * growth.mean())
    torch.testing.assert_close(found.vectors["state"], parts.abs().sum(1).mean(-1) * growth.mean())
    assert found.completeness_error.max() < 1e-12


@pytest.mark.parametrize("aggregation", ["each", "sum"])
def test_state_attributions_of_several_outputs_are_those_of_their_mean_or_sum(aggregation):
    policy = Linear()
    observation = observe(policy)
    both = IntegratedGradients(1).attribute(policy, observation, Target((0,), None, aggregation))
    one, two = (
        IntegratedGradients(1).attribute(policy, observation, Target((0,), (dimension,)))
        for dimension in range(2)
    )
    expected = one.dimensions["state"] + two.dimensions["state"]
    n_outputs = 2 if aggregation == "each" else 1
    torch.testing.assert_close(both.dimensions["state"], expected / n_outputs)


def test_the_state_that_relative_actions_are_added_to_is_not_explained():
    observation = observe(Linear())
    absolute, relative = (
        IntegratedGradients(1).attribute(Linear(kind), observation, Target())
        for kind in (False, True)
    )
    torch.testing.assert_close(relative.dimensions["state"], absolute.dimensions["state"])


def test_thirds_of_even_steps_are_three_times_as_many_even_steps(monkeypatch):
    monkeypatch.setattr(gradients, "crowded_edges", lambda at, n: crowded_edges(at, n, 1.0))
    policy = tiny_act(backbone_width=16, cameras=CAMERAS)
    observation = observe(policy)
    expected = IntegratedGradients(18, max_steps=18).attribute(policy, observation, Target())
    monkeypatch.setattr(gradients, "MAX_COMPLETENESS_ERROR", -1.0)
    found = IntegratedGradients(2).attribute(policy, observation, Target())
    for name in CAMERAS:
        torch.testing.assert_close(found.maps[name], expected.maps[name])
    torch.testing.assert_close(found.dimensions["state"], expected.dimensions["state"])
    torch.testing.assert_close(found.completeness_error, expected.completeness_error)


def test_only_frames_that_do_not_add_up_get_more_steps(monkeypatch):
    policy = tiny_act(backbone_width=16)
    observation = observe(policy, n_frames=6)
    few = IntegratedGradients(4, max_steps=4).attribute(policy, observation, Target())
    assert few.completeness_error is not None
    limit = float(few.completeness_error.median())
    monkeypatch.setattr(gradients, "MAX_COMPLETENESS_ERROR", limit)
    more = IntegratedGradients(4, max_steps=36).attribute(policy, observation, Target())
    is_left = few.completeness_error <= limit
    assert (more.maps["image"] == few.maps["image"]).flatten(1).all(1).equal(is_left)
    assert more.completeness_error is not None
    assert more.completeness_error.max() < few.completeness_error.max() / 3


def test_nodes_crowd_where_they_should_and_fill_the_way():
    centre = torch.tensor([0.0, 0.3, 1.0]).double()
    edges = crowded_edges(centre, 40)
    widths = edges.diff(dim=1)
    assert (widths > 0).all()
    torch.testing.assert_close(widths.sum(1), torch.ones(3).double())
    nearest = (((edges[:, 1:] + edges[:, :-1]) / 2 - centre[:, None]).abs()).argmin(1)
    assert widths.argmin(1).sub(nearest).abs().max() <= 1
    assert (widths.amax(1) / widths.amin(1)).min() > 100
    torch.testing.assert_close(
        crowded_edges(centre, 40, 1.0), torch.linspace(0, 1, 41).double().expand(3, 41)
    )


# What must not happen.


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize(
    "changes",
    [{"state_dim": 1}, {"state_dim": 0}, {"environment_state_dim": 4}, {"relative_actions": True}],
    ids=str,
)
def test_frames_together_are_explained_as_one_by_one(name, changes):
    policy = tiny_act(**{"cameras": CAMERAS, "backbone_width": 16, **changes})
    observation = observe(policy)
    method = FOLLOWING[name]()
    together = method.attribute(policy, observation, Target((1,)))
    for frame in range(3):
        alone = method.attribute(policy, observation.rows(slice(frame, frame + 1)), Target((1,)))
        for part in ("maps", "vectors", "dimensions"):
            for key, values in getattr(alone, part).items():
                torch.testing.assert_close(values[0], getattr(together, part)[key][frame])
    expected = {
        "relevancy": {"latent", "state", "environment_state"},
        "grad_cam": set(),
        "integrated_gradients": {"state", "environment_state"},
    }[name]
    there = {"latent", "state", "environment_state"}
    there -= {"state"} if policy.data_schema.state_dim == 0 else set()
    there -= set() if policy.data_schema.environment_state_dim else {"environment_state"}
    assert set(together.vectors) == expected & there
    if name == "integrated_gradients" and policy.data_schema.state_dim:
        assert together.dimensions["state"].shape == (3, policy.data_schema.state_dim)


@pytest.mark.parametrize("name", FOLLOWING)
def test_parameters_and_observations_are_left_as_they_were(name):
    policy = tiny_act(backbone_width=16, cameras=CAMERAS)
    observation = observe(policy)
    parameters = dict(policy.named_parameters())
    frozen = list(parameters)[::2]
    for key, parameter in parameters.items():
        parameter.requires_grad_(key not in frozen)
        parameter.grad = None if key in frozen else torch.full_like(parameter, 3.0)
    hooks = [len(module._forward_hooks) for module in policy.modules()]
    kept = {camera: images.clone() for camera, images in observation.images.items()}
    FOLLOWING[name]().attribute(policy, observation, Target())
    for key, parameter in parameters.items():
        assert parameter.requires_grad == (key not in frozen)
        assert parameter.grad is None if key in frozen else (parameter.grad == 3).all()
    assert hooks == [len(module._forward_hooks) for module in policy.modules()]
    assert all(kept[camera].equal(images) for camera, images in observation.images.items())
    assert not observation.state.requires_grad


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_may_forbid_gradients_and_freeze_everything(name, mode):
    policy = tiny_act(backbone_width=16, cameras=CAMERAS)
    observation = observe(policy)
    expected = FOLLOWING[name]().attribute(policy, observation, Target())
    policy.requires_grad_(False)
    with mode():
        inside = observe(policy)
        # Floats are not copied on their way to the network.
        inside = replace(
            inside, images={key: image.double() / 255 for key, image in inside.images.items()}
        )
        found = FOLLOWING[name]().attribute(policy, inside, Target())
    for camera in CAMERAS:
        torch.testing.assert_close(found.maps[camera], expected.maps[camera], rtol=1e-4, atol=1e-6)
        assert not found.maps[camera].requires_grad


@pytest.mark.parametrize("name", FOLLOWING)
def test_frames_of_many_passes_stay_in_order(name, monkeypatch):
    policy = tiny_act(backbone_width=16, cameras=CAMERAS)
    observation = observe(policy)
    whole = FOLLOWING[name]().attribute(policy, observation, Target())
    monkeypatch.setattr(gradients, "PASS_PIXELS", 1)
    pieces = FOLLOWING[name]().attribute(policy, observation, Target())
    torch.testing.assert_close(pieces.maps["top"], whole.maps["top"])


class Other:
    """A policy that is no ACT."""

    data_schema = tiny_act().data_schema
    chunk_size = n_action_steps = n_obs_steps = 1

    def predict_chunk(self, observation, queries=None):
        raise NotImplementedError


def test_what_cannot_be_explained_is_refused():
    policy = tiny_act()
    observation = observe(policy)
    for method in (Relevancy(), GradCAM(), IntegratedGradients()):
        with pytest.raises(ValueError, match="looks inside ACT"):
            method.check(Other())
        with pytest.raises(ValueError, match="chunk steps 0 to 5"):
            method.attribute(policy, observation, Target((6,)))
    for arguments in ({"n_steps": 0}, {"n_steps": 5, "max_steps": 4}):
        with pytest.raises(ValueError, match="give"):
            IntegratedGradients(**arguments)


def test_every_method_is_found_by_its_name():
    names = ["cross_attention", "encoder_attention", "rollout", "relevancy"]
    assert list(ATTENTION_METHODS) == names
    assert list(SALIENCY_METHODS) == ["grad_cam", "integrated_gradients", "occlusion"]
    assert METHODS == {**ATTENTION_METHODS, **SALIENCY_METHODS}
    assert all(kind().name == name for name, kind in METHODS.items())
