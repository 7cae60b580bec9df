"""Measure what reading a ZeRO checkpoint costs each rank of a server: host memory above its own slice, and time.

Writes a checkpoint of DeepSpeed's files (ZeRO-1, bf16, tensor-parallel 2, data-parallel 2, random numbers) for a GPT of about
`--parameters` weights, then starts a fresh process for each rank of servers of the given tensor-parallel sizes, one after
the other. Each reads its slice of all weights and both Adam moments into float32 buffers, as the probe does, and compares all
of it with the numbers written. `--obvious` adds the obvious way: torch.load of all files, whole tensors put together, slices
cut; it holds everything, so keep it to small sizes.

Memory is anonymous memory (RssAnon), of the whole process with Python and torch, sampled every millisecond: what has to be
there. Pages of the mapped files (RssFile) are not counted, though the maximum resident set would count them: they are
copies of what is on disk, and the kernel takes them back as soon as anybody needs the room. The files are dropped from the page cache
before each reading, so that times are those of the disk. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, config_from_dict, ffn_hidden_size
from megatron_groupmates.model.sizes import model_size
from tools.bench.synthetic_zero import KINDS, Shapes, gpt_shapes, value, write_checkpoint

SAVED_TENSOR_SIZE, SAVED_DATA_SIZE = 2, 2
MB = 1e6


@dataclass(frozen=True)
class Reading:
    """What one rank's reading took.

    Attributes:
        slice_bytes: of the buffers filled.
        before_bytes: anonymous memory of the process with its libraries loaded, before it began.
        peak_bytes: the most there was while it read.
        seconds: from opening the checkpoint to the last value.
    """

    slice_bytes: int
    before_bytes: int
    peak_bytes: int
    seconds: float


class AnonymousMemory:
    """Samples this process's anonymous memory in a thread; ``peak`` is the largest sample in bytes."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def make_config(parameters: float) -> Config:
    """DCLM's shape at the width whose model comes nearest to ``parameters``; the depth grows with the width."""
    configs = [
        config_from_dict(
            {
                "run": {"output_dir": "none", "wandb_mode": "disabled"},
                "model": {"num_layers": width // 128, "hidden_size": width, "num_attention_heads": width // 64},
                "data": {"pool": "none"},
                "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
            }
        )
        for width in range(128, 4096, 128)
    ]
    return min(configs, key=lambda config: abs(model_size(config).parameters - parameters))


def forget_files(tag: Path) -> None:
    """Drop the checkpoint's files from the page cache."""
    for path in tag.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def buffers_of(shapes: Shapes, rank: int, size: int) -> tuple[dict[str, torch.Tensor], dict[tuple[str, str], torch.Tensor]]:
    """A flat float32 buffer for each kind, and the views of it that each (parameter, kind) of the rank's slice fills."""
    local = {
        name: [length // size if index == dim else length for index, length in enumerate(shape)] for name, (shape, dim) in shapes.items()
    }
    lengths = [math.prod(shape) for shape in local.values()]
    buffers = {kind: torch.empty(sum(lengths)) for kind in KINDS}
    views = {
        (name, kind): part.view(shape)
        for kind, buffer in buffers.items()
        for (name, shape), part in zip(local.items(), buffer.split(lengths), strict=True)
    }
    return buffers, views


def read_slices(tag: Path, shapes: Shapes, views: dict[tuple[str, str], torch.Tensor], rank: int, size: int) -> None:
    """The package's way: as ``Probe.load``."""
    checkpoint = ZeroCheckpoint(tag)
    for name in shapes:
        for kind in KINDS:
            checkpoint.read_slice_into(name, kind, views[name, kind], rank, size)


def read_everything(tag: Path, shapes: Shapes, views: dict[tuple[str, str], torch.Tensor], rank: int, size: int) -> None:
    """The obvious way: load all files, put whole tensors together, cut."""
    model = [torch.load(path, weights_only=False) for path in sorted(tag.glob("*model_states.pt"))]
    optimizer = [
        [
            torch.load(path, weights_only=False)["optimizer_state_dict"]
            for path in sorted(tag.glob(f"*mp_rank_{number:02d}_optim_states.pt"))
        ]
        for number in range(len(model))
    ]
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for kind in KINDS:
        held = [dict(_unflattened(state, parts, kind)) for state, parts in zip(model, optimizer, strict=True)]
        for name, (_, dim) in shapes.items():
            parts = [tensors[name] for tensors in held]
            if name.endswith("linear_fc1.weight"):
                parts = [half for index in range(2) for half in (part.chunk(2)[index] for part in parts)]
            whole[name, kind] = parts[0] if dim is None else torch.cat(parts, dim)
    for (name, kind), out in views.items():
        dim, tensor = shapes[name][1], whole[name, kind]
        if name.endswith("linear_fc1.weight"):
            out.copy_(torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)]))
        else:
            out.copy_(tensor if dim is None else tensor.chunk(size, dim)[rank])


