"""Contexts cut from a stream of documents, against the stream spelled out token by token."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool import contexts as module
from megatron_groupmates.pool.contexts import Contexts, DocumentStream, Packing, choose_packing, join_contexts
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder, derive_key, next_epoch_entry, permute
from megatron_groupmates.pool.rowset import RowSet, pack_rows
from tests.pool.helpers import make_pool

Token = tuple[int, int]  # (pool row, place in it)


def pieces_of(contexts: Contexts) -> list[list[tuple[int, int, int]]]:
    """(row, first_token, num_tokens) of each context's pieces."""
    pieces = list(zip(contexts.rows.tolist(), contexts.first_token.tolist(), contexts.num_tokens.tolist(), strict=True))
    first = contexts.first_piece.tolist()
    return [pieces[start:stop] for start, stop in itertools.pairwise(first)]


def tokens_of(contexts: Contexts) -> list[list[Token]]:
    return [[(row, first + number) for row, first, count in pieces for number in range(count)] for pieces in pieces_of(contexts)]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    context_length=st.integers(1, 12),
    block=st.sampled_from([1, 2, 5, 64]),
    far=st.sampled_from([0, 4, 1 << 20]),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_a_stream_equals_its_tokens_one_by_one(lengths: list[int], context_length: int, block: int, far: int, data: st.DataObject) -> None:
    """Of some of the rows, whether sums are made row by row or from the lengths of all."""
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    chosen[0] = True
    ranks = np.array(data.draw(st.permutations(range(int(chosen.sum())))), dtype=np.int64)
    order = np.flatnonzero(chosen)[ranks]
    tokens = [(int(row), number) for row in order for number in range(lengths[row])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "_CHUNK", 2 * block)
        patch.setattr(module, "_FAR", far)
        packing = Packing(np.array(lengths, np.int32), context_length)
        stream = DocumentStream(RowSet(pack_rows(chosen)), lambda a, b: ranks[a:b], packing)
        assert stream.num_contexts == len(tokens) // context_length
        for _ in range(4):
            first = data.draw(st.integers(0, stream.num_contexts))
            count = data.draw(st.integers(0, stream.num_contexts - first))
            pieces = stream.pieces(first, count)
            found = Contexts(np.arange(first, first + count), np.zeros(count, np.int64), *pieces)
            assert tokens_of(found) == [tokens[k * context_length : (k + 1) * context_length] for k in range(first, first + count)]
            assert all(part.dtype == np.int64 for part in pieces) and (found.num_tokens > 0).all()
            begins = np.cumsum([0, *(lengths[row] for row in order[:-1])])
            assert stream.num_begun(first) == int((begins < first * context_length).sum())


def entry(generation: int, effective_sample: int, epoch: int = 0) -> LogEntry:
    return LogEntry(generation, effective_sample, epoch, digest=f"digest {generation}")


def slow_contexts(
    lengths: list[int], context_length: int, seed: int, entries: list[LogEntry], masks: dict[int, np.ndarray], stop: int | None = None
) -> tuple[list[tuple[list[Token], int, int]], set[int]]:
    """By sets and lists, straight from the semantics.

    Returns:
        (tokens, generation, window) of every global sample, below ``stop`` if given, and the rows then consumed.
    """
    result: list[tuple[list[Token], int, int]] = []
    window, consumed, served_by = 0, set(), {}
    for number, item in enumerate(entries):
        selected = set(np.flatnonzero(masks[item.generation]).tolist())
        if number == 0:
            eligible = selected
        elif item.epoch == entries[number - 1].epoch:
            eligible = selected - consumed
        else:
            eligible = set() if len(consumed) == len(lengths) else set(served_by[item.generation])
        if sum(lengths[row] for row in eligible) < context_length:
            window, consumed, served_by, eligible = window + 1, set(), {}, selected
        key = derive_key("sample order", seed, item.generation, item.epoch)
        rows = np.array(sorted(eligible))[permute(np.arange(len(eligible)), len(eligible), key)].tolist()
        stream = [(row, place) for row in rows for place in range(lengths[row])]
        cut = [stream[first : first + context_length] for first in range(0, len(stream) - context_length + 1, context_length)]
        end = entries[number + 1].effective_sample if number + 1 < len(entries) else stop
        served = cut if end is None else cut[: end - item.effective_sample]
        touched = eligible if len(served) == len(cut) else {row for context in served for row, _ in context}
        consumed |= touched
        served_by.setdefault(item.generation, set()).update(touched)
        result += [(context, item.generation, window) for context in served]
    return result, consumed


