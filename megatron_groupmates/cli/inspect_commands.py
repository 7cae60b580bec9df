"""Commands that look at a run from outside: ``status``, ``trace``, ``report``. They need no GPU and disturb nothing."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config import Config, RunPaths, UserError, refresh_steps
from megatron_groupmates.pool.contexts import choose_packing
from megatron_groupmates.pool.exclusion import open_exclusion
from megatron_groupmates.pool.generation import load_generation, read_pointer
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, read_log
from megatron_groupmates.pool.order import SampleOrder, next_epoch_entry
from megatron_groupmates.pool.remote import RemoteSettings
from megatron_groupmates.pool.skips import read_skips
from megatron_groupmates.server.stage_names import stage_text
from megatron_groupmates.utils.files import read_json, read_lines
from megatron_groupmates.utils.run_directory import open_run
from megatron_groupmates.utils.storage import configure_storage


def add_commands(commands: Any) -> None:
    """Register ``status``, ``trace`` and ``report``."""
    status = commands.add_parser("status", help="where trainer and server stand")
    status.add_argument("run", type=Path, metavar="RUN", help="run directory")
    status.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    status.set_defaults(handler=_status)

    trace = commands.add_parser(
        "trace",
        help="which data a range of global samples saw",
        description="JSON lines, one per global sample (Megatron's consumed_train_samples counting): "
        "sample, generation, sources [[shard, row, first_token, num_tokens], ...], tokens_sha256, and skipped: true where "
        "a part could not be read and was left out.",
    )
    trace.add_argument("run", type=Path, metavar="RUN", help="run directory")
    trace.add_argument("--start", type=int, required=True, metavar="G", help="first global sample")
    trace.add_argument("--stop", type=int, required=True, metavar="G", help="one past the last global sample")
    trace.set_defaults(handler=_trace)

    report = commands.add_parser("report", help="write report.html and summary.json for one run or several arms")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; the report goes to the first")
    report.add_argument("--output", type=Path, metavar="DIR", help="where to write instead")
    report.set_defaults(handler=_report)


def run_status(paths: RunPaths, config: Config) -> dict[str, Any]:
    """Where the run stands, from its files alone."""
    training = read_json(paths.training_state) if paths.training_state.exists() else {"state": "not started"}
    server = read_json(paths.server_state) if paths.server_state.exists() else {"state": "not started"}
    losses = [row for row in read_lines(paths.metrics) if "loss" in row]
    evaluations = [row for row in read_lines(paths.metrics) if "evaluation_loss" in row]
    return {
        "run": str(paths.root),
        "train_iters": config.training.train_iters,
        "trainer": training,
        "server": server,
        "loss": losses[-1]["loss"] if losses else None,
        "evaluation_loss": evaluations[-1]["evaluation_loss"] if evaluations else None,
        "tokens_per_second": losses[-1]["tokens_per_second"] if losses else None,
        "published_generation": read_pointer(paths.selection),
        "adoptions": [
            {"generation": entry.generation, "effective_sample": entry.effective_sample, "epoch": entry.epoch}
            for entry in read_log(paths.generation_log)
        ],
        "skipped_samples": len(read_skips(paths.skipped_samples)),
        "planned_refreshes": refresh_steps(config),
        "failures": [read_json(path) for path in sorted(paths.selection.glob("rounds/round-*/failed.json"))],
    }


def _status(options: argparse.Namespace) -> int:
    config, paths = open_run(options.run)
    facts = run_status(paths, config)
    if options.json:
        print(json.dumps(facts))
        return 0
    trainer, server = facts["trainer"], facts["server"]
    print(f"run        {facts['run']}")
    print(
        f"trainer    {trainer['state']}, step {trainer.get('step', 0)} of {facts['train_iters']}, "
        f"{trainer.get('consumed_tokens', 0):,} tokens, loss {_number(facts['loss'])}, "
        f"evaluation loss {_number(facts['evaluation_loss'])}, {facts['tokens_per_second'] or 0:,.0f} tokens/s"
    )
    if facts["skipped_samples"]:
        print(f"           {facts['skipped_samples']} samples could not be read and were left out: {paths.skipped_samples}")
    if config.selection.enabled:
        where = f", round {server['round']}: {stage_text(server['stage'])}{progress_text(server)}" if "stage" in server else ""
        age = f" ({time.time() - server['updated']:.0f} s ago)" if "updated" in server else ""
        print(f"server     {server['state']}{where}{age}")
        published = facts["published_generation"]
        print(
            f"selection  published generation {'none' if published is None else published}; "
            f"refreshes planned at steps {facts['planned_refreshes']}"
        )
        for entry in facts["adoptions"]:
            print(f"           generation {entry['generation']} from sample {entry['effective_sample']:,} (epoch {entry['epoch']})")
        for failure in facts["failures"]:
            print(f"           round on {failure['checkpoint_tag']} failed: {failure['reason']}")
    return 0


def progress_text(server: dict[str, Any]) -> str:
    """How far the server's stage is, with its speed and the time left; empty where the server does not say."""
    if server.get("total") is None:
        return ""
    parts = [f"{server['done']:,} of {server['total']:,} {server['unit'].removesuffix('s')}s"]
    if server.get("per_second"):
        parts.append(f"{server['per_second']:,.1f}/s")
    if server.get("eta_seconds") is not None:
        parts.append(f"{_duration(server['eta_seconds'])} left")
    return ": " + ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _trace(options: argparse.Namespace) -> int:
    from megatron_groupmates.pool.trace import trace

    if not 0 <= options.start <= options.stop:
        raise UserError(f"--start {options.start} --stop {options.stop}: give 0 <= start <= stop")
    config, paths = open_run(options.run)
    configure_storage(config.data.storage_options or {})
    pool = PoolIndex.open(config.data.pool, remote=RemoteSettings.of(config))
    order, skips = run_order(paths, config, pool, options.stop), set(read_skips(paths.skipped_samples))
    for line in trace(pool, order, options.start, options.stop, skips):
        print(json.dumps(line))
    return 0


def run_order(paths: RunPaths, config: Config, pool: PoolIndex, stop: int) -> SampleOrder:
    """The sample order of a run, with the epochs that samples below ``stop`` will need if no generation comes between."""
    entries = read_log(paths.generation_log) or (LogEntry(generation=0, effective_sample=0, epoch=0, digest=""),)
    masks = {
        number: np.ones(pool.num_samples, dtype=bool) if number == 0 else load_generation(paths.selection, number, pool).mask
        for number in {entry.generation for entry in entries}
    }
    packing = choose_packing(pool, config.data.packing, config.model.sequence_length)
    order = SampleOrder(pool.num_samples, config.run.seed, entries, masks, packing, open_exclusion(config, pool).mask)
    while order.exhausted_at() < stop:
        order = order.extended(next_epoch_entry(order), masks[entries[-1].generation])
    return order


def _report(options: argparse.Namespace) -> int:
    from megatron_groupmates.report.build import build_report

    output = options.output or options.runs[0]
    build_report(options.runs, output)
    print(f"wrote {output / 'report.html'} and {output / 'summary.json'}")
    return 0
