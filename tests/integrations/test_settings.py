"""The config of a run in a fork: from the fork's arguments and the file of --group-mates-config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_groupmates.config import Config, UserError
from megatron_groupmates.integrations.arguments import GroupMatesArguments
from megatron_groupmates.integrations.forks import MEGATRON_DEEPSPEED
from megatron_groupmates.integrations.settings import check_end_of_document, check_first_refresh, resolve_config
from tests.integrations.trainer import fork_arguments, fork_with
from tests.pool.helpers import make_pool

FILE: dict[str, dict[str, Any]] = {
    "data": {"reference": "data/reference", "cache_directory": "cache"},
    "selection": {"first_refresh_step": 4, "refresh_interval": 6},
}


def resolve(directory: Path, file: Any = None, **changes: Any) -> Config:
    if file is not None:
        path = directory / "group_mates.yaml"
        path.write_text(file if isinstance(file, str) else yaml.safe_dump(file))
        changes["group_mates_config"] = str(path)
    args = fork_arguments(directory, **changes)
    arguments = GroupMatesArguments.of(args)
    assert arguments is not None
    return resolve_config(args, arguments, MEGATRON_DEEPSPEED)


def test_everything_lies_in_one_directory_but_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(tmp_path, FILE, save="checkpoints/gpt", group_mates_poll_interval=3, num_workers=5)
    assert config.run.output_dir == config.run.selection_dir == str(tmp_path / "selection")
    assert (config.checkpoint.directory, config.checkpoint.format) == (str(tmp_path / "checkpoints/gpt"), "megatron_deepspeed")
    assert (config.checkpoint.save_interval, config.run.seed, config.data.num_workers) == (2, 7, 5)
    assert config.data.reference == str(tmp_path / "data/reference")
    assert config.data.cache_directory == str(tmp_path / "cache")
    in_home = resolve(tmp_path, {**FILE, "data": {"reference": "~/reference", "cache_directory": "~/cache"}})
    assert in_home.data.reference == str(Path.home() / "reference")
    assert in_home.data.cache_directory == str(Path.home() / "cache")
    assert (config.data.pool, config.data.evaluation) == (str(tmp_path / "pool"), None)
    assert config.selection.enabled and config.selection.poll_interval_steps == 3
    assert (config.model.sequence_length, config.model.vocab_size, config.training.train_iters) == (8, 320, 12)


@pytest.mark.parametrize(("encoder", "found"), [("models/small", "{}/models/small"), ("models/absent", "models/absent")])
def test_an_encoder_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, found: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert resolve(tmp_path, FILE | {"relational": {"encoder": encoder}}).relational.encoder == found.format(tmp_path)


def test_without_a_file_no_round_is_planned(tmp_path: Path) -> None:
    config = resolve(tmp_path, save=None, save_interval=None)
    assert config.selection.enabled and config.selection.max_refreshes == 0
    assert config.selection.poll_interval_steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader_type": "cyclic"}, "--dataloader-type cyclic: .* needs --dataloader-type single"),
        ({"rampup_batch_size": ["4", "4", "100"]}, "--rampup-batch-size 4 4 100: .* one global batch size in the whole run"),
        ({"save_interval": 3}, r"--save-interval 3: selection is planned at step 4, where no checkpoint is saved; .*\(4\).*\(6\)"),
        ({"save_interval": 4}, "--save-interval 4: selection is planned at step 10"),
        ({"save": None}, "--save, --save-interval: selection is planned at step 4, but the trainer saves no checkpoints"),
        ({"save_interval": None}, "--save, --save-interval: selection is planned at step 4"),
        ({"group_mates_config": "/absent.yaml"}, "--group-mates-config /absent.yaml cannot be read: No such file"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(tmp_path, None if "group_mates_config" in changes else FILE, **changes)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("selection: [", "is not valid YAML"),
        ("selection", "must hold a mapping of sections"),
        ("selection: 3", "must hold a mapping of sections .run, data, selection, oracle, relational, server."),
        ({"model": {"num_layers": 3}}, r"model.num_layers follows from the trainer's own arguments .* \(the file may set run: name"),
        ({"data": {"pool": "p"}}, "data.pool follows from the trainer's own arguments"),
        ({"data": {"on_damaged_sample": "skip"}}, "data.on_damaged_sample follows from"),
        ({"run": {"seed": 3}}, "run.seed follows from"),
        (FILE | {"selection": {"enabled": False}}, "selection.enabled: false, but --group-mates-selection switches it on"),
        (FILE | {"selection": {"mode": "inline", "max_refreshes": 0}}, "selection.mode: inline needs the trainer to end at each refresh"),
        (FILE | {"selection": {"fist_refresh_step": 4}}, "selection.fist_refresh_step: unknown setting; did you mean"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path, file: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(tmp_path, file)


def test_the_trainers_tokenizer_must_end_documents_as_the_pools_where_it_matters(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "pool")
    check_end_of_document(resolve(tmp_path), pool, fork_with(end_of_document=9))
    config = resolve(tmp_path, reset_attention_mask=True, eod_mask_loss=True)
    check_end_of_document(config, pool, fork_with(end_of_document=pool.eot_id))
    with pytest.raises(UserError, match=r"--reset-attention-mask, --eod-mask-loss: .* ends documents with token 9, the pool .* with 0"):
        check_end_of_document(config, pool, fork_with(end_of_document=9))


def test_a_refresh_before_the_switch_is_refused(tmp_path: Path) -> None:
    config = resolve(tmp_path, FILE)
    check_first_refresh(config, 0)
    check_first_refresh(config, 3)
    with pytest.raises(
        UserError, match=r"selection.first_refresh_step: 4 is over when selection is switched on, at step 4; choose a later"
    ):
        check_first_refresh(config, 4)
    check_first_refresh(resolve(tmp_path), 100)
