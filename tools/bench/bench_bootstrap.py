"""Time bootstrap rollouts: the beam search against a plain one, both methods at the paper's size, and what they cover.

Prints Markdown tables. The plain beam search scores every candidate after every rollout; both must find the same
rollouts. Each row at the paper's size runs in a fresh process, whose largest resident set is its peak memory; the input
embeddings, float32, are part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_groupmates.influence.beam import DIRECTIONS, beam_search
from megatron_groupmates.influence.bootstrap import bootstrap_coverage
from megatron_groupmates.influence.diverse import diverse_bootstrap
from megatron_groupmates.influence.relation import Relation

KINDS = ("normal", "tight", "clusters", "duplicates", "alike", "zero", "constant")


def make_input(kind: str, num_candidates: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit float32 embeddings ``[N, d]`` and float64 individual influences ``[N]``.

    ``tight``: mean cosine about 0.65; ``clusters``: 200 of them, also in influence; ``duplicates``: ten copies of each;
    ``alike``: all the same; ``zero``: influence 0; ``constant``: influence -1, so that the relation decides alone.
    """
    rng = np.random.default_rng(0)
    embeddings, individual = rng.standard_normal((num_candidates, dim), np.float32), rng.standard_normal(num_candidates)
    if kind == "tight":
        embeddings += 1.4 * rng.standard_normal(dim, np.float32)
    if kind == "clusters":
        labels = rng.integers(0, 200, num_candidates)
        for label, centre in enumerate(1.3 * rng.standard_normal((200, dim), np.float32)):
            embeddings[labels == label] += centre
        individual = 0.6 * rng.standard_normal(200)[labels] + 0.8 * individual
    if kind == "duplicates":
        originals = rng.integers(0, num_candidates // 10, num_candidates)
        embeddings, individual = embeddings[originals], individual[originals]
    if kind == "alike":
        embeddings[:] = embeddings[0]
    if kind in ("alike", "zero", "constant"):
        individual[:] = 0 if kind == "zero" else -1
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, individual


def plain_beam_search(
    embeddings: np.ndarray, individual: np.ndarray, relation: Relation, num_steps: int, num_beams: int, num_extensions: int, direction: str
) -> np.ndarray:
    """The definition: all candidates scored after each rollout; only inner products with a sample are kept."""
    sign = 1.0 if direction == "lowest" else -1.0
    rows = embeddings.astype(np.float64)
    beams = np.argsort(sign * individual, kind="stable")[:num_beams, None]
    totals = sign * individual[beams[:, 0]]
    products: dict[int, np.ndarray] = {}
    for length in range(1, num_steps):
        longer, sums = [], []
        for rollout, total in zip(beams.tolist(), totals, strict=True):
            for sample in rollout:
                if sample not in products:
                    products[sample] = np.vecdot(rows, rows[sample])
            similarity, *others = np.sort([products[sample] for sample in rollout], axis=0)
            for product in others:
                similarity = similarity + product
            scores = sign * relation.scores(individual, similarity / length)
            scores[rollout] = np.inf
            best = np.argsort(scores, kind="stable")[:num_extensions]
            longer += [[*rollout, sample] for sample in best.tolist()]
            sums.append(total + scores[best])
        longer, sums = np.array(longer), np.concatenate(sums)
        order = np.lexsort((*longer.T[::-1], sums))[:num_beams]
        beams, totals = longer[order], sums[order]
    return beams


def predicted_sums(rollouts: np.ndarray, embeddings: np.ndarray, individual: np.ndarray, relation: Relation) -> np.ndarray:
    """Summed predictions float64 ``[R]`` of rollouts ``[R, T]``."""
    sums, before = individual[rollouts[:, 0]].copy(), embeddings[rollouts[:, 0]].astype(np.float64)
    for step in range(1, rollouts.shape[1]):
        rows = embeddings[rollouts[:, step]].astype(np.float64)
        sums += relation.scores(individual[rollouts[:, step]], np.vecdot(rows, before) / step)
        before += rows
    return sums


def compare_with_plain(arguments: argparse.Namespace) -> None:
    """Print the table of the beam search and the plain one."""
    print("| input | tau | direction | plain, s | beam search, s | ratio |\n|---|---|---|---|---|---|")
    for kind in arguments.small_kinds:
        embeddings, individual = make_input(kind, arguments.small_candidates, arguments.dim)
        for tau in arguments.taus:
            for direction in DIRECTIONS:
                settings = (embeddings, individual, Relation(tau=tau), arguments.num_steps, arguments.small_beams, 5, direction)
                best = {}
                for _ in range(arguments.repeats):
                    found = []
                    for search in (beam_search, plain_beam_search):
                        start = time.process_time()
                        found.append(search(*settings))
                        seconds = time.process_time() - start
                        best[search] = min(seconds, best.get(search, seconds))
                    if not np.array_equal(*found):
                        sys.exit(f"{kind}, tau {tau}, {direction}: the rollouts differ")
                ours, plain = best[beam_search], best[plain_beam_search]
                print(f"| {kind} | {tau:g} | {direction} | {plain:.1f} | {ours:.2f} | {plain / ours:.0f} |", flush=True)


def measure(arguments: argparse.Namespace, method: str, kind: str, tau: float) -> dict[str, Any]:
    """One row at full size: CPU seconds of each direction, peak memory and coverage; for a process of its own."""
    embeddings, individual = make_input(kind, arguments.num_candidates, arguments.dim)
    relation, seconds, sums, parts = Relation(tau=tau), [], [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for direction in DIRECTIONS:
        start = time.process_time()
        if method == "plain":
            part = beam_search(embeddings, individual, relation, arguments.num_steps, arguments.count, direction=direction)
        else:
            part = diverse_bootstrap(
                embeddings, individual, relation, arguments.num_steps, arguments.count, direction, max_uses=int(method.split()[1])
            )
        seconds.append(time.process_time() - start)
        parts.append(part)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for part in parts:
        sums.append(float(predicted_sums(part, embeddings, individual, relation).mean()))
    coverage = bootstrap_coverage(np.concatenate(parts))
    del coverage["uses"]
    return {"seconds": seconds, "before": before / 1024, "peak": peak / 1024, "sums": sums, **coverage}


def measure_apart(arguments: argparse.Namespace, method: str, kind: str, tau: float) -> dict[str, Any]:
    """``measure`` in fresh processes; the least time of the repeats for each direction."""
    sizes = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in ("num_candidates", "dim", "num_steps", "count")]
    command = [sys.executable, str(Path(__file__).resolve()), *sizes, "--one", method, kind, str(tau)]
    rows = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(arguments.repeats)]
    rows[0]["seconds"] = np.min([row["seconds"] for row in rows], axis=0).tolist()
    return rows[0]


