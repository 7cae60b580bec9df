"""Work shared by oracle workers: every chunk once, whoever does it; what a killed or failed run leaves; what it tells of itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import UserError
from megatron_groupmates.server import chunks as chunks_module
from megatron_groupmates.server.chunk_files import disjoint
from megatron_groupmates.server.chunks import Chunks, missing_ranges, rates
from megatron_groupmates.server.context import Arrays, RoundContext
from megatron_groupmates.utils.files import read_json
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import TrainedRun, make_pools, open_groups, snapshot, tiny_config
from tests.server.oracle_rounds import STEP, chunk_directory, dataset, measure, open_context

NAME = "squares"


class Killed(Exception):
    """Stands for the death of the server."""


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pools")
    make_pools(root)
    return root


@pytest.fixture
def context(pools: Path, groups: Any, tmp_path: Path) -> RoundContext:
    return open_context(tiny_config(pools, run__output_dir=str(tmp_path / "run")), groups)


def squares(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
    items = np.arange(first, stop)
    for _ in items:
        done(1)
    return {"squares": items**2, "pairs": np.stack([items, -items], axis=1)}


def assert_squares(arrays: Arrays, total: int) -> None:
    assert np.array_equal(arrays["squares"], np.arange(total) ** 2)
    assert np.array_equal(arrays["pairs"], np.stack([np.arange(total), -np.arange(total)], axis=1))


class TestRanges:
    @given(st.data(), st.integers(1, 60), st.integers(1, 9))
    @settings(deadline=None, max_examples=100)
    def test_kept_and_missing_cover_every_item_once(self, data: st.DataObject, total: int, size: int):
        bounds = sorted(data.draw(st.sets(st.integers(0, total), max_size=8)))
        parts = list(itertools.pairwise(bounds))
        kept = [part for part in parts if data.draw(st.booleans())]
        missing = missing_ranges(kept, total, size)
        items = [item for first, stop in (*kept, *missing) for item in range(first, stop)]
        assert sorted(items) == list(range(total))
        assert all(0 < stop - first <= size for first, stop in missing) and missing == sorted(missing)

    def test_of_overlapping_ranges_one_is_used(self):
        assert disjoint([(4, 8), (0, 4), (0, 8), (8, 9), (6, 10)]) == [(0, 4), (4, 8), (8, 9)]


class TestOneWorker:
    def test_joins_the_chunks_in_order(self, context):
        chunks = Chunks(context, NAME, 11, 4)
        chunks.work(squares, "number")
        assert_squares(chunks.collect(), 11)
        bounds = [(0, 4), (4, 8), (8, 11)]
        assert sorted(snapshot(context.directory / NAME)) == [f"chunk-{first:012d}-{stop:012d}.npz" for first, stop in bounds]

    @pytest.mark.parametrize("size", [2, 3, 4, 7, 20])
    def test_a_restart_with_another_chunk_size_uses_what_there_is(self, context, size):
        def killed_in_the_third(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
            if first == 8:
                raise Killed
            return squares(first, stop, done)

        with pytest.raises(Killed):
            Chunks(context, NAME, 20, 4).work(killed_in_the_third, "number")
        kept = snapshot(context.directory / NAME)
        computed: list[int] = []

        def record(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
            assert stop - first <= size
            computed.extend(range(first, stop))
            return squares(first, stop, done)

        again = Chunks(context, NAME, 20, size)
        again.work(record, "number")
        assert computed == list(range(8, 20))
        assert kept.items() <= snapshot(context.directory / NAME).items()
        assert_squares(again.collect(), 20)
        again.work(record, "number")
        assert computed == list(range(8, 20)), "nothing is left to do"

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read"),
            (lambda path: path.write_bytes(b""), "cannot be read"),
            (lambda path: path.write_bytes(b"text"), "cannot be read"),
            (lambda path: path.write_bytes(path.read_bytes().replace(np.int64(49).tobytes(), np.int64(50).tobytes())), "cannot be read"),
            (
                lambda path: path.write_bytes(path.with_name("chunk-000000000008-000000000011.npz").read_bytes()),
                "does not hold the 4 items",
            ),
            (lambda path: np.savez(path, squares=np.int64(5)), "does not hold the 4 items"),
            (lambda path: np.savez(path), "does not hold the 4 items"),
        ],
    )
    def test_a_chunk_that_cannot_be_used_is_computed_again(self, context, caplog, damage, message):
        chunks = Chunks(context, NAME, 11, 4)
        chunks.work(squares, "number")
        path = context.directory / NAME / "chunk-000000000004-000000000008.npz"
        others = {name: stamp for name, stamp in snapshot(context.directory / NAME).items() if name != path.name}
        damage(path)
        chunks.work(squares, "number")
        assert f"{path} " in caplog.text and message in caplog.text
        assert others.items() <= snapshot(context.directory / NAME).items()
        assert_squares(chunks.collect(), 11)

    def test_items_may_have_as_many_rows_as_they_say(self, context, caplog):
        def repeat(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
            return {"count": np.arange(first, stop), "item": np.repeat(np.arange(first, stop), np.arange(first, stop))}

        chunks = Chunks(context, NAME, 10, 3, ["item"])
        chunks.work(repeat, "number")
        path = context.directory / NAME / "chunk-000000000003-000000000006.npz"
        np.savez(path, count=np.arange(3, 6), item=np.zeros(5, int))
        chunks.work(repeat, "number")
        assert f"{path} does not hold the 3 items that its name says" in caplog.text
        arrays = chunks.collect()
        assert np.array_equal(arrays["count"], np.arange(10))
        assert np.array_equal(arrays["item"], np.repeat(np.arange(10), np.arange(10)))

    @pytest.mark.parametrize(
        "name", ["chunk-000001.npz", "chunk-000000000000-000000000004.npz.tmp-7", "chunk-000000000008-000000000012.npz"]
    )
    def test_files_that_are_no_chunks_of_the_work_are_not_used(self, context, name):
        (context.directory / NAME).mkdir(parents=True)
        with open(context.directory / NAME / name, "wb") as file:
            np.savez(file, squares=np.zeros(4), pairs=np.zeros((4, 2)))
        chunks = Chunks(context, NAME, 11, 4)
        chunks.work(squares, "number")
        assert_squares(chunks.collect(), 11)

    def test_tells_how_far_it_has_come(self, context, monkeypatch):
        monkeypatch.setattr(chunks_module, "_STATE_SECONDS", 0.0)
        Chunks(context, NAME, 4, 4).work(squares, "number")
        seen = []

        def look(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
            time.sleep(0.01)
            done(stop - first)
            seen.append(read_json(context.paths.server_state))
            return squares(first, stop, lambda count: None)

        Chunks(context, NAME, 10, 3).work(look, "number")
        last = read_json(context.paths.server_state)
        assert [state["done"] for state in (*seen, last)] == [7, 10, 10]
        assert all(state["total"] == 10 and state["unit"] == "number" and state["stage"] == NAME for state in (*seen, last))
        assert 0 < seen[0]["per_second"] < 300 and seen[0]["eta_seconds"] == pytest.approx(3 / seen[0]["per_second"])
        assert last["eta_seconds"] == 0

    def test_a_stage_records_its_rates(self, context):
        def busy(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
            with context.stopwatch.timing("step"):
                time.sleep(0.01)
            with context.stopwatch.timing("evaluation"):
                time.sleep(0.1)
            return squares(first, stop, done)

        with context.stopwatch.timing("step"):
            time.sleep(0.2)  # of something before the stage
        chunks = Chunks(context, NAME, 6, 3)
        context.stage(NAME, chunks.collect, lambda: chunks.work(busy, "rollout", 100.0), flops=5.0)
        found = read_json(context.directory / f"{NAME}.stage.json")
        assert found["flops"] == 5.0 and 0.21 < 6 / found["rollouts_per_second"] <= found["seconds"]
        assert found["tokens_per_second"] == pytest.approx(100 * found["rollouts_per_second"])
        assert 0 < found["share"]["step"] < found["share"]["evaluation"] < 1 - found["share"]["step"]
        assert found["share"]["restore"] == 0
        context.stage("another", dict)
        assert set(read_json(context.directory / "another.stage.json")) == {"seconds", "flops"}

    def test_shares_are_of_the_time_of_all_workers(self):
        found = rates(20, 7.0, 10.0, [{"step": 5.0, "evaluation": 4.0}, {"step": 2.0, "restore": 1.0}])
        assert found == {
            "rollouts_per_second": 2.0,
            "tokens_per_second": 14.0,
            "share": {"step": 0.35, "evaluation": 0.2, "restore": 0.05},
        }


def share_squares(rank: int, world_size: int, root: Path, run: str, tensor_size: int, total: int, size: int) -> tuple[list[int], Arrays]:
    """Chunks that this rank computed, and the result. Worker 0 is not done with its first before all others are."""
    groups = open_groups(tensor_size)
    context = open_context(tiny_config(root, run__output_dir=run), groups)
    chunks_module._STATE_SECONDS = 0.0
    computed: list[int] = []
    number_of_chunks = len(range(0, total, size))

    def compute(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        computed.append(first)
        while groups.data_rank == 0 and len(list((context.directory / NAME).glob("*.npz"))) < number_of_chunks - 1:
            time.sleep(0.01)
        return squares(first, stop, done)

    chunks = Chunks(context, NAME, total, size)
    chunks.work(compute, "number")
    return computed, chunks.collect()


def fail_on_one(rank: int, world_size: int, root: Path, run: str) -> tuple[int, str]:
    """How many chunks this rank computed when rank 1 fails at its first, and the error."""
    context = open_context(tiny_config(root, run__output_dir=run), open_groups(1))
    computed, failing = 0, Path(f"{run}.failing")

    def compute(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        nonlocal computed
        if rank == 1:
            failing.touch()
            raise UserError("a shard that only this worker reads is damaged")
        computed += 1
        while not failing.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        return squares(first, stop, done)

    try:
        Chunks(context, NAME, 100, 1).work(compute, "number")
    except UserError as error:
        return computed, str(error)
    return computed, ""


class TestWorkers:
    @pytest.mark.parametrize(("world_size", "tensor_size"), [(3, 1), (4, 2)])
    def test_a_slow_worker_holds_up_nobody(self, pools, tmp_path, world_size, tensor_size):
        results = run_ranks(share_squares, world_size, pools, str(tmp_path / "run"), tensor_size, 23, 2, tmp_path=tmp_path)
        for first_rank in range(0, world_size, tensor_size):
            assert results[first_rank][0] == results[first_rank + tensor_size - 1][0], "ranks of a worker take part in the same chunks"
        by_worker = [computed for computed, _ in results[::tensor_size]]
        assert sorted(first for computed in by_worker for first in computed) == list(range(0, 23, 2)), "each chunk once"
        assert len(by_worker[0]) <= 2
        for _, arrays in results:
            assert_squares(arrays, 23)
        state = read_json(tmp_path / "run" / "selection" / "server.json")
        assert (state["done"], state["total"]) == (23, 23), "of all workers"

    def test_a_failure_of_one_ends_the_work_of_all(self, pools, tmp_path):
        (computed, error), other = run_ranks(fail_on_one, 2, pools, str(tmp_path / "run"), tmp_path=tmp_path)
        assert error == other[1] == "a shard that only this worker reads is damaged"
        assert computed < 20 and other[0] == 0


def measure_each(rank: int, world_size: int, configs: list[Any]) -> list[np.ndarray]:
    return [measure(config, open_groups(config.server.tensor_model_parallel_size)) for config in configs]


class TestOracleDatasets:
    """The same losses bit for bit, whoever measures them, in whatever order and chunks."""

    @pytest.fixture(scope="class")
    def alone(self, trained: TrainedRun, groups: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
        config = trained.copy(tmp_path_factory.mktemp("alone"), STEP)
        measure(config, groups)
        return dataset(config).read_bytes()

    @pytest.mark.parametrize("workers", [2, 3])
    def test_do_not_depend_on_the_number_of_workers(self, trained, alone, tmp_path, workers):
        config = trained.copy(tmp_path, STEP, oracle__chunk_rollouts=2, server__tensor_model_parallel_size=1)
        run_ranks(measure_each, workers, [config], tmp_path=tmp_path)
        assert dataset(config).read_bytes() == alone
        assert len(list(chunk_directory(config).glob("*.npz"))) == 10

    def test_do_not_depend_on_the_number_of_workers_with_tensor_parallelism(self, trained, tmp_path):
        tensor = {"server__tensor_model_parallel_size": 2}
        one, two = trained.copy(tmp_path / "one", STEP, **tensor), trained.copy(tmp_path / "two", STEP, **tensor)
        run_ranks(measure_each, 2, [one], tmp_path=tmp_path)
        run_ranks(measure_each, 4, [two], tmp_path=tmp_path)
        assert dataset(one).read_bytes() == dataset(two).read_bytes()

    @pytest.mark.parametrize("chunk_rollouts", [3, 4])
    def test_do_not_depend_on_order_or_chunks(self, trained, groups, alone, tmp_path, monkeypatch, chunk_rollouts):
        config = trained.copy(tmp_path, STEP, oracle__chunk_rollouts=chunk_rollouts)
        total = -(-20 // chunk_rollouts)
        real = groups.take_number

        def backwards(name: str) -> int:
            number = real(name)
            return total - 1 - number if number < total else number

        monkeypatch.setattr(groups, "take_number", backwards)
        measure(config, groups)
        assert dataset(config).read_bytes() == alone
        stamps = [path.stat().st_mtime_ns for path in sorted(chunk_directory(config).glob("*.npz"))]
        assert stamps == sorted(stamps, reverse=True)
