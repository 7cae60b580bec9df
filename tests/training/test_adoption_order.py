"""What is served stays one order through adoptions, epochs, roll-backs and changes of geometry, whenever threads finish."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.pool.contexts import Packing
from megatron_groupmates.pool.dataset import OrderBatchSampler
from megatron_groupmates.pool.generation import load_generation, publish, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry, read_log
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.training import adoption
from megatron_groupmates.training.adoption import GenerationAdopter
from megatron_groupmates.training.data import TrainingData
from megatron_groupmates.training.live_order import LiveOrder
from megatron_groupmates.training.preparation import Preparation
from tests.common.configs import tiny_config
from tests.pool.helpers import make_pool
from tests.training.thread_ranks import ThreadRanks

SEED, BATCH = 7, 12
GEOMETRIES = [(size, micro) for size in (1, 2, 3) for micro in (1, 2, 4, 6) if BATCH % (size * micro) == 0]


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of the trainer in a simulated run.

    Attributes:
        geometry: data-parallel size and micro batch.
        read_ahead: micro-batches the loader asks for ahead of training.
        num_steps: until it dies.
        roll_back: steps between its end and the checkpoint that the next start goes on from.
        publish_at: generation to the step of this start at which it is published.
        looks: (rank, generation) to the looks until the rank's thread is done.
        failing: (rank, generation) whose thread fails.
        poll_interval: steps between looks.
    """

    geometry: tuple[int, int]
    read_ahead: int
    num_steps: int
    roll_back: int
    publish_at: dict[int, int]
    looks: dict[tuple[int, int], int]
    failing: set[tuple[int, int]]
    poll_interval: int


@st.composite
def runs(draw: st.DrawFn) -> list[Start]:
    """Starts that publish generations 1, 2, ... in turn; a generation may be published while another is prepared."""
    numbers, starts = itertools.count(1), []
    for _ in range(draw(st.integers(1, 3))):
        num_steps = draw(st.integers(1, 9))
        steps = sorted(draw(st.sets(st.integers(0, num_steps - 1), max_size=2)))
        publish_at = {next(numbers): step for step in steps}
        ranked = [(rank, number) for number in publish_at for rank in range(3)]
        starts.append(
            Start(
                geometry=draw(st.sampled_from(GEOMETRIES)),
                read_ahead=draw(st.integers(0, 9)),
                num_steps=num_steps,
                roll_back=draw(st.integers(0, num_steps)),
                publish_at=publish_at,
                looks={key: draw(st.integers(0, 4)) for key in ranked},
                failing=draw(st.sets(st.sampled_from(ranked), max_size=1)) if ranked else set(),
                poll_interval=draw(st.sampled_from([1, 1, 2])),
            )
        )
    return starts


