import pytest
import torch
from tiny_act import frames, tiny_act
from tiny_sae import tiny_sae

from features.ood import (
    ActiveSetNovelty,
    Calibration,
    MahalanobisNovelty,
    MonitoredPolicy,
    NeighbourNovelty,
    OODMonitor,
    ReconstructionNovelty,
    calibrate,
    detection_quality,
    failure_forecast,
    fit_detector,
    load_detector,
    save_detector,
    shrunk_covariance,
)
from features.taps import read_activations


@pytest.fixture(scope="module")
def policy():
    return tiny_act().requires_grad_(False)


@pytest.fixture(scope="module")
def fitted(policy):
    """Some frames of 30 episodes, and a detector that was calibrated on 20 of them."""
    observation = frames(60, seed=1).observation
    x = read_activations(policy, observation, "encoder")
    sae = tiny_sae(policy, "encoder", observation)
    detector = fit_detector("encoder", sae, x[:20], x[20:], torch.arange(40) // 2, alpha=0.05)
    return detector, sae, observation, x


def episodes(n_episodes: int, seed: int, shift: float = 0.0):
    """Scores of frames that share a level within each episode, which differ in length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (n_episodes,), generator=generator)
    level = torch.randn(n_episodes, generator=generator) + shift
    index = torch.arange(n_episodes).repeat_interleave(lengths)
    return level[index] + 0.5 * torch.randn(len(index), generator=generator), index


@pytest.mark.parametrize(("alpha", "n"), [(0.05, 19), (0.05, 45), (0.2, 30)])
def test_the_promised_false_alarm_rates_hold(alpha, n):
    """Over many draws of calibration and new episodes both rates stay below alpha, and near it."""
    per_frame, per_episode = [], []
    for seed in range(300):
        found = calibrate(*episodes(n, seed), alpha)
        scores, index = episodes(20, 10_000 + seed)
        is_alarm = torch.zeros(20).double()
        share = torch.zeros(20).double()
        for episode in range(20):
            mine = scores[index == episode]
            share[episode] = (mine > found.frame_threshold).double().mean()
            is_alarm[episode] = (mine.max() > found.episode_threshold).double()
        per_frame.append(share.mean())
        per_episode.append(is_alarm.mean())
    margin = 0.012
    for rates in (per_frame, per_episode):
        rate = float(torch.stack(rates).mean())
        assert rate < alpha + margin
    # Exact up to 1 / (n + 1) for maxima.
    assert float(torch.stack(per_episode).mean()) > alpha - 1 / (n + 1) - margin
    # Frames of an episode rise together: the threshold per frame lies below that per episode.
    assert found.frame_threshold <= found.episode_threshold


def test_thresholds_by_hand():
    # 19 episodes at alpha 0.05: both thresholds are the largest score that was ever seen.
    scores, index = torch.arange(38.0), torch.arange(38) // 2
    found = calibrate(scores, index, 0.05)
    assert found == Calibration(0.05, 37.0, 37.0, 19)
    # 20 episodes of 2 frames at alpha 0.1: per episode the 19th of 20 maxima; per frame a summed
    # share of 21 * 0.1 - 1 = 1.1, which are two frames of one half each.
    found = calibrate(torch.arange(40.0), torch.arange(40) // 2, 0.1)
    assert found == Calibration(0.1, 37.0, 37.0, 20)
    # Ties are not above a threshold.
    tied = torch.tensor([0.0, 5.0]).repeat(20)
    assert calibrate(tied, torch.arange(40) // 2, 0.1).frame_threshold == 5.0
    with pytest.raises(ValueError, match="give at least 19"):
        calibrate(torch.arange(18.0), torch.arange(18), 0.05)
    with pytest.raises(ValueError, match="no numbers"):
        calibrate(torch.full((30,), torch.nan), torch.arange(30), 0.05)


def test_scores_are_what_they_say(fitted):
    detector, sae, _, x = fitted
    training, rest = x[:20], x[20:]
    by_name = {novelty.name: novelty for novelty in detector.novelties}
    assert list(by_name) == ["reconstruction", "active_set", "neighbours", "mahalanobis"]

    fvu = (training - sae(training)).square().sum() / (training - training.mean(0)).square().sum()
    score = by_name["reconstruction"].score(training)
    assert float(score.mean()) == pytest.approx(float(fvu))

    rate = ((sae.encode(training) > 0).double().sum(0) + 0.5) / 21
    is_active = (sae.encode(rest[3]) > 0).double()
    surprise = -torch.distributions.Bernoulli(probs=rate).log_prob(is_active).sum(-1).mean()
    assert float(by_name["active_set"].score(rest)[3]) == pytest.approx(float(surprise))

    pooled = fit_detector("encoder", sae, training, rest, torch.arange(40) // 2, pool="mean")
    for found, vectors in ((detector, x.flatten(1)), (pooled, x.mean(1))):
        neighbours, mahalanobis = found.novelties[2:]
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        cosines = (unit[25] @ unit[:20].T).sort(descending=True).values
        expected = (2 - 2 * cosines[9]).sqrt()
        assert float(neighbours.score(x)[25]) == pytest.approx(float(expected), rel=1e-6)

        inverse = torch.linalg.inv(shrunk_covariance(vectors[:20]))
        away = vectors - vectors[:20].mean(0)
        squared = torch.einsum("fi,ij,fj->f", away, inverse, away)
        torch.testing.assert_close(mahalanobis.score(x), squared.sqrt())


def test_shrinkage_is_ledoit_and_wolfs():
    """The noise term is the mean of ||x x^T - S||^2, and many rows need no shrinkage."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, 1.0, 1.0, 0.2]).double()
    rows = torch.randn(30, 4, generator=generator).double() * scales
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / 30
    outer = torch.einsum("ri,rj->rij", centred, centred)
    noise = (outer - covariance).square().sum((1, 2)).mean() / 30
    target = covariance.trace() / 4 * torch.eye(4).double()
    share = noise / (covariance - target).square().sum()
    expected = (1 - share) * covariance + share * target
    torch.testing.assert_close(shrunk_covariance(rows), expected)
    many = torch.randn(20_000, 4, generator=generator).double() * scales
    torch.testing.assert_close(
        shrunk_covariance(many).diag(), scales.square(), rtol=0.05, atol=0.02
    )
    # Fewer rows than dimensions: the plain covariance has no inverse, this one has.
    assert torch.linalg.eigvalsh(shrunk_covariance(rows[:3])).min() > 0


@pytest.mark.parametrize("kind", ["reconstruction", "active_set", "neighbours", "mahalanobis"])
def test_what_is_far_away_scores_high(fitted, kind):
    detector, _, _, x = fitted
    novelty = next(each for each in detector.novelties if each.name == kind)
    generator = torch.Generator().manual_seed(5)
    strange = x[20:] + 3 * x.std() * torch.randn(x[20:].shape, generator=generator).to(x)
    clean, far = novelty.score(x[20:]), novelty.score(strange)
    found = detection_quality(
        detector.calibrations[kind], clean, torch.arange(40) // 2, far, torch.arange(40) // 2
    )
    assert found.auroc.value > 0.9
    assert found.auroc.low > 0.8
    # Calibrated on these very episodes: one of 20 at most.
    assert found.episode_false_alarms.value <= 0.05
    assert found.frame_false_alarms.value <= 0.05
    assert found.episode_detections.value > 0.5
    same = detection_quality(
        detector.calibrations[kind], clean, torch.arange(40) // 2, clean, torch.arange(40) // 2
    )
    assert same.auroc.value == pytest.approx(0.5)
    assert same.auroc.low == pytest.approx(0.5)  # paired by episode


def test_intervals_of_detection_are_over_episodes():
    """Episodes of 2 to 400 frames count alike, and intervals are as wide as their number allows."""
    limits = Calibration(0.05, frame_threshold=0.5, episode_threshold=1.5, n_episodes=40)
    n = 100
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 400, (n,), generator=generator)
    index = torch.arange(n).repeat_interleave(lengths)
    level = (torch.arange(n) < 30).double()
    found = detection_quality(limits, 0 * level[index], index, level[index], index)
    assert found.frame_detections.value == pytest.approx(0.3)
    half = 1.96 * (0.3 * 0.7 / n) ** 0.5
    width = found.frame_detections.high - found.frame_detections.low
    assert width / 2 == pytest.approx(half, rel=0.15)
    assert found.frame_false_alarms.value == found.frame_false_alarms.high == 0
    assert found.episode_detections.value == 0
    assert found.episode_auroc.value == pytest.approx(0.65)
    width = found.episode_auroc.high - found.episode_auroc.low
    assert width / 2 == pytest.approx(half / 2, rel=0.15)


