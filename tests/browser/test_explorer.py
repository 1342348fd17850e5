import json
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import cv2
import numpy as np
import pytest
import torch
from pusht_runs import LENGTHS
from tiny_act import CHUNK, tiny_act
from tiny_explorer import SIZE, VAL, Following, loaded, recordings, tiny_explorer, trained

from attention.method import Target
from attention.methods import METHODS as ATTENTION_METHODS
from attention.study import explain
from browser.explorer import DemonstratedPoses, Explorer, Question, place, t_corners
from browser.server import create_app, serving
from datamodules.opening import open_demonstrations
from envs.push_t import BOARD_PX, T_OUTLINE_PX, WALLS_PX, PushT, PushTTask, distance_to_t_px
from landscapes.grid import Grid
from landscapes.methods import METHODS, Probe
from landscapes.study import Frames, kernel_scale, predict_frames
from rendering.colour import colour_table, colours

EPISODE, FRAME, HORIZON = 2, 5, 3
POSE = (300.0, 120.0, 200.0, 310.0, 2.5)


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    made = tiny_explorer(tmp_path_factory.mktemp("explorer"))
    yield made
    made.close()


def question(**changes) -> Question:
    asked = Question((0,), EPISODE, FRAME, HORIZON, "likelihood", "rollout")
    return replace(asked, **changes)


def picture_of(address: str) -> np.ndarray:
    encoded = np.frombuffer(b64decode(address.removeprefix("data:image/png;base64,")), np.uint8)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def without_times(answer: dict) -> dict:
    parts = [{key: part[key] for key in part if key != "elapsed_ms"} for part in answer["answers"]]
    return {**answer, "answers": parts, "elapsed_ms": None}


def by_library(explorer: Explorer, method: str):
    """What ``analyze.py landscape`` would compute of the same frame, in one go for the episode."""
    (subject,) = explorer.subjects
    view = subject.view
    data = open_demonstrations(subject.demonstrations.source.name, view, progress=False)
    data.setup()
    calibration = Frames.spread([data.episode(each) for each in subject.calibration_episodes], 64)
    answers = predict_frames(view, calibration.batch, range(CHUNK), 8)
    batch = data.episode(EPISODE)
    predictions = predict_frames(view, batch, range(CHUNK), 8)
    scale = kernel_scale(view, predictions, answers)
    probe = Probe(view, batch, predictions, scale, (HORIZON,), Grid())
    return batch, predictions.rows(slice(FRAME, FRAME + 1)), METHODS[method]().landscape(probe)


@pytest.mark.parametrize("method", ["likelihood", "committed", "belief", "energy", "recon"])
def test_a_recorded_frame_has_the_landscape_that_the_library_gives(explorer, method):
    _, predictions, expected = by_library(explorer, method)
    found = explorer.answer(question(method=method))["answers"][0]["landscape"]
    heat = colours(expected.scores[FRAME, 0].numpy(), expected.value_range, colour_table("viridis"))
    # Rounding may move a score across the border of two colours.
    differing = (picture_of(found["heat"]) != heat).any(-1).mean()
    assert differing < 0.001
    torch.testing.assert_close(
        torch.tensor(found["prediction"]).double(), predictions.point[0, HORIZON], atol=1e-4, rtol=0
    )
    assert found["unit"] == expected.unit


def test_the_likelihood_of_the_demonstration_is_that_of_the_library(explorer):
    _, predictions, expected = by_library(explorer, "likelihood")
    answer = explorer.answer(question())["answers"][0]["landscape"]
    scale = torch.tensor(answer["calibration"]["scale_px"]).double()
    shown = predictions.at([HORIZON])
    mixture = shown.mixture(scale[None, None])
    nll = -mixture.log_density(shown.expert[:, :, None])
    assert answer["numbers"]["nll_nats"] == pytest.approx(float(nll), abs=1e-5)
    mass = expected.mass[FRAME, 0].double()
    # The smallest region of 90 %: its cells hold that much, and without the last one they do not.
    ordered = mass.flatten().sort(descending=True).values.cumsum(0) / mass.sum()
    n_cells = int((ordered < 0.9).sum()) + 1
    cell_px2 = (BOARD_PX / 128) ** 2
    assert answer["numbers"]["area90_px2"] == pytest.approx(n_cells * cell_px2, abs=2 * cell_px2)


