"""The tokenizer of a pool: any Hugging Face fast tokenizer, by file, directory or name."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.bpe import engine as bpe
from megatron_groupmates.pool.bpe.checks import UnprovenError
from megatron_groupmates.pool.index import TOKENIZER_FILE, PoolIndex
from megatron_groupmates.pool.writer import token_dtype
from megatron_groupmates.utils.files import sha256_bytes

logger = logging.getLogger(__name__)

DEFAULT_EOT = "<|endoftext|>"


class PoolTokenizer:
    """Text to ids and back.

    Literal special tokens in text are text: ``<|endoftext|>`` written in a document is encoded as ordinary characters
    and never becomes the control token. No special tokens are added around a text, and no text is cut.

    Ids are those of Hugging Face's tokenizer, for every text. They are made by tiktoken, several times as fast, where
    :mod:`megatron_groupmates.pool.bpe.engine` proves that its ids are the same.

    Args:
        content: of a ``tokenizer.json``.
        name: of the tokenizer, as the user gave it.
        eot: the token put after each document, ``<|endoftext|>`` by default.

    Attributes:
        name: as the user gave it.
        content: of ``tokenizer.json``.
        fingerprint: hex SHA-256 of ``content``.
        vocab_size: one more than the largest id, added tokens included.
        token_dtype: the narrowest dtype that holds every id.
        eot_id: id of the token put after each document.

    Raises:
        UserError: ``content`` is not a tokenizer, or it has no such token.
    """

    def __init__(self, content: bytes, name: str, eot: str | None = None) -> None:
        self.content = content
        self.name = name
        self.fingerprint = sha256_bytes(content)
        self._tokenizer = parse_tokenizer(content, name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.token_dtype = token_dtype(self.vocab_size)
        eot_id = self._tokenizer.token_to_id(eot or DEFAULT_EOT)
        if eot_id is None:
            raise UserError(
                f"tokenizer {name} has no token {eot or DEFAULT_EOT!r} to put after each document; name its end-of-text token with --eot"
            )
        self.eot_id: int = eot_id
        self.is_control = np.zeros(self.vocab_size, dtype=bool)
        model = json.loads(self._tokenizer.to_str())["model"]
        for number, token in self._tokenizer.get_added_tokens_decoder().items():
            # The token for unknown characters is special too, but text may well need it.
            self.is_control[number] = token.special and token.content != model.get("unk_token")
        if isinstance(model.get("unk_id"), int):
            self.is_control[model["unk_id"]] = False
        self.is_control[self.eot_id] = True

    @classmethod
    def load(cls, source: str, eot: str | None = None) -> PoolTokenizer:
        """Load the tokenizer that ``source`` names: a ``tokenizer.json``, a directory, or a Hugging Face name.

        The end-of-text token is ``eot``, else the one the directory's configuration or Hugging Face names, else
        ``<|endoftext|>``.

        Raises:
            UserError: it cannot be loaded, has no fast implementation, or has no end-of-text token.
        """
        path = Path(source)
        if path.is_file():
            return cls(path.read_bytes(), source, eot)
        if (path / TOKENIZER_FILE).is_file():
            return cls((path / TOKENIZER_FILE).read_bytes(), source, eot or _configured_eot(path))
        if not path.exists() and (path.is_absolute() or source.startswith(".") or source.endswith(".json")):
            raise UserError(f"there is no tokenizer at {source}; check the path")
        return cls._load_with_transformers(source, eot)

    @classmethod
    def of_pool(cls, index: PoolIndex) -> PoolTokenizer:
        """The tokenizer that made the ids of a pool."""
        content = Path(index.file_path(TOKENIZER_FILE)).read_bytes()
        eot = parse_tokenizer(content, index.tokenizer["name"]).id_to_token(index.eot_id)
        return cls(content, index.tokenizer["name"], eot)

    @classmethod
    def _load_with_transformers(cls, source: str, eot: str | None) -> PoolTokenizer:
        from transformers import AutoTokenizer  # takes seconds to import, and a file needs none of it

        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"cannot load tokenizer {source!r}: it is neither a {TOKENIZER_FILE}, nor a directory with "
                f"one, nor a Hugging Face name that can be reached from here ({error})"
            ) from error
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {source!r} has no fast implementation, hence no {TOKENIZER_FILE}; convert it with transformers first"
            )
        return cls(tokenizer.backend_tokenizer.to_str().encode(), source, eot or tokenizer.eos_token)

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolTokenizer, (self.content, self.name, self._tokenizer.id_to_token(self.eot_id))

    @property
    def engine(self) -> str:
        """What makes the ids: ``tiktoken`` or ``tokenizers``."""
        return "tokenizers" if isinstance(self._fast, str) else "tiktoken"

    @property
    def engine_reason(self) -> str:
        """Why that engine is used."""
        return self._fast if isinstance(self._fast, str) else "its ids are proven equal to those of tokenizers"

    @functools.cached_property
    def _fast(self) -> bpe.FastBpe | str:
        """The fast engine, or why there is none. Made when it is needed: that takes a second."""
        try:
            return bpe.build(self._tokenizer, self.token_dtype)
        except UnprovenError as error:
            logger.warning("tokenizer %s is encoded by the slower engine: %s", self.name, error)
            return str(error)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, ``token_dtype`` [length], without end-of-text token.

        Raises:
            TypeError, UnicodeEncodeError: a text has a lone surrogate.
        """
        if not isinstance(self._fast, str):
            return [self._fast.encode(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.token_dtype) for encoding in encodings]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of a sample; control tokens such as the end of a document are left out."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """The tokenizer described by the content of a ``tokenizer.json``.

    Raises:
        UserError: it describes none.
    """
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception, whatever is wrong
        raise UserError(f"tokenizer {name} is not a Hugging Face {TOKENIZER_FILE}: {error}") from error


def _configured_eot(directory: Path) -> str | None:
    """The end-of-sequence token that ``tokenizer_config.json`` names, None where it names none."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text())["eos_token"]
    except (ValueError, KeyError):
        return None
    return token["content"] if isinstance(token, dict) else token
