"""One seed on one pool: warm-up, rollouts, and every arm from the warm-up's checkpoint. Resumable: what is done is kept as files."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_groupmates.config import Config, learning_rate
from megatron_groupmates.influence.metrics import spearman
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.parallel import ParallelGroups, initialize_parallel, read_launch_environment
from megatron_groupmates.pool.generation import publish, write_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.utils.files import atomic_file, read_json, sha256_bytes, write_json
from tools.bench.recipes_adapter import Choices, bootstrap, default_choices, fit, make_arms, predict, select
from tools.bench.recipes_families import FAMILIES_FILE, family_counts
from tools.bench.recipes_oracle import LENGTH, Measured, available_rows, exact_for_same_flops
from tools.bench.recipes_scale import Scale, make_config


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker process does: the missing ``arms`` of one seed on one pool."""

    output: Path
    scale: Scale
    pool: str
    seed: int
    arms: tuple[str, ...]

    @property
    def directory(self) -> Path:
        """Everything of this seed and pool."""
        return self.output / "jobs" / f"{self.pool}-seed{self.seed}"

    def result(self, arm: str) -> Path:
        """JSON of a finished arm."""
        return self.directory / "results" / f"{arm}.json"

    def rows(self, arm: str) -> Path:
        """Pool rows int64 that an arm selected."""
        return self.directory / "rows" / f"{arm}.npy"

    def missing(self) -> list[str]:
        """Arms without a result."""
        return [arm for arm in self.arms if not self.result(arm).exists()]


def run_task(task: Task) -> None:
    """In a process of its own: what it prints goes to ``log.txt`` of the task's directory."""
    task.directory.mkdir(parents=True, exist_ok=True)
    parent = os.getppid()
    with open(task.directory / "log.txt", "a") as log, open(task.directory / "lock", "w") as lock:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        fcntl.flock(lock, fcntl.LOCK_EX)  # a worker whose parent was killed may still be at it
        if not task.missing():
            return
        rendezvous = task.directory / f"rendezvous-{os.getpid()}"
        groups = initialize_parallel(read_launch_environment({}), 1, seed=task.seed, init_method=f"file://{rendezvous}")
        if task.scale.device == "cpu":
            torch.set_num_threads(1)
        try:
            job = Job(task, groups)
            for arm in task.missing():
                if os.getppid() != parent:
                    return
                job.run(arm)
        finally:
            torch.distributed.destroy_process_group()
            rendezvous.unlink(missing_ok=True)


