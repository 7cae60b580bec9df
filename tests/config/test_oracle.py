"""What the oracle measures with where the config leaves it open."""

from __future__ import annotations

import pytest

from megatron_groupmates.config import learning_rate, oracle_estimator, oracle_learning_rate
from megatron_groupmates.config.oracle import GRADIENT_LEARNING_RATE
from tests.common.configs import tiny_config

STEP = 40


@pytest.mark.parametrize(
    ("recipe", "estimator", "used"),
    [
        ("paper", "auto", "exact"),
        ("paper", "exact", "exact"),
        ("default", "auto", "first_order"),
        ("default", "exact", "exact"),
        ("default", "directional", "directional"),
    ],
)
def test_estimator(recipe: str, estimator: str, used: str) -> None:
    assert oracle_estimator(tiny_config(selection={"recipe": recipe}, oracle={"estimator": estimator})) == used


def test_the_default_is_auto() -> None:
    assert oracle_estimator(tiny_config(selection={"recipe": "default"})) == "first_order"


@pytest.mark.parametrize("peak", [1e-2, 1e-5])
def test_learning_rate(peak: float) -> None:
    def rate(**oracle: object) -> float:
        config = tiny_config(optimizer={"learning_rate": peak, "min_learning_rate": peak / 10}, oracle=oracle)
        scheduled = learning_rate(config, STEP + 1)
        assert (scheduled > GRADIENT_LEARNING_RATE) == (peak == 1e-2)
        return oracle_learning_rate(config, STEP) / scheduled

    assert rate(estimator="exact") == 1.0
    for estimator in ("auto", "first_order", "directional"):
        assert (rate(estimator=estimator) == 1.0) == (peak == 1e-5)
    config = tiny_config(optimizer={"learning_rate": peak, "min_learning_rate": peak / 10})
    assert oracle_learning_rate(config, STEP) == min(GRADIENT_LEARNING_RATE, learning_rate(config, STEP + 1))
    exact = tiny_config(oracle={"estimator": "exact"})
    assert oracle_learning_rate(exact, STEP, 0.25) == 0.25 and oracle_learning_rate(config, STEP, 0.25) == GRADIENT_LEARNING_RATE
    for estimator in ("exact", "first_order", "directional"):
        assert oracle_learning_rate(tiny_config(oracle={"estimator": estimator, "learning_rate": 0.5}), STEP) == 0.5
