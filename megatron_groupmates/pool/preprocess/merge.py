"""Last step of a build: the index and everything else that tells of the whole pool; ``pool.json`` comes last."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_groupmates.pool.index import (
    INDEX_FILE,
    MANIFEST_FILE,
    POOL_FILE,
    TOKENIZER_FILE,
    PoolFacts,
    ShardRecord,
    write_index,
    write_manifest,
)
from megatron_groupmates.pool.preprocess.gather import Destination, StoredShard
from megatron_groupmates.pool.preprocess.plan import merge_kinds
from megatron_groupmates.pool.preprocess.records import Reject
from megatron_groupmates.pool.preprocess.scatter import write_rejects
from megatron_groupmates.pool.preprocess.work import FileFacts, WorkDirectory
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.files import atomic_file, write_bytes

REJECTS_FILE = "rejects.jsonl"
INPUTS_FILE = "inputs.jsonl"
MAX_KINDS = 1 << 15  # the index numbers kinds in 16 bits

_UNCOUNTED_KIND = "low_quality"  # a filter's work, not bad input


def summarise(facts: Sequence[FileFacts], duplicate_of: Sequence[int | None], num_named_twice: int) -> dict[str, Any]:
    """Counts of a build over all input files; they add up.

    Args:
        facts: of the input files.
        duplicate_of: for each, the file it is a duplicate of, None where it is none. Of a duplicate the accepted
            documents become rejects.
        num_named_twice: files that were named more than once and read once.
    """
    rejects: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for file, original in zip(facts, duplicate_of, strict=True):
        rejects.update(file.rejects)
        counts["tokens_encoded"] += file.tokens
        if original is not None:
            rejects["duplicate_input"] += file.documents
            counts["tokens_in_duplicates"] += file.tokens
            continue
        counts["documents_accepted"] += file.documents
        counts["tokens_dropped_in_tails"] += file.tokens_dropped
        counts["samples"] += file.samples
    num_rejected, num_read = rejects.total(), sum(file.documents + sum(file.rejects.values()) for file in facts)
    assert num_read == counts["documents_accepted"] + num_rejected
    return {
        "inputs": len(facts),
        "inputs_named_twice": num_named_twice,
        "inputs_duplicate": len(facts) - sum(original is None for original in duplicate_of),
        "documents_read": num_read,
        "documents_accepted": counts["documents_accepted"],
        "documents_rejected": num_rejected,
        "rejects_by_kind": dict(sorted((kind, count) for kind, count in rejects.items() if count)),
        "tokens_encoded": counts["tokens_encoded"],
        "tokens_in_duplicates": counts["tokens_in_duplicates"],
        "tokens_dropped_in_tails": counts["tokens_dropped_in_tails"],
        "tokens_in_pool": counts["tokens_encoded"] - counts["tokens_in_duplicates"] - counts["tokens_dropped_in_tails"],
        "samples": counts["samples"],
    }


def count_bad(summary: dict[str, Any]) -> int:
    """Rejected documents that are bad input: all but those that the quality filter leaves out."""
    return summary["documents_rejected"] - summary["rejects_by_kind"].get(_UNCOUNTED_KIND, 0)


def write_all_rejects(path: Any, work: WorkDirectory, facts: Sequence[tuple[int, FileFacts]], duplicate_of: Sequence[int | None]) -> None:
    """Write the rejects of files in their order. A duplicate has one line (number 0) for all its documents.

    Args:
        path: to write to.
        work: of the build.
        facts: (number, facts) of finished files.
        duplicate_of: for each of them, the place in ``facts`` of the file it is a duplicate of, or None.
    """
    with atomic_file(path) as out:
        for (number, file), original in zip(facts, duplicate_of, strict=True):
            if original is not None:
                detail = f"the same bytes as {facts[original][1].name}; its {file.documents} documents are left out"
                write_rejects(out, [Reject(file.name, 0, "duplicate_input", detail)])
            with open(work.rejects_path(number), "rb") as part:
                shutil.copyfileobj(part, out, 1 << 20)


def merge_pool(
    work: WorkDirectory,
    destination: Destination,
    facts: Sequence[FileFacts],
    duplicate_of: Sequence[int | None],
    num_shards: int,
    tokenizer: PoolTokenizer,
    member_format: str,
    made_by: dict[str, Any],
) -> None:
    """Write and publish all files of the pool but the shards, which are at their place. Called by one rank.

    Raises:
        OSError: the results cannot be written.
    """
    directory = destination.directory
    names, kinds = merge_kinds(
        [{} if original is not None else file.kinds for file, original in zip(facts, duplicate_of, strict=True)], MAX_KINDS
    )
    records = _StoredRecords(work, num_shards)
    kind_of, num_tokens = _kinds_of_samples(work, num_shards, made_by["summary"]["samples"], kinds)
    assert num_tokens == made_by["summary"]["tokens_in_pool"], (num_tokens, made_by["summary"])
    write_all_rejects(directory / REJECTS_FILE, work, list(enumerate(facts)), duplicate_of)
    with atomic_file(directory / INPUTS_FILE) as out:
        for file, original in zip(facts, duplicate_of, strict=True):
            out.write(_input_line(file, None if original is None else facts[original].name))
    write_bytes(directory / TOKENIZER_FILE, tokenizer.content)
    write_manifest(directory, records)
    pool_facts = PoolFacts(
        member_format=member_format,
        token_dtype=tokenizer.token_dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer={"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        kinds=names,
        made_by=made_by,
    )
    write_index(directory, pool_facts, records, kind_of)
    destination.publish(REJECTS_FILE, INPUTS_FILE, TOKENIZER_FILE, MANIFEST_FILE, INDEX_FILE, POOL_FILE)


def _input_line(file: FileFacts, duplicate_of: str | None) -> bytes:
    line = {
        "name": file.name,
        "bytes": file.num_bytes,
        "sha256": file.sha256,
        "documents": file.documents,
        "rejects": sum(file.rejects.values()),
        "samples": 0 if duplicate_of else file.samples,
        "tokens": 0 if duplicate_of else file.tokens - file.tokens_dropped,
        **({"duplicate_of": duplicate_of} if duplicate_of else {}),
    }
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


class _StoredRecords(Sequence[ShardRecord]):
    """Records of all shards, each read when it is asked for: those of billions of samples do not fit into memory."""

    def __init__(self, work: WorkDirectory, num_shards: int) -> None:
        self._work = work
        self._num_shards = num_shards

    def __len__(self) -> int:
        return self._num_shards

    def __getitem__(self, shard: Any) -> Any:
        if not 0 <= shard < self._num_shards:
            raise IndexError(shard)
        return StoredShard.read(self._work.record_path(shard)).record


def _kinds_of_samples(
    work: WorkDirectory, num_shards: int, num_samples: int, kinds_of_files: Sequence[np.ndarray]
) -> tuple[np.ndarray, int]:
    """(int16[samples], the pool's numbers of kinds, from the files' own; tokens of all samples)."""
    counts = np.array([len(kinds) for kinds in kinds_of_files], dtype=np.int64)
    first = np.cumsum(counts) - counts
    number_of = np.concatenate([*kinds_of_files, np.array([-1], dtype=np.int16)])
    found, done, num_tokens = np.empty(num_samples, dtype=np.int16), 0, 0
    for number in range(num_shards):
        shard = StoredShard.read(work.record_path(number))
        stop = done + len(shard.kinds)
        found[done:stop] = number_of[np.where(shard.kinds < 0, -1, first[shard.files] + shard.kinds)]
        num_tokens += int(shard.record.lengths.sum(dtype=np.int64))
        done = stop
    assert done == num_samples, (done, num_samples)
    return found, num_tokens
