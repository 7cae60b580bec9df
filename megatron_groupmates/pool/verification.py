"""Checking every byte of a pool against its index."""

from __future__ import annotations

from pathlib import Path

from megatron_groupmates.pool.formats.archive import HashingFile, walk_tar
from megatron_groupmates.pool.index import INDEX_FILE, POOL_FILE, TOKENIZER_FILE, PoolIndex
from megatron_groupmates.pool.inspection import each_shard
from megatron_groupmates.pool.members import decode_members
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.files import sha256_file

_NUM_ROWS_LISTED = 5


def verify_pool(index: PoolIndex, num_workers: int = 0) -> list[str]:
    """Everything that is damaged in a pool, one line each; empty where it is as it was made.

    Checks the digests of index and tokenizer and of every shard, and that every sample is where the index says, has as
    many ids as it says, and no id beyond the vocabulary.

    Args:
        index: opened with ``verify=False``, so that one missing shard does not hide the rest.
        num_workers: processes that read shards, 0 to read in this one.
    """
    damage = []
    for name, expected in ((INDEX_FILE, index.facts["index_sha256"]), (TOKENIZER_FILE, index.tokenizer["fingerprint"])):
        path = Path(index.file_path(name))
        found = sha256_file(path) if path.is_file() else "missing"
        if found != expected:
            damage.append(f"{name}: SHA-256 {found}, {POOL_FILE} says {expected}")
    for found_in_shard in each_shard(_verify_shard, index, index.num_shards, num_workers, "verify shards"):
        damage += found_in_shard
    return damage


def _verify_shard(index: PoolIndex, shard: int) -> list[str]:
    path, facts = index.shard_path(shard), index.facts["shards"][shard]
    try:
        with storage.open_input(path) as file:
            hashing = HashingFile(file)
            damage = _verify_members(index, shard, hashing)
            digest = hashing.finish()
    except OSError as error:
        return [f"{path}: cannot be read: {error}"]
    if hashing.num_bytes != facts["num_bytes"]:
        damage.insert(0, f"{hashing.num_bytes} bytes, the index says {facts['num_bytes']}")
    elif digest != facts["sha256"]:
        damage.insert(0, f"SHA-256 {digest}, {POOL_FILE} says {facts['sha256']}")
    return [f"{path}: {problem}" for problem in damage]


def _verify_members(index: PoolIndex, shard: int, file: HashingFile) -> list[str]:
    first, stop = int(index.first_row[shard]), int(index.first_row[shard + 1])
    row_at = {offset: row for row, offset in enumerate(index.offsets[first:stop].tolist())}
    damaged: list[str] = []
    problems: list[str] = []
    try:
        for member in walk_tar(file):
            row = row_at.pop(member.offset, None)
            if row is None:
                continue
            try:
                expected = int(index.member_bytes[first + row])
                if member.num_bytes != expected:
                    raise ValueError(f"{member.num_bytes} bytes, the index says {expected}")
                length = int(index.lengths[first + row])
                sizes, lengths = [member.num_bytes], [length]
                decode_members(member.content, [0], sizes, lengths, index.member_format, index.token_dtype, index.vocab_size)
            except ValueError as error:
                damaged.append(f"row {row}: {error}")
    except ValueError as error:
        problems.append(str(error))
    missing = sorted(row_at.values())
    if missing:
        rows = ", ".join(map(str, missing[:_NUM_ROWS_LISTED])) + (" ..." if len(missing) > _NUM_ROWS_LISTED else "")
        problems.append(f"{len(missing)} samples are not where the index says: rows {rows}")
    if len(damaged) > _NUM_ROWS_LISTED:
        damaged = [*damaged[:_NUM_ROWS_LISTED], f"and {len(damaged) - _NUM_ROWS_LISTED} more rows"]
    return problems + damaged
