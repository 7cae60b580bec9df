"""Progress bars for long work and one clear line per stage otherwise."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int | None, description: str, *, unit: str = "it", initial: int = 0, enabled: bool = True, **options: Any) -> tqdm:
    """A bar on standard error; in a log file it prints a line every ten seconds instead of redrawing.

    Args:
        total: units of work, None where it is not known.
        description: what is being done, shown before the bar.
        unit: name of one unit of work.
        initial: units already done by an earlier run.
        enabled: False on every rank but the one that reports.
        options: passed on to ``tqdm``.
    """
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not enabled,
        dynamic_ncols=interactive,
        mininterval=0.2 if interactive else 10.0,
        smoothing=0.1,
        leave=True,
        file=sys.stderr,
        ascii=None if interactive else True,
        **options,
    )
