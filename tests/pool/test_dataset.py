"""The trainer's view of a pool: dataset, batch sampler, trace."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.dataset import OrderBatchSampler, PoolDataset
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder, next_epoch_entry
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.trace import trace
from tests.pool.helpers import make_pool


def two_generations(num_rows: int) -> SampleOrder:
    masks = {0: np.ones(num_rows, dtype=bool), 1: np.arange(num_rows) % 2 == 0}
    order = SampleOrder(num_rows, 3, [LogEntry(0, 0, 0, "a"), LogEntry(1, num_rows // 3, 0, "b")], masks)
    for _ in range(4):
        order = order.extended(next_epoch_entry(order), masks[1])
    return order


def micro_batches(order: SampleOrder, consumed: int, micro_batch_size: int, size: int, global_batch_size: int, num_steps: int) -> list[int]:
    """Rows of ``num_steps`` global batches in the order of global samples, put together from all ranks."""
    samplers = [iter(OrderBatchSampler(lambda: order, consumed, micro_batch_size, rank, size, global_batch_size)) for rank in range(size)]
    result: list[int] = []
    for _ in range(num_steps * global_batch_size // (micro_batch_size * size)):
        for sampler in samplers:
            result += next(sampler)
    return result


@given(
    micro_batch_size=st.sampled_from([1, 2, 3]),
    size=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 3),
    consumed=st.integers(0, 20),
)
@settings(deadline=None, max_examples=40)
def test_any_geometry_gives_the_global_order(micro_batch_size: int, size: int, accumulation: int, consumed: int) -> None:
    order = two_generations(60)
    global_batch_size = micro_batch_size * size * accumulation
    num_steps = (order.exhausted_at() - consumed) // global_batch_size
    served = micro_batches(order, consumed, micro_batch_size, size, global_batch_size, num_steps)
    assert served == order.rows(consumed, num_steps * global_batch_size)[0].tolist()


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
    order = SampleOrder(10, 0, [LogEntry(0, 0, 0, "a")], {0: np.ones(10, dtype=bool)})
    batches = iter(OrderBatchSampler(lambda: order, 0, 4, 0, 1, 4))
    next(batches)
    next(batches)
    with pytest.raises(IndexError, match="an epoch entry must be committed first"):
        next(batches)


def test_an_adoption_from_the_frontier_on_is_followed() -> None:
    masks = {0: np.ones(40, dtype=bool), 1: np.arange(40) >= 30}
    orders = [SampleOrder(40, 0, [LogEntry(0, 0, 0, "a")], masks)]
    sampler = OrderBatchSampler(lambda: orders[-1], 0, 2, 0, 1, 4)
    batches = iter(sampler)
    served = next(batches)
    orders.append(orders[-1].extended(LogEntry(1, sampler.issued_samples + 2, 0, "b"), masks[1]))
    for _ in range(4):
        served += next(batches)
    assert served == orders[-1].rows(0, 10)[0].tolist()
    assert all(row >= 30 for row in served[6:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader_keeps_the_order(tmp_path: Path, num_workers: int) -> None:
    index = make_pool(tmp_path, (20, 30, 10))
    order = two_generations(60)
    sampler = OrderBatchSampler(lambda: order, 4, 2, 1, 2, 8)
    loader = torch.utils.data.DataLoader(PoolDataset(index, 8), batch_sampler=sampler, num_workers=num_workers)
    reader, batches = PoolReader(index), iter(loader)
    rows = order.rows(4, 48)[0].reshape(-1, 2, 2)[:, 1]
    for step in range(12):
        batch = next(batches)
        assert batch.dtype == torch.int64
        assert np.array_equal(batch.numpy(), np.stack(reader.read_many(rows[step])))


def test_dataset_wants_samples_of_one_length(tmp_path: Path) -> None:
    index = make_pool(tmp_path, samples=[np.zeros(9 - (row == 4), dtype=np.int64) for row in range(16)])
    message = r"need samples of 9 tokens, but 1 of the 16 samples .* \(the first has 8\); preprocess with --pack 9"
    with pytest.raises(UserError, match=message):
        PoolDataset(index, 8)
    with pytest.raises(UserError, match="preprocess with --pack 17"):
        PoolDataset(index, 16)


def test_dataset_items(tmp_path: Path) -> None:
    dataset = PoolDataset(make_pool(tmp_path), 8)
    assert len(dataset) == 16
    assert dataset[3].shape == (9,) and dataset[3].dtype == torch.int64


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
