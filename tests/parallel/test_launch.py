"""Ranks as each launcher states them."""

from __future__ import annotations

import re

import pytest

from megatron_groupmates.config import UserError
from megatron_groupmates.parallel.launch import LaunchEnvironment, first_host, read_launch_environment, tasks_per_node


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


SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_NTASKS": "7",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def test_srun_where_no_other_launcher_spoke() -> None:
    assert read_launch_environment(SLURM) == LaunchEnvironment(
        rank=6, local_rank=0, world_size=7, local_world_size=1, master_addr="10.0.0.7", master_port=29500
    )
    assert read_launch_environment({**SLURM, "MASTER_ADDR": "first", "MASTER_PORT": "1234"}).master_addr == "first"
    both = {**SLURM, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert (read_launch_environment(both).rank, read_launch_environment(both).world_size) == (0, 2)


def test_a_step_of_srun_may_be_smaller_than_its_job() -> None:
    """As a batch job of 3 nodes with --ntasks-per-node=2 sets them in a step of three tasks on the last two."""
    step = {
        "SLURM_JOB_ID": "3",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_NTASKS": "6",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_TASKS_PER_NODE": "2(x3)",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
        "SLURM_STEP_NODELIST": "n[2-3]",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    found = read_launch_environment(step)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (2, 0, 3, 1)
    assert found.master_addr == "n2", "rank 0 of a step is on its first node, wherever srun runs"
    other = read_launch_environment({**step, "SLURM_STEP_ID": "2"})
    assert 15000 <= found.master_port < 30000 and found.master_port != other.master_port, "steps of one job meet apart"
    assert read_launch_environment({**step, "MASTER_PORT": "1234"}).master_port == 1234


def test_the_shell_of_a_batch_script_is_no_step() -> None:
    batch = {"SLURM_JOB_ID": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}
    assert read_launch_environment(batch).world_size == 1


def test_only_the_number_per_node_that_srun_was_given() -> None:
    environment = {"SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
    assert read_launch_environment(environment).local_world_size == 4


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2),1", [1, 2, 2, 1]), ("8(x128)", [8] * 128), ("2, 1", [2, 1])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "two", "2(3)", "2(x)", "2,,1"])
def test_tasks_per_node_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"look like 2(x3),1, got {text!r}")):
        tasks_per_node(text)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("node[01-03,7],login", "node01"),
        ("node[7,01-03]", "node7"),
        ("gpu-1-node[12-15]", "gpu-1-node12"),
        ("rack[2-3]n[0-1],x", "rack2n0"),
        ("node[08].cluster.org", "node08.cluster.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_list_of_hosts_that_is_cut_off_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("got 'node[01-0'; set MASTER_ADDR")):
        first_host("node[01-0")


@pytest.mark.parametrize(("given", "expected"), [(None, 3), (1, 1), (0, 0)])
def test_local_rank_comes_from_the_argument_where_the_environment_is_silent(given: int | None, expected: int) -> None:
    assert read_launch_environment({"RANK": "3", "WORLD_SIZE": "4"}, given).local_rank == expected


@pytest.mark.parametrize(("rank", "world"), [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_half_a_launcher_is_refused(rank: str, world: str) -> None:
    message = f"{rank} is set but {world} is not: start with deepspeed, torchrun or srun, which set both"
    with pytest.raises(UserError, match=re.escape(message)):
        read_launch_environment({rank: "0"})
