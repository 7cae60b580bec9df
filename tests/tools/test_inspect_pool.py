"""The command line that shows what a pool holds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_groupmates.pool.index import PoolIndex
from tests.pool.formats.helpers import MASK, add_sources, pool_and_generation

TOOL = Path(__file__).parents[2] / "tools" / "inspect_pool.py"
main = runpy.run_path(str(TOOL))["main"]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    pool, _ = pool_and_generation(tmp_path)
    add_sources(PoolIndex.open(pool))
    return pool


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main([*map(str, arguments), "--workers", "0"]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out if code == 0 or captured.out else captured.err


def test_table_and_json_say_the_same(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--generation", pool.parent / "selection", "--by", "url.domain", "--sample", "shard_00000001:2")
    table, content = run(capsys, pool, *more), json.loads(run(capsys, pool, *more, "--json"))
    assert (content["samples"], content["tokens"], content["shards"]) == (16, 144, 3)
    assert content["generation"]["generation"] == "generation-000002"
    assert content["generation"]["samples"] == MASK.sum() == 5
    first = content["by"]["rows"][0]
    assert first == {"value": "a.com", "samples": 16, "tokens": 112, "selected_samples": 5, "selected_tokens": 35}
    assert content["by"]["field"] == "url.domain" and content["sample"]["pool_row"] == 7
    for text in (
        "samples      16\n",
        "tokens       144\n",
        "lengths      min 9, median 9.0, mean 9.0, max 9\n",
        "selected     generation-000002: 31.2% of the samples, 31.2% of the tokens\n",
        f"{'a.com':<40} {'16':>14} {'100.0%':>7} {'112':>18} {'77.8%':>7} {'31.2%':>17} {'31.2%':>7}\n",
        "sample shard_00000001:2 (row 7 of the pool), web, 9 tokens\n  f.jsonl:3, tokens 0 to 6 http://www.a.com/x\n",
        content["sample"]["text"],
    ):
        assert text in table


def test_kinds_are_shown_without_being_asked_for(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(run(capsys, pool, "--json"))
    assert {row["value"]: row["samples"] for row in content["by"]["rows"]} == {"(unknown)": 6, "web": 5, "book": 5}
    assert "generation" not in content and "sample" not in content
    assert "kind " in run(capsys, pool)


def test_verify(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, pool, "--verify").endswith("verified: nothing is damaged\n")
    assert json.loads(run(capsys, pool, "--verify", "--json"))["damaged"] == []
    (pool / "shard_00000001.tar").unlink()
    (pool / "tokenizer.json").write_bytes(b"x")
    lines = [line for line in run(capsys, pool, "--verify", code=1).splitlines() if line.startswith("damaged: ")]
    assert len(lines) == 2 and "tokenizer.json" in lines[0] and "shard_00000001.tar" in lines[1]
    assert len(json.loads(run(capsys, pool, "--verify", "--json", code=1))["damaged"]) == 2
    assert run(capsys, pool, code=1).startswith("error: pool ")


def test_errors(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, pool / "none", code=1).startswith("error: there is no pool at ")
    assert run(capsys, pool, "--sample", "99", code=1).startswith("error: --sample 99: pool rows")
    assert "names no generation" in run(capsys, pool, "--generation", pool, code=1)


def test_as_a_program(pool: Path) -> None:
    command = [sys.executable, str(TOOL), "pool", "--by", "topic", "--workers", "1"]
    done = subprocess.run(command, cwd=pool.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "even" in done.stdout and "odd" in done.stdout
