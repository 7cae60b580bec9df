"""``plan``: check a config and its pools without a GPU, and print what the run will cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.cli.job_commands import add_config_options, read_config
from megatron_groupmates.cli.oracle_costs import (
    Rates,
    ReferenceTokens,
    find_rates,
    format_oracle_costs,
    oracle_costs,
    oracle_tokens,
    read_rates,
    reference_tokens,
)
from megatron_groupmates.cli.selection_costs import TEXT_ENCODER_FLOPS_PER_TOKEN, format_selection_costs, selection_costs
from megatron_groupmates.config import Config, UserError, check_world_size, oracle_estimator, refresh_steps
from megatron_groupmates.model.sizes import model_size, recomputed_flops_per_token, training_bytes_per_gpu
from megatron_groupmates.pool.contexts import choose_packing
from megatron_groupmates.pool.exclusion import open_exclusion
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.references.examples import HeldOutExamples
from megatron_groupmates.training.data import check_same_tokenizer, open_pool


@dataclass(frozen=True)
class Hardware:
    """What times are estimated for.

    Attributes:
        gpus: GPUs of the trainer.
        server_gpus: GPUs of the selection server.
        flops_per_second: that one GPU sustains on dense matrix products.
        server_cores: CPU cores of the selection server, all its hosts together.
    """

    gpus: int
    server_gpus: int
    flops_per_second: float
    server_cores: int = 16


def add_commands(commands: Any) -> None:
    """Register ``plan``."""
    parser = commands.add_parser(
        "plan",
        help="check config and pools, print parameters, FLOPs, memory, disk and time",
        description="Dry run: needs no GPU and starts nothing. Times assume the sustained speed given by --tflops.",
    )
    add_config_options(parser)
    parser.add_argument("--gpus", type=_positive(int), metavar="N", help="GPUs of the trainer (default: one tensor-parallel group)")
    parser.add_argument(
        "--server-gpus", type=_positive(int), metavar="N", help="GPUs of the selection server (default: one tensor-parallel group)"
    )
    parser.add_argument(
        "--server-cores", type=_positive(int), metavar="N", help="CPU cores of the selection server (default: 16 for each of its GPUs)"
    )
    parser.add_argument(
        "--tflops",
        type=_positive(float),
        default=400.0,
        metavar="T",
        help="sustained TFLOP/s per GPU (default 400: an H100 or H200 in bf16 at about 40 %% of its peak)",
    )
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="RUN",
        help="run directory of the same model whose finished rounds say how fast its server measures (default: the config's own run, "
        "where it has any)",
    )
    parser.add_argument("--no-data", action="store_true", help="do not open the pools: check the config alone")
    parser.add_argument(
        "--pool-samples", type=_positive(int), metavar="N", help="with --no-data: of a pool of so many samples, each a whole sequence"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(handler=_plan)


def _plan(options: argparse.Namespace) -> int:
    config = read_config(options)
    tensor = config.parallel.tensor_model_parallel_size
    server_gpus = options.server_gpus or config.server.tensor_model_parallel_size or tensor
    hardware = Hardware(
        gpus=options.gpus or tensor,
        server_gpus=server_gpus,
        flops_per_second=options.tflops * 1e12,
        server_cores=options.server_cores or 16 * server_gpus,
    )
    if options.pool_samples and not options.no_data:
        raise UserError("--pool-samples: the pool itself says how many samples it has; use it with --no-data only")
    pool, reference = (None, None) if options.no_data else check_pools(config)
    rates = read_rates(options.rates, config) if options.rates else find_rates(config)
    facts = make_plan(config, hardware, pool, reference, rates, options.pool_samples)
    print(json.dumps(facts) if options.json else format_plan(facts))
    return 0


def check_pools(config: Config) -> tuple[PoolIndex, PoolIndex | None]:
    """Open every pool of the config as trainer and server would.

    Returns:
        The training pool and the reference set, None without one.

    Raises:
        UserError: a pool is missing or does not fit.
    """
    pool = open_pool(config, config.data.pool, "data.pool")
    choose_packing(pool, config.data.packing, config.model.sequence_length)
    open_exclusion(config, pool)
    held_out = {}
    for what in ("evaluation", "reference"):
        path = getattr(config.data, what)
        if path is not None:
            other = held_out[what] = open_pool(config, path, f"data.{what}")
            check_same_tokenizer(pool, other, f"data.{what}")
            HeldOutExamples(other, config.model.sequence_length)
    return pool, held_out.get("reference")


def make_plan(
    config: Config,
    hardware: Hardware,
    pool: PoolIndex | None,
    reference: PoolIndex | None = None,
    rates: Rates | None = None,
    pool_samples: int | None = None,
) -> dict[str, Any]:
    """Sizes and costs of the run; times in seconds, sizes in bytes.

    Args:
        config: the run.
        hardware: what times are estimated for.
        pool: of training; None leaves out what depends on it.
        reference: the reference set; without it its lengths are assumed.
        rates: of a finished round, for times of the oracle that are measured.
        pool_samples: of a pool that is not there yet, each a whole sequence; with ``pool`` None.

    Raises:
        UserError: the batch does not divide over the GPUs.
    """
    data_parallel = check_world_size(config, hardware.gpus)
    size, length, training = model_size(config), config.model.sequence_length, config.training
    tokens = training.train_iters * training.global_batch_size * length
    train_flops = float(size.training_flops_per_token) * tokens
    memory = training_bytes_per_gpu(config, data_parallel)
    refreshes = len(refresh_steps(config))
    lengths = pool.lengths if pool else None
    if lengths is None and pool_samples is not None:
        lengths = np.full(pool_samples, length + 1)
    evaluated = reference_tokens(config, reference)
    stages = selection_flops(config, lengths, evaluated) if config.selection.enabled else {}
    server_speed = hardware.server_gpus * hardware.flops_per_second
    interval = config.checkpoint.save_interval
    sequences = choose_packing(pool, config.data.packing, length).num_samples() if pool else None
    saves = len({*range(interval, training.train_iters + 1, interval), training.train_iters, *refresh_steps(config)})
    return {
        "output_dir": config.run.output_dir,
        "mode": config.selection.mode,
        "parameters": size.parameters,
        "training_flops_per_token": size.training_flops_per_token,
        "tokens": tokens,
        "samples": training.train_iters * training.global_batch_size,
        "data_parallel_size": data_parallel,
        "micro_batches_per_step": training.global_batch_size // (training.micro_batch_size * data_parallel),
        "training": {
            "flops": train_flops,
            "seconds": (train_flops + recomputed_flops_per_token(config) * tokens) / (hardware.gpus * hardware.flops_per_second),
            "gpus": hardware.gpus,
        },
        "memory_per_gpu": {**memory, "total": sum(memory.values())},
        "checkpoint_bytes": size.parameters * 14,
        "checkpoints": saves,
        "disk_bytes": size.parameters * 14 * saves,
        "refresh_steps": refresh_steps(config),
        "selection": {name: {"flops": flops, "seconds": flops / server_speed} for name, flops in stages.items()},
        "oracle": oracle_costs(config, mean_sample_tokens(config, lengths), evaluated, train_flops, server_speed, rates)
        if "oracle_random" in stages
        else None,
        "clusters": selection_costs(config, len(lengths), hardware.server_cores)
        if lengths is not None and "oracle_random" in stages and config.selection.method == "group"
        else None,
        "selection_share_of_training": refreshes * sum(stages.values()) / train_flops,
        "pool": None
        if pool is None or sequences is None
        else {
            "samples": pool.num_samples,
            "sequences": sequences,
            "tokens": pool.num_tokens,
            "shards": pool.num_shards,
            "epochs": training.train_iters * training.global_batch_size / sequences,
        },
    }


def mean_sample_tokens(config: Config, lengths: np.ndarray | None) -> float:
    """Tokens that the model reads of a sample when it is a sequence of its own; full sequences where ``lengths`` is None."""
    longest = config.model.sequence_length
    # A document of a pool is a sample of its own here, the first tokens of it that the model reads.
    return float(longest if lengths is None else np.minimum(lengths - 1, longest).mean())


def selection_flops(config: Config, lengths: np.ndarray | None, reference: ReferenceTokens) -> dict[str, float]:
    """FLOPs of each stage of one round that ``selection.method`` has.

    Args:
        config: the run.
        lengths: tokens of each sample of the pool; None where it is not known: then full sequences are assumed, and nothing is
            said of the whole pool.
        reference: tokens of one evaluation of the reference set.
    """
    per_token, sample = float(model_size(config).forward_flops_per_token), mean_sample_tokens(config, lengths)
    encoder_per_token = per_token if config.relational.encoder == "probe" else TEXT_ENCODER_FLOPS_PER_TOKEN
    flops: dict[str, float] = {}
    if config.selection.method in ("group", "individual"):
        tokens = oracle_tokens(config, oracle_estimator(config), sample, reference.tokens)
        flops = {name: per_token * count for name, count in tokens.items()}
        flops["candidates"] = encoder_per_token * config.oracle.num_candidates * sample
    if lengths is not None and config.selection.method != "random":
        flops["embeddings"] = encoder_per_token * len(lengths) * sample
    return flops


def format_plan(facts: dict[str, Any]) -> str:
    """The plan as a table for people."""
    training, memory, gib = facts["training"], facts["memory_per_gpu"], 2**30
    lines = [
        f"parameters        {facts['parameters']:,}",
        f"training          {facts['tokens']:,} tokens in {facts['samples']:,} samples; "
        f"data parallel {facts['data_parallel_size']}, {facts['micro_batches_per_step']} micro-batches per step",
        f"                  {training['flops']:.3g} FLOPs, {_time(training['seconds'])} on {training['gpus']} GPUs",
        f"memory per GPU    {memory['total'] / gib:.1f} GiB: "
        + ", ".join(f"{name} {value / gib:.1f}" for name, value in memory.items() if name != "total"),
        f"disk              {facts['disk_bytes'] / gib:.1f} GiB: "
        f"{facts['checkpoints']} checkpoints of {facts['checkpoint_bytes'] / gib:.2f} GiB",
    ]
    pool = facts["pool"]
    if pool:
        lines.append(
            f"pool              {pool['samples']:,} samples, {pool['tokens']:,} tokens in {pool['shards']} shards"
            + (f", {pool['sequences']:,} training sequences" if pool["sequences"] != pool["samples"] else "")
            + f"; the run reads {pool['epochs']:.2f} of it"
        )
    if facts["selection"]:
        steps = facts["refresh_steps"]
        lines.append(
            f"selection         {len(steps)} refreshes"
            + (f", at steps {steps[0]} to {steps[-1]}" if steps else "")
            + f"; {100 * facts['selection_share_of_training']:.1f} % of the training FLOPs in all"
        )
        lines += [
            f"  {name:<17} {stage['flops']:.3g} FLOPs, {_time(stage['seconds'])} per round" for name, stage in facts["selection"].items()
        ]
    if facts["clusters"]:
        lines += format_selection_costs(facts["clusters"], _time)
    if facts["oracle"]:
        lines += format_oracle_costs(facts["oracle"], _time)
    return "\n".join(lines)


def _positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: ``kind`` above 0."""

    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    read.__name__ = kind.__name__  # what argparse calls it when ``kind`` cannot read the text
    return read


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