def measure_all(arguments: argparse.Namespace) -> None:
    """Print the tables at full size."""
    methods = ["plain", *(f"diverse {uses}" for uses in arguments.max_uses)]
    print("\n| method | input | tau | lowest, s | highest, s | peak, MB | of it before, MB |\n|---|---|---|---|---|---|---|")
    covered = []
    for kind in arguments.kinds:
        for tau in arguments.taus:
            for method in methods:
                row = measure_apart(arguments, method, kind, tau)
                lowest, highest = row["seconds"]
                print(
                    f"| {method} | {kind} | {tau:g} | {lowest:.2f} | {highest:.2f} | {row['peak']:.0f} | {row['before']:.0f} |", flush=True
                )
                covered.append(
                    f"| {kind} | {tau:g} | {method} | {row['distinct_samples']:,} | {row['distinct_sets']:,} | {row['max_uses']:,} | "
                    f"{row['sums'][0]:.2f} | {row['sums'][1]:.2f} |"
                )
    print("\n| input | tau | method | distinct samples | distinct sets | largest use | mean sum, lowest | mean sum, highest |")
    print("|---|---|---|---|---|---|---|---|", *covered, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-candidates", type=int, default=81_920, help="candidates N")
    parser.add_argument("--dim", type=int, default=768, help="embedding size")
    parser.add_argument("--num-steps", type=int, default=10, help="samples in a rollout")
    parser.add_argument("--count", type=int, default=10_000, help="rollouts in each direction")
    parser.add_argument("--max-uses", type=int, nargs="*", default=[5, 20], help="caps to try with the diverse method")
    parser.add_argument("--taus", type=float, nargs="+", default=[1.0], help="temperatures of the product relation")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["normal", "tight", "clusters"], help="inputs at full size")
    parser.add_argument("--small-candidates", type=int, default=8192, help="candidates for the comparison with the plain search")
    parser.add_argument("--small-beams", type=int, default=1000, help="rollouts for it")
    parser.add_argument("--small-kinds", nargs="*", choices=KINDS, default=["normal", "duplicates"], help="inputs for it")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the least times are shown")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "KIND", "TAU"), help="measure one row at full size and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        method, kind, tau = arguments.one
        print(json.dumps(measure(arguments, method, kind, float(tau))))
        return
    compare_with_plain(arguments)
    measure_all(arguments)


if __name__ == "__main__":
    main()
