"""What the stages of one round share, and how a stage's result is kept so that a killed round goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_groupmates import __version__
from megatron_groupmates.config import Config, RunPaths, UserError, config_to_dict, oracle_learning_rate
from megatron_groupmates.influence.oracle import ReadSamples
from megatron_groupmates.model.batch import Samples
from megatron_groupmates.model.sizes import ModelSize, model_size
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.pool.exclusion import Exclusion
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.order import derive_key
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.references.examples import held_out_fingerprint
from megatron_groupmates.server.recipe import Recipe, resolve_recipe
from megatron_groupmates.server.stage_names import stage_text
from megatron_groupmates.utils.files import append_line, atomic_file, read_json, sha256_json, write_json
from megatron_groupmates.utils.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class RoundInput:
    """What a round starts from, the same on every rank.

    Attributes:
        number: of the generation it publishes.
        tag_dir: the checkpoint's directory.
        step: the checkpoint's.
        consumed_train_samples: global samples trained on at the checkpoint.
        learning_rate: the trainer's at its next step where the checkpoint says it; None to follow the config's schedule.
    """

    number: int
    tag_dir: Path
    step: int
    consumed_train_samples: int
    learning_rate: float | None = None

    @property
    def tag(self) -> str:
        """Name of the checkpoint."""
        return self.tag_dir.name


class RoundContext:
    """One round's directory, data and bookkeeping. Methods marked collective are called by every rank.

    Attributes:
        stopwatch: times the probe's work.
        rates: of the stage at work, recorded with its costs.
    """

    def __init__(self, config: Config, groups: ParallelGroups, pool: PoolIndex, given: RoundInput, exclusion: Exclusion) -> None:
        self.config = config
        self.groups = groups
        self.pool = pool
        self.input = given
        self.exclusion = exclusion
        self.recipe: Recipe = resolve_recipe(config)
        self.paths = RunPaths.of(config)
        self.directory = self.paths.round(given.number)
        self.size: ModelSize = model_size(config)
        self.read_samples = sample_reader(pool, groups.device, config.model.sequence_length)
        self.stopwatch = Stopwatch()
        self.rates: dict[str, Any] = {}

    def seed(self, purpose: str) -> int:
        """A seed of its own for each purpose in each round."""
        return derive_key(self.config.run.seed, "round", self.input.number, purpose) % 2**31

    @property
    def oracle_learning_rate(self) -> float:
        """Of the oracle's steps from this checkpoint."""
        return oracle_learning_rate(self.config, self.input.step, self.input.learning_rate)

    def begin(self, reference_pool: PoolIndex) -> None:
        """Bind the directory to this checkpoint, data and settings; work for others is moved aside. Collective."""
        facts = {
            "number": self.input.number,
            "tag": self.input.tag,
            "step": self.input.step,
            "consumed_train_samples": self.input.consumed_train_samples,
            "pool_fingerprint": self.pool.fingerprint,
            "reference_fingerprint": held_out_fingerprint(reference_pool),
            **self.exclusion.provenance,
            "code_version": __version__,
            "settings": _settings_digest(self.config),
        }
        if self.groups.is_main:
            path = self.directory / "round.json"
            if self.directory.exists() and (not path.exists() or read_json(path) != facts):
                aside = self.directory.with_name(f"{self.directory.name}.stale-{time.time_ns()}")
                logger.info(
                    "round %d: earlier work was for another checkpoint or other settings; moved to %s",
                    self.input.number,
                    aside,
                )
                self.directory.rename(aside)
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(path, facts)
        self.groups.barrier()

    def stage(self, name: str, collect: Callable[[], Arrays], work: Callable[[], None] | None = None, flops: float = 0.0) -> None:
        """Run a stage and keep its arrays, unless an earlier run finished it. Collective.

        Args:
            name: of the stage and of the file that keeps its result.
            collect: called on the main rank alone; the arrays to keep.
            work: called before it on every rank; what it leaves for ``collect`` lies in files.
            flops: of the stage, for the report.
        """
        path = self.directory / f"{name}.npz"
        if self.groups.broadcast_object(path.exists()):
            return
        with self.bookkeeping(name, flops):
            if work is not None:
                self.together(work)
            self.on_main(lambda: self._keep(path, collect()))

    def together(self, act: Callable[[], Result]) -> Result:
        """``act()`` on every rank; a UserError of one is raised on all, so that they fail the round together. Collective."""
        result, problem = None, None
        try:
            result = act()
        except UserError as error:
            problem = error
        messages: list[str | None] = [None] * self.groups.world_size
        dist.all_gather_object(messages, None if problem is None else str(problem))
        for message in messages:
            if message is not None:
                raise UserError(message) from problem
        return result  # type: ignore[return-value]

    def on_main(self, act: Callable[[], object]) -> None:
        """``act()`` on the main rank alone; its UserError is raised on all, and none goes on before it is done. Collective."""
        self.together(lambda: act() if self.groups.is_main else None)

    @staticmethod
    def _keep(path: Path, arrays: Arrays) -> None:
        with atomic_file(path) as file:
            np.savez(file, **arrays)

    def arrays(self, name: str) -> Arrays:
        """What a finished stage kept."""
        with np.load(self.directory / f"{name}.npz") as content:
            return {key: content[key] for key in content.files}

    @contextlib.contextmanager
    def bookkeeping(self, name: str, flops: float) -> Iterator[None]:
        """Announce a stage, and record its seconds, FLOPs and the :attr:`rates` it left when it is done."""
        logger.info("round %d: %s", self.input.number, stage_text(name))
        write_server_state(self, name)
        started, self.rates = time.monotonic(), {}
        yield
        if self.groups.is_main:
            cost = {"seconds": round(time.monotonic() - started, 3), "flops": float(flops), **self.rates}
            append_line(self.paths.server_metrics, json.dumps({"round": self.input.number, "step": self.input.step, "stage": name, **cost}))
            write_json(self.directory / f"{name}.stage.json", cost)

    def stage_costs(self) -> dict[str, Any]:
        """Seconds and FLOPs of every finished stage."""
        return {path.name.removesuffix(".stage.json"): read_json(path) for path in sorted(self.directory.glob("*.stage.json"))}


