"""Reference sets from raw records: forms, rejects, the split by document, and what does not change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.preprocess.records import Reject, find_inputs
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.references.build import FACTS_FILE, PARTS, REJECTS_FILE, ReferenceOptions, build_reference, part_of
from megatron_groupmates.pool.references.examples import ScoredTokens
from megatron_groupmates.pool.references.records import ExampleFields, ExampleFile, RawExample
from megatron_groupmates.pool.sources import read_sources
from megatron_groupmates.utils.storage import join, upload
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.pool.helpers import WORDS, tiny_tokenizer, write_raw

TOKENIZER = tiny_tokenizer()


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of all three forms in turn."""
    generator = np.random.default_rng(seed)

    def words(number: int) -> str:
        return " ".join(generator.choice(WORDS, number))

    makers = (
        lambda: {"text": words(12), "url": "http://x"},
        lambda: {"context": words(12), "continuation": " " + words(2)},
        lambda: {"messages": [{"role": "user", "content": words(12)}, {"role": "assistant", "content": words(3)}]},
    )
    return [makers[number % 3]() for number in range(count)]


def options(**changes: Any) -> ReferenceOptions:
    return ReferenceOptions(**{"sizes": {"oracle": 8, "oracle_noise": 8, "evaluation": 12}, "max_tokens": 40, **changes})


def build(inputs: Path, output: Path, **changes: Any) -> dict[str, Any]:
    summary, built = build_reference([inputs], output, TOKENIZER, options(**changes))
    assert built
    return summary


def read(file: Path, **fields: str) -> list[RawExample | Reject]:
    return list(ExampleFile(find_inputs([file])[0][0], ExampleFields(**fields)))  # type: ignore[arg-type]


def texts(output: Path, part: str) -> list[str]:
    index = PoolIndex.open(output / part)
    return [TOKENIZER.decode(tokens) for tokens in PoolReader(index).read_many(range(index.num_samples))]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_each_form_is_told_by_its_fields(tmp_path: Path) -> None:
    mixed = {"messages": [{"role": "assistant", "content": "a"}], "context": "c", "continuation": "d", "text": "t"}
    lines = [mixed, {"context": "c", "continuation": "d", "text": "t"}, {"text": "t"}, {"input": {"q": "c"}, "target": "d"}]
    file = write_raw(tmp_path / "a.jsonl", lines)
    assert [item.form for item in read(file)[:3]] == ["messages", "continuation", "text"]
    renamed = read(file, context="input.q", continuation="target")[3]
    assert (renamed.form, renamed.turns) == ("continuation", (("c", "d"),))


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (b"{", "broken_json"),
        (b"[1]", "broken_json"),
        (b'{"text": "\xff"}', "bad_utf8"),
        (b'{"text": "\\ud800"}', "bad_utf8"),
        ({"text": 3}, "missing_text"),
        ({"other": "a"}, "missing_text"),
        ({"continuation": "a"}, "missing_text"),
        ({"messages": "a"}, "missing_text"),
        ({"messages": [{"role": "user"}]}, "missing_text"),
        ({"text": " \n"}, "empty_text"),
        ({"context": "a", "continuation": ""}, "empty_text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "empty_text"),
        ({"text": "a" * 3, "url": 5}, None),
    ],
)
def test_unusable_records_are_rejected_by_kind(tmp_path: Path, record: Any, kind: str | None) -> None:
    [item] = read(write_raw(tmp_path / "a.jsonl", [record]))
    assert (item.kind if isinstance(item, Reject) else None) == kind


def test_counts_add_up_and_sets_hold_what_was_chosen(tmp_path: Path) -> None:
    lines = [*records(150), *records(30), b"{", {"text": ""}]
    summary = build(write_raw(tmp_path / "a.jsonl.zst", lines), tmp_path / "out", max_tokens=20)
    assert (summary["read"], summary["rejected"], summary["chosen"]) == (182, 2, 28)
    assert summary["chosen"] + summary["not_chosen"] + summary["duplicates"] == 180 and summary["duplicates"] > 0
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS_FILE).read_text().splitlines()]
    assert [(reject["line"], reject["kind"]) for reject in rejects] == [(181, "broken_json"), (182, "empty_text")]
    for part, size in options().sizes.items():
        index = PoolIndex.open(tmp_path / "out" / part)
        scored = [ScoredTokens(index).read(row) for row in range(size)]
        facts = summary["parts"][part]
        assert index.num_samples == size == facts["examples"]
        assert facts["tokens"] == index.num_tokens and facts["scored_tokens"] == sum(mask.sum() for mask in scored)
        assert facts["examples_cut"] > 0 and index.lengths.max() == 20
        assert all(mask.any() and not mask[0] for mask in scored)
        for row, source in enumerate(read_sources(index, index.shard_names[0])):
            [document] = source["documents"]
            raw = {**lines[document["line"] - 1]}
            content = raw.get("text") or raw.get("continuation") or raw["messages"][-1]["content"]
            assert document["num_tokens"] == index.lengths[row]
            assert content.split()[0] in TOKENIZER.decode(PoolReader(index).read(row))


