"""Records of held-out data: texts, contexts with a continuation, and chats.

A record is one of three forms, told by its fields; where it has those of several, the first of these counts:

- ``messages``: a list of ``{"role", "content"}``; what the assistant says is scored;
- ``context`` and ``continuation``: only the continuation is scored (FLAN, LAMBADA); the context may be empty;
- ``text``: every token but the first is scored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_groupmates.pool.preprocess.records import DocumentFile, InputFile, Reject, value_at
from megatron_groupmates.utils.files import sha256_json

ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleFields:
    """Dotted paths of the fields of a record."""

    text: str = "text"
    context: str = "context"
    continuation: str = "continuation"
    messages: str = "messages"


@dataclasses.dataclass(frozen=True)
class RawExample:
    """One example before it is tokenised.

    Attributes:
        form: ``messages``, ``continuation`` or ``text``.
        turns: (role, content) of each message; (context, continuation) as one turn; ("", text).
        url: of the record, empty where unknown.
        file: name of the input file.
        line: in that file, from 1 on.
    """

    form: str
    turns: tuple[tuple[str, str], ...]
    url: str
    file: str
    line: int

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the content; runs of white space count as one space."""
        return sha256_json([self.form, [[_squeezed(part) for part in turn] for turn in self.turns]])

    @property
    def document_digest(self) -> str:
        """Hex SHA-256 of the document the example is about: what comes before the first scored token, or the text itself.

        Examples with the same context, or with the same messages before the assistant's first, share a document.
        """
        if self.form == "messages":
            before = []
            for role, content in self.turns:
                if role == ASSISTANT:
                    break
                before.append([role, _squeezed(content)])
            return sha256_json(before or self.turns)
        [(context, scored)] = self.turns
        return sha256_json(_squeezed(context) or _squeezed(scored))


class ExampleFile(DocumentFile):
    """One input file; iterating over it yields its examples and rejects in order.

    Args:
        file: to read; its ending says how it is compressed.
        fields: of a record.
    """

    def __init__(self, file: InputFile, fields: ExampleFields) -> None:
        super().__init__(file, fields.text)
        self._fields = fields

    def _document(self, record: dict[str, Any], number: int) -> RawExample | Reject:  # type: ignore[override]
        fields = self._fields
        messages, continuation = value_at(record, fields.messages), value_at(record, fields.continuation)
        if messages is not None:
            form, turns = "messages", _turns(messages)
            problem = f"{fields.messages!r} is not a list of objects with the strings 'role' and 'content'" if turns is None else ""
        elif continuation is not None:
            form, turns = "continuation", ((value_at(record, fields.context), continuation),)
            problem = f"{fields.context!r} or {fields.continuation!r} is not a string"
        else:
            form, turns = "text", (("", value_at(record, fields.text)),)
            problem = f"the record has none of the fields {fields.text!r}, {fields.continuation!r}, {fields.messages!r} as a string"
        if turns is None or not all(isinstance(part, str) for turn in turns for part in turn):
            return Reject(self.name, number, "missing_text", problem)
        scored = [content for role, content in turns if form != "messages" or role == ASSISTANT]
        if not "".join(scored).strip():
            return Reject(self.name, number, "empty_text", "nothing but white space would be scored")
        try:
            "".join(part for turn in turns for part in turn).encode()
        except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
            return Reject(self.name, number, "bad_utf8", str(error))
        url = str(record.get("url") or "").encode(errors="replace").decode()
        return RawExample(form, turns, url, self.name, number)


def _turns(messages: Any) -> tuple[tuple[str, str], ...] | None:
    """(role, content) of each message; None where it is not a list of such."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    return tuple((message.get("role"), message.get("content")) for message in messages)


def _squeezed(text: str) -> str:
    return " ".join(text.split())