def test_the_monitor_costs_no_prediction_and_changes_none(policy, fitted):
    detector, _, observation, x = fitted
    calls = []
    handle = policy.network.encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        expected = [policy.predict_chunk(observation.rows(slice(0, 7)), [0, 2]) for _ in range(2)]
        assert len(calls) == 2
        with OODMonitor(policy, detector) as monitor:
            assert monitor.take() is None
            watched = MonitoredPolicy(monitor)
            for chunk in expected:
                found = watched.predict_chunk(observation.rows(slice(0, 7)), [0, 2])
                assert torch.equal(found, chunk)
            assert len(calls) == 4
            # Every pass is scored once; an action from a queue gives nothing new.
            assert monitor.take() is None
            # Whoever asks: the monitor listens.
            policy.predict_chunk(observation.rows(slice(7, 9)))
            reading = monitor.take()
    finally:
        handle.remove()
    assert reading is not None
    offline = detector.read(x[:9])
    for name, scores in offline.scores.items():
        torch.testing.assert_close(watched.readings[1].scores[name], scores[:7])
        torch.testing.assert_close(reading.scores[name], scores[7:])
        limits = detector.calibrations[name]
        assert torch.equal(offline.frame_alarms[name], scores > limits.frame_threshold)
        assert torch.equal(offline.episode_alarms[name], scores > limits.episode_threshold)
    with pytest.raises(RuntimeError, match="with statement"):
        monitor.take()
    assert not policy.network.encoder._forward_hooks


