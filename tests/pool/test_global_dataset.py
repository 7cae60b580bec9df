"""Datasets over global sample numbers: whatever asks, and whenever it was started, gets the rows of the sample order."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from megatron_groupmates.config import UserError
from megatron_groupmates.pool.contexts import Packing, choose_packing
from megatron_groupmates.pool.generation import Generation, load_generation, write_generation
from megatron_groupmates.pool.global_dataset import GlobalSampleDataset, HeldOutDataset
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder, next_epoch_entry
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.shared_log import SharedLog
from tests.pool.helpers import make_pool, make_reference_set

LENGTH = 9
SEED = 5


def as_text(tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"text": tokens}


@functools.cache
def pool_with_generations(packed: bool) -> tuple[PoolIndex, Path]:
    """A pool and generations 0 (all) to 3 of some of its rows."""
    directory = Path(tempfile.mkdtemp(prefix="global_dataset"))
    samples = None
    if packed:
        generator = np.random.default_rng(1)
        samples = [generator.integers(1, 300, generator.integers(3, 20)) for _ in range(40)]
    index = make_pool(directory / "pool", (12, 20, 8), length=LENGTH, samples=samples)
    for number in range(4):
        rows = None if number == 0 else np.random.default_rng(number).permutation(index.num_samples)[:15]
        write_generation(directory, number, index, rows, {})
    return index, directory


class Writer:
    """The trainer's side: its log, and what its loaders know of it."""

    def __init__(self, packed: bool = False, first_sample: int = 0, settled: int = 0) -> None:
        self.index, self.directory = pool_with_generations(packed)
        self.packing = choose_packing(self.index, "documents", LENGTH - 1) if packed else Packing(self.index.lengths)
        self.order = self._order([LogEntry(0, first_sample, 0, self._generation(0).digest)])
        self.shared = SharedLog(self.order.entries, settled)
        self.settled = settled

    def _generation(self, number: int) -> Generation:
        return load_generation(self.directory, number, self.index)

    def _order(self, entries: list[LogEntry]) -> SampleOrder:
        masks = {entry.generation: self._generation(entry.generation).mask for entry in entries}
        return SampleOrder(self.index.num_samples, SEED, entries, masks, self.packing)

    def adopt(self, number: int) -> None:
        """Put generation ``number`` in force from the first sample on that is not settled."""
        self._ensure(self.settled)
        entry = dataclasses.replace(self.order.entries[-1], effective_sample=self.settled)
        generation = self._generation(number)
        self.order = self.order.extended(dataclasses.replace(entry, generation=number, digest=generation.digest), generation.mask)

    def settle(self, stop: int) -> None:
        self._ensure(stop)
        self.settled = stop
        self.shared.publish(self.order.entries, stop)

    def _ensure(self, stop: int) -> None:
        while self.order.exhausted_at() < stop:
            entry = next_epoch_entry(self.order)
            self.order = self.order.extended(entry, self._generation(entry.generation).mask)

    def dataset(self, num_samples: int = 10_000, block_size: int = 4) -> GlobalSampleDataset:
        return GlobalSampleDataset(self.index, self.directory, self.order, self.shared, num_samples, block_size, as_text)

    def expected(self, first: int, stop: int) -> np.ndarray:
        """Tokens of these samples by an order made afresh from the whole log."""
        contexts = self._order(list(self.order.entries)).contexts(first, stop - first)
        reader = PoolReader(self.index)
        pieces = zip(contexts.rows.tolist(), contexts.first_token.tolist(), contexts.num_tokens.tolist(), strict=True)
        tokens = np.concatenate([reader.read(row)[start : start + count] for row, start, count in pieces])
        return tokens.reshape(stop - first, LENGTH)


def texts(items: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.stack([item["text"] for item in items])


class MegatronSampler:
    """The batches of Megatron's pretraining sampler; ``issued`` is one past the last sample that was asked for."""

    def __init__(self, consumed: int, total: int, micro: int, rank: int, size: int) -> None:
        self.consumed, self.total, self.micro, self.rank, self.size = consumed, total, micro, rank, size
        self.issued = consumed

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.consumed, self.total - self.micro * self.size + 1, self.micro * self.size):
            self.issued = first + self.micro * self.size
            mine = first + self.rank * self.micro
            yield list(range(mine, mine + self.micro))