def _unflattened(model: dict[str, Any], parts: list[dict[str, Any]], kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor-parallel rank's tensors by name, from the partitions of its data-parallel ranks."""
    for group, shapes in enumerate(model["param_shapes"]):
        if kind == "param":
            flat = torch.cat([part["single_partition_of_fp32_groups"][group] for part in parts])
        else:
            flat = torch.cat([part["base_optimizer_state"]["state"][group][kind] for part in parts])
        offset = 0
        for name, shape in shapes.items():
            yield name, flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()


WAYS = {"slices": read_slices, "obvious": read_everything}


def measure(way: str, tag: Path, shapes: Shapes, rank: int, size: int) -> Reading:
    """Read one rank's slice in this process, which is to be a fresh one, and check every value.

    Raises:
        AssertionError: a value differs from the one written.
    """
    torch.set_num_threads(1)
    if way == "obvious":
        # The pickles name its classes; its import is not part of the reading.
        import_deepspeed()
    forget_files(tag)
    with AnonymousMemory() as memory:
        start = time.perf_counter()
        buffers, views = buffers_of(shapes, rank, size)
        WAYS[way](tag, shapes, views, rank, size)
        seconds = time.perf_counter() - start
    for (name, kind), found in views.items():
        assert torch.equal(found, value(shapes, name, kind, rank, size)), f"{kind} of {name} is not what was written"
    return Reading(sum(buffer.nbytes for buffer in buffers.values()), memory.before, memory.peak, seconds)


def measure_apart(way: str, tag: Path, shapes: Shapes, rank: int, size: int) -> Reading:
    """:func:`measure` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, way, tag, shapes, rank, size).result()


def import_deepspeed() -> None:
    """Import it with what it prints on that occasion left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed  # noqa: F401


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parameters", type=float, default=1e8, help="about how many weights; the files take 14 bytes for each (%(default)g)"
    )
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2], help="sizes of the servers that read (%(default)s)")
    parser.add_argument("--obvious", action="store_true", help="read with torch.load of everything too")
    parser.add_argument(
        "--directory", type=Path, help="where the checkpoint is written for the time being (the system's temporary directory)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = make_config(arguments.parameters)
    shapes = gpt_shapes(config.model, ffn_hidden_size(config))
    import_deepspeed()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        tag = write_checkpoint(directory, shapes, SAVED_TENSOR_SIZE, SAVED_DATA_SIZE, {"gated_linear_unit": True})
        files = sum(path.stat().st_size for path in tag.iterdir())
        print(f"{model_size(config).parameters / MB:,.0f} M parameters, {files / MB:,.0f} MB of files")
        columns = ["way", "TP", "rank", "slice, MB", "peak, MB", "above the slice, MB", "of it before, MB", "s", "GB/s"]
        print("|", " | ".join(columns), "|")
        print("|---" * len(columns) + "|")
        for size in arguments.tensor_parallel:
            for way in WAYS if arguments.obvious else ["slices"]:
                for rank in range(size):
                    found = measure_apart(way, tag, shapes, rank, size)
                    amounts = found.slice_bytes, found.peak_bytes, found.peak_bytes - found.slice_bytes, found.before_bytes
                    cells = [way, size, rank, *(f"{amount / MB:,.0f}" for amount in amounts)]
                    rate = found.slice_bytes / found.seconds / 1e9
                    print("|", " | ".join(map(str, [*cells, f"{found.seconds:.1f}", f"{rate:.2f}"])), "|", flush=True)


if __name__ == "__main__":
    main()