def test_a_saved_detector_says_the_same(fitted, policy, tmp_path):
    detector, sae, observation, x = fitted
    save_detector(detector, tmp_path / "ood")
    loaded = load_detector(tmp_path / "ood", sae)
    for (name, one), other in zip(
        detector.read(x).scores.items(), loaded.read(x).scores.values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert loaded.calibrations == detector.calibrations
    assert loaded.layer == "encoder"
    averaging = fit_detector("encoder", sae, x, x, torch.arange(60), pool="mean")
    save_detector(averaging, tmp_path / "mean")
    again = load_detector(tmp_path / "mean", sae).read(x).scores
    for name, one in averaging.read(x).scores.items():
        assert torch.equal(one, again[name]), name
    with pytest.raises(ValueError, match="another autoencoder"):
        load_detector(tmp_path / "ood", tiny_sae(policy, "encoder", observation, k=3))
    with pytest.raises(ValueError, match="no such file"):
        load_detector(tmp_path, sae)


def test_forecasts_look_at_the_same_steps_of_every_episode():
    steps = [torch.arange(0, n, 8) for n in (300, 300, 120, 90, 60)]
    failed = [True, True, False, False, False]
    # Failures score higher early on; successes higher later, which must not count.
    scores = [
        torch.where(at < 75, torch.tensor(1.0 if bad else 0.0), torch.tensor(9.0 - 10 * bad))
        for at, bad in zip(steps, failed, strict=True)
    ]
    found = failure_forecast(scores, steps, [300, 300, 120, 90, 60], failed, max_steps=300)
    assert found.auroc.value == 1.0
    assert (found.n_failed, found.n_succeeded, found.n_over) == (2, 2, 1)
    alike = failure_forecast(scores[:2], steps[:2], [300, 300], failed[:2], 300)
    assert torch.tensor(alike.auroc.value).isnan()
    with pytest.raises(ValueError, match="no score before"):
        failure_forecast(scores[:1], [steps[0] + 100], [300], [True], 300)
    with pytest.raises(ValueError, match="one of each"):
        failure_forecast(scores, steps, [300], failed, 300)


def test_what_cannot_be_fitted_is_refused(fitted):
    _, sae, _, x = fitted
    with pytest.raises(ValueError, match="variance is 0"):
        ReconstructionNovelty.fit(sae, x[:1].expand(5, -1, -1))
    with pytest.raises(ValueError, match="k is 10: 4 frames"):
        NeighbourNovelty.fit(x[:4])
    with pytest.raises(ValueError, match="at least 2 must differ"):
        MahalanobisNovelty.fit(x[:1])
    with pytest.raises(ValueError, match="pool='mean'"):
        MahalanobisNovelty.fit(torch.randn(3, 600, 16))
    rate = ActiveSetNovelty.fit(sae, x[:4]).rate
    assert rate.min() > 0
    assert rate.max() < 1
