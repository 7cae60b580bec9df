"""Measure pools, generations and the sample order at scale, on a synthetic pool.

The pool has an index of full size; its shards are sparse files of the right size, so that opening it checks all that a
real pool's opening checks, and training on it reads zeros. Each stage runs in a fresh process, several times, and says
the median time and the largest peak of resident memory. The last part is a real training loop: the time of the steps
that adopt a generation, against a usual step, when it is prepared in the background and when the step itself does it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_groupmates.pool.generation import generation_path, load_generation, publish, write_generation
from megatron_groupmates.pool.index import TOKENIZER_FILE, PoolFacts, PoolIndex, ShardRecord, write_index
from megatron_groupmates.pool.log import LogEntry
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.utils.files import sha256_bytes

SEQUENCE_LENGTH = 32
_BLOCK_BYTES = 512
_MEMBER_BYTES = 2 * (SEQUENCE_LENGTH + 1)
_VOCAB_SIZE = 512


def make_pool(directory: Path, num_samples: int, num_shards: int) -> PoolIndex:
    """The synthetic pool, as large as asked for; made on the first call."""
    if not (directory / "pool.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_FILE).write_bytes(b"{}")
        edges = np.linspace(0, num_samples, num_shards + 1).astype(np.int64)
        shards = [_make_shard(directory, number, int(rows)) for number, rows in enumerate(np.diff(edges))]
        facts = PoolFacts(
            member_format="raw",
            token_dtype="uint16",
            vocab_size=_VOCAB_SIZE,
            eot_id=0,
            tokenizer={"name": "synthetic", "fingerprint": sha256_bytes(b"{}")},
            kinds=[],
            made_by={},
        )
        write_index(directory, facts, shards, np.full(num_samples, -1, dtype=np.int16))
    return PoolIndex.open(directory)


def _make_shard(directory: Path, number: int, rows: int) -> ShardRecord:
    """A sparse file laid out as a tar of ``rows`` members: a header block, then the data filled up to a whole block."""
    name = f"shard_{number:08d}"
    each = _BLOCK_BYTES * (1 + math.ceil(_MEMBER_BYTES / _BLOCK_BYTES))
    num_bytes = each * rows + 2 * _BLOCK_BYTES
    with open(directory / f"{name}.tar", "wb") as file:
        file.truncate(num_bytes)
    return ShardRecord(
        name=name,
        offsets=np.arange(rows, dtype=np.uint64) * np.uint64(each) + np.uint64(_BLOCK_BYTES),
        member_bytes=np.full(rows, _MEMBER_BYTES, dtype=np.uint32),
        lengths=np.full(rows, SEQUENCE_LENGTH + 1, dtype=np.int32),
        num_bytes=num_bytes,
        sha256=sha256_bytes(name.encode()),
    )


def make_generations(selection: Path, index: PoolIndex) -> None:
    """Generation 0 is the whole pool, generation 1 a random half."""
    for number in (0, 1):
        if not generation_path(selection, number).exists():
            half = np.flatnonzero(np.random.default_rng(number).random(index.num_samples) < 0.5)
            write_generation(selection, number, index, half if number else None, {"checkpoint_step": 0})


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def measure_stages(directory: Path, consumed: int) -> dict[str, float]:
    """Seconds of each stage in this process, and its peak memory."""
    figures: dict[str, float] = {}
    selection = directory / "selection"
    figures["open pool"], index = timed(lambda: PoolIndex.open(directory))
    figures["load generation, verified"], generation = timed(lambda: load_generation(selection, 1, index))
    figures["open pool + generation"] = figures["open pool"] + figures["load generation, verified"]
    first = LogEntry(0, 0, 0, "0")
    masks = {0: load_generation(selection, 0, index).mask}
    figures["first order"], order = timed(lambda: SampleOrder(index.num_samples, 1, [first], masks))
    figures["first batch of 512"], _ = timed(lambda: order.rows(consumed, 512))
    following = LogEntry(1, consumed + 512, 0, "1")
    figures["extend, unprepared"], plain = timed(lambda: order.extended(following, generation.mask))
    figures["prepare to extend"], _ = timed(lambda: order.prepare_to_extend(consumed))
    figures["extend, prepared"], extended = timed(lambda: order.extended(following, generation.mask))
    figures["first batch after extending"], (rows, _) = timed(lambda: extended.rows(consumed + 512, 512))
    assert np.array_equal(rows, plain.rows(consumed + 512, 512)[0]), "preparing changes the order"
    for batch in (1, 8, 512):
        seconds = []
        for number in range(100):
            seconds.append(timed(lambda at=consumed + 1024 + number * batch, size=batch: look_up(index, extended, at, size))[0] / batch)
        figures[f"lookup per sample, batches of {batch}"] = statistics.median(seconds)
    figures["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return figures


def look_up(index: PoolIndex, order: SampleOrder, sample: int, count: int) -> list[tuple[str, int, int]]:
    """(shard, offset, bytes) of global samples: all that a positioned read needs."""
    rows, _ = order.rows(sample, count)
    shards, _ = index.locate(rows)
    places = zip(shards.tolist(), index.offsets[rows].tolist(), index.member_bytes[rows].tolist(), strict=True)
    return [(index.shard_names[shard], offset, size) for shard, offset, size in places]


def measure_loop(directory: Path, consumed: int, steps: int, prepare_in_step: bool) -> dict[str, float]:
    """A real training loop that has consumed ``consumed`` samples; a generation is published after a quarter of its steps."""
    import torch
    import torch.distributed as dist

    from megatron_groupmates.config import parse_config
    from megatron_groupmates.parallel import initialize_parallel
    from megatron_groupmates.parallel.launch import LaunchEnvironment
    from megatron_groupmates.training.loop import Trainer

    class RunningTrainer(Trainer):
        """One that goes on far into the pool, without a checkpoint to load."""

        def _load_checkpoint(self) -> None:
            self.consumed_train_samples = consumed

    with tempfile.TemporaryDirectory() as run:
        selection = Path(run) / "selection"
        selection.mkdir()
        for number in (0, 1):
            generation_path(selection, number).symlink_to(generation_path(directory / "selection", number))
        config = parse_config(_CONFIG.format(run=run, pool=directory, steps=steps), ())
        groups = initialize_parallel(LaunchEnvironment(0, 0, 1, 1, "127.0.0.1", 0), 1, 1, init_method=f"file://{run}/rendezvous")
        torch.set_num_threads(1)  # a host that trains on accelerators has cores to spare for what goes on beside it
        trainer = RunningTrainer(config, groups)
        starts: list[float] = []
        preparing: list[int] = []
        at_step_boundary = trainer.adopter.at_step_boundary

        def boundary(step: int, issued_samples: int) -> None:
            if step == steps // 4:
                publish(selection, 1)
            trainer.adopter._starting |= prepare_in_step
            starts.append(time.perf_counter())
            at_step_boundary(step, issued_samples)
            if trainer.adopter._preparation is not None:
                preparing.append(step)

        trainer.adopter.at_step_boundary = boundary
        trainer.run()
        trainer.close()
        dist.destroy_process_group()
        events = [row for row in map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines()) if "event" in row]
    (event,) = events
    return _step_figures(np.diff(starts), event, preparing)


def _step_figures(seconds: np.ndarray, event: dict[str, Any], preparing: list[int]) -> dict[str, float]:
    """Step times by what else went on; the first steps of a process are left out."""
    adopting = event["step"]
    special = {*preparing, adopting, adopting + 1, *range(5)}
    plain = [seconds[step] for step in range(len(seconds)) if step not in special]
    usual = statistics.median(plain)
    figures = {
        "usual step": usual,
        "standing still to adopt": event["seconds"],
        "background work": event["prepare_seconds"],
        "steps while preparing": len(preparing),
        "adopting step / usual": seconds[adopting] / usual,
        "step after it / usual": seconds[adopting + 1] / usual,
        "steps while preparing, median / usual": float(np.median(seconds[preparing])) / usual if preparing else math.nan,
        "steps while preparing, largest / usual": float(np.max(seconds[preparing])) / usual if preparing else math.nan,
        "usual steps, largest / usual": max(plain) / usual,
    }
    figures["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return figures


_CONFIG = f"""
run: {{{{output_dir: {{run}}, wandb_mode: disabled}}}}
model: {{{{num_layers: 2, hidden_size: 192, num_attention_heads: 4, vocab_size: {_VOCAB_SIZE}, sequence_length: {SEQUENCE_LENGTH}}}}}
data: {{{{pool: {{pool}}, num_workers: 1}}}}
training: {{{{train_iters: {{steps}}, global_batch_size: 32, micro_batch_size: 32, log_interval: 1}}}}
checkpoint: {{{{save_interval: 1000000}}}}
selection: {{{{enabled: true, method: random, first_refresh_step: 1000000}}}}
"""


def in_fresh_process(arguments: argparse.Namespace, part: str) -> dict[str, float]:
    """Figures of one part, measured in a process of its own."""
    command = [sys.executable, __file__, "--directory", str(arguments.directory), "--part", part]
    command += ["--consumed", str(arguments.consumed), "--steps", str(arguments.steps)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{part}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def run_part(arguments: argparse.Namespace) -> dict[str, float]:
    """The part that this process was started for."""
    if arguments.part == "stages":
        return measure_stages(arguments.directory, arguments.consumed)
    return measure_loop(arguments.directory, arguments.consumed, arguments.steps, arguments.part == "in the step")


def print_table(repeats: dict[str, list[dict[str, float]]]) -> None:
    """Medians over repeats, one column per part; of peaks the largest."""
    names = list(repeats)
    print(f"\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row in next(iter(repeats.values()))[0]:
        cells = []
        for results in repeats.values():
            values = [result[row] for result in results]
            value = max(values) if row.startswith("peak") else statistics.median(values)
            cells.append(_format(row, value))
        print(f"| {row} | {' | '.join(cells)} |")


def _format(row: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if row == "steps while preparing":
        return f"{value:.0f}"
    if row.startswith("peak") or "/ usual" in row:
        return f"{value:.2f}"
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=int, default=30_000_000, help="samples of the pool")
    parser.add_argument("--shards", type=int, default=3600, help="shards of the pool")
    parser.add_argument("--consumed", type=int, default=10_000_000, help="samples that training has consumed already")
    parser.add_argument("--steps", type=int, default=80, help="training steps; a generation is published after a quarter of them")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each part, in turns")
    parser.add_argument("--directory", type=Path, help="where the pool is made, and kept; a temporary directory when unset")
    parser.add_argument("--part", choices=("stages", "in the background", "in the step"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(run_part(arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.directory = arguments.directory or Path(temporary)
        make_generations(arguments.directory / "selection", make_pool(arguments.directory, arguments.samples, arguments.shards))
        print_table({"stages": [in_fresh_process(arguments, "stages") for _ in range(arguments.repeats)]})
        loops: dict[str, list[dict[str, float]]] = {"in the background": [], "in the step": []}
        for _ in range(arguments.repeats):
            for part, results in loops.items():
                results.append(in_fresh_process(arguments, part))
        print_table(loops)


if __name__ == "__main__":
    main()
