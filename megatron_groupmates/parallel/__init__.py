"""Which device, which rank, which group; and megatron-core on machines without CUDA."""

from megatron_groupmates.parallel.device import compute_device, resolve_precision
from megatron_groupmates.parallel.groups import ParallelGroups, initialize_parallel
from megatron_groupmates.parallel.launch import LaunchEnvironment, read_launch_environment

__all__ = [
    "LaunchEnvironment",
    "ParallelGroups",
    "compute_device",
    "initialize_parallel",
    "read_launch_environment",
    "resolve_precision",
]
