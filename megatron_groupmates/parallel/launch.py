"""Ranks as the launcher states them: deepspeed, torchrun, srun, or a single process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_groupmates.config import UserError

# In this order: deepspeed and torchrun export the first set, srun only the second.
_SOURCES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
)


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
        UserError: when a launcher set only some of its variables.
    """
    for rank_name, local_name, world_name, local_world_name in _SOURCES:
        if rank_name not in environment:
            continue
        if world_name not in environment:
            raise UserError(f"{rank_name} is set but {world_name} is not: start with deepspeed, torchrun or srun, which set both")
        rank, world_size = int(environment[rank_name]), int(environment[world_name])
        fallback = rank if local_rank is None else local_rank
        local_world = environment.get(local_world_name) or environment.get("LOCAL_SIZE") or str(world_size)
        address = environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"
        return LaunchEnvironment(
            rank=rank,
            local_rank=int(environment.get(local_name, fallback)),
            world_size=world_size,
            local_world_size=int(local_world.split("(")[0]),
            master_addr=address,
            master_port=int(environment.get("MASTER_PORT", 29500)),
        )
    return LaunchEnvironment(
        rank=0,
        local_rank=local_rank or 0,
        world_size=1,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=int(environment.get("MASTER_PORT", 0)),
    )
