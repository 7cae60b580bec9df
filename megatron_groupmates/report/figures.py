"""Every number of a report, computed from the runs alone. Pure: no files, no plots, no HTML."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from megatron_groupmates.report.fit import FITS, fit_quality, relation_effects, relations_sentence, sign_checks, warm_starts
from megatron_groupmates.report.oracle import different_estimators_note, fallback_note, fell_back, throughput
from megatron_groupmates.report.read import Generation, Run
from megatron_groupmates.report.selection import overlap_by_chance, selection_figures
from megatron_groupmates.server.stage_names import stage_family

RANDOM = "random"
# Runs of the quickstart's size that differ in their seed alone had a standard deviation of 0.013 in final loss, so two
# of them differ by less than this in 19 cases of 20.
SEED_SPREAD = 0.04


def tokens_to_reach(evaluations: Sequence[tuple[int, float]], target: float, start: int = 0) -> float | None:
    """Training tokens at which the loss first reaches ``target``, between two evaluations by linear interpolation.

    Args:
        evaluations: (tokens, loss), tokens ascending.
        target: loss to reach.
        start: evaluations before this many tokens are left out.

    Returns:
        Tokens counted from 0 (not from ``start``); None where the target is not reached.
    """
    points = [point for point in evaluations if point[0] >= start]
    for number, (tokens, loss) in enumerate(points):
        if loss <= target:
            if number == 0:
                return float(tokens)
            earlier_tokens, earlier_loss = points[number - 1]
            share = (earlier_loss - target) / (earlier_loss - loss)
            return earlier_tokens + share * (tokens - earlier_tokens)
    return None


def selection_cost(generations: Sequence[Generation]) -> dict[str, float]:
    """Seconds and FLOPs of all stages of ``generations``."""
    stages = [stage for generation in generations for stage in generation.provenance.get("stages", {}).values()]
    return {name: float(sum(stage.get(name, 0.0) for stage in stages)) for name in ("seconds", "flops")}


def flops_per_token(run: Run) -> float | None:
    """Training FLOPs per token; None before any training."""
    return run.flops / run.consumed_tokens if run.flops and run.consumed_tokens else None


def stage_table(run: Run) -> dict[str, dict[str, float]]:
    """``{stage: {"seconds", "flops"}}`` over all generations, in order of first appearance, ``training`` first.

    The training row holds this run's own part: what was done before it branched off is not counted. The batches of an
    adaptive budget are one stage.
    """
    per_token = flops_per_token(run) or 0.0
    own_tokens = run.consumed_tokens - run.branch_tokens
    table = {"training": {"seconds": float(run.seconds), "flops": per_token * own_tokens}}
    for generation in run.generations:
        for stage, cost in generation.provenance.get("stages", {}).items():
            row = table.setdefault(stage_family(stage), {"seconds": 0.0, "flops": 0.0})
            for name in row:
                row[name] += float(cost.get(name, 0.0))
    return table


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def random_target(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Random's final evaluation loss and the tokens it took since the branch, means over its runs; None without any."""
    runs = [run for run in runs if run.arm == RANDOM and run.final]
    if not runs:
        return None
    return mean([run.final[1] for run in runs]), mean([float(run.final[0] - run.branch_tokens) for run in runs])


def token_ratio(run: Run, target: tuple[float, float] | None) -> dict[str, float | None]:
    """How many tokens ``run`` needed for random's final loss, as a share of random's own tokens since the branch.

    Selection costs the FLOPs of every round whose checkpoint training had reached by then, converted to tokens by the
    run's training FLOPs per token.

    Returns:
        ``tokens`` (since the branch), ``ratio`` and ``ratio_with_selection``; None where not reached or not known.
    """
    result: dict[str, float | None] = {"tokens": None, "ratio": None, "ratio_with_selection": None}
    if target is None or target[1] <= 0:
        return result
    reached = tokens_to_reach(run.evaluations, target[0], run.branch_tokens)
    if reached is None:
        return result
    tokens = reached - run.branch_tokens
    result |= {"tokens": tokens, "ratio": tokens / target[1]}
    begun = [
        generation for generation in run.generations if generation.provenance.get("checkpoint_step", 0) * run.tokens_per_step <= reached
    ]
    flops = selection_cost(begun)["flops"]
    per_token = flops_per_token(run)
    if per_token is not None:
        result["ratio_with_selection"] = (tokens + flops / per_token) / target[1]
    return result


