"""A run that is killed and started again is the run that was never killed: same samples, same losses, bit for bit."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from megatron_groupmates.pool.log import read_log
from tests.common.distributed import RankFailure, run_ranks
from tests.training.runs import Job, evaluations, losses, make_config, publish_every_third, rows, train_in_rank, train_jobs

SELECTING = (
    "selection.enabled=true",
    "selection.first_refresh_step=4",
    "selection.refresh_interval=100",
    "selection.poll_interval_steps=1",
)


@pytest.mark.parametrize("parallel", ["tensor", "data"])
def test_a_run_killed_twice_equals_an_uninterrupted_one(tmp_path: Path, parallel: str):
    size = f"parallel.tensor_model_parallel_size={2 if parallel == 'tensor' else 1}"
    whole = make_config(tmp_path, size, *SELECTING, run="whole")
    killed = make_config(tmp_path, size, *SELECTING, run="killed")
    jobs = [
        Job(config=whole, publish_before_step=5),
        Job(config=killed, publish_before_step=5, die_before_step=7),
        Job(config=killed, publish_before_step=5, die_before_step=10),
        Job(config=killed),
    ]
    outcomes = run_ranks(train_jobs, 2, jobs, tmp_path=tmp_path)
    assert outcomes == [["finished", "killed", "killed", "finished"]] * 2
    assert len(losses(whole)) == 12
    assert losses(killed) == losses(whole)
    assert evaluations(killed) == evaluations(whole)
    log = [(entry.generation, entry.effective_sample) for entry in read_log(Path(killed.run.output_dir) / "selection/log.jsonl")]
    assert log == [(0, 0), (1, 28)], "generation 1, published at step 5, is prepared at step 6, adopted at step 7 and once only"
    assert [row["step"] for row in rows(killed) if row.get("event") == "adoption"] == [7]


def test_loaders_that_read_ahead_change_no_sample_and_adoptions_take_effect_behind_them(tmp_path: Path):
    """Loader processes on two data-parallel ranks, against one rank that reads by itself."""
    ahead = ("data.num_workers=2", "data.prefetch_factor=2")
    one, two = make_config(tmp_path, run="one"), make_config(tmp_path, *ahead, run="two")
    selecting = make_config(tmp_path, *SELECTING, *ahead, run="selecting")
    run_ranks(train_jobs, 1, [Job(config=one)], tmp_path=tmp_path)
    run_ranks(train_jobs, 2, [Job(config=two), Job(config=selecting, publish_before_step=5)], tmp_path=tmp_path)
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)
    entry = read_log(Path(selecting.run.output_dir) / "selection/log.jsonl")[1]
    # 2 processes x 2 micro-batches of 2 sequences on 2 ranks: 16 samples ahead of step 7's 28.
    assert entry.effective_sample == 44
    generations = {row["step"]: row["generation"] for row in rows(selecting) if "loss" in row}
    assert [step for step, generation in generations.items() if generation == 1] == [12]


def _train_on_a_disk_that_fills_up(rank, world_size, config):
    """The disk is full when the checkpoint of step 8 is written; what the error says."""
    write = torch.save

    def save(value, path, *arguments, **options):
        if "global_step8" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0: file write failed")
        return write(value, path, *arguments, **options)

    torch.save = save
    try:
        train_in_rank(rank, world_size, Job(config=config))
    except OSError as error:
        return error.errno, str(error.filename)
    finally:
        torch.save = write


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path):
    config, whole = make_config(tmp_path, run="full"), make_config(tmp_path, run="whole")
    checkpoints = Path(config.run.output_dir) / "checkpoints"
    outcome = run_ranks(_train_on_a_disk_that_fills_up, 1, config, tmp_path=tmp_path)
    assert outcome == [(errno.ENOSPC, str(checkpoints / "global_step8"))]
    assert (checkpoints / "latest").read_text() == "global_step4"
    run_ranks(train_jobs, 1, [Job(config=config), Job(config=whole)], tmp_path=tmp_path)
    assert losses(config) == losses(whole) and len(losses(whole)) == 12


def test_epochs_are_logged_when_the_selection_runs_out(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING, "training.train_iters=60", "training.eval_interval=60", "checkpoint.save_interval=60")
    run_ranks(train_jobs, 1, [Job(config=config, publish_before_step=2)], tmp_path=tmp_path)
    log = read_log(Path(config.run.output_dir) / "selection/log.jsonl")
    assert [entry.generation for entry in log[:2]] == [0, 1]
    assert len(log) > 2 and [entry.epoch for entry in log] == [0, *range(len(log) - 1)]


def test_a_resume_refuses_another_pool_and_another_log(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING)
    run_ranks(train_jobs, 1, [Job(config=config)], tmp_path=tmp_path)
    longer = make_config(tmp_path, *SELECTING, "training.train_iters=14")
    log = Path(config.run.output_dir) / "selection/log.jsonl"
    good = log.read_text()
    publish_every_third(config, 2)
    from megatron_groupmates.pool.generation import load_generation
    from megatron_groupmates.pool.index import PoolIndex

    digest = load_generation(log.parent, 2, PoolIndex.open(config.data.pool)).digest
    log.write_text(good + f'{{"generation": 2, "effective_sample": 8, "epoch": 0, "digest": "{digest}"}}\n')
    with pytest.raises(RankFailure, match=r"the generation log of .* is not the one the checkpoint was trained with"):
        run_ranks(train_jobs, 1, [Job(config=longer)], tmp_path=tmp_path)
    log.write_text(good)
    other = make_config(tmp_path, *SELECTING, "training.train_iters=14", f"data.pool={tmp_path / 'evaluation'}")
    with pytest.raises(RankFailure, match=r"data.pool: .* is not the pool that the checkpoint in .* was trained on"):
        run_ranks(train_jobs, 1, [Job(config=other)], tmp_path=tmp_path)
