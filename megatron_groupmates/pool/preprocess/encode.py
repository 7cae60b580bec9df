"""One raw file to token streams, in batches of bounded size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from megatron_groupmates.pool.preprocess.records import Document, DocumentFile, Reject
from megatron_groupmates.pool.tokenizer import PoolTokenizer

_BATCH_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """Consecutive documents of an input file.

    Attributes:
        documents: those encoded, in order.
        tokens: ids of all of them one after the other, each followed by the end-of-text token.
        lengths: int64[num_documents], tokens of each, the end-of-text token included.
        rejects: lines that are not used, in order.
        position: bytes of the file read so far.
    """

    documents: list[Document]
    tokens: np.ndarray
    lengths: np.ndarray
    rejects: list[Reject]
    position: int


def encode_texts(tokenizer: PoolTokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents and put the end-of-text token after each.

    Returns:
        (tokens [sum of lengths], lengths int64[num_texts]). A length of 0 stands for a text of which the tokenizer
        makes nothing, -1 for one in which a literal special token would become a control token; neither has tokens.
    """
    eot = np.array([tokenizer.eot_id], dtype=tokenizer.token_dtype)
    parts: list[np.ndarray] = [eot[:0]]
    lengths = np.empty(len(texts), dtype=np.int64)
    for number, tokens in enumerate(tokenizer.encode_batch(texts)):
        if tokens.size == 0 or tokenizer.is_control[tokens].any():
            lengths[number] = -1 if tokens.size else 0
            continue
        lengths[number] = tokens.size + 1
        parts += (tokens, eot)
    return np.concatenate(parts), lengths


def read_batches(file: DocumentFile) -> Iterator[tuple[list[Document], list[Reject]]]:
    """Documents and rejects of a file, in order, in batches of about a million characters."""
    documents: list[Document] = []
    rejects: list[Reject] = []
    num_characters = 0
    for item in file:
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        documents.append(item)
        num_characters += len(item.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield documents, rejects
            documents, rejects, num_characters = [], [], 0
    yield documents, rejects


def encode_file(
    file: DocumentFile, tokenizer: PoolTokenizer, low_quality: Callable[[list[Document]], list[Reject | None]] | None = None
) -> Iterator[EncodedBatch]:
    """Encode the documents of ``file``, line by line.

    Args:
        file: the input file.
        tokenizer: of the pool.
        low_quality: called with the documents batch by batch, gives a reject for each that is not good enough.

    Raises:
        OSError: it cannot be read.
    """
    for documents, rejects in read_batches(file):
        if low_quality is not None:
            verdicts = low_quality(documents)
            rejects += [verdict for verdict in verdicts if verdict is not None]
            documents = [document for document, verdict in zip(documents, verdicts, strict=True) if verdict is None]
        tokens, lengths = encode_texts(tokenizer, [document.text for document in documents])
        for document, length in zip(documents, lengths, strict=True):
            if length <= 0:
                kind = "no_tokens" if length == 0 else "control_token"
                rejects.append(Reject(document.file, document.line, kind, f"{len(document.text)} characters"))
        kept = [document for document, length in zip(documents, lengths, strict=True) if length > 0]
        rejects.sort(key=lambda reject: reject.line)
        yield EncodedBatch(kept, tokens, lengths[lengths > 0], rejects, file.position)