def test_no_document_is_in_two_parts_whatever_changes(tmp_path: Path) -> None:
    """Other seeds, sizes and inputs: what was ever in one part is never in another."""
    shared = [{"context": f"the {word} sat", "continuation": f" {number}"} for word in WORDS for number in range(4)]
    inputs = [[*records(200), *shared], [*records(300, 1), *records(200), *shared]]
    of_part: dict[str, set[str]] = {part: set() for part in PARTS}
    for number, lines in enumerate(inputs):
        file = write_raw(tmp_path / f"{number}.jsonl", lines)
        for seed, size in ((0, 10), (7, 25)):
            output = tmp_path / f"out-{number}-{seed}"
            build(file, output, seed=seed, sizes=dict.fromkeys(PARTS, size))
            for part in PARTS:
                index = PoolIndex.open(output / part)
                for source in read_sources(index, index.shard_names[0]):
                    record = lines[source["documents"][0]["line"] - 1]
                    of_part[part].add(record.get("text") or record.get("context") or record["messages"][0]["content"])
    assert all(of_part.values())
    assert not (of_part["oracle"] & of_part["oracle_noise"] or of_part["evaluation"] & (of_part["oracle"] | of_part["oracle_noise"]))


def test_parts_are_thirds_and_white_space_does_not_matter() -> None:
    def raw(text: str) -> RawExample:
        return RawExample("text", (("", text),), "", "f", 1)

    counts = [sum(part_of(raw(f"text {number}")) == part for number in range(3000)) for part in PARTS]
    assert min(counts) > 900 and sum(counts) == 3000
    assert raw("the  cat\n").digest == raw("the cat").digest and part_of(raw("the  cat")) == part_of(raw("the cat"))
    chats = [RawExample("messages", (("user", "q"), ("assistant", answer)), "", "f", 1) for answer in ("a", "b")]
    assert chats[0].document_digest == chats[1].document_digest and chats[0].digest != chats[1].digest


def test_grown_inputs_add_examples_without_reordering_the_old(tmp_path: Path) -> None:
    build(write_raw(tmp_path / "a.jsonl", records(150)), tmp_path / "small", sizes={"oracle": 20})
    build(write_raw(tmp_path / "b.jsonl", [*records(90, 5), *records(150)]), tmp_path / "large", sizes={"oracle": 30})
    small, large = texts(tmp_path / "small", "oracle"), texts(tmp_path / "large", "oracle")
    common = [text for text in large if text in small]
    assert len(common) > 5 and common == [text for text in small if text in large][: len(common)]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted(["oracle", FACTS_FILE, REJECTS_FILE])


def test_same_arguments_same_bytes_and_another_seed_another_sample(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "a.jsonl", records(200))
    for name in ("one", "two"):
        build(file, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    build(file, tmp_path / "three", seed=1)
    assert texts(tmp_path / "one", "oracle") != texts(tmp_path / "three", "oracle")


def test_sets_that_are_there_are_kept_or_refused(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "a.jsonl", records(200))
    summary = build(file, tmp_path / "out")
    assert build_reference([file], tmp_path / "out", TOKENIZER, options()) == (summary, False)
    with pytest.raises(UserError, match=r"holds reference sets made with other arguments \(max_tokens was 40, is 50\); choose another"):
        build_reference([file], tmp_path / "out", TOKENIZER, options(max_tokens=50))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is not empty and holds no reference sets"):
        build_reference([file], tmp_path / "other", TOKENIZER, options())


def test_too_few_examples_leave_nothing_but_the_rejects(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "a.jsonl", [*records(30), b"{"])
    with pytest.raises(
        UserError, match=r"evaluation: 500 asked for, \d+ found; 31 read, 1 rejected, 0 duplicates\).*lower --size"
    ) as caught:
        build_reference([file], tmp_path / "out", TOKENIZER, options(sizes={"evaluation": 500}))
    assert not (tmp_path / "out").exists()
    assert str(tmp_path / "out.rejects.jsonl") in str(caught.value)
    assert len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 1


def test_too_many_rejects_end_the_work(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "a.jsonl", [b"{", *records(100), b"[", b"}"])
    with pytest.raises(UserError, match=r"2 lines rejected so far \(2 broken_json\), --max-rejects is 1"):
        build_reference([file], tmp_path / "out", TOKENIZER, options(), max_rejects=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": {"train": 3}}, "there is no part train; --sizes names oracle, oracle_noise, evaluation"),
        ({"sizes": {}}, "give at least one part 1 example or more"),
        ({"sizes": {"oracle": -1}}, "give at least one part 1 example or more"),
        ({"max_tokens": 1}, "an example has at least 2 tokens, one of them scored, not 1; change --max-tokens"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(**changes)


def test_remote_inputs(tmp_path: Path, s3_options: dict[str, Any]) -> None:  # noqa: F811
    file = write_raw(tmp_path / "a.jsonl.gz", records(200))
    url = f"s3://{BUCKET}/raw"
    upload(file, join(url, "a.jsonl.gz"))
    build_reference([url], tmp_path / "remote", TOKENIZER, options())
    build(file, tmp_path / "local")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
