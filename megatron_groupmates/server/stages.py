"""The stages of a round: each computes one artefact from those before it. All are collective: every rank calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupmates.influence.bootstrap import bootstrap_rollouts
from megatron_groupmates.influence.encoder import Encoder, encode_rows
from megatron_groupmates.influence.fit import FitReport, FitResult, FitSettings, fit_relational
from megatron_groupmates.influence.labels import influence_labels
from megatron_groupmates.influence.oracle import measure_rollouts
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.chunks import Chunks
from megatron_groupmates.server.context import Arrays, RoundContext, num_inputs, sample_reader
from megatron_groupmates.utils.files import read_json, write_json

_EMBED_CHUNK_ROWS = 8192


def choose_candidates(context: RoundContext, available: np.ndarray) -> np.ndarray:
    """Pool rows int64 ``[num_candidates]`` the rollouts are drawn from: uniform among the ``available`` rows that have a target."""
    available = available[context.pool.lengths[available] > 1]
    generator = np.random.default_rng(context.seed("candidates"))
    count = min(context.config.oracle.num_candidates, len(available))
    return np.sort(generator.choice(available, size=count, replace=False))


def step_tokens(context: RoundContext, candidates: np.ndarray, evaluated: int) -> tuple[float, float]:
    """Tokens of one step of a rollout on a sample of the ``candidates``: what the model reads, and how many forward passes that is worth.

    ``evaluated`` tokens are read after the step; a training step costs three forward passes.
    """
    sample = num_inputs(context, context.pool, candidates) / len(candidates)
    return sample + evaluated, 3 * sample + evaluated


def measure_oracles(
    context: RoundContext, name: str, probe: Probe, candidates: np.ndarray, rollouts: np.ndarray, estimator: str
) -> np.ndarray:
    """Reference losses float64 ``[R, T + 1]`` of ``rollouts`` (candidate numbers int64 ``[R, T]``) by ``exact`` or ``first_order``.

    Oracle workers share the rollouts by chunks and write each when it is done; what an earlier run wrote is not measured
    again. A rollout's numbers do not depend on who measures it.
    """
    oracle = context.config.oracle

    def measure(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        return {
            "losses": measure_rollouts(
                probe,
                rollouts[first:stop],
                lambda numbers: context.read_samples(candidates[numbers]),
                context.oracle_learning_rate,
                estimator,
                done,
            )
        }

    chunks = Chunks(context, name, len(rollouts), oracle.chunk_rollouts)

    def collect() -> Arrays:
        return {**chunks.collect(), "estimator": np.array(estimator)}

    tokens, forward_tokens = step_tokens(context, candidates, probe.num_reference_tokens if estimator == "exact" else 0)
    context.stage(
        name,
        collect,
        lambda: chunks.work(measure, "rollout", rollouts.shape[1] * tokens),
        flops=rollouts.size * context.size.forward_flops_per_token * forward_tokens,
    )
    return context.arrays(name)["losses"]


def encode(context: RoundContext, encoder: Encoder, pool: PoolIndex, rows: np.ndarray, name: str) -> np.ndarray:
    """Features float32 ``[n, F]`` of ``rows`` of ``pool`` (the run's or a held-out one), encoded by all workers."""
    read_samples = sample_reader(pool, context.groups.device, context.config.model.sequence_length)
    batch_size = context.config.server.embed_batch_size

    def encode_chunk(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        part = rows[first:stop]
        return {"features": encode_rows(encoder, part, pool.lengths[part], read_samples, batch_size, done)}

    chunks = Chunks(context, name, len(rows), _EMBED_CHUNK_ROWS)
    context.stage(name, chunks.collect, lambda: chunks.work(encode_chunk, "sample"), flops=_encoding_flops(context, pool, rows))
    return context.arrays(name)["features"]


def fit_model(
    context: RoundContext, name: str, features: np.ndarray, rollouts: np.ndarray, losses: np.ndarray, dense: np.ndarray | None
) -> tuple[RelationalModel | None, FitReport]:
    """Fit on ``rollouts`` with ``losses``; None when every fit came out with the wrong sign. Kept as ``<name>/``.

    ``dense`` labels of all candidates, ``[num_candidates]``, enter as rollouts of length one.
    """
    directory = context.directory / name
    if not context.groups.broadcast_object((directory / "report.json").exists()):
        settings = context.recipe.fit
        with context.bookkeeping(name, fit_flops(settings, rollouts, features)):
            labels = influence_labels(losses, context.recipe.labels, context.config.optimizer.beta1)
            # On the groups' device: NCCL sums no gradients that lie in host memory.
            inputs = torch.from_numpy(features[rollouts]).to(context.groups.device)
            individual = None if dense is None else (features, dense)
            result: FitResult = fit_relational(inputs, labels, settings, context.seed("fit"), dist.group.WORLD, individual=individual)
            if context.groups.is_main:
                directory.mkdir(parents=True, exist_ok=True)
                if result.model is not None:
                    result.model.save(directory)
                write_json(directory / "report.json", result.report)
        context.groups.barrier()
    report = read_json(directory / "report.json")
    return (RelationalModel.load(directory) if report["accepted"] else None), report


def fit_flops(settings: FitSettings, rollouts: np.ndarray, features: np.ndarray) -> float:
    """Of one fit to ``rollouts`` of samples with ``features``."""
    return 6.0 * rollouts.size * settings.epochs * features.shape[1] * (settings.embedding_dim or 1)


def draw_bootstrap(context: RoundContext, model: RelationalModel, features: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` rollouts int64 ``[R, T]`` (candidate numbers) that the model predicts best and worst (paper section 3.3)."""

    def collect() -> Arrays:
        embeddings, individual = embed_features(model, features)
        return {
            "rollouts": bootstrap_rollouts(
                embeddings,
                individual,
                model.relation_values(),
                count,
                context.config.oracle.rollout_length,
                context.recipe.bootstrap,
                context.seed("bootstrap"),
            )
        }

    context.stage("bootstrap", collect)
    return context.arrays("bootstrap")["rollouts"]


def embed_features(model: RelationalModel, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings h float32 ``[n, d]`` and individual influences s float64 ``[n]`` of features ``[n, F]``."""
    with torch.no_grad():
        h = model.embed(torch.from_numpy(features))
        return h.numpy(), model.individual(h).double().numpy()


def embed_pool(context: RoundContext, encoder: Encoder, model: RelationalModel | None, rows: np.ndarray) -> None:
    """Keep embeddings float16 ``[n, d]`` and individual influences float64 ``[n]`` of the pool ``rows`` that may be selected.

    Without a model (similarity to the reference) the embeddings are the encoder's features, float32, and the influences zero.
    """

    def embed(first: int, stop: int, done: Callable[[int], object]) -> Arrays:
        part = rows[first:stop]
        lengths, batch_size = context.pool.lengths[part], context.config.server.embed_batch_size
        features = encode_rows(encoder, part, lengths, context.read_samples, batch_size, done)
        if model is None:
            return {"embeddings": features, "individual": np.zeros(len(part))}
        h, s = embed_features(model, features)
        return {"embeddings": h.astype(np.float16), "individual": s}

    chunks = Chunks(context, "embeddings", len(rows), _EMBED_CHUNK_ROWS)
    context.stage("embeddings", chunks.collect, lambda: chunks.work(embed, "sample"), flops=_encoding_flops(context, context.pool, rows))


def last_good_model(context: RoundContext) -> tuple[RelationalModel, Path] | None:
    """The newest accepted ``final`` model of an earlier round of this run."""
    for number in range(context.input.number - 1, 0, -1):
        directory = context.paths.round(number) / "final"
        if (directory / "report.json").exists() and read_json(directory / "report.json")["accepted"]:
            return RelationalModel.load(directory), directory
    return None


def _encoding_flops(context: RoundContext, pool: PoolIndex, rows: np.ndarray) -> float:
    return float(num_inputs(context, pool, rows) * context.size.forward_flops_per_token)
