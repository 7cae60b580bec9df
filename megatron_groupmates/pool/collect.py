"""All samples of a pool in the making, in input order: ids in a file, everything else in arrays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.encode import EncodedBatch
from megatron_groupmates.pool.packing import Packer, SampleBlock, one_per_document
from megatron_groupmates.pool.records import Document

_MAX_KINDS = 1 << 15  # the index numbers kinds in 16 bits
_SAMPLE_COLUMNS = ("lengths", "main_document", "parts_per_sample")
_PART_COLUMNS = ("part_document", "part_first_token", "part_num_tokens")
_DOCUMENT_COLUMNS = ("file", "line", "kind")


class SampleCollector:
    """Takes encoded batches in input order.

    Args:
        spool_path: file the ids are written to.
        dtype: of the ids.
        pack: tokens per packed context, None for one sample per document.
        kind_field: dotted path of the source kind in a record.

    Attributes:
        counts: documents accepted and rejected, tokens encoded and dropped.
        rejects_by_kind: number of rejects of each kind.
    """

    def __init__(self, spool_path: Path, dtype: str, pack: int | None, kind_field: str) -> None:
        self._spool_path = spool_path
        self._spool = open(spool_path, "wb")
        self._dtype = dtype
        self._packer = None if pack is None else Packer(pack, dtype)
        self._kind_field = kind_field
        self._kind_numbers: dict[str, int] = {}
        self._urls: list[str] = []
        self._columns: dict[str, list[np.ndarray]] = {
            name: [np.empty(0, dtype=np.int64)] for name in (*_SAMPLE_COLUMNS, *_PART_COLUMNS, *_DOCUMENT_COLUMNS)
        }
        self.counts = Counter(documents_accepted=0, documents_rejected=0, tokens_encoded=0, tokens_dropped_in_tails=0)
        self.rejects_by_kind: Counter[str] = Counter()

    def add(self, batch: EncodedBatch) -> None:
        """Take a batch.

        Raises:
            UserError: there are too many source kinds.
            OSError: the ids cannot be written.
        """
        first_document = len(self._urls)
        self._add_documents(batch)
        self.counts["documents_accepted"] += len(batch.documents)
        self.counts["documents_rejected"] += len(batch.rejects)
        self.counts["tokens_encoded"] += len(batch.tokens)
        self.rejects_by_kind.update(reject.kind for reject in batch.rejects)
        if self._packer is None:
            self._add_block(one_per_document(batch.tokens, batch.lengths, first_document))
            return
        self._add_block(self._packer.add(batch.tokens, batch.lengths, first_document))
        if batch.ends_file:
            self.counts["tokens_dropped_in_tails"] += self._packer.drop_tail()

    def finish(self, file_names: list[str]) -> CollectedSamples:
        """All samples; no batch can be added afterwards. ``file_names`` are those of the input files, by number."""
        self._spool.close()
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        self._columns.clear()
        has_tokens = self._spool_path.stat().st_size > 0
        tokens = np.memmap(self._spool_path, dtype=self._dtype, mode="r") if has_tokens else np.empty(0, self._dtype)
        return CollectedSamples(tokens, columns, self._urls, list(self._kind_numbers), file_names)

    def close(self) -> None:
        """Give up: close the spool without a word about what is in it."""
        self._spool.close()

    def _add_documents(self, batch: EncodedBatch) -> None:
        kinds = [self._kind_number(document) for document in batch.documents]
        self._urls += [document.url for document in batch.documents]
        self._columns["file"].append(np.full(len(kinds), batch.file, dtype=np.int64))
        self._columns["line"].append(np.array([document.line for document in batch.documents], dtype=np.int64))
        self._columns["kind"].append(np.array(kinds, dtype=np.int64))

    def _kind_number(self, document: Document) -> int:
        kind = document.field(self._kind_field)
        if kind is None:
            return -1
        number = self._kind_numbers.setdefault(kind, len(self._kind_numbers))
        if number >= _MAX_KINDS:
            raise UserError(
                f"the records have more than {_MAX_KINDS} different values of {self._kind_field!r}; name a coarser field with --kind-field"
            )
        return number

    def _add_block(self, block: SampleBlock) -> None:
        self._spool.write(block.tokens.tobytes())
        for name in (*_SAMPLE_COLUMNS, *_PART_COLUMNS):
            self._columns[name].append(getattr(block, name))


class CollectedSamples:
    """All samples of a pool in the making, by number in input order.

    Attributes:
        num_samples: of the pool.
        kinds: names of the source kinds, in order of first appearance.
        kind_of: int16[num_samples], kind of the document with most tokens in the sample, -1 where it has none.
        lengths: int64[num_samples], tokens of each.
    """

    def __init__(
        self, tokens: np.ndarray, columns: dict[str, np.ndarray], urls: list[str], kinds: list[str], file_names: list[str]
    ) -> None:
        self._tokens = tokens
        self._columns = columns
        self._urls = urls
        self._file_names = file_names
        self._starts = np.cumsum(columns["lengths"]) - columns["lengths"]
        self._part_stops = np.cumsum(columns["parts_per_sample"])
        self.kinds = kinds
        self.lengths = columns["lengths"]
        self.num_samples = len(self.lengths)
        self.kind_of = columns["kind"][columns["main_document"]].astype(np.int16)

    def tokens(self, sample: int) -> np.ndarray:
        """Ids of a sample, [length]."""
        start = self._starts[sample]
        return self._tokens[start : start + self.lengths[sample]]

    def source(self, sample: int) -> dict[str, Any]:
        """Where a sample comes from, in the form of :func:`megatron_groupmates.pool.sources.write_sources`."""
        columns, stop = self._columns, self._part_stops[sample]
        documents = []
        for part in range(stop - columns["parts_per_sample"][sample], stop):
            document = columns["part_document"][part]
            documents.append(
                {
                    "file": self._file_names[columns["file"][document]],
                    "line": int(columns["line"][document]),
                    "url": self._urls[document],
                    "first_token": int(columns["part_first_token"][part]),
                    "num_tokens": int(columns["part_num_tokens"][part]),
                }
            )
        kind = self.kind_of[sample]
        return {"kind": None if kind < 0 else self.kinds[kind], "documents": documents}
