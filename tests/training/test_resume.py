"""A run that is killed and started again is the run that was never killed: same samples, same losses, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_groupmates.pool.log import read_log
from tests.common.distributed import RankFailure, run_ranks
from tests.training.runs import evaluations, losses, make_config, publish_every_third, rows, train_in_rank

SELECTING = ("selection.enabled=true", "selection.first_refresh_step=4", "selection.refresh_interval=100", "selection.poll_interval_steps=1")


def _train_killed_twice(config, tmp_path: Path, world_size: int, **arguments) -> None:
    for die_before_step, expected in ((6, "killed"), (10, "killed"), (None, "finished")):
        outcome = run_ranks(_train, world_size, config, die_before_step, arguments.get("publish_before_step"), tmp_path=tmp_path)
        assert outcome == [expected] * world_size


def _train(rank, world_size, config, die_before_step, publish_before_step):
    return train_in_rank(rank, world_size, config, die_before_step, publish_before_step)


@pytest.mark.parametrize("parallel", ["tensor", "data"])
def test_a_run_killed_twice_equals_an_uninterrupted_one(tmp_path: Path, parallel: str):
    size = f"parallel.tensor_model_parallel_size={2 if parallel == 'tensor' else 1}"
    whole = make_config(tmp_path, size, *SELECTING, run="whole")
    assert run_ranks(_train, 2, whole, None, 5, tmp_path=tmp_path) == ["finished"] * 2
    killed = make_config(tmp_path, size, *SELECTING, run="killed")
    _train_killed_twice(killed, tmp_path, 2, publish_before_step=5)
    assert len(losses(whole)) == 12
    assert losses(killed) == losses(whole)
    assert evaluations(killed) == evaluations(whole)
    log = [(entry.generation, entry.effective_sample) for entry in read_log(Path(killed.run.output_dir) / "selection/log.jsonl")]
    assert log == [(0, 0), (1, 24)], "generation 1, published at step 5, is adopted at step 6 and once only"
    assert [row for row in rows(killed) if row.get("event") == "adoption"] != []


def test_data_parallel_size_and_loader_processes_change_no_sample(tmp_path: Path):
    """The losses of one rank, of two data-parallel ranks, and of loaders that read ahead in processes of their own."""
    one = make_config(tmp_path, run="one")
    two = make_config(tmp_path, run="two")
    ahead = make_config(tmp_path, "data.num_workers=2", "data.prefetch_factor=3", run="ahead")
    run_ranks(_train, 1, one, None, None, tmp_path=tmp_path)
    run_ranks(_train, 2, two, None, None, tmp_path=tmp_path)
    run_ranks(_train, 1, ahead, None, None, tmp_path=tmp_path)
    assert losses(ahead) == losses(one)
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)


def test_an_adoption_takes_effect_behind_what_loaders_have_read_ahead(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING, "data.num_workers=2", "data.prefetch_factor=2")
    run_ranks(_train, 2, config, None, 5, tmp_path=tmp_path)
    entry = read_log(Path(config.run.output_dir) / "selection/log.jsonl")[1]
    # 2 processes x 2 micro-batches of 2 sequences on 2 ranks: 16 samples ahead of step 6's 24.
    assert entry.effective_sample == 40
    generations = {row["step"]: row["generation"] for row in rows(config) if "loss" in row}
    assert [step for step, generation in generations.items() if generation == 1] == [11, 12]


def test_epochs_are_logged_when_the_selection_runs_out(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING, "training.train_iters=60", "training.eval_interval=60", "checkpoint.save_interval=60")
    run_ranks(_train, 1, config, None, 2, tmp_path=tmp_path)
    log = read_log(Path(config.run.output_dir) / "selection/log.jsonl")
    assert [entry.generation for entry in log[:2]] == [0, 1]
    assert len(log) > 2 and [entry.epoch for entry in log] == [0, *range(len(log) - 1)]


def test_a_resume_refuses_another_pool_and_another_log(tmp_path: Path):
    config = make_config(tmp_path, *SELECTING)
    run_ranks(_train, 1, config, None, None, tmp_path=tmp_path)
    longer = make_config(tmp_path, *SELECTING, "training.train_iters=14")
    log = Path(config.run.output_dir) / "selection/log.jsonl"
    good = log.read_text()
    publish_every_third(config, 2)
    from megatron_groupmates.pool.generation import load_generation
    from megatron_groupmates.pool.index import PoolIndex

    digest = load_generation(log.parent, 2, PoolIndex.open(config.data.pool)).digest
    log.write_text(good + f'{{"generation": 2, "effective_sample": 8, "epoch": 0, "digest": "{digest}"}}\n')
    with pytest.raises(RankFailure, match=r"the generation log of .* is not the one the checkpoint was trained with"):
        run_ranks(_train, 1, longer, None, None, tmp_path=tmp_path)
    log.write_text(good)
    other = make_config(tmp_path, *SELECTING, "training.train_iters=14", f"data.pool={tmp_path / 'evaluation'}")
    with pytest.raises(RankFailure, match=r"data.pool: .* is not the pool that the checkpoint in .* was trained on"):
        run_ranks(_train, 1, other, None, None, tmp_path=tmp_path)
