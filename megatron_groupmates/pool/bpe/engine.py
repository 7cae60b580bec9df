"""Byte-level BPE by tiktoken, for tokenizers of which a check proves that the ids equal Hugging Face's for every text.

Both merge, again and again, the adjacent pair of lowest rank, the leftmost of equal ones. Hugging Face looks a pair up in
the list of merges, tiktoken looks up the bytes of the two together. Call a token *self-encoding* if the model makes that
very token of its bytes. Two facts hold for any list of merges:

1. As long as no merge has crossed the two ends of a stretch of bytes, the merges within it are those that the model makes
   of that stretch alone, in the same order: the least of all is the least within.
2. So a token that comes up in any text is self-encoding; and wherever the two parts of a pair are together the bytes of a
   self-encoding token, they are the last pair of the model's way to that token, hence in the list of merges.

With the self-encoding tokens alone, each ranked by the merge that is last on the way to it, tiktoken therefore makes the
same merges in the same order, whatever the order of ids. (Where several merges make a token, they must follow one another
in the list: then it does not matter which of them is the last on the way.) It also takes a piece that is a token as it
stands, which changes nothing for self-encoding tokens. A model that does so for all tokens (``ignore_merges``) has the
others added, out of reach of merges: by the same facts two parts that are together such a token come up next to each other
only if the model makes exactly two parts of it, and then the check fails.

:mod:`megatron_groupmates.pool.bpe.checks` holds this check and those of the steps before the model. A self-test on strings
that tokenizers disagree on comes on top, against versions of the two packages that behave otherwise than expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

import numpy as np
import tiktoken
from tokenizers import Tokenizer

from megatron_groupmates.pool.bpe.checks import AddedTokens, added_tokens, fast_normalizer, model_ranks, require, split_pattern
from megatron_groupmates.pool.bpe.split_patterns import tiktoken_pattern

_LONG_RUN = 1 << 16  # tiktoken's regular expressions give up on longer stretches of white space
_LONG_RUN_PATTERN = re.compile(rf"\s{{{_LONG_RUN}}}")

# tiktoken looks for its special tokens in every text, for the empty string if it has none. This one is not allowed in
# any call, so that in a text it is text.
_NO_SPECIAL_TOKEN = "\ufdd0\ufdd1"

_SELF_TEST_TEXTS = (
    "",
    " ",
    "\n",
    " a  b   c    d     e" + " " * 70 + "f" + " " * 25 + "g" + " " * 26 + "\n" + " " * 27,
    "\ta\t\tb\t\t\tc \t d\t  e  \tf" + "\t" * 30 + "g",
    "a\n\n\nb\r\n\r\nc \n d  \n  e\n  \n   f\u00a0\u00a0g\u2003 \u2028h\u3000\u0085i\x1c \x1dj\x0b\x0ck ",
    "I'm you're he's she'll we've they'd don't 'S 'T 'RE 'Ve 'M 'lL 'D '\u017f 'x ''s \u2019s",
    "1 12 123 1234 12345 \u00bd\u0663\u0664\u0665\u0666 \u2167 v1.2 a1b22c333",
    "!?... ($%) -> == //\n// */\r\n\r\n;; a.b(c)[d] {e}\n",
    "\u00e9 e\u0301 \u1ebf \u0065\u0323\u0302 \u0301a \u212b \u2126 \u0958 \ufb1d \u1100\u1161\u11a8 \uac00\u11a8 o\u0308\u0323",
    "\u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639 \u0e44\u0e17\u0e22",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ufe0f\u20e3 \U0001d400 \U00020000 \U0010ffff",
    "\ufeff\u200b\u00ad\x00\x01\x7f\ufffd\ufffe\ud7ff\ue000\ufdd0\ufdd1 <|endoftext|><|padding|> <|end <s></s>[UNK]",
    "a" * 300 + " " + "ab" * 300 + "=" * 300 + "x" + "\n" * 300 + "y",
    "\u1c89 \ua7cb \U000105c0 \U00010d40 \U000116d0 \U0001e5d0 \u0378 \u0378\u0301 a\u0897\u0323",
)


class FastBpe:
    """Text to ids, identical to those of the tokenizer it was built for; made by :func:`build`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoding: tiktoken.Encoding,
        ids: np.ndarray,
        added: AddedTokens,
        normalize: Callable[[str], str] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._encoding = encoding
        self._ids = ids
        self._added = added
        self._normalize = normalize

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, of the dtype given to :func:`build`, [length].

        Raises:
            UnicodeEncodeError: the text has a lone surrogate.
        """
        if len(text) > _LONG_RUN and _LONG_RUN_PATTERN.search(text):
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return np.array(encoding.ids, dtype=self._ids.dtype)
        added = self._added
        if added.before_normalizer and any(literal in text for literal in added.literals):
            return self._encode_around_literals(text, self._encode_segment)
        if self._normalize is not None:
            text = self._normalize(text)
        if not added.before_normalizer and any(literal in text for literal in added.literals):
            return self._encode_around_literals(text, self._encode_pieces)
        return self._encode_pieces(text)

    def _encode_around_literals(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        parts, start = [], 0
        for match in self._added.splitter.finditer(text):
            number = self._added.literals.get(match.group())
            if number is not None:  # else a special token, which is text
                parts += (encode(text[start : match.start()]), np.array([number], dtype=self._ids.dtype))
                start = match.end()
        return np.concatenate([*parts, encode(text[start:])])

    def _encode_segment(self, text: str) -> np.ndarray:
        return self._encode_pieces(text if self._normalize is None else self._normalize(text))

    def _encode_pieces(self, text: str) -> np.ndarray:
        return self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())]


def build(tokenizer: Tokenizer, dtype: str) -> FastBpe:
    """The fast engine of a tokenizer.

    Args:
        tokenizer: with ``encode_special_tokens``, so that special tokens in a text are text; without truncation.
        dtype: of the ids.

    Raises:
        UnprovenError: the ids are not proven equal.
    """
    config = json.loads(tokenizer.to_str())
    pattern = split_pattern(config["pre_tokenizer"])
    normalize = fast_normalizer(tokenizer, config["normalizer"])
    added = added_tokens(config["added_tokens"], normalize)
    ranks, ids = model_ranks(config["model"])
    for character, number in added.runs.items():
        # Two of them next to each other are always within such a run, which is a piece: the model's own tokens with two
        # of them cannot come up, and may lose their place.
        for length in range(2, number + 1):
            ranks[character.encode() * length] = len(ids)
            ids.append(tokenizer.token_to_id(character * length))
    encoding = tiktoken.Encoding(
        "pool", pat_str=tiktoken_pattern(pattern, added.runs), mergeable_ranks=ranks, special_tokens={_NO_SPECIAL_TOKEN: len(ids)}
    )
    engine = FastBpe(tokenizer, encoding, np.array(ids, dtype=dtype), added, normalize)
    literals = [token["content"] for token in config["added_tokens"]]
    _self_test(engine, tokenizer, [*_SELF_TEST_TEXTS, *(f"a{literal}{literal} {literal}b" for literal in literals[:50])])
    return engine


def _self_test(engine: FastBpe, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        require(engine.encode(text).tolist() == expected, f"the self-test fails on {text[:100]!r}")
