"""metrics.jsonl and training.json: what a run has done so far, exact across restarts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_groupmates.config import RunPaths
from megatron_groupmates.utils.files import append_line, read_json, read_lines, write_json, write_text


class MetricsFile:
    """Appends rows on the main rank; elsewhere it does nothing.

    Args:
        path: ``metrics.jsonl``.
        resumed_step: rows of later steps are dropped: the resumed run writes them again. Events stay: an adoption
            that is in the generation log is not made twice.
        enabled: True on the main rank.
        forward: also gets every row (W&B).
    """

    def __init__(self, path: Path, resumed_step: int, enabled: bool, forward: Callable[[dict[str, Any], int], None]) -> None:
        self._path = path
        self._enabled = enabled
        self._forward = forward
        if enabled and path.exists():
            kept = [row for row in read_lines(path) if row["step"] <= resumed_step or "event" in row]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append ``row``, which has a ``step``."""
        if self._enabled:
            append_line(self._path, json.dumps(row))
            self._forward(row, row["step"])

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of ``step`` is already there (a resume at an evaluation step)."""
        return self._enabled and any(row["step"] == step and "evaluation_loss" in row for row in read_lines(self._path))


def read_training_state(paths: RunPaths) -> dict[str, Any]:
    """``training.json``; an empty dict before the first start."""
    return read_json(paths.training_state) if paths.training_state.exists() else {}


def write_training_state(paths: RunPaths, state: str, **facts: Any) -> None:
    """Replace ``training.json``. Main rank only.

    Args:
        paths: the run.
        state: ``running``, ``waiting``, ``awaiting_selection`` (inline mode), ``failed`` or ``finished``.
        facts: step, time and FLOPs so far.
    """
    write_json(paths.training_state, {"state": state, **facts})