@pytest.mark.parametrize("method", ["cross_attention", "rollout", "relevancy", "occlusion"])
def test_a_recorded_frame_has_the_attention_that_the_library_gives(explorer, method):
    batch, _, _ = by_library(explorer, "likelihood")
    rows = batch.observation.rows(slice(FRAME, FRAME + 1))
    view = explorer.subjects[0].view
    expected = explain(ATTENTION_METHODS[method](), view, rows, Target((HORIZON,))).shares()
    found = explorer.answer(question(attention=method))["answers"][0]["attention"]
    shares = {part["name"]: part["share"] for part in found["shares"]}
    assert shares == pytest.approx({name: float(share) for name, share in expected.items()})


def test_moving_away_and_back_gives_the_same_answer(explorer):
    before = explorer.answer(question())
    away = explorer.answer(question(pose=POSE))
    back = explorer.answer(question(pose=tuple(before["pose"])))
    assert without_times(back) == without_times(before)
    assert away["is_moved"]
    assert not back["is_moved"]
    assert away["answers"][0]["landscape"]["heat"] != before["answers"][0]["landscape"]["heat"]
    assert away["scene"] != before["scene"]


def test_a_drawn_pose_is_seen_as_if_it_had_been_recorded(explorer):
    (subject,) = explorer.subjects
    recorded = subject.recorded(question())
    drawn = subject.drawn(recorded, recorded.simulator_state[0].double().numpy())
    assert torch.equal(drawn.observation.images["image"], recorded.observation.images["image"])
    assert torch.equal(drawn.observation.state, recorded.observation.state)
    assert torch.equal(
        subject.view.predict_chunk(drawn.observation),
        subject.view.predict_chunk(recorded.observation),
    )
    # And nothing was demonstrated there.
    assert bool(drawn.action_is_pad.all())


def test_the_policy_sees_what_the_simulator_shows_of_the_pose(explorer):
    env = PushT(SIZE)
    env.reset_to(np.array(POSE))
    answer = explorer.answer(question(pose=POSE, attention=None))
    seen = answer["answers"][0]["attention"]["cameras"][0]["picture"]
    assert np.array_equal(picture_of(seen), env.image())
    assert np.array_equal(picture_of(answer["scene"]), env.frame(BOARD_PX))
    landscape = answer["answers"][0]["landscape"]
    assert landscape["demonstrated"] is None
    assert landscape["numbers"]["nll_nats"] is None
    env.close()


@pytest.mark.parametrize("method", ["belief", "expert_mode"])
def test_methods_of_recorded_frames_say_so_of_a_moved_pose(explorer, method):
    moved = explorer.answer(question(method=method, pose=POSE))["answers"][0]["landscape"]
    assert "moved pose has none" in moved["reason"]
    assert "heat" not in moved
    assert "heat" in explorer.answer(question(method=method))["answers"][0]["landscape"]


def test_what_a_policy_cannot_answer_is_a_reason(explorer):
    (described,) = explorer.session()["policies"]
    reasons = {method["name"]: method["reason"] for method in described["methods"]}
    assert [name for name, reason in reasons.items() if reason] == ["noise_pred"]
    answer = explorer.answer(question(method="noise_pred"))["answers"][0]["landscape"]
    assert "predicts no noise" in answer["reason"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"episode": 17}, "episode 17: the data set has 6 episodes"),
        ({"frame": LENGTHS[EPISODE]}, "frame 14: episode 2 has frames 0 to 13"),
        ({"frame": -1}, "frame -1: give a whole number"),
        ({"frame": 1.5}, "frame 1.5"),
        ({"episode": None}, "episode None"),
        ({"horizon": CHUNK}, f"horizon {CHUNK}: one predicts chunk steps 0 to {CHUNK - 1}"),
        ({"method": "magic"}, "method 'magic': choose from likelihood"),
        ({"attention": "magic"}, "attention 'magic'"),
        ({"policies": [1]}, r"policies \[1\]: there are 0 to 0"),
        ({"policies": []}, "at least one"),
        ({"policies": [0, 0]}, "each policy once"),
        ({"pose": [1.0, 2.0]}, "give agent x, y, T x, y"),
        ({"pose": [1.0, 2.0, 3.0, 4.0, float("nan")]}, "finite"),
        ({"pose": [1.0, 2.0, 3.0, 4.0, float("inf")]}, "finite"),
        ({"pose": [1.0, 2.0, 3.0, 4.0, "x"]}, "'x' is no number"),
        ({"pose": "here"}, "give a list"),
    ],
)
def test_wrong_questions_are_refused_with_their_value(explorer, body, message):
    asked = {"policies": [0], "episode": EPISODE, "frame": FRAME, "horizon": 0}
    asked |= {"method": "likelihood", **body}
    with pytest.raises(ValueError, match=message):
        explorer.answer(Question.read(asked))


