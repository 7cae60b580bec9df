"""Raw examples to reference sets: ``oracle``, ``oracle_noise`` (a second oracle, for noise estimates) and ``evaluation``.

Which part an example may go to depends on its document alone (:attr:`RawExample.document_digest`), a third of all
documents each: not on the seed, the sizes, the tokenizer, or what else is in the inputs. Inputs may grow, and sets be made
again with other seeds and sizes, and still no document of an evaluation set ever turns up in an oracle set.

Within a part, examples come in the order of SHA-256 of (seed, content), and the first ``size`` of them are taken: the
first n of a set are a sample of it, and grown inputs add examples without reordering the old ones. Examples with equal
content are one. Memory is that of the examples taken.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import TOKENIZER_FILE, PoolFacts, write_index, write_manifest
from megatron_groupmates.pool.preprocess.records import InputFile, Reject, find_inputs
from megatron_groupmates.pool.references.encode import ChatTemplate, EncodedExample, ExampleEncoder, UnusableExampleError
from megatron_groupmates.pool.references.examples import SCORED_DIGEST, SCORED_FILE, pack_scored
from megatron_groupmates.pool.references.records import ExampleFields, ExampleFile, RawExample
from megatron_groupmates.pool.sources import write_sources
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.pool.writer import shard_name, write_shard
from megatron_groupmates.utils.files import atomic_directory, read_json, sha256_bytes, write_bytes, write_json, write_text
from megatron_groupmates.utils.progress import progress_bar

PARTS = ("oracle", "oracle_noise", "evaluation")
FACTS_FILE = "reference.json"
REJECTS_FILE = "rejects.jsonl"
_TOOL = "make_reference"
_SAMPLES_PER_SHARD = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What shapes the sets' content: same options, inputs and tokenizer, byte-identical sets.

    Attributes:
        sizes: examples of each part of ``PARTS``; a part that is absent or 0 is not made.
        max_tokens: longest example; the model's sequence length plus one.
        seed: of the sample taken of each part.
        delimiter: put between context and continuation.
        fields: of a record.

    Raises:
        UserError: a size or length is out of range, or a part has another name.
    """

    sizes: Mapping[str, int]
    max_tokens: int
    seed: int = 0
    delimiter: str = ""
    fields: ExampleFields = dataclasses.field(default_factory=ExampleFields)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.sizes) - set(PARTS))
        if unknown:
            raise UserError(f"there is no part {', '.join(unknown)}; --sizes names {', '.join(PARTS)}")
        if min(self.sizes.values(), default=0) < 0 or not any(self.sizes.values()):
            raise UserError(f"the sizes are {dict(self.sizes)}; give at least one part 1 example or more")
        if self.max_tokens < 2:
            raise UserError(f"an example has at least 2 tokens, one of them scored, not {self.max_tokens}; change --max-tokens")


