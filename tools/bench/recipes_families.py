"""Pools of a fixed size out of a larger one: as it is, or with families of near-duplicates whose members are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import TOKENIZER_FILE, PoolFacts, PoolIndex, write_index, write_manifest
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.writer import write_shard
from megatron_groupmates.utils.files import atomic_directory, write_bytes

FAMILIES_FILE = "families.npy"
"""Beside a written pool: int64 ``[num_samples]``, the family of each sample, -1 for one without near-duplicates."""

_SHARD_SAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the samples of a new pool come from.

    Attributes:
        rows: int64 ``[n]``, row of the source.
        family: int64 ``[n]``, number of the family, -1 for none.
        copy: bool ``[n]``, whether the sample is a noisy copy rather than the source's own.
    """

    rows: np.ndarray
    family: np.ndarray
    copy: np.ndarray


def plan_pool(num_source: int, num_samples: int, share: float, copies: tuple[int, int], seed: int) -> Plan:
    """Draw ``num_samples`` samples, about ``share`` of them in families of an original and ``copies`` (least, most) copies.

    Raises:
        UserError: the source has too few samples.
    """
    generator = np.random.default_rng(seed)
    sizes: list[int] = []
    while sum(sizes) < round(share * num_samples):
        sizes.append(1 + int(generator.integers(copies[0], copies[1] + 1)))
    in_families = sum(sizes)
    needed = len(sizes) + num_samples - in_families
    if num_samples < in_families or num_source < needed:
        raise UserError(f"a pool of {num_samples} samples needs {needed} different ones, but the text gives {num_source}; give --data more")
    drawn = generator.permutation(num_source)[:needed]
    family = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(num_samples - in_families, -1)])
    rows = np.concatenate([np.repeat(drawn[: len(sizes)], sizes), drawn[len(sizes) :]])
    copy = np.concatenate([np.zeros(1, bool), family[1:] == family[:-1]]) & (family >= 0)
    order = generator.permutation(num_samples)
    return Plan(rows[order], family[order], copy[order])


def noisy_copy(tokens: np.ndarray, other: np.ndarray, probability: float, generator: np.random.Generator) -> np.ndarray:
    """``tokens`` int64 ``[l]`` with each replaced, with ``probability``, by a token drawn from the text ``other``."""
    replaced = generator.random(len(tokens)) < probability
    return np.where(replaced, generator.choice(other, len(tokens)), tokens)


def write_pool(source: PoolIndex, plan: Plan, probability: float, seed: int, directory: Path, made_by: dict[str, Any]) -> None:
    """Write the planned pool with its families into ``directory``, complete or absent."""
    generator, reader = np.random.default_rng(seed), PoolReader(source)
    samples = [tokens for first in range(0, len(plan.rows), 4096) for tokens in reader.read_many(plan.rows[first : first + 4096])]
    others = generator.integers(0, len(samples), len(samples))
    originals = list(samples)
    for number in np.flatnonzero(plan.copy).tolist():
        samples[number] = noisy_copy(originals[number], originals[others[number]], probability, generator)
    facts = PoolFacts(
        member_format="raw",
        token_dtype=source.token_dtype,
        vocab_size=source.vocab_size,
        eot_id=source.eot_id,
        tokenizer=dict(source.tokenizer),
        kinds=list(source.kinds),
        made_by=made_by,
    )
    with atomic_directory(directory) as partial:
        write_bytes(partial / TOKENIZER_FILE, Path(source.file_path(TOKENIZER_FILE)).read_bytes())
        shards = [
            write_shard(partial, number, samples[first : first + _SHARD_SAMPLES], source.token_dtype)
            for number, first in enumerate(range(0, len(samples), _SHARD_SAMPLES))
        ]
        write_index(partial, facts, shards, source.kind_of[plan.rows])
        write_manifest(partial, shards)
        np.save(partial / FAMILIES_FILE, plan.family)


def family_counts(family: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """What a selection takes of the families.

    Args:
        family: int64 ``[num_samples]``, -1 for none.
        rows: selected rows.

    Returns:
        ``families``: with a member taken; ``members``: taken of each of these, on average (0 without any);
        ``redundant_share``: of the selection, samples of which a near-duplicate was taken as well, all but one of each family.
    """
    taken = family[rows]
    touched, counts = np.unique(taken[taken >= 0], return_counts=True)
    return {
        "families": len(touched),
        "members": float(counts.mean()) if len(touched) else 0.0,
        "redundant_share": float((counts.sum() - len(touched)) / max(1, len(rows))),
    }
