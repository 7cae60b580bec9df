"""What the two recipes stand for, and that explicit settings win over them."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_groupmates.server.recipe import resolve_recipe
from tests.common.gpt_runs import tiny_config


def test_default_recipe():
    recipe = resolve_recipe(tiny_config("unused"))
    assert (recipe.labels, recipe.bootstrap) == ("momentum_corrected", "diverse")
    assert (recipe.fit.standardisation, recipe.fit.relation) == ("per_position", "product")
    assert recipe.selection.share_per_cluster == "global"


def test_paper_recipe():
    recipe = resolve_recipe(tiny_config("unused", selection__recipe="paper"))
    assert (recipe.labels, recipe.bootstrap) == ("increments", "plain")
    assert (recipe.fit.standardisation, recipe.fit.relation) == ("pooled", "product")
    assert recipe.selection.share_per_cluster == "equal"


@pytest.mark.parametrize(("setting", "value"), [("labels", "increments"), ("standardisation", "pooled"), ("relation", "additive")])
def test_an_explicit_setting_wins(setting, value):
    changed = resolve_recipe(tiny_config("unused", **{f"relational__{setting}": value}))
    default = resolve_recipe(tiny_config("unused"))
    where = changed if setting == "labels" else changed.fit
    assert getattr(where, setting) == value
    restored = (
        dataclasses.replace(changed, labels=default.labels)
        if setting == "labels"
        else dataclasses.replace(changed, fit=dataclasses.replace(changed.fit, **{setting: getattr(default.fit, setting)}))
    )
    assert restored == default


@pytest.mark.parametrize("bootstrap", ["plain", "diverse"])
def test_bootstrap_by_name(bootstrap):
    assert resolve_recipe(tiny_config("unused", oracle__bootstrap=bootstrap)).bootstrap == bootstrap


@pytest.mark.parametrize(("share", "expected"), [("auto", "global"), ("equal", "equal"), ("global", "global")])
def test_share_per_cluster_by_name(share, expected):
    minimum = {"code": 0.05}
    recipe = resolve_recipe(tiny_config("unused", selection__share_per_cluster=share, selection__minimum_source_share=minimum))
    assert (recipe.selection.share_per_cluster, recipe.selection.minimum_source_share) == (expected, minimum)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_settings_reach_their_stage(recipe):
    resolved = resolve_recipe(
        tiny_config(
            "unused",
            selection__recipe=recipe,
            relational__embedding_dim=7,
            relational__learning_rate=0.5,
            relational__weight_decay=0.25,
            relational__warmup_steps=9,
            relational__epochs=11,
            relational__batch_rollouts=13,
            relational__held_out_fraction=0.125,
            selection__num_clusters=17,
            selection__kmeans_iterations=19,
            selection__gumbel_temperature=0.75,
        )
    )
    fit, selection = resolved.fit, resolved.selection
    assert (fit.embedding_dim, fit.learning_rate, fit.weight_decay, fit.warmup_steps) == (7, 0.5, 0.25, 9)
    assert (fit.epochs, fit.batch_rollouts, fit.held_out_fraction) == (11, 13, 0.125)
    assert (selection.num_clusters, selection.kmeans_iterations, selection.gumbel_temperature) == (17, 19, 0.75)


@pytest.mark.parametrize(
    ("recipe", "encoder", "finetune", "expected"),
    [
        ("default", "probe", "auto", (False, 64, 3e-3, 30)),
        ("paper", "probe", "auto", (False, 64, 3e-3, 5)),
        ("default", "probe", "no", (False, 64, 3e-3, 30)),
        ("default", "some/encoder", "auto", (True, None, 5e-5, 5)),
        ("paper", "some/encoder", "auto", (True, None, 5e-5, 5)),
        ("default", "some/encoder", "yes", (True, None, 5e-5, 5)),
        ("default", "some/encoder", "no", (False, 64, 3e-3, 30)),
    ],
)
def test_a_text_encoder_is_trained_unless_told_otherwise(recipe, encoder, finetune, expected):
    settings = {"encoder": encoder, "finetune_encoder": finetune, "embedding_dim": 64, "learning_rate": None, "epochs": None}
    resolved = resolve_recipe(
        tiny_config("unused", selection__recipe=recipe, **{f"relational__{name}": value for name, value in settings.items()})
    )
    fit = resolved.fit
    assert (resolved.finetune_encoder, fit.embedding_dim, fit.learning_rate, fit.epochs) == expected


def test_a_learning_rate_that_is_given_stays():
    assert resolve_recipe(tiny_config("unused", relational__encoder="some/encoder", relational__learning_rate=0.5)).fit.learning_rate == 0.5
