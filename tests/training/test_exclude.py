"""``data.exclude`` in real runs: no excluded row is ever served, and a run keeps the exclusion it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.pool.exclusion import write_exclusion
from megatron_groupmates.pool.generation import load_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.log import LogEntry, read_log
from megatron_groupmates.pool.order import SampleOrder
from megatron_groupmates.training.preparation import prepare_generation
from megatron_groupmates.utils.run_directory import check_run_directory, write_run_config
from tests.common.distributed import run_ranks
from tests.training.runs import Job, losses, make_config, publish_every_third, train_in_rank

NUM_SAMPLES, NUM_SERVED = 150, 48
SELECTING = ("selection.enabled=true", "selection.first_refresh_step=100", "selection.poll_interval_steps=1")


def exclude(root: Path, rows: np.ndarray) -> str:
    path = root / "exclude.json"
    write_exclusion(path, PoolIndex.open(root / "pool"), rows, {"tool": "test"})
    return str(path)


def run_all(rank: int, world_size: int, root: Path, excluded: np.ndarray, configs: dict[str, Config]) -> dict[str, Any]:
    """Train each config, then ask for more steps with another exclusion; served rows and what was refused, by run."""
    from megatron_groupmates.training.loop import Trainer

    results: dict[str, Any] = {}
    close = Trainer.close

    def close_and_tell(trainer: Any) -> None:
        served = trainer.order.current.rows(0, trainer.consumed_train_samples)[0].tolist()
        results.setdefault(trainer.config.run.name, served)
        close(trainer)

    Trainer.close = close_and_tell  # this process is the test's own
    for config in configs.values():
        publish = 2 if config.selection.enabled else None
        assert train_in_rank(rank, world_size, Job(config=config, publish_before_step=publish)) == "finished"
    resumed = make_config(root, *overrides("whole", root), "training.train_iters=13", run="whole")
    results["whole resumed"] = train_in_rank(rank, world_size, Job(config=resumed))
    exclude(root, excluded[1:])
    for name in configs:
        longer = make_config(root, *overrides(name, root), "training.train_iters=14", run=name)
        with pytest.raises(UserError) as refused:
            train_in_rank(rank, world_size, Job(config=longer))
        results[f"{name} refused"] = str(refused.value)
    return results


def overrides(name: str, root: Path) -> tuple[str, ...]:
    return f"run.name={name}", f"data.exclude={root / 'exclude.json'}", *(SELECTING if name == "selecting" else ())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on 33 samples of a pool, with and without selection."""
    root = tmp_path_factory.mktemp("exclude")
    make_config(root)
    excluded = np.random.default_rng(0).permutation(NUM_SAMPLES)[: NUM_SAMPLES - 33]
    exclude(root, excluded)
    configs = {name: make_config(root, *overrides(name, root), run=name) for name in ("whole", "selecting")}
    [results] = run_ranks(run_all, 1, root, excluded, configs, tmp_path=root)
    return {"excluded": set(excluded.tolist()), "configs": configs, **results}


@pytest.mark.parametrize("name", ["whole", "selecting"])
def test_no_excluded_row_is_served_in_any_generation_or_epoch(runs: dict[str, Any], name: str) -> None:
    rows = runs[name]
    assert len(rows) == NUM_SERVED and not set(rows) & runs["excluded"]
    assert len(set(rows)) < NUM_SERVED, "33 rows for 48 samples: a new epoch must have begun"
    assert len(losses(runs["configs"][name])) == (13 if name == "whole" else 12)


def test_a_run_without_selection_resumes_in_a_later_epoch(runs: dict[str, Any]) -> None:
    assert runs["whole resumed"] == "finished"


def test_the_generation_served_excluded_rows_too_had_it_been_let(runs: dict[str, Any]) -> None:
    config = runs["configs"]["selecting"]
    selection, pool = Path(config.run.output_dir) / "selection", PoolIndex.open(config.data.pool)
    assert 1 in {entry.generation for entry in read_log(selection / "log.jsonl")}
    assert load_generation(selection, 1, pool).mask[list(runs["excluded"])].any()
    whole = load_generation(selection, 0, pool)
    assert whole.num_samples == 33 and not whole.mask[list(runs["excluded"])].any()
    assert whole.provenance["exclusion"]["num_samples"] == NUM_SAMPLES - 33


def test_another_exclusion_is_refused_on_resume(runs: dict[str, Any]) -> None:
    whole, selecting = runs["whole refused"], runs["selecting refused"]
    assert "is not the one the checkpoint was trained with" in whole and "what data.exclude names" in whole
    assert "data.exclude: its digest is" in selecting and "give the same file, or start a new run" in selecting


def test_another_path_is_refused_by_the_run_directory(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    write_run_config(config)
    with pytest.raises(UserError, match=r"holds a run with other settings(.|\n)*data.exclude"):
        check_run_directory(make_config(tmp_path, f"data.exclude={tmp_path / 'exclude.json'}"))


def test_a_generation_of_excluded_rows_alone_is_not_prepared(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    publish_every_third(config)
    pool, selection = PoolIndex.open(config.data.pool), Path(config.run.output_dir) / "selection"
    excluded = np.zeros(NUM_SAMPLES, dtype=bool)
    excluded[::3] = True
    orders = [SampleOrder(NUM_SAMPLES, 0, [LogEntry(0, 0, 0, "")], {0: ~excluded}, excluded=mask) for mask in (excluded, None)]
    with pytest.raises(UserError, match=r"generation 1 selects nothing to train on: what data\.exclude leaves of it"):
        prepare_generation(selection, 1, pool, orders[0], 0)
    assert prepare_generation(selection, 1, pool, orders[1], 0).num_samples == 50
