"""How a relational model is fitted."""

from __future__ import annotations

import dataclasses
import math

from megatron_groupmates.config.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Settings of a fit."""

    embedding_dim: int | None = 32
    """Size of the learned projection of the encoder's features; None: the features are the embeddings."""
    relation: str = "product"
    """``product`` or ``additive``."""
    standardisation: str = "per_position"
    """``pooled`` or ``per_position``."""
    learning_rate: float = 3e-3
    """Peak of a linear warm-up followed by a linear decay to zero at the end of the last epoch."""
    weight_decay: float = 0.1
    """AdamW's, on matrices and the head; biases, norms and the relation's scalars do not decay."""
    warmup_steps: int = 20
    """At most; never more than a tenth of all steps."""
    epochs: int = 30
    """At most; see :attr:`patience`."""
    batch_rollouts: int = 16
    """Rollouts in one optimizer step, over all ranks together."""
    held_out_fraction: float = 0.2
    """Share of the rollouts that is kept for early stopping and the report."""
    max_held_out: int = 1000
    max_refits: int = 3
    """Further fits, each with another seed, split included, while the sign check refuses the model."""

    def __post_init__(self) -> None:
        positive = {
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "batch_rollouts": self.batch_rollouts,
            "max_held_out": self.max_held_out,
            "embedding_dim": 1 if self.embedding_dim is None else self.embedding_dim,
        }
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"{name} is {value}; it must be above 0")
        for name, value in {"weight_decay": self.weight_decay, "warmup_steps": self.warmup_steps, "max_refits": self.max_refits}.items():
            if value < 0:
                raise UserError(f"{name} is {value}; it must be at least 0")
        if not 0 < self.held_out_fraction < 1:
            raise UserError(f"held_out_fraction is {self.held_out_fraction}; it must be above 0 and below 1")
        if self.relation not in ("product", "additive"):
            raise UserError(f"relation is {self.relation!r}; choose product or additive")

    @property
    def patience(self) -> int:
        """Epochs without a better held-out Spearman after which a fit stops: a third of all, at least 5.

        The learning rate decays over all epochs all the same, so a fit that goes on is not changed by the rule.
        """
        return max(5, math.ceil(self.epochs / 3))
