"""The training loop: reads top to bottom as the algorithm."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupmates.config import Config, RunPaths, UserError, check_world_size, config_to_dict, learning_rate, refresh_number
from megatron_groupmates.model.batch import DocumentRules, training_batch
from megatron_groupmates.model.gpt import build_gpt, token_logits
from megatron_groupmates.model.losses import token_losses
from megatron_groupmates.model.sizes import model_size
from megatron_groupmates.parallel import ParallelGroups, resolve_precision
from megatron_groupmates.pool.contexts import choose_packing
from megatron_groupmates.pool.exclusion import open_exclusion
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, append_entry
from megatron_groupmates.training import engine as checkpoints
from megatron_groupmates.training.data import TrainingData, check_same_tokenizer, open_pool
from megatron_groupmates.training.engine import Progress
from megatron_groupmates.training.evaluation import evaluation_loss
from megatron_groupmates.training.heldout import HeldOutData
from megatron_groupmates.training.live_order import LiveOrder, consumed_log_digest
from megatron_groupmates.training.metrics import MetricsFile, read_training_state, write_training_state
from megatron_groupmates.training.optimizer import set_learning_rate
from megatron_groupmates.training.skipping import DamageGuard
from megatron_groupmates.utils.progress import progress_bar
from megatron_groupmates.utils.run_directory import find_checkpoint
from megatron_groupmates.utils.tracking import open_tracker

logger = logging.getLogger(__name__)


def train(config: Config, groups: ParallelGroups) -> str:
    """Train from the newest checkpoint, or from the start, to ``train_iters``. Collective: every rank must call.

    Returns:
        ``finished``, or ``awaiting_selection`` when inline mode hands the GPUs to the selection server.

    Raises:
        UserError: bad pool, checkpoint or combination of settings.
    """
    trainer = Trainer(config, groups)
    try:
        return trainer.run()
    finally:
        trainer.close()


class Trainer:
    """Everything one rank holds while it trains."""

    def __init__(self, config: Config, groups: ParallelGroups) -> None:
        self.config = config
        self.groups = groups
        self.paths = RunPaths.of(config)
        data_parallel_size = check_world_size(config, groups.world_size)
        assert data_parallel_size == groups.data_size

        self.pool = open_pool(config, config.data.pool, "data.pool")
        self.exclusion = open_exclusion(config, self.pool)
        self.packing = choose_packing(self.pool, config.data.packing, config.model.sequence_length)
        self.rules = DocumentRules.of(config, self.pool.eot_id)
        model = build_gpt(
            config,
            groups,
            config.parallel.tensor_model_parallel_size,
            resolve_precision(config.training.precision),
            for_training=True,
        )
        self.engine = checkpoints.build_engine(config, model, groups)
        self.step, self.consumed_train_samples = 0, 0
        progress = self._load_checkpoint()
        self.order = self._resume_order(progress)
        earlier = read_training_state(self.paths)
        self._farthest_samples = max(self.consumed_train_samples, earlier.get("farthest_train_samples", 0))
        self.guard = DamageGuard(config, self.paths, self.pool, groups, self._farthest_samples, self._record_event)
        if progress is not None and self.guard.digest(progress.consumed_train_samples) != progress.skips_digest:
            raise UserError(f"{self.paths.skipped_samples} is not the one the checkpoint was trained with; restore it from a copy")
        self.data = TrainingData(config, self.pool, self.order, groups, self.consumed_train_samples, self.guard.settle)
        self.evaluation = self._open_evaluation()

        self.tracker = open_tracker(
            config.run.wandb_project,
            config.run.name,
            config.run.wandb_mode if groups.is_main else "disabled",
            self.paths.root,
            config_to_dict(config),
        )
        self.metrics = MetricsFile(self.paths.metrics, self.step, groups.is_main, self.tracker.log)
        self.adopter = self._open_adopter()
        self._earlier_seconds = earlier.get("seconds", 0.0)
        self._branch_step = earlier.get("branch_step", self.step)
        self._started = time.monotonic()

    def run(self) -> str:
        """The loop. Collective: every rank must call."""
        config, batch = self.config, self.config.training.global_batch_size
        bar = progress_bar(config.training.train_iters, "training", unit="step", initial=self.step, enabled=self.groups.is_main)
        if self.step == self._branch_step and self.step < config.training.train_iters:
            self._evaluate()
        while self.step < config.training.train_iters:
            if self.adopter is not None:
                if self.adopter.awaits_inline_round(self.step):
                    self._record_state("awaiting_selection")
                    return "awaiting_selection"
                self.adopter.at_step_boundary(self.step, self.data.sampler.issued_samples)
            started = time.perf_counter()
            rate = learning_rate(config, self.step + 1)
            totals = self._train_step(rate)
            self.step += 1
            self.consumed_train_samples += batch
            bar.update()
            if self.step % config.training.log_interval == 0:
                self._log(totals, rate, time.perf_counter() - started)
            if self.step % config.training.eval_interval == 0 or self.step == config.training.train_iters:
                self._evaluate()
            if self._saves_here():
                self._save()
        bar.close()
        self._record_state("finished")
        return "finished"

    def close(self) -> None:
        """Release what outlives the loop."""
        self.tracker.close()

    def _train_step(self, rate: float) -> torch.Tensor:
        """One optimizer step; float32[3] sums over this rank's tokens: cross-entropy, squared log-partition, scored tokens."""
        set_learning_rate(self.engine.optimizer, rate)
        totals = torch.zeros(3, device=self.groups.device)
        for samples, unscored in self.data.step_batches():
            batch = training_batch(samples, self.rules, unscored)
            logits = token_logits(self.engine, batch.tokens, batch.attention_mask, batch.position_ids)
            losses = token_losses(logits, batch.labels, self.groups.tensor_group)
            self.engine.backward(losses.training_loss(self.config.model.z_loss))
            self.engine.step()
            totals += torch.stack((losses.cross_entropy, losses.squared_log_partition, losses.num_tokens)).detach()
        return totals

    def _load_checkpoint(self) -> Progress | None:
        found = find_checkpoint(self.config)
        if found is None:
            return None
        progress = checkpoints.load(self.engine, *found)
        if progress.pool_fingerprint != self.pool.fingerprint:
            raise UserError(
                f"data.pool: {self.pool.directory} (fingerprint {self.pool.fingerprint[:16]}) is not the pool that the checkpoint in "
                f"{found[0]} was trained on ({progress.pool_fingerprint[:16]}); give the same pool, or start a new run"
            )
        if progress.packing != self.packing.name:
            raise UserError(
                f"data.packing: the checkpoint in {found[0]} was trained with packing {progress.packing}, this run has "
                f"{self.packing.name}, under which its sample numbers mean other data; use the same data.packing and "
                "model.sequence_length, or start a new run"
            )
        self.step, self.consumed_train_samples = progress.step, progress.consumed_train_samples
        logger.info("continuing from step %d of %s", self.step, found[0])
        return progress

    def _resume_order(self, progress: Progress | None) -> LiveOrder:
        entries, masks = self._generation_log()
        order = LiveOrder(
            self.pool.num_samples, self.config.run.seed, entries, masks, self._commit_epoch, self.exclusion.mask, self.packing
        )
        if progress is not None:
            if not self.config.selection.enabled:
                order.ensure(progress.consumed_train_samples)  # no file keeps the epochs that have begun
            found = consumed_log_digest(order.current.entries, progress.consumed_train_samples, self.exclusion.digest)
            if found != progress.log_digest:
                raise UserError(
                    f"the generation log of {self.paths.root} is not the one the checkpoint was trained with (digest {found[:16]}, "
                    f"checkpoint says {progress.log_digest[:16]}); restore selection/log.jsonl of that run, or what data.exclude names"
                )
        return order

    def _generation_log(self) -> tuple[tuple[LogEntry, ...], dict[int, Any]]:
        """The log in force; with selection off it is the whole pool for ever, and no selection code is imported."""
        if not self.config.selection.enabled:
            return whole_pool_log(self.pool)
        from megatron_groupmates.training.adoption import open_generation_log

        return open_generation_log(self.config, self.pool, self.exclusion, self.groups, self.consumed_train_samples)

    def _commit_epoch(self, entry: LogEntry) -> None:
        if self.config.selection.enabled:
            if self.groups.is_main:
                append_entry(self.paths.generation_log, entry)
            self.groups.barrier()
        logger.info("the samples on offer run out at sample %d: epoch %d begins there", entry.effective_sample, entry.epoch)

    def _open_adopter(self) -> Any:
        if not self.config.selection.enabled:
            return None
        from megatron_groupmates.training.adoption import GenerationAdopter

        return GenerationAdopter(self.config, self.pool, self.order, self.groups, self.metrics.write)

    def _open_evaluation(self) -> HeldOutData | None:
        path = self.config.data.evaluation
        if path is None:
            return None
        pool = open_pool(self.config, path, "data.evaluation")
        check_same_tokenizer(self.pool, pool, "data.evaluation")
        return HeldOutData(
            pool,
            self.config.model.sequence_length,
            self.config.training.eval_samples,
            self.config.training.micro_batch_size,
            self.groups,
            self.groups.tensor_size if self.config.parallel.sequence_parallel else 1,
        )

    def _record_event(self, row: dict[str, Any]) -> None:
        self.metrics.write({"step": self.step, **row})

    def _position(self) -> dict[str, int]:
        return {
            "step": self.step,
            "consumed_train_samples": self.consumed_train_samples,
            "consumed_tokens": self.consumed_train_samples * self.config.model.sequence_length,
        }

    def _log(self, totals: torch.Tensor, rate: float, seconds: float) -> None:
        dist.all_reduce(totals, group=self.groups.data_group)
        cross_entropy, squared_log_partition, num_tokens = totals.tolist()
        num_tokens = max(num_tokens, 1.0)  # every sample of the step may have been left out
        norm = self.engine.get_global_grad_norm()  # None without ZeRO in float32: DeepSpeed clips by it and forgets it
        self.metrics.write(
            {
                **self._position(),
                "loss": cross_entropy / num_tokens,
                "z_loss": self.config.model.z_loss * squared_log_partition / num_tokens,
                **({} if norm is None else {"grad_norm": float(norm)}),
                "learning_rate": rate,
                "generation": self.order.current.generation(self.consumed_train_samples - 1),
                "seconds": round(seconds, 4),
                "tokens_per_second": round(num_tokens / seconds, 1),
            }
        )
        self._record_state("running")

    def _evaluate(self) -> None:
        if self.evaluation is None or self.groups.broadcast_object(self.metrics.has_evaluation(self.step)):
            return
        self.engine.eval()
        loss = evaluation_loss(self.engine, self.evaluation, self.groups, self.rules)
        self.engine.train()
        self.metrics.write({**self._position(), "evaluation_loss": loss})

    def _saves_here(self) -> bool:
        config = self.config
        return (
            self.step % config.checkpoint.save_interval == 0
            or self.step == config.training.train_iters
            or refresh_number(config, self.step) is not None
        )

    def _save(self) -> None:
        digest = consumed_log_digest(self.order.current.entries, self.consumed_train_samples, self.exclusion.digest)
        checkpoints.save(
            self.engine,
            self.config,
            self.paths.checkpoints,
            Progress(
                step=self.step,
                consumed_train_samples=self.consumed_train_samples,
                log_digest=digest,
                pool_fingerprint=self.pool.fingerprint,
                packing=self.packing.name,
                skips_digest=self.guard.digest(self.consumed_train_samples),
            ),
        )

    def _record_state(self, state: str) -> None:
        if self.groups.is_main:
            seconds = self._earlier_seconds + time.monotonic() - self._started
            per_token = model_size(self.config).training_flops_per_token
            batch_tokens = self.config.training.global_batch_size * self.config.model.sequence_length
            write_training_state(
                self.paths,
                state,
                **self._position(),
                farthest_train_samples=max(self._farthest_samples, self.consumed_train_samples),
                branch_step=self._branch_step,
                seconds=round(seconds, 2),
                flops=per_token * batch_tokens * self.step,
                branch_tokens=self._branch_step * batch_tokens,
            )


def whole_pool_log(pool: PoolIndex) -> tuple[tuple[LogEntry, ...], dict[int, Any]]:
    """The log of a run that never selects: generation 0, every sample of the pool (but those excluded)."""
    entry = LogEntry(generation=0, effective_sample=0, epoch=0, digest="")
    return (entry,), {0: np.ones(pool.num_samples, dtype=bool)}