def build_reference(
    inputs: Sequence[str | Path],
    output: Path | str,
    tokenizer: PoolTokenizer,
    options: ReferenceOptions,
    *,
    chat_template: ChatTemplate | None = None,
    max_rejects: int | None = None,
) -> tuple[dict[str, Any], bool]:
    """Make the reference sets ``output/<part>``; all of them are complete or absent.

    Args:
        inputs: files, glob patterns and directories, local or remote.
        output: directory; must not exist, or be empty, or hold sets made with the same arguments.
        tokenizer: of the pool that is trained on.
        options: what shapes the sets.
        chat_template: of the tokenizer; the plain one when None.
        max_rejects: lines that may be unusable; None for any number.

    Returns:
        (summary, built): counts that add up, and False where the sets were there already.

    Raises:
        UserError: an input matches nothing, there are too few examples or too many rejects, or ``output`` is something else.
        OSError: an input cannot be read or the sets cannot be written; nothing is left of them.
    """
    output = Path(output)
    files, _ = find_inputs(inputs)
    arguments = {
        "inputs": [[file.name, file.num_bytes] for file in files],
        "eot_id": tokenizer.eot_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "chat_template": None if chat_template is None else chat_template.digest,
        **dataclasses.asdict(options),
        "sizes": {part: options.sizes.get(part, 0) for part in PARTS},
    }
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _check_present(output, arguments), False
    chooser = _Chooser(ExampleEncoder(tokenizer, options.max_tokens, options.delimiter, chat_template), arguments["sizes"], options.seed)
    with atomic_directory(output) as partial:
        rejects = []
        for reject in _offer_all(files, options.fields, chooser):
            rejects.append(json.dumps(dataclasses.asdict(reject)) + "\n")
            if max_rejects is not None and len(rejects) > max_rejects:
                break
        write_text(partial / REJECTS_FILE, "".join(rejects))
        try:
            _check_counts(chooser, max_rejects)
        except UserError as error:
            if not rejects:
                raise
            kept = output.with_name(f"{output.name}.{REJECTS_FILE}")
            write_text(kept, "".join(rejects))
            raise UserError(f"{error}. {kept} lists the rejected lines") from None
        summary = _summarise(chooser)
        for part in PARTS:
            if chooser.chosen[part]:
                _write_part(partial / part, chooser.in_order(part), tokenizer, {"tool": _TOOL, "part": part, "arguments": arguments})
        write_json(partial / FACTS_FILE, {"arguments": arguments, "summary": summary})
    return summary, True


def part_of(example: RawExample) -> str:
    """The part of ``PARTS`` that the example's document belongs to."""
    return PARTS[int(example.document_digest[:16], 16) * len(PARTS) >> 64]


class _Chooser:
    """Keeps the first ``sizes[part]`` examples of each part, in the order of a keyed hash, of all that are offered.

    Attributes:
        counts: read, chosen, not chosen, duplicates and rejected.
        rejects_by_kind: number of rejects of each kind.
        chosen: for each part the examples by their place in the order.
    """

    def __init__(self, encoder: ExampleEncoder, sizes: Mapping[str, int], seed: int) -> None:
        self._encoder = encoder
        self._seed = seed
        self.sizes = sizes
        self.counts = Counter(read=0, rejected=0, duplicates=0, not_chosen=0)
        self.rejects_by_kind: Counter[str] = Counter()
        self.chosen: dict[str, dict[int, tuple[RawExample, EncodedExample]]] = {part: {} for part in PARTS}
        self._largest: dict[str, list[int]] = {part: [] for part in PARTS}  # heap of negated places

    def offer(self, item: RawExample | Reject) -> Reject | None:
        """Take an example or leave it; gives the reject where it is one or cannot be used."""
        self.counts["read"] += 1
        if isinstance(item, RawExample):
            try:
                self._offer(item)
                return None
            except UnusableExampleError as error:
                item = Reject(item.file, item.line, *error.args)
        self.counts["rejected"] += 1
        self.rejects_by_kind[item.kind] += 1
        return item

    def _offer(self, example: RawExample) -> None:
        part = part_of(example)
        chosen, largest = self.chosen[part], self._largest[part]
        place = int(sha256_bytes(f"{self._seed}/{example.digest}".encode()), 16)
        if place in chosen:
            self.counts["duplicates"] += 1
            return
        full = len(chosen) == self.sizes[part]
        if full and (not chosen or place > -largest[0]):
            self.counts["not_chosen"] += 1
            return
        chosen[place] = example, self._encoder.encode(example)
        heapq.heappush(largest, -place)
        if full:
            del chosen[-heapq.heappop(largest)]
            self.counts["not_chosen"] += 1

    def in_order(self, part: str) -> list[tuple[RawExample, EncodedExample]]:
        """The examples of a part, in the order of the set."""
        return [item for _, item in sorted(self.chosen[part].items(), key=lambda entry: entry[0])]


def _offer_all(files: Sequence[InputFile], fields: ExampleFields, chooser: _Chooser) -> Iterator[Reject]:
    """Offer every example of the files; yields what was rejected."""
    done = 0
    with progress_bar(sum(file.num_bytes for file in files), "read examples", unit="B", unit_scale=True) as bar:
        for file in files:
            examples = ExampleFile(file, fields)
            for item in examples:
                reject = chooser.offer(item)  # type: ignore[arg-type]
                if reject is not None:
                    yield reject
                bar.update(done + examples.position - bar.n)
            done += file.num_bytes


