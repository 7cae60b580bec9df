"""Tiny tokenizers, raw files and pools for tests."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_groupmates.pool.index import POOL_FILE, TOKENIZER_FILE, PoolFacts, PoolIndex, description_digest, write_index, write_manifest
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.pool.writer import write_shard
from megatron_groupmates.utils.files import sha256_bytes

WORDS = "the cat sat on a mat and looked at every other cat in town while rain fell on roofs of old houses".split()


@functools.cache
def tokenizer_json() -> bytes:
    """A byte-level BPE with 300 ids and ``<|endoftext|>`` = 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return tokenizer.to_str().encode()


def tiny_tokenizer() -> PoolTokenizer:
    """The tokenizer of :func:`tokenizer_json`."""
    return PoolTokenizer(tokenizer_json(), "tiny")


def documents(count: int, seed: int = 0, kinds: Sequence[str] = ("web", "book")) -> list[dict[str, Any]]:
    """Records in DCLM's form, of 1 to 60 words each."""
    generator = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(generator.choice(WORDS, size=generator.integers(1, 60))),
            "url": f"http://x/{seed}/{number}",
            "metadata": {"kind": kinds[number % len(kinds)]},
        }
        for number in range(count)
    ]


def write_raw(path: Path, records: Sequence[dict[str, Any] | bytes], num_frames: int = 3) -> Path:
    """Write records (or raw lines) as the ending of ``path`` says; zstd in several frames."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    content = b"".join(line + b"\n" for line in lines)
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif not path.name.endswith(".jsonl"):
        cut = [len(content) * number // num_frames for number in range(num_frames + 1)]
        content = b"".join(zstandard.compress(content[start:stop]) for start, stop in itertools.pairwise(cut))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_pool(
    directory: Path,
    rows_per_shard: Sequence[int] = (5, 8, 3),
    length: int = 9,
    seed: int = 0,
    samples: Sequence[np.ndarray] | None = None,
    member_format: str = "raw",
    vocab_size: int = 300,
) -> PoolIndex:
    """A pool of random ids, written and opened again; ``samples`` gives the ids instead."""
    generator = np.random.default_rng(seed)
    if samples is None:
        samples = [generator.integers(0, vocab_size, length) for _ in range(sum(rows_per_shard))]
    directory.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    shards, first = [], 0
    for number, rows in enumerate(rows_per_shard):
        shards.append(write_shard(directory, number, samples[first : first + rows], dtype, member_format))
        first += rows
    tokenizer = tiny_tokenizer()
    (directory / TOKENIZER_FILE).write_bytes(tokenizer.content)
    facts = PoolFacts(
        member_format=member_format,
        token_dtype=dtype,
        vocab_size=vocab_size,
        eot_id=0,
        tokenizer={"name": "tiny", "fingerprint": tokenizer.fingerprint},
        kinds=["web", "book"],
        made_by={},
    )
    write_manifest(directory, shards)
    write_index(directory, facts, shards, (np.arange(first) % 3 - 1).astype(np.int16))
    return PoolIndex.open(directory)


def make_reference_set(directory: Path, samples: Sequence[np.ndarray], scored: Sequence[np.ndarray], vocab_size: int = 300) -> PoolIndex:
    """A reference set of these samples and scored tokens (bool or 0 and 1), written and opened again."""
    from megatron_groupmates.pool.references.examples import SCORED_DIGEST, SCORED_FILE, pack_scored

    make_pool(directory, (len(samples),), samples=samples, vocab_size=vocab_size)
    content = pack_scored([np.asarray(mask, dtype=bool) for mask in scored])
    (directory / SCORED_FILE).write_bytes(content)
    change_facts(directory, made_by={SCORED_DIGEST: sha256_bytes(content)})
    return PoolIndex.open(directory)


def change_facts(directory: Path, **changes: Any) -> None:
    """Change ``pool.json`` so that its digest holds."""
    facts = {**json.loads((directory / POOL_FILE).read_text()), **changes}
    (directory / POOL_FILE).write_text(json.dumps({**facts, "digest": description_digest(facts)}))
