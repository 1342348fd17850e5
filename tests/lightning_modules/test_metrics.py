from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_modules.metrics import ChunkL1, shown_chunk_steps
from lightning_modules.optimisation import ParameterGroup, build_adamw, build_schedule


def test_chunk_l1_ignores_padding_and_does_not_depend_on_batching():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(20, 5, 2, generator=generator)
    actions = torch.randn(20, 5, 2, generator=generator)
    is_pad = torch.rand(20, 5, generator=generator) < 0.4
    error = (predicted - actions).abs().mean(-1)
    expected = torch.stack([error[~is_pad[:, k], k].double().mean() for k in range(5)])
    for size in (20, 3, 1):
        metric = ChunkL1(5)
        for rows in torch.arange(20).split(size):
            metric.update(predicted[rows], actions[rows], is_pad[rows])
        per_step, mean = metric.compute()
        torch.testing.assert_close(per_step, expected)
        torch.testing.assert_close(mean, error[~is_pad].double().mean())


def test_shown_steps_are_within_the_chunk_and_hold_both_ends():
    for chunk in (1, 2, 16, 100):
        steps = shown_chunk_steps(chunk)
        assert steps[0] == 0
        assert steps[-1] == chunk - 1
        assert steps == sorted(set(steps))


def learning_rates(schedule, warmup, decay, n):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = build_adamw([ParameterGroup("w", [weight], 2.0)], 0.0, (0.9, 0.999))
    scheduler = build_schedule(optimizer, schedule, warmup, decay)
    rates = []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_warm_up_rises_to_the_rate_and_cosine_ends_at_zero():
    rates = learning_rates("cosine", 10, 110, 111)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)  # half way down
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_constant_schedule_stays():
    assert learning_rates("constant", 2, 0, 6)[2:] == [2.0] * 4


def test_a_cosine_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
        learning_rates("cosine", 10, -1, 1)
