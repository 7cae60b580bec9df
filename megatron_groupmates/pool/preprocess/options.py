"""What shapes the content of a pool in the making."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess.quality import DEFAULT_LABEL, QualityFilter

DEFAULT_CELL_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What shapes the pool's content: same options, inputs and tokenizer, byte-identical pools.

    Attributes:
        pack: tokens per packed context; None for one sample per document.
        samples_per_shard: in all shards but the last.
        seed: of the global shuffle.
        text_field: dotted path of the text in a record.
        kind_field: dotted path of the source kind in a record; ``url.domain`` is the host of the document's URL.
        metadata_fields: dotted paths of what else is kept beside each document; ``url.domain`` as above.
        member_format: ``raw`` or ``json.gz``.
        cell_bytes: ids of a cell of the shuffle, about.
        fasttext_model: path of a quality filter; None for none.
        fasttext_label: whose probability is the score.
        fasttext_threshold: documents with a lower score are left out.
        fasttext_top_fraction: instead of a threshold, the share of all documents that is kept; all those with the
            lowest kept score are kept.

    Raises:
        UserError: a number is out of range, or there is a threshold without a filter.
    """

    pack: int | None = None
    samples_per_shard: int = 8192
    seed: int = 0
    text_field: str = "text"
    kind_field: str = "metadata.kind"
    metadata_fields: tuple[str, ...] = ()
    member_format: str = "raw"
    cell_bytes: int = DEFAULT_CELL_BYTES
    fasttext_model: str | None = None
    fasttext_label: str = DEFAULT_LABEL
    fasttext_threshold: float | None = None
    fasttext_top_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.pack is not None and self.pack < 2:
            raise UserError(f"a packed context has at least 2 tokens, not {self.pack}; change --pack")
        if self.samples_per_shard < 1:
            raise UserError(f"a shard has at least 1 sample, not {self.samples_per_shard}; change --samples-per-shard")
        if self.cell_bytes < 1:
            raise UserError(f"a cell has at least 1 byte, not {self.cell_bytes}; change --cell-bytes")
        if self.fasttext_model is None and (self.fasttext_threshold, self.fasttext_top_fraction) != (None, None):
            raise UserError("--fasttext-threshold and --fasttext-top-fraction need --fasttext-model; name the model or leave them out")

    def quality_filter(self) -> QualityFilter | None:
        """The quality filter, None where there is none.

        Raises:
            UserError: there is no such model, or it has no or two thresholds or one that is out of range.
        """
        if self.fasttext_model is None:
            return None
        return QualityFilter(self.fasttext_model, self.fasttext_label, self.fasttext_threshold, self.fasttext_top_fraction)

    def as_arguments(self, model_fingerprint: str | None) -> dict[str, Any]:
        """As JSON that tells whether two builds have the same content: the quality filter's digest, not its path."""
        arguments = dataclasses.asdict(self)
        return {**arguments, "metadata_fields": list(self.metadata_fields), "fasttext_model": model_fingerprint}
