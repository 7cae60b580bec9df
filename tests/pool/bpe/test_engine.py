"""The fast engine makes the ids of Hugging Face's tokenizer for every text, or is refused."""

from __future__ import annotations

import functools
import itertools
import json
import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_groupmates.pool.bpe import engine as bpe
from megatron_groupmates.pool.bpe.checks import UnprovenError, byte_alphabet
from megatron_groupmates.pool.bpe.engine import FastBpe
from megatron_groupmates.pool.bpe.nfc import NfcNormalizer
from megatron_groupmates.pool.bpe.split_patterns import GPT2_PATTERN, is_known

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
CORPUS = [
    "The cat's on the mat; we've 12,345 dogs and they'll run  away.\n\n    def function(self):\n\t\treturn self.value == 10\n",
    "Le caf\u00e9 d\u00e9j\u00e0 vu. \u4e2d\u6587\u5b57\u7b26\u548c\u65e5\u672c\u8a9e\u3002 \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u043c\u0438\u0440 \U0001f600\U0001f600 e\u0301\u0301 \u00a0\u00a0\r\n\r\n",
    "if (x != y) { /* ... */ } // ====== \t\t\t\n          \n     END\n\n\n <|endoftext|> 2024-01-01 \u0939\u093f\u0928\u094d\u0926\u0940",
]
NEOX_RUNS = tuple(" " * length for length in range(24, 1, -1))


