"""Beam search for rollouts whose summed prediction is extreme: exact, though most scores are only bounded."""

from __future__ import annotations

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.extensions import Extensions, lowest_sum
from megatron_groupmates.influence.relation import Relation

DIRECTIONS = ("lowest", "highest")

_LARGEST_VALUE = 1e90


def beam_search(
    embeddings: np.ndarray,
    individual: np.ndarray,
    relation: Relation,
    num_steps: int,
    num_beams: int,
    num_extensions: int = 5,
    direction: str = "lowest",
) -> np.ndarray:
    """Rollouts with the lowest or highest summed prediction.

    Step 1 keeps the ``num_beams`` best candidates by individual influence. Each later step extends every rollout by
    its ``num_extensions`` best next candidates, none twice in a rollout, and keeps the ``num_beams`` best sums. Ties go
    to the lower sample id, between rollouts to the lexicographically lower one.

    The result is that of scoring every candidate after every rollout in float64, where a candidate's similarity to a
    rollout is the sum of its inner products (``np.vecdot``) with the samples of the rollout, added in ascending order
    of value, divided by their number. So it depends neither on the order of the samples nor on which of several
    identical candidates they are: rollouts of the same samples, and exact copies, tie bitwise. Scores that cannot
    matter are not computed: bounds that include their rounding error rule them out.

    The cost grows as predictions come closer together. Where individual influences are nearly constant each step takes one
    matrix product of all distinct sets with all candidates, in bfloat16 where the CPU has it. Identical candidates cost
    nothing; where the scores of very many different ones tie to rounding (one-hot embeddings), all those are scored in
    float64, which takes longer than a plain search. Memory beside the input is that of the embeddings in float32 and
    some 200 MB at most.

    Args:
        embeddings: float ``[N, d]``, h of the candidates.
        individual: float ``[N]``, s of the candidates.
        relation: the fitted relation.
        num_steps: T, samples in a rollout.
        num_beams: rollouts that survive each step.
        num_extensions: continuations tried for each rollout and step.
        direction: ``lowest`` or ``highest``.

    Returns:
        int64 ``[num_beams, T]``, best first; fewer rows where the search cannot make as many.

    Raises:
        UserError: fewer candidates than steps, values that are not finite, or an unknown direction.
    """
    embeddings, individual, sign = check_candidates(embeddings, individual, num_steps, direction)
    beams = np.argsort(sign * individual, kind="stable")[:num_beams].astype(np.int64)[:, None]
    totals = sign * individual[beams[:, 0]]
    if not len(beams) or num_steps == 1:
        return beams[:, :1].repeat(num_steps, axis=1)
    search = Extensions(embeddings, individual, relation, sign, num_steps, num_extensions)
    for _ in range(num_steps - 1):
        samples, scores, group_of = search.best(beams, totals, num_beams)
        sums = totals[:, None] + scores[group_of]
        origin, column = np.nonzero(np.isfinite(sums) & (sums <= lowest_sum(sums, num_beams)))
        longer = np.concatenate([beams[origin], samples[group_of[origin], column][:, None]], axis=1)
        sums = sums[origin, column]
        best = np.lexsort((*longer.T[::-1], sums))[:num_beams]
        beams, totals = longer[best], sums[best]
    return beams


def check_candidates(
    embeddings: np.ndarray, individual: np.ndarray, num_steps: int, direction: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """The input as float arrays (individual float64), and the sign that makes the direction's best the lowest.

    Raises:
        UserError: the input cannot be searched.
    """
    embeddings, individual = np.asarray(embeddings), np.asarray(individual, np.float64)
    if direction not in DIRECTIONS:
        raise UserError(f"direction is {direction!r}; choose one of {', '.join(DIRECTIONS)}")
    if embeddings.ndim != 2 or individual.shape != embeddings.shape[:1]:
        raise UserError(f"embeddings have shape {list(embeddings.shape)} and individual {list(individual.shape)}; give [N, d] with [N]")
    if len(individual) < num_steps:
        raise UserError(f"{len(individual)} candidates cannot fill a rollout of {num_steps} samples; give more")
    # np.max, unlike max, lets a NaN through.
    largest = np.max([float(extreme) for values in (individual, embeddings) for extreme in (values.max(initial=0), -values.min(initial=0))])
    if not largest < _LARGEST_VALUE:
        raise UserError(
            f"an embedding or an individual influence is {largest}, not a number below {_LARGEST_VALUE:g}; fit the relational model again"
        )
    return embeddings, individual, 1.0 if direction == "lowest" else -1.0
