"""A run goes on at another tensor-parallel size, data-parallel size or ZeRO stage as if nothing had changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_groupmates.checkpoint.discovery import load_model_state
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config
from megatron_groupmates.training.resharding import Layout
from tests.common.distributed import RankFailure, run_ranks
from tests.training.layouts import Hop, hop, in_global_order, train_layouts
from tests.training.runs import Job, evaluations, losses, make_config, rows, train_jobs

STEPS, SAVED, BATCH = 6, 3, 4
COMMON = (
    f"training.train_iters={STEPS}",
    f"training.global_batch_size={BATCH}",
    "training.micro_batch_size=1",
    "training.gradient_clipping=0.5",
    "training.eval_interval=2",
    "training.precision=fp32",
    "model.init_std=0.2",
    "model.num_query_groups=2",
    f"checkpoint.save_interval={SAVED}",
    # No part of it divides over ranks without padding.
    "model.ffn_hidden_size=62",
    "model.vocab_size=306",
)
TENSOR = "parallel.tensor_model_parallel_size=2"
STAGE = "optimizer.zero_stage="


def tag(config: Config, step: int = SAVED) -> Path:
    return Path(config.run.output_dir) / "checkpoints" / f"global_step{step}"


@dataclasses.dataclass(frozen=True)
class Whole:
    """An uninterrupted run on one rank at ZeRO stage 1, with the samples of each step in order."""

    root: Path
    config: Config
    samples: list[list[str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    config = make_config(root, *COMMON, run="whole")
    (low,) = [make_config(root, *COMMON, "training.precision=bf16", f"training.train_iters={SAVED}", run="low")]
    seen = run_ranks(train_layouts, 1, [config, low], tmp_path=root)
    return Whole(root, config, in_global_order([seen[0][0]], config))


# Where a run that stopped at step 3 goes on: world size -> run -> settings.
RESUMED: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"zero-0": (STAGE + "0",)},
    2: {
        "data": (),
        "data-zero-2": (STAGE + "2", "training.micro_batch_size=2"),
        "data-zero-3": (STAGE + "3",),
        "tensor": (TENSOR,),
        "sequence-zero-3": (TENSOR, "parallel.sequence_parallel=true", STAGE + "3", "training.recompute_granularity=full"),
    },
    4: {"both": (TENSOR, STAGE + "2")},
}


def test_a_run_goes_on_at_another_layout_with_the_samples_and_losses_of_the_uninterrupted_one(whole: Whole):
    stopped = tag(whole.config).parent
    branch = (f"checkpoint.load={stopped}", f"checkpoint.load_tag=global_step{SAVED}")
    for world_size, runs in RESUMED.items():
        configs = [make_config(whole.root, *COMMON, *branch, *changes, run=name) for name, changes in runs.items()]
        seen = run_ranks(train_layouts, world_size, configs, tmp_path=whole.root, timeout_seconds=240)
        for config, of_ranks in zip(configs, zip(*seen, strict=True), strict=True):
            name = config.run.output_dir
            assert in_global_order(of_ranks, config) == whole.samples[SAVED:], name
            assert losses(config) == pytest.approx(losses(whole.config)[SAVED:], rel=1e-5, abs=0), name
            later = [(step, pytest.approx(loss, rel=1e-5)) for step, loss in evaluations(whole.config) if step > SAVED]
            assert [pair for pair in evaluations(config) if pair[0] > SAVED] == later, name
            assert {row["consumed_train_samples"] for row in rows(config) if row["step"] == STEPS} == {STEPS * BATCH}, name


def test_one_run_changes_its_layout_each_time_it_is_started(whole: Whole):
    """In its own directory, where files of another layout may be left of a save that was cut short."""
    changes = [(1, ()), (2, (TENSOR, STAGE + "0")), (2, (STAGE + "3",)), (1, ("training.micro_batch_size=4",))]
    config, samples = whole.config, []
    for index, (world_size, settings) in enumerate(changes):
        end = (1, 3, 4, STEPS)[index]
        config = make_config(
            whole.root,
            *COMMON,
            *settings,
            f"training.train_iters={end}",
            f"optimizer.decay_iters={STEPS}",
            "checkpoint.save_interval=1",
            run="changing",
        )
        if world_size == 1 and index:
            left = tag(config, STEPS)
            left.mkdir()
            (left / "zero_pp_rank_5_mp_rank_01_optim_states.pt").write_bytes(b"torn")
        seen = run_ranks(train_layouts, world_size, [config], tmp_path=whole.root)
        samples += in_global_order([of_rank[0] for of_rank in seen], config)
    assert samples == whole.samples
    assert losses(config) == pytest.approx(losses(whole.config), rel=1e-5, abs=0)
    assert ZeroCheckpoint(tag(config, STEPS)).data_parallel_size == 1


def test_the_selection_in_force_goes_on_at_another_layout(tmp_path: Path):
    """A generation adopted on one rank; two data-parallel ranks of ZeRO-3 go on from a checkpoint behind it."""
    selecting = ("selection.enabled=true", "selection.first_refresh_step=4", "selection.refresh_interval=100")
    settings = ("training.precision=fp32", "training.micro_batch_size=1", *selecting)
    whole, changing = (make_config(tmp_path, *settings, run=name) for name in ("uninterrupted", "changing"))
    jobs = [Job(config=whole, publish_before_step=5), Job(config=changing, publish_before_step=5, die_before_step=10)]
    assert run_ranks(train_jobs, 1, jobs, tmp_path=tmp_path) == [["finished", "killed"]]
    later = make_config(tmp_path, *settings, STAGE + "3", run="changing")
    run_ranks(train_jobs, 2, [Job(config=later)], tmp_path=tmp_path)
    assert losses(later) == pytest.approx(losses(whole), rel=1e-5, abs=0) and len(losses(later)) == 12
    logs = [(Path(config.run.output_dir) / "selection/log.jsonl").read_text() for config in (whole, later)]
    assert logs[0] == logs[1] and '"generation": 1' in logs[0]
    generations = [[row["generation"] for row in rows(config) if "loss" in row] for config in (whole, later)]
    assert generations[0] == generations[1] == [0] * 7 + [1] * 5


def test_every_bit_survives_a_chain_of_layouts(whole: Whole):
    """Loaded and saved again by engine after engine of other layouts, in float32 and in bfloat16 with float32 masters."""
    chain = [
        (2, (STAGE + "3",)),
        (2, (TENSOR, STAGE + "0")),
        (4, (TENSOR, STAGE + "3")),
        (2, (STAGE + "2",)),
        (1, (STAGE + "0",)),
        (1, (STAGE + "1",)),
    ]
    precisions = {"whole": "fp32", "low": "bf16"}
    originals = {run: whole.root / run / f"checkpoints/global_step{SAVED}" for run in precisions}
    sources, layout = originals, "tensor-parallel size 1, data-parallel size 1, ZeRO stage 1"
    for number, (world_size, settings) in enumerate(chain):
        targets = {run: whole.root / f"hop-{number}-{run}" / tags.name for run, tags in sources.items()}
        configs = {
            run: make_config(whole.root, *COMMON, *settings, f"training.precision={precision}", run=f"hop-{run}")
            for run, precision in precisions.items()
        }
        hops = [Hop(config=configs[run], source=sources[run], target=targets[run]) for run in precisions]
        counted = run_ranks(hop, world_size, hops, tmp_path=whole.root)
        tensor_size = configs["whole"].parallel.tensor_model_parallel_size
        before, layout = (
            layout,
            (
                f"tensor-parallel size {tensor_size}, data-parallel size {world_size // tensor_size}, "
                f"ZeRO stage {configs['whole'].optimizer.zero_stage}"
            ),
        )
        for run, counts in zip(precisions, counted[0], strict=True):
            assert (counts["global_steps"], counts["global_samples"]) == (SAVED, SAVED * BATCH)
            assert counts["messages"] == [f"checkpoint {sources[run]} is resharded from {before} to {layout}"]
            assert str(Layout.of_checkpoint(ZeroCheckpoint(targets[run]))) == layout
            check_equal(ZeroCheckpoint(targets[run]), ZeroCheckpoint(originals[run]))
        sources = targets
    for run in precisions:
        first, last = (load_model_state(tags[run] / "mp_rank_00_model_states.pt")["module"] for tags in (originals, sources))
        for name in ZeroCheckpoint(originals[run]).names:
            assert torch.equal(first[name], last[name]) and first[name].dtype == last[name].dtype, name


def test_a_branch_trains_with_its_own_optimizer_settings(whole: Whole):
    """Whether DeepSpeed loads the parent's checkpoint or, at another ZeRO stage, we do."""
    own = ("optimizer.weight_decay=0.25", "optimizer.beta2=0.875", "optimizer.epsilon=1e-6")
    for stage in (1, 2):
        config = make_config(whole.root, *COMMON, *own, f"{STAGE}{stage}", run=f"branch-{stage}")
        target = whole.root / f"branched-{stage}" / tag(whole.config).name
        run_ranks(hop, 1, [Hop(config=config, source=tag(whole.config), target=target)], tmp_path=whole.root)
        groups = ZeroCheckpoint(target).param_groups
        assert [(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in groups] == [
            (0.25, (0.9, 0.875), 1e-6),
            (0.0, (0.9, 0.875), 1e-6),
        ]


def check_equal(found: ZeroCheckpoint, expected: ZeroCheckpoint) -> None:
    assert (found.adam_step, found.step, found.names) == (expected.adam_step, expected.step, expected.names)
    for name in expected.names:
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found.read(name, kind), expected.read(name, kind)), (name, kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.ffn_hidden_size=64", r"decoder.layers.0.mlp.linear_fc1.weight is of shape \(124, 32\) in it and of shape \(128, 32\) by"),
        ("model.num_layers=3", r"decoder.layers.2.input_layernorm.weight is absent in it and of shape \(32,\) by"),
        ("model.num_layers=1", r"decoder.layers.1.input_layernorm.weight is of shape \(32,\) in it and absent by"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_parameter(whole: Whole, change: str, message: str):
    load = (f"checkpoint.load={tag(whole.config).parent}", STAGE + "2")
    config = make_config(whole.root, *COMMON, *load, change, run=f"other-{change}")
    with pytest.raises(RankFailure, match=r"UserError: checkpoint .*global_step6 is of another model: parameter " + message):
        run_ranks(train_layouts, 1, [config], tmp_path=whole.root)
