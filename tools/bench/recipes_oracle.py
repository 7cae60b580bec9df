"""The checkpoint of one job as a probe: features, rollouts and their losses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_groupmates.config import Config
from megatron_groupmates.influence.labels import Standardiser, influence_labels
from megatron_groupmates.parallel import ParallelGroups, resolve_precision
from megatron_groupmates.pool.index import PoolIndex
from tools.bench.recipes_scale import Scale

LENGTH = 10
Kept = Callable[[str, Callable[[], np.ndarray]], np.ndarray]
"""Name and computation of an array -> the array, from a file where an earlier run left one."""


class Measured:
    """What all arms of a job share. Samples are numbered within the pool's available rows.

    Args:
        config: of the warm-up.
        scale: sizes.
        groups: of this process.
        pool: the run's pool.
        available: int64, rows that the warm-up has not consumed.
        seed: decides candidates and rollouts.
        kept: keeps what is measured.

    Attributes:
        features: float32 ``[n, F]`` of the available rows.
        reference_features: float32 ``[m, F]``.
        candidates: int64, samples that an arm's rollouts are of.
        random: int64 ``[R, T]``, random rollouts of candidates.
        held_out: int64 ``[H, T]``, rollouts of other samples.
        targets: float64 ``[H, T]``, their exact momentum-corrected influences, standardised per position.
    """

    def __init__(
        self, config: Config, scale: Scale, groups: ParallelGroups, pool: PoolIndex, available: np.ndarray, seed: int, kept: Kept
    ) -> None:
        from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
        from megatron_groupmates.influence.encoder import ProbeEncoder, encode_rows
        from megatron_groupmates.influence.oracle import draw_random_rollouts
        from megatron_groupmates.influence.probe import Probe
        from megatron_groupmates.influence.reference import load_reference
        from megatron_groupmates.model.batch import DocumentRules
        from megatron_groupmates.model.gpt import build_gpt
        from megatron_groupmates.server.context import sample_reader
        from megatron_groupmates.training.engine import checkpoint_tag

        self._kept, rules = kept, DocumentRules.of(config, pool.eot_id)
        reference_pool = PoolIndex.open(config.data.reference)
        reference = load_reference(reference_pool, scale.sequence_length, scale.reference_samples, groups.device)
        model = build_gpt(config, groups, 1, resolve_precision(config.training.precision))
        self._probe = Probe(model, config, groups, reference, config.oracle.reference_batch_size, rules)
        self._probe.load(ZeroCheckpoint(f"{config.run.output_dir}/checkpoints/{checkpoint_tag(scale.warmup_steps)}"))
        encoder = ProbeEncoder(model, scale.hidden_size, rules)

        def encode(source: PoolIndex, rows: np.ndarray) -> np.ndarray:
            return encode_rows(encoder, rows, source.lengths[rows], sample_reader(source, groups.device, scale.sequence_length), 64)

        self.features = kept("features", lambda: encode(pool, available))
        first = np.arange(min(scale.reference_samples, reference_pool.num_samples))
        self.reference_features = kept("reference-features", lambda: encode(reference_pool, first))
        read = sample_reader(pool, groups.device, scale.sequence_length)
        self._read = lambda numbers: read(available[numbers])

        drawn = np.random.default_rng(seed).permutation(len(available))
        others = drawn[: scale.held_out_candidates]
        self.candidates = np.sort(drawn[scale.held_out_candidates :][: scale.candidates])
        self.random = self.candidates[draw_random_rollouts(scale.rollouts, LENGTH, len(self.candidates), seed)]
        self.held_out = others[draw_random_rollouts(scale.held_out_rollouts, LENGTH, len(others), seed + 1)]
        exact = self.losses("held-out", self.held_out, "exact", scale.oracle_learning_rate)
        labels = influence_labels(exact, "momentum_corrected", config.optimizer.beta1)
        self.targets = Standardiser.fit(labels, "per_position").apply(labels)

    def losses(self, name: str, rollouts: np.ndarray, estimator: str, learning_rate: float) -> np.ndarray:
        """Reference losses float64 ``[R, T + 1]`` of ``rollouts``, kept as ``name``."""
        from megatron_groupmates.influence.oracle import measure_rollouts

        return self._kept(name, lambda: measure_rollouts(self._probe, rollouts, self._read, learning_rate, estimator))


def available_rows(pool: PoolIndex, config: Config) -> np.ndarray:
    """Pool rows int64 that a run without selection has not consumed at its end."""
    from megatron_groupmates.training.live_order import LiveOrder
    from megatron_groupmates.training.loop import whole_pool_log

    order = LiveOrder(pool.num_samples, config.run.seed, *whole_pool_log(pool), commit=lambda entry: None)
    consumed = order.rows(0, config.training.train_iters * config.training.global_batch_size)
    return np.setdiff1d(np.arange(pool.num_samples), consumed)


def exact_for_same_flops(first_order: int, reference_samples: int) -> int:
    """Exact rollouts for the FLOPs of so many first-order ones, at least 8 so that a fit can be split from them.

    In forward passes of one sample: a rollout's steps take 3 each; the exact one evaluates the reference after each, the
    first-order one takes its gradient once.
    """
    flops = 3 * LENGTH * first_order + 3 * reference_samples
    return max(8, int((flops - reference_samples) / (LENGTH * (3 + reference_samples))))