def _settings_digest(config: Config) -> str:
    """Identifies the settings that a round's results depend on. How the optimizer's state is divided is not among them."""
    tree = config_to_dict(config)
    sections = {section: tree[section] for section in ("model", "optimizer", "selection", "oracle", "relational")}
    del sections["optimizer"]["zero_stage"]
    return sha256_json(sections)


def sample_reader(pool: PoolIndex, device: torch.device, sequence_length: int) -> ReadSamples:
    """A function from pool rows int64 ``[n]`` to their tokens on ``device``, of longer documents the first that the model reads."""
    reader, limit = PoolReader(pool), sequence_length + 1

    def read(rows: np.ndarray) -> Samples:
        if (pool.lengths[rows] == limit).all():
            return torch.from_numpy(reader.read_batch(rows)).to(device)
        return [torch.from_numpy(tokens[:limit]).to(device) for tokens in reader.read_many(rows)]

    return read


def num_inputs(context: RoundContext, pool: PoolIndex, rows: np.ndarray) -> int:
    """Tokens that the model reads when each of the ``rows`` is a sample of its own."""
    return int(np.minimum(pool.lengths[rows] - 1, context.config.model.sequence_length).sum(dtype=np.int64))


def write_server_state(context: RoundContext, stage: str, **progress: Any) -> None:
    """Tell ``status`` where the server stands, and how far the stage has come. Does nothing but on the main rank."""
    record_server_state(
        context.paths,
        context.groups,
        "selecting",
        round=context.input.number,
        stage=stage,
        checkpoint_tag=context.input.tag,
        **progress,
    )


def record_server_state(paths: RunPaths, groups: ParallelGroups, state: str, **facts: Any) -> None:
    """Replace ``server.json`` on the main rank."""
    if groups.is_main:
        write_json(paths.server_state, {"state": state, **facts, "updated": round(time.time(), 1)})
