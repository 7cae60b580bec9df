"""The evidence for ``recipe: default``: random, similarity, individual and group selection, and each choice of the recipe, over seeds.

    python tools/bench/bench_recipes.py --output runs/recipes

Two pools of text found on this machine: as it is, and with families of near-duplicates (noisy copies) whose members are known.
For each pool and seed, by the package's own trainer, oracles, fit and selection: train a small model on random data; from its
checkpoint measure rollouts; learn the influences with the default recipe and with one of its choices changed at a time; select a fifth
of what is left of the pool; and train each arm from the same checkpoint on its selection, served as a generation. All is
done anew for each seed: weights, order, candidates, rollouts, fits. Reports the held-out loss after the same tokens, its paired
differences, how well each fit predicts exact rollouts of other samples, and how many near-duplicates of one sample are taken.

Results are kept in --output as they come; started again, the same command goes on where it stood, and --table only writes the
report of what there is. --quick is a smoke test of a minute or two: its figures mean nothing. --scale gpu is sized for one GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import read_json, write_json, write_text
from megatron_groupmates.utils.progress import progress_bar
from tools.bench.recipes_adapter import Choices, default_choices, make_arms
from tools.bench.recipes_job import Task, run_task
from tools.bench.recipes_report import Result, Row, compare, conclusions, kinds_table, plot, table, to_json
from tools.bench.recipes_scale import POOLS, SCALES, Scale, make_config, prepare_data

NOTES = """Losses are means over seeds; `+-` is half of a 95 % t-interval, of paired differences where two arms are compared.
"Not separated": the interval holds 0. Of twenty such intervals one is expected to miss. "Spearman of the fit": of predicted with
exact, momentum-corrected influences, standardised per position, in rollouts of samples that no fit saw (for individual: of its model
without the relation). "Refused": final fits with the wrong sign at t = 1; such an arm goes on with random samples. "In individual's":
share of the selection that individual takes too. "Redundant": share of the selection whose near-duplicate is taken as well, but for
one of each family; "members": taken of a family of which any is taken."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of data, results, recipes.md, recipes.json and recipes.png")
    parser.add_argument("--seeds", type=int, help="seeds of each pool (default: 6; with --quick: 2)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms (default: all; an unknown one lists them)")
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=POOLS, help="only these pools (default: both)")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="sizes for two CPU cores, or for one GPU (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny sizes, meaningless figures")
    parser.add_argument("--data", type=Path, help="take pool/, reference/ and evaluation/ from here instead of gathering text")
    parser.add_argument("--workers", type=int, help="processes, one seed and pool each (default: 2; on a GPU 1)")
    parser.add_argument("--table", action="store_true", help="run nothing; write the report of the results that are there")
    return parser.parse_args()


def make_tasks(arguments: argparse.Namespace, output: Path) -> list[Task]:
    """One task for each seed and pool, all pools of a seed before the next, so that a run cut short is balanced.

    Raises:
        UserError: an unknown arm, or ``output`` holds results of other settings.
    """
    scale, choices = open_settings(arguments, output)
    arms = list(make_arms(choices))
    if unknown := set(arguments.arms or ()) - set(arms):
        raise UserError(f"--arms: unknown {', '.join(sorted(unknown))}; choose among {', '.join(arms)}")
    chosen = tuple(arm for arm in arms if not arguments.arms or arm in arguments.arms)
    seeds = arguments.seeds or (2 if arguments.quick else 6)
    if arguments.table and not arguments.seeds:
        seeds = max((int(path.name.rpartition("seed")[2]) for path in output.glob("jobs/*-seed*")), default=0)
    return [Task(output, scale, pool, seed, chosen) for seed in range(1, seeds + 1) for pool in arguments.pools]


def open_settings(arguments: argparse.Namespace, output: Path) -> tuple[Scale, Choices]:
    """Sizes and default recipe, kept in ``output``: for ``--table`` those that its results are of, else those of now."""
    path = output / "settings.json"
    if arguments.table:
        if not path.exists():
            raise UserError(f"{output} holds no results yet; run without --table")
        settings = read_json(path)
        return Scale(**settings["scale"]), Choices(**settings["default"])
    scale = SCALES["quick" if arguments.quick else arguments.scale]
    choices = default_choices(make_config(scale, output, POOLS[0], 0, output), scale.oracle_learning_rate)
    settings = {"scale": dataclasses.asdict(scale) | {"copies": list(scale.copies)}, "default": dataclasses.asdict(choices)}
    if path.exists() and read_json(path) != settings:
        raise UserError(f"{path} is of other sizes or of another default recipe; give another --output")
    write_json(path, settings)
    return scale, choices


