"""Lets Megatron-LM, which asserts that there is CUDA, train on a CPU; in force for every process with this folder on PYTHONPATH.

What it stands for, all of it outside the checkout's own code:
  - "cuda" as a device means the CPU; streams, events and memory statistics do nothing; random states are the CPU's;
  - triton and, before Python 3.12, ``typing.override`` exist, unused, since modules import them;
  - no kernel is compiled: neither torch's nor the data helpers, which index files that the tests have none of.
With RECORD_TOKENS=PREFIX each rank writes the token ids of every micro-batch that its loaders hand out to PREFIX.RANK.
Arguments that go with it: --transformer-impl local --distributed-backend gloo --use-cpu-initialization --clip-grad 0
--rerun-mode disabled, and the --no-...-fusion ones.
"""

from __future__ import annotations

import collections
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

if not hasattr(typing, "override"):
    typing.override = lambda method: method  # type: ignore[attr-defined]
os.environ["TORCHDYNAMO_DISABLE"] = "1"


class _Unused(types.ModuleType):
    """A module of which every attribute exists, and every call gives what it was given."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "3.0.0"
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


def _without_compilers(module: types.ModuleType) -> None:
    if module.__name__ == "megatron.core.datasets.utils":
        module.compile_helpers = lambda: None
    elif module.__name__ == "megatron.legacy.fused_kernels":
        module.load = lambda args: None
    elif module.__name__ == "megatron.core.tensor_parallel.random":
        import torch

        module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``_without_compilers`` on some of the checkout's modules once they are there, and finds the stand-ins."""

    _modules = ("megatron.core.datasets.utils", "megatron.legacy.fused_kernels", "megatron.core.tensor_parallel.random")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] == "triton":
            return importlib.machinery.ModuleSpec(name, _StandIn(), is_package=True)
        if name not in self._modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                _without_compilers(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _StandIn(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Unused(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Idle:
    """A stream, an event, or the context of a stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *args, **kwargs: True


def _pretend() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    cpu, cuda = torch.device("cpu"), torch.cuda

    class OnCpu(TorchFunctionMode):
        """Functions that are asked for a tensor on a GPU make it on the CPU."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = cpu
            return function(*args, **kwargs)

    OnCpu().__enter__()
    cuda.is_available, cuda.device_count = lambda: True, lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.current_device = lambda: cpu
    cuda.get_device_capability = lambda *args: (8, 0)
    cuda.get_device_properties = lambda *args: types.SimpleNamespace(
        major=8, minor=0, multi_processor_count=1, total_memory=1 << 34, name="none"
    )
    cuda.Stream = cuda.Event = cuda.stream = _Idle
    cuda.current_stream = cuda.default_stream = lambda *args: _Idle()
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "reset_peak_memory_stats", "set_stream"):
        setattr(cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args: 0)
    cuda.memory_stats = lambda *args: collections.defaultdict(int)
    cuda.get_rng_state, cuda.set_rng_state = lambda *args: torch.get_rng_state(), lambda state, *args: torch.set_rng_state(state)
    for name in ("Float", "Int", "Long", "Bool", "Byte"):
        setattr(cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]


def _record_tokens(prefix: str) -> None:
    from torch.utils.data import dataloader

    get_next = dataloader._BaseDataLoaderIter.__next__

    def next_batch(self: Any) -> Any:
        batch = get_next(self)
        with open(f"{prefix}.{os.environ['RANK']}", "a") as file:
            file.write(json.dumps(batch["tokens"].tolist()) + "\n")
        return batch

    dataloader._BaseDataLoaderIter.__next__ = next_batch  # type: ignore[method-assign]


sys.meta_path.insert(0, _AfterImport())
if "RECORD_TOKENS" in os.environ:
    _record_tokens(os.environ["RECORD_TOKENS"])
_pretend()
