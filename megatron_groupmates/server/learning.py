"""Learning influences in a round: random oracles, ``init`` fit, bootstrap oracles, ``final`` fit."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from megatron_groupmates.config import UserError, oracle_estimator
from megatron_groupmates.influence.bootstrap import bootstrap_coverage
from megatron_groupmates.influence.diverse import most_diverse
from megatron_groupmates.influence.encoder import Encoder
from megatron_groupmates.influence.probe import Probe
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.server.collecting import collect_random
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.estimating import open_oracle, validate
from megatron_groupmates.server.fitting import fit_model, last_good_model, open_candidates
from megatron_groupmates.server.noise import measure_noise
from megatron_groupmates.server.stages import choose_candidates, draw_bootstrap, measure_oracles
from megatron_groupmates.utils.files import write_json

logger = logging.getLogger(__name__)

ORACLE_FILE = "oracle.json"
"""In the round's directory: what influences were measured with, how good it was, and how much of it was measured."""


def learn_influence(
    context: RoundContext, probe: Probe, encoder: Encoder, reference_pool: PoolIndex, available: np.ndarray
) -> tuple[RelationalModel, dict[str, Any]]:
    """Random oracles, ``init`` fit, bootstrap oracles, ``final`` fit (paper sections 3.1 to 3.3). Collective.

    Leaves ``oracle.json``.

    Returns:
        The model to select with and the reports of both fits.

    Raises:
        UserError: every fit was refused and no earlier round left a good model.
    """
    candidates = open_candidates(context, encoder, choose_candidates(context, available))
    rows = candidates.rows

    oracle = open_oracle(context, probe, rows)
    rollouts, losses, budget = collect_random(context, probe, candidates, oracle)
    validation = validate(context, probe, rows, rollouts, losses, oracle)
    if validation is not None and validation["fell_back"]:
        oracle = oracle.fall_back()
        rollouts, losses, budget = collect_random(context, probe, candidates, oracle)
    noise = measure_noise(context, probe, reference_pool, rows, rollouts)
    num_random, bootstrap = len(rollouts), None
    model, init_report = fit_model(context, "init", candidates, rollouts, losses, oracle.dense)
    reports = {"init": init_report}

    wanted = _wanted_bootstrap(context, num_random, len(rows))
    if model is not None and wanted:
        bootstrap = draw_bootstrap(context, model, candidates.features(context, model), wanted)
        name = oracle.rollout_stage("oracle_bootstrap")
        more = measure_oracles(context, name, probe, rows, bootstrap, oracle.rollout_estimator)
        rollouts, losses = np.concatenate([rollouts, bootstrap]), np.concatenate([losses, more])
    facts = {
        "estimator": oracle.estimator,
        "requested": oracle_estimator(context.config),
        "learning_rate": context.oracle_learning_rate,
        "rollouts": {"random": num_random, "bootstrap": 0 if bootstrap is None else len(bootstrap)},
        "validation": validation,
        "budget": budget,
        "noise": noise,
        "bootstrap": None if bootstrap is None else bootstrap_coverage(bootstrap),
    }
    context.on_main(lambda: _keep(context, facts))
    final, reports["final"] = fit_model(context, "final", candidates, rollouts, losses, oracle.dense)
    if final is not None:
        return final, reports
    return _last_good_model(context, model, candidates.source.feature_dim, reports)


def _wanted_bootstrap(context: RoundContext, num_random: int, num_candidates: int) -> int:
    """Bootstrap rollouts to draw: as many as asked for, no more than random ones of an adaptive budget, and than are possible."""
    wanted = context.config.oracle.num_bootstrap_rollouts
    if context.config.oracle.budget == "adaptive":
        wanted = min(wanted, num_random)
    if context.recipe.bootstrap == "diverse":
        possible = 2 * most_diverse(num_candidates, context.config.oracle.rollout_length)
        if possible < wanted:
            logger.warning(
                "round %d: %d candidates make %d diverse bootstrap rollouts, not the %d of oracle.num_bootstrap_rollouts",
                context.input.number,
                num_candidates,
                possible,
                wanted,
            )
            wanted = possible
    return wanted


def _keep(context: RoundContext, facts: dict[str, Any]) -> None:
    """Write ``oracle.json`` unless an earlier run of the round did."""
    path = context.directory / ORACLE_FILE
    if not path.exists():
        write_json(path, facts)


def _last_good_model(
    context: RoundContext, init: RelationalModel | None, feature_dim: int, reports: dict[str, Any]
) -> tuple[RelationalModel, dict[str, Any]]:
    """In place of a refused ``final`` model: this round's ``init`` if that one is good, else the newest one of an earlier round."""
    if init is not None:
        model, directory = init, context.directory / "init"
    elif (earlier := last_good_model(context)) is not None and earlier[0].feature_dim == feature_dim:
        model, directory = earlier[0], context.paths.round(earlier[1]) / "final"
    else:
        raise UserError(
            "every fit of the relational model has the wrong sign on held-out rollouts, and there is no earlier model to fall "
            "back on; raise oracle.num_random_rollouts or lower oracle.learning_rate"
        )
    logger.warning("round %d: the final fit was refused; selecting with the last good model, %s", context.input.number, directory)
    return model, {**reports, "fell_back_on": str(directory.relative_to(context.paths.root))}