def check_device(scale: Scale) -> None:
    """Raise UserError where the scale's device is missing."""
    import torch

    if scale.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--scale gpu: no GPU is visible; run it where there is one, or use --scale cpu")


def run_tasks(tasks: list[Task], workers: int) -> None:
    """Run what is missing, ``workers`` tasks at a time; shows how many arms are done."""
    total = sum(len(task.arms) for task in tasks)
    done = total - sum(len(task.missing()) for task in tasks)
    context = multiprocessing.get_context("spawn")
    with (
        progress_bar(total, "arms", unit="arm", initial=done) as bar,
        ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as executor,
    ):
        futures = {executor.submit(run_task, task): task for task in tasks if task.missing()}
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=2.0, return_when=FIRST_EXCEPTION)
            bar.update(total - sum(len(task.missing()) for task in tasks) - bar.n)
            for future in finished:
                if (error := future.exception()) is not None:
                    executor.shutdown(wait=False, cancel_futures=True)
                    raise RuntimeError(f"{futures[future].directory} failed; see its log.txt") from error


def read_results(tasks: list[Task]) -> dict[str, list[Result]]:
    """Finished arms by pool, in the order of the arms."""
    results: dict[str, list[Result]] = {}
    for task in tasks:
        for arm in task.arms:
            if task.result(arm).exists():
                found: Result = read_json(task.result(arm)) | {"rows": np.load(task.rows(arm))}
                results.setdefault(task.pool, []).append(found)
    places = {arm: place for task in tasks for place, arm in enumerate(task.arms)}
    return {pool: sorted(found, key=lambda result: (places[result["arm"]], result["seed"])) for pool, found in results.items()}


def report(output: Path, results: dict[str, list[Result]], title: str) -> str:
    """Write ``recipes.md``, ``recipes.json`` and ``recipes.png``; returns the Markdown."""
    pools: dict[str, list[Row]] = {pool: compare(found) for pool, found in results.items()}
    parts = [title, NOTES]
    for pool, rows in pools.items():
        seeds = len({result["seed"] for result in results[pool]})
        parts += [
            f"### {pool} pool, {seeds} {'seed' if seeds == 1 else 'seeds'}",
            table(rows),
            "\n".join(f"- {line}" for line in conclusions(rows)),
        ]
        parts += ["Share of each kind of text in the selections:", kinds_table(results[pool])]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(output / "recipes.md", text)
    seconds = {pool: _seconds(found) for pool, found in results.items()}
    write_json(output / "recipes.json", {"pools": to_json(pools), "cpu_seconds_per_seed": seconds})
    plot(pools, output / "recipes.png")
    return text


def _seconds(results: list[Result]) -> dict[str, float]:
    """CPU seconds of each part of a seed, on average."""
    totals: dict[str, float] = {}
    for result in results:
        for part, seconds in result["seconds"].items():
            totals[part] = totals.get(part, 0.0) + seconds
    return {part: round(total / len({result["seed"] for result in results}), 1) for part, total in totals.items()}


def describe(tasks: list[Task]) -> str:
    """The set-up in one sentence."""
    scale = tasks[0].scale
    tokens = scale.arm_steps * scale.batch * scale.sequence_length
    facts: dict[str, Any] = dataclasses.asdict(scale)
    return (
        "{hidden_size} hidden, {num_layers} layers, sequences of {sequence_length}; pools of {pool_samples:,} samples; warm-up of "
        "{warmup_steps} steps of {batch}; {rollouts} first-order rollouts at {oracle_learning_rate:g}; "
        "{held_out_rollouts} exact ones judge the fits; "
    ).format(**facts) + f"arms of {tokens:,} tokens; seeds 1 to {max(task.seed for task in tasks)}."


def main() -> int:
    arguments = parse_arguments()
    if arguments.scale == "cpu":
        # For this process and its workers, before they import torch: two workers on two cores.
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    output = arguments.output.resolve()
    try:
        tasks = make_tasks(arguments, output)
        if not arguments.table:
            scale = tasks[0].scale
            check_device(scale)
            prepare_data(output / "data", scale, arguments.data)
            run_tasks(tasks, arguments.workers or scale.workers)
        results = read_results(tasks)
        if not results:
            raise UserError(f"{output} holds no results yet; run without --table")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(output, results, describe(tasks)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
