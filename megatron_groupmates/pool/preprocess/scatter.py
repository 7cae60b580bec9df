"""First pass of a build: each input file to a spool of samples, sorted by cell, and its counts."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_groupmates.pool.preprocess.encode import EncodedBatch, encode_file, read_batches
from megatron_groupmates.pool.preprocess.options import BuildOptions
from megatron_groupmates.pool.preprocess.packing import Packer, SampleBlock, one_per_document
from megatron_groupmates.pool.preprocess.plan import cells_of
from megatron_groupmates.pool.preprocess.quality import QualityFilter
from megatron_groupmates.pool.preprocess.records import Document, DocumentFile, InputFile, Reject, domain_of
from megatron_groupmates.pool.preprocess.spool import SpoolWriter
from megatron_groupmates.pool.preprocess.work import FileFacts, WorkDirectory
from megatron_groupmates.pool.sources import DocumentSource, source_line
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.files import atomic_file, write_bytes

BLOCK_BYTES = 1 << 27
URL_DOMAIN = "url.domain"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclasses.dataclass(frozen=True)
class ScatterContext:
    """What every file of the first pass needs.

    Attributes:
        work: where the results go.
        files: all input files.
        tokenizer: of the pool.
        options: of the build.
        num_cells: of the build.
        quality: the quality filter, if there is one.
        threshold: lowest score that it keeps.
    """

    work: WorkDirectory
    files: tuple[InputFile, ...]
    tokenizer: PoolTokenizer
    options: BuildOptions
    num_cells: int
    quality: QualityFilter | None = None
    threshold: float | None = None


def score_file(context: ScatterContext, number: int, advance: Callable[[int], None]) -> None:
    """Write the quality scores of the documents of input file ``number``, float32, in order.

    Raises:
        UserError: the filter cannot be loaded.
        OSError: the file cannot be read or the scores cannot be written.
    """
    assert context.quality is not None
    file, position = DocumentFile(context.files[number], context.options.text_field), 0
    scores = [np.empty(0, dtype=np.float32)]
    for documents, _ in read_batches(file):
        scores.append(_score(context.quality, documents).astype(np.float32))
        advance(file.position - position)
        position = file.position
    content = io.BytesIO()
    np.save(content, np.concatenate(scores))
    write_bytes(context.work.scores_path(number), content.getvalue())


def scatter_file(context: ScatterContext, number: int, advance: Callable[[int], None]) -> None:
    """Write spool, rejects and, last, counts of input file ``number``.

    Raises:
        UserError: the quality filter cannot be loaded.
        OSError: the file cannot be read or the results cannot be written.
    """
    work, options, position = context.work, context.options, 0
    file = DocumentFile(context.files[number], options.text_field)
    samples = _FileSamples(file.name, context.tokenizer.token_dtype, options)
    rejects: Counter[str] = Counter()
    num_documents = num_tokens = 0
    with atomic_file(work.spool_path(number)) as spool, atomic_file(work.rejects_path(number)) as rejects_file:
        writer = SpoolWriter(spool, context.num_cells, BLOCK_BYTES)
        for batch in encode_file(file, context.tokenizer, _low_quality(context, number)):
            first_sample = samples.num_samples
            tokens, lengths, kinds, sources = samples.add(batch)
            writer.add(tokens, lengths, cells_of(options.seed, file.name, first_sample, len(lengths), context.num_cells), kinds, sources)
            write_rejects(rejects_file, batch.rejects)
            rejects.update(reject.kind for reject in batch.rejects)
            num_documents += len(batch.documents)
            num_tokens += len(batch.tokens)
            advance(batch.position - position)
            position = batch.position
        num_dropped = samples.drop_tail()
        num_blocks, table_start = writer.finish()
    assert file.sha256 is not None
    assert num_tokens == samples.num_tokens + num_dropped, (num_tokens, samples.num_tokens, num_dropped)
    facts = FileFacts(
        name=file.name,
        num_bytes=file.num_bytes,
        sha256=file.sha256,
        documents=num_documents,
        rejects=dict(sorted(rejects.items())),
        tokens=num_tokens,
        tokens_dropped=num_dropped,
        samples=samples.num_samples,
        kinds=samples.kinds,
        num_blocks=num_blocks,
        table_start=table_start,
    )
    work.write_facts(number, facts)


def write_rejects(file: BinaryIO, rejects: list[Reject]) -> None:
    """Append rejects as JSON lines; they may be most of the documents, hence no spaces."""
    file.write("".join(_encode(vars(reject)) + "\n" for reject in rejects).encode(errors="replace"))


def _low_quality(context: ScatterContext, number: int) -> Callable[[list[Document]], list[Reject | None]] | None:
    """Verdicts on documents that come in the order of the file; None where there is no filter."""
    quality, threshold = context.quality, context.threshold
    if quality is None:
        return None
    assert threshold is not None
    score = functools.partial(_score, quality) if quality.top_fraction is None else _known_scores(context.work.scores_path(number))

    def verdicts(documents: list[Document]) -> list[Reject | None]:
        return [
            None if score_of >= threshold else Reject(document.file, document.line, "low_quality", f"{score_of:.4g}")
            for document, score_of in zip(documents, score(documents).tolist(), strict=True)
        ]

    return verdicts


def _score(quality: QualityFilter, documents: list[Document]) -> np.ndarray:
    return quality.score([document.text for document in documents])


def _known_scores(path: Path) -> Callable[[list[Document]], np.ndarray]:
    """The scores that an earlier pass has written, handed out in order."""
    scores, place = np.load(path), 0

    def following(documents: list[Document]) -> np.ndarray:
        nonlocal place
        place += len(documents)
        return scores[place - len(documents) : place]

    return following


def _field(document: Document, dotted_path: str) -> str | None:
    value = document.field(dotted_path)
    return domain_of(document.url) or None if value is None and dotted_path == URL_DOMAIN else value


class _FileSamples:
    """Documents of a file to samples: ids, kinds and source lines.

    Attributes:
        kinds: samples of each kind, in order of the kinds' numbers.
        num_samples: made so far.
        num_tokens: in them.
    """

    def __init__(self, file_name: str, dtype: str, options: BuildOptions) -> None:
        self._file_name = file_name
        self._options = options
        self._packer = None if options.pack is None else Packer(options.pack, dtype)
        self._kind_numbers: dict[str, int] = {}
        # Documents of which a sample may still need something: the last ones, from number _first_document on.
        self._sources: list[DocumentSource] = []
        self._kinds: list[int] = []
        self._first_document = 0
        self.kinds: dict[str, int] = {}
        self.num_samples = self.num_tokens = 0

    def add(self, batch: EncodedBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[bytes]]:
        """Take documents. Returns (ids, lengths, kinds, source lines) of the samples that are complete."""
        first = self._first_document + len(self._sources)
        for document in batch.documents:
            fields = {name: value for name in self._options.metadata_fields if (value := _field(document, name)) is not None}
            self._sources.append(DocumentSource(self._file_name, document.line, document.url, fields))
            kind = _field(document, self._options.kind_field)
            self._kinds.append(-1 if kind is None else self._kind_numbers.setdefault(kind, len(self._kind_numbers)))
        make = one_per_document if self._packer is None else self._packer.add
        block = make(batch.tokens, batch.lengths, first)
        kinds = np.array(self._kinds, dtype=np.int32)[block.main_document - self._first_document]
        lines = self._source_lines(block, kinds)
        self._count(block, kinds)
        self._forget_documents()
        return block.tokens, block.lengths, kinds, lines

    def drop_tail(self) -> int:
        """End the file. Returns the number of tokens that fill no context."""
        return 0 if self._packer is None else self._packer.drop_tail()

    def _source_lines(self, block: SampleBlock, kinds: np.ndarray) -> list[bytes]:
        columns = (block.part_document - self._first_document, block.part_first_token, block.part_num_tokens)
        parts = [self._sources[document].part(first, count) for document, first, count in zip(*(c.tolist() for c in columns), strict=True)]
        names = [*self._kind_numbers, None]  # the last for -1
        lines, start = [], 0
        for kind, count in zip(kinds.tolist(), block.parts_per_sample.tolist(), strict=True):
            lines.append(source_line(names[kind], parts[start : start + count]))
            start += count
        return lines

    def _count(self, block: SampleBlock, kinds: np.ndarray) -> None:
        self.num_samples += len(kinds)
        self.num_tokens += len(block.tokens)
        counts = np.bincount(kinds + 1, minlength=len(self._kind_numbers) + 1)[1:].tolist()
        for kind, count in zip(self._kind_numbers, counts, strict=True):
            self.kinds[kind] = self.kinds.get(kind, 0) + count

    def _forget_documents(self) -> None:
        pending = self._packer.first_pending if self._packer is not None else None
        keep = self._first_document + len(self._sources) if pending is None else pending
        num_done = keep - self._first_document
        del self._sources[:num_done], self._kinds[:num_done]
        self._first_document = keep
