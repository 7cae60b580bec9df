"""Tiny GPT runs: config, pools of predictable and of random sequences, and run directories left by the real trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_groupmates.config import Config, config_from_dict
from megatron_groupmates.pool.index import PoolIndex
from tests.common.distributed import run_ranks
from tests.common.once import make_once
from tests.pool.helpers import make_pool

VOCABULARY, SEQUENCE_LENGTH, BATCH, TRAIN_ITERS = 256, 16, 4, 8
REFRESHES = (5, 7)
ROWS_PER_SHARD = (40, 56, 48)


def tiny_tree(root: Path | str, **changes: Any) -> dict[str, Any]:
    """The config of the run ``root/run`` with pools beside it, as plain dicts; ``section__key=value`` changes a setting."""
    root = Path(root)
    tree: dict[str, Any] = {
        "run": {"output_dir": str(root / "run"), "seed": 5, "wandb_mode": "disabled"},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 48,
            "sequence_length": SEQUENCE_LENGTH,
            "vocab_size": VOCABULARY,
            "z_loss": 1e-2,
        },
        "data": {"pool": str(root / "pool"), "reference": str(root / "reference"), "num_workers": 0},
        "training": {
            "train_iters": TRAIN_ITERS,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "precision": "fp32",
            "gradient_clipping": 0.5,
            "log_interval": 1,
        },
        "parallel": {"tensor_model_parallel_size": 1},
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_iters": 2, "weight_decay": 0.1},
        "checkpoint": {"save_interval": 1},
        "selection": {
            "enabled": True,
            "first_refresh_step": REFRESHES[0],
            "refresh_interval": 2,
            "num_clusters": 4,
            "kmeans_iterations": 5,
        },
        "oracle": {
            "estimator": "exact",
            "rollout_length": 3,
            "num_random_rollouts": 20,
            "num_bootstrap_rollouts": 6,
            "num_candidates": 48,
            "reference_samples": 4,
            "reference_batch_size": 4,
            "chunk_rollouts": 4,
            "noise_rollouts": 0,
        },
        "relational": {"embedding_dim": 4, "epochs": 6, "warmup_steps": 2, "learning_rate": 3e-2, "held_out_fraction": 0.3},
        "server": {"poll_interval_seconds": 0.05, "embed_batch_size": 32},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree[section][key] = value
    return tree


def tiny_config(root: Path | str, **changes: Any) -> Config:
    """The checked config of :func:`tiny_tree`."""
    return config_from_dict(tiny_tree(root, **changes))


def predictable(count: int, seed: int) -> list[np.ndarray]:
    """Sequences in which each token follows from the one before, ids below 8."""
    tokens = np.random.default_rng(seed).integers(0, 8, (count, 1))
    for _ in range(SEQUENCE_LENGTH):
        tokens = np.concatenate([tokens, (5 * tokens[:, -1:] + 3) % 8], axis=1)
    return list(tokens)


def make_pools(root: Path) -> PoolIndex:
    """``root/pool``, in which the samples of kind ``web`` (a third) are predictable, the others random of other
    ids, and ``root/reference`` of predictable samples."""
    count = sum(ROWS_PER_SHARD)
    samples = list(np.random.default_rng(1).integers(8, VOCABULARY, (count, SEQUENCE_LENGTH + 1)))
    # make_pool gives row r the kind r % 3 - 1: none, web, book.
    samples[1::3] = predictable(len(samples[1::3]), 2)
    make_pool(root / "reference", (6,), samples=predictable(6, 3), vocab_size=VOCABULARY)
    return make_pool(root / "pool", ROWS_PER_SHARD, samples=samples, vocab_size=VOCABULARY)


def open_groups(tensor_size: int) -> Any:
    """Groups of a world that :func:`run_ranks` started, on the CPU; may be called again with another size."""
    torch.cuda.is_available = lambda: False
    from megatron_groupmates.parallel import initialize_parallel, read_launch_environment
    from megatron_groupmates.parallel.device import prepare_cpu_backend

    prepare_cpu_backend()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    groups = initialize_parallel(read_launch_environment(os.environ), tensor_size, seed=5)
    torch.set_num_threads(1)
    return groups


@contextlib.contextmanager
def one_rank(directory: Path) -> Iterator[Any]:
    """Groups of a world of one in this process, gone afterwards with all they changed."""
    from megatron_groupmates.parallel.groups import shut_down

    environment, threads = dict(os.environ), torch.get_num_threads()
    device, available = torch.cuda.current_device, torch.cuda.is_available
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield open_groups(1)
    finally:
        shut_down()
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.cuda.current_device, torch.cuda.is_available = device, available


def train_tiny_runs(rank: int, world_size: int, trees: list[dict[str, Any]]) -> None:
    """Body of one rank: run the trainer of each config to its end, one after the other."""
    from megatron_groupmates.training.loop import train
    from megatron_groupmates.utils.run_directory import write_run_config

    for tree in trees:
        config = config_from_dict(tree)
        groups = open_groups(config.parallel.tensor_model_parallel_size)
        if rank == 0:
            write_run_config(config)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert train(config, groups) == "finished"


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished run with a checkpoint of every step, shared by tests: nobody may change it.

    Attributes:
        root: holds ``run``, ``plain`` (the same without z-loss, clipping and selection), ``pool`` and ``reference``.
        tensor_size: of its trainer; its data-parallel size is 1.
    """

    root: Path
    tensor_size: int

    def config(self, **changes: Any) -> Config:
        """The run's config."""
        return tiny_config(self.root, parallel__tensor_model_parallel_size=self.tensor_size, **changes)

    def tag(self, step: int, run: str = "run") -> Path:
        """Directory of the checkpoint of ``step``."""
        return self.root / run / "checkpoints" / f"global_step{step}"

    def copy(self, directory: Path, step: int, **changes: Any) -> Config:
        """A run of its own in ``directory`` as the trainer left it at ``step``, with the pools of this one."""
        run = directory / "run"
        (run / "checkpoints").mkdir(parents=True)
        for number in range(1, step + 1):
            shutil.copytree(self.tag(number), run / "checkpoints" / f"global_step{number}")
        (run / "checkpoints" / "latest").write_text(f"global_step{step}")
        shutil.copytree(self.root / "run" / "selection", run / "selection")
        return self.config(run__output_dir=str(run), **changes)


