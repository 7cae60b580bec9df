"""Whole rounds on a tiny trained run: what they publish, and what happens when they are killed or fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import Config, RunPaths
from megatron_groupmates.influence.fit import FitResult
from megatron_groupmates.pool.generation import Generation, load_generation, read_pointer
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.selection.store import EmbeddingStore
from megatron_groupmates.server import fitting, stages, watch
from megatron_groupmates.server import round as round_module
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.utils.files import read_json, read_lines
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import (
    BATCH,
    REFRESHES,
    SEQUENCE_LENGTH,
    TrainedRun,
    open_groups,
    rows_of_samples,
    snapshot,
    trained_run,
)

LEARNING = ["candidates", "oracle_random", "init", "bootstrap", "oracle_bootstrap", "final"]
SELECTING = ["embeddings", "reference", "centroids", "clusters", "sorted", "similarity", "selection"]
STAGES = [*LEARNING, *SELECTING]
STEP, NEXT_STEP = REFRESHES


class Killed(Exception):
    """Stands for the death of the server: not a user's error, so nothing may handle it."""


def die(*_: Any) -> None:
    raise Killed


@pytest.fixture(scope="module")
def finished(trained: TrainedRun, groups: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with one undisturbed round; nobody may change it."""
    config = trained.copy(tmp_path_factory.mktemp("finished"), STEP)
    before = snapshot(paths(config).checkpoints)
    assert watch.serve(config, groups, once=True)
    assert snapshot(paths(config).checkpoints) == before, "reading a checkpoint must not change it"
    return config


def paths(config: Config) -> RunPaths:
    return RunPaths.of(config)


def generation(config: Config, number: int = 1) -> Generation:
    return load_generation(paths(config).selection, number, PoolIndex.open(config.data.pool))


def array(config: Config, stage: str, key: str, number: int = 1) -> np.ndarray:
    """What a stage of a round kept."""
    with np.load(paths(config).round(number) / f"{stage}.npz") as content:
        return content[key]


def pool_embeddings(config: Config) -> np.ndarray:
    """Of the rows that training had not consumed."""
    store = EmbeddingStore.open(paths(config).round(1) / "embeddings")
    return store.read(0, store.num_rows)


def oracle_losses(config: Config) -> np.ndarray:
    return array(config, "oracle_random", "losses")


def rewind(config: Config, step: int) -> None:
    """Let ``latest`` name an earlier or later step."""
    (paths(config).checkpoints / "latest").write_text(f"global_step{step}")


class TestPublishedGeneration:
    def test_pointer_and_state(self, finished):
        assert read_pointer(paths(finished).selection) == 1
        assert read_json(paths(finished).server_state)["state"] == "finished"
        assert not paths(finished).round_failure(1).exists()

    def test_selects_only_what_training_had_not_consumed(self, finished, trained):
        consumed = rows_of_samples(trained, 0, STEP * BATCH)
        assert not generation(finished).mask[consumed].any()

    def test_meets_the_token_budget_to_within_a_sample(self, finished):
        pool = PoolIndex.open(finished.data.pool)
        budget = 0.5 * (pool.num_samples - STEP * BATCH) * (SEQUENCE_LENGTH + 1)
        assert budget - (SEQUENCE_LENGTH + 1) < generation(finished).num_tokens <= budget

    def test_provenance(self, finished):
        provenance = generation(finished).provenance
        assert {
            "method": "group",
            "recipe": "default",
            "checkpoint_tag": "global_step5",
            "checkpoint_step": 5,
            "seed": 5,
            "consumed_train_samples": 20,
        }.items() <= provenance.items()
        assert set(provenance["stages"]) == {"load_checkpoint", *STAGES}
        rows = read_lines(paths(finished).server_metrics)
        assert {row["stage"]: {key: row[key] for key in row.keys() - {"stage", "round", "step"}} for row in rows} == provenance["stages"]
        assert {(row["round"], row["step"]) for row in rows} == {(1, 5)}
        rates = {"rollouts_per_second", "tokens_per_second", "share"}
        for name, cost in provenance["stages"].items():
            more = rates if name.startswith("oracle") else {"overlap"} if name == "selection" else set()
            assert set(cost) == {"seconds", "flops"} | more and cost["seconds"] >= 0
        cost = provenance["stages"]["oracle_random"]
        assert set(cost["share"]) == {"step", "evaluation", "restore"} and 0.5 < sum(cost["share"].values()) <= 1
        assert 0 < 20 / cost["rollouts_per_second"] <= cost["seconds"]
        reference_tokens = 4 * SEQUENCE_LENGTH
        assert cost["tokens_per_second"] == pytest.approx(cost["rollouts_per_second"] * 3 * (SEQUENCE_LENGTH + reference_tokens))
        assert all(provenance["stages"][name]["flops"] > 0 for name in (*LEARNING, "embeddings", "reference") if name != "bootstrap")
        assert set(provenance["fit"]) == {"init", "final"} and all(fit["accepted"] for fit in provenance["fit"].values())
        assert provenance["fit"]["final"]["train_rollouts"] + provenance["fit"]["final"]["held_out_rollouts"] == 26
        assert provenance["counts"]["candidates"] == 124 and provenance["counts"]["selected"] == 62
        assert set(provenance["overlap"]["share"]) == {"group", "individual", "random", "similarity"}
        histogram = provenance["influence_histogram"]
        assert sum(histogram["pool"]) == 124 and sum(histogram["selected"]) == 62
        assert len(histogram["edges"]) == len(histogram["pool"]) + 1
        kinds = provenance["selected_by_kind"]
        assert set(kinds) == {"web", "book", "unknown"}
        assert sum(kind["candidates"] for kind in kinds.values()) == 124 and sum(kind["selected"] for kind in kinds.values()) == 62
        json.dumps(provenance)

    def test_prefers_samples_like_the_reference(self, finished):
        kinds = generation(finished).provenance["selected_by_kind"]
        shares = {name: kind["selected"] / kind["candidates"] for name, kind in kinds.items()}
        assert shares["web"] > 0.9 and max(shares["book"], shares["unknown"]) < 0.5

    def test_a_second_time_there_is_nothing_to_do(self, finished, groups, caplog):
        before = snapshot(paths(finished).root, keep=lambda path: path.name != "server.json")
        with caplog.at_level("INFO"):
            assert watch.serve(finished, groups, once=True)
        assert "the selection for global_step5 is already published; nothing to do" in caplog.text
        assert snapshot(paths(finished).root, keep=lambda path: path.name != "server.json") == before


class TestKilledRound:
    def test_at_every_stage_in_turn(self, finished, trained, groups, tmp_path, monkeypatch):
        config = trained.copy(tmp_path, STEP)
        started: list[str] = []
        victim = ""
        whole = RoundContext.bookkeeping

        @contextlib.contextmanager
        def bookkeeping(self: RoundContext, name: str, flops: float) -> Iterator[None]:
            started.append(name)
            with whole(self, name, flops):
                yield
                # Killed when all is computed and before it is recorded as done.
                if name == victim:
                    raise Killed(name)

        monkeypatch.setattr(RoundContext, "bookkeeping", bookkeeping)

        def interesting(path: Path) -> bool:
            return path.name not in ("round.json", "load_checkpoint.stage.json")

        kept: dict[str, tuple[int, int]] = {}
        for victim in STAGES:
            started.clear()
            with pytest.raises(Killed, match=victim):
                watch.serve(config, groups, once=True)
            # The stage before was killed too late to be done again: its result lay there already.
            assert started == ["load_checkpoint", victim]
            now = snapshot(paths(config).round(1), interesting)
            assert kept.items() <= now.items()
            kept = now
            assert read_pointer(paths(config).selection) == 0
        victim = ""
        for function in ("write_generation", "publish"):
            started.clear()
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(round_module, function, die)
                watch.serve(config, groups, once=True)
            assert started == ["load_checkpoint"] and read_pointer(paths(config).selection) == 0
        started.clear()
        assert watch.serve(config, groups, once=True)
        # The generation is whole: not even the checkpoint is read again.
        assert started == [] and read_pointer(paths(config).selection) == 1
        # What is as large as the pool's embeddings and not read again is gone.
        assert snapshot(paths(config).round(1), interesting) == {name: at for name, at in kept.items() if not name.startswith("sorted/")}
        assert np.array_equal(generation(config).mask, generation(finished).mask)
        assert generation(config).provenance["fit"] == generation(finished).provenance["fit"]

    def test_amid_the_rollouts(self, finished, trained, groups, tmp_path, monkeypatch):
        config = trained.copy(tmp_path, STEP)
        measured: list[int] = []
        real = stages.measure_rollouts

        def measure(probe: Any, rollouts: np.ndarray, *rest: Any) -> np.ndarray:
            if len(measured) == 2:
                raise Killed
            measured.append(len(rollouts))
            return real(probe, rollouts, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(stages, "measure_rollouts", measure)
            with pytest.raises(Killed):
                watch.serve(config, groups, once=True)
        chunks = snapshot(paths(config).round(1) / "oracle_random")
        assert sorted(chunks) == [f"chunk-{first:012d}-{first + 4:012d}.npz" for first in (0, 4)]
        (paths(config).round(1) / "oracle_random" / "chunk-000000000008-000000000012.npz.tmp-1").write_bytes(b"half a chunk")
        again: list[int] = []

        def count(probe: Any, rollouts: np.ndarray, *rest: Any) -> np.ndarray:
            again.append(len(rollouts))
            return real(probe, rollouts, *rest)

        monkeypatch.setattr(stages, "measure_rollouts", count)
        assert watch.serve(config, groups, once=True)
        # 20 random rollouts in chunks of 4, of which 2 were there, and 6 bootstrap rollouts.
        assert again == [4, 4, 4, 4, 2]
        assert chunks.items() <= snapshot(paths(config).round(1) / "oracle_random").items()
        assert np.array_equal(oracle_losses(config), oracle_losses(finished))
        assert np.array_equal(generation(config).mask, generation(finished).mask)

    @pytest.mark.parametrize("changes", [{"oracle__learning_rate": 1e-3}, {"data__reference": "other"}])
    def test_work_under_other_settings_is_not_used(self, finished, trained, groups, tmp_path, monkeypatch, changes):
        config = trained.copy(tmp_path, STEP)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(round_module, "embed_pool", die)
            watch.serve(config, groups, once=True)
        assert np.array_equal(oracle_losses(config), oracle_losses(finished))
        if "data__reference" in changes:
            # The pool itself as the reference set.
            changes = {"data__reference": config.data.pool}
        changed = trained.config(run__output_dir=config.run.output_dir, **changes)
        assert watch.serve(changed, groups, once=True)
        assert not np.array_equal(oracle_losses(changed), oracle_losses(finished))
        assert len(list(paths(config).round(1).parent.glob("round-000001.stale-*"))) == 1


def refuse(*args: Any, **kwargs: Any) -> FitResult:
    return FitResult(model=None, report={"accepted": False, "attempts": []})


def assert_failed(config: Config, number: int, reason: str) -> None:
    failure = read_json(paths(config).round_failure(number))
    assert reason in failure["reason"] and set(failure) == {"checkpoint_tag", "reason"}
    assert read_pointer(paths(config).selection) == number - 1
    assert not (paths(config).selection / f"generation-{number:06d}").exists()
    assert read_json(paths(config).server_state)["state"] == "failed"


class TestFailedRound:
    def test_every_fit_refused(self, trained, groups, tmp_path, monkeypatch):
        config = trained.copy(tmp_path, STEP)
        before = snapshot(paths(config).selection, keep=lambda path: "rounds" not in path.parts and path.name != "server.json")
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "fit_relational", refuse)
            assert not watch.serve(config, groups, once=True)
        assert_failed(config, 1, "every fit of the relational model has the wrong sign on held-out rollouts")
        assert snapshot(paths(config).selection, keep=lambda path: "rounds" not in path.parts and path.name != "server.json") == before

    def test_falls_back_on_an_earlier_good_model(self, trained, groups, tmp_path, monkeypatch):
        config = trained.copy(tmp_path, NEXT_STEP)
        rewind(config, STEP)
        assert watch.serve(config, groups, once=True)
        rewind(config, NEXT_STEP)
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "fit_relational", refuse)
            assert watch.serve(config, groups, once=True)
        provenance = generation(config, 2).provenance
        assert provenance["fit"]["fell_back_on"] == "selection/rounds/round-000001/final"
        assert not provenance["fit"]["final"]["accepted"] and provenance["checkpoint_step"] == NEXT_STEP
        assert "oracle_bootstrap" not in provenance["stages"]
        left = [(paths(config).round(number) / name).exists() for number in (1, 2) for name in ("embeddings", "sorted")]
        assert left == [False, False, True, False], "of all that is as large as the pool's embeddings, the newest is kept once"
        assert not generation(config, 2).mask[rows_of_samples(trained, 0, NEXT_STEP * BATCH)].any()
        assert provenance["selected_by_kind"]["web"]["selected"] > 0.8 * provenance["selected_by_kind"]["web"]["candidates"]

    @pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
    def test_damaged_checkpoint(self, trained, groups, tmp_path, file):
        config = trained.copy(tmp_path, STEP)
        (path,) = (paths(config).checkpoints / "global_step5").glob(f"*{file}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert not watch.serve(config, groups, once=True)
        assert_failed(config, 1, file)
        shutil.copy(trained.tag(STEP) / path.name, path)
        assert watch.serve(config, groups, once=True)
        assert read_pointer(paths(config).selection) == 1 and not paths(config).round_failure(1).exists()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"selection__minimum_source_share": {"poetry": 0.1}}, "the pool has no kind of source 'poetry'"),
            ({"selection__ratio": 1e-3}, "generation 1 selects nothing"),
            ({"model__ffn_hidden_size": 64}, "the checkpoint is of another model"),
            ({"relational__encoder": "./no-such-encoder"}, "relational.encoder: cannot load './no-such-encoder'"),
        ],
    )
    def test_settings_that_cannot_work(self, trained, groups, tmp_path, changes, reason):
        config = trained.copy(tmp_path, STEP, **changes)
        assert not watch.serve(config, groups, once=True)
        assert_failed(config, 1, reason)


def test_few_candidates_make_fewer_bootstrap_rollouts(trained, groups, tmp_path):
    config = trained.copy(tmp_path, STEP, oracle__num_candidates=16, oracle__num_bootstrap_rollouts=80)
    assert watch.serve(config, groups, once=True)
    assert generation(config).provenance["oracle"]["rollouts"]["bootstrap"] == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"selection__method": "random"},
        {"selection__method": "similarity"},
        {"selection__method": "individual"},
        {"selection__recipe": "paper"},
        {"oracle__estimator": "first_order", "oracle__estimator_floor": -1.0},
        {"relational__relation": "additive"},
    ],
    ids=lambda changes: str(next(iter(changes.values()))),
)
def test_other_methods_and_recipes(finished, trained, groups, tmp_path, changes):
    config = trained.copy(tmp_path, STEP, **changes)
    assert watch.serve(config, groups, once=True)
    found = generation(config)
    assert not found.mask[rows_of_samples(trained, 0, STEP * BATCH)].any() and found.num_samples == 62
    provenance = found.provenance
    assert provenance["method"] == config.selection.method and provenance["recipe"] == config.selection.recipe
    web = provenance["selected_by_kind"]["web"]
    if config.selection.method == "random":
        assert set(provenance["stages"]) == {"selection"} and provenance["fit"] == {}
        assert 0.25 < web["selected"] / web["candidates"] < 0.75
    elif config.selection.method == "similarity":
        assert set(provenance["stages"]) == {"load_checkpoint", "embeddings", "reference", "similarity", "selection"}
        assert provenance["fit"] == {} and pool_embeddings(config).dtype == np.float32
        assert web["selected"] / web["candidates"] > 0.9
    else:
        validation = {"oracle_validation"} if config.oracle.estimator == "first_order" else set()
        shares = {"group_1_offers"} if config.selection.recipe == "paper" else set()
        assert set(provenance["stages"]) == {"load_checkpoint", *STAGES} | validation | shares
        if config.selection.recipe != "paper":
            # The paper takes the same share of each cluster.
            assert web["selected"] / web["candidates"] > 0.8
    assert not np.array_equal(found.mask, generation(finished).mask)


def test_without_bootstrap_rollouts(trained, groups, tmp_path):
    config = trained.copy(tmp_path, STEP, oracle__num_bootstrap_rollouts=0)
    assert watch.serve(config, groups, once=True)
    assert "oracle_bootstrap" not in generation(config).provenance["stages"]


@dataclasses.dataclass(frozen=True)
class TwoRanks:
    """Configs by purpose, and on each rank what ``serve`` returned and how many rollouts it measured."""

    configs: dict[str, Config]
    results: list[dict[str, tuple[bool, int]]]


def serve_each(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, tuple[bool, int]]:
    results = {}
    real, measured, name = stages.measure_rollouts, 0, ""

    def measure(probe: Any, rollouts: np.ndarray, *rest: Any) -> np.ndarray:
        nonlocal measured
        measured += len(rollouts)
        if name == "one_rank_fails" and rank == 1:
            raise watch.UserError("a shard that only this worker reads is damaged")
        return real(probe, rollouts, *rest)

    def bootstrap(*arguments: Any) -> np.ndarray:
        if name == "main_fails":
            raise watch.UserError("the main rank cannot draw bootstrap rollouts")
        return draw(*arguments)

    draw = stages.bootstrap_rollouts
    stages.measure_rollouts, stages.bootstrap_rollouts = measure, bootstrap
    for name, config in configs.items():
        measured = 0
        opened = open_groups(2 if name.startswith("tp2") else 1)
        results[name] = watch.serve(config, opened, once=True), measured
    return results


@pytest.fixture(scope="module")
def two_ranks(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    root = tmp_path_factory.mktemp("two-ranks")
    other = trained_run(2, tmp_path_factory)
    configs = {
        "tp2": other.copy(root / "a", STEP),
        "tp2_of_tp1": trained.copy(root / "b", STEP, server__tensor_model_parallel_size=2),
        "workers": trained.copy(root / "c", STEP),
        "workers_of_tp2": other.copy(root / "d", STEP, server__tensor_model_parallel_size=1),
        "main_fails": trained.copy(root / "e", STEP),
        "one_rank_fails": trained.copy(root / "f", STEP),
    }
    return TwoRanks(configs, run_ranks(serve_each, 2, configs, tmp_path=root))


class TestTwoRanks:
    @pytest.mark.parametrize("name", ["tp2", "tp2_of_tp1", "workers", "workers_of_tp2"])
    def test_publishes(self, two_ranks, trained, name):
        assert [result[name][0] for result in two_ranks.results] == [True, True]
        found = generation(two_ranks.configs[name])
        assert read_pointer(paths(two_ranks.configs[name]).selection) == 1 and found.num_samples == 62
        assert not found.mask[rows_of_samples(trained, 0, STEP * BATCH)].any()
        web = found.provenance["selected_by_kind"]["web"]
        assert web["selected"] / web["candidates"] > 0.8

    def test_losses_do_not_depend_on_the_number_of_workers(self, two_ranks, finished):
        assert np.array_equal(oracle_losses(two_ranks.configs["workers"]), oracle_losses(finished))

    def test_workers_share_the_rollouts(self, two_ranks):
        # 20 random rollouts and 6 bootstrap rollouts, each by whoever is free; both ranks of one worker take part in all.
        assert sum(result["workers"][1] for result in two_ranks.results) == 26
        assert [result["tp2"][1] for result in two_ranks.results] == [26, 26]

    def test_embeddings_do_not_depend_on_who_measured_what(self, two_ranks, finished):
        assert np.array_equal(array(two_ranks.configs["workers"], "candidates", "features"), array(finished, "candidates", "features"))
        # The fit sums gradients over ranks and differs by rounding; kept in half precision.
        np.testing.assert_allclose(
            pool_embeddings(two_ranks.configs["workers"]).astype(np.float64),
            pool_embeddings(finished),
            atol=2e-2,
        )

    @pytest.mark.parametrize("name", ["tp2", "tp2_of_tp1", "workers_of_tp2"])
    def test_losses_at_other_tensor_parallel_sizes_differ_by_rounding(self, two_ranks, finished, name):
        np.testing.assert_allclose(oracle_losses(two_ranks.configs[name]), oracle_losses(finished), rtol=1e-4)

    @pytest.mark.parametrize(("name", "reason"), [("main_fails", "the main rank cannot"), ("one_rank_fails", "only this worker reads")])
    def test_a_failure_of_one_rank_fails_the_round_on_all(self, two_ranks, name, reason):
        assert [result[name][0] for result in two_ranks.results] == [False, False]
        assert_failed(two_ranks.configs[name], 1, reason)
