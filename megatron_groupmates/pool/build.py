"""Raw documents to a pool: encode, pack, shuffle, write."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.collect import CollectedSamples, SampleCollector
from megatron_groupmates.pool.encode import encode_files
from megatron_groupmates.pool.index import POOL_FILE, TOKENIZER_FILE, PoolFacts, PoolIndex, write_index, write_manifest
from megatron_groupmates.pool.order import derive_key, permute
from megatron_groupmates.pool.records import DocumentFile, find_inputs
from megatron_groupmates.pool.sources import write_sources
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.pool.writer import shard_name, write_shard
from megatron_groupmates.utils.files import atomic_directory, write_bytes
from megatron_groupmates.utils.progress import progress_bar

REJECTS_FILE = "rejects.jsonl"
_SPOOL_FILE = "tokens.spool"
_TOOL = "preprocess_dclm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What shapes the pool's content: same options, inputs and tokenizer, byte-identical pools.

    Attributes:
        pack: tokens per packed context; None for one sample per document.
        samples_per_shard: in all shards but the last.
        seed: of the global shuffle.
        text_field: dotted path of the text in a record.
        kind_field: dotted path of the source kind in a record.
        member_format: ``raw`` or ``json.gz``.

    Raises:
        UserError: a number is out of range.
    """

    pack: int | None = None
    samples_per_shard: int = 8192
    seed: int = 0
    text_field: str = "text"
    kind_field: str = "metadata.kind"
    member_format: str = "raw"

    def __post_init__(self) -> None:
        if self.pack is not None and self.pack < 2:
            raise UserError(f"a packed context has at least 2 tokens, not {self.pack}; change --pack")
        if self.samples_per_shard < 1:
            raise UserError(f"a shard has at least 1 sample, not {self.samples_per_shard}; change --samples-per-shard")


def build_pool(
    inputs: Sequence[str | Path],
    output: Path | str,
    tokenizer: PoolTokenizer,
    options: BuildOptions,
    *,
    num_workers: int = 0,
    max_rejects: int | None = None,
) -> tuple[dict[str, Any], bool]:
    """Make a pool from raw documents; it is complete or absent.

    Args:
        inputs: files, glob patterns and directories.
        output: the pool's directory; must not exist, or be empty, or be a pool made with the same arguments.
        tokenizer: of the pool.
        options: what shapes its content.
        num_workers: processes that tokenise, 0 to do it in this one; no influence on the content.
        max_rejects: lines that may be unusable; None for any number. Above it the rejects are left in
            ``<output>.rejects.jsonl``.

    Returns:
        (summary, built): counts that add up, and False where the pool was there already.

    Raises:
        UserError: an input matches nothing, no sample comes of the inputs, too many lines are rejected, or ``output``
            is something else.
        OSError: the pool cannot be written; nothing is left of it.
    """
    output = Path(output)
    files = [DocumentFile(path, name, options.text_field) for name, path in find_inputs(inputs)]
    arguments = {
        "inputs": [[file.name, file.num_bytes] for file in files],
        "eot_id": tokenizer.eot_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **dataclasses.asdict(options),
    }
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _check_present(output, arguments), False
    with atomic_directory(output) as partial:
        spool_path = partial / _SPOOL_FILE
        collector = SampleCollector(spool_path, tokenizer.token_dtype, options.pack, options.kind_field)
        with contextlib.closing(collector):
            _collect(files, tokenizer, collector, num_workers, max_rejects, partial / REJECTS_FILE, output)
            samples = collector.finish([file.name for file in files])
        if samples.num_samples == 0:
            raise UserError(f"no sample comes of the {len(files)} input files: {_describe(collector)}; check --text-field, or lower --pack")
        summary = _summarise(collector, samples)
        _write(partial, samples, tokenizer, options, {"tool": _TOOL, "arguments": arguments, "summary": summary})
        spool_path.unlink()
    return summary, True