class Job:
    """A warmed-up checkpoint with its measured rollouts, from which arms are selected and trained."""

    def __init__(self, task: Task, groups: ParallelGroups) -> None:
        self.task, self.scale, self.groups = task, task.scale, groups
        self.seconds: dict[str, float] = {}
        self._models: dict[Choices, tuple[RelationalModel | None, dict[str, Any]]] = {}
        self.data = task.output / "data"
        self.config = make_config(task.scale, self.data, task.pool, task.seed, task.directory / "warmup")
        self.pool = PoolIndex.open(self.config.data.pool)
        self.arms = make_arms(default_choices(self.config, self.scale.oracle_learning_rate))
        with self.timing("warmup"):
            self._warm_up()
        self.available = available_rows(self.pool, self.config)
        with self.timing("features and held-out rollouts"):
            self.measured = Measured(self.config, self.scale, groups, self.pool, self.available, task.seed, self._kept)

    @contextlib.contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Adds the block's CPU seconds to those of ``part``: on a core of its own the process takes little longer by the clock."""
        started = time.process_time()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.process_time() - started, 2)

    def run(self, arm: str) -> None:
        """Select, train and keep the result of one arm."""
        choices = self.arms[arm]
        model, facts = (None, {}) if choices is None else self._learned(dataclasses.replace(choices, share=""))
        if model is not None:
            relations = arm != "individual"
            predictions = predict(model, self.measured.features, self.measured.held_out, relations)
            targets = self.measured.targets
            facts = {
                **facts,
                "spearman": spearman(predictions, targets),
                "spearman_first": spearman(predictions[:, 0], targets[:, 0]),
            }
        with self.timing("select"):
            rows = self._select(arm, choices, model)
        with self.timing("train"):
            losses = self._arm_losses(rows)
        with atomic_file(self.task.rows(arm)) as file:
            np.save(file, rows)
        result = {"arm": arm, "pool": self.task.pool, "seed": self.task.seed, **losses, "fit": facts or None}
        result |= {"selected": len(rows), "kinds": self._kinds(rows), "families": self._families(rows), "seconds": self.seconds}
        write_json(self.task.result(arm), {**result, "choices": None if choices is None else dataclasses.asdict(choices)})
        self.seconds = {}

    def _learned(self, choices: Choices) -> tuple[RelationalModel | None, dict[str, Any]]:
        """The final model and facts of its fit, learned once for all arms of the same ``choices``."""
        if choices not in self._models:
            self._models[choices] = self._learn(choices)
        return self._models[choices]

    def _learn(self, choices: Choices) -> tuple[RelationalModel | None, dict[str, Any]]:
        """Rollouts and both fits; no model where the sign check refused every fit."""
        measured, seed = self.measured, self.task.seed
        rate = choices.learning_rate or learning_rate(self.config, self.scale.warmup_steps + 1)
        total = self.scale.rollouts
        if choices.estimator == "exact":
            total = exact_for_same_flops(total, self.scale.reference_samples)
        extra = 0 if choices.bootstrap == "none" else min(round(self.scale.bootstrap_share * total), total - 4)
        rollouts = measured.random[: total - extra]
        with self.timing("oracles"):
            # All of them: another choice of bootstrap uses the rest.
            name = f"random-{choices.estimator}-{rate:g}"
            losses = measured.losses(name, measured.random[:total], choices.estimator, rate)[: total - extra]
        with self.timing("fit"):
            result = fit(measured.features, rollouts, losses, choices, self.config, seed)
        refused = int(result.model is None)
        if extra and result.model is not None:
            with self.timing("bootstrap"):
                numbers = measured.candidates
                more = bootstrap(result.model, measured.features[numbers], extra, LENGTH, choices.bootstrap, seed)
            with self.timing("oracles"):
                name = "bootstrap-" + sha256_bytes(repr(choices).encode())[:16]
                rollouts = np.concatenate([rollouts, numbers[more]])
                losses = np.concatenate([losses, measured.losses(name, numbers[more], choices.estimator, rate)])
            with self.timing("fit"):
                result = fit(measured.features, rollouts, losses, choices, self.config, seed)
            refused += int(result.model is None)
        facts = {
            "accepted": result.model is not None,
            "refused_fits": refused,
            "random_rollouts": total - extra,
            "bootstrap_rollouts": len(rollouts) - (total - extra),
            "bootstrap_samples": len(np.unique(rollouts[total - extra :])),
        }
        return result.model, facts

    def _select(self, arm: str, choices: Choices | None, model: RelationalModel | None) -> np.ndarray:
        """Pool rows int64 of one arm; random ones where no fit was accepted: training would go on with the whole pool."""
        method = arm if arm in ("random", "similarity", "individual") else "group"
        if choices is not None and model is None:
            method = "random"
        lengths = self.pool.lengths[self.available].astype(np.int64)
        budget = self.scale.arm_steps * self.scale.batch * (self.scale.sequence_length + 1)
        chosen = select(
            method,
            choices,
            model,
            self.measured.features,
            self.measured.reference_features,
            lengths,
            budget,
            self.config,
            self.task.seed,
        )
        return self.available[chosen]

    def _arm_losses(self, rows: np.ndarray) -> dict[str, float]:
        """Evaluation loss at the checkpoint and after training on ``rows``; equal selections are trained on once."""
        name = f"arm-{sha256_bytes(rows.tobytes())[:16]}"
        path = self.task.directory / "losses" / f"{name}.json"
        if not path.exists():
            run = self.task.directory / name
            shutil.rmtree(run, ignore_errors=True)  # of a killed worker
            config = make_config(self.scale, self.data, self.task.pool, self.task.seed, run, branch=self.task.directory / "warmup")
            write_generation(run / "selection", 1, self.pool, rows, {"method": "given"})
            publish(run / "selection", 1)
            self._train(config)
            found = [row for row in _metrics(run) if "evaluation_loss" in row or row.get("event") == "adoption"]
            losses = [row["evaluation_loss"] for row in found if "evaluation_loss" in row]
            assert any(row.get("generation") == 1 for row in found), f"{run} did not adopt its generation"
            write_json(path, {"start_loss": losses[0], "loss": losses[-1]})
            shutil.rmtree(run)
        return read_json(path)

    def _warm_up(self) -> None:
        finished = self.task.directory / "warmup" / "finished"
        if not finished.exists():
            shutil.rmtree(finished.parent, ignore_errors=True)
            self._train(self.config)
            finished.touch()

    def _train(self, config: Config) -> None:
        from megatron_groupmates.training.loop import train
        from megatron_groupmates.utils.run_directory import write_run_config

        write_run_config(config)
        train(config, self.groups)

    def _kept(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        path = self.task.directory / "measured" / f"{name}.npy"
        if not path.exists():
            values = compute()
            with atomic_file(path) as file:
                np.save(file, values)
        return np.load(path)

    def _kinds(self, rows: np.ndarray) -> dict[str, int]:
        counts = np.bincount(self.pool.kind_of[rows], minlength=len(self.pool.kinds))
        return dict(zip(self.pool.kinds, counts.tolist(), strict=True))

    def _families(self, rows: np.ndarray) -> dict[str, float]:
        return family_counts(np.load(Path(self.config.data.pool) / FAMILIES_FILE), rows)


def _metrics(run: Path) -> list[dict[str, Any]]:
    from megatron_groupmates.config import RunPaths
    from megatron_groupmates.utils.files import read_lines

    return read_lines(RunPaths.below(run).metrics)
