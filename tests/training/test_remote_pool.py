"""The trainer on pools in a real S3 server on loopback: the same run as from disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_groupmates.cli.main import main
from megatron_groupmates.utils.run_directory import write_run_config
from megatron_groupmates.utils.storage import upload
from tests.common.distributed import run_ranks
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.training.runs import Job, evaluations, losses, make_config, train_jobs

ROOT = Path(__file__).parents[2]
TRACE = ("--start", "0", "--stop", "12")


@pytest.mark.slow
def test_training_from_a_store_equals_training_from_disk(
    tmp_path: Path,
    s3_options: dict[str, Any],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``train``, ``plan`` and ``trace`` as users start them, with loader processes, held-out pools in the store too."""
    short = ("training.train_iters=4", "training.eval_interval=2")
    local = make_config(tmp_path, *short, run="local")
    pools = []
    for name in ("pool", "evaluation", "reference"):
        for path in sorted((tmp_path / name).iterdir()):
            upload(path, f"s3://{BUCKET}/{name}/{path.name}")
        pools.append(f"data.{name}=s3://{BUCKET}/{name}")
    storage = (f"data.storage_options={json.dumps(s3_options)}", f"data.cache_directory={tmp_path / 'cache'}")
    remote = make_config(tmp_path, *short, *pools, *storage, "data.num_workers=2", "data.prefetch_factor=2", run="remote")
    run_ranks(train_jobs, 1, [Job(config=local)], tmp_path=tmp_path)

    command = [sys.executable, "-m", "megatron_groupmates", "train", "--config", str(tmp_path / "remote.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(remote)) == 4
    assert losses(remote) == losses(local)
    assert evaluations(remote) == evaluations(local)
    assert list((tmp_path / "cache/shards").glob("*/*"))

    write_run_config(local)
    capsys.readouterr()
    assert main(["trace", local.run.output_dir, *TRACE]) == 0
    expected = capsys.readouterr().out
    assert main(["trace", remote.run.output_dir, *TRACE]) == 0
    assert capsys.readouterr().out == expected and len(expected.splitlines()) == 12
    assert main(["plan", "--config", str(tmp_path / "remote.yaml")]) == 0
    assert "150 samples" in capsys.readouterr().out
