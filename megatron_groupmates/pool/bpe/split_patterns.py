"""Regular expressions by which byte-level BPE tokenizers cut text into pieces, in an equal form for tiktoken.

Hugging Face's engine and tiktoken's have Unicode tables of different versions. Here the classes are spelt out as the
ranges that Hugging Face's engine uses, read from that engine itself, so that every character falls into the same class.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from tokenizers import Regex
from tokenizers.normalizers import Replace

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace("{1,3}", "")

# U+017F is the long s: the only character outside ASCII that equals one of these letters when case is ignored.
_ANY_CASE_CONTRACTION = r"'(?:[sStTmMdD\x{{17f}}]|[rR][eE]|[vV][eE]|[lL][lL])"


@dataclasses.dataclass(frozen=True)
class _Alternatives:
    """The first six alternatives: those without look-ahead before ``\\s*[\\r\\n]+``, and whether there is that one."""

    pieces: str
    newlines: bool


_KNOWN = {
    GPT2_PATTERN: _Alternatives(r" ?[{L}]+|'(?:[sdmt]|ll|ve|re)| ?[{N}]+| ?[^{S}{L}{N}]+", False),
    _LLAMA3_PATTERN: _Alternatives(_ANY_CASE_CONTRACTION + r"|[^\r\n{L}{N}]?[{L}]+|[{N}]{{1,3}}| ?[^{S}{L}{N}]+[\r\n]*", True),
    _QWEN2_PATTERN: _Alternatives(_ANY_CASE_CONTRACTION + r"|[^\r\n{L}{N}]?[{L}]+|[{N}]| ?[^{S}{L}{N}]+[\r\n]*", True),
}


def is_known(pattern: str) -> bool:
    """Whether :func:`tiktoken_pattern` has an equal form of this one."""
    return pattern in _KNOWN


def tiktoken_pattern(pattern: str, runs: Mapping[str, int]) -> str:
    """A pattern for tiktoken whose matches are the pieces into which ``pattern`` cuts any text.

    Every character of any text is in some piece. Why the two are equal, alternative by alternative:

    - the order of alternatives is changed only where no text matches both;
    - those without look-ahead stand in one group, which tiktoken's engine runs as one automaton;
    - ``\\s+(?!\\S)|\\s+`` takes a stretch of white space, less its last character where something else follows and it
      has more than one. The second part is reached with one character only.

    Args:
        pattern: a known one.
        runs: for a space or tab, the number n: the tokenizer first takes 2 to n of it, as many as it can, out of the
            text, and cuts what lies between on its own. Such a run is a piece here. A piece of white space ends before
            it, which counts as no more text (look-ahead finds white space there, which has the same effect), and no
            other piece can begin with or hold its first character, as that is followed by another space or tab.
    """
    alternatives = _KNOWN[pattern]
    classes = {name: _ranges(codes) for name, codes in _classes().items()}
    plain = _ranges(np.setdiff1d(_classes()["S"], [ord(character) for character in runs]))
    escaped = {character: f"\\x{{{ord(character):x}}}" for character in runs}
    white = "|".join([f"[{plain}]", *(f"{character}(?!{character})" for character in escaped.values())])
    taken = [f"{escaped[character]}{{2,{number}}}" for character, number in runs.items()]
    newlines = rf"|(?:{white})*[\r\n]+" if alternatives.newlines else ""
    first = "|".join([*taken, alternatives.pieces.format(**classes)])
    if not runs:
        first += newlines
        newlines = ""
    return rf"(?:{first}){newlines}|(?:{white})+(?![^{classes['S']}])|[{classes['S']}]"


@functools.cache
def _classes() -> dict[str, np.ndarray]:
    """Sorted code points of letters, numbers and white space, as Hugging Face's regular expressions see them."""
    codes = np.delete(np.arange(0x110000, dtype="<u4"), np.arange(0xD800, 0xE000))
    everything = codes.tobytes().decode("utf-32-le")
    classes = {}
    for name, others in {"L": r"[^\p{L}]+", "N": r"[^\p{N}]+", "S": r"\S+"}.items():
        members = Replace(Regex(others), "").normalize_str(everything)
        classes[name] = np.frombuffer(members.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    return classes


def _ranges(codes: np.ndarray) -> str:
    """Sorted code points as the inside of a character class."""
    breaks = np.flatnonzero(np.diff(codes) != 1)
    firsts, lasts = codes[np.append(0, breaks + 1)], codes[np.append(breaks, len(codes) - 1)]
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in zip(firsts, lasts, strict=True))
