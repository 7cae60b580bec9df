"""A directory holds one run: what may change on resume, what is refused, and where a run goes on from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron_groupmates.config import RunPaths, UserError
from megatron_groupmates.utils.run_directory import (
    check_run_directory,
    find_checkpoint,
    generation_log_source,
    open_run,
    read_run_config,
    write_run_config,
)
from tests.common.configs import tiny_config


def test_a_new_directory_is_fine_and_its_config_reads_back(tmp_path: Path) -> None:
    config = tiny_config(run={"output_dir": str(tmp_path / "run")})
    paths = check_run_directory(config)
    assert paths.root == tmp_path / "run" and not paths.root.exists(), "checking writes nothing"
    write_run_config(config)
    assert read_run_config(paths.root) == config
    assert check_run_directory(config) == paths


def test_another_run_in_the_directory_is_refused_with_every_difference(tmp_path: Path) -> None:
    run = {"output_dir": str(tmp_path)}
    write_run_config(tiny_config(run=run))
    other = tiny_config(run={**run, "seed": 9, "name": "other"}, model={"num_layers": 3})
    message = (
        f"{tmp_path} holds a run with other settings; use another run.output_dir, or set these back:\n"
        "  run.seed: 1234 -> 9\n  model.num_layers: 2 -> 3"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_run_directory(other)


def test_what_may_change_may_change(tmp_path: Path) -> None:
    run = {"output_dir": str(tmp_path)}
    write_run_config(tiny_config(run=run, optimizer={"schedule": "constant"}))
    longer = tiny_config(
        run={**run, "name": "longer"},
        optimizer={"schedule": "constant"},
        training={"train_iters": 99},
        data={"pool": "moved", "num_workers": 3},
    )
    assert check_run_directory(longer).root == tmp_path
    write_run_config(longer)
    assert read_run_config(tmp_path) == longer


def test_a_checkouts_own_optimizer_settings_may_change(tmp_path: Path) -> None:
    run, checkpoint = {"output_dir": str(tmp_path)}, {"format": "megatron_deepspeed"}
    write_run_config(tiny_config(run=run, checkpoint=checkpoint))
    longer = tiny_config(run=run, checkpoint=checkpoint, training={"train_iters": 99}, optimizer={"learning_rate": 1e-3, "zero_stage": 3})
    assert check_run_directory(longer).root == tmp_path
    with pytest.raises(UserError, match=r"use another --group-mates-selection, or set these back:\n  model.num_layers: 2 -> 3"):
        check_run_directory(tiny_config(run=run, checkpoint=checkpoint, model={"num_layers": 3}))
    with pytest.raises(UserError, match=r"optimizer.beta2: 0.95 -> 0.9"):  # the oracle's steps take it
        check_run_directory(tiny_config(run=run, checkpoint=checkpoint, optimizer={"beta2": 0.9}))


def test_a_checkout_of_megatron_lm_announces_its_checkpoints_in_a_file_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(run={"output_dir": str(tmp_path)}, checkpoint={"format": "megatron_lm", "directory": str(tmp_path / "saves")})
    assert find_checkpoint(config) is None
    (tmp_path / "saves").mkdir()
    (tmp_path / "saves/latest_checkpointed_iteration.txt").write_text("100")
    assert find_checkpoint(config) == (tmp_path / "saves", None)


def test_a_copied_run_is_looked_at_where_it_is(tmp_path: Path) -> None:
    before, elsewhere = tmp_path / "before", tmp_path / "saves"
    config = tiny_config(
        run={"output_dir": str(before), "selection_dir": str(before)}, checkpoint={"format": "megatron_lm", "directory": str(elsewhere)}
    )
    write_run_config(config)
    shutil.copytree(before, tmp_path / "copy")
    for run in (before, tmp_path / "copy"):
        assert open_run(run) == (config, RunPaths(run, elsewhere, run))
    assert RunPaths.of(tiny_config(run={"output_dir": str(before)}), tmp_path / "copy") == RunPaths.below(tmp_path / "copy")


def test_what_is_not_a_run_is_told(tmp_path: Path) -> None:
    message = f"{tmp_path} is not a run directory: it has no config.yaml; give the run.output_dir of a trainer"
    with pytest.raises(UserError, match=re.escape(message)):
        read_run_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("", "must hold a mapping"), ("run: [", "is not valid YAML"), ("run: {}", "run.output_dir")]
)
def test_a_damaged_config_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_run_config(tmp_path)


def test_a_run_goes_on_from_its_own_checkpoint_then_from_its_parent(tmp_path: Path) -> None:
    parent = tmp_path / "parent" / "checkpoints"
    run = {"output_dir": str(tmp_path / "run")}
    alone = tiny_config(run=run)
    branch = tiny_config(run=run, checkpoint={"load": str(parent), "load_tag": "global_step5"})
    assert find_checkpoint(alone) is None
    with pytest.raises(UserError, match=re.escape(f"checkpoint.load: {parent} is not a directory; give the 'checkpoints' directory")):
        find_checkpoint(branch)
    parent.mkdir(parents=True)
    assert find_checkpoint(branch) == (parent, "global_step5")
    assert find_checkpoint(tiny_config(run=run, checkpoint={"load": str(parent)})) == (parent, None)

    own = tmp_path / "run" / "checkpoints"
    (own / "global_step7").mkdir(parents=True)
    assert find_checkpoint(branch) == (parent, "global_step5"), "a checkpoint without 'latest' is not complete"
    (own / "latest").write_text("global_step7")
    assert find_checkpoint(branch) == find_checkpoint(alone) == (own, None)


def test_the_log_of_the_parent_counts_until_the_branch_has_its_own(tmp_path: Path) -> None:
    run = {"output_dir": str(tmp_path / "run")}
    branch = tiny_config(run=run, checkpoint={"load": str(tmp_path / "parent" / "checkpoints")})
    assert generation_log_source(tiny_config(run=run)).root == tmp_path / "run"
    assert generation_log_source(branch).root == tmp_path / "parent"
    (tmp_path / "run" / "selection").mkdir(parents=True)
    (tmp_path / "run" / "selection" / "log.jsonl").write_text("")
    assert generation_log_source(branch).root == tmp_path / "run"
