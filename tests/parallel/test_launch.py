"""Ranks as each launcher states them."""

from __future__ import annotations

import re

import pytest

from megatron_groupmates.config import UserError
from megatron_groupmates.parallel.launch import LaunchEnvironment, read_launch_environment


def test_no_launcher_is_a_world_of_one() -> None:
    alone = LaunchEnvironment(rank=0, local_rank=0, world_size=1, local_world_size=1, master_addr="127.0.0.1", master_port=0)
    assert read_launch_environment({}) == alone
    assert read_launch_environment({"PATH": "/bin", "LOCAL_RANK": "3", "SLURM_NTASKS": "8"}) == alone
    assert read_launch_environment({"MASTER_PORT": "29601"}, local_rank=2).master_port == 29601


def test_torchrun_and_deepspeed() -> None:
    environment = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "29777",
    }
    assert read_launch_environment(environment) == LaunchEnvironment(
        rank=5, local_rank=1, world_size=8, local_world_size=4, master_addr="host", master_port=29777
    )
    assert read_launch_environment(environment, local_rank=3).local_rank == 1, "the environment wins"


def test_deepspeed_tells_its_local_size_by_another_name() -> None:
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert read_launch_environment({**environment, "CROSS_SIZE": "4", "LOCAL_SIZE": "2"}).local_world_size == 2
    assert read_launch_environment(environment).local_world_size == 8, "one host unless told"


def test_srun_where_no_other_launcher_spoke() -> None:
    slurm = {
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4(x2)",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    }
    assert read_launch_environment(slurm) == LaunchEnvironment(
        rank=6, local_rank=2, world_size=8, local_world_size=4, master_addr="10.0.0.7", master_port=29500
    )
    assert read_launch_environment({**slurm, "MASTER_ADDR": "first", "MASTER_PORT": "1234"}).master_addr == "first"
    both = {**slurm, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert (read_launch_environment(both).rank, read_launch_environment(both).world_size) == (0, 2)


@pytest.mark.parametrize(("given", "expected"), [(None, 3), (1, 1), (0, 0)])
def test_local_rank_comes_from_the_argument_where_the_environment_is_silent(given: int | None, expected: int) -> None:
    assert read_launch_environment({"RANK": "3", "WORLD_SIZE": "4"}, given).local_rank == expected


@pytest.mark.parametrize(("rank", "world"), [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_half_a_launcher_is_refused(rank: str, world: str) -> None:
    message = f"{rank} is set but {world} is not: start with deepspeed, torchrun or srun, which set both"
    with pytest.raises(UserError, match=re.escape(message)):
        read_launch_environment({rank: "0"})
