"""The trainer's view of a pool: dataset, batch sampler, trace."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.contexts import Contexts, Packing, join_contexts
from megatron_groupmates.pool.dataset import ContextDataset, OrderBatchSampler, as_they_are, read_contexts
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder, next_epoch_entry
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.skips import Skip, append_skip, blank_skipped, read_skips
from megatron_groupmates.pool.trace import trace
from tests.pool.helpers import make_pool

WHOLE = Packing(np.full(60, 9))


def two_generations(num_rows: int, packing: Packing = WHOLE) -> SampleOrder:
    masks = {0: np.ones(num_rows, dtype=bool), 1: np.arange(num_rows) % 2 == 0}
    order = SampleOrder(num_rows, 3, [LogEntry(0, 0, 0, "a"), LogEntry(1, num_rows // 3, 0, "b")], masks, packing)
    for _ in range(4):
        order = order.extended(next_epoch_entry(order), masks[1])
    return order


def micro_batches(order: SampleOrder, consumed: int, micro_batch_size: int, size: int, global_batch_size: int, num_steps: int) -> Contexts:
    """The contexts of ``num_steps`` global batches in the order of global samples, put together from all ranks."""
    samplers = [iter(OrderBatchSampler(lambda: order, consumed, micro_batch_size, rank, size, global_batch_size)) for rank in range(size)]
    parts = [next(sampler) for _ in range(num_steps * global_batch_size // (micro_batch_size * size)) for sampler in samplers]
    return join_contexts(parts)


def assert_equal(one: Contexts, other: Contexts) -> None:
    for field in dataclasses.fields(Contexts):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def documents_pool(directory: Path, num_rows: int = 60, seed: int = 0) -> PoolIndex:
    """Documents of 1 to 30 tokens, each closed by the end-of-text token."""
    generator = np.random.default_rng(seed)
    samples = [np.append(generator.integers(1, 300, generator.integers(0, 30)), 0) for _ in range(num_rows)]
    return make_pool(directory, (num_rows // 2, num_rows - num_rows // 2), samples=samples)


@given(
    micro_batch_size=st.sampled_from([1, 2, 3]),
    size=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 3),
    consumed=st.integers(0, 20),
    packed=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_any_geometry_gives_the_global_order(micro_batch_size: int, size: int, accumulation: int, consumed: int, packed: bool) -> None:
    order = two_generations(60, Packing(np.random.default_rng(0).integers(1, 19, 60), 9) if packed else WHOLE)
    global_batch_size = micro_batch_size * size * accumulation
    num_steps = (order.exhausted_at() - consumed) // global_batch_size
    served = micro_batches(order, consumed, micro_batch_size, size, global_batch_size, num_steps)
    assert_equal(served, order.contexts(consumed, num_steps * global_batch_size))


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="global_batch_size 10 is not a multiple of micro_batch_size 2 x data_parallel"):
        OrderBatchSampler(lambda: two_generations(60), 0, 2, 0, 2, 10)


def test_issued_samples_is_the_frontier() -> None:
    sampler = OrderBatchSampler(lambda: two_generations(60), 8, 2, 0, 2, 8)
    assert sampler.issued_samples == 8
    batches = iter(sampler)
    next(batches)
    assert sampler.issued_samples == 16
    next(batches)
    assert sampler.issued_samples == 16
    next(batches)
    assert sampler.issued_samples == 24


def test_an_order_that_ends_is_an_error() -> None:
    order = SampleOrder(10, 0, [LogEntry(0, 0, 0, "a")], {0: np.ones(10, dtype=bool)}, WHOLE)
    batches = iter(OrderBatchSampler(lambda: order, 0, 4, 0, 1, 4))
    next(batches)
    next(batches)
    with pytest.raises(IndexError, match="an epoch entry must be committed first"):
        next(batches)


def test_an_adoption_from_the_frontier_on_is_followed() -> None:
    masks = {0: np.ones(40, dtype=bool), 1: np.arange(40) >= 30}
    orders = [SampleOrder(40, 0, [LogEntry(0, 0, 0, "a")], masks, WHOLE)]
    sampler = OrderBatchSampler(lambda: orders[-1], 0, 2, 0, 1, 4)
    batches = iter(sampler)
    served = next(batches).rows.tolist()
    orders.append(orders[-1].extended(LogEntry(1, sampler.issued_samples + 2, 0, "b"), masks[1]))
    for _ in range(4):
        served += next(batches).rows.tolist()
    assert served == orders[-1].rows(0, 10)[0].tolist()
    assert all(row >= 30 for row in served[6:])


def slow_tokens(reader: PoolReader, contexts: Contexts) -> np.ndarray:
    """Each context's tokens, piece by piece."""
    pieces = zip(contexts.rows, contexts.first_token, contexts.num_tokens, strict=True)
    parts = [reader.read(int(row))[first : first + count] for row, first, count in pieces]
    return np.concatenate(parts).reshape(len(contexts), -1)


