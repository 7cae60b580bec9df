"""Checks a finished quickstart directory as a user would read it: python tests/check_quickstart.py RUN."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check(run: Path) -> None:
    """Raise AssertionError where the run directory is not what the README promises."""
    for name in ("config.yaml", "checkpoints/latest", "metrics.jsonl", "report.html", "summary.json", "selection/latest"):
        assert (run / name).is_file(), f"{run / name} is missing"
    log = [json.loads(line) for line in (run / "selection/log.jsonl").read_text().splitlines()]
    adopted = [entry for entry in log[1:] if entry["generation"] > 0 and entry["epoch"] == log[0]["epoch"]]
    assert len({entry["generation"] for entry in adopted}) >= 2, f"fewer than two adoptions: {log}"
    arms = json.loads((run / "summary.json").read_text())["arms"]
    assert {"group", "random", "similarity"} <= set(arms), f"arms in summary.json: {sorted(arms)}"
    adoption = adopted[0]["effective_sample"]
    lines = trace(run, adoption - 32, adoption + 32)
    assert [line["sample"] for line in lines] == list(range(adoption - 32, adoption + 32))
    assert {line["generation"] for line in lines[:32]} == {0} and {line["generation"] for line in lines[32:]} == {adopted[0]["generation"]}
    sources = [tuple(map(tuple, line["sources"])) for line in lines]
    assert len(set(sources)) == len(sources), "a sample was served twice across the adoption"


def readme_commands() -> list[str]:
    """The command lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run_readme_commands(run: Path) -> None:
    """Run the commands that look at ``runs/quickstart`` on ``run``."""
    commands = [command for command in readme_commands() if "runs/quickstart" in command]
    assert commands, "the README has no command that looks at the quickstart's run"
    for command in commands:
        words = [word.replace("runs/quickstart", str(run)) for word in shlex.split(command)]
        last = json.loads((run / "training.json").read_text())["consumed_train_samples"]
        words = [str(min(int(word), last)) if word.isdigit() else word for word in words]
        result = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, f"{command}: {result.stderr}"


def trace(run: Path, start: int, stop: int) -> list[dict]:
    """Lines of the ``trace`` command."""
    command = [sys.executable, "-m", "megatron_groupmates", "trace", str(run), "--start", str(start), "--stop", str(stop)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return [json.loads(line) for line in output.splitlines()]


if __name__ == "__main__":
    check(Path(sys.argv[1]).resolve())
    run_readme_commands(Path(sys.argv[1]).resolve())
    print(f"{sys.argv[1]}: run directory, adoptions, arms, trace and the README's commands are as the README says")
