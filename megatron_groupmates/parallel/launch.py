"""Ranks as the launcher states them: deepspeed, torchrun, srun, or a single process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_groupmates.config import UserError

_DEFAULT_PORT = 29500
# Ports that steps of srun share out among themselves: below those that Linux hands out by itself.
_SLURM_PORTS = range(15000, 30000)
_STEPS_PER_JOB = 16


@dataclass(frozen=True)
class LaunchEnvironment:
    """Where this process stands among those of its job."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int


def read_launch_environment(environment: Mapping[str, str], local_rank: int | None = None) -> LaunchEnvironment:
    """Read the ranks from ``environment``; a process started by no launcher is a world of one.

    Args:
        environment: usually ``os.environ``.
        local_rank: ``--local_rank`` as given by the deepspeed launcher, used where LOCAL_RANK is absent.

    Raises:
        UserError: when a launcher set only some of its variables, or srun one that cannot be read.
    """
    if "RANK" in environment:
        return _started_by_torchrun_or_deepspeed(environment, local_rank)
    # The shell of a batch script has a SLURM_PROCID as well, but it is no step of srun: what it starts stands alone.
    in_batch_shell = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    if "SLURM_PROCID" in environment and not in_batch_shell:
        return _started_by_srun(environment, local_rank)
    return LaunchEnvironment(
        rank=0,
        local_rank=local_rank or 0,
        world_size=1,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=int(environment.get("MASTER_PORT", 0)),
    )


def _started_by_torchrun_or_deepspeed(environment: Mapping[str, str], local_rank: int | None) -> LaunchEnvironment:
    world_size = _required(environment, "RANK", "WORLD_SIZE")
    rank = int(environment["RANK"])
    return LaunchEnvironment(
        rank=rank,
        local_rank=int(environment.get("LOCAL_RANK", rank if local_rank is None else local_rank)),
        world_size=world_size,
        local_world_size=int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size),
        master_addr=environment.get("MASTER_ADDR") or "127.0.0.1",
        master_port=int(environment.get("MASTER_PORT", _DEFAULT_PORT)),
    )


def _started_by_srun(environment: Mapping[str, str], local_rank: int | None) -> LaunchEnvironment:
    # What holds for the step wins over what holds for the whole job: a job may run trainer and server side by side.
    world_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world_size = _required(environment, "SLURM_PROCID", world_name)
    rank = int(environment["SLURM_PROCID"])
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if per_node:
        counts = tasks_per_node(per_node)
        local_world_size = counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]
    else:
        local_world_size = int(environment.get("SLURM_NTASKS_PER_NODE") or world_size)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    launched_from = environment.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"
    return LaunchEnvironment(
        rank=rank,
        local_rank=int(environment.get("SLURM_LOCALID", rank if local_rank is None else local_rank)),
        world_size=world_size,
        local_world_size=local_world_size,
        # Rank 0 is on the first host of the step; srun itself may run elsewhere, on a login node for instance.
        master_addr=environment.get("MASTER_ADDR") or (first_host(nodes) if nodes else launched_from),
        master_port=int(environment.get("MASTER_PORT") or _port_of_step(environment)),
    )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of the number of tasks on each node, written out: ``2(x3),1`` is ``[2, 2, 2, 1]``.

    Raises:
        UserError: ``text`` has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"tasks per node as Slurm states them look like 2(x3),1, got {text!r}; set RANK, WORLD_SIZE, ... instead")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first host of Slurm's short form of a list of hosts: ``node[01-03,7],login`` begins with ``node01``.

    Raises:
        UserError: a bracket is not closed.
    """
    if nodes.count("[") != nodes.count("]"):
        raise UserError(f"hosts as Slurm states them look like node[01-03,7], got {nodes!r}; set MASTER_ADDR to the first one")
    # Of each bracket the first number, then what stands before the first comma outside of brackets.
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).split(",")[0]


def _port_of_step(environment: Mapping[str, str]) -> int:
    """A port that another step on the same host will hardly have: a job's trainer and server must not share one."""
    if not environment.get("SLURM_JOB_ID", "").isdecimal():
        return _DEFAULT_PORT
    step = environment.get("SLURM_STEP_ID", "")
    number = int(environment["SLURM_JOB_ID"]) * _STEPS_PER_JOB + (int(step) if step.isdecimal() else 0)
    return _SLURM_PORTS[number % len(_SLURM_PORTS)]


def _required(environment: Mapping[str, str], rank_name: str, world_name: str) -> int:
    if world_name not in environment:
        raise UserError(f"{rank_name} is set but {world_name} is not: start with deepspeed, torchrun or srun, which set both")
    return int(environment[world_name])
