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
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=500)


def test_from_any_directory_with_workers(raw: Path) -> None:
    done = run(raw, "--pack", "17", "--workers", "2", "--samples-per-shard", "40")
    assert done.returncode == 0, done.stderr
    index = PoolIndex.open(raw / "pool")
    assert index.num_shards > 1 and index.tokenizer["name"] == "tokenizer.json"
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["documents", "read", "81"] in lines and ["broken_json", "1"] in lines and ["input", "files", "2"] in lines
    assert "  tokenizer engine  " in done.stdout
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
        (["--max-rejects", "0"], "1 documents rejected so far, --max-rejects is 0"),
        (["--storage-options", "{"], "error: --storage-options is not JSON"),
        (["--storage-options", "[]"], "error: --storage-options is an object of protocols, not []"),
        (["--output", "s3://pools/x"], "output s3://pools/x is remote: name a directory for unfinished work"),
        (["--work-directory", "s3://pools/x"], "the work directory is on a local or shared file system, not s3://pools/x"),
        (["--work-directory", "raw"], "work directory raw holds something else (a.jsonl.zstd, b.jsonl)"),
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
    arguments = ["--input", "raw", "--output", "pool", "--tokenizer", "tokenizer.json", "--workers", "0"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(raw)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_groupmates.utils.files.os.fsync", full)
        assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert "No space left on device. Finished work is kept: free space; then repeat the same command to continue" in error
    assert not (raw / "pool").exists()
    assert tool.main(arguments) == 0
    assert not (raw / "pool.work").exists()


def test_no_torch_in_its_way(raw: Path) -> None:
    """Starting takes a fraction of a second, in every worker."""
    script = "import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    script = script.format(str(TOOL)) + "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=raw, capture_output=True, text=True, timeout=500)
    assert done.stdout.endswith("False False\n"), done.stderr


def test_fewer_files_than_workers_is_said_once(raw: Path) -> None:
    done = run(raw, "--workers", "3")
    assert done.returncode == 0 and done.stderr.count("2 input files for 3 workers: a file is read by one worker") == 1


def test_all_options_reach_the_pool(raw: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(raw)
    arguments = ["--input", "raw", "raw/b.jsonl", "--output", "pool", "--tokenizer", "tokenizer.json", "--workers", "0", "--seed", "7"]
    arguments += ["--metadata-field", "url.domain", "--metadata-field", "metadata.kind", "--kind-field", "url.domain", "--pack", "9"]
    arguments += ["--cell-bytes", "5000", "--samples-per-shard", "70", "--member-format", "json.gz", "--work-directory", "work"]
    assert tool.main(arguments) == 0
    assert "(1 named twice)" in capsys.readouterr().out
    made = PoolIndex.open(raw / "pool").facts["made_by"]["arguments"]
    expected = {"pack": 9, "seed": 7, "samples_per_shard": 70, "cell_bytes": 5000, "member_format": "json.gz", "kind_field": "url.domain"}
    assert made == {**made, **expected, "metadata_fields": ["url.domain", "metadata.kind"], "inputs": made["inputs"]}
    assert [name for name, _ in made["inputs"]] == ["a.jsonl.zstd", "b.jsonl"]
    assert not (raw / "work").exists()


def test_help(raw: Path) -> None:
    done = run(raw, "--help")
    assert done.returncode == 0
    assert "What is left at the end of" in done.stdout and "--max-rejects" in done.stdout
