"""One training at every parallel layout: the same samples and, but for rounding, the same losses and the same state."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config
from tests.common.distributed import run_ranks
from tests.training.layouts import in_global_order, train_layouts
from tests.training.runs import evaluations, losses, make_config, rows

STEPS, BATCH = 4, 4
COMMON = (
    f"training.train_iters={STEPS}",
    f"training.global_batch_size={BATCH}",
    "training.micro_batch_size=1",
    "training.gradient_clipping=0.5",
    f"training.eval_interval={STEPS}",
    "training.precision=fp32",
    "model.init_std=0.2",
    "model.num_query_groups=2",
    f"checkpoint.save_interval={STEPS}",
)
TENSOR = "parallel.tensor_model_parallel_size=2"
SEQUENCE = "parallel.sequence_parallel=true"
FULL, SELECTIVE = "training.recompute_granularity=full", "training.recompute_granularity=selective"

# World size -> run -> what it sets beside COMMON. The data-parallel size follows; ZeRO stage 1 where none is set.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "one": (),
        "micro-2": ("training.micro_batch_size=2",),
        "micro-4": ("training.micro_batch_size=4",),
        "full": (FULL,),
        "selective": (SELECTIVE,),
        "zero-0": ("optimizer.zero_stage=0",),
        "zero-2": ("optimizer.zero_stage=2",),
    },
    2: {
        "tensor": (TENSOR,),
        "sequence": (TENSOR, SEQUENCE),
        "sequence-full": (TENSOR, SEQUENCE, FULL),
        "sequence-selective": (TENSOR, SEQUENCE, SELECTIVE),
        "tensor-zero-0": (TENSOR, "optimizer.zero_stage=0"),
        "sequence-zero-3": (TENSOR, SEQUENCE, "optimizer.zero_stage=3"),
        "data": (),
        "data-micro-2": ("training.micro_batch_size=2",),
        "data-zero-0": ("optimizer.zero_stage=0",),
        "data-zero-2": ("optimizer.zero_stage=2",),
        "data-zero-3": ("optimizer.zero_stage=3",),
        "data-zero-3-full": ("optimizer.zero_stage=3", FULL),
    },
    4: {
        "both-zero-2": (TENSOR, SEQUENCE, "optimizer.zero_stage=2"),
        "both-zero-3": (TENSOR, SEQUENCE, FULL, "optimizer.zero_stage=3"),
    },
}
NAMES = [name for runs in LAYOUTS.values() for name in runs]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run and, step by step, digests of its samples in their global order."""

    config: Config
    samples: list[list[str]]

    @functools.cached_property
    def checkpoint(self) -> ZeroCheckpoint:
        return ZeroCheckpoint(Path(self.config.run.output_dir) / f"checkpoints/global_step{STEPS}")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """All runs of the table, by name."""
    root, trained = tmp_path_factory.mktemp("matrix"), {}
    for world_size, runs in LAYOUTS.items():
        configs = [make_config(root, *COMMON, *changes, run=name) for name, changes in runs.items()]
        seen = run_ranks(train_layouts, world_size, configs, tmp_path=root, timeout_seconds=240)
        for config, name, of_ranks in zip(configs, runs, zip(*seen, strict=True), strict=True):
            trained[name] = Trained(config, in_global_order(of_ranks, config))
    return trained


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_layout_trains_on_the_same_samples_to_the_same_losses(matrix: dict[str, Trained], name: str):
    one, other = matrix["one"], matrix[name]
    assert [len(step) for step in one.samples] == [BATCH] * STEPS and len({d for step in one.samples for d in step}) == BATCH * STEPS
    assert other.samples == one.samples
    assert len(losses(one.config)) == STEPS and losses(one.config)[-1] != losses(one.config)[0]
    assert losses(other.config) == pytest.approx(losses(one.config), rel=1e-5, abs=0)
    assert [step for step, _ in evaluations(other.config)] == [0, STEPS]
    assert [loss for _, loss in evaluations(other.config)] == pytest.approx([loss for _, loss in evaluations(one.config)], rel=1e-5)
    norms = [row["grad_norm"] for row in rows(one.config) if "loss" in row]
    assert min(norms) > 0.5, "gradients must be clipped"
    found = [row.get("grad_norm") for row in rows(other.config) if "loss" in row]
    assert found == ([None] * STEPS if name.endswith("zero-0") else pytest.approx(norms, rel=1e-5))


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_layout_ends_in_the_same_state(matrix: dict[str, Trained], name: str):
    """Moments are averages of gradients: a weight whose gradient is a part of the whole one would differ in them."""
    one, other = matrix["one"].checkpoint, matrix[name].checkpoint
    assert (other.step, other.adam_step, sorted(other.names)) == (one.step, one.adam_step, sorted(one.names))
    for parameter in one.names:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            expected, found = one.read(parameter, kind), other.read(parameter, kind)
            error = (found - expected).norm() / expected.norm()
            assert float(error) < 1e-4, (parameter, kind)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("full", "one"),
        ("selective", "one"),
        ("sequence-full", "sequence"),
        ("sequence-selective", "sequence"),
        ("data-zero-3-full", "data-zero-3"),
        ("zero-2", "one"),
    ],
)
def test_what_only_saves_memory_changes_no_bit(matrix: dict[str, Trained], name: str, plain: str):
    changed, unchanged = matrix[name], matrix[plain]
    assert losses(changed.config) == losses(unchanged.config)
    for parameter in unchanged.checkpoint.names:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(changed.checkpoint.read(parameter, kind), unchanged.checkpoint.read(parameter, kind)), (parameter, kind)
