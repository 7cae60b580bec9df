"""The watch loop: which checkpoints start a round, and when the server ends."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import Config, RunPaths, UserError
from megatron_groupmates.pool.exclusion import Exclusion
from megatron_groupmates.pool.generation import load_generation, publish, read_pointer, read_provenance, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry, read_log
from megatron_groupmates.server import watch
from megatron_groupmates.utils.files import read_json, sha256_file
from megatron_groupmates.utils.tracking import Tracker
from tests.common.gpt_runs import BATCH, REFRESHES, make_pools, rows_of_samples, tiny_config
from tests.pool.helpers import change_facts, make_pool

FIRST, SECOND = REFRESHES
# A round by the random method needs no model: what is tested here is the loop around it.
RANDOM = {"selection__method": "random"}


def paths(config: Config) -> RunPaths:
    return RunPaths.of(config)


def announce(config: Config, step: int) -> None:
    """Let ``latest`` name ``step``."""
    (paths(config).checkpoints / "latest").write_text(f"global_step{step}")


def write_state(config: Config, state: str) -> None:
    paths(config).training_state.write_text(json.dumps({"state": state, "step": 1}))


def published(config: Config) -> tuple[int | None, list[int]]:
    """Number of the newest generation, and the checkpoint step of each that the server made."""
    selection = paths(config).selection
    numbers = [int(path.name[-6:]) for path in sorted(selection.glob("generation-*")) if not path.name.endswith("000000")]
    return read_pointer(selection), [read_provenance(selection, number)["checkpoint_step"] for number in numbers]


class TestWhenItEnds:
    def test_no_refresh_is_open_any_more(self, trained, groups, tmp_path, caplog):
        config = trained.copy(tmp_path, SECOND, **RANDOM)
        with caplog.at_level("INFO"):
            assert watch.serve(config, groups, once=False)
        # The trainer is past both refreshes: a round for the older one would be stale at once.
        assert published(config) == (2, [SECOND])
        assert "no further refresh is planned; the server ends" in caplog.text
        assert read_json(paths(config).server_state)["state"] == "finished"

    def test_no_refresh_is_planned(self, trained, groups, tmp_path):
        config = trained.copy(tmp_path, FIRST, selection__max_refreshes=0, **RANDOM)
        assert watch.serve(config, groups, once=False)
        assert published(config) == (0, [])

    def test_the_trainer_finished(self, trained, groups, tmp_path):
        config = trained.copy(tmp_path, FIRST, **RANDOM)
        write_state(config, "finished")
        assert watch.serve(config, groups, once=False)
        # The checkpoint that is there is served all the same.
        assert published(config) == (1, [FIRST])

    @pytest.mark.parametrize("state", ["running", "awaiting_selection"])
    def test_no_checkpoint_for_too_long(self, trained, groups, tmp_path, caplog, state):
        config = trained.copy(tmp_path, FIRST - 1, server__idle_timeout_seconds=0.2, **RANDOM)
        write_state(config, state)
        with caplog.at_level("INFO"):
            assert watch.serve(config, groups, once=False)
        assert published(config) == (0, []) and "no new checkpoint for 0.2 s; the server ends" in caplog.text


def test_each_refresh_is_served_as_its_checkpoint_comes(trained, groups, tmp_path, monkeypatch):
    config = trained.copy(tmp_path, SECOND, **RANDOM)
    coming = [FIRST - 1, FIRST, FIRST + 1, SECOND]
    announce(config, FIRST - 2)
    seen: list[int | None] = []

    def sleep(seconds: float) -> None:
        assert seconds == config.server.poll_interval_seconds
        seen.append(read_pointer(paths(config).selection))
        announce(config, coming.pop(0))

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(watch, "_POLL_SLICE_SECONDS", 0.0001)
    assert watch.serve(config, groups, once=False)
    assert published(config) == (2, [FIRST, SECOND]) and coming == []
    assert seen == [0, 0, 1, 1]


def test_a_checkpoint_still_being_written_is_not_read(trained, groups, tmp_path):
    config = trained.copy(tmp_path, FIRST, server__idle_timeout_seconds=0.2, **RANDOM)
    announce(config, FIRST - 1)
    assert watch.serve(config, groups, once=False)
    assert published(config) == (0, [])


class FakeRun:
    """A W&B run that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((values, step))

    def finish(self) -> None:
        self.finished += 1


