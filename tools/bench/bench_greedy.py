"""Compare lazy greedy selection with the plain loop (one matrix-vector product for each pick) in one cluster.

Both run in turns on the same synthetic input, one core, and must take the same samples. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_groupmates.selection.greedy import greedy_select

KINDS = {
    "normal": "random directions, normal influences",
    "tight": "the same about a common direction",
    "duplicates": "a fifth are near copies of others",
    "nearly-constant": "influences -1 to 0.1 %",
    "zero-crossing": "influences 0.001 times normal",
    "constant": "influences all -1",
    "positive": "influences all 1",
    "tight-constant": "constant influences, embeddings equal to 1e-6",
    "equal-constant": "constant influences, 300 distinct embeddings",
    "equal-embedding": "one embedding, influences -1 to 0.1 %",
    "low-rank": "constant influences, embeddings in 8 dimensions",
    "flat-groups": "constant influences, 10 groups of embeddings equal to 0.1 %",
}


def plain_select(embeddings: np.ndarray, individual: np.ndarray, num_select: int, alpha: float, tau: float) -> np.ndarray:
    """The definition: all scores at every step, float64, lowest index wins ties."""
    rows = embeddings.astype(np.float64)
    taken = np.zeros(len(rows), bool)
    total, picks = np.zeros(rows.shape[1]), np.empty(num_select, np.int64)
    for step in range(num_select):
        scores = individual * alpha * (1 - rows @ (total / step) / tau) if step else individual.copy()
        scores[taken] = np.inf
        picks[step] = scores.argmin()
        taken[picks[step]] = True
        total += rows[picks[step]]
    return picks


def make_input(kind: str, num_samples: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit float32 embeddings ``[n, d]`` and float64 individual influences ``[n]``."""
    rng = np.random.default_rng(seed)
    embeddings, individual = rng.standard_normal((num_samples, dim)), rng.standard_normal(num_samples)
    if kind == "tight":
        embeddings += 1.5 * rng.standard_normal(dim)
    if kind == "tight-constant":
        embeddings = 1e-6 * embeddings + rng.standard_normal(dim)
    if kind == "equal-constant":
        embeddings = embeddings[rng.integers(0, 300, num_samples)]
    if kind == "equal-embedding":
        embeddings[:] = embeddings[0]
    if kind == "low-rank":
        embeddings = rng.standard_normal((num_samples, 8)) @ rng.standard_normal((8, dim))
    if kind == "flat-groups":
        embeddings = 1e-3 * embeddings + rng.standard_normal((10, dim))[rng.integers(0, 10, num_samples)]
    if kind in ("nearly-constant", "equal-embedding"):
        individual = -1 + 1e-3 * individual
    if kind == "zero-crossing":
        individual *= 1e-3
    if kind in ("constant", "tight-constant", "equal-constant", "low-rank", "flat-groups"):
        individual[:] = -1
    if kind == "positive":
        individual[:] = 1
    if kind == "duplicates":
        # The same direction to 1 %, and nearly the same influence.
        copies, originals = rng.integers(0, num_samples, (2, num_samples // 5))
        embeddings[copies] = embeddings[originals] + 0.01 * rng.standard_normal((len(copies), dim))
        individual[copies] = individual[originals] + 0.01 * rng.standard_normal(len(copies))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings.astype(np.float32), individual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-samples", type=int, nargs="+", default=[3000, 6000], help="cluster sizes")
    parser.add_argument("--dim", type=int, default=768, help="embedding size")
    parser.add_argument("--ratio", type=float, default=0.5, help="share taken")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each; medians are shown")
    described = "; ".join(f"{kind}: {description.replace('%', '%%')}" for kind, description in KINDS.items())
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help=f"kinds of input: {described}")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, for a machine that is busy with other work")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    # Loaded here rather than in the first selection that needs it.
    import_module("megatron_groupmates.selection.greedy_crowd")
    print("| input | samples | taken | plain, ms | lazy, ms | ratio |\n|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        for num_samples in arguments.num_samples:
            embeddings, individual = make_input(kind, num_samples, arguments.dim, seed=0)
            num_select = int(arguments.ratio * num_samples)
            seconds: dict[str, list[float]] = {"plain": [], "lazy": []}
            for _ in range(arguments.repeats):
                picks = []
                for name, select in (("plain", plain_select), ("lazy", greedy_select)):
                    start = clock()
                    picks.append(select(embeddings, individual, num_select, 1.0, 1.0))
                    seconds[name].append(clock() - start)
                if not np.array_equal(*picks):
                    sys.exit(f"{kind}, {num_samples} samples: the picks differ")
            plain, lazy = (statistics.median(seconds[name]) for name in ("plain", "lazy"))
            print(f"| {kind} | {num_samples} | {num_select} | {plain * 1e3:.0f} | {lazy * 1e3:.1f} | {plain / lazy:.1f} |", flush=True)


if __name__ == "__main__":
    main()
