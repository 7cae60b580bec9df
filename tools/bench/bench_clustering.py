"""Compare the exact assignment of rows to centroids with faiss's flat index: both in turns, one core, same centroids.

The centroids are trained by the package on a sample of the rows. Labels must be those of faiss but where the two best
float64 scores are closer than float32 can tell, and those of the float64 argmax everywhere on a part of the rows. Prints
Markdown rows. Seconds are of CPU time, which what else runs on the machine changes least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faiss
import numpy as np
import torch

from megatron_groupmates.selection.assignment import Assigner, has_fast_bfloat16
from megatron_groupmates.selection.clustering import train_centroids
from megatron_groupmates.selection.store import ArrayStore

KINDS = ("clustered", "even")
_NEAR_TIE = 1e-6


def make_rows(kind: str, num_samples: int, dim: int, num_centres: int, seed: int) -> np.ndarray:
    """Unit float32 ``[n, d]``: around centres that hold a third of their length, or spread evenly."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_samples, dim), dtype=np.float32)
    if kind == "clustered":
        rows += 0.7 * rng.standard_normal((num_centres, dim), dtype=np.float32)[rng.integers(0, num_centres, num_samples)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def faiss_search(centroids: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Labels int64 of rows float32 by faiss's flat inner-product index."""
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    return lambda rows: index.search(rows, 1)[1][:, 0]


def near_ties(rows: np.ndarray, centroids: np.ndarray, one: np.ndarray, other: np.ndarray) -> int:
    """Rows that ``one`` and ``other`` label differently; ends the program where their float64 scores are not nearly equal."""
    differ = np.flatnonzero(one != other)
    scores = [np.vecdot(rows[differ].astype(np.float64), centroids[labels[differ]].astype(np.float64)) for labels in (one, other)]
    if len(differ) and np.abs(scores[0] - scores[1]).max() > _NEAR_TIE:
        sys.exit("the labels differ from those of faiss in more than near-ties")
    return len(differ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=100_000, help="rows to assign")
    parser.add_argument("--dim", type=int, default=768, help="embedding size")
    parser.add_argument("--num-clusters", type=int, default=1000, help="centroids")
    parser.add_argument("--train-rows", type=int, default=20_000, help="rows the centroids are trained on")
    parser.add_argument("--iterations", type=int, default=5, help="of k-means")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each; medians of CPU time are shown")
    parser.add_argument("--check-rows", type=int, default=2000, help="rows that are compared with the float64 argmax")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of input")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    print("| rows | kind | faiss, s | float32, s | bfloat16, s | faiss / default | near-ties |\n|---|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        rows = make_rows(kind, arguments.num_samples, arguments.dim, arguments.num_clusters, seed=0)
        sample = ArrayStore(rows[: arguments.train_rows], np.zeros(min(len(rows), arguments.train_rows)))
        centroids = train_centroids(sample, arguments.num_clusters, seed=0, num_iterations=arguments.iterations)
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "faiss": faiss_search(centroids),
            "float32": Assigner(centroids, precision="float32"),
            "bfloat16": Assigner(centroids, precision="bfloat16"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        labels: dict[str, np.ndarray] = {}
        for _ in range(arguments.repeats):
            for name, assign in ways.items():
                start = time.process_time()
                labels[name] = assign(rows)
                seconds[name].append(time.process_time() - start)
        exact = (rows[: arguments.check_rows].astype(np.float64) @ centroids.T.astype(np.float64)).argmax(axis=1)
        for name in ("float32", "bfloat16"):
            if not np.array_equal(labels[name][: arguments.check_rows], exact) or not np.array_equal(labels[name], labels["float32"]):
                sys.exit(f"{kind}: the labels by {name} are not those of the float64 argmax")
        ties = near_ties(rows, centroids, labels["float32"], labels["faiss"])
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        default = medians["bfloat16" if has_fast_bfloat16() else "float32"]
        shown = " | ".join(f"{medians[name]:.2f}" for name in ways)
        print(f"| {arguments.num_samples} x {arguments.dim} | {kind} | {shown} | {medians['faiss'] / default:.2f} | {ties} |", flush=True)


if __name__ == "__main__":
    main()
