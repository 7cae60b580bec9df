"""The Slurm script, run by a real Slurm on several hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_groupmates.config import Config
from megatron_groupmates.pool.log import read_log
from tests.integration.hosts import Hosts
from tests.integration.slurm import start_slurm, why_not
from tests.integration.test_several_hosts import ENVIRONMENT, SETTINGS, Started
from tests.training.runs import losses, make_config

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def slurm_settings(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return start_slurm(hosts, tmp_path_factory.mktemp("slurm"))


@pytest.mark.parametrize(
    ("mode", "nodes", "arguments"),
    [("async", 3, ("--server-nodes", "1")), ("inline", 2, ("--no-torchrun", "--set", "server.tensor_model_parallel_size=2"))],
)
def test_trainer_and_server_in_one_job(
    hosts: Hosts, slurm_settings: dict[str, str], tmp_path: Path, mode: str, nodes: int, arguments: tuple[str, ...]
) -> None:
    config: Config = make_config(
        tmp_path, *SETTINGS, f"selection.mode={mode}", f"selection.max_staleness_steps={10 if mode == 'async' else 'null'}"
    )
    log = tmp_path / "job.log"
    command = [
        *("sbatch", "--wait", "--nodes", str(nodes), "--output", str(log)),
        *("examples/multi_host/slurm.sbatch", str(tmp_path / "run.yaml"), "--ranks-per-node", "2", *arguments),
    ]
    job = Started(hosts, "node1", tmp_path / "sbatch.log", *command, environment={**ENVIRONMENT, **slurm_settings})
    assert job.end(480) == 0, job.output() + log.read_text()
    assert {entry.generation for entry in read_log(Path(config.run.output_dir) / "selection/log.jsonl")} == {0, 1}
    assert len(losses(config)) == 30
