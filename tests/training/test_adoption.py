"""Waiting for generations, refusing bad ones, and the modes: training always goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from megatron_groupmates.pool.log import read_log
from tests.common.distributed import run_ranks
from tests.training.runs import make_config, publish_every_third, rows, train_in_rank

SELECTING = ("selection.enabled=true", "selection.first_refresh_step=4", "selection.refresh_interval=100", "selection.poll_interval_steps=1")


def _train(rank, world_size, config):
    return train_in_rank(rank, world_size, config)


def _train_and_publish(rank, world_size, config, seconds):
    """Publish from a thread of rank 0 some time after the trainer has begun to wait."""
    if rank == 0:
        threading.Thread(target=_publish_once_saved, args=(config, seconds), daemon=True).start()
    return train_in_rank(rank, world_size, config)


def _publish_once_saved(config, seconds):
    while not (Path(config.run.output_dir) / "checkpoints/global_step4").exists():
        time.sleep(0.05)
    time.sleep(seconds)
    publish_every_third(config)


def _events(config):
    return [row for row in rows(config) if "event" in row]


def _log(config):
    return [(entry.generation, entry.effective_sample) for entry in read_log(Path(config.run.output_dir) / "selection/log.jsonl")]


@pytest.mark.parametrize(("mode", "step"), [("blocking", 4), ("async", 6)])
def test_the_trainer_waits_for_the_generation_where_the_mode_says_so(tmp_path: Path, mode: str, step: int):
    slack = ["selection.max_staleness_steps=2"] if mode == "async" else []
    config = make_config(tmp_path, *SELECTING, f"selection.mode={mode}", *slack)
    run_ranks(_train_and_publish, 2, config, 1.5, tmp_path=tmp_path)
    assert _log(config) == [(0, 0), (1, 4 * step)]
    assert [(row["step"], row["event"]) for row in _events(config)] == [(step, "adoption")]


def test_a_wait_ends_after_its_timeout_and_is_not_repeated(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING, "selection.mode=blocking", "selection.wait_timeout_seconds=0.5")
    assert run_ranks(_train, 2, config, tmp_path=tmp_path) == ["finished"] * 2
    assert _log(config) == [(0, 0)]
    (event,) = _events(config)
    assert (event["step"], event["event"], event["reason"]) == (4, "wait_ended", "did not come within 0.5 s")


def test_a_failed_round_ends_the_wait(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING, "selection.mode=blocking")
    failure = Path(config.run.output_dir) / "selection/rounds/round-000001/failed.json"
    failure.parent.mkdir(parents=True)
    failure.write_text(json.dumps({"reason": "test"}))
    run_ranks(_train, 1, config, tmp_path=tmp_path)
    assert [row["reason"] for row in _events(config)] == ["failed on the server"]


@pytest.mark.parametrize("damage", ["rows", "pointer", "missing"])
def test_a_bad_generation_is_refused_and_the_old_one_stays(tmp_path: Path, damage: str):
    config = make_config(tmp_path, *SELECTING)
    selection = Path(config.run.output_dir) / "selection"
    publish_every_third(config)
    if damage == "rows":
        content = bytearray((selection / "generation-000001/rows.bin").read_bytes())
        content[0] ^= 255
        (selection / "generation-000001/rows.bin").write_bytes(content)
    elif damage == "pointer":
        (selection / "latest").write_text("rubbish\n")
    else:
        (selection / "latest").write_text("generation-000009\n")
    assert run_ranks(_train, 2, config, tmp_path=tmp_path) == ["finished"] * 2
    assert _log(config) == [(0, 0)]


def test_inline_mode_hands_over_at_the_refresh_and_goes_on_after_it(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING, "selection.mode=inline")
    assert run_ranks(_train, 2, config, tmp_path=tmp_path) == ["awaiting_selection"] * 2
    state = json.loads((Path(config.run.output_dir) / "training.json").read_text())
    assert (state["state"], state["step"]) == ("awaiting_selection", 4)
    publish_every_third(config)
    assert run_ranks(_train, 2, config, tmp_path=tmp_path) == ["finished"] * 2
    assert _log(config) == [(0, 0), (1, 16)]


def test_a_branch_inherits_what_its_parent_consumed(tmp_path: Path):
    parent = make_config(tmp_path, *SELECTING, run="parent")
    publish_every_third(parent)
    run_ranks(_train, 1, parent, tmp_path=tmp_path)
    load = [f"checkpoint.load={tmp_path / 'parent/checkpoints'}", "checkpoint.load_tag=global_step8"]
    branch = make_config(tmp_path, *SELECTING, *load, run="branch")
    run_ranks(_train, 1, branch, tmp_path=tmp_path)
    assert _log(branch) == _log(parent)
    of_step = {name: {row["step"]: row["loss"] for row in rows(config) if "loss" in row} for name, config in (("parent", parent), ("branch", branch))}
    assert of_step["branch"] == {step: loss for step, loss in of_step["parent"].items() if step > 8}