@settings(deadline=None, max_examples=40)
@given(
    packed=st.booleans(),
    micro=st.integers(1, 3),
    size=st.integers(1, 3),
    micro_steps=st.integers(1, 3),
    workers=st.integers(0, 2),
    adoptions=st.lists(st.sampled_from([None, None, 1, 2, 3]), min_size=1, max_size=10),
    first_sample=st.sampled_from([0, 7, 24]),
    block_size=st.integers(1, 9),
)
def test_any_ranks_workers_and_adoptions_give_the_rows_of_the_order(
    packed: bool,
    micro: int,
    size: int,
    micro_steps: int,
    workers: int,
    adoptions: list[int | None],
    first_sample: int,
    block_size: int,
) -> None:
    step = micro * size
    batch, ahead = step * micro_steps, 2 * workers * step
    writer = Writer(packed, first_sample, first_sample + step * micro_steps + ahead)
    writer.settle(writer.settled)
    # Each process of each rank's loader has a copy from before all adoptions.
    copies = [[copy.copy(writer.dataset(block_size=block_size)) for _ in range(max(1, workers))] for _ in range(size)]
    samplers = [iter(MegatronSampler(first_sample, 10_000, micro, rank, size)) for rank in range(size)]
    seen: dict[int, np.ndarray] = {}
    issued, micro_batches = first_sample, 0
    for number, generation in enumerate(adoptions):
        consumed = first_sample + number * batch
        known = [entry.generation for entry in writer.order.entries]
        if generation is not None and generation > max(known):
            writer.adopt(generation)
        writer.settle(consumed + batch + ahead)
        while issued < consumed + batch + ahead:
            for rank, sampler in enumerate(samplers):
                wanted = next(sampler)
                items = copies[rank][micro_batches % max(1, workers)].__getitems__(wanted)
                seen |= dict(zip(wanted, texts(items), strict=True))
            issued, micro_batches = issued + step, micro_batches + 1
    assert sorted(seen) == list(range(first_sample, issued))
    np.testing.assert_array_equal(np.stack([seen[sample] for sample in sorted(seen)]), writer.expected(first_sample, issued))


def test_any_numbers_in_any_order(tmp_path: Path) -> None:
    writer = Writer()
    writer.settle(60)
    wanted = np.random.default_rng(0).integers(0, 60, 200).tolist()
    items = writer.dataset(block_size=7).__getitems__(wanted)
    np.testing.assert_array_equal(texts(items), writer.expected(0, 60)[wanted])
    dataset = writer.dataset(num_samples=77)
    assert len(dataset) == 77
    assert dataset[31]["text"].dtype == np.int64
    np.testing.assert_array_equal(dataset[31]["text"], writer.expected(31, 32)[0])


def test_consecutive_micro_batches_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, asked = Writer(), []
    writer.settle(32)
    looked_up = SampleOrder.contexts
    monkeypatch.setattr(SampleOrder, "contexts", lambda order, *span: asked.append(span) or looked_up(order, *span))
    dataset = writer.dataset(block_size=8)
    for first in range(0, 32, 2):
        dataset.__getitems__([first, first + 1])
    assert asked == [(0, 8), (8, 8), (16, 8), (24, 8)]


