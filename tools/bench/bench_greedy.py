"""Compare lazy greedy selection with the plain loop (one matrix-vector product for each pick) in one cluster.

Both run in turns on the same synthetic input, one core, and must take the same samples. Prints Markdown rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron_groupmates.selection.greedy import greedy_select

KINDS = ("normal", "nearly-constant", "tight", "duplicates")


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
    if kind == "nearly-constant":
        individual = -1 + 1e-3 * individual
    if kind == "duplicates":
        # A fifth are near copies: the same direction to 1 %, and nearly the same influence.
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
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of input")
    arguments = parser.parse_args()
    print("| input | samples | taken | plain, ms | lazy, ms | ratio |\n|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        for num_samples in arguments.num_samples:
            embeddings, individual = make_input(kind, num_samples, arguments.dim, seed=0)
            num_select = int(arguments.ratio * num_samples)
            seconds: dict[str, list[float]] = {"plain": [], "lazy": []}
            for _ in range(arguments.repeats):
                picks = []
                for name, select in (("plain", plain_select), ("lazy", greedy_select)):
                    start = time.perf_counter()
                    picks.append(select(embeddings, individual, num_select, 1.0, 1.0))
                    seconds[name].append(time.perf_counter() - start)
                if not np.array_equal(*picks):
                    sys.exit(f"{kind}, {num_samples} samples: the picks differ")
            plain, lazy = (statistics.median(seconds[name]) for name in ("plain", "lazy"))
            print(f"| {kind} | {num_samples} | {num_select} | {plain * 1e3:.0f} | {lazy * 1e3:.1f} | {plain / lazy:.1f} |", flush=True)


if __name__ == "__main__":
    main()
