"""The command line: launchers' arguments, one clear message for what a user can mend, tracebacks for the rest."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_groupmates import __version__
from megatron_groupmates.cli import plan
from megatron_groupmates.cli.main import build_parser, main, split_local_rank
from megatron_groupmates.config import UserError, dump_config
from tests.common.configs import tiny_config

COMMANDS = ("train", "serve", "plan", "status", "trace", "report")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(run={"output_dir": str(tmp_path / "run")})))
    return path


@pytest.mark.parametrize("name", ["--local_rank", "--local-rank"])
def test_local_rank_is_taken_out_wherever_a_launcher_puts_it(name: str) -> None:
    rest = ["train", "--config", "c.yaml"]
    for given in (
        [f"{name}=3", *rest],
        [name, "3", *rest],
        [*rest, f"{name}=3"],
        [*rest, name, "3"],
        ["train", f"{name}=3", "--config", "c.yaml"],
    ):
        assert split_local_rank(given) == (rest, 3)
    assert split_local_rank([f"{name}=0", "plan"]) == (["plan"], 0)


def test_other_arguments_pass_untouched() -> None:
    given = ["train", "--set", "run.name=--local_rank", "--local_ranks=3"]
    assert split_local_rank(given) == (given, None)


@pytest.mark.parametrize(
    ("given", "value"), [(["train", "--local_rank"], "''"), (["--local-rank=x"], "'x'"), (["--local_rank", "-1"], "'-1'")]
)
def test_a_local_rank_without_a_number_is_told(given: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"takes the number of a rank on its host, got {value}"):
        split_local_rank(given)
    assert main(given) == 1
    assert capsys.readouterr().err.startswith("error: --local")


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing.yaml"
    assert main(["--local_rank=0", "plan", "--config", str(missing)]) == 1
    output = capsys.readouterr()
    assert output.err == f"error: --config: {missing} does not exist\n"
    assert output.out == ""


def test_a_mistake_in_the_launchers_variables_is_told_too(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--config", str(config_file)]) == 1
    assert capsys.readouterr().err.startswith("error: RANK is set but WORLD_SIZE is not")


@pytest.mark.parametrize(("rank", "waits"), [("0", 0), ("1", 1)])
def test_rank_0_speaks_before_the_others(
    rank: str, waits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plan", "--config", str(tmp_path / "missing.yaml")]) == 1
    assert len(slept) == waits
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("name", "shown"), [("run/file", "run/file"), (None, "a file")])
def test_a_full_disk_is_told(
    number: int, name: str | None, shown: str, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object) -> None:
        raise OSError(number, "full", name)

    monkeypatch.setattr(plan, "check_pools", fill)
    assert main(["plan", "--config", str(config_file)]) == 1
    assert capsys.readouterr().err == (
        f"error: no space left while writing {shown}: free some, then start the same command again; what was complete is kept\n"
    )


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), RuntimeError("ours"), ValueError("ours")])
def test_everything_else_keeps_its_traceback(error: Exception, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(plan, "check_pools", fail)
    with pytest.raises(type(error)) as caught:
        main(["plan", "--config", str(config_file)])
    assert caught.value is error


def test_an_interrupt_ends_quietly(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "check_pools", interrupt)
    assert main(["plan", "--config", str(config_file)]) == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required: command"),
        (["plan"], "the following arguments are required: --config"),
        (["trace", "run", "--start", "0"], "the following arguments are required: --stop"),
        (["plan", "--config", "c", "--gpus", "0"], "argument --gpus: 0 is not above 0"),
        (["plan", "--config", "c", "--server-gpus", "two"], "argument --server-gpus: invalid int value: 'two'"),
        (["plan", "--config", "c", "--tflops", "-1"], "argument --tflops: -1 is not above 0"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: megatron_groupmates {command}" in capsys.readouterr().out


def test_the_help_lists_every_command_and_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"\n    {command} " in listed for command in COMMANDS)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_every_command_reaches_a_handler() -> None:
    required = {
        "train": ["--config", "c"],
        "serve": ["--config", "c"],
        "plan": ["--config", "c"],
        "status": ["r"],
        "trace": ["r", "--start", "0", "--stop", "1"],
        "report": ["r"],
    }
    assert set(required) == set(COMMANDS)
    for command, arguments in required.items():
        assert callable(build_parser().parse_args([command, *arguments]).handler)


def test_serving_a_run_without_selection_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(selection={"enabled": False})))
    assert main(["serve", "--config", str(path)]) == 1
    assert capsys.readouterr().err == "error: selection.enabled: false, so there is nothing to serve; set it to true\n"


def test_a_run_of_a_users_own_checkout_is_not_trained_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(checkpoint={"format": "megatron_deepspeed"})))
    assert main(["train", "--config", str(path)]) == 1
    assert "checkpoint.format: megatron_deepspeed: this run is trained by the checkout it belongs to" in capsys.readouterr().err


def test_training_a_finished_run_does_nothing(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_groupmates.utils.logging.configure_logging", lambda *_: None)  # it would outlive the test
    run = tmp_path / "run"
    run.mkdir()
    (run / "training.json").write_text('{"state": "finished", "step": 20}')
    assert main(["train", "--config", str(config_file)]) == 0
    assert capsys.readouterr().out == f"{run} is finished: step 20 of 20; nothing to do\n"
    assert main(["train", "--config", str(config_file), "--set", "run.seed=5"]) == 1
    assert "run.seed: 1234 -> 5" in capsys.readouterr().err


def test_a_real_process_prints_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_groupmates", "plan", "--config", "missing.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: --config: missing.yaml does not exist\n")


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    script = (
        "import argparse, sys\n"
        "from megatron_groupmates.cli import main as command_line\n"
        "def talk(options):\n"
        "    for _ in range(100_000):\n"
        "        print('a line of output')\n"
        "    return 0\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.set_defaults(handler=talk)\n"
        "command_line.build_parser = lambda: parser\n"
        "sys.exit(command_line.main([]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "a line of output\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=500) == 1
