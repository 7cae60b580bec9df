"""The permutation and the order of samples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder, derive_key, next_epoch_entry, permute


@given(size=st.integers(0, 3000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=60)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 2**15 - 1, 2**15, 2**15 + 1, 100_003])
def test_permute_is_a_bijection_at_borders(size: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


def test_permute_is_frozen() -> None:
    """These values are the data order of existing runs: they must never change."""
    assert permute(np.arange(10), 10, 1).tolist() == [3, 1, 4, 7, 8, 9, 6, 0, 2, 5]
    images = permute(np.arange(6), 1_000_003, 2**63 + 5).tolist()
    assert images == [570459, 307352, 539325, 705453, 316542, 34426]
    images = permute(np.array([0, 10**12, 2**40 - 1]), 2**40, 12345).tolist()
    assert images == [588840083102, 167609868679, 223189853615]
    assert derive_key("sample order", 1, 2, 3) == 8863450486090095053


def slow_permute(position: int, size: int, key: int) -> int:
    """One image, in Python's whole numbers."""
    word = 2**64 - 1

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & word
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & word
        return value ^ (value >> 31)

    num_columns = next(root for root in range(math.isqrt(size), size + 1) if root * root >= size)
    num_rows = math.ceil(size / num_columns)
    while True:
        row, column = divmod(position, num_columns)
        for number in range(8):
            round_key = mix((key + (number + 1) * 0x9E3779B97F4A7C15) & word)
            if number % 2 == 0:
                column = (column + mix((row + round_key) & word)) % num_columns
            else:
                row = (row + mix((column + round_key) & word)) % num_rows
        position = row * num_columns + column
        if position < size:
            return position


@given(size=st.integers(1, 10**6), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(deadline=None, max_examples=100)
def test_permute_equals_plain_integer_arithmetic(size: int, key: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, size - 1))
    assert permute(np.array([position]), size, key).tolist() == [slow_permute(position, size, key)]


@given(size=st.integers(1, 10**12), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(deadline=None, max_examples=40)
def test_permute_is_random_access(size: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20, unique=True)), dtype=np.int64)
    together = permute(positions, size, key)
    assert together.tolist() == [int(permute(np.array([position]), size, key)[0]) for position in positions]
    assert len(set(together.tolist())) == len(positions)
    assert all(0 <= image < size for image in together)


def test_permute_refuses_positions_outside() -> None:
    with pytest.raises(IndexError, match=r"positions 3 to 5 are not all in range\(5\)"):
        permute(np.array([3, 5]), 5, 0)
    with pytest.raises(IndexError, match=r"positions -1 to 0"):
        permute(np.array([-1, 0]), 5, 0)


@pytest.mark.parametrize("size", [7, 50, 64])
def test_permute_mixes_over_keys(size: int) -> None:
    """Every (position, image) pair is about equally frequent over keys: chi-square within 5 sigma of its mean."""
    counts = np.zeros((size, size))
    num_keys = 4000
    for key in range(num_keys):
        counts[np.arange(size), permute(np.arange(size), size, derive_key("mix", key))] += 1
    expected = num_keys / size
    degrees = (size - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_permute_mixes_within_a_key() -> None:
    """Neighbours do not stay neighbours, and each stretch of positions is spread over the whole range."""
    size = 100_000
    images = permute(np.arange(size), size, 99)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.02
    counts, _ = np.histogram(images[:10_000], bins=100, range=(0, size))
    assert 60 < ((counts - 100) ** 2 / 100).sum() < 150


def slow_order(num_rows: int, seed: int, entries: list[LogEntry], masks: dict[int, np.ndarray]) -> list[tuple[int, int, int]]:
    """(row, generation, window) of every global sample, by sets and lists, straight from the semantics."""
    result: list[tuple[int, int, int]] = []
    window, consumed, served_by = 0, set(), {}
    for number, entry in enumerate(entries):
        selected = set(np.flatnonzero(masks[entry.generation]).tolist())
        if number == 0:
            eligible = selected
        elif entry.epoch == entries[number - 1].epoch:
            eligible = selected - consumed
        else:
            eligible = set() if len(consumed) == num_rows else set(served_by[entry.generation])
        if not eligible:
            window, consumed, served_by, eligible = window + 1, set(), {}, selected
        key = derive_key("sample order", seed, entry.generation, entry.epoch)
        order = permute(np.arange(len(eligible)), len(eligible), key)
        rows = np.array(sorted(eligible))[order].tolist()
        if number + 1 < len(entries):
            rows = rows[: entries[number + 1].effective_sample - entry.effective_sample]
        consumed |= set(rows)
        served_by.setdefault(entry.generation, set()).update(rows)
        result += [(row, entry.generation, window) for row in rows]
    return result


def entry(generation: int, effective_sample: int, epoch: int = 0) -> LogEntry:
    return LogEntry(generation, effective_sample, epoch, digest=f"digest {generation}")


@st.composite
def runs(draw: st.DrawFn) -> tuple[SampleOrder, list[LogEntry], dict[int, np.ndarray]]:
    """A pool, generations and a log as a trainer may write it: adoptions and epoch entries in any order."""
    num_rows = draw(st.integers(1, 30))
    num_generations = draw(st.integers(1, 4))
    masks = {}
    for generation in range(num_generations):
        mask = np.array(draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)))
        mask[draw(st.integers(0, num_rows - 1))] = True
        masks[generation] = mask
    order = SampleOrder(num_rows, draw(st.integers(0, 5)), [entry(0, 0)], masks)
    for _ in range(draw(st.integers(0, 8))):
        if draw(st.booleans()):
            order = order.extended(next_epoch_entry(order), masks[order.entries[-1].generation])
        else:
            last = order.entries[-1]
            sample = draw(st.integers(last.effective_sample, order.exhausted_at()))
            generation = draw(st.integers(0, num_generations - 1))
            order = order.extended(entry(generation, sample, last.epoch), masks[generation])
    return order, list(order.entries), masks


