"""The tool for reference sets as users run it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.references.examples import is_reference_set
from tests.pool.helpers import documents, make_pool, tiny_tokenizer, tokenizer_json, write_raw

TOOL = Path(__file__).parents[2] / "tools" / "make_reference.py"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_raw(tmp_path / "raw" / "a.jsonl.zst", [*documents(80), b"{"])
    pairs = [{"inputs": record["text"], "targets": "a mat"} for record in documents(60, 1)]
    write_raw(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    make_pool(tmp_path / "pool", length=33)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_the_command_line_and_again(raw: Path) -> None:
    arguments = ["--input", "raw", "--output", "sets", "--pool", "pool", "--size", "4", "--sizes", "evaluation=9,oracle_noise=0"]
    command = [sys.executable, str(TOOL), *arguments]
    done = subprocess.run(command, cwd=raw, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["examples", "read", "81"] in lines and ["broken_json", "1"] in lines and ["chosen", "13"] in lines
    assert [line[:2] for line in lines if line[0] in ("oracle", "evaluation")] == [["oracle", "4"], ["evaluation", "9"]]
    assert not (raw / "sets" / "oracle_noise").exists()
    index = PoolIndex.open(raw / "sets" / "evaluation")
    assert is_reference_set(index) and index.num_samples == 9 and index.lengths.max() <= 33
    again = subprocess.run(command, cwd=raw, capture_output=True, text=True, timeout=500)
    assert again.stdout.startswith("sets is complete already, made with the same arguments: nothing to do")


def test_other_field_names_and_a_delimiter(raw: Path, tool: ModuleType) -> None:
    fields = ["--context-field", "inputs", "--continuation-field", "targets", "--delimiter", " "]
    base = ["--input", "pairs.jsonl", "--output", "sets", "--tokenizer", "tokenizer.json", "--size", "2", "--max-tokens", "100"]
    assert tool.main([*base, *fields]) == 0
    index = PoolIndex.open(raw / "sets" / "oracle")
    for tokens in PoolReader(index).read_many(np.arange(2)):
        assert tiny_tokenizer().decode(tokens).endswith(" a mat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nothing"], "error: input 'nothing' matches no file"),
        (["--size", "50"], "too few examples (oracle: 50 asked for, "),
        (["--sizes", "evaluation"], "error: --sizes: 'evaluation' is not PART=N, such as evaluation=1024"),
        (["--sizes", "test=4"], "error: there is no part test; --sizes names oracle, oracle_noise, evaluation"),
        (["--max-rejects", "0"], "1 lines rejected so far (1 broken_json), --max-rejects is 0. "),
        (["--output", "raw"], "error: raw is not empty and holds no reference sets"),
        (["--output", "tokenizer.json/sets"], "error: "),
    ],
)
def test_mistakes_are_messages(raw: Path, tool: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    base = ["--input", "raw", "--output", "sets", "--pool", "pool", "--size", "3"]
    assert tool.main([*base, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (raw / "sets").exists()


def test_a_tokenizer_does_not_tell_the_length(raw: Path, tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert tool.main(["--input", "raw", "--output", "sets", "--tokenizer", "tokenizer.json", "--size", "3"]) == 1
    assert "error: --tokenizer does not tell how long an example may be; give --max-tokens" in capsys.readouterr().err


def test_help(raw: Path) -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--help"], cwd=raw, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0
    assert "No two parts share a document" in done.stdout and "--max-rejects" in done.stdout
