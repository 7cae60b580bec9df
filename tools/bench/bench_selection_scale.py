"""Selection at the size of a pool: time and peak memory of every stage after the embedding, and how they grow.

For each number of samples: embeddings of unit length around as many centres as there are clusters, float16 with float64
influences as the embedding stage leaves them, are written as a store; then each stage runs in a process of its own, as in a
round: training of the centroids, assignment, sorting by cluster, selection at ratio 0.5 with equal and with global shares.
Peak memory is the process's largest resident set, Python, torch and faiss included. The stages' growth, and what follows for
29.5 million samples in 10,000 clusters by the rule that ``plan`` uses, come after the table. Prints Markdown.

``--directory`` needs about 3.1 KB for each sample at 768 dimensions (9.2 GB for 3 million).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

STAGES = ("centroids", "assign", "sort", "equal", "global")
PART_ROWS = 50_000
RATIO = 0.5


def make_store(directory: Path, num_samples: int, dim: int, num_centres: int, seed: int) -> None:
    """Synthetic embeddings: a third of their length common to a centre, influences partly the centre's, some exact duplicates."""
    from megatron_groupmates.selection.store import part_ranges, write_part

    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((num_centres, dim), dtype=np.float32) * 0.7
    quality = generator.standard_normal(num_centres)
    finished = part_ranges(directory)
    for first in range(0, num_samples, PART_ROWS):
        count = min(PART_ROWS, num_samples - first)
        part = np.random.default_rng((seed, first))
        centre = part.integers(num_centres, size=count)
        rows = centres[centre] + part.standard_normal((count, dim), dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        individual = quality[centre] + part.standard_normal(count)
        copies = part.integers(count, size=count // 50)
        rows[: len(copies)], individual[: len(copies)] = rows[copies], individual[copies]
        if (first, first + count) not in finished:
            write_part(directory, first, rows.astype(np.float16), individual)


def run_stage(stage: str, directory: Path, num_clusters: int, iterations: int) -> dict[str, Any]:
    """One stage, in this process; leaves its result in ``directory`` for the next."""
    # What a stage imports is not its work.
    import faiss  # noqa: F401

    import megatron_groupmates.selection.select  # noqa: F401
    from megatron_groupmates.selection.store import EmbeddingStore

    store = EmbeddingStore.open(directory / "embeddings")
    started = time.perf_counter()
    facts = _WORK[stage](store, directory, num_clusters, iterations)
    return {"seconds": time.perf_counter() - started, **facts}


def _train(store: Any, directory: Path, num_clusters: int, iterations: int) -> dict[str, Any]:
    from megatron_groupmates.selection.clustering import train_centroids

    np.save(directory / "centroids.npy", train_centroids(store, num_clusters, seed=0, num_iterations=iterations))
    return {}


def _assign(store: Any, directory: Path, num_clusters: int, iterations: int) -> dict[str, Any]:
    from megatron_groupmates.selection.assignment import Assigner
    from megatron_groupmates.selection.clustering import assign_range, without_empty

    centroids = np.load(directory / "centroids.npy")
    clustering = without_empty(assign_range(store, 0, store.num_rows, Assigner(centroids)), centroids)
    np.save(directory / "labels.npy", clustering.labels)
    return {"clusters": len(clustering.centroids), "largest": int(np.bincount(clustering.labels).max())}


def _sort(store: Any, directory: Path, num_clusters: int, iterations: int) -> dict[str, Any]:
    from megatron_groupmates.selection.store import sort_by_cluster

    sort_by_cluster(store, np.load(directory / "labels.npy"), directory / "clusters")
    return {}


def _select(share: str) -> Callable[..., dict[str, Any]]:
    def select(store: Any, directory: Path, num_clusters: int, iterations: int) -> dict[str, Any]:
        from megatron_groupmates.influence.relation import Relation
        from megatron_groupmates.selection.merge import GroupSelection
        from megatron_groupmates.selection.offers import offering
        from megatron_groupmates.selection.store import ClusterStore

        clusters, relation = ClusterStore.open(directory / "clusters"), Relation(alpha=1.05, tau=0.9)
        lengths = np.random.default_rng(0).integers(50, 2049, size=store.num_rows)
        budget = int(RATIO * lengths.sum())
        with offering(clusters, relation) as offer:
            rows, _ = GroupSelection(clusters, lengths, share, offer, relation)(None, budget)
        left = budget - int(lengths[rows].sum())
        assert 0 <= left < 2049 and len(np.unique(rows)) == len(rows), "the budget is met to within a sample, by distinct ones"
        return {"selected": len(rows)}

    return select


_WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "centroids": _train,
    "assign": _assign,
    "sort": _sort,
    "equal": _select("equal"),
    "global": _select("global"),
}


def measure(stage: str, directory: Path, arguments: argparse.Namespace, num_clusters: int) -> dict[str, Any]:
    """One stage in a fresh process: seconds, peak memory in bytes, and what it tells of its result."""
    options = ["--stage", stage, "--directory", directory, "--clusters", num_clusters, "--iterations", arguments.iterations]
    done = subprocess.run([sys.executable, __file__, *map(str, options)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes; ``getrusage`` would count that of the process it was forked from."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def growth(sizes: list[int], seconds: list[float]) -> str:
    """By which power of the number of samples a stage grows, least squares on logarithms."""
    if len(sizes) < 2:
        return "-"
    return f"{np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-3)), 1)[0]:.2f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[30_000, 100_000], metavar="N", help="pool sizes (default: 30000 100000)")
    parser.add_argument("--dim", type=int, default=768, help="embedding size (default: 768)")
    parser.add_argument("--density", type=int, default=3000, metavar="N", help="samples in a cluster (default: 3000, about the paper's)")
    parser.add_argument("--clusters", type=int, help="clusters at every size, in place of --density")
    parser.add_argument("--iterations", type=int, default=10, help="of k-means (default: 10; the paper's are 100)")
    parser.add_argument("--directory", type=Path, help="where the stores go (default: a temporary directory)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.stage:
        facts = run_stage(arguments.stage, arguments.directory, arguments.clusters, arguments.iterations)
        print(json.dumps({**facts, "bytes": peak_memory()}))
        return
    table: dict[str, list[float]] = {stage: [] for stage in STAGES}
    print("| samples | clusters (largest) | stage | s | s per million samples | peak memory, GB |\n|---|---|---|---|---|---|", flush=True)
    for num_samples in arguments.samples:
        num_clusters = arguments.clusters or max(1, round(num_samples / arguments.density))
        with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
            directory, shown = Path(name), f"{num_clusters:,}"
            make_store(directory / "embeddings", num_samples, arguments.dim, num_clusters, seed=1)
            for stage in STAGES:
                found = measure(stage, directory, arguments, num_clusters)
                table[stage].append(found["seconds"])
                if "largest" in found:
                    shown = f"{found['clusters']:,} ({found['largest']:,})"
                figures = f"{found['seconds']:.1f} | {found['seconds'] / num_samples * 1e6:.1f} | {found['bytes'] / 1e9:.2f}"
                print(f"| {num_samples:,} | {shown} | {stage} | {figures} |", flush=True)
    print("\nGrowth, time ~ samples^p:", ", ".join(f"{stage} {growth(arguments.samples, table[stage])}" for stage in STAGES))


if __name__ == "__main__":
    main()