def split_on(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def trained(pattern: str | None = None, nfc: bool = False, added: tuple[str, ...] = (), normalized: bool = True) -> Tokenizer:
    """A small byte-level BPE; ``pattern`` None is GPT-2's, built into the byte-level step."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split_on(pattern) if pattern else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken(content, normalized=normalized) for content in added])
    tokenizer.encode_special_tokens = True
    return tokenizer


def changed(change: Callable[[dict[str, Any]], None], base: Tokenizer | None = None) -> Tokenizer:
    """A tokenizer with its JSON changed."""
    config = json.loads((base or trained()).to_str())
    change(config)
    tokenizer = Tokenizer.from_str(json.dumps(config))
    tokenizer.encode_special_tokens = True
    return tokenizer


def of_merges(merges: list[tuple[str, str]], ignore_merges: bool = False, extra: tuple[str, ...] = ()) -> Tokenizer:
    """All bytes, then the tokens of ``merges``, then ``extra`` ones that no merge makes."""
    tokens = dict.fromkeys([*byte_alphabet(), *(left + right for left, right in merges), *extra])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def assert_equal(engine: FastBpe, tokenizer: Tokenizer, text: str) -> None:
    ids = engine.encode(text)
    assert ids.dtype == "uint32"
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


TOKENIZERS = {
    "gpt2": {},
    "gpt2 split": {"pattern": GPT2_PATTERN},
    "neox": {"nfc": True, "added": NEOX_RUNS},
    "codegen": {"added": (*NEOX_RUNS, "\t\t", "\t\t\t")},
    "llama3": {"pattern": LLAMA3_PATTERN},
    "llama3 with runs": {"pattern": LLAMA3_PATTERN, "added": (*NEOX_RUNS[10:], "\t\t"), "nfc": True},
    "qwen2": {"pattern": QWEN2_PATTERN, "nfc": True, "added": ("<tool>", "</tool>", "<tool>>"), "normalized": False},
    "literals": {"nfc": True, "added": ("|||IP|||", "|||", "the", "  x", "\u00e9\u00e9", "endof", "\n\n")},
    "raw literals and runs": {"added": (*NEOX_RUNS, "|||IP|||", "caf\u00e9"), "normalized": False, "nfc": True},
}
ENGINES = functools.cache(lambda name: bpe.build(trained(**TOKENIZERS[name]), "uint32"))

WORDS = (
    *(
        "the",
        "cat",
        "function",
        "self",
        "a",
        "x",
        "END",
        "caf\u00e9",
        "\u4e2d\u6587",
        "\u041f\u0440\u0438",
        "12",
        "3",
        "2024",
        "\u0663\u0664",
    ),
    *("'s", "'LL", "'Ve", "'\u017f", "'", "\u2019t", "==", "!", "...", "//", "(", "\u3002", "\U0001f600", "\U0001f468\u200d\U0001f469"),
    *(
        "\u0301",
        "\u0323",
        "e\u0301",
        "\u212b",
        "\u1100",
        "\u1161",
        "\u11a8",
        "\uac00",
        "\u0378",
        "\u0897",
        "\u1c89",
        "\U00010d40",
        "\U0001e5d0",
    ),
    *("\x00", "\x1c", "\x1f", "\x7f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\ufeff", "\ud7ff", "\ue000", "\ufdd0\ufdd1", "\uffff"),
    *("<|endoftext|>", "<|padding|>", "<|endof", "text|>", "<tool>", "</tool>", "<tool>>", "|||IP|||", "||||", "|", "\r\n", "\n", "\r"),
)
FRAGMENTS = st.one_of(
    st.sampled_from(WORDS),
    st.builds(
        lambda character, length: character * length, st.sampled_from(" \t\n"), st.sampled_from([1, 1, 1, 2, 3, 4, 23, 24, 25, 48, 49, 50])
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(fragments=st.lists(FRAGMENTS, max_size=25))
def test_ids_are_equal_for_any_text(name: str, fragments: list[str]) -> None:
    assert_equal(ENGINES(name), trained(**TOKENIZERS[name]), "".join(fragments))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_equal_in_random_mixtures(name: str) -> None:
    generator = random.Random(name)
    spaces = ["", " ", " ", " ", "  ", "\n", "\t", "\n    ", "\t\t", " " * 24, " " * 25, "\r\n"]
    for _ in range(60):
        text = "".join(generator.choice(WORDS) + generator.choice(spaces) for _ in range(200))
        assert_equal(ENGINES(name), trained(**TOKENIZERS[name]), text)


@pytest.mark.parametrize(("pattern", "step"), [(GPT2_PATTERN, 1), (LLAMA3_PATTERN, 7), (QWEN2_PATTERN, 7)], ids=["gpt2", "llama3", "qwen2"])
def test_every_character_is_in_the_same_class(pattern: str, step: int) -> None:
    """With merges of a letter, a digit and a mark with any byte, ids show whether a character is in a piece with them."""
    assert is_known(pattern)
    high = [character for character, byte in byte_alphabet().items() if byte >= 0x80]
    tokenizer = of_merges(list(itertools.product("a1!", high)))
    if pattern != GPT2_PATTERN:  # which is built in
        tokenizer.pre_tokenizer = split_on(pattern)
    engine = bpe.build(tokenizer, "uint32")
    # Ideographs, Hangul syllables, private use and what lies beyond are long stretches of one class.
    ranges = (range(0x80, 0x3500), range(0x9F00, 0xAC10), range(0xD7A0, 0xD800), range(0xE000, 0xE010), range(0xF900, 0x1FC00))
    codes = [*itertools.chain(*ranges), *range(0x1FC00, 0x110000, 397)][::step]
    for start in range(0, len(codes), 20_000):
        assert_equal(engine, tokenizer, "".join(f"a{chr(code)} 1{chr(code)} !{chr(code)}\n" for code in codes[start : start + 20_000]))


@pytest.mark.parametrize(
    "unit", ["a", "ab", " ", "\n", "\t ", "\n \n", "\u00a0", "=", "1", "\u4e2d", "e\u0301", "\U0001f600", "\u0301\u0323", "q7"], ids=ascii
)
@pytest.mark.parametrize("name", ["neox", "llama3", "llama3 with runs"])
def test_long_runs(name: str, unit: str) -> None:
    """Seventy thousand characters without a break neither fail nor take a time that grows with their square."""
    for end in ("", "x"):
        assert_equal(ENGINES(name), trained(**TOKENIZERS[name]), unit * (70_000 // len(unit)) + end)


def test_white_space_on_which_tiktoken_gives_up() -> None:
    assert_equal(ENGINES("gpt2"), trained(), "a" + "\n" * 1_100_000 + "b")


def test_contractions_in_any_case() -> None:
    """A merge with the next letter shows whether the contraction is a piece of its own; U+017F is a long s."""
    endings = [*"sStTmMdDxX", "re", "rE", "VE", "ve", "Ll", "lL", "LL", "\u017f", "\u1e9e", "\ufb05", "\u212a"]
    last = {
        character for ending in endings for character in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(ending)[0][0][-1]
    }
    for pattern in (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN):
        tokenizer = of_merges([(character, "q") for character in sorted(last)])
        tokenizer.pre_tokenizer = split_on(pattern)
        engine = bpe.build(tokenizer, "uint32")
        for ending in endings:
            assert_equal(engine, tokenizer, f"a'{ending}q '{ending}q''{ending}q\n'{ending}q1'{ending}q")


def test_special_tokens_hide_runs() -> None:
    special = {"content": "<|  |>", "special": True}
    runs = [{"content": " " * length} for length in (2, 3)]
    tokenizer = changed(put_added(special, *runs))
    for text in ("<|  |>", "a <|   |>  b", "<|  |>   <|  |", "   <|  |>"):
        assert_equal(bpe.build(tokenizer, "uint32"), tokenizer, text)


def test_lone_surrogates_are_refused() -> None:
    for name in TOKENIZERS:
        with pytest.raises(UnicodeEncodeError):
            ENGINES(name).encode("a \ud800")


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    num_merges=st.integers(1, 25),
    ignore_merges=st.booleans(),
    texts=st.lists(st.text("abc", min_size=1, max_size=40), min_size=1, max_size=10),
)
def test_any_list_of_merges(seed: int, num_merges: int, ignore_merges: bool, texts: list[str]) -> None:
    """Merges in no sensible order: tokens that cannot be reached, several ways to one, any order of ids."""
    generator = random.Random(seed)
    merges: list[tuple[str, str]] = []
    tokens = ["a", "b", "c"]
    for _ in range(num_merges):
        merge = (generator.choice(tokens), generator.choice(tokens))
        if merge not in merges and len(merge[0] + merge[1]) < 9:
            merges.append(merge)
            tokens = list(dict.fromkeys([*tokens, merge[0] + merge[1]]))
    generator.shuffle(merges)
    extra = tuple("".join(generator.choices("abc", k=generator.randint(2, 6))) for _ in range(3))
    tokenizer = of_merges(merges, ignore_merges, extra)
    try:
        engine = bpe.build(tokenizer, "uint32")
    except UnprovenError as error:
        assert "merges" in str(error)
        return
    for text in texts:
        assert_equal(engine, tokenizer, text)


def test_tokens_out_of_reach() -> None:
    """``bc`` comes first, so that no text makes ``abc``; tiktoken with all tokens would make it."""
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    tokenizer = of_merges(merges)
    assert [tokenizer.id_to_token(number) for number in bpe.build(tokenizer, "uint32").encode("abc")] == ["a", "bc"]
    with pytest.raises(UnprovenError, match=r"its token 'abc' is only made of whole pieces, but merges stop one step before it"):
        bpe.build(of_merges(merges, ignore_merges=True), "uint32")
    tokenizer = of_merges([*merges, ("c", "d"), ("ab", "cd")], ignore_merges=True, extra=("xyz",))
    with pytest.raises(UnprovenError, match="'abc'"):
        bpe.build(tokenizer, "uint32")
    tokenizer = of_merges([("b", "c")], ignore_merges=True, extra=("abcd", "xyz"))
    engine = bpe.build(tokenizer, "uint32")
    for text in ("abcd", "abcda", " abcd", "xyz", "xyzxyz", "abcd xyz", "!abcd!xyz"):
        assert_equal(engine, tokenizer, text)
    assert len(engine.encode("abcd")) == 1


def test_several_merges_to_one_token() -> None:
    together = [("a", "a"), ("aa", "a"), ("a", "aa")]
    assert_equal(bpe.build(of_merges(together), "uint32"), of_merges(together), "aaaaaaaaaaa")
    with pytest.raises(UnprovenError, match=r"merges to the same token are apart in its list, as for \['aaa'\]"):
        bpe.build(of_merges([("a", "a"), ("aa", "a"), ("b", "b"), ("a", "aa")]), "uint32")


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


def put_model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["model"].update(values)


def put_split(**values: Any) -> Callable[[dict[str, Any]], None]:
    split = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False, **values}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": "Regex" not in split["pattern"]}
    return put(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]})


def put_byte_level(**values: Any) -> Callable[[dict[str, Any]], None]:
    return put(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **values})


def put_added(*tokens: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return lambda config: config["added_tokens"].extend({"id": 700 + number, **plain, **token} for number, token in enumerate(tokens))


def drop_byte(config: dict[str, Any]) -> None:
    vocabulary = config["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("~")
    config["model"]["merges"] = [merge for merge in config["model"]["merges"] if "~" not in "".join(merge)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(pre_tokenizer=None), r"its pre-tokenizer is \[\], not byte-level"),
        (put(pre_tokenizer={"type": "Whitespace"}), r"its pre-tokenizer is \['Whitespace'\]"),
        (put_byte_level(add_prefix_space=True), "it puts a space before each text"),
        (put_byte_level(use_regex=False), "it does not split text into pieces"),
        (put_split(pattern={"String": " "}), "it splits text twice"),
        (put_split(behavior="Removed"), "its split is Removed, inverted False"),
        (put_split(invert=True), "its split is Isolated, inverted True"),
        (put_split(pattern={"Regex": r"\s+"}), r"its split pattern .* is not a known one"),
        (put(normalizer={"type": "NFKC"}), "its normalizer is NFKC, not NFC or none"),
        (put_model(dropout=0.1), r"it has a dropout of 0\.1"),
        (put_model(end_of_word_suffix="</w>"), "it has a end_of_word_suffix, '</w>'"),
        (put(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}), "its model is Unigram, not BPE"),
        (drop_byte, r"its vocabulary lacks the bytes \[126\]"),
        (put_added({"content": "<a>", "lstrip": True, "rstrip": True}), "its added token '<a>' has lstrip, rstrip set"),
        (put_added({"content": "<a>", "single_word": True}), "its added token '<a>' has single_word set"),
        (put_added({"content": "<a>"}, {"content": "<b>", "normalized": False}), "partly before and partly after normalisation"),
    ],
)
def test_refused(change: Callable[[dict[str, Any]], None], reason: str) -> None:
    with pytest.raises(UnprovenError, match=reason):
        bpe.build(changed(change), "uint32")


def test_added_tokens_that_normalisation_changes_are_refused() -> None:
    with pytest.raises(UnprovenError, match="is not normalised"):
        bpe.build(changed(put_added({"content": "e\u0301x"}), trained(nfc=True)), "uint32")
    assert bpe.build(changed(put_added({"content": "e\u0301x", "normalized": False}), trained(nfc=True)), "uint32")


@pytest.mark.parametrize("normalized", [False, True])
def test_special_tokens_hide_added_ones(normalized: bool) -> None:
    """A special token in a text is text, but the library takes no other added token out of it."""
    special = {"special": True, "normalized": normalized}
    contents = ("<| x|>", " x", "x", "  ", "   ", "\t\t")
    tokens = [{"content": content, **(special if "|" in content else {"normalized": normalized})} for content in contents]
    tokenizer = changed(put_added(*tokens))
    engine = bpe.build(tokenizer, "uint32")
    for text in itertools.product(["<| x|>", "<|", "  ", " x", "x", "|>", "\t", "\t\t\t"], repeat=3):
        assert_equal(engine, tokenizer, "".join(text))


def test_the_self_test_catches_an_engine_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "tiktoken_pattern", lambda pattern, runs: r"[\s\S]")
    with pytest.raises(UnprovenError, match=r"the self-test fails on ' a  b   c"):
        bpe.build(trained(), "uint32")


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ae\u0301\u0323\u0308\u1100\u1161\u11a8\u0897")), max_size=9
    )
)
def test_nfc(text: str) -> None:
    assert NfcNormalizer(normalizers.NFC())(text) == normalizers.NFC().normalize_str(text)


def test_nfc_of_every_character() -> None:
    """Alone, and between marks of two classes, where reordering and composition would show."""
    normalizer = NfcNormalizer(normalizers.NFC())
    for start in range(0x80, 0x32000, 64):
        characters = [chr(code) for code in range(start, start + 64) if unicodedata.category(chr(code)) != "Cs"]
        for pattern in ("{}.", "a\u0334{}\u0301a\u0301{}\u0334.", "\u1100{}\u11a8."):
            text = "".join(pattern.format(*[character] * 2) for character in characters)
            assert normalizer(text) == normalizers.NFC().normalize_str(text)