class Simulation:
    """A run directory, and starts of its trainer with threads for ranks and the real adopter, order and sampler."""

    def __init__(self, directory: Path, pool: PoolIndex, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.selection = directory / "selection"
        self.log = self.selection / "log.jsonl"
        self.pool = pool
        self._directory = directory
        self._monkeypatch = monkeypatch
        generator = np.random.default_rng(seed)
        write_generation(self.selection, 0, pool, None, {})
        for number in range(1, 7):
            rows = np.flatnonzero(generator.random(pool.num_samples) < generator.uniform(0.1, 0.9))
            write_generation(self.selection, number, pool, rows, {})
        append_entry(self.log, LogEntry(0, 0, 0, load_generation(self.selection, 0, pool).digest))
        publish(self.selection, 0)

    def config(self, start: Start) -> Config:
        return tiny_config(
            run={"output_dir": str(self._directory), "seed": SEED},
            training={"global_batch_size": BATCH, "micro_batch_size": 1},
            selection={"method": "random", "first_refresh_step": 10**6, "poll_interval_steps": start.poll_interval},
        )

    def order(self, commit: Callable[[LogEntry], None]) -> LiveOrder:
        entries = read_log(self.log)
        masks = {entry.generation: load_generation(self.selection, entry.generation, self.pool).mask for entry in entries}
        return LiveOrder(self.pool.num_samples, SEED, entries, masks, commit, packing=Packing(self.pool.lengths))

    def run(self, start: Start, first_step: int) -> dict[int, int]:
        """Train; pool row by global sample."""
        ranks = ThreadRanks(start.geometry[0])
        self._monkeypatch.setattr(adoption, "dist", ranks)
        self._monkeypatch.setattr(adoption, "Preparation", self._late_preparation(start, ranks))
        results = ranks.run(lambda groups: self._train(start, first_step, ranks, groups))
        served = collections.Counter(sample for part in results for sample in part)
        assert set(served.values()) <= {1}, "two ranks train on the same global sample"
        return {sample: row for part in results for sample, row in part.items()}

    def _late_preparation(self, start: Start, ranks: ThreadRanks) -> type[Preparation]:
        class LatePreparation(Preparation):
            """Its work is over at the look that the start says, or where training waits for it."""

            def __init__(self, number: int, work: Callable[[], Any]) -> None:
                key = (ranks._local.rank, number)
                self.number, self.generation, self.problem = number, None, None
                self._looks, self._work = start.looks.get(key, 0), self._fail if key in start.failing else work

            def _fail(self) -> None:
                raise UserError("disk on fire")

            def wait(self, seconds: float = 0.0) -> bool:
                self._looks -= 1
                if self._looks >= 0 and seconds == 0:
                    return False
                if self.generation is None and self.problem is None:
                    self._run()
                return True

        return LatePreparation

    def _train(self, start: Start, first_step: int, ranks: ThreadRanks, groups: Any) -> dict[int, int]:
        size, micro = start.geometry

        def commit(entry: LogEntry) -> None:
            if groups.is_main:
                append_entry(self.log, entry)
            groups.barrier()

        order = self.order(commit)
        groups.barrier()
        sampler = OrderBatchSampler(lambda: order.current, first_step * BATCH, micro, groups.rank, size, BATCH)
        adopter = GenerationAdopter(self.config(start), self.pool, order, groups, lambda row: None)
        batches, asked, served = iter(sampler), collections.deque(), {}
        for step in range(first_step, first_step + start.num_steps):
            for number, at in start.publish_at.items():
                if groups.is_main and first_step + at == step:
                    publish(self.selection, number)
            groups.barrier()
            adopter.at_step_boundary(step, sampler.issued_samples)
            assert len({order.current.entries for order in ranks.exchange(order)}) == 1, "ranks follow different orders"
            # As TrainingData and its loader do.
            order.ensure(sampler.issued_samples + -(-start.read_ahead * micro * size // BATCH) * BATCH + BATCH)
            for _ in range(BATCH // (micro * size)):
                while len(asked) <= start.read_ahead:
                    asked.append(next(batches))
                contexts = asked.popleft()
                served.update(zip(contexts.samples.tolist(), contexts.rows.tolist(), strict=True))
        assert read_log(self.log) == order.current.entries, "an entry is in force that the log does not have"
        samples = sorted(served)
        assert [served[sample] for sample in samples] == [int(order.current.rows(sample, 1)[0][0]) for sample in samples]
        return served


def check_exactly_once(order: SampleOrder, served: list[int]) -> None:
    """Within a window no row comes twice, but for the repeats of epoch entries; every row is of its generation."""
    seen: set[int] = set()
    entries = order.entries
    for number, entry in enumerate(entries):
        stop = entries[number + 1].effective_sample if number + 1 < len(entries) else len(served)
        rows = served[entry.effective_sample : max(stop, entry.effective_sample)]
        assert len(set(rows)) == len(rows)
        if not rows:
            continue
        if not order.consumed(entry.effective_sample).any():
            seen = set()
        repeats = number > 0 and entry.epoch != entries[number - 1].epoch and bool(seen)
        assert seen.issuperset(rows) if repeats else seen.isdisjoint(rows)
        seen.update(rows)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> PoolIndex:
    return make_pool(tmp_path_factory.mktemp("pool"), (40, 25, 35), 9)


@given(starts=runs(), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sample_is_served_by_one_order(
    starts: list[Start], seed: int, pool: PoolIndex, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads finish early, late or never, on each rank at another look; the trainer dies and goes on otherwise spread."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    simulation = Simulation(tmp_path_factory.mktemp("run"), pool, seed, monkeypatch)
    served: dict[int, int] = {}
    step = 0
    for number, start in enumerate(starts):
        step = max(step - (starts[number - 1].roll_back if number else 0), 0)
        served = {sample: row for sample, row in served.items() if sample < step * BATCH}
        served |= simulation.run(start, step)
        step += start.num_steps
    assert sorted(served) == list(range(step * BATCH))
    rows = [served[sample] for sample in range(step * BATCH)]
    order = simulation.order(lambda entry: None)
    assert order.current.rows(0, len(rows))[0].tolist() == rows
    check_exactly_once(order.current, rows)


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_generation_that_fails_on_one_rank_is_refused_on_all(
    failing_rank: int, pool: PoolIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one is adopted, though it was published while the first was prepared."""
    simulation = Simulation(tmp_path, pool, 0, monkeypatch)
    start = Start(
        geometry=(2, 1),
        read_ahead=3,
        num_steps=10,
        roll_back=0,
        publish_at={1: 1, 2: 2},
        looks={(0, 1): 3, (1, 1): 1, (0, 2): 1, (1, 2): 1},
        failing={(failing_rank, 1)},
        poll_interval=1,
    )
    simulation.run(start, 0)
    assert {entry.generation for entry in read_log(simulation.log)} == {0, 2}
    who = "rank 1: " if failing_rank else ""
    assert f"generation 1 is refused, training goes on with 0: {who}disk on fire" in caplog.messages


def test_a_loader_that_reads_ahead_by_part_of_a_batch_finds_the_next_epoch(pool: PoolIndex) -> None:
    """The first step of a start asks for the next batch too, in which the samples on offer run out."""
    masks = {0: np.arange(pool.num_samples) < 21}
    order = LiveOrder(pool.num_samples, SEED, (LogEntry(0, 0, 0, "0"),), masks, lambda entry: None, packing=Packing(pool.lengths))
    (groups,) = ThreadRanks(1).run(lambda own: own)
    config = tiny_config(training={"global_batch_size": BATCH, "micro_batch_size": 3}, data={"num_workers": 1, "prefetch_factor": 1})
    data = TrainingData(config, pool, order, groups, 0, lambda read: None)
    assert sum(len(tokens) for tokens, _ in data.step_batches()) == BATCH


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3)])
def test_real_loaders_serve_the_log_through_adoption_epoch_and_roll_back(
    pool: PoolIndex, tmp_path: Path, workers: int, prefetch: int
) -> None:
    """Two data-parallel ranks with worker processes, then from an earlier sample one rank that reads by itself."""
    every_third = np.arange(pool.num_samples) % 3 == 0
    masks = {0: np.ones(pool.num_samples, dtype=bool), 1: every_third}
    packing, reader = Packing(pool.lengths), PoolReader(pool)
    entries = (LogEntry(0, 0, 0, "0"),)
    served: dict[int, tuple[int, list[int]]] = {}
    for size, micro, loaders, first, steps, adopt_at in ((2, 3, workers, 0, 8, 3), (1, 4, 0, 24, 8, None)):
        config = tiny_config(
            training={"global_batch_size": BATCH, "micro_batch_size": micro}, data={"num_workers": loaders, "prefetch_factor": prefetch}
        )
        ranks = ThreadRanks(size)
        orders = [LiveOrder(pool.num_samples, SEED, entries, masks, lambda entry: None, packing=packing) for _ in range(size)]
        groups = ranks.run(lambda own: own)
        seen: list[Any] = []
        data = [TrainingData(config, pool, order, own, first, seen.append) for order, own in zip(orders, groups, strict=True)]
        for step in range(steps):
            if step == adopt_at:
                frontier = max(part.sampler.issued_samples for part in data)
                for order in orders:
                    order.ensure(frontier)
                    last = order.current.entries[-1]
                    entry = LogEntry(1, max(frontier, last.effective_sample), last.epoch, "1")
                    order.adopt(order.current.extended(entry, masks[1]), masks[1])
            for part in data:
                assert sum(len(tokens) for tokens, _ in part.step_batches()) == BATCH // size
        for read in seen:
            for sample, row, tokens in zip(read.contexts.samples, read.contexts.rows, read.tokens, strict=True):
                assert served.setdefault(int(sample), (int(row), tokens.tolist())) == (int(row), tokens.tolist())
        assert orders[0].current.entries == orders[-1].current.entries
        entries = orders[0].current.entries
    assert sorted(served) == list(range(24 + 8 * BATCH))
    order = SampleOrder(pool.num_samples, SEED, entries, masks)
    assert {entry.generation for entry in entries} == {0, 1} and entries[-1].epoch > 0
    assert order.rows(0, len(served))[0].tolist() == [served[sample][0] for sample in range(len(served))]
    assert all(reader.read(row).tolist() == tokens for row, tokens in served.values())
    check_exactly_once(order, [served[sample][0] for sample in range(len(served))])