@pytest.mark.parametrize(("num_workers", "packed"), [(0, False), (0, True), (2, True)])
def test_data_loader_keeps_the_order(tmp_path: Path, num_workers: int, packed: bool) -> None:
    index = documents_pool(tmp_path) if packed else make_pool(tmp_path, (20, 30, 10))
    order = two_generations(60, Packing(index.lengths, 9 if packed else None))
    sampler = OrderBatchSampler(lambda: order, 4, 2, 1, 2, 8)
    loader = torch.utils.data.DataLoader(ContextDataset(index), batch_sampler=sampler, num_workers=num_workers, collate_fn=as_they_are)
    reader, batches = PoolReader(index), iter(loader)
    for step in range(12):
        read = next(batches)
        expected = order.contexts(4 + 4 * step + 2, 2)
        assert_equal(read.contexts, expected)
        assert read.tokens.dtype == torch.int64 and read.damage == {}
        assert np.array_equal(read.tokens.numpy(), slow_tokens(reader, expected))


def zero_out(index: PoolIndex, row: int) -> Path:
    """Overwrite the shard from the sample's data on by ids beyond the vocabulary, for this sample alone."""
    (shard,), _ = index.locate(np.array([row]))
    path = Path(index.shard_path(shard))
    content = bytearray(path.read_bytes())
    start = int(index.offsets[row])
    content[start : start + int(index.member_bytes[row])] = b"\xff" * int(index.member_bytes[row])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_comes_back_as_data(tmp_path: Path, num_workers: int) -> None:
    index = documents_pool(tmp_path)
    order = two_generations(60, Packing(index.lengths, 9))
    whole = read_contexts(PoolReader(index), order.contexts(0, 8))
    damaged = int(whole.contexts.rows[3])
    path = zero_out(index, damaged)
    loader = torch.utils.data.DataLoader(
        ContextDataset(index),
        batch_sampler=OrderBatchSampler(lambda: order, 0, 8, 0, 1, 8),
        num_workers=num_workers,
        collate_fn=as_they_are,
    )
    read = next(iter(loader))
    assert list(read.damage) == [damaged]
    assert str(path) in read.damage[damaged] and "cannot read the sample" in read.damage[damaged]
    of_damaged = torch.from_numpy(np.repeat(read.contexts.rows == damaged, read.contexts.num_tokens).reshape(8, 9))
    assert of_damaged.any()
    assert torch.equal(read.tokens, torch.where(of_damaged, index.eot_id, whole.tokens))


