"""From the finished arms to a table, JSON and a plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.recipes_statistics import Interval, interval, paired_interval

Result = dict[str, Any]
"""What a job writes of one arm; ``rows`` holds the pool rows it selected."""

BASE, DEFAULT, ALONE = "random", "group", "individual"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one pool, over its seeds. Differences are of evaluation losses and of Spearman, paired by seed."""

    arm: str
    loss: Interval
    to_random: Interval
    to_default: Interval
    spearman: Interval
    spearman_to_default: Interval
    refused: int
    learned: int
    overlap: Interval
    """Share of its selection that ``individual`` takes too."""
    redundant: Interval
    """Share of its selection that is the second or a later member of a family."""
    members: Interval
    """Taken of a family of which any is taken."""

    def cells(self) -> list[str]:
        """One table row."""
        refused = f"{self.refused} of {self.learned}" if self.learned else "-"
        compared = "-" if self.arm == DEFAULT else self.to_default.text(signed=True)
        verdict = "" if self.arm == DEFAULT else {"lower": "better", "higher": "worse"}.get(self.to_default.verdict, "not separated")
        return [
            self.arm,
            self.loss.text(),
            "-" if self.arm == BASE else self.to_random.text(signed=True),
            compared,
            verdict if self.to_default.count > 1 else "",
            self.spearman.text(2),
            "-" if self.arm == DEFAULT else self.spearman_to_default.text(2, signed=True),
            refused,
            _mean(self.overlap),
            _mean(self.redundant),
            _mean(self.members),
        ]


HEADER = [
    "arm",
    "evaluation loss",
    "minus random",
    "minus group",
    "against group",
    "Spearman of the fit",
    "minus group's",
    "refused",
    "in individual's",
    "redundant",
    "members",
]


def compare(results: Sequence[Result]) -> list[Row]:
    """Rows of the arms of one pool, in the order of ``results``."""
    arms: dict[str, dict[int, Result]] = {}
    for result in results:
        arms.setdefault(result["arm"], {})[result["seed"]] = result

    def losses(arm: str) -> dict[int, float]:
        return {seed: result["loss"] for seed, result in arms.get(arm, {}).items()}

    def fits(arm: str) -> dict[int, float]:
        found = arms.get(arm, {})
        return {seed: result["fit"]["spearman"] for seed, result in found.items() if result["fit"] and "spearman" in result["fit"]}

    rows = []
    for arm, seeds in arms.items():
        learned = [result["fit"] for result in seeds.values() if result["fit"]]
        shares = [_share(result["rows"], arms[ALONE][seed]["rows"]) for seed, result in seeds.items() if seed in arms.get(ALONE, {})]
        families = [result["families"] for result in seeds.values() if result["families"]["families"]]
        rows.append(
            Row(
                arm=arm,
                loss=interval(list(losses(arm).values())),
                to_random=paired_interval(losses(arm), losses(BASE)),
                to_default=paired_interval(losses(arm), losses(DEFAULT)),
                spearman=interval(list(fits(arm).values())),
                spearman_to_default=paired_interval(fits(arm), fits(DEFAULT)),
                refused=sum(not found["accepted"] for found in learned),
                learned=len(learned),
                overlap=interval(shares),
                redundant=interval([counts["redundant_share"] for counts in families]),
                members=interval([counts["members"] for counts in families]),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kinds_table(results: Sequence[Result]) -> str:
    """Markdown: for each arm of one pool the share of each kind of text in its selections, over all seeds."""
    counts: dict[str, dict[str, int]] = {}
    for result in results:
        total = counts.setdefault(result["arm"], {})
        for kind, number in result["kinds"].items():
            total[kind] = total.get(kind, 0) + number
    kinds = list(results[0]["kinds"])
    lines = [["arm", *kinds], ["---"] * (1 + len(kinds))]
    for arm, total in counts.items():
        lines.append([arm, *(f"{total[kind] / max(1, sum(total.values())):.0%}" for kind in kinds)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conclusions(rows: Sequence[Row]) -> list[str]:
    """One sentence for each comparison with the default recipe's arm."""
    found = []
    for row in rows:
        if row.arm != DEFAULT and row.to_default.count > 1:
            verdict = {"lower": "better than", "higher": "worse than"}.get(row.to_default.verdict, "not separated from")
            found.append(f"{row.arm} is {verdict} {DEFAULT}: {row.to_default.text(4, signed=True)} over {row.to_default.count} seeds")
    return found


def to_json(pools: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """All figures; intervals as mean, half width and count, null where there is none."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return {pool: {row.arm: plain(dataclasses.asdict(row)) for row in rows} for pool, rows in pools.items()}


def plot(pools: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Mean difference to random with its interval for each arm, a panel for each pool."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(len(rows) for rows in pools.values())
    figure, panels = pyplot.subplots(1, len(pools), figsize=(5.5 * len(pools), 1.2 + 0.32 * most), squeeze=False, layout="constrained")
    for panel, (pool, rows) in zip(panels[0], pools.items(), strict=True):
        shown = [row for row in rows if row.arm != BASE and row.to_random.count]
        places = np.arange(len(shown))[::-1]
        widths = np.nan_to_num([row.to_random.half_width for row in shown])
        colours = ["tab:red" if row.arm == DEFAULT else "tab:blue" for row in shown]
        panel.axvline(0.0, color="grey", linewidth=0.8)
        for place, row, width, colour in zip(places, shown, widths, colours, strict=True):
            panel.errorbar(row.to_random.mean, place, xerr=width, marker="o", capsize=3, color=colour)
        panel.set(title=f"{pool} pool", xlabel="evaluation loss minus random's (lower is better)")
        panel.set_yticks(places, [row.arm for row in shown])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _share(rows: np.ndarray, others: np.ndarray) -> float:
    return float(np.isin(rows, others).mean())


def _mean(values: Interval) -> str:
    return f"{values.mean:.2f}" if values.count else "-"
