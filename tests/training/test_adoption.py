"""Waiting for generations, refusing bad ones, and the modes: training always goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from megatron_groupmates.pool.log import read_log
from tests.common.distributed import run_ranks
from tests.training.runs import Job, make_config, publish_every_third, rows, train_in_rank, train_jobs

SELECTING = (
    "selection.enabled=true",
    "selection.first_refresh_step=4",
    "selection.refresh_interval=100",
    "selection.poll_interval_steps=1",
)


def _train_and_publish(rank, world_size, configs, seconds):
    """Train each; a thread of rank 0 publishes some time after the trainer has begun to wait."""
    for config in configs:
        if rank == 0:
            threading.Thread(target=_publish_once_saved, args=(config, seconds), daemon=True).start()
        train_in_rank(rank, world_size, Job(config=config))


def _publish_once_saved(config, seconds):
    while not (Path(config.run.output_dir) / "checkpoints/global_step4").exists():
        time.sleep(0.05)
    time.sleep(seconds)
    publish_every_third(config)


def _events(config):
    return [row for row in rows(config) if "event" in row]


def _log(config):
    return [(entry.generation, entry.effective_sample) for entry in read_log(Path(config.run.output_dir) / "selection/log.jsonl")]


def test_the_trainer_waits_for_the_generation_where_the_mode_says_so(tmp_path: Path):
    blocking = make_config(tmp_path, *SELECTING, "selection.mode=blocking", run="blocking")
    bounded = make_config(tmp_path, *SELECTING, "selection.mode=async", "selection.max_staleness_steps=2", run="bounded")
    run_ranks(_train_and_publish, 2, [blocking, bounded], 1.0, tmp_path=tmp_path)
    for config, step in ((blocking, 4), (bounded, 6)):
        assert _log(config) == [(0, 0), (1, 4 * step)]
        assert [(row["step"], row["event"]) for row in _events(config)] == [(step, "adoption")]


def test_waits_end_and_bad_generations_are_refused_while_training_goes_on(tmp_path: Path):
    """Every way a server can fail leaves the trainer with the generation it has, and with one word of why."""
    timeout = make_config(tmp_path, *SELECTING, "selection.mode=blocking", "selection.wait_timeout_seconds=0.5", run="timeout")
    failed = make_config(tmp_path, *SELECTING, "selection.mode=blocking", run="failed")
    failure = Path(failed.run.output_dir) / "selection/rounds/round-000001/failed.json"
    failure.parent.mkdir(parents=True)
    failure.write_text(json.dumps({"reason": "test"}))
    damaged, rubbish, missing = (make_config(tmp_path, *SELECTING, run=name) for name in ("damaged", "rubbish", "missing"))
    for config in (damaged, rubbish, missing):
        publish_every_third(config)
    rows_file = Path(damaged.run.output_dir) / "selection/generation-000001/rows.bin"
    rows_file.write_bytes(bytes([rows_file.read_bytes()[0] ^ 255]) + rows_file.read_bytes()[1:])
    (Path(rubbish.run.output_dir) / "selection/latest").write_text("rubbish\n")
    (Path(missing.run.output_dir) / "selection/latest").write_text("generation-000009\n")

    configs = (timeout, failed, damaged, rubbish, missing)
    assert run_ranks(train_jobs, 2, [Job(config=config) for config in configs], tmp_path=tmp_path) == [["finished"] * 5] * 2
    assert all(_log(config) == [(0, 0)] for config in configs)
    assert [(row["step"], row["event"], row["reason"]) for row in _events(timeout)] == [(4, "wait_ended", "did not come within 0.5 s")]
    assert [row["reason"] for row in _events(failed)] == ["failed on the server"]
    assert _events(damaged) == _events(rubbish) == _events(missing) == []


def test_inline_mode_hands_over_at_the_refresh_and_goes_on_after_it(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING, "selection.mode=inline")
    assert run_ranks(train_jobs, 2, [Job(config=config)], tmp_path=tmp_path) == [["awaiting_selection"]] * 2
    state = json.loads((Path(config.run.output_dir) / "training.json").read_text())
    assert (state["state"], state["step"]) == ("awaiting_selection", 4)
    publish_every_third(config)
    assert run_ranks(train_jobs, 2, [Job(config=config)], tmp_path=tmp_path) == [["finished"]] * 2
    assert _log(config) == [(0, 0), (1, 16)]


def test_a_branch_inherits_what_its_parent_consumed(tmp_path: Path):
    parent = make_config(tmp_path, *SELECTING, run="parent")
    publish_every_third(parent)
    load = [f"checkpoint.load={tmp_path / 'parent/checkpoints'}", "checkpoint.load_tag=global_step8"]
    branch = make_config(tmp_path, *SELECTING, *load, run="branch")
    run_ranks(train_jobs, 1, [Job(config=parent), Job(config=branch)], tmp_path=tmp_path)
    assert _log(branch) == _log(parent)
    of_step = {
        name: {row["step"]: row["loss"] for row in rows(config) if "loss" in row}
        for name, config in (("parent", parent), ("branch", branch))
    }
    assert of_step["branch"] == {step: loss for step, loss in of_step["parent"].items() if step > 8}