@st.composite
def runs(draw: st.DrawFn) -> tuple[SampleOrder, list[int], int, list[LogEntry], dict[int, np.ndarray]]:
    """Documents, generations that each fill a context, and a log as a trainer may write it."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=30))
    masks = {}
    for generation in range(draw(st.integers(1, 4))):
        mask = np.array(draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
        mask[draw(st.integers(0, len(lengths) - 1))] = True
        masks[generation] = mask
    smallest = min(int(np.array(lengths)[mask].sum()) for mask in masks.values())
    context_length = draw(st.integers(1, min(smallest, 15)))
    packing = Packing(np.array(lengths, dtype=np.int32), context_length)
    order = SampleOrder(len(lengths), draw(st.integers(0, 5)), [entry(0, 0)], masks, packing)
    for _ in range(draw(st.integers(0, 8))):
        last = order.entries[-1]
        if draw(st.booleans()):
            order.prepare_to_extend(draw(st.integers(0, order.exhausted_at())))
        if draw(st.booleans()):
            order = order.extended(next_epoch_entry(order), masks[last.generation])
        else:
            sample = draw(st.integers(last.effective_sample, order.exhausted_at()))
            generation = draw(st.sampled_from(sorted(masks)))
            order = order.extended(entry(generation, sample, last.epoch), masks[generation])
    return order, lengths, context_length, list(order.entries), masks


def everything(order: SampleOrder) -> list[tuple[list[Token], int]]:
    contexts = order.contexts(0, order.exhausted_at())
    assert contexts.samples.tolist() == list(range(order.exhausted_at()))
    return list(zip(tokens_of(contexts), contexts.generations.tolist(), strict=True))


@given(run=runs())
@settings(deadline=None, max_examples=150)
def test_equals_the_semantics_spelled_out(run) -> None:
    order, lengths, context_length, entries, masks = run
    slow, _ = slow_contexts(lengths, context_length, order.seed, entries, masks)
    assert everything(order) == [(tokens, generation) for tokens, generation, _ in slow]
    assert order.exhausted_at() == len(slow)
    assert all(len(tokens) == context_length for tokens, _, _ in slow)


@given(run=runs())
@settings(deadline=None, max_examples=100)
def test_exactly_once(run) -> None:
    """Within a window no document is served by two segments and no token twice, but for the repeats of epoch entries."""
    order, lengths, context_length, entries, masks = run
    windows = [window for _, _, window in slow_contexts(lengths, context_length, order.seed, entries, masks)[0]]
    served = everything(order)
    starts = [item.effective_sample for item in entries] + [order.exhausted_at()]
    seen: dict[int, set[int]] = {}
    for number, item in enumerate(entries):
        tokens = [token for context, _ in served[starts[number] : starts[number + 1]] for token in context]
        rows = {row for row, _ in tokens}
        assert len(set(tokens)) == len(tokens)
        assert all(masks[item.generation][row] for row in rows)
        if not tokens:
            continue
        assert tokens[0][1] == 0, "a segment begins with a whole document"
        window = seen.setdefault(windows[starts[number]], set())
        repeats = number > 0 and item.epoch != entries[number - 1].epoch and bool(window)
        assert repeats or window.isdisjoint(rows)
        window.update(rows)


@given(run=runs(), data=st.data())
@settings(deadline=None, max_examples=80)
def test_any_chunking_and_any_shorter_log_give_the_same_contexts(run, data: st.DataObject) -> None:
    """Resume from a sample number alone, and replay after a roll-back."""
    order, lengths, context_length, entries, masks = run
    whole, packing = everything(order), Packing(np.array(lengths), context_length)
    fresh = SampleOrder(len(lengths), order.seed, entries, masks, packing)
    for _ in range(5):
        first = data.draw(st.integers(0, len(whole)))
        count = data.draw(st.integers(0, len(whole) - first))
        contexts = fresh.contexts(first, count)
        assert list(zip(tokens_of(contexts), contexts.generations.tolist(), strict=True)) == whole[first : first + count]
        assert all(fresh.generation(first + number) == whole[first + number][1] for number in range(count))
        start = data.draw(st.integers(0, count))
        stop = data.draw(st.integers(start, count))
        assert tokens_of(contexts.part(start, stop)) == tokens_of(contexts)[start:stop]
    for number in range(1, len(entries)):
        shorter = SampleOrder(len(lengths), order.seed, entries[:number], masks, packing)
        assert everything(shorter)[: entries[number].effective_sample] == whole[: entries[number].effective_sample]


@given(run=runs(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_consumed_is_what_the_window_has_begun(run, data: st.DataObject) -> None:
    order, lengths, context_length, entries, masks = run
    sample = data.draw(st.integers(0, order.exhausted_at()))
    in_force = [item for item in entries if item.effective_sample <= sample]
    _, expected = slow_contexts(lengths, context_length, order.seed, in_force, masks, sample)
    assert set(np.flatnonzero(order.consumed(sample)).tolist()) == expected


@given(num_rows=st.integers(1, 40), seed=st.integers(0, 3), data=st.data())
@settings(deadline=None, max_examples=40)
def test_documents_of_one_context_each_are_the_rows(num_rows: int, seed: int, data: st.DataObject) -> None:
    """Packing none is the special case of documents that each fill a context."""
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)))
    mask[0] = True
    lengths = np.full(num_rows, 7)
    masks = {0: np.ones(num_rows, dtype=bool), 1: mask}
    entries = [entry(0, 0), entry(1, data.draw(st.integers(0, num_rows)))]
    packed = SampleOrder(num_rows, seed, entries, masks, Packing(lengths, 7))
    plain = SampleOrder(num_rows, seed, entries, masks, Packing(lengths))
    assert packed.exhausted_at() == plain.exhausted_at()
    count = plain.exhausted_at()
    rows, generations = plain.rows(0, count)
    for order in (packed, plain):
        contexts = order.contexts(0, count)
        assert pieces_of(contexts) == [[(row, 0, 7)] for row in rows.tolist()]
        assert np.array_equal(contexts.generations, generations)
        assert np.array_equal(order.consumed(count), plain.consumed(count))


def test_the_tail_counts_as_consumed_and_too_few_documents_begin_a_new_window() -> None:
    lengths = np.array([4, 4, 4, 3])
    masks = {0: np.array([True, True, True, False]), 1: np.ones(4, dtype=bool)}
    order = SampleOrder(4, 0, [entry(0, 0)], masks, Packing(lengths, 5))
    assert order.exhausted_at() == 2, "12 tokens: two contexts of 5, two tokens left out"
    assert order.consumed(0).tolist() == [False] * 4 and order.consumed(2).tolist() == [True, True, True, False]
    assert order.consumed(1).sum() == 2, "the document cut after 5 tokens is consumed"
    again = order.extended(next_epoch_entry(order), masks[0])
    assert {row for context in tokens_of(again.contexts(2, 2)) for row, _ in context} <= {0, 1, 2}
    adopted = order.extended(entry(1, 2), masks[1])
    assert adopted.exhausted_at() == 2 + 3, "3 tokens left do not fill a context: a new window serves all 15"
    assert not adopted.consumed(2).any()


def test_a_generation_that_fills_no_context_is_refused() -> None:
    masks = {0: np.ones(5, dtype=bool), 1: np.array([True, False, False, False, True])}
    order = SampleOrder(5, 0, [entry(0, 0)], masks, Packing(np.full(5, 3), 7))
    allows = [order.preparation(0).allows(pack_rows(mask), np.full(5, 3)) for mask in masks.values()]
    assert allows == [True, False]
    with pytest.raises(UserError, match="generation 1 selects documents of 6 tokens in all, fewer than one context of 7"):
        order.extended(entry(1, 1), masks[1])
    assert order.entries == (entry(0, 0),)


@given(seed=st.integers(0, 5), data=st.data())
@settings(deadline=None, max_examples=40)
def test_excluded_documents_are_never_served_and_do_not_hold_up_an_epoch(seed: int, data: st.DataObject) -> None:
    """Packing what is left of a pool is packing a pool that never had the rest."""
    lengths = np.array(data.draw(st.lists(st.integers(5, 12), min_size=2, max_size=20)))
    excluded = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    excluded[0] = False
    kept = np.flatnonzero(~excluded)
    order = SampleOrder(len(lengths), seed, [entry(0, 0)], {0: np.ones(len(lengths), dtype=bool)}, Packing(lengths, 5), excluded)
    alone = SampleOrder(len(kept), seed, [entry(0, 0)], {0: np.ones(len(kept), dtype=bool)}, Packing(lengths[kept], 5))
    for _ in range(3):
        order = order.extended(next_epoch_entry(order), np.ones(len(lengths), dtype=bool))
        alone = alone.extended(next_epoch_entry(alone), np.ones(len(kept), dtype=bool))
    expected = [([(int(kept[row]), place) for row, place in tokens], generation) for tokens, generation in everything(alone)]
    assert everything(order) == expected


def test_packing_counts_and_is_checked(tmp_path: Path) -> None:
    samples = [np.zeros(length, dtype=np.int64) for length in (9, 8, 3, 9)]
    index = make_pool(tmp_path / "pool", (3, 1), samples=samples)
    packing = choose_packing(index, "documents", 4)
    assert (packing.context_length, packing.num_samples(), packing.num_tokens(), packing.name) == (5, 5, 29, "documents/5")
    assert packing.num_samples(np.array([True, True, False, False])) == 3
    with pytest.raises(UserError, match=r"has 29 tokens, fewer than one training sequence of 30"):
        choose_packing(index, "documents", 29)
    message = (
        r"need samples of 9 tokens, but 2 of the 4 samples .* \(the first has 8\); set data.packing=documents, preprocess with --pack 9"
    )
    with pytest.raises(UserError, match=message):
        choose_packing(index, "none", 8)
    even = choose_packing(make_pool(tmp_path / "even"), "none", 8)
    assert (even.context_length, even.num_samples(), even.name) == (None, 16, "none")
    assert even.num_samples(np.arange(16) < 3) == 3


def test_joining_contexts_shifts_their_pieces() -> None:
    order = SampleOrder(6, 0, [entry(0, 0)], {0: np.ones(6, dtype=bool)}, Packing(np.array([3, 5, 1, 4, 2, 6]), 4))
    whole = order.contexts(0, 5)
    parts = [order.contexts(0, 2), order.contexts(2, 0), order.contexts(2, 3)]
    assert pieces_of(join_contexts(parts)) == pieces_of(whole)
    assert len(order.contexts(3, 0)) == 0 and order.contexts(3, 0).first_piece.tolist() == [0]


def test_threads_share_a_stream() -> None:
    """A preparation asks while training does: whoever lengthens the sums, all find the same."""
    lengths = np.random.default_rng(0).integers(1, 50, 200_000).astype(np.int32)
    masks = {0: np.ones(len(lengths), dtype=bool)}
    expected = SampleOrder(len(lengths), 1, [entry(0, 0)], masks, Packing(lengths, 64))
    shared = SampleOrder(len(lengths), 1, [entry(0, 0)], masks, Packing(lengths, 64))
    last = shared.exhausted_at()
    thread = threading.Thread(target=lambda: [shared.prepare_to_extend(sample) for sample in range(0, last, last // 7)])
    thread.start()
    for sample in range(0, last - 8, last // 60):
        found, wanted = shared.contexts(sample, 8), expected.contexts(sample, 8)
        assert np.array_equal(found.rows, wanted.rows) and np.array_equal(found.first_token, wanted.first_token)
    thread.join()