def _check_present(output: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Summary of the sets that are there, if they were made with the same arguments."""
    if not (output / FACTS_FILE).is_file():
        raise UserError(f"{output} is not empty and holds no reference sets; choose another --output or remove it")
    present = read_json(output / FACTS_FILE)
    different = sorted(name for name in arguments if present["arguments"].get(name) != arguments[name])
    if different:
        values = "; ".join(f"{name} was {present['arguments'].get(name)}, is {arguments[name]}" for name in different)
        raise UserError(f"{output} holds reference sets made with other arguments ({values}); choose another --output or remove it")
    return present["summary"]


def _check_counts(chooser: _Chooser, max_rejects: int | None) -> None:
    if max_rejects is not None and chooser.counts["rejected"] > max_rejects:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(chooser.rejects_by_kind.items()))
        raise UserError(f"{chooser.counts['rejected']} lines rejected so far ({kinds}), --max-rejects is {max_rejects}")
    few = [part for part in PARTS if len(chooser.chosen[part]) < chooser.sizes[part]]
    if few:
        found = "; ".join(f"{part}: {chooser.sizes[part]} asked for, {len(chooser.chosen[part])} found" for part in few)
        raise UserError(
            f"too few examples ({found}; {chooser.counts['read']} read, {chooser.counts['rejected']} rejected, "
            f"{chooser.counts['duplicates']} duplicates). Each part draws on its own third of the documents, so that none is ever "
            "shared; add input, or lower --size or --sizes"
        )


def _summarise(chooser: _Chooser) -> dict[str, Any]:
    parts = {}
    for part in PARTS:
        encoded = [example for _, example in chooser.chosen[part].values()]
        if encoded:
            parts[part] = {
                "examples": len(encoded),
                "tokens": sum(len(example.tokens) for example in encoded),
                "scored_tokens": int(sum(example.scored.sum() for example in encoded)),
                "examples_cut": sum(example.num_cut > 0 for example in encoded),
                "tokens_cut": sum(example.num_cut for example in encoded),
            }
    counts = {**chooser.counts, "chosen": sum(part["examples"] for part in parts.values())}
    assert counts["read"] == sum(counts[name] for name in ("chosen", "not_chosen", "duplicates", "rejected"))
    return {**counts, "rejects_by_kind": dict(sorted(chooser.rejects_by_kind.items())), "parts": parts}


def _write_part(
    directory: Path, examples: list[tuple[RawExample, EncodedExample]], tokenizer: PoolTokenizer, made_by: dict[str, Any]
) -> None:
    """Write one set: a pool, and which of its tokens are scored."""
    directory.mkdir()
    shards = []
    for number, first in enumerate(range(0, len(examples), _SAMPLES_PER_SHARD)):
        part = examples[first : first + _SAMPLES_PER_SHARD]
        shards.append(write_shard(directory, number, (encoded.tokens for _, encoded in part), tokenizer.token_dtype))
        write_sources(directory, shard_name(number), (_source(raw, encoded) for raw, encoded in part))
    scored = pack_scored([encoded.scored for _, encoded in examples])
    write_bytes(directory / SCORED_FILE, scored)
    write_bytes(directory / TOKENIZER_FILE, tokenizer.content)
    facts = PoolFacts(
        member_format="raw",
        token_dtype=tokenizer.token_dtype,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer={"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        kinds=[],
        made_by={**made_by, SCORED_DIGEST: sha256_bytes(scored)},
    )
    write_manifest(directory, shards)
    write_index(directory, facts, shards, np.full(len(examples), -1, dtype=np.int16))


def _source(raw: RawExample, encoded: EncodedExample) -> dict[str, Any]:
    document = {"file": raw.file, "line": raw.line, "url": raw.url, "first_token": 0, "num_tokens": len(encoded.tokens)}
    return {"kind": None, "documents": [document]}
