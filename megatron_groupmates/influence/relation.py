"""How a sample's predicted influence depends on the group it joins: numbers only, no model."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

from megatron_groupmates.config.errors import UserError

RELATIONS = ("product", "additive", "none")
"""``product``: s * alpha * (1 - m / tau), paper section 3.2; ``additive``: s + gamma * m + c; ``none``: s alone.

s is a sample's individual influence, m the mean inner product of its embedding with the group's embeddings. The
product is linear in m, so alpha * mean(1 - h.h(g) / tau) over a group is alpha * (1 - m / tau).
"""

Values = TypeVar("Values")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation with its learned scalars.

    Attributes:
        kind: one of ``RELATIONS``.
        alpha: scale of the product relation.
        tau: temperature of the product relation, not zero.
        gamma: weight of the mean similarity in the additive relation.
        offset: the additive relation's constant c.
    """

    kind: str = "product"
    alpha: float = 1.0
    tau: float = 1.0
    gamma: float = 0.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in RELATIONS:
            raise UserError(f"relation is {self.kind!r}; choose one of {', '.join(RELATIONS)}")
        scalars = (self.alpha, self.tau, self.gamma, self.offset)
        if not np.isfinite(scalars).all() or (self.kind == "product" and self.tau == 0):
            raise UserError(
                f"relation {self.kind}: alpha, tau, gamma and c are {scalars}; all must be finite and tau "
                "not zero; fit the relational model again"
            )

    def scores(self, individual: Any, mean_similarity: Any) -> Any:
        """Predicted influences of samples joining a group that is not empty.

        Args:
            individual: s, any shape, NumPy arrays or floats; float64 where exactness matters.
            mean_similarity: m, same shape or one that broadcasts.
        """
        return relation_scores(self.kind, individual, mean_similarity, alpha=self.alpha, tau=self.tau, gamma=self.gamma, offset=self.offset)

    def sensitivity(self, individual: np.ndarray) -> np.ndarray:
        """By how much ``scores`` can change per unit of mean similarity, float64, shape of ``individual``."""
        individual = np.asarray(individual, np.float64)
        if self.kind == "product":
            return abs(self.alpha / self.tau) * np.abs(individual)
        return np.full(individual.shape, abs(self.gamma) if self.kind == "additive" else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Fields by name."""
        return dataclasses.asdict(self)


def relation_scores(kind: str, individual: Values, mean_similarity: Values, *, alpha: Any, tau: Any, gamma: Any, offset: Any) -> Values:
    """The formula of each kind of ``RELATIONS``, for torch tensors and NumPy arrays alike."""
    if kind == "product":
        return individual * alpha * (1 - mean_similarity / tau)
    if kind == "additive":
        return individual + gamma * mean_similarity + offset
    return individual + 0 * mean_similarity
