"""What is worked out before an order is extended changes nothing but the time it takes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.pool import order as order_module
from megatron_groupmates.pool.contexts import Packing
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder, next_epoch_entry


def make(num_rows: int, seed: int, packed: bool) -> tuple[SampleOrder, dict[int, np.ndarray]]:
    generator = np.random.default_rng(seed)
    masks = {number: generator.random(num_rows) < 0.6 for number in range(3)}
    packing = Packing(generator.integers(1, 20, num_rows), 9) if packed else None
    return SampleOrder(num_rows, seed, [LogEntry(0, 0, 0, "0")], masks, packing), masks


def everything(order: SampleOrder, packed: bool) -> list[list[int]]:
    if not packed:
        return [part.tolist() for part in order.rows(0, order.exhausted_at())]
    contexts = order.contexts(0, order.exhausted_at())
    return [contexts.rows.tolist(), contexts.first_token.tolist(), contexts.num_tokens.tolist(), contexts.generations.tolist()]


@given(num_rows=st.integers(300, 3000), seed=st.integers(0, 1000), packed=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_prepared_order_is_extended_to_the_same(num_rows: int, seed: int, packed: bool, data: st.DataObject) -> None:
    """Prepared at any samples, in any order, once or often, before adoptions and epoch entries."""
    plain, masks = make(num_rows, seed, packed)
    prepared, _ = make(num_rows, seed, packed)
    for generation in (1, 2):
        last = plain.entries[-1]
        for sample in data.draw(st.lists(st.integers(0, plain.exhausted_at() + 5), max_size=3)):
            prepared.prepare_to_extend(sample)
        if data.draw(st.booleans()):
            entry, mask = next_epoch_entry(plain), masks[last.generation]
        else:
            sample = data.draw(st.integers(last.effective_sample, plain.exhausted_at()))
            entry, mask = LogEntry(generation, sample, last.epoch, str(generation)), masks[generation]
        plain, prepared = plain.extended(entry, mask), prepared.extended(entry, mask)
        assert everything(prepared, packed) == everything(plain, packed)
        middle = data.draw(st.integers(0, plain.exhausted_at()))
        assert np.array_equal(prepared.consumed(middle), plain.consumed(middle))


def test_few_and_many_served_rows_are_marked_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up one by one, or by a pass over all rows."""
    order, _ = make(5000, 3, packed=False)
    served = order.rows(0, 40)[0]
    few = order.consumed(40)
    assert np.array_equal(np.flatnonzero(few), np.sort(served))
    monkeypatch.setattr(order_module.RowSet, "select", None)
    many = order.consumed(2000)
    monkeypatch.undo()
    assert np.array_equal(np.flatnonzero(many), np.sort(order.rows(0, 2000)[0]))


def test_preparing_in_a_thread_leaves_readers_alone() -> None:
    order, _ = make(20_000, 5, packed=False)
    expected = order.rows(0, 5000)[0]
    thread = threading.Thread(target=lambda: [order.prepare_to_extend(sample) for sample in range(0, 8000, 100)])
    thread.start()
    while thread.is_alive():
        assert np.array_equal(order.rows(0, 5000)[0], expected)
    thread.join()