@pytest.mark.parametrize(("method", "rank"), [("fork", 0), ("fork", 1), ("spawn", 1)])
def test_loader_processes_started_before_an_adoption_serve_it(method: str, rank: int) -> None:
    micro, size, workers, batch, steps = 1, 2, 2, 4, 8
    ahead = 2 * workers * micro * size
    writer = Writer()
    writer.settle(batch + ahead)
    sampler = MegatronSampler(0, steps * batch + ahead, micro, rank, size)
    loader = DataLoader(writer.dataset(), batch_sampler=sampler, num_workers=workers, multiprocessing_context=method)
    batches = iter(loader)
    seen = []
    for step in range(steps):
        # What the trainer calls the read-ahead is exactly what torch's loader has asked for.
        assert sampler.issued == step * batch + ahead
        if step in (2, 5):
            writer.adopt({2: 1, 5: 2}[step])
        writer.settle((step + 1) * batch + ahead)
        seen += [next(batches)["text"].numpy() for _ in range(batch // (micro * size))]
    generations = [entry.generation for entry in writer.order.entries]
    assert {1, 2} <= set(generations)
    expected = writer.expected(0, steps * batch).reshape(-1, size, micro, LENGTH)[:, rank]
    np.testing.assert_array_equal(np.stack(seen), expected)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_how_far_a_loader_reads_ahead(workers: int) -> None:
    micro, size = 2, 3
    writer = Writer()
    writer.settle(40 * micro * size)
    sampler = MegatronSampler(0, 40 * micro * size, micro, 1, size)
    batches = iter(DataLoader(writer.dataset(), batch_sampler=sampler, num_workers=workers))
    for used in range(5):
        assert sampler.issued == (2 * workers + used) * micro * size
        next(batches)


def test_what_is_not_settled_is_refused() -> None:
    writer = Writer()
    writer.settle(8)
    dataset = writer.dataset()
    assert len(dataset.__getitems__([6, 7])) == 2
    with pytest.raises(UserError, match=r"global sample 8 was asked for, .* settled up to 7 only: the data loader reads farther ahead"):
        dataset.__getitems__([7, 8])
    writer.settle(9)
    assert len(dataset.__getitems__([7, 8])) == 2


def test_a_loader_that_reads_farther_ahead_stops_training() -> None:
    writer = Writer()
    writer.settle(4 + 2)
    sampler = MegatronSampler(0, 100, 1, 0, 1)
    loader = DataLoader(writer.dataset(), batch_sampler=sampler, num_workers=1, prefetch_factor=8)
    with pytest.raises(UserError, match="reads farther ahead than its 2 micro-batches per worker"):
        list(loader)


def test_what_came_before_the_log_is_refused() -> None:
    writer = Writer(first_sample=10, settled=10)
    writer.settle(20)
    np.testing.assert_array_equal(texts(writer.dataset().__getitems__(list(range(10, 20)))), writer.expected(10, 20))
    with pytest.raises(UserError, match="global sample 9 was asked for, but the generation log begins at 10"):
        writer.dataset()[9]


def test_a_generation_that_is_not_the_logs_is_refused(tmp_path: Path) -> None:
    writer = Writer()
    writer.settle(4)
    dataset = writer.dataset()
    writer.adopt(1)
    entries = [*writer.order.entries[:-1], dataclasses.replace(writer.order.entries[-1], digest="0" * 64)]
    writer.shared.publish(entries, 8)
    with pytest.raises(UserError, match=r"generation 1 in .* has digest .*, the log says 0000"):
        dataset[5]


def test_a_damaged_sample_is_an_error_that_names_it(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", (4,), length=LENGTH)
    write_generation(tmp_path, 0, index, None, {})
    entries = [LogEntry(0, 0, 0, load_generation(tmp_path, 0, index).digest)]
    order = SampleOrder(4, SEED, entries, {0: np.ones(4, dtype=bool)}, Packing(index.lengths))
    shard = Path(index.shard_path(0))
    shard.write_bytes(shard.read_bytes()[:600])
    dataset = GlobalSampleDataset(index, tmp_path, order, SharedLog(entries, 4), 4, 4, as_text)
    with pytest.raises(UserError, match=shard.name):
        dataset.__getitems__([0, 1, 2, 3])


def test_held_out_samples_come_in_pool_order_again_and_again(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", (3, 2), length=LENGTH)
    dataset = HeldOutDataset(index, LENGTH - 1, 12, as_text)
    assert len(dataset) == 12
    expected = PoolReader(index).read_batch([*range(5), *range(5), 0, 1])
    np.testing.assert_array_equal(texts([dataset[number] for number in range(12)]), expected)


def test_held_out_samples_must_fit_and_be_scored_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a pool of samples of 8 tokens, .* preprocess held-out text with --pack 8"):
        HeldOutDataset(make_pool(tmp_path / "pool", (3,), length=LENGTH), 7, 4, as_text)
    scored = np.arange(LENGTH) > 3
    reference = make_reference_set(tmp_path / "reference", [np.arange(LENGTH)], [scored])
    with pytest.raises(UserError, match=f"not a pool of samples of {LENGTH} tokens"):
        HeldOutDataset(reference, LENGTH - 1, 4, as_text)
