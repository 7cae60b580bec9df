"""What must hold of a tokenizer for the fast engine to make its ids; why is told in :mod:`megatron_groupmates.pool.bpe.engine`.

Each function takes a part of a ``tokenizer.json`` and raises :class:`UnprovenError` where it is not of the kind it must be.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from megatron_groupmates.pool.bpe.nfc import NfcNormalizer
from megatron_groupmates.pool.bpe.split_patterns import GPT2_PATTERN, is_known

_RUN_CHARACTERS = " \t"


class UnprovenError(Exception):
    """The ids of a tokenizer are not proven equal; the message says what stands against it."""


@dataclasses.dataclass(frozen=True)
class AddedTokens:
    """Added tokens that are not special, which the tokenizer takes out of a text before anything else.

    Attributes:
        runs: for a space or tab, the largest n where 2 to n of it are such tokens; part of the split pattern.
        literals: id of each other one.
        splitter: matches those, and special tokens that hide them, leftmost and longest first.
        before_normalizer: whether they are looked for in the text as it was before normalisation.
    """

    runs: dict[str, int]
    literals: dict[str, int]
    splitter: re.Pattern[str]
    before_normalizer: bool


def require(condition: bool, reason: str) -> None:
    """Raise :class:`UnprovenError` for ``reason`` unless ``condition`` holds."""
    if not condition:
        raise UnprovenError(reason)


def split_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression that cuts text into pieces, before bytes become characters."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    require(kinds in (["ByteLevel"], ["Split", "ByteLevel"]), f"its pre-tokenizer is {kinds}, not byte-level, alone or after a split")
    require(not steps[-1]["add_prefix_space"], "it puts a space before each text")
    if len(steps) == 1:
        require(steps[0]["use_regex"], "it does not split text into pieces")
        return GPT2_PATTERN
    split = steps[0]
    pattern = split["pattern"].get("Regex", "")
    require(not steps[1]["use_regex"], "it splits text twice")
    require(split["behavior"] == "Isolated" and not split["invert"], f"its split is {split['behavior']}, inverted {split['invert']}")
    require(is_known(pattern), f"its split pattern {split['pattern']} is not a known one")
    return pattern


def fast_normalizer(tokenizer: Tokenizer, normalizer: dict[str, Any] | None) -> Callable[[str], str] | None:
    """What is done to each text before anything but the search for added tokens; None for nothing."""
    require(normalizer is None or normalizer["type"] == "NFC", f"its normalizer is {normalizer and normalizer['type']}, not NFC or none")
    return None if normalizer is None else NfcNormalizer(tokenizer.normalizer)


def added_tokens(tokens: Sequence[dict[str, Any]], normalize: Callable[[str], str] | None) -> AddedTokens:
    """The added tokens; ``normalize`` is the tokenizer's normaliser."""
    ordinary = [token for token in tokens if not token["special"]]
    for token in ordinary:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
        require(not flags, f"its added token {token['content']!r} has {', '.join(flags)} set")
    require(
        len({token["normalized"] for token in ordinary}) <= 1,
        "its added tokens are looked for partly before and partly after normalisation",
    )
    normalized = any(token["normalized"] for token in ordinary)
    # Only tokens that are looked for at the same time can hide one another.
    together = [token for token in tokens if token["normalized"] == normalized]
    for token in together:
        require(
            not normalized or normalize is None or normalize(token["content"]) == token["content"],
            f"its added token {token['content']!r} is not normalised",
        )
    ids = {token["content"]: token["id"] for token in ordinary}
    special = [token["content"] for token in together if token["special"]]
    runs = {} if any(set(_RUN_CHARACTERS) & set(content) for content in special) else _runs(ids)
    literals = {content: number for content, number in ids.items() if content[0] not in runs}
    alternatives = sorted([*literals, *special], key=len, reverse=True)
    return AddedTokens(runs, literals, re.compile("|".join(map(re.escape, alternatives))), not normalized)


def _runs(ids: dict[str, int]) -> dict[str, int]:
    """The largest n for each character of which 2 to n are added tokens, if no other added token has that character."""
    runs = {}
    for character in _RUN_CHARACTERS:
        holders = {content for content in ids if character in content}
        if holders and holders == {character * length for length in range(2, len(holders) + 2)}:
            runs[character] = len(holders) + 1
    return runs


def model_ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """Tokens of the model by bytes, each with its rank, and the id of each rank."""
    require(model["type"] == "BPE", f"its model is {model['type']}, not BPE")
    require(model["dropout"] is None, f"it has a dropout of {model['dropout']}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(not model[name], f"it has a {name}, {model[name]!r}")
    vocabulary: dict[str, int] = model["vocab"]
    byte_of = byte_alphabet()
    # Bytes that are in no UTF-8 text are not needed: with all others there, nothing is ever unknown to the model.
    missing = [byte for character, byte in byte_of.items() if character not in vocabulary and byte not in (0xC0, 0xC1, *range(0xF5, 0x100))]
    require(not missing, f"its vocabulary lacks the bytes {missing}")
    characters = [character for character in byte_of if character in vocabulary]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    longer = [token for token in vocabulary if len(token) > 1 and byte_of.keys() >= set(token)]
    num_parts = _num_parts(model, longer)
    merged = [token for token, _ in itertools.groupby(left + right for left, right in merges) if num_parts.get(token) == 1]
    repeated = [token for token, count in Counter(merged).items() if count > 1]
    require(not repeated, f"merges to the same token are apart in its list, as for {repeated[:1]}")
    whole = []
    if model["ignore_merges"]:
        whole = [token for token in longer if num_parts[token] > 1]
        for token in whole:
            require(num_parts[token] > 2, f"its token {token!r} is only made of whole pieces, but merges stop one step before it")
    ordered = [*characters, *merged, *whole]
    ranks = {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(ordered)}
    return ranks, [vocabulary[token] for token in ordered]


def _num_parts(model: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """Into how many tokens the model's merges encode the bytes of each token."""
    bare = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": None,
                "model": {**model, "ignore_merges": False},
            }
        )
    )
    encodings = bare.encode_batch_fast(tokens, add_special_tokens=False)
    return {token: len(encoding) for token, encoding in zip(tokens, encodings, strict=True)}


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + number): byte for number, byte in enumerate(others)}}
