"""Unicode normalisation form C as a Hugging Face tokenizer does it, fast where the text has it already."""

from __future__ import annotations

import functools
import re
import unicodedata

from tokenizers.normalizers import Normalizer

_BEYOND_PLANE_0 = re.compile("[\U00010000-\U0010ffff]")


class NfcNormalizer:
    """Text in form C, identical to what ``normalizer`` makes of it.

    The tables of Python and of the tokenizer may be of different Unicode versions. Unicode's stability policy makes that
    harmless for the test used here, whichever is newer: characters keep the normalisation they were assigned with, every
    part of a text in form C is in form C, and a character that one of the two does not know is inert for it. So a text
    of characters known to Python that is in form C for Python is left alone by the tokenizer; any other text is given
    to the tokenizer's own normaliser.
    """

    def __init__(self, normalizer: Normalizer) -> None:
        self._normalizer = normalizer

    def __call__(self, text: str) -> str:
        if text.isascii() or (_is_known(text) and unicodedata.is_normalized("NFC", text)):
            return text
        return self._normalizer.normalize_str(text)


def _is_known(text: str) -> bool:
    """Whether Python's Unicode tables have all characters of ``text``."""
    if _unknown_in_plane_0().search(text) is not None:
        return False
    return not any(unicodedata.category(character) == "Cn" for character in set(_BEYOND_PLANE_0.findall(text)))


@functools.cache
def _unknown_in_plane_0() -> re.Pattern[str]:
    """Matches a character of the first 65,536 that Python does not have; in one class with others it would be slow."""
    codes = (code for code in range(0x80, 0x10000) if unicodedata.category(chr(code)) == "Cn")
    return re.compile("[" + "".join(f"\\u{code:04x}" for code in codes) + "]")
