"""The contamination check as users run it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.pool.helpers import make_pool

TOOL = Path(__file__).parents[2] / "tools" / "check_contamination.py"


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool whose row 6 (row 1 of its second shard) holds the second example of a reference set."""
    generator = np.random.default_rng(0)
    samples, examples = list(generator.integers(0, 300, (16, 40))), list(generator.integers(0, 300, (3, 20)))
    samples[6][10:30] = examples[1]
    make_pool(tmp_path / "pool", samples=samples)
    make_pool(tmp_path / "set", (3,), samples=examples)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_contamination", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_the_command_line_with_workers(pools: Path) -> None:
    command = [sys.executable, str(TOOL), "--pool", "pool", "--against", "set", "--output", "check", "--workers", "2"]
    done = subprocess.run(command, cwd=pools, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "16 samples with 640 tokens searched for n-grams of 13 tokens" in done.stdout
    assert "set: 1 of 3 examples touched (33.33 %); 0 are shorter than an n-gram" in done.stdout
    assert "data.exclude: check/exclude.json" in done.stdout and "search shards" in done.stderr
    [line] = (pools / "check" / "overlaps.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "shard": "shard_00000001",
        "row": 1,
        "overlapping": 8,
        "ngrams": 28,
        "fraction": round(8 / 28, 6),
        "examples": [["set", "shard_00000000", 1]],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool", "none"], "error: there is no pool at none"),
        (["--against", "set", "none"], "error: there is no pool at none"),
        (["--ngram", "3"], "error: n-grams of 3 tokens are everyday phrases; --ngram is at least 7"),
        (["--output", "pool"], "error: pool is not empty and holds no check"),
    ],
)
def test_mistakes_are_messages(pools: Path, tool: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    base = ["--pool", "pool", "--against", "set", "--output", "check", "--workers", "0"]
    assert tool.main([*base, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_help(pools: Path) -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--help"], cwd=pools, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0
    assert "--max-pool-count" in done.stdout and "may differ" in done.stdout