def _check_present(output: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Summary of the pool that is there, if it was made with the same arguments."""
    if not (output / POOL_FILE).is_file():
        raise UserError(f"{output} is not empty and not a pool; choose another --output or remove it")
    made_by = PoolIndex.open(output).facts["made_by"]
    present = made_by.get("arguments", {})
    different = sorted(name for name in {*present, *arguments} if present.get(name) != arguments.get(name))
    if made_by.get("tool") != _TOOL or different:
        values = "; ".join(f"{name} was {_shorten(present.get(name))}, is {_shorten(arguments.get(name))}" for name in different)
        raise UserError(f"{output} is a pool made with other arguments ({values}); choose another --output or remove it")
    return made_by["summary"]


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _collect(
    files: list[DocumentFile],
    tokenizer: PoolTokenizer,
    collector: SampleCollector,
    num_workers: int,
    max_rejects: int | None,
    rejects_path: Path,
    output: Path,
) -> None:
    """Encode all files into the collector and write the rejects file."""
    done = [0] * len(files)
    with (
        open(rejects_path, "w", encoding="utf-8") as rejects_file,
        progress_bar(sum(file.num_bytes for file in files), "tokenise", unit="B", unit_scale=True) as bar,
    ):
        for batch in encode_files(files, tokenizer, num_workers):
            collector.add(batch)
            for reject in batch.rejects:
                rejects_file.write(json.dumps(dataclasses.asdict(reject)) + "\n")
            bar.update(batch.position - done[batch.file])
            done[batch.file] = batch.position
            num_rejects = collector.counts["documents_rejected"]
            if max_rejects is not None and num_rejects > max_rejects:
                rejects_file.flush()
                kept = output.with_name(f"{output.name}.{REJECTS_FILE}")
                write_bytes(kept, rejects_path.read_bytes())
                raise UserError(
                    f"{num_rejects} lines rejected so far, --max-rejects is {max_rejects}; {kept} lists them ({_describe(collector)})"
                )


def _describe(collector: SampleCollector) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(collector.rejects_by_kind.items()))
    return (
        f"{collector.counts['documents_accepted']} documents with {collector.counts['tokens_encoded']} tokens, "
        f"{collector.counts['documents_rejected']} lines rejected{f' ({kinds})' if kinds else ''}"
    )


def _summarise(collector: SampleCollector, samples: CollectedSamples) -> dict[str, Any]:
    counts = collector.counts
    tokens_in_pool = int(samples.lengths.sum())
    assert tokens_in_pool + counts["tokens_dropped_in_tails"] == counts["tokens_encoded"]
    return {
        "documents_read": counts["documents_accepted"] + counts["documents_rejected"],
        **counts,
        "rejects_by_kind": dict(sorted(collector.rejects_by_kind.items())),
        "tokens_in_pool": tokens_in_pool,
        "samples": samples.num_samples,
    }


def _write(directory: Path, samples: CollectedSamples, tokenizer: PoolTokenizer, options: BuildOptions, made_by: dict[str, Any]) -> None:
    """Write shuffled shards, their sources, the tokenizer and the index."""
    order = permute(np.arange(samples.num_samples), samples.num_samples, derive_key("pool shuffle", options.seed))
    shards = []
    with progress_bar(samples.num_samples, "write shards", unit="sample", unit_scale=True) as bar:
        for number, first in enumerate(range(0, samples.num_samples, options.samples_per_shard)):
            chosen = order[first : first + options.samples_per_shard].tolist()
            shards.append(write_shard(directory, number, map(samples.tokens, chosen), tokenizer.token_dtype, options.member_format))
            write_sources(directory, shard_name(number), map(samples.source, chosen))
            bar.update(len(chosen))
    write_bytes(directory / TOKENIZER_FILE, tokenizer.content)
    facts = PoolFacts(
        member_format=options.member_format,
        token_dtype=tokenizer.token_dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer={"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        kinds=samples.kinds,
        made_by=made_by,
    )
    write_manifest(directory, shards)
    write_index(directory, facts, shards, samples.kind_of[order])