def trained_run(tensor_size: int, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """The run of ``tensor_size`` ranks, trained at the first call of a session."""

    def make(root: Path) -> TrainedRun:
        make_pools(root)
        tensor = {"parallel__tensor_model_parallel_size": tensor_size}
        plain = {
            "run__output_dir": str(root / "plain"),
            "model__z_loss": 0.0,
            "training__gradient_clipping": 0.0,
            "training__train_iters": 2,
            "selection__enabled": False,
        }
        trees = [tiny_tree(root, **tensor), tiny_tree(root, **tensor, **plain)]
        run_ranks(train_tiny_runs, tensor_size, trees, tmp_path=root)
        return TrainedRun(root, tensor_size)

    return make_once(tmp_path_factory, f"trained-tp{tensor_size}", make)


def rows_of_samples(run: TrainedRun, first_sample: int, count: int) -> np.ndarray:
    """Pool rows int64 ``[count]`` of global samples under generation 0, the whole pool."""
    from megatron_groupmates.pool.log import LogEntry
    from megatron_groupmates.pool.order import SampleOrder

    num_samples = sum(ROWS_PER_SHARD)
    entry = LogEntry(generation=0, effective_sample=0, epoch=0, digest="")
    order = SampleOrder(num_samples, run.config().run.seed, (entry,), {0: np.ones(num_samples, dtype=bool)})
    return order.rows(first_sample, count)[0]


def batch_of_step(run: TrainedRun, step: int) -> torch.Tensor:
    """The samples int64 ``[BATCH, s + 1]`` that the trainer takes in ``step`` (from 1)."""
    from megatron_groupmates.pool.reader import PoolReader

    reader = PoolReader(PoolIndex.open(run.root / "pool"))
    return torch.from_numpy(np.stack(reader.read_many(rows_of_samples(run, (step - 1) * BATCH, BATCH))))


def snapshot(directory: Path, keep: Callable[[Path], bool] = lambda path: True) -> dict[str, tuple[int, int]]:
    """Time of last change and size of every file below ``directory``."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and keep(path)
    }