class TestTracking:
    @pytest.fixture
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], FakeRun]]:
        """Arguments and run of each tracker that the server opens."""
        opened: list[tuple[tuple[Any, ...], FakeRun]] = []

        def open_tracker(*arguments: Any) -> Tracker:
            opened.append((arguments, FakeRun()))
            return Tracker(opened[-1][1])

        monkeypatch.setattr(watch, "open_tracker", open_tracker)
        return opened

    def test_each_round_is_a_row_at_its_checkpoints_step(self, trained, groups, tmp_path, opened):
        config = trained.copy(tmp_path, SECOND, run__wandb_mode="offline", **RANDOM)
        assert watch.serve(config, groups, once=False)
        [((project, name, mode, directory, shown), run)] = opened
        assert (project, name, mode, directory) == (config.run.wandb_project, f"{config.run.name} selection", "offline", paths(config).root)
        assert shown["selection"]["method"] == "random"
        [(values, step)] = run.rows
        assert step == SECOND and values["generation"] == 2 and values["stage/selection/seconds"] >= 0
        assert run.finished == 1

    def test_a_failed_round_sends_nothing_and_the_run_is_closed(self, trained, groups, tmp_path, opened):
        config = trained.copy(tmp_path, FIRST, **RANDOM)
        (paths(config).checkpoints / f"global_step{FIRST}" / "mp_rank_00_model_states.pt").write_bytes(b"")
        assert not watch.serve(config, groups, once=True)
        assert opened[0][1].rows == [] and opened[0][1].finished == 1

    def test_other_ranks_send_nothing(self, trained, tmp_path, opened):
        config = trained.copy(tmp_path, FIRST, run__wandb_mode="online", **RANDOM)
        other = SimpleNamespace(is_main=False)
        watch._open_tracker(config, other, paths(config)).close()
        assert opened[0][0][2] == "disabled"


