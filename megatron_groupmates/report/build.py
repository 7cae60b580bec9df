"""A report on runs: read them, compute the figures, write page and summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_groupmates.report.figures import summarise
from megatron_groupmates.report.page import render_page
from megatron_groupmates.report.read import read_runs
from megatron_groupmates.utils.files import write_json, write_text


def build_report(runs: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write ``report.html`` and ``summary.json`` on ``runs`` (one experiment, an arm each) to the directory ``output``.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: a run is given twice, is not a run directory, or holds a damaged file.
    """
    summary = summarise(read_runs(runs))
    content = render_page(summary)
    write_json(Path(output) / "summary.json", summary)
    write_text(Path(output) / "report.html", content)
    return summary
