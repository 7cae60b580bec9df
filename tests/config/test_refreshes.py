"""Which steps start a round: step by step and as a list, one rule."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import refresh_number, refresh_steps
from tests.common.configs import tiny_config


@given(
    iters=st.integers(1, 60),
    first=st.integers(1, 70),
    interval=st.integers(1, 30),
    limit=st.none() | st.integers(0, 5),
)
@settings(deadline=None, max_examples=150)
def test_the_list_and_the_numbers_agree_with_a_plain_count(iters: int, first: int, interval: int, limit: int | None) -> None:
    config = tiny_config(
        training={"train_iters": iters},
        selection={"first_refresh_step": first, "refresh_interval": interval, "max_refreshes": limit},
    )
    expected: list[int] = []
    for step in range(iters):
        if step >= first and (step - first) % interval == 0 and (limit is None or len(expected) < limit):
            expected.append(step)
    assert refresh_steps(config) == expected
    numbers = {step: number for number, step in enumerate(expected, start=1)}
    for step in range(iters + interval + 2):
        assert refresh_number(config, step) == numbers.get(step)


def test_there_is_none_without_selection_nor_at_the_last_step() -> None:
    assert refresh_steps(tiny_config()) == [5, 10, 15]
    assert refresh_number(tiny_config(), 20) is None
    off = tiny_config(selection={"enabled": False})
    assert refresh_steps(off) == []
    assert refresh_number(off, 5) is None


def test_a_longer_run_keeps_the_numbers_of_its_refreshes() -> None:
    short, long = tiny_config(), tiny_config(training={"train_iters": 33})
    assert refresh_steps(long)[: len(refresh_steps(short))] == refresh_steps(short)
    assert refresh_number(short, 15) == refresh_number(long, 15) == 3
