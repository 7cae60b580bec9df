"""The README's commands: those that are cheap run here; the rest run in CI on a shortened quickstart (check_quickstart.py)."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_groupmates.cli.main import build_parser, main
from tests.check_quickstart import readme_commands

ROOT = Path(__file__).parents[1]


def test_the_two_commands_stand_first():
    commands = readme_commands()
    assert commands[:2] == ["bash examples/quickstart/run.sh", "bash tests/run.sh"]
    assert any("plan" in command for command in commands) and any("trace" in command for command in commands)


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_exists_and_takes_its_arguments(command: str, capsys: pytest.CaptureFixture[str]):
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "megatron_groupmates"]:
        build_parser().parse_args(words[3:])
        if words[3] == "plan":
            assert main(words[3:]) == 0
            assert "parameters        411," in capsys.readouterr().out
    else:
        assert words[0] == "bash"
        subprocess.run(["bash", "-n", str(ROOT / words[1])], check=True)


def test_paths_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in (
        "examples/dclm/400m_4x.yaml",
        "examples/dclm/run.sh",
        "tools/preprocess_dclm.py",
        "tools/index_pool.py",
        "tools/check_patch.py",
        "patches/megatron-deepspeed/group-mates.patch",
        "patches/megatron-lm/group-mates.patch",
        "examples/own_fork/selection.yaml",
        "examples/multi_host/deepspeed.sh",
        "examples/multi_host/slurm.sbatch",
        "examples/multi_host/torchrun.sh",
        "tests/integration/run_megatron_deepspeed.py",
        "tools/bench/RESULTS.md",
        "megatron_groupmates/config/sections.py",
    ):
        assert name in text and (ROOT / name).exists(), name


def test_the_check_of_a_quickstart_fails_on_a_run_that_is_not_one(tmp_path: Path):
    result = subprocess.run([sys.executable, str(ROOT / "tests/check_quickstart.py"), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode != 0 and "config.yaml is missing" in result.stderr
