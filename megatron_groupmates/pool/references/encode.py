"""Examples of held-out data to token ids, and which of them are scored.

- A *text* becomes what preprocessing makes of a document: its ids and the end-of-text token. All but the first are
  scored. Too long a text loses its end.
- *Context and continuation* are tokenised as lm-evaluation-harness does it: white space at the end of the context moves
  to the beginning of the continuation, both are encoded together, and the scored ids are those behind as many as the
  context alone is encoded to. In place of an empty context stands the end-of-text token.
- A *chat* is written with the chat template of the tokenizer's directory if it marks what the assistant says (jinja's
  ``{% generation %}``). Otherwise with a plain one that has no control tokens: for each message ``Role:``, a space and the
  content, two newlines; these three pieces are encoded one by one, and the ids of the assistant's second piece are
  scored. What follows the last scored token is left out.

Too long a continuation or chat loses ids at its beginning. The first id of what is left is never scored.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.references.records import ASSISTANT, RawExample
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.files import sha256_bytes

# How transformers tells a template that marks generated text.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """An example as it is written.

    Attributes:
        tokens: ids [length], at least 2.
        scored: bool[length], at least one True, the first False.
        num_cut: ids left out because the example was too long.
    """

    tokens: np.ndarray
    scored: np.ndarray
    num_cut: int


class UnusableExampleError(Exception):
    """An example that nothing can be scored of; its arguments are a kind of reject and the particulars."""


class ExampleEncoder:
    """Tokenises examples.

    Args:
        tokenizer: of the pool.
        max_tokens: longest example; the model's sequence length plus one.
        delimiter: put between context and continuation.
        chat_template: of the tokenizer; the plain one when None.
    """

    def __init__(self, tokenizer: PoolTokenizer, max_tokens: int, delimiter: str = "", chat_template: ChatTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._delimiter = delimiter
        self._chat_template = chat_template

    def encode(self, example: RawExample) -> EncodedExample:
        """Tokens of an example.

        Raises:
            UnusableExampleError: nothing of it can be scored.
        """
        if example.form == "text":
            [(_, text)] = example.turns
            tokens = np.append(self._ids(text), self._tokenizer.eot_id)
            return self._finish(tokens, np.ones(len(tokens), dtype=bool), cut_end=True)
        if example.form == "continuation":
            return self._finish(*self._encode_pair(*example.turns[0]))
        if self._chat_template is not None:
            return self._finish(*self._chat_template.encode(example.turns))
        return self._finish(*self._encode_plain_chat(example.turns))

    def _encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        context += self._delimiter
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            tokens = np.concatenate([[self._tokenizer.eot_id], self._ids(continuation)])
            return tokens, np.arange(len(tokens)) > 0
        tokens = self._ids(kept + continuation)
        return tokens, np.arange(len(tokens)) >= len(self._ids(kept))

    def _encode_plain_chat(self, turns: tuple[tuple[str, str], ...]) -> tuple[np.ndarray, np.ndarray]:
        pieces: list[tuple[str, bool]] = []
        for role, content in turns:
            pieces += [(f"{role.capitalize()}:", False), (f" {content}", role == ASSISTANT), ("\n\n", False)]
        ids = [self._ids(piece) for piece, _ in pieces]
        return np.concatenate(ids), np.repeat([scored for _, scored in pieces], [len(part) for part in ids])

    def _ids(self, text: str) -> np.ndarray:
        [tokens] = self._tokenizer.encode_batch([text])
        if self._tokenizer.is_control[tokens].any():
            raise UnusableExampleError("control_token", f"{len(text)} characters")
        return tokens.astype(np.int64)

    def _finish(self, tokens: np.ndarray, scored: np.ndarray, cut_end: bool = False) -> EncodedExample:
        """Cut to what fits and is of use."""
        if not scored.any():
            raise UnusableExampleError("nothing_scored", f"{len(tokens)} tokens, none of them scored")
        stop = int(np.flatnonzero(scored)[-1]) + 1
        start = 0 if cut_end else max(0, stop - self._max_tokens)
        kept = slice(start, min(stop, start + self._max_tokens))
        num_cut = stop - (kept.stop - kept.start)
        tokens, scored = tokens[kept], scored[kept].copy()
        scored[:1] = False
        if not scored.any():
            raise UnusableExampleError("nothing_scored", "nothing is before the only token to be scored")
        return EncodedExample(tokens.astype(self._tokenizer.token_dtype), scored, num_cut)


class ChatTemplate:
    """The chat template of a tokenizer's directory.

    Attributes:
        digest: hex SHA-256 of the template.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """Use :meth:`load`."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.digest = sha256_bytes(tokenizer.chat_template.encode())

    @classmethod
    def load(cls, source: str, vocab_size: int) -> ChatTemplate | None:
        """The template in the tokenizer directory ``source`` that marks what the assistant says; None where there is none.

        Raises:
            UserError: the directory's tokenizer cannot be loaded.
        """
        path = Path(source)
        if not ((path / "tokenizer_config.json").is_file() or (path / "chat_template.jinja").is_file()):
            return None
        from transformers import AutoTokenizer  # takes seconds to import, and most sets need none of it

        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"cannot load the chat template of {source}: {error}") from error
        if not isinstance(tokenizer.chat_template, str) or not _GENERATION.search(tokenizer.chat_template):
            return None
        return cls(tokenizer, vocab_size)

    def encode(self, turns: tuple[tuple[str, str], ...]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64[length] of a chat and which are the assistant's, bool[length].

        Raises:
            UnusableExampleError: a message holds a literal control token, or the template refuses the chat.
            UserError: the template needs tokens that the pool's tokenizer has not.
        """
        special = self._tokenizer.all_special_tokens
        if any(token in content for _, content in turns for token in special):
            raise UnusableExampleError("control_token", "a message holds a literal special token")
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            result = self._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        except TemplateError as error:
            raise UnusableExampleError("chat_template", str(error)) from error
        tokens = np.array(result["input_ids"], dtype=np.int64)
        if tokens.size and tokens.max() >= self._vocab_size:
            raise UserError(
                f"the chat template uses token {tokens.max()}, the pool's vocabulary has {self._vocab_size}: its tokenizer is another"
            )
        return tokens, np.array(result["assistant_masks"], dtype=bool)
