"""Metrics to Weights & Biases, beside metrics.jsonl. A run never ends, waits or prints more because of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Tracker:
    """Forwards metrics rows to one W&B run; without a run it does nothing.

    Args:
        run: what ``wandb.init`` returned, None for nothing.
    """

    def __init__(self, run: Any = None) -> None:
        self._run = run

    def log(self, row: dict[str, Any], step: int) -> None:
        """Forward the finite numbers of ``row``; those of an event are named ``<event>/<name>``."""
        values = tracked_values(row)
        if values:
            self._attempt("stopped taking metrics", lambda run: run.log(values, step=step))

    def close(self) -> None:
        """Finish the W&B run; calling it again does nothing."""
        self._attempt("did not close cleanly", lambda run: run.finish())
        self._run = None

    def _attempt(self, problem: str, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever W&B raises, training goes on
            logger.warning("W&B %s (%s: %s); metrics.jsonl has all metrics", problem, type(error).__name__, error)
            self._run = None


def tracked_values(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers in a metrics row, without its ``step``; those of an event are named ``<event>/<name>``."""
    prefix = f"{row['event']}/" if "event" in row else ""
    return {
        f"{prefix}{name}": value for name, value in row.items() if name != "step" and type(value) in (int, float) and math.isfinite(value)
    }


def open_tracker(project: str, name: str, mode: str, directory: Path, config: dict[str, Any]) -> Tracker:
    """Start a W&B run; where that fails, warn once and return a tracker that does nothing. Main rank only.

    Args:
        project: W&B project.
        name: of the run.
        mode: ``offline`` (files under ``directory/wandb``, for ``wandb sync``), ``online`` or ``disabled``.
        directory: run directory.
        config: shown with the run.
    """
    if mode == "disabled":
        return Tracker()
    try:
        import wandb

        Path(directory).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", login_timeout=30, init_timeout=60, x_disable_stats=True)
        return Tracker(wandb.init(project=project, name=name, mode=mode, dir=str(directory), config=config, settings=settings))
    except ImportError:
        logger.warning("run.wandb_mode is %s but wandb is not installed; metrics go to metrics.jsonl only", mode)
    except Exception as error:  # no network, no login, no disk: none of it may end a training run
        logger.warning("W&B did not start (%s: %s); metrics go to metrics.jsonl only", type(error).__name__, error)
    return Tracker()
