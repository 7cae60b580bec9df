"""Rules that span sections: each is broken once, and its message names the settings and both values."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_groupmates.config import UserError, check_world_size, ffn_hidden_size, server_tensor_parallel_size
from tests.common.configs import tiny_config


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"model": {"hidden_size": 34}}, ["model.hidden_size: 34", "model.num_attention_heads 4"]),
        ({"model": {"hidden_size": 36, "num_attention_heads": 12}}, ["model.num_attention_heads: 12", "odd size 3", "even size"]),
        (
            {"model": {"position_embedding_type": "learned_absolute", "max_position_embeddings": 7}},
            ["model.max_position_embeddings: 7", "8 tokens", "model.sequence_length"],
        ),
        ({"model": {"rotary_percent": 0.4}}, ["model.rotary_percent: 0.4", "heads of size 8", "rotates 3"]),
        ({"model": {"rotary_percent": 0.0}}, ["model.rotary_percent: 0.0", "rotates 0"]),
        ({"checkpoint": {"directory": "/saves"}}, ["checkpoint.directory: /saves", "run.output_dir"]),
        ({"run": {"output_dir": "run", "selection_dir": "/sel"}}, ["run.selection_dir: /sel", "run.output_dir"]),
        ({"model": {"num_query_groups": 3}}, ["model.num_query_groups: 3", "model.num_attention_heads 4"]),
        ({"parallel": {"tensor_model_parallel_size": 3}}, ["parallel.tensor_model_parallel_size: 3", "4 query groups"]),
        (
            {"model": {"num_query_groups": 2}, "parallel": {"tensor_model_parallel_size": 4}},
            ["parallel.tensor_model_parallel_size: 4", "2 query groups"],
        ),
        ({"server": {"tensor_model_parallel_size": 3}}, ["server.tensor_model_parallel_size: 3", "4 query groups"]),
        (
            {"model": {"vocab_size": 301}, "parallel": {"tensor_model_parallel_size": 2}},
            ["parallel.tensor_model_parallel_size: 2", "model.vocab_size 301", "multiple of 2"],
        ),
        (
            {"model": {"vocab_size": 301}, "server": {"tensor_model_parallel_size": 2}},
            ["server.tensor_model_parallel_size: 2", "model.vocab_size 301"],
        ),
        (
            {"model": {"ffn_hidden_size": 50}, "parallel": {"tensor_model_parallel_size": 4}},
            ["parallel.tensor_model_parallel_size: 4", "MLP width 50"],
        ),
        ({"training": {"global_batch_size": 5}}, ["training.global_batch_size: 5", "training.micro_batch_size 2"]),
        (
            {"model": {"sequence_length": 7}, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
            ["parallel.sequence_parallel: model.sequence_length 7", "parallel.tensor_model_parallel_size 2", "multiple of 2"],
        ),
        ({"optimizer": {"warmup_iters": 21}}, ["optimizer.warmup_iters: 21", "(20 steps)"]),
        ({"optimizer": {"warmup_iters": 11, "decay_iters": 10}}, ["optimizer.warmup_iters: 11", "(10 steps)"]),
        (
            {"optimizer": {"schedule": "wsd", "warmup_iters": 11, "decay_fraction": 0.5}},
            ["optimizer.decay_fraction: 0.5 of 20 steps is 10 steps of decay", "the 11 steps of optimizer.warmup_iters"],
        ),
        ({"optimizer": {"learning_rate": 1e-5}}, ["optimizer.min_learning_rate: 3e-05", "optimizer.learning_rate 1e-05"]),
        ({"data": {"reference": None}}, ["data.reference", "selection.method 'group'"]),
        ({"data": {"reference": None}, "selection": {"method": "similarity"}}, ["data.reference", "selection.method 'similarity'"]),
        ({"selection": {"ratio": 0}}, ["selection.ratio: 0", "above 0 and at most 1"]),
        ({"selection": {"mode": "blocking", "max_staleness_steps": 3}}, ["selection.max_staleness_steps", "selection.mode is 'blocking'"]),
        (
            {"selection": {"recipe": "paper"}, "relational": {"labels": "momentum_corrected"}},
            ["relational.labels: 'momentum_corrected'", "'increments'", "selection.recipe=default"],
        ),
        (
            {"selection": {"recipe": "paper"}, "relational": {"standardisation": "per_position"}},
            ["relational.standardisation: 'per_position'", "'pooled'"],
        ),
        ({"selection": {"recipe": "paper"}, "relational": {"relation": "additive"}}, ["relational.relation: 'additive'", "'product'"]),
        ({"selection": {"recipe": "paper"}, "oracle": {"estimator": "first_order"}}, ["oracle.estimator: 'first_order'", "'exact'"]),
        ({"selection": {"recipe": "paper"}, "oracle": {"budget": "adaptive"}}, ["oracle.budget: 'adaptive'", "'fixed'"]),
        ({"selection": {"recipe": "paper"}, "oracle": {"bootstrap": "diverse"}}, ["oracle.bootstrap: 'diverse'", "'plain'"]),
        (
            {"selection": {"recipe": "paper", "share_per_cluster": "global"}},
            ["selection.share_per_cluster: 'global'", "'equal'", "recipe=default"],
        ),
        ({"relational": {"finetune_encoder": "yes"}}, ["relational.finetune_encoder: yes", "'probe'", "use auto"]),
        (
            {"selection": {"recipe": "paper"}, "relational": {"encoder": "bge", "finetune_encoder": "no"}},
            ["relational.finetune_encoder: no", "'bge'", "recipe=default"],
        ),
        ({"selection": {"minimum_source_share": {"code": 1.5}}}, ["selection.minimum_source_share: code: 1.5", "from 0 to 1"]),
        ({"selection": {"minimum_source_share": {"code": "half"}}}, ["selection.minimum_source_share: code: 'half'", "from 0 to 1"]),
        ({"selection": {"minimum_source_share": {"code": True}}}, ["selection.minimum_source_share: code: True"]),
        (
            {"selection": {"minimum_source_share": {"code": 0.7, "prose": 0.5}}},
            ["selection.minimum_source_share", "sum to 1.2", "lower them"],
        ),
        ({"oracle": {"num_candidates": 16, "rollout_length": 17}}, ["oracle.num_candidates: 16", "oracle.rollout_length 17"]),
    ],
)
def test_every_rule_names_the_settings_and_their_values(sections: dict[str, dict[str, Any]], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config(**sections)
    assert str(caught.value).startswith(parts[0])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"num_query_groups": 2}, "parallel": {"tensor_model_parallel_size": 2}},
        {"model": {"sequence_length": 7}, "parallel": {"tensor_model_parallel_size": 2}},
        {"model": {"sequence_length": 7}, "parallel": {"sequence_parallel": True}},
        {"optimizer": {"zero_stage": 3}},
        {"optimizer": {"warmup_iters": 20}},
        {"optimizer": {"warmup_iters": 10, "schedule": "wsd", "decay_fraction": 0.5}},
        {"optimizer": {"learning_rate": 1e-5, "min_learning_rate": 1e-5}},
        {"selection": {"method": "random"}, "data": {"reference": None}},
        {"selection": {"mode": "async", "max_staleness_steps": 0}},
        {"selection": {"recipe": "paper"}, "relational": {"labels": "increments", "relation": "product", "standardisation": "pooled"}},
        {"oracle": {"num_candidates": 17, "rollout_length": 17}},
    ],
)
def test_the_allowed_side_of_each_rule(sections: dict[str, dict[str, Any]]) -> None:
    config = tiny_config(**sections)
    for section, settings in sections.items():
        for name, value in settings.items():
            assert getattr(getattr(config, section), name) == value


def test_rules_of_the_selection_do_not_bind_a_run_without_it() -> None:
    config = tiny_config(selection={"enabled": False, "ratio": 0.0}, data={"reference": None})
    assert not config.selection.enabled and config.selection.ratio == 0.0


@pytest.mark.parametrize(("world_size", "tensor", "data"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2)])
def test_world_size_splits_into_groups(world_size: int, tensor: int, data: int) -> None:
    assert check_world_size(tiny_config(parallel={"tensor_model_parallel_size": tensor}), world_size) == data


def test_world_sizes_that_do_not_fit_say_what_would() -> None:
    config = tiny_config(parallel={"tensor_model_parallel_size": 2})
    message = "parallel.tensor_model_parallel_size: 2 does not divide the 3 started ranks; start a multiple of 2"
    with pytest.raises(UserError, match=re.escape(message)):
        check_world_size(config, 3)
    message = (
        "training.global_batch_size: 4 is not a multiple of micro_batch_size 2 x data-parallel size 3 "
        "(6 ranks / tensor_model_parallel_size 2); choose a multiple of 6"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        check_world_size(config, 6)


def test_the_server_follows_the_trainer_unless_told() -> None:
    parallel = {"tensor_model_parallel_size": 2}
    assert server_tensor_parallel_size(tiny_config(parallel=parallel)) == 2
    assert server_tensor_parallel_size(tiny_config(parallel=parallel, server={"tensor_model_parallel_size": 1})) == 1


@pytest.mark.parametrize(("hidden_size", "width"), [(96, 256), (100, 512), (1024, 2816), (2048, 5632), (2560, 6912), (4096, 11008)])
def test_the_width_of_the_feed_forward_follows_dclm(hidden_size: int, width: int) -> None:
    model = {"hidden_size": hidden_size, "num_attention_heads": 2, "ffn_hidden_size": None}
    assert ffn_hidden_size(tiny_config(model=model)) == width
    assert ffn_hidden_size(tiny_config()) == 48
