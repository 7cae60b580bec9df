"""The compute device of this process, and what megatron-core and DeepSpeed need where there is no CUDA."""

from __future__ import annotations

import os

import torch


def compute_device(local_rank: int = 0) -> torch.device:
    """This rank's GPU where CUDA is present, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def resolve_precision(precision: str) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU; ``fp32`` and ``bf16`` are what they say."""
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def has_fast_bfloat16() -> bool:
    """True on CPUs that multiply bfloat16 in hardware, twice as many numbers at a time as float32."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())


def prepare_cpu_backend() -> None:
    """Let megatron-core and DeepSpeed run on a host without CUDA; does nothing where CUDA is present.

    megatron-core asks ``torch.cuda.current_device()`` for the device of its buffers, and DeepSpeed chooses its
    accelerator at import. Must run before either is imported.
    """
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


def share_cpu_cores(local_world_size: int) -> None:
    """Give each rank of this host its share of the CPU cores; with more threads the ranks fight for them."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // max(1, local_world_size)))


def skip_inference_operators() -> None:
    """Keep DeepSpeed from compiling an operator of its inference engine when it starts on a CPU.

    Training does not use it, and the host may have no compiler. Call before ``deepspeed.initialize``.
    """
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
