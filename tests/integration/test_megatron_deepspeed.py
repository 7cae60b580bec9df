"""Trains a real checkout of Megatron-DeepSpeed; needs its environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_megatron_deepspeed.py")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["off", "entry", "patch"])
def test_in_a_real_checkout(tmp_path: Path, megatron_deepspeed: Path, megatron_deepspeed_python: Path, way: str) -> None:
    given = ["--checkout", megatron_deepspeed, "--python", megatron_deepspeed_python, "--output", tmp_path / "run", "--ways", way]
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, given)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all checks hold" in done.stdout