def everything(order: SampleOrder) -> list[tuple[int, int]]:
    rows, generations = order.rows(0, order.exhausted_at())
    return list(zip(rows.tolist(), generations.tolist(), strict=True))


@given(run=runs())
@settings(deadline=None, max_examples=150)
def test_equals_the_semantics_spelled_out(run) -> None:
    order, entries, masks = run
    slow = slow_order(order.num_pool_samples, order.seed, entries, masks)
    assert everything(order) == [(row, generation) for row, generation, _ in slow]
    assert order.exhausted_at() == len(slow)


@given(run=runs())
@settings(deadline=None, max_examples=100)
def test_exactly_once(run) -> None:
    """Within a window no row is served twice, but for the repeats of epoch entries; only selected rows are served."""
    order, entries, masks = run
    windows = [window for _, _, window in slow_order(order.num_pool_samples, order.seed, entries, masks)]
    served = everything(order)
    starts = [item.effective_sample for item in entries] + [order.exhausted_at()]
    seen: dict[int, set[int]] = {}
    for number, item in enumerate(entries):
        rows = [row for row, _ in served[starts[number] : starts[number + 1]]]
        assert len(set(rows)) == len(rows)
        assert all(masks[item.generation][row] for row in rows)
        if not rows:
            continue
        window = seen.setdefault(windows[starts[number]], set())
        repeats = number > 0 and item.epoch != entries[number - 1].epoch and bool(window)
        assert window.issuperset(rows) if repeats else window.isdisjoint(rows)
        window.update(rows)


