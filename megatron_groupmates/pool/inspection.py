"""What a pool holds, in numbers: lengths, kinds and domains, what a generation takes of each, and what is damaged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.preprocess.records import domain_of
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.sources import read_sources
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.pool.workers import run_tasks
from megatron_groupmates.utils.progress import progress_bar

KIND, DOMAIN = "kind", "url.domain"
UNKNOWN = "(unknown)"
NUM_SHOWN = 20
_NUM_BINS = 10


def describe_pool(index: PoolIndex) -> dict[str, Any]:
    """Counts, formats and lengths of a pool, as JSON values; ``histogram`` is a list of [first, last, samples]."""
    lengths = np.asarray(index.lengths)
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, _NUM_BINS + 1).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    return {
        "pool": str(index.directory),
        "fingerprint": index.fingerprint,
        "shards": index.num_shards,
        "samples": index.num_samples,
        "tokens": index.num_tokens,
        "bytes": int(index.shard_sizes.sum()),
        "member_format": index.member_format,
        "token_dtype": index.token_dtype,
        "shard_directory": str(index.shard_directory),
        "tokenizer": {**index.tokenizer, "vocab_size": index.vocab_size, "eot_id": index.eot_id},
        "made_by": index.facts["made_by"].get("tool"),
        "kinds": index.kinds,
        "lengths": {
            "min": low,
            "median": float(np.median(lengths)),
            "mean": index.num_tokens / index.num_samples,
            "max": high,
            "histogram": [[int(first), int(stop) - 1, int(n)] for first, stop, n in zip(edges[:-1], edges[1:], counts, strict=True)],
        },
    }


def describe_sample(index: PoolIndex, place: str) -> dict[str, Any]:
    """One sample: where it is, its ids, its text and its sources, as JSON values.

    Args:
        index: the pool.
        place: ``SHARD:ROW`` or a pool row.

    Raises:
        UserError: there is no such sample, or it cannot be read.
    """
    shard_name, _, row_text = place.rpartition(":")
    if not row_text.isdigit():
        raise UserError(f"--sample {place!r} should be SHARD:ROW, such as {index.shard_names[0]}:0, or a row of the whole pool")
    try:
        row = int(index.rows(shard_name, np.array([int(row_text)]))[0]) if shard_name else int(row_text)
        shards, rows_in_shard = index.locate(np.array([row]))
    except IndexError as error:
        raise UserError(f"--sample {place}: {error}") from error
    shard, row_in_shard = index.shard_names[int(shards[0])], int(rows_in_shard[0])
    tokens = PoolReader(index).read(row)
    source = next((source for number, source in enumerate(read_sources(index, shard)) if number == row_in_shard), None)
    kind = int(index.kind_of[row])
    return {
        "shard": shard,
        "row": row_in_shard,
        "pool_row": row,
        "kind": index.kinds[kind] if kind >= 0 else UNKNOWN,
        "num_tokens": len(tokens),
        "tokens": tokens.tolist(),
        "text": PoolTokenizer.of_pool(index).decode(tokens),
        "documents": [] if source is None else source["documents"],
    }


def break_down(index: PoolIndex, by: str, mask: np.ndarray | None, num_workers: int = 0) -> list[dict[str, Any]]:
    """Samples and tokens of a pool by kind, domain or a field, and how many of them are selected.

    Args:
        index: the pool.
        by: ``kind``, from the index alone; ``url.domain``; ``file``; or a field that was kept when the pool was made.
            All but ``kind`` read the sources: tokens count for the document they are from, a sample for the document
            that has most of its tokens.
        mask: bool[num_samples], the selection; None for none.
        num_workers: processes that read sources, 0 to do it in this one.

    Returns:
        ``{"value", "samples", "tokens", "selected_samples", "selected_tokens"}``, most tokens first; the selected ones
        are absent without ``mask``.

    Raises:
        UserError: the pool has no sources, or no document has such a field.
    """
    if by == KIND:
        totals = _totals_by_kind(index, mask)
    else:
        totals = {}
        for found in each_shard(_totals_of_shard, (index, by, mask), index.num_shards, num_workers, "read sources"):
            for value, counts in found.items():
                present = totals.setdefault(value, [0, 0, 0, 0])
                totals[value] = [a + b for a, b in zip(present, counts, strict=True)]
        if set(totals) == {UNKNOWN}:
            raise UserError(
                f"no document of pool {index.directory} has a field {by!r}; say --by {KIND}, {DOMAIN}, file, or a field that was kept when "
                "the pool was made"
            )
    names = ("samples", "tokens", "selected_samples", "selected_tokens")[: 2 if mask is None else 4]
    rows = [{"value": value, **dict(zip(names, counts, strict=False))} for value, counts in totals.items() if counts[0] or counts[1]]
    return sorted(rows, key=lambda row: (-row["tokens"], row["value"]))


def top_rows(rows: list[dict[str, Any]], num_shown: int = NUM_SHOWN) -> list[dict[str, Any]]:
    """The first rows, and all the others in one, called ``other (N)``."""
    shown, rest = rows[:num_shown], rows[num_shown:]
    if not rest:
        return shown
    return [*shown, {"value": f"other ({len(rest)})", **{name: sum(row[name] for row in rest) for name in rest[0] if name != "value"}}]


def _totals_by_kind(index: PoolIndex, mask: np.ndarray | None) -> dict[str, list[int]]:
    kinds, lengths = np.asarray(index.kind_of).astype(np.int64) + 1, np.asarray(index.lengths)
    columns = []
    for chosen in (slice(None), mask if mask is not None else slice(0)):
        counts = np.bincount(kinds[chosen], minlength=len(index.kinds) + 1)
        # Exact: sums of whole numbers below 2**53.
        tokens = np.bincount(kinds[chosen], weights=lengths[chosen], minlength=len(index.kinds) + 1).astype(np.int64)
        columns += [counts.tolist(), tokens.tolist()]
    return {name: list(counts) for name, *counts in zip([UNKNOWN, *index.kinds], *columns, strict=True)}


def _totals_of_shard(context: tuple[PoolIndex, str, np.ndarray | None], shard: int) -> dict[str, list[int]]:
    index, by, mask = context
    rows = slice(int(index.first_row[shard]), int(index.first_row[shard + 1]))
    selected = np.zeros(rows.stop - rows.start, dtype=bool) if mask is None else mask[rows]
    totals: dict[str, list[int]] = {}
    number = -1
    for number, source in enumerate(read_sources(index, index.shard_names[shard])):
        is_selected = bool(selected[number])
        main, most = UNKNOWN, -1
        for document in source["documents"]:
            value, num_tokens = _value_of(document, by), int(document["num_tokens"])
            counts = totals.setdefault(value, [0, 0, 0, 0])
            counts[1] += num_tokens
            counts[3] += num_tokens * is_selected
            if num_tokens > most:
                main, most = value, num_tokens
        counts = totals.setdefault(main, [0, 0, 0, 0])
        counts[0] += 1
        counts[2] += is_selected
    if number < 0:
        raise UserError(f"shard {index.shard_names[shard]} of pool {index.directory} has no sources; only --by {KIND} can be said of it")
    return totals


def _value_of(document: dict[str, Any], by: str) -> str:
    if by == DOMAIN:
        return domain_of(document["url"]) or UNKNOWN
    value = document["file"] if by == "file" else document.get("fields", {}).get(by)
    return UNKNOWN if value is None else str(value)


def each_shard(function: Callable[[Any, int], Any], context: Any, num_shards: int, num_workers: int, description: str) -> Iterator[Any]:
    """``function(context, shard)`` for every shard, in order; JSON values, passed on through files."""
    with tempfile.TemporaryDirectory(prefix="inspect_pool-") as directory, progress_bar(num_shards, description, unit="shard") as bar:
        whole = (function, context, Path(directory))
        run_tasks(_call, whole, range(num_shards), num_workers, on_advance=lambda amount: None, on_done=bar.update)
        for shard in range(num_shards):
            yield json.loads((Path(directory) / f"{shard}.json").read_text())


def _call(whole: tuple[Callable[[Any, int], Any], Any, Path], shard: int, advance: Callable[[int], None]) -> None:
    function, context, directory = whole
    (directory / f"{shard}.json").write_text(json.dumps(function(context, shard)))