def generation_figures(generation: Generation) -> dict[str, Any]:
    """What a report shows of one generation; absent parts are absent."""
    shown = (
        "method",
        "recipe",
        "checkpoint_tag",
        "checkpoint_step",
        "seed",
        "stages",
        "selected_by_kind",
        "influence_histogram",
        "overlap",
        "counts",
    )
    provenance = generation.provenance
    fit = provenance.get("fit", {})
    parts = {
        "oracle": provenance.get("oracle"),
        "throughput": throughput(provenance.get("stages", {})),
        "relations": relation_effects(fit),
        "sign_check": sign_checks(fit),
        "warm_start": warm_starts(fit),
        "overlap_by_chance": overlap_by_chance(provenance.get("counts", {})),
        **selection_figures(provenance),
    }
    return {
        "generation": generation.number,
        "effective_tokens": generation.effective_tokens,
        **{name: provenance[name] for name in shown if name in provenance},
        **{name: value for name, value in parts.items() if value},
        "fit": fit_quality(fit),
    }


def arm_figures(run: Run, target: tuple[float, float] | None) -> dict[str, Any]:
    """Everything a report says about one run."""
    cost = selection_cost(run.generations)
    per_token = flops_per_token(run)
    return {
        "arm": run.arm,
        "name": run.name,
        "seed": run.seed,
        "state": run.state,
        "branch_tokens": run.branch_tokens,
        "final_tokens": run.final[0] if run.final else None,
        "final_evaluation_loss": run.final[1] if run.final else None,
        "evaluations": [list(point) for point in run.evaluations],
        "to_random_final_loss": token_ratio(run, target),
        "stages": stage_table(run),
        "selection": {**cost, "equivalent_tokens": cost["flops"] / per_token if per_token else None},
        "generations": [generation_figures(generation) for generation in run.generations],
    }


def overlap_matrix(share: dict[str, dict[str, float]]) -> tuple[list[str], list[list[float]]]:
    """Methods, sorted, and the matrix of ``share[one][other]``, the part of ``one``'s samples that ``other`` has."""
    names = sorted(share)
    return names, [[share[one][other] for other in names] for one in names]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of at least two values."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def compare(name: str, losses: Sequence[float], other: str, other_losses: Sequence[float]) -> str:
    """One sentence on the final losses of two arms that claims no more than their seeds support."""
    difference = mean(losses) - mean(other_losses)
    values = f"({mean(losses):.3f} against {mean(other_losses):.3f})"
    where = f"{name} ended {abs(difference):.3f} {'below' if difference < 0 else 'above'} {other} {values}"
    if len(losses) > 1 and len(other_losses) > 1:
        error = math.hypot(standard_error(losses), standard_error(other_losses))
        verdict = "more than" if abs(difference) > 2 * error else "no more than"
        return f"{where}, {verdict} twice the standard error of the difference ({error:.3f})."
    if abs(difference) < SEED_SPREAD:
        return f"{name} and {other} differ by {abs(difference):.3f} {values}, which one seed cannot separate."
    return f"{where}."


