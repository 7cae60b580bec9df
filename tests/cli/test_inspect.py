"""``status`` and ``trace`` on a run directory made by hand: a pool, two generations, a generation log."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.cli.main import main
from megatron_groupmates.config import Config, RunPaths, dump_config
from megatron_groupmates.pool.generation import load_generation, publish, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.utils.files import write_json
from tests.common.configs import tiny_config
from tests.pool.helpers import make_pool

ADOPTED_AT = 6
SELECTED = [1, 3, 4, 6, 8, 9, 11, 12, 14, 15]


@pytest.fixture
def pool(tmp_path: Path) -> PoolIndex:
    return make_pool(tmp_path / "pool")


def write_run(tmp_path: Path, **sections: dict[str, Any]) -> tuple[RunPaths, Config]:
    """A run directory with nothing but its config."""
    config = tiny_config(run={"output_dir": str(tmp_path / "run")}, data={"pool": str(tmp_path / "pool")}, **sections)
    paths = RunPaths.below(tmp_path / "run")
    paths.root.mkdir()
    paths.config.write_text(dump_config(config))
    return paths, config


@pytest.fixture
def run(tmp_path: Path, pool: PoolIndex) -> RunPaths:
    """A run that adopted generation 1 at sample 6."""
    paths, _ = write_run(tmp_path)
    write_generation(paths.selection, 0, pool, None, {"method": "none"})
    write_generation(paths.selection, 1, pool, np.array(SELECTED), {"method": "group", "checkpoint_step": 5})
    publish(paths.selection, 1)
    for number, sample in ((0, 0), (1, ADOPTED_AT)):
        digest = load_generation(paths.selection, number, pool).digest
        append_entry(paths.generation_log, LogEntry(generation=number, effective_sample=sample, epoch=0, digest=digest))
    return paths


def traced(capsys: pytest.CaptureFixture[str], run: Path, start: int, stop: int) -> list[dict[str, Any]]:
    assert main(["trace", str(run), "--start", str(start), "--stop", str(stop)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return [json.loads(line) for line in output.out.splitlines()]


def pool_rows(pool: PoolIndex, lines: list[dict[str, Any]]) -> list[int]:
    return [int(pool.rows(line["sources"][0][0], np.array([line["sources"][0][1]]))[0]) for line in lines]


def test_each_line_says_where_its_tokens_come_from(run: RunPaths, pool: PoolIndex, capsys: pytest.CaptureFixture[str]) -> None:
    lines = traced(capsys, run.root, 0, 10)
    reader = PoolReader(pool)
    for number, line in enumerate(lines):
        assert list(line) == ["sample", "generation", "sources", "tokens_sha256"]
        assert line["sample"] == number
        ((shard, row, first_token, num_tokens),) = line["sources"]
        assert shard in pool.shard_names and (first_token, num_tokens) == (0, 9)
        tokens = reader.read(int(pool.rows(shard, np.array([row]))[0]))
        assert line["tokens_sha256"] == hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()


def test_across_an_adoption_each_sample_comes_once_and_from_its_generation(
    run: RunPaths, pool: PoolIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pool_rows(pool, traced(capsys, run.root, 0, ADOPTED_AT))
    assert len(set(before)) == ADOPTED_AT
    left = set(SELECTED) - set(before)
    assert 0 < len(left) < len(SELECTED), "the adoption must leave out what was consumed"
    stop = ADOPTED_AT + len(left)
    lines = traced(capsys, run.root, 0, stop)
    rows = pool_rows(pool, lines)
    assert [line["generation"] for line in lines] == [0] * ADOPTED_AT + [1] * len(left)
    assert rows[:ADOPTED_AT] == before
    assert set(rows[ADOPTED_AT:]) == left
    assert len(set(rows)) == stop


def test_pieces_of_a_trace_join_seamlessly(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    whole = traced(capsys, run.root, 0, 30)
    assert [line["sample"] for line in whole] == list(range(30))
    pieces = [line for start, stop in ((0, 4), (4, 7), (7, 7), (7, 30)) for line in traced(capsys, run.root, start, stop)]
    assert pieces == whole


def test_past_its_selection_a_run_repeats_what_the_generation_served(
    run: RunPaths, pool: PoolIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pool_rows(pool, traced(capsys, run.root, 0, ADOPTED_AT))
    left = set(SELECTED) - set(before)
    again = traced(capsys, run.root, ADOPTED_AT + len(left), ADOPTED_AT + 2 * len(left))
    assert {line["generation"] for line in again} == {1}
    assert set(pool_rows(pool, again)) == left


@pytest.mark.parametrize("selection", [{"enabled": False}, {"enabled": True}])
def test_a_run_without_a_generation_log_reads_the_whole_pool(
    selection: dict[str, Any], tmp_path: Path, pool: PoolIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = write_run(tmp_path, selection=selection)
    lines = traced(capsys, paths.root, 0, 32)
    assert {line["generation"] for line in lines} == {0}
    rows = pool_rows(pool, lines)
    assert sorted(rows[:16]) == sorted(rows[16:]) == list(range(16))
    assert rows[:16] != rows[16:]
    assert traced(capsys, paths.root, 16, 17) == lines[16:17]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4)])
def test_ranges_that_are_none(start: int, stop: int, run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(run.root), "--start", str(start), "--stop", str(stop)]) == 1
    assert capsys.readouterr().err == f"error: --start {start} --stop {stop}: give 0 <= start <= stop\n"


def test_a_damaged_generation_is_told(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.selection / "generation-000001" / "rows.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    assert main(["trace", str(run.root), "--start", "0", "--stop", "1"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {path} is damaged: SHA-256 ")


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["trace", "--start", "0", "--stop", "1"]])
def test_what_is_not_a_run_is_told(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command[0], str(tmp_path), *command[1:]]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not a run directory: it has no config.yaml; give the run.output_dir of a trainer\n"
    )


def add_progress(run: RunPaths) -> None:
    write_json(run.training_state, {"state": "running", "step": 8, "consumed_train_samples": 32, "consumed_tokens": 1_256_000})
    write_json(run.server_state, {"state": "working", "round": 2, "stage": "oracle_random", "updated": time.time() - 7})
    rows = [
        {"step": 4, "loss": 5.0, "tokens_per_second": 10.0},
        {"step": 5, "evaluation_loss": 4.75},
        {"step": 6, "event": "adoption", "generation": 1},
        {"step": 8, "loss": 4.5, "tokens_per_second": 1234.4},
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
    failure = run.round_failure(3)
    failure.parent.mkdir(parents=True)
    write_json(failure, {"checkpoint_tag": "global_step15", "reason": "every fit was refused"})


def test_status_as_json(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    add_progress(run)
    assert main(["status", str(run.root), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["trainer"]["state"] == "running" and facts["trainer"]["step"] == 8
    assert facts["server"]["stage"] == "oracle_random"
    del facts["trainer"], facts["server"]
    assert facts == {
        "run": str(run.root),
        "train_iters": 20,
        "loss": 4.5,
        "evaluation_loss": 4.75,
        "tokens_per_second": 1234.4,
        "published_generation": 1,
        "adoptions": [{"generation": 0, "effective_sample": 0, "epoch": 0}, {"generation": 1, "effective_sample": 6, "epoch": 0}],
        "skipped_samples": 0,
        "planned_refreshes": [5, 10, 15],
        "failures": [{"checkpoint_tag": "global_step15", "reason": "every fit was refused"}],
    }


def test_status_for_people(run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    add_progress(run)
    now = json.loads(run.server_state.read_text())["updated"] + 7.2
    monkeypatch.setattr(time, "time", lambda: now)
    assert main(["status", str(run.root)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run        {run.root}",
        "trainer    running, step 8 of 20, 1,256,000 tokens, loss 4.5000, evaluation loss 4.7500, 1,234 tokens/s",
        "server     working, round 2: oracle random (7 s ago)",
        "selection  published generation 1; refreshes planned at steps [5, 10, 15]",
        "           generation 0 from sample 0 (epoch 0)",
        "           generation 1 from sample 6 (epoch 0)",
        "           round on global_step15 failed: every fit was refused",
    ]


@pytest.mark.parametrize(
    ("stage", "facts", "shown"),
    [
        (
            "oracle_random",
            {"done": 320, "total": 2000, "unit": "rollout", "per_second": 4.12, "eta_seconds": 407.8},
            "oracle random: 320 of 2,000 rollouts, 4.1/s, 7 min left",
        ),
        (
            "oracle_random.exact.batch-000002",
            {"done": 0, "total": 128, "unit": "rollout", "per_second": 0.0, "eta_seconds": None},
            "oracle random, exact, batch 3: 0 of 128 rollouts",
        ),
        (
            "embeddings",
            {"done": 9000, "total": 10000, "unit": "sample", "per_second": 2000.0, "eta_seconds": 0.5},
            "embedding the pool: 9,000 of 10,000 samples, 2,000.0/s, 0 s left",
        ),
        ("sorted", {}, "sorting embeddings by cluster"),
        (
            "group_0_offers_1",
            {"done": 30, "total": 1000, "unit": "cluster", "per_second": 12.0, "eta_seconds": 80.8},
            "choosing within clusters, offers 1: 30 of 1,000 clusters, 12.0/s, 81 s left",
        ),
        (
            "oracle_bootstrap",
            {"done": 1, "total": 2000, "unit": "rollout", "per_second": 0.1, "eta_seconds": 19990.0},
            "oracle bootstrap: 1 of 2,000 rollouts, 0.1/s, 5.6 h left",
        ),
    ],
)
def test_status_says_how_far_a_stage_is(
    stage: str, facts: dict[str, Any], shown: str, run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1003.2)
    write_json(run.server_state, {"state": "selecting", "round": 2, "stage": stage, "updated": 1000.0, **facts})
    assert main(["status", str(run.root)]) == 0
    assert f"server     selecting, round 2: {shown} (3 s ago)\n" in capsys.readouterr().out
    assert main(["status", str(run.root), "--json"]) == 0
    assert facts.items() <= json.loads(capsys.readouterr().out)["server"].items()


def test_status_of_a_run_that_has_not_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, _ = write_run(tmp_path)
    assert main(["status", str(paths.root)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "trainer    not started, step 0 of 20, 0 tokens, loss -, evaluation loss -, 0 tokens/s",
        "server     not started",
        "selection  published generation none; refreshes planned at steps [5, 10, 15]",
    ]


def test_status_of_a_run_without_selection_says_nothing_about_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, _ = write_run(tmp_path, selection={"enabled": False})
    assert main(["status", str(paths.root)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "trainer"]


def test_looking_changes_nothing(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    traced(capsys, run.root, 0, 40)
    assert main(["status", str(run.root)]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before


@pytest.mark.parametrize("output", [None, "elsewhere"])
def test_report_goes_to_the_first_run_unless_told(
    output: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[list[Path], Path]] = []
    monkeypatch.setattr("megatron_groupmates.report.build.build_report", lambda runs, output: seen.append((runs, output)))
    runs = [tmp_path / "a", tmp_path / "b"]
    where = tmp_path / output if output else runs[0]
    assert main(["report", *map(str, runs), *(["--output", str(where)] if output else [])]) == 0
    assert seen == [(runs, where)]
    assert capsys.readouterr().out == f"wrote {where / 'report.html'} and {where / 'summary.json'}\n"


def test_what_was_left_out_is_told_and_traced(run: RunPaths, pool: PoolIndex, capsys: pytest.CaptureFixture[str]) -> None:
    before = traced(capsys, run.root, 0, 3)
    shard, row, *_ = before[1]["sources"][0]
    run.skipped_samples.write_text(json.dumps({"sample": 1, "shard": shard, "row": row, "error": "because"}) + "\n")
    after = traced(capsys, run.root, 0, 3)
    assert [line.get("skipped") for line in after] == [None, True, None] and after[0::2] == before[0::2]
    blank = hashlib.sha256(np.full(9, pool.eot_id, dtype="<u4").tobytes()).hexdigest()
    assert after[1] == {**before[1], "skipped": True, "tokens_sha256": blank}
    assert main(["status", str(run.root)]) == 0
    assert "1 samples could not be read and were left out" in capsys.readouterr().out
    assert main(["status", str(run.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped_samples"] == 1
