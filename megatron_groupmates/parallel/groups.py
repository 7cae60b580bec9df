"""One object that answers "which rank, which group"; nobody else does arithmetic on ranks."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_groupmates.config import UserError
from megatron_groupmates.parallel.device import compute_device, prepare_cpu_backend, share_cpu_cores
from megatron_groupmates.parallel.job import Job
from megatron_groupmates.parallel.launch import LaunchEnvironment


class ParallelGroups(Job):
    """Tensor-parallel and data-parallel groups of this rank.

    A server calls the data-parallel dimension its oracle workers. It is also what DeepSpeed calls an ``mpu``:
    it asks for *model*-parallel groups, which here are the tensor-parallel ones.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        from megatron.core import parallel_state

        super().__init__(rank, world_size, device)
        self._state = parallel_state

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Ranks that share each layer."""
        return self._state.get_tensor_model_parallel_group()

    @property
    def tensor_rank(self) -> int:
        """Position in :attr:`tensor_group`."""
        return self._state.get_tensor_model_parallel_rank()

    @property
    def tensor_size(self) -> int:
        """Size of :attr:`tensor_group`."""
        return self._state.get_tensor_model_parallel_world_size()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same slice of the model."""
        return self._state.get_data_parallel_group()

    @property
    def data_rank(self) -> int:
        """Position in :attr:`data_group`; the number of this oracle worker on a server."""
        return self._state.get_data_parallel_rank()

    @property
    def data_size(self) -> int:
        """Size of :attr:`data_group`; the number of oracle workers on a server."""
        return self._state.get_data_parallel_world_size()

    def add_to_counter(self, name: str, amount: int) -> int:
        """Add to a number that all ranks share, 0 at first, and return it. Not collective; atomic."""
        return dist.distributed_c10d._get_default_store().add(name, amount)

    def take_number(self, name: str) -> int:
        """The next of the numbers 0, 1, ...: each goes to one tensor-parallel group. Its ranks call together; groups need not.

        Args:
            name: of the sequence; another for each use.
        """
        number = torch.zeros((), dtype=torch.int64, device=self.device)
        if self.tensor_rank == 0:
            number.fill_(self.add_to_counter(name, 1) - 1)
        if self.tensor_size > 1:
            dist.broadcast(number, src=self.get_tensor_model_parallel_src_rank(), group=self.tensor_group)
        return int(number)

    # What DeepSpeed asks of an mpu.
    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group."""
        return self.tensor_group

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self.tensor_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first rank of the tensor-parallel group."""
        return self._state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_rank(self) -> int:
        """Always 0: there is no pipeline parallelism."""
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Always 1: there is no pipeline parallelism."""
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The data-parallel group."""
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return self.data_size


def initialize_parallel(
    environment: LaunchEnvironment,
    tensor_model_parallel_size: int,
    seed: int,
    timeout_seconds: float = 1800.0,
    init_method: str | None = None,
    store: dist.Store | None = None,
) -> ParallelGroups:
    """Start torch.distributed and megatron-core's parallel state. Collective: every rank of the job must call.

    Args:
        environment: ranks of this process.
        tensor_model_parallel_size: consecutive ranks that share each layer.
        seed: seed of megatron-core's random number trackers, the same on every rank.
        timeout_seconds: how long a collective may wait before the job fails.
        init_method: rendezvous; the master address and port of ``environment`` when None.
        store: what the ranks share already; then there is no rendezvous.

    Raises:
        UserError: when the world is not a multiple of ``tensor_model_parallel_size``.
    """
    if environment.world_size % tensor_model_parallel_size:
        raise UserError(
            f"tensor_model_parallel_size {tensor_model_parallel_size} does not divide the {environment.world_size} started "
            f"ranks; start a multiple of {tensor_model_parallel_size} (deepspeed --num_gpus, --num_accelerators on CPU)"
        )
    prepare_cpu_backend()
    device = compute_device(environment.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        share_cpu_cores(environment.local_world_size)
    # DeepSpeed and megatron-core read these themselves, and srun does not set them.
    os.environ.update(
        RANK=str(environment.rank),
        LOCAL_RANK=str(environment.local_rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_WORLD_SIZE=str(environment.local_world_size),
        MASTER_ADDR=environment.master_addr,
    )
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_seconds)
        meeting: dict[str, Any] = {"init_method": init_method or f"tcp://{environment.master_addr}:{environment.master_port}"}
        if store is not None:
            store.set_timeout(timeout)
            meeting = {"store": store}
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=environment.rank, world_size=environment.world_size, timeout=timeout, **meeting)
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size)
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    else:
        # Sequence parallelism asks the tracker for its random numbers; this kind of tracker keeps none and needs no GPU.
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    return ParallelGroups(environment.rank, environment.world_size, device)


def shut_down() -> None:
    """Leave the process groups; every rank calls at the end of a job, so that no rank reports a lost peer."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
