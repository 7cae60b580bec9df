"""Learning rates: equal to an independent formula, rising in the warm-up, right at both ends."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import Config, learning_rate
from tests.common.configs import tiny_config


def scheduled(schedule: str, iters: int = 100, **optimizer: Any) -> Config:
    given = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "schedule": schedule, **optimizer}
    return tiny_config(training={"train_iters": iters}, optimizer=given)


def plain_rate(schedule: str, step: int, peak: float, low: float, warmup: int, end: int, fraction: float) -> float:
    """The textbook formulas, one case after the other."""
    if warmup and step <= warmup:
        return peak / warmup * step
    if schedule == "constant":
        return peak
    if step >= end:
        return low
    if schedule == "cosine":
        angle = math.pi * (step - warmup) / (end - warmup)
        return 0.5 * (peak + low) + 0.5 * (peak - low) * math.cos(angle)
    length = max(1, round(end * fraction))
    begins = end - length
    return peak if step <= begins else peak - (peak - low) * (step - begins) / length


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    peak=st.floats(1e-5, 1.0),
    low_share=st.floats(0.0, 1.0),
    warmup=st.integers(0, 40),
    end=st.none() | st.integers(40, 130),
    fraction=st.floats(0.0, 1.0),
    step=st.integers(1, 150),
)
@settings(deadline=None, max_examples=200)
def test_it_equals_the_plain_formula(
    schedule: str, peak: float, low_share: float, warmup: int, end: int | None, fraction: float, step: int
) -> None:
    last = 100 if end is None else end
    assume(schedule != "wsd" or warmup + max(1, round(fraction * last)) <= last)
    low = peak * low_share
    config = scheduled(schedule, learning_rate=peak, min_learning_rate=low, warmup_iters=warmup, decay_iters=end, decay_fraction=fraction)
    expected = plain_rate(schedule, step, peak, low, warmup, last, fraction)
    assert learning_rate(config, step) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_warm_up_rises_evenly_to_the_peak(schedule: str) -> None:
    config = scheduled(schedule, warmup_iters=10)
    rates = [learning_rate(config, step) for step in range(1, 11)]
    assert rates == pytest.approx([1e-2 * step / 10 for step in range(1, 11)])
    assert all(before < after for before, after in itertools.pairwise(rates))
    assert learning_rate(config, 11) <= rates[-1]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_after_the_warm_up_it_never_rises(schedule: str) -> None:
    config = scheduled(schedule, warmup_iters=10)
    rates = [learning_rate(config, step) for step in range(10, 121)]
    assert all(before >= after for before, after in itertools.pairwise(rates))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_decay_ends_at_the_minimum_and_stays_there(schedule: str) -> None:
    config = scheduled(schedule, warmup_iters=10, decay_iters=80)
    assert learning_rate(config, 79) > 1e-3
    assert [learning_rate(config, step) for step in (80, 81, 100)] == [1e-3] * 3
    assert learning_rate(scheduled(schedule), 100) == 1e-3


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert learning_rate(scheduled("cosine", warmup_iters=20), 60) == pytest.approx((1e-2 + 1e-3) / 2)


def test_wsd_is_flat_then_linear() -> None:
    config = scheduled("wsd", decay_fraction=0.25)
    assert {learning_rate(config, step) for step in range(1, 76)} == {1e-2}
    steps = [learning_rate(config, step) - learning_rate(config, step + 1) for step in range(75, 100)]
    assert steps == pytest.approx([9e-3 / 25] * 25)


def test_wsd_with_hardly_any_decay_still_ends_at_the_minimum() -> None:
    config = scheduled("wsd", decay_fraction=0.0)
    assert (learning_rate(config, 99), learning_rate(config, 100)) == (1e-2, 1e-3)


def test_constant_stays_at_the_peak() -> None:
    config = scheduled("constant", warmup_iters=5, decay_iters=50)
    assert {learning_rate(config, step) for step in range(5, 200)} == {1e-2}


def test_a_warm_up_as_long_as_the_run_is_all_warm_up() -> None:
    config = scheduled("cosine", warmup_iters=100)
    assert learning_rate(config, 50) == pytest.approx(5e-3)
    assert (learning_rate(config, 100), learning_rate(config, 101)) == (1e-2, 1e-3)
