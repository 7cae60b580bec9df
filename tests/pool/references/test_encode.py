"""Examples to tokens: what is scored, and what is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.references.encode import ChatTemplate, EncodedExample, ExampleEncoder, UnusableExampleError
from megatron_groupmates.pool.references.records import RawExample
from tests.pool.helpers import tiny_tokenizer, tokenizer_json

TOKENIZER = tiny_tokenizer()
EOT = TOKENIZER.eot_id
TEXTS = st.lists(st.sampled_from(["the", " cat", "sat ", " ", "\n", "mat", "on a"]), max_size=6).map("".join)
# ChatML, with and without the mark of what the assistant says.
PLAIN_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
MARKED_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def example(form: str, *turns: tuple[str, str]) -> RawExample:
    return RawExample(form, turns, "", "f", 1)


def encode(form: str, *turns: tuple[str, str], max_tokens: int = 1000, **settings_: str) -> EncodedExample:
    return ExampleEncoder(TOKENIZER, max_tokens, **settings_).encode(example(form, *turns))


def ids(text: str) -> list[int]:
    return TOKENIZER.encode_batch([text])[0].tolist()


def scored_text(encoded: EncodedExample) -> str:
    return TOKENIZER.decode(encoded.tokens[encoded.scored])


def test_a_text_is_a_document_with_its_end_and_is_cut_there() -> None:
    whole = encode("text", ("", "the cat sat on the mat"))
    assert whole.tokens.tolist() == [*ids("the cat sat on the mat"), EOT]
    assert whole.scored.tolist() == [False] + [True] * (len(whole.tokens) - 1) and whole.num_cut == 0
    cut = encode("text", ("", "the cat sat on the mat"), max_tokens=3)
    assert cut.tokens.tolist() == whole.tokens.tolist()[:3] and cut.scored.tolist() == [False, True, True]
    assert cut.num_cut == len(whole.tokens) - 3


@settings(deadline=None, max_examples=300)
@given(context=TEXTS, continuation=TEXTS)
def test_pairs_are_split_where_lm_evaluation_harness_splits_them(context: str, continuation: str) -> None:
    """Its rule, spelled out: trailing spaces of the context move over, and the context's own length says where it ends."""
    moved = context[len(context.rstrip()) :]
    kept, rest = context[: len(context) - len(moved)], moved + continuation
    whole = ids(kept + rest)
    expected = whole[len(ids(kept)) :]
    if not expected:
        with pytest.raises(UnusableExampleError) as caught:
            encode("continuation", (context, continuation))
        assert caught.value.args[0] == "nothing_scored"
        return
    encoded = encode("continuation", (context, continuation))
    assert encoded.tokens.tolist() == (whole if kept else [EOT, *expected])
    assert encoded.tokens[encoded.scored].tolist() == expected


def test_an_empty_context_is_the_end_of_text() -> None:
    encoded = encode("continuation", ("", "the mat"))
    assert encoded.tokens.tolist() == [EOT, *ids("the mat")] and encoded.scored.tolist() == [False] + [True] * len(ids("the mat"))


def test_a_delimiter_stands_between_context_and_continuation() -> None:
    assert encode("continuation", ("the cat", "sat"), delimiter=" ").tokens.tolist() == ids("the cat sat")
    assert encode("continuation", ("the cat ", "sat")).tokens.tolist() == ids("the cat sat")
    assert scored_text(encode("continuation", ("the cat", "sat"), delimiter=" ")) == " sat"


@pytest.mark.parametrize("max_tokens", range(2, 12))
def test_a_long_pair_loses_its_beginning_and_never_all_that_is_scored(max_tokens: int) -> None:
    whole = encode("continuation", ("the cat sat on a mat and", " looked at"))
    cut = encode("continuation", ("the cat sat on a mat and", " looked at"), max_tokens=max_tokens)
    kept = min(max_tokens, len(whole.tokens))
    assert cut.tokens.tolist() == whole.tokens[-kept:].tolist() and cut.num_cut == len(whole.tokens) - kept
    assert not cut.scored[0] and cut.scored.any()
    assert cut.scored[1:].tolist() == whole.scored[-kept:][1:].tolist()


def test_the_plain_chat_scores_each_answer_and_ends_with_the_last() -> None:
    turns = (("system", "the town"), ("user", "the cat"), ("assistant", "sat"), ("user", "on"), ("assistant", "a mat"), ("user", "and"))
    encoded = encode("messages", *turns)
    assert TOKENIZER.decode(encoded.tokens) == "System: the town\n\nUser: the cat\n\nAssistant: sat\n\nUser: on\n\nAssistant: a mat"
    assert scored_text(encoded) == " sat a mat"
    assert EOT not in encoded.tokens
    short = encode("messages", *turns, max_tokens=6)
    assert short.tokens.tolist() == encoded.tokens[-6:].tolist() and short.num_cut > 0


def test_what_cannot_be_scored_says_so() -> None:
    with pytest.raises(UnusableExampleError, match="nothing_scored"):
        encode("messages", ("user", "the cat"))


def tokenizer_directory(directory: Path, template: str | None) -> str:
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes(tokenizer_json())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | ({} if template is None else {"chat_template": template})))
    return str(directory)


def test_a_chat_template_that_marks_answers_is_used(tmp_path: Path) -> None:
    template = ChatTemplate.load(tokenizer_directory(tmp_path / "t", MARKED_TEMPLATE), TOKENIZER.vocab_size)
    encoder = ExampleEncoder(TOKENIZER, 1000, chat_template=template)
    encoded = encoder.encode(example("messages", ("user", "the cat"), ("assistant", "sat on"), ("user", "a"), ("assistant", "mat")))
    expected = [*ids("<user>the cat<assistant>sat on"), EOT, *ids("<user>a<assistant>mat"), EOT]
    assert encoded.tokens.tolist() == expected
    assert [int(token) for token in encoded.tokens[encoded.scored]].count(EOT) == 2
    assert scored_text(encoded) == "sat onmat"
    with pytest.raises(UnusableExampleError, match="control_token"):
        encoder.encode(example("messages", ("user", "the <|endoftext|>"), ("assistant", "sat")))


def test_without_such_a_template_the_plain_one_stands_in(tmp_path: Path) -> None:
    assert ChatTemplate.load(tokenizer_directory(tmp_path / "none", None), 300) is None
    assert ChatTemplate.load(tokenizer_directory(tmp_path / "plain", PLAIN_TEMPLATE), 300) is None
    assert ChatTemplate.load("EleutherAI/gpt-neox-20b", 300) is None


def test_a_template_that_refuses_a_chat_or_needs_other_tokens(tmp_path: Path) -> None:
    strict = "{% generation %}{% endgeneration %}{{ raise_exception('roles must alternate') }}"
    template = ChatTemplate.load(tokenizer_directory(tmp_path / "strict", strict), 300)
    with pytest.raises(UnusableExampleError, match="roles must alternate"):
        template.encode((("user", "a"),))
    small = ChatTemplate.load(tokenizer_directory(tmp_path / "small", MARKED_TEMPLATE), 20)
    with pytest.raises(UserError, match=r"the chat template uses token \d+, the pool's vocabulary has 20: its tokenizer is another"):
        small.encode((("user", "the cat"), ("assistant", "sat")))


def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    directory = tokenizer_directory(tmp_path / "broken", MARKED_TEMPLATE)
    (Path(directory) / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the chat template of"):
        ChatTemplate.load(directory, 300)


def test_tokens_have_the_pools_dtype() -> None:
    assert encode("text", ("", "the cat")).tokens.dtype == np.uint16
