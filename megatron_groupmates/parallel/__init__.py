"""Which device, which rank, which group; and megatron-core on machines without CUDA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_groupmates.parallel.device import compute_device, resolve_precision
    from megatron_groupmates.parallel.groups import ParallelGroups, initialize_parallel
    from megatron_groupmates.parallel.job import Job
    from megatron_groupmates.parallel.launch import LaunchEnvironment, read_launch_environment

__all__ = [
    "Job",
    "LaunchEnvironment",
    "ParallelGroups",
    "compute_device",
    "initialize_parallel",
    "read_launch_environment",
    "resolve_precision",
]
_MODULES = {
    "Job": "job",
    "LaunchEnvironment": "launch",
    "ParallelGroups": "groups",
    "compute_device": "device",
    "initialize_parallel": "groups",
    "read_launch_environment": "launch",
    "resolve_precision": "device",
}


def __getattr__(name: str) -> Any:
    """Modules are imported when something of theirs is asked for: who only needs the ranks need not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