def test_answers_travel_as_json_and_errors_as_status_400(explorer):
    with serving(create_app(None, explorer, None)) as address:

        def ask(body: bytes) -> dict:
            headers = {"Origin": address.rstrip("/"), "Content-Type": "application/json"}
            request = Request(f"{address}api/explorer/answer", body, headers)
            with urlopen(request) as response:
                return json.load(response)

        with urlopen(f"{address}api/explorer/session") as response:
            assert json.load(response) == json.loads(json.dumps(explorer.session()))
        asked = {"policies": [0], "episode": EPISODE, "frame": FRAME, "horizon": 0}
        asked |= {"method": "likelihood", "pose": list(POSE)}
        assert ask(json.dumps(asked).encode())["pose"] == list(POSE)
        for body, message in (
            (json.dumps({**asked, "frame": 99}), "frame 99"),
            (json.dumps({**asked, "pose": [float("nan")] * 5}), "finite"),
            ("{", "line 1"),
            ("[1]", "JSON object"),
        ):
            with pytest.raises(HTTPError) as refused:
                ask(body.encode())
            assert refused.value.code == 400
            assert message in json.load(refused.value)["error"]


# Poses


def random_states(n: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.hstack([generator.uniform(-100, 612, (n, 4)), generator.uniform(0, 7, (n, 1))])


def test_clipping_brings_everything_onto_the_board_and_only_once():
    task = PushTTask()
    for state in random_states(200):
        placed = place(state, task)
        corners = t_corners(placed.state[None])[0]
        assert corners.min() >= WALLS_PX[0] - 1e-9
        assert corners.max() <= WALLS_PX[1] + 1e-9
        assert ((placed.state[:2] >= 0) & (placed.state[:2] <= BOARD_PX)).all()
        assert placed.state[4] == state[4]
        again = place(placed.state, task)
        assert np.allclose(again.state, placed.state)
        named = {"agent": slice(2), "block": slice(2, 4)}
        for name, part in named.items():
            assert (name in placed.clipped) == bool((placed.state[part] != state[part]).any())


def test_a_pose_that_was_clipped_is_said_to_be(explorer):
    answer = explorer.answer(question(pose=(600.0, 100.0, 256.0, 256.0, 0.0)))
    assert answer["clipped"] == ["agent"]
    assert answer["pose"][:2] == [BOARD_PX, 100.0]


def test_corners_lie_on_the_border_of_the_t():
    for state in random_states(20):
        corners = t_corners(state[None])[0]
        assert len(corners) == len(T_OUTLINE_PX)
        assert distance_to_t_px(corners, state[2:]) == pytest.approx(0, abs=1e-9)


def test_overlap_is_how_far_the_agent_would_have_to_go():
    # Left of an upright T, whose bar reaches from 240 to 360.
    for gap_px in (20.0, 15.0, 10.0, 2.0):
        state = np.array([240.0 - gap_px, 215.0, 300.0, 200.0, 0.0])
        assert place(state, PushTTask()).overlap_px == pytest.approx(max(15 - gap_px, 0))


def test_demonstrated_poses_are_at_no_distance_and_turning_counts():
    states = random_states(30)
    poses = DemonstratedPoses(states, np.repeat([0.0, 1.0, 2.0], 10))
    for row, state in enumerate(states):
        distance = poses.distance_px(state)
        assert distance[row] == 0
        other = state + np.array([3.0, 4.0, 0.0, 0.0, 0.0])
        assert poses.distance_px(other)[row] == pytest.approx(5)
        whole_turn = state + np.array([0.0, 0.0, 0.0, 0.0, 2 * np.pi])
        assert poses.distance_px(whole_turn)[row] == pytest.approx(0, abs=1e-9)
        assert poses.distance_px(state + np.array([0, 0, 0, 0, np.pi]))[row] > 50


def test_the_yardstick_compares_with_other_episodes_only():
    still = np.tile([100.0, 100.0, 256.0, 256.0, 0.0], (3, 1))
    elsewhere = still + np.array([7.0, 0.0, 0.0, 0.0, 0.0])
    poses = DemonstratedPoses(np.concatenate([still, elsewhere]), np.repeat([0.0, 1.0], 3))
    assert poses.usual_px == pytest.approx((7.0, 7.0))
    assert DemonstratedPoses(still, np.zeros(3)).usual_px == (np.inf, np.inf)


def test_the_answer_says_how_far_demonstrations_are(explorer):
    recorded = explorer.answer(question())["familiar"]
    assert recorded["nearest_px"] == 0
    assert recorded["n_poses"] == sum(LENGTHS)
    assert recorded["n_episodes"] == len(LENGTHS)
    state = np.array(explorer.answer(question())["pose"])
    state[0] = 500.0
    moved = explorer.answer(question(pose=tuple(state.tolist())))["familiar"]
    assert moved["nearest_px"] > recorded["q95_px"]


# Data and policies


def test_without_states_frames_are_answered_and_nothing_can_be_moved(tmp_path: Path):
    explorer = tiny_explorer(tmp_path, states=False)
    answer = explorer.answer(question())
    assert answer["pose"] is None
    assert picture_of(answer["scene"]).shape == (SIZE, SIZE, 3)
    assert "heat" in answer["answers"][0]["landscape"]
    (described,) = explorer.session()["policies"]
    assert "the data hold no states of the simulator" in described["why_fixed"]
    assert explorer.session()["t_outline_px"] is None
    with pytest.raises(ValueError, match="nothing can be moved: the data hold no states"):
        explorer.answer(question(pose=POSE))
    explorer.close()


def test_the_scale_is_fitted_on_held_out_episodes_where_the_policy_names_them(tmp_path: Path):
    data = recordings(tmp_path)
    policies = [trained(tiny_act(), tmp_path, data), loaded(tiny_act(), data)]
    explorer = Explorer.open(policies, ["says", "silent"], str(data), PushTTask, n_samples=8)
    says, silent = explorer.answer(question(policies=(0, 1), episode=VAL[1]))["answers"]
    calibration = says["landscape"]["calibration"]
    assert set(calibration["episodes"]) < set(VAL)
    assert calibration["is_held_out"]
    assert calibration["is_shown"] == (VAL[1] in calibration["episodes"])
    assert len(silent["landscape"]["calibration"]["episodes"]) == len(LENGTHS) // 2
    assert not silent["landscape"]["calibration"]["is_held_out"]
    assert calibration["note"] == ""
    assert "does not say" in silent["landscape"]["calibration"]["note"]
    assert [described["val"] for described in explorer.session()["policies"]] == [list(VAL), None]
    # What is familiar is what the first policy was trained on.
    assert set(explorer.demonstrated.episodes.tolist()) == {0, 2, 3, 5}
    explorer.close()


def test_a_moved_pose_has_no_history_but_itself(tmp_path: Path):
    data = recordings(tmp_path)
    explorer = Explorer.open([loaded(Following(), data)], ["toy"], str(data), PushTTask)
    at_rest = [255.0, 245.0]
    moved = explorer.answer(question(pose=POSE))["answers"][0]
    assert moved["landscape"]["prediction"] == pytest.approx(at_rest)
    recorded = explorer.answer(question())["answers"][0]
    assert recorded["landscape"]["prediction"] != pytest.approx(at_rest)
    assert not recorded["landscape"]["calibration"]["is_fitted"]
    assert "looks inside ACT" in recorded["attention"]["reason"]
    assert explorer.session()["policies"][0]["is_historic"]
    explorer.close()


def test_episodes_that_are_shorter_than_a_chunk_are_answered_too(tmp_path: Path):
    data = recordings(tmp_path)
    policy = loaded(tiny_act(chunk_size=max(LENGTHS)), data)
    explorer = Explorer.open([policy], ["long"], str(data), PushTTask, n_samples=8)
    shortest = LENGTHS.index(min(LENGTHS))
    last = explorer.answer(question(episode=shortest, frame=min(LENGTHS) - 1))
    landscape = last["answers"][0]["landscape"]
    # Its demonstration ends here.
    assert landscape["demonstrated"] is None
    assert "heat" in landscape
    explorer.close()


def test_names_tell_policies_apart(tmp_path: Path):
    data = recordings(tmp_path)
    policy = loaded(tiny_act(), data)
    with pytest.raises(ValueError, match="of 2 policies its own"):
        Explorer.open([policy, policy], ["one", "one"], str(data), PushTTask)