def conclusions(runs: Sequence[Run]) -> list[str]:
    """What the runs show, in sentences: each arm against random, then the best arm against the others."""
    finals: dict[str, list[float]] = {}
    for run in runs:
        if run.final:
            finals.setdefault(run.arm, []).append(run.final[1])
    if len(finals) < 2:
        return ["There are fewer than two arms with an evaluation: nothing can be compared."]
    budgets = {run.final[0] for run in runs if run.final}
    if len(budgets) > 1:
        listed = ", ".join(f"{tokens:,}" for tokens in sorted(budgets))
        return [f"The arms ended at different numbers of tokens ({listed}): their final losses are not compared."]
    sentences = []
    single = [arm for arm, losses in finals.items() if len(losses) == 1]
    if single:
        which = "per arm" if len(single) == len(finals) else f"of {', '.join(single)}"
        sentences.append(f"With one seed {which}, chance is not measured: differences below {SEED_SPREAD} are not told apart.")
    others = sorted((arm for arm in finals if arm != RANDOM), key=lambda arm: mean(finals[arm]))
    if RANDOM in finals:
        sentences += [compare(arm, finals[arm], RANDOM, finals[RANDOM]) for arm in others]
    else:
        sentences.append("There is no random arm to compare with.")
    sentences += [compare(others[0], finals[others[0]], arm, finals[arm]) for arm in others[1:]]
    return [*sentences, *_ratio_sentences(runs)]


def _ratio_sentences(runs: Sequence[Run]) -> list[str]:
    target = random_target(runs)
    return [_ratio_sentence(run.label, token_ratio(run, target)) for run in runs if target is not None and run.arm != RANDOM and run.final]


def _ratio_sentence(label: str, ratio: dict[str, float | None]) -> str:
    if ratio["ratio"] is None:
        return f"{label} did not reach random's final loss."
    reached = f"{label} reached random's final loss with {ratio['ratio']:.2f} of its tokens"
    if ratio["ratio_with_selection"] is None:
        return f"{reached}; the cost of selection is not known."
    return f"{reached}, {ratio['ratio_with_selection']:.2f} when the cost of selection is counted."


def relations_answers(runs: Sequence[Run]) -> list[str]:
    """Whether relations help the prediction, a sentence for each run; by its last fit of every round."""
    answers = []
    for run in runs:
        effects = [relation_effects(generation.provenance.get("fit", {})) for generation in run.generations]
        last = [list(effect.values())[-1] for effect in effects if effect]
        if last:
            answers.append(relations_sentence(run.label, last))
    return answers


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know about the data: unfinished runs, evaluations left out, estimators and fits that were refused."""
    lines = [f"{run.label}: training is not finished (state: {run.state})." for run in runs if run.state != "finished"]
    lines += [
        f"{run.label}: {run.num_not_finite} evaluations are left out, their loss is not finite." for run in runs if run.num_not_finite
    ]
    for run in runs:
        for generation in run.generations:
            fit, oracle = generation.provenance.get("fit", {}), generation.provenance.get("oracle") or {}
            if fell_back(oracle):
                lines.append(f"{run.label}, generation {generation.number}: {fallback_note(oracle)}")
            lines += [
                f"{run.label}, generation {generation.number}: the {name} fit was refused, its sign was wrong."
                for name in FITS
                if not fit.get(name, {}).get("accepted", True)
            ]
            if "fell_back_on" in fit:
                lines.append(f"{run.label}, generation {generation.number}: selected with an earlier model, {fit['fell_back_on']}.")
    estimators = {
        run.label: {generation.provenance["oracle"]["estimator"] for generation in run.generations if generation.provenance.get("oracle")}
        for run in runs
    }
    different = different_estimators_note({label: names for label, names in estimators.items() if names})
    return lines if different is None else [*lines, different]


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of ``summary.json``: all figures of the report; numbers that are not finite become None."""
    target = random_target(runs)
    return finite(
        {
            "arms": {run.label: arm_figures(run, target) for run in runs},
            "conclusions": conclusions(runs),
            "relations": relations_answers(runs),
            "notes": notes(runs),
        }
    )


def finite(value: Any) -> Any:
    """A JSON value with every number that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def generations_with(summary: dict[str, Any], part: str) -> list[tuple[str, dict[str, Any]]]:
    """(run label, generation) for every generation of every arm that has ``part``."""
    pairs = itertools.chain.from_iterable(
        ((label, generation) for generation in arm["generations"]) for label, arm in summary["arms"].items()
    )
    return [(label, generation) for label, generation in pairs if generation.get(part)]
