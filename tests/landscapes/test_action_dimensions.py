"""Actions of more than two dimensions: what boards, single dimensions and all at once obey."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Laplace
from toy_policies import ToyPolicy

from landscapes.baselines import BaselineFrames, baselines
from landscapes.density import MIN_SCALE, Mixture, laplace_log_density, smallest_scale
from landscapes.grid import Grid
from landscapes.landscape import Predictions
from landscapes.marginals import marginals
from landscapes.methods import METHODS, Likelihood, Method, Probe
from landscapes.metrics import (
    LandscapeMetrics,
    measure,
    measure_dimensions,
    part_intervals,
    part_summary,
)
from landscapes.projection import N_DRAWS, actions_to_project, projected_density
from landscapes.space import PUSH_T, ActionSpace, Axis, Plane
from landscapes.study import Calibration, Frames, Scales, kernel_scale, measure_parts
from policies.interface import Batch, DataSchema, Observation

N_DIMS = 5
N_FRAMES = 120
SPACE = ActionSpace(
    tuple(Axis(f"joint_{i}", "rad" if i < 4 else "", -1.0 - i, 1.0 + i) for i in range(N_DIMS)),
    True,
)


def mixture(n_kernels: int = 6, n_dims: int = N_DIMS, seed: int = 0) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_kernels, n_dims, generator=generator, dtype=torch.float64)
    scale = 0.1 + torch.rand(n_kernels, n_dims, generator=generator, dtype=torch.float64)
    weights = torch.randn(n_kernels, generator=generator, dtype=torch.float64)
    return Mixture(centres, scale, torch.log_softmax(weights, 0))


def drawn(scale: float = 0.05, n_frames: int = N_FRAMES, n_samples: int = 8, seed: int = 0):
    """Predictions of a policy with two bent modes, and demonstrations drawn from its density."""
    generator = torch.Generator().manual_seed(seed)
    modes = torch.tensor([[-0.6], [0.6]], dtype=torch.float64) * torch.ones(N_DIMS)
    which = torch.arange(n_samples) % 2
    jitter = 0.1 * torch.randn(n_frames, n_samples, 2, N_DIMS, generator=generator).double()
    samples = modes[which][None, :, None] + jitter
    b = torch.full((1, 2, N_DIMS), scale, dtype=torch.float64)
    density = Mixture(samples.transpose(1, 2), b[:, :, None])
    expert = density.sample(1, generator)[:, :, 0]
    is_valid = torch.ones(n_frames, 2, dtype=torch.bool)
    is_valid[-10:, 1] = False
    return Predictions((0, 8), samples, samples.mean(1), expert, is_valid), b


def frames_of(predictions: Predictions) -> Frames:
    n_frames = len(predictions.point)
    index = torch.arange(n_frames)
    actions = torch.zeros(n_frames, 9, predictions.point.shape[-1])
    actions[:, [0, 8]] = predictions.expert.float()
    is_pad = torch.zeros(n_frames, 9, dtype=torch.bool)
    is_pad[:, [0, 8]] = ~predictions.is_valid
    batch = Batch(
        observation=Observation(images={}, state=actions[:, 0]),
        actions=actions,
        action_is_pad=is_pad,
        episode_index=index // 40,
        frame_index=index % 40,
    )
    return Frames(batch, torch.zeros(n_frames, 2, actions.shape[-1]))


def measured(scale: float = 1.0, **knobs) -> tuple[LandscapeMetrics, dict[str, LandscapeMetrics]]:
    """Joint metrics and parts, with kernels ``scale`` times as wide as those drawn from."""
    predictions, b = drawn()
    frames = frames_of(predictions)
    where = frames.batch.episode_index, frames.batch.frame_index
    joint = measure(predictions, scale * b, SPACE, *where, n_draws=150)
    planes = [SPACE.plane(0, 3)]
    scales = Scales.same(scale * b, planes)
    parts = measure_parts(
        predictions, scales, frames, [0, 8], SPACE, planes, 32, n_draws=150, **knobs
    )
    return joint, parts


@pytest.fixture(scope="module")
def calibrated() -> tuple[LandscapeMetrics, dict[str, LandscapeMetrics]]:
    return measured()


class Arm(ToyPolicy):
    """As much of a policy as methods look at."""

    data_schema = DataSchema(cameras={}, state_dim=N_DIMS, action_dim=N_DIMS)


# Densities


@pytest.mark.parametrize("dims", [(0, 3), (3, 0), (1,), (4, 2, 0)])
def test_a_joint_density_is_marginal_times_conditional(dims):
    whole = mixture()
    points = torch.randn(20, N_DIMS, generator=torch.Generator().manual_seed(1)).double()
    others = [dim for dim in range(N_DIMS) if dim not in dims]
    for point in points:
        of_others = whole.marginal(others).log_density(point[None, others])
        given_others = whole.conditional(dims, point).log_density(point[None, list(dims)])
        torch.testing.assert_close(of_others + given_others, whole.log_density(point[None]))


def test_a_marginal_is_the_integral_over_the_others():
    whole = mixture(n_dims=3)
    point = torch.tensor([0.3, -0.2], dtype=torch.float64)
    line = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    points = torch.stack([point[0].expand_as(line), line, point[1].expand_as(line)], -1)
    integral = torch.trapezoid(whole.log_density(points).exp(), line)
    of_two = whole.marginal([0, 2]).log_density(point[None]).exp()[0]
    assert float(of_two) == pytest.approx(float(integral), rel=1e-5)


def test_a_conditional_slice_keeps_only_the_modes_that_agree_with_what_is_held():
    """Two plans: x and y at -1 with z at 0, and x and y at 1 with z at 5."""
    centres = torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 5.0]], dtype=torch.float64)
    whole = Mixture(centres, torch.full((1, 3), 0.1, dtype=torch.float64))
    ends = centres[:, :2]
    both = whole.marginal([0, 1]).log_density(ends)
    assert float(both[0]) == pytest.approx(float(both[1]))
    one = whole.conditional([0, 1], torch.tensor([9.0, 9.0, 0.0]).double()).log_density(ends)
    assert float(one[0]) == pytest.approx(float(both[0]) + math.log(2))
    assert float(one[1]) < float(one[0]) - 15


# Spaces and planes


def test_axes_come_from_the_task_else_from_the_demonstrations():
    low, high = torch.tensor([0.0, -2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    unnamed = ActionSpace.of(None, low, high)
    assert unnamed.names == ("action_0", "action_1", "action_2")
    assert unnamed.axes[1].low == pytest.approx(-2.4)
    assert unnamed.axes[1].high == pytest.approx(2.4)
    assert unnamed.size[2] == 1.0, "a dimension that never moves has an axis, too"
    assert unnamed.axes[0].label == "action_0"
    assert ActionSpace.of(SPACE.axes[:3], low, high).axes == SPACE.axes[:3]
    with pytest.raises(ValueError, match="describes 5 action dimensions, the data have 3"):
        ActionSpace.of(SPACE.axes, low, high)
    with pytest.raises(ValueError, match="holds no /"):
        Axis("left/waist", "rad", 0.0, 1.0)
    with pytest.raises(ValueError, match="a name of its own"):
        ActionSpace((SPACE.axes[0], SPACE.axes[0]), True)


def test_two_dimensions_are_the_board_that_they_were():
    space = ActionSpace.of(None, torch.zeros(2), torch.ones(2))
    assert Grid(128, *space.board) == Grid()
    assert smallest_scale(space.size).tolist() == [MIN_SCALE, MIN_SCALE]
    assert space.log_uniform == pytest.approx(Grid().log_uniform)


def test_planes_are_chosen_by_name_or_number_or_by_variance():
    plane = SPACE.plane("joint_3", 1)
    assert plane.dims == (3, 1)
    assert plane.name == "joint_3-joint_1"
    assert plane.grid(16) == Grid(16, (-4.0, -2.0), (4.0, 2.0))
    assert SPACE.plane("3", "1") == plane
    assert SPACE.widest(torch.tensor([0.1, 3.0, 0.2, 0.0, 2.0])) == (1, 4)
    for wrong in ((0, 0), (0, 5), (0, "wrist"), (-1, 0)):
        with pytest.raises(ValueError, match="action_dims"):
            SPACE.plane(*wrong)


def test_the_floor_of_the_scale_follows_the_axis():
    """Half a px of a board of 512; a gripper of 0.04 m must not be blurred by half a metre."""
    predictions, _ = drawn()
    exact = replace(predictions, samples=predictions.expert[:, None].expand(-1, 4, -1, -1))
    floor = smallest_scale(SPACE.size)
    scale = kernel_scale(Arm([[0.0] * N_DIMS]), exact, exact, floor)
    torch.testing.assert_close(scale, (torch.tensor(SPACE.size).double() / 1024).expand(1, 2, -1))


# Boards over planes


def probe(plane: Plane | None, method: str = "likelihood", horizons=(0, 8)) -> Probe:
    predictions, b = drawn(n_frames=4)
    grid = Grid() if plane is None else plane.grid(24)
    if METHODS[method]().needs_whole_chunk:
        predictions = replace(predictions, queries=(0, 1))
        horizons = (0, 1)
    policy = Arm([[0.0] * N_DIMS], chunk_size=len(predictions.queries))
    batch = frames_of(predictions).batch
    return Probe(policy, batch, predictions, b, horizons, grid, plane)


PLANE_METHODS = [name for name in METHODS if METHODS[name]().has_planes and name != "likelihood_z0"]


@pytest.mark.parametrize("name", [n for n in PLANE_METHODS if not METHODS[n]().needs_whole_chunk])
def test_a_plane_is_the_board_of_a_policy_that_has_only_these_dimensions(name):
    plane = SPACE.plane(4, 1)
    on_plane = probe(plane)
    method = METHODS[name]()
    found = method.landscape(on_plane)
    flat = ToyPolicy([[0.0, 0.0]])
    alone = Probe(
        flat,
        on_plane.batch,
        on_plane.predictions.dimensions(plane.dims),
        on_plane.scale[..., list(plane.dims)],
        on_plane.horizons,
        on_plane.grid,
    )
    wanted = method.landscape(alone)
    assert torch.equal(found.scores, wanted.scores)
    assert torch.equal(found.thresholds, wanted.thresholds)
    assert found.plane == plane


@pytest.mark.parametrize("name", [n for n in PLANE_METHODS if METHODS[n]().needs_whole_chunk])
def test_whole_chunk_methods_hold_mass_on_planes(name):
    found = METHODS[name]().landscape(probe(SPACE.plane(4, 1), name))
    assert found.mass.sum((-1, -2)).min() > 0.9
    assert found.scores.isfinite().all()


def test_other_dimensions_of_the_chunk_tell_the_mode():
    """Committed to a plan in z, x and y follow it: weights see dimensions that the board lacks."""
    predictions, b = drawn(n_frames=3)
    plan = predictions.samples[:, 0]
    predictions = replace(predictions, queries=(0, 1), point=plan)
    policy = Arm([[0.0] * N_DIMS], chunk_size=2)
    plane = SPACE.plane(0, 1)
    batch = frames_of(replace(predictions, queries=(0, 8))).batch
    at = Probe(policy, batch, predictions, b, (0, 1), plane.grid(24), plane)
    committed, marginal = (
        METHODS[name]().landscape(at).mass for name in ("committed", "likelihood")
    )
    negative = slice(0, 12)
    share = committed[:, :, negative, negative].sum((-1, -2))
    assert (marginal[:, :, negative, negative].sum((-1, -2)) < 0.6).all()
    assert (share > 0.99).all()


def test_conditional_boards_hold_the_prediction():
    plane = SPACE.plane(0, 1, is_conditional=True)
    at = probe(plane)
    at = replace(at, predictions=replace(at.predictions, point=at.predictions.samples[:, 0]))
    mass = Likelihood().landscape(at).mass
    # The first sample belongs to the mode at -0.6 in all dimensions.
    assert (mass[:, :, :12, :12].sum((-1, -2)) > 0.99).all()


def test_methods_say_which_planes_they_do_not_have():
    plane, held = SPACE.plane(0, 1), SPACE.plane(0, 1, is_conditional=True)
    for name in ("recon", "noise_pred"):
        with pytest.raises(ValueError, match=f"{name}: scores whole actions.*choose likelihood"):
            METHODS[name]().check(Arm([[0.0]]), plane)
    for name in ("distance", "energy", "l1_loss"):
        METHODS[name]().check(Arm([[0.0]]), plane)
        with pytest.raises(ValueError, match=f"{name}: is no density"):
            METHODS[name]().check(Arm([[0.0]]), held)
    Likelihood().check(Arm([[0.0]]), held)


def test_lengths_are_in_the_unit_of_the_axes():
    same, mixed = SPACE.plane(0, 1), SPACE.plane(0, 4)
    method: Method = METHODS["distance"]()
    assert method.colour_scale(None) == ("-distance, px", (-512.0, 0.0))
    assert method.colour_scale(same) == ("-distance, rad", (-4.0, 0.0))
    assert method.colour_scale(mixed) == ("-distance", (-10.0, 0.0))


# Single dimensions


def test_mass_along_an_axis_is_the_difference_of_the_cdf():
    predictions, b = drawn(n_frames=3)
    found = marginals(predictions, b, SPACE, [8], n_cells=20)
    for dim, axis in enumerate(SPACE.axes):
        edges = torch.linspace(axis.low, axis.high, 21, dtype=torch.float64)
        kernels = Laplace(predictions.samples[:, :, 1, dim, None], b[0, 1, dim])
        expected = kernels.cdf(edges).diff(dim=-1).mean(1)
        torch.testing.assert_close(found.mass[:, 0, dim], expected.float(), rtol=1e-5, atol=1e-7)
    inside = (found.mass >= found.thresholds[..., 1:2]) * found.mass
    reaches = found.mass.sum(-1) >= 0.8
    assert torch.equal(found.thresholds[..., 1].isfinite(), reaches)
    assert (inside.sum(-1)[reaches] >= 0.8 - 1e-6).all()
    assert (inside.sum(-1)[~reaches] == 0).all()
    uniform = torch.full_like(found.mass, 1 / 20)
    assert replace(found, mass=uniform).nats_above_uniform().abs().max() < 1e-6


def test_regions_hold_shares_of_all_mass_wherever_it_lies():
    """Cut to the inner third of each axis, panels keep the regions that they can hold."""
    predictions, b = drawn(scale=0.3, n_frames=6)
    small = replace(
        SPACE,
        axes=tuple(replace(axis, low=axis.low / 3, high=axis.high / 3) for axis in SPACE.axes),
    )
    whole = marginals(predictions, b, SPACE, [0], n_cells=96)
    cut = marginals(predictions, b, small, [0], n_cells=32)
    # The same cells, seen through a smaller window.
    torch.testing.assert_close(cut.mass, whole.mass[..., 32:64])
    reached = cut.thresholds.isfinite()
    assert reached.any()
    assert not reached.all()
    outside = torch.cat([whole.mass[..., :32], whole.mass[..., 64:]], -1).amax(-1, keepdim=True)
    # Where nothing outside is as dense, the smallest region lies inside, and is the same one.
    same = reached & (outside < whole.thresholds)
    assert same.any()
    torch.testing.assert_close(cut.thresholds[same], whole.thresholds[same])
    inside = ((cut.mass[..., None, :] >= cut.thresholds[..., None]) * cut.mass[..., None, :]).sum(
        -1
    )
    levels = torch.tensor(cut.levels).expand_as(inside)
    assert (inside[reached] >= levels[reached] - 1e-6).all()
    assert (inside[~reached] == 0).all()
    torch.testing.assert_close(cut.beyond + cut.mass.sum(-1), torch.ones_like(cut.beyond))


class Sampler(Arm):
    """A policy that is no ACT: the scale of its kernels is a bandwidth of its own samples."""


def test_coverage_of_a_dimension_does_not_pay_for_the_others():
    """Samples and demonstrations from one normal density in 14 dimensions: perfectly calibrated."""
    generator = torch.Generator().manual_seed(0)
    n_frames, n_samples, n_dims = 60, 64, 14
    samples = torch.randn(n_frames, n_samples, 1, n_dims, generator=generator).double()
    expert = torch.randn(n_frames, 1, n_dims, generator=generator).double()
    is_valid = torch.ones(n_frames, 1, dtype=torch.bool)
    predictions = Predictions((0,), samples, samples.mean(1), expert, is_valid)
    space = ActionSpace(tuple(Axis(f"joint_{i}", "", -4.0, 4.0) for i in range(n_dims)), True)
    planes = space.planes([(0, 5), (9, 3)])
    scales = Scales.fit(Sampler([[0.0] * n_dims]), predictions, None, space, planes)
    where = torch.zeros(n_frames, dtype=torch.long), torch.arange(n_frames)

    def c80(scale: torch.Tensor) -> float:
        found = measure_dimensions(predictions, scale, space, *where, n_draws=300)
        return float(np.mean([each.summary()["k0/c80"] for each in found.values()]))

    assert c80(scales.single) == pytest.approx(0.8, abs=0.05)
    assert c80(scales.joint) > 0.88, "the joint one is too wide for each"
    for plane in planes:
        dims = list(plane.dims)
        floor = smallest_scale([8.0, 8.0])
        alone = kernel_scale(Sampler([[0.0] * 2]), predictions.dimensions(dims), None, floor)
        torch.testing.assert_close(scales.planes[plane.name], alone)
        assert (scales.planes[plane.name] < scales.joint[..., dims]).all()


def test_a_marginal_board_has_the_scale_of_its_plane_and_a_conditional_one_of_the_whole():
    at = probe(SPACE.plane(4, 1))
    own = 0.3 * at.scale[..., [4, 1]]
    board = Likelihood().landscape(replace(at, plane_scale=own)).mass
    narrow = at.predictions.dimensions([4, 1]).mixture(own).cell_mass(at.grid)
    torch.testing.assert_close(board, narrow.float())
    plane = SPACE.plane(4, 1)
    scales = Scales.same(at.scale, [plane])
    assert scales.of_marginal(plane) is not None
    assert scales.of_marginal(replace(plane, is_conditional=True)) is None


def test_names_of_planes_mean_one_thing():
    axes = tuple(Axis(name, "", 0.0, 1.0) for name in ("a", "b", "a-b", "b-c", "c"))
    space = ActionSpace(axes, True)
    with pytest.raises(ValueError, match=r"\['a-b'\] would be the name of two things"):
        space.planes([("a", "b")])
    with pytest.raises(ValueError, match=r"\['a-b-c'\] would be the name of two things"):
        space.planes([("a-b", "c"), ("a", "b-c")])
    with pytest.raises(ValueError, match="names a pair twice"):
        space.planes([("a", "c"), (0, 4)])
    line = replace(space, axes=axes[:1])
    with pytest.raises(ValueError, match="the actions have 1"):
        line.widest(torch.ones(1))


def test_a_single_kernel_is_independent_in_its_dimensions():
    """Then, and only then, the joint NLL is the sum of those of the dimensions."""
    predictions, b = drawn(n_frames=40)
    where = torch.zeros(40, dtype=torch.long), torch.arange(40)

    def both(answers: Predictions) -> tuple[np.ndarray, np.ndarray]:
        joint = measure(answers, b, SPACE, *where, n_draws=10)
        single = measure_dimensions(answers, b, SPACE, *where, n_draws=10)
        return joint.nll[:, 0], sum(each.nll[:, 0] for each in single.values())  # pyright: ignore[reportReturnType]

    one = replace(predictions, samples=predictions.samples[:, :1])
    np.testing.assert_allclose(*both(one))
    joint, summed = both(predictions)
    # All dimensions agree on the mode, which the sum pays for again in each: ln 2 nats.
    assert (summed - joint).mean() > 2


def test_joint_likelihood_is_exact_in_any_dimension(calibrated):
    joint, _ = calibrated
    predictions, b = drawn()
    for frame in (0, 100):
        total = sum(
            math.exp(
                float(
                    laplace_log_density(
                        predictions.expert[frame, 0], predictions.samples[frame, j, 0], b[0, 0]
                    )
                )
            )
            for j in range(8)
        )
        assert joint.nll[frame, 0] == pytest.approx(-math.log(total / 8))


def test_coverage_tells_kernels_of_the_wrong_width_in_every_part(calibrated):
    narrow, wide = measured(0.4), measured(2.5)
    names = {*SPACE.names, "joint_0-joint_3"}
    assert calibrated[1].keys() == names
    for name in names:
        right, too_small, too_large = (
            each[1][name].summary()["k0/c80"] for each in (calibrated, narrow, wide)
        )
        assert right == pytest.approx(0.8, abs=0.1), name
        assert too_small < 0.71, name
        assert too_large > 0.89, name
        # Proper: the true width explains best.
        nll = [each[1][name].summary()["k0/nll"] for each in (narrow, calibrated, wide)]
        assert nll[1] < min(nll[0], nll[2]), name
    assert calibrated[0].summary()["k0/c80"] == pytest.approx(0.8, abs=0.1)
    assert narrow[0].summary()["k0/c80"] < 0.3, "five dimensions at once forgive less"


def test_energy_of_one_dimension_is_the_crps(calibrated):
    """The integral of (F - 1)^2, with F of K samples, less what the finite K adds to it."""
    predictions, _ = drawn()
    part = calibrated[1]["joint_2"]
    line = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    for frame in (0, 7):
        samples, truth = predictions.samples[frame, :, 0, 2], predictions.expert[frame, 0, 2]
        below = (samples[:, None] <= line).double().mean(0)
        crps = torch.trapezoid((below - (truth <= line).double()).square(), line)
        spread = (samples[:, None] - samples).abs().sum()
        fair = crps + spread / 2 * (1 / 8**2 - 1 / (8 * 7))
        assert part.energy[frame, 0] == pytest.approx(float(fair), abs=2e-4)


def test_what_needs_a_board_has_no_key_elsewhere(calibrated):
    joint, parts = calibrated
    for metrics in (joint, parts["joint_0"]):
        assert not {"k0/modes_mean", "k0/hdr80_px2", "k0/out_of_board"} & metrics.summary().keys()
        assert not {"modes", "area_rank"} & metrics.rows()[0].keys()
        assert all(math.isfinite(value) for value in metrics.summary().values())
    assert "k0/regret_med" not in joint.summary(), "its densest action is not known"
    assert parts["joint_0"].summary()["k0/regret_med"] >= 0
    assert parts["joint_0-joint_3"].summary()["k0/modes_mean"] >= 1
    assert joint.reading() is not None
    assert joint.intervals().keys() == joint.summary().keys()


def test_parts_are_named_in_their_keys(calibrated):
    _, parts = calibrated
    summary, intervals = part_summary(parts), part_intervals(parts)
    assert summary.keys() == intervals.keys()
    assert summary["k8/joint_4/nll"] == parts["joint_4"].summary()["k8/nll"]
    assert "k0/joint_0-joint_3/modes_mean" in summary
    for key, (low, high) in intervals.items():
        if not key.endswith("/ks"):
            assert low <= summary[key] <= high


def test_parts_are_compared_with_where_the_arm_is():
    """The observed state is the action here, so no density beats one at the agent."""
    predictions, b = drawn(n_frames=30)
    frames = frames_of(predictions)
    scales = Scales.same(b, [])
    parts = measure_parts(
        predictions, scales, frames, [0], SPACE, [], 16, Calibration(frames), n_draws=50
    )
    for part in parts.values():
        assert part.summary()["k0/skill_vs_agent"] < 0
    whole = BaselineFrames.of(frames.batch, [0], frames.previous)
    one = whole.dimensions([2])
    line = replace(SPACE, axes=SPACE.axes[2:3])
    np.testing.assert_allclose(
        parts["joint_2"].baselines["marginal"], baselines(one, one, line).nll["marginal"]
    )


def test_numbers_of_dimensions_do_not_depend_on_the_others():
    predictions, b = drawn(n_frames=20)
    where = torch.zeros(20, dtype=torch.long), torch.arange(20)
    all_five = measure_dimensions(predictions, b, SPACE, *where, n_draws=20)
    line = replace(SPACE, axes=SPACE.axes[3:4])
    alone = measure(predictions.dimensions([3]), b[..., [3]], line, *where, n_draws=20)
    for name in ("nll", "nll_z0", "nll_frozen", "energy", "regret"):
        np.testing.assert_allclose(getattr(all_five["joint_3"], name), getattr(alone, name))
    assert all_five["joint_3"].log_area == alone.log_area


def test_measuring_wants_the_space_of_these_actions():
    predictions, b = drawn(n_frames=3)
    where = torch.zeros(3, dtype=torch.long), torch.arange(3)
    with pytest.raises(ValueError, match="a board has 2 dimensions, the actions have 5"):
        measure(predictions, b, Grid(), *where)
    with pytest.raises(ValueError, match="a box has 2 dimensions, the actions have 5"):
        measure(predictions, b, PUSH_T, *where)


# Projection


def test_draws_come_from_the_density_of_the_horizon():
    predictions, b = drawn(n_frames=400)
    found = actions_to_project(predictions, 3 * b, 8, seed=0)
    assert found["draws"].shape == (400, N_DRAWS, N_DIMS)
    deviation = np.abs(found["draws"]).mean()
    density = predictions.at([8]).mixture(3 * b[:, [1]])
    assert deviation == pytest.approx(float(density.sample(500)[:, 0].abs().mean()), rel=0.01)
    np.testing.assert_array_equal(found["samples"], predictions.samples.numpy())


def test_a_projected_density_holds_its_points_and_nothing_is_drawn_behind_the_camera():
    points = 100 + 8 * torch.randn(3, N_DRAWS, 2, generator=torch.Generator().manual_seed(0))
    points = points.double()
    points[1, 5] = torch.nan
    found = projected_density(points, (150, 200))
    inside = found.mass >= found.thresholds[:, 1, None, None]
    assert found.mass[1].sum() == 0
    for frame in (0, 2):
        cells = Grid(96, (0.0, 0.0), (200.0, 150.0)).cells(points[frame])
        share = inside[frame][cells[:, 0], cells[:, 1]].double().mean()
        assert 0.7 < share < 0.95
        area = inside[frame].double().mean() * 200 * 150
        assert area < 0.1 * 200 * 150