@given(run=runs(), data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_chunking_gives_the_same_rows(run, data: st.DataObject) -> None:
    order, entries, masks = run
    whole = everything(order)
    fresh = SampleOrder(order.num_pool_samples, order.seed, entries, masks)
    for _ in range(5):
        first = data.draw(st.integers(0, len(whole)))
        count = data.draw(st.integers(0, len(whole) - first))
        rows, generations = fresh.rows(first, count)
        assert list(zip(rows.tolist(), generations.tolist(), strict=True)) == whole[first : first + count]
        assert rows.dtype == generations.dtype == np.int64


@given(run=runs())
@settings(deadline=None, max_examples=60)
def test_a_longer_log_changes_nothing_before_its_entries(run) -> None:
    """Prefix stability, and with it replay after a roll-back."""
    order, entries, masks = run
    whole = everything(order)
    for number in range(1, len(entries)):
        shorter = SampleOrder(order.num_pool_samples, order.seed, entries[:number], masks)
        stop = entries[number].effective_sample
        assert everything(shorter)[:stop] == whole[:stop]


@given(run=runs(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_consumed_is_what_the_window_has_served(run, data: st.DataObject) -> None:
    order, entries, masks = run
    sample = data.draw(st.integers(0, order.exhausted_at()))
    # The window that `sample` lies in begins with the last entry that reset it.
    slow = slow_order(order.num_pool_samples, order.seed, entries, masks)
    in_force = [number for number, item in enumerate(entries) if item.effective_sample <= sample][-1]
    following = slow[entries[in_force].effective_sample :]
    assume(following)
    window = following[0][2]
    expected = {row for row, _, its_window in slow[:sample] if its_window == window}
    assert set(np.flatnonzero(order.consumed(sample)).tolist()) == expected


def masks_of(num_rows: int, *selections: list[int]) -> dict[int, np.ndarray]:
    return {number: np.isin(np.arange(num_rows), rows) for number, rows in enumerate(selections)}


def test_adoption_leaves_out_what_earlier_generations_consumed() -> None:
    masks = masks_of(10, list(range(10)), [0, 1, 2, 3, 4, 5])
    order = SampleOrder(10, 0, [entry(0, 0), entry(1, 4)], masks)
    first = set(order.rows(0, 4)[0].tolist())
    second = order.rows(4, order.exhausted_at() - 4)[0].tolist()
    assert set(second) == {0, 1, 2, 3, 4, 5} - first
    assert order.rows(3, 2)[1].tolist() == [0, 1]


def test_exhausted_selection_repeats_its_own_rows_only() -> None:
    masks = masks_of(10, list(range(10)), [0, 1, 2, 3, 4, 5])
    order = SampleOrder(10, 0, [entry(0, 0), entry(1, 4)], masks)
    served = order.rows(4, order.exhausted_at() - 4)[0]
    again = order.extended(next_epoch_entry(order), masks[1])
    repeated = again.rows(order.exhausted_at(), again.exhausted_at() - order.exhausted_at())[0]
    assert sorted(repeated) == sorted(served)
    assert next_epoch_entry(order) == entry(1, order.exhausted_at(), epoch=1)


def test_exhausted_pool_begins_a_new_window() -> None:
    masks = masks_of(10, list(range(5)), list(range(10)))
    order = SampleOrder(10, 0, [entry(0, 0), entry(1, 5)], masks)
    assert order.exhausted_at() == 10
    again = order.extended(next_epoch_entry(order), masks[1])
    assert again.exhausted_at() == 20
    assert sorted(again.rows(10, 10)[0]) == list(range(10))
    assert not again.consumed(10).any()
    assert again.rows(10, 10)[0].tolist() != order.extended(entry(1, 10), masks[1]).rows(10, 10)[0].tolist()


def test_adoption_without_eligible_rows_begins_a_new_window() -> None:
    masks = masks_of(10, list(range(5)), [1, 2])
    order = SampleOrder(10, 0, [entry(0, 0), entry(1, 5)], masks)
    assert sorted(order.rows(5, 2)[0]) == [1, 2]
    assert order.consumed(5).sum() == 0
    assert order.consumed(6).sum() == 1


def test_an_order_may_begin_later() -> None:
    """Selection was switched on at sample 5: nothing is consumed there, and there is nothing before."""
    masks = masks_of(6, [0, 1, 2, 3, 4, 5], [0, 3])
    late = SampleOrder(6, 9, [entry(0, 5), entry(1, 8)], masks)
    early = SampleOrder(6, 9, [entry(0, 0), entry(1, 3)], masks)
    np.testing.assert_array_equal(late.rows(5, 4)[0], early.rows(0, 4)[0])
    assert late.exhausted_at() == early.exhausted_at() + 5
    assert late.consumed(5).sum() == 0
    np.testing.assert_array_equal(late.consumed(8), early.consumed(3))
    with pytest.raises(IndexError, match="no global samples from 4, count 2: the order begins at 5"):
        late.rows(4, 2)
    with pytest.raises(IndexError, match="global sample 4 is not between 5 and"):
        late.consumed(4)


def test_past_the_end_is_an_error() -> None:
    order = SampleOrder(4, 0, [entry(0, 0)], masks_of(4, [0, 1, 2]))
    with pytest.raises(IndexError, match="generation 0 runs out at 3: an epoch entry must be committed first"):
        order.rows(2, 2)
    with pytest.raises(IndexError, match="no global samples from -1"):
        order.rows(-1, 2)
    with pytest.raises(IndexError, match="global sample 4 is not between 0 and 3"):
        order.consumed(4)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "has no entry"),
        ([entry(0, 0), entry(1, 7)], "generation 0 runs out at sample 5, but the next entry begins at 7"),
        ([entry(0, 0), entry(0, 4, epoch=1)], "epoch 1 begins at sample 4, but generation 0 runs out at 5"),
        ([entry(1, 1)], "must be in force from sample 0"),
        ([entry(0, 0), entry(2, 1)], r"generation 2 must select at least one of the pool's 6 samples"),
    ],
)
def test_impossible_logs_are_refused(entries: list[LogEntry], message: str) -> None:
    masks = masks_of(6, [0, 1, 2, 3, 4], [0], [])
    with pytest.raises(UserError, match=message):
        SampleOrder(6, 0, entries, masks)


def test_mask_of_another_pool_is_refused() -> None:
    with pytest.raises(UserError, match=r"its mask is bool\[5\] with 5 selected"):
        SampleOrder(6, 0, [entry(0, 0)], {0: np.ones(5, dtype=bool)})


def test_seed_generation_and_epoch_each_change_the_order() -> None:
    masks = masks_of(200, list(range(200)))
    base = SampleOrder(200, 0, [entry(0, 0)], masks).rows(0, 200)[0].tolist()
    assert base != SampleOrder(200, 1, [entry(0, 0)], masks).rows(0, 200)[0].tolist()
    other = dataclasses.replace(entry(0, 0), generation=1)
    assert base != SampleOrder(200, 0, [other], {1: masks[0]}).rows(0, 200)[0].tolist()


def test_extending_leaves_the_old_order_as_it_was() -> None:
    masks = masks_of(20, list(range(20)), list(range(10)))
    order = SampleOrder(20, 0, [entry(0, 0)], masks)
    before = everything(order)
    order.extended(entry(1, 5), masks[1]).rows(0, 8)
    assert everything(order) == before
    assert order.entries == (entry(0, 0),)