def test_what_is_recorded_is_left_out_whether_or_not_it_can_be_read(tmp_path: Path) -> None:
    index = documents_pool(tmp_path)
    order = two_generations(60, Packing(index.lengths, 9))
    contexts, reader = order.contexts(0, 8), PoolReader(index)
    whole = read_contexts(reader, contexts)
    piece = 3
    sample = int(np.searchsorted(contexts.first_piece, piece, side="right")) - 1
    (shard,), (row,) = index.locate(contexts.rows[[piece]])
    skip = Skip(sample, index.shard_names[shard], int(row), "because")
    append_skip(tmp_path / "skipped.jsonl", skip)
    assert read_skips(tmp_path / "skipped.jsonl") == [skip]

    again = read_contexts(reader, contexts)
    blank, unsettled = blank_skipped(index, again, {skip})
    expected = torch.zeros(72, dtype=torch.bool)
    expected[contexts.num_tokens[:piece].sum() : contexts.num_tokens[: piece + 1].sum()] = True
    assert unsettled == [] and torch.equal(blank, expected.view(8, 9))
    assert torch.equal(again.tokens, torch.where(blank, index.eot_id, whole.tokens))
    assert blank_skipped(index, whole, {Skip(sample + 100, skip.shard, skip.row, "")}) == (None, [])

    zero_out(index, int(contexts.rows[piece]))
    damaged = read_contexts(PoolReader(index), contexts)
    blank, unsettled = blank_skipped(index, damaged, {skip})
    others = [number for number in np.flatnonzero(contexts.rows == contexts.rows[piece]) if number != piece]
    assert len(unsettled) == len(others) and blank.sum() == contexts.num_tokens[piece]
    _, unsettled = blank_skipped(index, damaged, set())
    assert skip in unsettled and "cannot read the sample" in unsettled[0].error


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    assert read_skips(tmp_path / "none.jsonl") == []
    (tmp_path / "skipped.jsonl").write_text('{"sample": 1}\n')
    with pytest.raises(UserError, match=r"skipped.jsonl is damaged: .*; restore it from a copy"):
        read_skips(tmp_path / "skipped.jsonl")


def test_trace_of_packed_documents_and_of_what_was_left_out(tmp_path: Path) -> None:
    index = documents_pool(tmp_path)
    order = two_generations(60, Packing(index.lengths, 9))
    contexts = order.contexts(15, 11)
    tokens = slow_tokens(PoolReader(index), contexts)
    lines = list(trace(index, order, 15, 26))
    assert [line["sample"] for line in lines] == list(range(15, 26))
    sources = [source for line in lines for source in line["sources"]]
    rows = [int(index.rows(shard, np.array(row))) for shard, row, _, _ in sources]
    assert rows == contexts.rows.tolist()
    assert [source[2:] for source in sources] == np.stack([contexts.first_token, contexts.num_tokens], 1).tolist()
    for line, ids in zip(lines, tokens, strict=True):
        assert sum(source[3] for source in line["sources"]) == 9 and "skipped" not in line
        assert line["tokens_sha256"] == hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()

    shard, row, _, count = lines[4]["sources"][0]
    zero_out(index, int(index.rows(shard, np.array(row))))
    skips = {Skip(line["sample"], shard, row, "") for line in lines}
    told = list(trace(index, order, 15, 26, skips))
    ids = tokens[4].copy()
    ids[:count] = index.eot_id
    assert told[4] == {**lines[4], "skipped": True, "tokens_sha256": hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()}
    for line, before in zip(told, lines, strict=True):
        assert ("skipped" in line) == any(source[:2] == [shard, row] for source in before["sources"])
    with pytest.raises(UserError, match=f"{shard}.*row {row}: cannot read the sample"):
        list(trace(index, order, 15, 26))


def test_trace(tmp_path: Path) -> None:
    index = make_pool(tmp_path, (20, 30, 10))
    order, reader = two_generations(60), PoolReader(index)
    objects = list(trace(index, order, 15, 26))
    rows, generations = order.rows(15, 11)
    assert [item["sample"] for item in objects] == list(range(15, 26))
    assert [item["generation"] for item in objects] == generations.tolist()
    assert set(generations.tolist()) == {0, 1}
    for item, row in zip(objects, rows, strict=True):
        [[shard, row_in_shard, first_token, num_tokens]] = item["sources"]
        assert int(index.rows(shard, np.array(row_in_shard))) == row
        assert (first_token, num_tokens) == (0, 9)
        assert item["tokens_sha256"] == hashlib.sha256(reader.read(int(row)).astype("<u4").tobytes()).hexdigest()
    assert list(trace(index, order, 5, 5)) == []
    with pytest.raises(IndexError, match="an epoch entry must be committed first"):
        list(trace(index, order, 0, 10_000))
