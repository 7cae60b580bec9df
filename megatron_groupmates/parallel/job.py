"""The ranks of a job, whatever runs in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Job:
    """This rank among all of its job; needs torch.distributed to be initialised and nothing else.

    Attributes:
        rank: global rank.
        world_size: all ranks.
        device: where this rank computes.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @classmethod
    def running(cls) -> Job:
        """The job whose default process group a trainer of the user's own has set up."""
        on_gpu = "nccl" in dist.get_backend()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        """True on the one rank that reports and writes shared files."""
        return self.rank == 0

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank. Collective: every rank must call."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def barrier(self) -> None:
        """Wait for all. Collective: every rank must call."""
        if self.device.type == "cuda":
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()
