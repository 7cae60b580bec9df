"""What clustering and selection of a pool cost on CPU cores, from measured rates, and what the plain way of doing both costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_groupmates.config import Config
from megatron_groupmates.selection.clustering import TRAIN_SAMPLES_PER_CLUSTER, default_num_clusters

CORE = "an AMD EPYC (Zen 4) core"
"""Of which the rates are: ``tools/bench/RESULTS.md``, "Selection at the size of a pool"."""

TEXT_ENCODER_DIM, TEXT_ENCODER_FLOPS_PER_TOKEN = 768, 2.0 * 86e6
"""Of a text encoder, which is not loaded to plan: the size of BERT-base, as the paper's encoder has it, embeddings left out."""


@dataclass(frozen=True, kw_only=True)
class CoreRates:
    """Measured on one core.

    Attributes:
        train_flops: per second, of k-means iterations.
        assign_flops: per second, of finding each row's centroid.
        sorted_bytes: per second, embeddings read and written once more by cluster.
        choose_seconds: to choose half of a cluster by relations, for each number of its samples' embeddings.
        plain_seconds: of the plain loop, for each product of a pick, a sample and a number of its embedding.
    """

    train_flops: float = 4.0e10
    assign_flops: float = 1.0e11
    sorted_bytes: float = 1.9e8
    choose_seconds: float = 3.6e-8
    plain_seconds: float = 2.8e-10


def selection_costs(config: Config, num_samples: int, cores: int, rates: CoreRates | None = None) -> dict[str, Any]:
    """Core-seconds and seconds of each stage of one round after the embedding, ours and the plain way's, and sizes in bytes.

    The plain way takes a matrix-vector product for each pick; its k-means is the same.

    Args:
        config: the run.
        num_samples: that may be selected.
        cores: of the selection server, all its hosts together.
        rates: of one core.
    """
    rates = rates or CoreRates()
    dim = config.relational.embedding_dim if config.relational.encoder == "probe" else TEXT_ENCODER_DIM
    clusters = config.selection.num_clusters or default_num_clusters(num_samples)
    trained = min(num_samples, clusters * TRAIN_SAMPLES_PER_CLUSTER)
    size = num_samples / clusters
    product = 2.0 * clusters * dim
    core_seconds = {
        "centroids": trained * product * config.selection.kmeans_iterations / rates.train_flops,
        "clusters": num_samples * product / rates.assign_flops,
        "sorted": 2.0 * num_samples * dim / rates.sorted_bytes,
        "group": num_samples * dim * rates.choose_seconds,
    }
    plain = clusters * (config.selection.ratio * size) * size * dim * rates.plain_seconds
    # Centroids are trained by all cores of one host, sorting waits for one disk.
    return {
        "dim": dim,
        "clusters": clusters,
        "cores": cores,
        "core": CORE,
        "stages": {
            name: {"core_seconds": seconds, "seconds": seconds if name == "sorted" else seconds / cores}
            for name, seconds in core_seconds.items()
        },
        "plain_choice": {"core_seconds": plain, "seconds": plain / cores},
        "bytes": {"embeddings": 2 * num_samples * dim, "sorted": 2 * num_samples * dim},
    }


def format_selection_costs(costs: dict[str, Any], show_time: Callable[[float], str]) -> list[str]:
    """Lines of the plan."""
    stages = costs["stages"]
    total, gib = sum(stage["seconds"] for stage in stages.values()), 2**30
    return [
        f"clusters          {costs['clusters']:,} of {costs['dim']} dimensions; on {costs['cores']} cores as {costs['core']}, without a "
        f"GPU, {show_time(total)} per round: " + ", ".join(f"{name} {show_time(stage['seconds'])}" for name, stage in stages.items()),
        f"                  a matrix-vector product for each pick, on as many cores: {show_time(costs['plain_choice']['seconds'])}",
        f"                  disk {sum(costs['bytes'].values()) / gib:.1f} GiB while a round selects, half of it until the next",
    ]
