"""W&B: what is forwarded, and that no failure of it reaches training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_groupmates.utils.tracking import Tracker, open_tracker, tracked_values


class FakeRun:
    """Records what it is told; raises on ``log`` when asked to."""

    def __init__(self, fails: bool = False) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []
        self.finished = 0
        self._fails = fails

    def log(self, values: dict[str, float], step: int) -> None:
        if self._fails:
            raise RuntimeError("connection lost")
        self.rows.append((values, step))

    def finish(self) -> None:
        self.finished += 1


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **settings: settings))


def test_only_finite_numbers_are_forwarded_and_events_are_prefixed() -> None:
    row = {"step": 3, "loss": 1.5, "generation": 2, "grad_norm": float("nan")}
    assert tracked_values(row) == {"loss": 1.5, "generation": 2}
    row = {"step": 3, "event": "wait_ended", "generation": 1, "reason": "too late", "done": True}
    assert tracked_values(row) == {"wait_ended/generation": 1}


def test_rows_reach_the_run_and_closing_twice_finishes_once() -> None:
    run = FakeRun()
    tracker = Tracker(run)
    tracker.log({"step": 7, "loss": 2.0}, 7)
    tracker.log({"step": 7, "event": "note"}, 7)
    tracker.close()
    tracker.close()
    tracker.log({"step": 8, "loss": 1.0}, 8)
    assert run.rows == [({"loss": 2.0}, 7)]
    assert run.finished == 1


def test_a_failing_run_is_warned_about_once_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(FakeRun(fails=True))
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log({"step": step, "loss": 1.0}, step)
        tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        "W&B stopped taking metrics (RuntimeError: connection lost); metrics.jsonl has all metrics"
    ]


def test_settings_are_passed_on_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, seen = FakeRun(), {}
    fake_wandb(monkeypatch, lambda **arguments: seen.update(arguments) or run)
    tracker = open_tracker("project", "name", "offline", tmp_path / "run", {"a": 1})
    tracker.log({"step": 1, "loss": 2.0}, 1)
    assert run.rows == [({"loss": 2.0}, 1)]
    settings = seen.pop("settings")
    assert seen == {"project": "project", "name": "name", "mode": "offline", "dir": str(tmp_path / "run"), "config": {"a": 1}}
    assert settings["silent"] is True and settings["console"] == "off"


def test_disabled_does_not_touch_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = open_tracker("project", "name", "disabled", tmp_path / "run", {})
    tracker.log({"step": 1, "loss": 2.0}, 1)
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_missing_wandb_is_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        open_tracker("project", "name", "offline", tmp_path, {}).log({"step": 1, "loss": 2.0}, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "run.wandb_mode is offline but wandb is not installed; metrics go to metrics.jsonl only"
    ]


def test_wandb_that_does_not_start_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no login")

    fake_wandb(monkeypatch, refuse)
    with caplog.at_level(logging.WARNING):
        open_tracker("project", "name", "online", tmp_path, {}).close()
    assert [record.getMessage() for record in caplog.records] == [
        "W&B did not start (RuntimeError: no login); metrics go to metrics.jsonl only"
    ]
