"""The preprocessing tool as users run it."""

from __future__ import annotations

import errno
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_groupmates.pool.index import PoolIndex
from tests.pool.helpers import documents, tokenizer_json, write_raw

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_dclm.py"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_raw(tmp_path / "raw" / "a.jsonl.zstd", [*documents(50, 1), b"{"])
    write_raw(tmp_path / "raw" / "b.jsonl", documents(30, 2))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    return tmp_path


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_dclm", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), "--input", "raw", "--output", "pool", "--tokenizer", "tokenizer.json"]
    command += arguments
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


def test_from_any_directory_with_workers(raw: Path) -> None:
    done = run(raw, "--pack", "17", "--workers", "2", "--samples-per-shard", "40")
    assert done.returncode == 0, done.stderr
    index = PoolIndex.open(raw / "pool")
    assert index.num_shards > 1 and index.tokenizer["name"] == "tokenizer.json"
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["documents", "read", "81"] in lines and ["broken_json", "1"] in lines
    assert f"in {index.num_samples:,} samples" in done.stdout
    assert "tokenise" in done.stderr and "write shards" in done.stderr


def test_second_run_and_other_arguments(
    raw: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(raw)
    arguments = ["--input", "raw/*", "--output", "pool", "--tokenizer", "tokenizer.json", "--workers", "0"]
    assert tool.main(arguments) == 0
    assert tool.main(arguments) == 0
    assert "pool is complete already, made with the same arguments: nothing to do" in capsys.readouterr().out
    assert tool.main([*arguments, "--seed", "5"]) == 1
    assert "error: pool is a pool made with other arguments (seed was 0, is 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nothing"], "error: input 'nothing' matches no file"),
        (["--tokenizer", "./none"], "error: there is no tokenizer at ./none"),
        (["--eot", "<eos>"], "has no token '<eos>'"),
        (["--pack", "1"], "a packed context has at least 2 tokens, not 1"),
        (["--max-rejects", "0"], "1 lines rejected so far, --max-rejects is 0"),
        (["--pack", "100000"], "no sample comes of the 2 input files"),
        (["--output", "tokenizer.json/pool"], "error: cannot make tokenizer.json/pool"),
    ],
)
def test_mistakes_are_messages(
    raw: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(raw)
    base = ["--input", "raw", "--output", "pool", "--tokenizer", "tokenizer.json", "--workers", "0"]
    assert tool.main([*base, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (raw / "pool").exists()


def test_no_traceback_for_mistakes(raw: Path) -> None:
    done = run(raw, "--eot", "<eos>")
    assert done.returncode == 1
    assert done.stderr.startswith("error: tokenizer tokenizer.json has no token '<eos>'")
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk(raw: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(raw)
    monkeypatch.setattr("megatron_groupmates.utils.files.os.fsync", full)
    assert tool.main(["--input", "raw", "--output", "pool", "--tokenizer", "tokenizer.json", "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device; free space or choose another --output. No partial pool is left" in error
    assert sorted(path.name for path in raw.iterdir()) == ["raw", "tokenizer.json"]


def test_help(raw: Path) -> None:
    done = run(raw, "--help")
    assert done.returncode == 0
    assert "What is left at the end of" in done.stdout and "--max-rejects" in done.stdout