class TestFailures:
    def test_a_failed_refresh_is_tried_once_and_the_next_one_served(self, trained, groups, tmp_path):
        config = trained.copy(tmp_path, SECOND, server__idle_timeout_seconds=0.2, **RANDOM)
        announce(config, FIRST)
        (paths(config).checkpoints / f"global_step{FIRST}" / "mp_rank_00_model_states.pt").write_bytes(b"")
        assert not watch.serve(config, groups, once=False)
        assert published(config) == (0, [])
        failure = read_json(paths(config).round_failure(1))
        assert failure["checkpoint_tag"] == f"global_step{FIRST}" and "mp_rank_00_model_states.pt" in failure["reason"]
        assert read_json(paths(config).server_state)["state"] == "failed"
        before = paths(config).round_failure(1).stat().st_mtime_ns
        # Started again it does not try the same checkpoint again, and serves the next.
        announce(config, SECOND)
        assert watch.serve(config, groups, once=False)
        assert published(config) == (2, [SECOND]) and paths(config).round_failure(1).stat().st_mtime_ns == before

    def test_an_error_that_is_not_the_users_ends_the_server(self, trained, groups, tmp_path, monkeypatch):
        config = trained.copy(tmp_path, FIRST, **RANDOM)

        def fail(*args: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(watch, "run_round", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            watch.serve(config, groups, once=False)
        assert not paths(config).round_failure(1).exists()


class TestOnce:
    def test_there_is_no_checkpoint(self, trained, groups, tmp_path):
        config = trained.config(run__output_dir=str(tmp_path / "empty"), **RANDOM)
        with pytest.raises(UserError, match=r"empty/checkpoints holds no complete checkpoint .*; start the trainer first"):
            watch.serve(config, groups, once=True)

    def test_between_refreshes(self, trained, groups, tmp_path):
        config = trained.copy(tmp_path, FIRST - 2, **RANDOM)
        assert watch.serve(config, groups, once=True)
        assert published(config) == (1, [FIRST - 2])
        # The planned refresh would be number 1 by itself, which is taken.
        config = trained.copy(tmp_path / "later", FIRST, **RANDOM)
        publish_other(config, 1)
        assert watch.serve(config, groups, once=True)
        assert published(config) == (2, [FIRST - 2, FIRST])

    def test_on_the_checkpoint_of_the_run_it_branches_from(self, trained, groups, tmp_path):
        source = trained.copy(tmp_path, FIRST, **RANDOM)
        config = trained.config(
            run__output_dir=str(tmp_path / "branch"),
            checkpoint__load=str(paths(source).checkpoints),
            checkpoint__load_tag=f"global_step{FIRST - 1}",
            **RANDOM,
        )
        assert watch.serve(config, groups, once=True)
        assert published(config) == (1, [FIRST - 1]) and published(source) == (0, [])
        mask = load_generation(paths(config).selection, 1, PoolIndex.open(config.data.pool)).mask
        assert not mask[rows_of_samples(trained, 0, (FIRST - 1) * BATCH)].any()

    def test_the_checkpoint_it_branches_from_is_a_refresh_for_the_watching_server_too(self, trained, groups, tmp_path):
        source = trained.copy(tmp_path, FIRST, **RANDOM)
        config = trained.config(
            run__output_dir=str(tmp_path / "branch"),
            checkpoint__load=str(paths(source).checkpoints),
            checkpoint__load_tag=f"global_step{FIRST}",
            **{**RANDOM, "server__idle_timeout_seconds": 0.2},
        )
        assert watch.serve(config, groups, once=False)
        assert published(config) == (1, [FIRST]) and published(source) == (0, [])

    def test_the_parent_holds_no_checkpoint(self, trained, groups, tmp_path):
        (tmp_path / "parent").mkdir()
        config = trained.config(run__output_dir=str(tmp_path / "branch"), checkpoint__load=str(tmp_path / "parent"), **RANDOM)
        with pytest.raises(UserError, match=r"checkpoint\.load: \S+parent holds no complete checkpoint"):
            watch.serve(config, groups, once=True)


def publish_other(config: Config, number: int) -> None:
    """A generation from a checkpoint before the first refresh."""
    pool = PoolIndex.open(config.data.pool)
    write_generation(paths(config).selection, number, pool, np.arange(40, 90), {"checkpoint_step": FIRST - 2})
    publish(paths(config).selection, number)


class TestConsumedRows:
    def test_follow_the_generation_log(self, trained, tmp_path):
        config = trained.copy(tmp_path, FIRST)
        pool = PoolIndex.open(config.data.pool)
        publish_other(config, 1)
        generation = load_generation(paths(config).selection, 1, pool)
        append_entry(paths(config).generation_log, LogEntry(generation=1, effective_sample=8, epoch=0, digest=generation.digest))
        consumed = watch._consumed_rows(config, pool, Exclusion(), 20)
        first = rows_of_samples(trained, 0, 8)
        assert consumed.sum() == 20 and consumed[first].all()
        rest = np.setdiff1d(np.flatnonzero(consumed), first)
        assert len(rest) == 12 and generation.mask[rest].all()
        # An entry that takes effect behind the checkpoint changes nothing.
        assert np.array_equal(np.flatnonzero(watch._consumed_rows(config, pool, Exclusion(), 8)), np.sort(first))

    def test_are_forgotten_when_all_are_consumed(self, trained, tmp_path):
        config = trained.copy(tmp_path, FIRST)
        pool = PoolIndex.open(config.data.pool)
        assert watch._consumed_rows(config, pool, Exclusion(), pool.num_samples - 1).sum() == pool.num_samples - 1
        assert not watch._consumed_rows(config, pool, Exclusion(), pool.num_samples).any()

    def test_excluded_rows_are_among_them_also_when_the_others_are_forgotten(self, trained, tmp_path):
        config = trained.copy(tmp_path, FIRST)
        pool = PoolIndex.open(config.data.pool)
        exclusion = Exclusion(np.arange(pool.num_samples) % 3 == 0, 48, "digest")
        some = watch._consumed_rows(config, pool, exclusion, 8)
        assert some.sum() == 48 + 8 and some[exclusion.mask].all()
        assert np.array_equal(watch._consumed_rows(config, pool, exclusion, pool.num_samples - 48), exclusion.mask)

    def test_are_counted_from_where_selection_was_switched_on(self, trained, tmp_path):
        config = trained.copy(tmp_path, FIRST)
        pool, log = PoolIndex.open(config.data.pool), paths(config).generation_log
        (entry,) = read_log(log)
        log.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(entry, effective_sample=100))) + "\n")
        for checkpoint in (40, 100):
            assert not watch._consumed_rows(config, pool, Exclusion(), checkpoint).any()
        assert watch._consumed_rows(config, pool, Exclusion(), 108).sum() == 8

    def test_are_none_at_the_start(self, trained, tmp_path):
        config = trained.copy(tmp_path, FIRST)
        assert not watch._consumed_rows(config, PoolIndex.open(config.data.pool), Exclusion(), 0).any()


class TestPools:
    def test_no_pool(self, groups, tmp_path):
        with pytest.raises(UserError, match=r"data\.pool: "):
            watch.serve(tiny_config(tmp_path), groups, once=True)

    def test_a_reference_of_another_tokenizer(self, groups, tmp_path):
        make_pools(tmp_path)
        path = tmp_path / "other"
        make_pool(path, (4,), length=17, vocab_size=256)
        (path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes() + b"\n")
        change_facts(path, tokenizer={"name": "tiny", "fingerprint": sha256_file(path / "tokenizer.json")})
        with pytest.raises(UserError, match=r"data\.reference: \S+ was tokenised with .*; preprocess both with the same tokenizer"):
            watch.serve(tiny_config(tmp_path, data__reference=str(path)), groups, once=True)
