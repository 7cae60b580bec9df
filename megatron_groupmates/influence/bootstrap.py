"""Bootstrap rollouts: groups that the ``init`` model predicts to be best and worst (paper section 3.3)."""

from __future__ import annotations

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.influence.relation import Relation

DIRECTIONS = ("lowest", "highest")
METHODS = ("plain", "diverse")

_SHORTLIST = 256
_CHUNK_ELEMENTS = 1 << 22


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
    to the lower sample id, between rollouts to the lexicographically lower one. Float64 throughout; candidates that a
    bound proves out of reach are not scored, which changes no result.

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
        UserError: fewer candidates than steps, or an unknown direction.
    """
    embeddings, individual, sign = _checked(embeddings, individual, num_steps, direction)
    beams = np.argsort(sign * individual, kind="stable")[:num_beams].astype(np.int64)[:, None]
    totals = sign * individual[beams[:, 0]]
    reach = _reach(embeddings, individual, relation, sign)
    by_reach = np.argsort(reach, kind="stable")
    for _ in range(num_steps - 1):
        samples, scores = _best_extensions(embeddings, individual, relation, sign, beams, num_extensions, reach, by_reach)
        origin, column = np.nonzero(np.isfinite(scores))
        longer = np.concatenate([beams[origin], samples[origin, column][:, None]], axis=1)
        sums = totals[origin] + scores[origin, column]
        best = np.lexsort((*longer.T[::-1], sums))[:num_beams]
        beams, totals = longer[best], sums[best]
    return beams


def diverse_bootstrap(
    embeddings: np.ndarray,
    individual: np.ndarray,
    relation: Relation,
    num_steps: int,
    count: int,
    direction: str = "lowest",
    max_uses: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Good (or bad) rollouts that cover many samples, where a beam search ends in permutations of one set.

    The better half of the candidates by individual influence is cut into ``count`` equal strata; each rollout starts
    from a random sample of its stratum and is extended greedily by the best next sample that is in fewer than
    ``max_uses`` rollouts. Where that would repeat an earlier rollout's set, the last sample is the next best one.
    Extensions come from the samples best by individual influence, about four times as many as the caps require.

    Args:
        embeddings: float ``[N, d]``.
        individual: float ``[N]``.
        relation: the fitted relation.
        num_steps: T, samples in a rollout.
        count: rollouts to make.
        direction: ``lowest`` or ``highest``.
        max_uses: rollouts one sample may be in.
        seed: decides the starts and which stratum comes first.

    Returns:
        int64 ``[count, T]``, no sample twice in a row, no two rows with the same set.

    Raises:
        UserError: too few candidates for so many rollouts, or an unknown direction.
    """
    embeddings, individual, sign = _checked(embeddings, individual, num_steps, direction)
    num_candidates = len(individual)
    needed = max(count, -(-count * num_steps // max_uses) + num_steps)
    if num_candidates < needed:
        raise UserError(
            f"{count} diverse rollouts of {num_steps} samples, each in at most {max_uses}, need {needed} "
            f"candidates but there are {num_candidates}; give more candidates or fewer rollouts"
        )
    order = np.argsort(sign * individual, kind="stable")
    generator = np.random.default_rng(seed)
    starts = _stratified_starts(order, count, generator)
    choices = np.sort(order[: max(4 * needed, num_candidates // 4)])
    rows, values = embeddings[choices], individual[choices]
    uses = np.bincount(starts, minlength=num_candidates)[choices]
    seen: set[frozenset[int]] = set()
    rollouts = []
    for start in starts.tolist():
        rollout, similarity = [start], np.zeros(len(choices))
        for step in range(1, num_steps):
            similarity += np.vecdot(rows, embeddings[rollout[-1]])
            scores = sign * relation.scores(values, similarity / step)
            scores[(uses >= max_uses) | np.isin(choices, rollout)] = np.inf
            chosen = int(scores.argmin())
            while step == num_steps - 1 and frozenset([*rollout, int(choices[chosen])]) in seen:
                scores[chosen] = np.inf
                chosen = int(scores.argmin())
            if np.isinf(scores[chosen]):
                raise UserError(
                    f"only {len(rollouts)} of {count} diverse rollouts are possible with {num_candidates} "
                    f"candidates, each in at most {max_uses}; give more candidates or fewer rollouts"
                )
            rollout.append(int(choices[chosen]))
            uses[chosen] += 1
        seen.add(frozenset(rollout))
        rollouts.append(rollout)
    return np.array(rollouts, np.int64).reshape(count, num_steps)


def bootstrap_rollouts(
    embeddings: np.ndarray, individual: np.ndarray, relation: Relation, count: int, num_steps: int, method: str, seed: int = 0
) -> np.ndarray:
    """Bootstrap rollouts of one round: the first half lowest (best), the second half highest (worst) predictions.

    Args:
        embeddings: float ``[N, d]`` of the candidates.
        individual: float ``[N]``.
        relation: the ``init`` model's relation.
        count: rollouts in all; an odd one is among the lowest.
        num_steps: T.
        method: ``plain`` (the paper's beam search, 5 extensions) or ``diverse``.
        seed: for ``diverse``.

    Returns:
        int64 ``[count, T]``; fewer where a beam search cannot make as many.
    """
    if method not in METHODS:
        raise UserError(f"bootstrap method is {method!r}; choose one of {', '.join(METHODS)}")
    parts = []
    for direction, number in zip(DIRECTIONS, (count - count // 2, count // 2), strict=True):
        if method == "plain":
            part = beam_search(embeddings, individual, relation, num_steps, number, direction=direction)
        else:
            part = diverse_bootstrap(embeddings, individual, relation, num_steps, number, direction, seed=seed)
        parts.append(part)
    return np.concatenate(parts)


def _checked(embeddings: np.ndarray, individual: np.ndarray, num_steps: int, direction: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Contiguous float64 input, and the sign that makes the direction's best the lowest."""
    if direction not in DIRECTIONS:
        raise UserError(f"direction is {direction!r}; choose one of {', '.join(DIRECTIONS)}")
    if len(individual) < num_steps:
        raise UserError(f"{len(individual)} candidates cannot fill a rollout of {num_steps} samples; give more")
    sign = 1.0 if direction == "lowest" else -1.0
    return np.ascontiguousarray(embeddings, np.float64), np.asarray(individual, np.float64), sign


def _reach(embeddings: np.ndarray, individual: np.ndarray, relation: Relation, sign: float) -> np.ndarray:
    """For each candidate, a value that its signed score never falls below, whatever the group; float64 ``[N]``."""
    norms = np.sqrt(np.vecdot(embeddings, embeddings))
    largest = norms * norms.max()
    extremes = np.minimum(sign * relation.scores(individual, largest), sign * relation.scores(individual, -largest))
    magnitude = np.abs(extremes) + relation.sensitivity(individual) * largest + np.abs(individual)
    # Scores and norms are rounded; the margin is far above their error and far below what separates candidates.
    return extremes - 1e-9 * magnitude


def _best_extensions(
    embeddings: np.ndarray,
    individual: np.ndarray,
    relation: Relation,
    sign: float,
    beams: np.ndarray,
    num_extensions: int,
    reach: np.ndarray,
    by_reach: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The best next samples of each rollout, int64 and float64 ``[B, num_extensions]``; infinite score: there is none.

    Only the candidates first in ``by_reach`` are scored, more of them as long as one left out might be better.
    """
    num_candidates = len(individual)
    num_extensions = min(num_extensions, num_candidates)
    samples = np.empty((len(beams), num_extensions), np.int64)
    scores = np.empty((len(beams), num_extensions))
    width = min(num_candidates, max(_SHORTLIST, 2 * num_extensions))
    pending = np.arange(len(beams))
    while pending.size:
        columns = np.sort(by_reach[:width])
        chunk = max(1, _CHUNK_ELEMENTS // width)
        for start in range(0, pending.size, chunk):
            part = pending[start : start + chunk]
            values = _extension_scores(embeddings, individual, relation, sign, beams[part], columns)
            best = _lowest(values, num_extensions)
            samples[part], scores[part] = columns[best], np.take_along_axis(values, best, axis=1)
        if width == num_candidates:
            break
        pending = pending[~(scores[pending, -1] < reach[by_reach[width]])]
        width = min(num_candidates, 4 * width)
    return samples, scores


def _extension_scores(
    embeddings: np.ndarray, individual: np.ndarray, relation: Relation, sign: float, beams: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Signed scores of candidates ``columns`` after each rollout, float64 ``[B, columns]``; members are infinite."""
    members, index = np.unique(beams, return_inverse=True)
    index = index.reshape(beams.shape)
    rows = embeddings[columns]
    # np.vecdot treats every pair alike wherever it lies, so that equal candidates get bitwise equal scores.
    similarity = np.stack([np.vecdot(rows, embeddings[member]) for member in members])
    total = similarity[index[:, 0]]
    for position in range(1, beams.shape[1]):
        total += similarity[index[:, position]]
    scores = sign * relation.scores(individual[columns], total / beams.shape[1])
    where = np.searchsorted(columns, beams)
    row, position = np.nonzero(columns[np.minimum(where, len(columns) - 1)] == beams)
    scores[row, where[row, position]] = np.inf
    return scores


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Columns of the ``count`` lowest values of each row, lowest first, ties by column; int64 ``[rows, count]``."""
    limit = np.partition(values, count - 1, axis=1)[:, count - 1 : count]
    result = np.empty((len(values), count), np.int64)
    below = values <= limit
    exact = below.sum(axis=1) == count
    columns = np.nonzero(below[exact])[1].reshape(-1, count)
    order = np.argsort(np.take_along_axis(values[exact], columns, axis=1), axis=1, kind="stable")
    result[exact] = np.take_along_axis(columns, order, axis=1)
    # Ties at the limit are rare: those rows are sorted whole.
    result[~exact] = np.argsort(values[~exact], axis=1, kind="stable")[:, :count]
    return result


def _stratified_starts(order: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """A random member of each of ``count`` equal parts of the better half of ``order``, in random sequence, int64."""
    half = max(count, -(-len(order) // 2))
    edges = np.linspace(0, half, count + 1).astype(np.int64)
    return generator.permutation(order[generator.integers(edges[:-1], edges[1:])])
