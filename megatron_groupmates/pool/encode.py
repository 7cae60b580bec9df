"""Raw files to token streams, on several processes, in an order that does not depend on their number."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.records import Document, DocumentFile, Reject
from megatron_groupmates.pool.tokenizer import PoolTokenizer

_BATCH_CHARACTERS = 1 << 20
_BATCHES_PER_WORKER = 4  # in flight: enough that no worker waits, few enough that memory stays bounded


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """Consecutive documents of one input file.

    Attributes:
        file: number of the input file.
        documents: those encoded, in order, without their text.
        tokens: ids of all of them one after the other, each followed by the end-of-text token.
        lengths: int64[num_documents], tokens of each, the end-of-text token included.
        rejects: lines that could not be used.
        ends_file: whether this is the file's last batch.
        position: bytes of the file read so far.
    """

    file: int
    documents: list[Document]
    tokens: np.ndarray
    lengths: np.ndarray
    rejects: list[Reject]
    ends_file: bool
    position: int


@dataclasses.dataclass(frozen=True)
class _RawBatch:
    file: int
    documents: list[Document]
    rejects: list[Reject]
    ends_file: bool
    position: int


def encode_texts(tokenizer: PoolTokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents and put the end-of-text token after each.

    Returns:
        (tokens [sum of lengths], lengths int64[num_texts]). A length of 0 stands for a text of which the tokenizer
        makes nothing, -1 for one in which a literal special token would become a control token; neither has tokens.
    """
    eot = np.array([tokenizer.eot_id], dtype=tokenizer.token_dtype)
    parts: list[np.ndarray] = []
    lengths = np.empty(len(texts), dtype=np.int64)
    for number, tokens in enumerate(tokenizer.encode_batch(texts)):
        if tokens.size == 0 or tokenizer.is_control[tokens].any():
            lengths[number] = -1 if tokens.size else 0
            continue
        lengths[number] = tokens.size + 1
        parts += (tokens, eot)
    return np.concatenate(parts) if parts else eot[:0], lengths


def encode_files(files: list[DocumentFile], tokenizer: PoolTokenizer, num_workers: int) -> Iterator[EncodedBatch]:
    """Encode the documents of ``files``, file by file, line by line.

    Args:
        files: the input files.
        tokenizer: of the pool.
        num_workers: processes that tokenise; 0 to do it in this one. The result is the same for any number.

    Raises:
        UserError: a worker process was killed.
    """
    raw_batches = _read_batches(files)
    if num_workers == 0:
        for raw in raw_batches:
            yield _finish(raw, *encode_texts(tokenizer, [document.text for document in raw.documents]))
        return
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    executor = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))
    try:
        for raw, result in _in_order(executor, raw_batches, num_workers * _BATCHES_PER_WORKER):
            yield _finish(raw, *result)
    except BrokenProcessPool as error:
        raise UserError(f"a tokenising process was killed, probably for want of memory; use fewer than {num_workers} --workers") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _read_batches(files: list[DocumentFile]) -> Iterator[_RawBatch]:
    """Batches of about ``_BATCH_CHARACTERS``, none across files; each file ends with one, be it empty."""
    for number, file in enumerate(files):
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
                yield _RawBatch(number, documents, rejects, False, file.position)
                documents, rejects, num_characters = [], [], 0
        yield _RawBatch(number, documents, rejects, True, file.num_bytes)


def _finish(raw: _RawBatch, tokens: np.ndarray, lengths: np.ndarray) -> EncodedBatch:
    rejects = list(raw.rejects)
    for document, length in zip(raw.documents, lengths, strict=True):
        if length <= 0:
            kind = "no_tokens" if length == 0 else "control_token"
            rejects.append(Reject(document.file, document.line, kind, f"{len(document.text)} characters"))
    kept = [dataclasses.replace(document, text="") for document, length in zip(raw.documents, lengths, strict=True) if length > 0]
    rejects.sort(key=lambda reject: reject.line)
    return EncodedBatch(raw.file, kept, tokens, lengths[lengths > 0], rejects, raw.ends_file, raw.position)


def _in_order(executor: ProcessPoolExecutor, raw_batches: Iterable[_RawBatch], num_in_flight: int) -> Iterator[tuple[_RawBatch, Any]]:
    """(batch, its encoding) in the order of the batches, at most ``num_in_flight`` at a time."""
    waiting: deque[tuple[_RawBatch, Future[Any]]] = deque()
    for raw in raw_batches:
        waiting.append((raw, executor.submit(_encode_in_worker, [document.text for document in raw.documents])))
        if len(waiting) >= num_in_flight:
            oldest, future = waiting.popleft()
            yield oldest, future.result()
    while waiting:
        oldest, future = waiting.popleft()
        yield oldest, future.result()


_worker_tokenizer: PoolTokenizer | None = None


def _start_worker(tokenizer: PoolTokenizer) -> None:
    """Keep the tokenizer in this worker process; one thread each, as there is a process per core."""
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = tokenizer


def _encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    assert _worker_tokenizer is not None
    return encode_texts(_worker_tokenizer, texts)
