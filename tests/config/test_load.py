"""Parsing: strict about names, types and ranges; what is written reads back; what a resumed run may change."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import yaml

from megatron_groupmates.config import Config, UserError, config_differences, config_from_dict, config_to_dict, dump_config, parse_config
from tests.common.configs import tiny_config, tiny_tree


def parse(*overrides: str, **sections: dict[str, Any]) -> Config:
    return parse_config(yaml.safe_dump(tiny_tree(**sections)), overrides)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"learning_rat": 1.0}}, "optimizer.learning_rat: unknown setting; did you mean optimizer.learning_rate?"),
        ({"optimiser": {"beta1": 0.9}}, "optimiser: unknown setting; did you mean optimizer?"),
        ({"data": {"zzz": 1}}, "data.zzz: unknown setting; valid keys: pool, evaluation, reference, "),
        ({"data": {"storage_options": 3}}, "data.storage_options: expected a mapping, got 3"),
        ({"data": {"storage_options": {"s3": "x"}}}, "data.storage_options: s3: 'x' is not a mapping of arguments; write "),
        ({"model": {7: 1}}, "model.7: unknown setting; valid keys: num_layers, "),
        ({"model": {"num_layers": "two"}}, "model.num_layers: expected a whole number, got 'two'"),
        ({"model": {"num_layers": 2.5}}, "model.num_layers: expected a whole number, got 2.5"),
        ({"model": {"num_layers": True}}, "model.num_layers: expected a whole number, got True"),
        ({"model": {"num_layers": None}}, "model.num_layers: expected a whole number, got None"),
        ({"model": {"num_layers": [2]}}, "model.num_layers: expected a whole number, got [2]"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate: expected a number, got 'fast'"),
        ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate: expected a number, got True"),
        ({"selection": {"enabled": 1}}, "selection.enabled: expected true or false, got 1"),
        ({"selection": {"enabled": "yes please"}}, "selection.enabled: expected true or false, got 'yes please'"),
        ({"run": {"name": 5}}, "run.name: expected text, got 5"),
        ({"data": {"reference": 5}}, "data.reference: expected text, got 5"),
        ({"selection": {"max_refreshes": "all"}}, "selection.max_refreshes: expected a whole number, got 'all'"),
        ({"selection": {"mode": "eager"}}, "selection.mode: 'eager' is not one of async, blocking, inline"),
        ({"selection": {"mode": False}}, "selection.mode: False is not one of async, blocking, inline"),
        ({"optimizer": {"zero_stage": 4}}, "optimizer.zero_stage: 4 is not one of 0, 1, 2, 3"),
        ({"optimizer": {"zero_stage": True}}, "optimizer.zero_stage: True is not one of 0, 1, 2, 3"),
        ({"optimizer": {"zero_stage": [1]}}, "optimizer.zero_stage: [1] is not one of 0, 1, 2, 3"),
        ({"model": {"num_layers": 0}}, "model.num_layers: 0 is below the smallest allowed value 1"),
        ({"selection": {"ratio": 1.5}}, "selection.ratio: 1.5 is above the largest allowed value 1.0"),
        ({"selection": {"ratio": -0.1}}, "selection.ratio: -0.1 is below the smallest allowed value 0.0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: nan is below the smallest allowed value 0.0"),
        ({"selection": {"first_refresh_step": 0}}, "selection.first_refresh_step: 0 is below the smallest allowed value 1"),
        ({"oracle": {"learning_rate": -1}}, "oracle.learning_rate: -1.0 is below the smallest allowed value 0.0"),
    ],
)
def test_bad_settings_are_named_by_dotted_path(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        parse(**sections)


def test_a_missing_setting_says_what_it_is_for() -> None:
    tree = tiny_tree()
    del tree["training"]["train_iters"]
    with pytest.raises(UserError, match=re.escape("training.train_iters: required setting is missing (optimizer steps of the whole run)")):
        config_from_dict(tree)
    del tree["training"]
    with pytest.raises(UserError, match=r"training\.train_iters: required setting is missing"):
        config_from_dict(tree)


@pytest.mark.parametrize("bad", [3, "text", [1, 2]])
def test_a_section_must_be_a_mapping(bad: Any) -> None:
    with pytest.raises(UserError, match=re.escape(f"parallel: expected a mapping of settings, got {bad!r}")):
        config_from_dict({**tiny_tree(), "parallel": bad})


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "got NoneType"), ("- 1", "got list"), ("just words", "got str")],
)
def test_the_file_must_be_a_mapping_of_sections(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^my\.yaml must hold a mapping of sections \(run, model, data, .*\), {message}$"):
        parse_config(text, source="my.yaml")


def test_invalid_yaml_is_told_with_its_place() -> None:
    with pytest.raises(UserError, match=r"^my\.yaml is not valid YAML: (?s:.*)line 2"):
        parse_config("run:\n\t- broken", source="my.yaml")


def test_empty_sections_take_their_defaults() -> None:
    config = config_from_dict({**tiny_tree(), "parallel": None, "server": {}})
    assert config.parallel.tensor_model_parallel_size == 1
    assert config.server.poll_interval_seconds == 2.0


def test_yaml_spellings_of_numbers_and_off() -> None:
    text = yaml.safe_dump(tiny_tree(selection={"enabled": False}))
    text += "optimizer: {learning_rate: 3e-4, min_learning_rate: 1, weight_decay: '1E-2', warmup_iters: 4.0, zero_stage: 2.0}\n"
    text = text.replace("model:\n", "model:\n  transformer_engine: off\n")
    assert yaml.safe_load(text)["model"]["transformer_engine"] is False, "the trap this test is about"
    assert yaml.safe_load(text)["optimizer"]["learning_rate"] == "3e-4", "the trap this test is about"
    with pytest.raises(UserError, match=re.escape("optimizer.min_learning_rate: 1.0 is above optimizer.learning_rate 0.0003")):
        parse_config(text)
    config = parse_config(text, ["optimizer.min_learning_rate=1e-6"])
    assert config.model.transformer_engine == "off"
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.weight_decay) == (3e-4, 1e-6, 0.01)
    assert (optimizer.warmup_iters, optimizer.zero_stage) == (4, 2)
    assert type(optimizer.warmup_iters) is int and type(optimizer.zero_stage) is int


def test_optional_settings_take_null() -> None:
    assert parse("selection.max_refreshes=3", "selection.max_refreshes=null").selection.max_refreshes is None
    assert parse(selection={"max_refreshes": 3}).selection.max_refreshes == 3


def test_overrides_apply_in_order_and_create_sections() -> None:
    config = parse("server.embed_batch_size=8", "model.num_layers=3", "model.num_layers=5", "run.name=a=b", "model.transformer_engine=off")
    assert (config.server.embed_batch_size, config.model.num_layers, config.run.name) == (8, 5, "a=b")
    assert config.model.transformer_engine == "off"
    tree = {**tiny_tree(), "server": None}
    assert parse_config(yaml.safe_dump(tree), ["server.embed_batch_size=9"]).server.embed_batch_size == 9


@pytest.mark.parametrize("override", ["model.num_layers", "num_layers=3", "=3", "model.=3", ".num_layers=3", "a.b.c=3", ""])
def test_malformed_overrides_are_shown(override: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--set takes section.key=value, got {override!r}")):
        parse(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=[", "--set run.name=[: the value is not valid YAML: "),
        ("model.num_layer=3", "model.num_layer: unknown setting; did you mean model.num_layers?"),
        ("modle.num_layers=3", "modle: unknown setting; did you mean model?"),
        ("training.train_iters=", "training.train_iters: expected a whole number, got None"),
        ("optimizer.zero_stage=9", "optimizer.zero_stage: 9 is not one of 0, 1, 2, 3"),
    ],
)
def test_overrides_are_checked_like_the_file(override: str, message: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(message)):
        parse(override)


def test_an_override_into_a_section_that_is_no_mapping() -> None:
    with pytest.raises(UserError, match=r"^server: expected a mapping of settings, got 3"):
        parse_config(yaml.safe_dump({**tiny_tree(), "server": 3}), ["server.embed_batch_size=8"])


def test_what_is_dumped_reads_back() -> None:
    config = parse(
        "optimizer.learning_rate=1e-5",
        "optimizer.min_learning_rate=1e-7",
        "model.transformer_engine=off",
        "run.name='007'",
        "selection.max_refreshes=2",
        "oracle.estimator=first_order",
        data={"pool": "a: b # c"},
    )
    assert parse_config(dump_config(config)) == config
    assert config_from_dict(config_to_dict(config)) == config
    assert parse_config(dump_config(tiny_config())) == tiny_config()


def test_the_dump_has_every_setting() -> None:
    dumped = yaml.safe_load(dump_config(tiny_config()))
    for section in dataclasses.fields(Config):
        names = {item.name for item in dataclasses.fields(getattr(tiny_config(), section.name))}
        assert set(dumped[section.name]) == names


def test_every_setting_is_explained_and_immutable() -> None:
    config = tiny_config()
    for section in dataclasses.fields(Config):
        for item in dataclasses.fields(getattr(config, section.name)):
            assert item.metadata["help"], f"{section.name}.{item.name}"
            assert item.kw_only
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.name = "other"  # type: ignore[misc]


def test_differences_leave_out_what_a_resumed_run_may_change() -> None:
    saved = tiny_config()
    end = saved.training.train_iters
    changed = tiny_config(
        run={"name": "b", "output_dir": "elsewhere"},
        training={"train_iters": 40, "log_interval": 1, "micro_batch_size": 4, "recompute_granularity": "full"},
        optimizer={"decay_iters": end, "zero_stage": 3},
        parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True},
        server={"tensor_model_parallel_size": 2},
        checkpoint={"save_interval": 7},
    )
    assert config_differences(saved, changed) == []
    changed = tiny_config(run={"seed": 5}, training={"global_batch_size": 8}, optimizer={"schedule": "wsd"})
    assert config_differences(saved, changed) == [
        "run.seed: 1234 -> 5",
        "training.global_batch_size: 4 -> 8",
        "optimizer.schedule: 'cosine' -> 'wsd'",
    ]
    assert config_differences(saved, saved) == []


def test_a_longer_run_must_not_get_another_schedule_unnoticed() -> None:
    saved, longer = tiny_config(training={"train_iters": 20}), tiny_config(training={"train_iters": 40})
    assert config_differences(saved, longer) == [
        "optimizer.decay_iters: 20 -> 40 (it follows training.train_iters when unset; "
        "set optimizer.decay_iters=20 to go on with the saved schedule)"
    ]
    kept = tiny_config(training={"train_iters": 40}, optimizer={"decay_iters": 20})
    assert config_differences(saved, kept) == []
    constant = {"schedule": "constant"}
    assert (
        config_differences(
            tiny_config(training={"train_iters": 20}, optimizer=constant), tiny_config(training={"train_iters": 40}, optimizer=constant)
        )
        == []
    )
