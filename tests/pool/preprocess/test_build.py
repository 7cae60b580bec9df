"""From raw documents to a pool: packing, shuffle, counts, errors."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.order import derive_key, permute
from megatron_groupmates.pool.preprocess import encode as encode_module
from megatron_groupmates.pool.preprocess import merge as merge_module
from megatron_groupmates.pool.preprocess import records as records_module
from megatron_groupmates.pool.preprocess import scatter as scatter_module
from megatron_groupmates.pool.preprocess.build import build_pool
from megatron_groupmates.pool.preprocess.options import BuildOptions
from megatron_groupmates.pool.preprocess.plan import count_cells
from megatron_groupmates.pool.preprocess.records import Document, DocumentFile, find_inputs
from megatron_groupmates.pool.reader import PoolReader
from megatron_groupmates.pool.sources import read_sources
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.files import sha256_file, sha256_json
from tests.pool.helpers import documents, tiny_tokenizer, write_raw


def raw(directory: Path) -> Path:
    write_raw(directory / "web.jsonl.zst", documents(120, 1, kinds=["web"]))
    write_raw(directory / "sub" / "book.jsonl.gz", documents(80, 2, kinds=["book", "essay"]))
    write_raw(directory / "none.jsonl", [{"text": "no kind here"}, b"{", b'{"text": ""}'])
    return directory


def plain_streams(directory: Path) -> dict[str, list[int]]:
    """Ids of each input file, document after document, each followed by the end-of-text token."""
    tokenizer = tiny_tokenizer()
    generated = {"web.jsonl.zst": documents(120, 1), "sub/book.jsonl.gz": documents(80, 2), "none.jsonl": [{"text": "no kind here"}]}
    return {
        name: [token for record in records for token in [*tokenizer.encode_batch([record["text"]])[0].tolist(), tokenizer.eot_id]]
        for name, records in generated.items()
    }


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_packed_pool_holds_every_context_once(tmp_path: Path) -> None:
    options = BuildOptions(pack=33, samples_per_shard=50)
    summary, built = build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), options)
    assert built
    index = PoolIndex.open(tmp_path / "pool")
    streams = plain_streams(tmp_path)
    expected = [tuple(stream[first : first + 33]) for stream in streams.values() for first in range(0, len(stream) - 32, 33)]
    found = [tuple(tokens.tolist()) for tokens in PoolReader(index).read_many(range(index.num_samples))]
    assert sorted(found) == sorted(expected)
    assert found != [context for name in sorted(streams) for context in expected if context in streams[name]]
    assert index.rows_per_shard[:-1].tolist() == [50] * (index.num_shards - 1)
    assert set(index.lengths.tolist()) == {33}

    assert summary["documents_read"] == 203 == summary["documents_accepted"] + summary["documents_rejected"]
    assert summary["rejects_by_kind"] == {"broken_json": 1, "empty_text": 1}
    assert summary["tokens_encoded"] == sum(map(len, streams.values()))
    assert summary["tokens_dropped_in_tails"] == sum(len(stream) % 33 for stream in streams.values())
    assert summary["tokens_in_pool"] == summary["tokens_encoded"] - summary["tokens_dropped_in_tails"]
    assert summary["tokens_in_pool"] == index.num_tokens
    rejects = [json.loads(line) for line in (tmp_path / "pool" / "rejects.jsonl").read_text().splitlines()]
    assert [(item["file"], item["line"], item["kind"]) for item in rejects] == [
        ("none.jsonl", 2, "broken_json"),
        ("none.jsonl", 3, "empty_text"),
    ]
    assert not (tmp_path / "pool.work").exists()


def test_sources_lead_back_to_the_documents(tmp_path: Path) -> None:
    options = BuildOptions(pack=33, samples_per_shard=50)
    build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), options)
    index = PoolIndex.open(tmp_path / "pool")
    tokenizer, reader = tiny_tokenizer(), PoolReader(index)
    generated = {"web.jsonl.zst": documents(120, 1), "sub/book.jsonl.gz": documents(80, 2)}
    row = 0
    for name in index.shard_names:
        for source in read_sources(index, name):
            parts = []
            for part in source["documents"]:
                record = generated[part["file"]][part["line"] - 1]
                ids = [*tokenizer.encode_batch([record["text"]])[0].tolist(), tokenizer.eot_id]
                parts += ids[part["first_token"] : part["first_token"] + part["num_tokens"]]
                assert part["url"] == record["url"]
            assert parts == reader.read(row).tolist()
            assert source["kind"] == index.kinds[index.kind_of[row]]
            row += 1
    assert row == index.num_samples
    assert set(index.kinds) >= {"web", "book", "essay"}


def test_one_sample_per_document_pool(tmp_path: Path) -> None:
    summary, _ = build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions())
    index = PoolIndex.open(tmp_path / "pool")
    assert summary["samples"] == index.num_samples == summary["documents_accepted"] == 201
    assert summary["tokens_dropped_in_tails"] == 0
    tokens = PoolReader(index).read_many(range(index.num_samples))
    assert all(ids[-1] == index.eot_id and index.eot_id not in ids[:-1] for ids in tokens)
    expected = [record["text"] for record in documents(120, 1) + documents(80, 2)] + ["no kind here"]
    assert sorted(map(tiny_tokenizer().decode, tokens)) == sorted(expected)
    assert (index.kind_of == -1).sum() == 1


def plain_samples(directory: Path, options: BuildOptions) -> dict[str, list[tuple[list[int], str | None, list[dict]]]]:
    """Samples of each file the obvious way: (ids, kind, documents)."""
    tokenizer, found = tiny_tokenizer(), {}
    for file in find_inputs([directory])[0]:
        stream = []  # one (id, document, place in it, kind) per token
        for document in DocumentFile(file):
            if isinstance(document, Document):
                facts = {"file": file.name, "line": document.line, "url": document.url}
                ids = [*tokenizer.encode_batch([document.text])[0].tolist(), tokenizer.eot_id]
                stream.append([(token, facts, place, document.field(options.kind_field)) for place, token in enumerate(ids)])
        if options.pack is not None:
            flat = [token for tokens in stream for token in tokens]
            stream = [flat[first : first + options.pack] for first in range(0, len(flat) - options.pack + 1, options.pack)]
        found[file.name] = []
        for tokens in stream:
            parts = [(facts, kind, [place for _, place in group]) for (facts, kind), group in by_document(tokens)]
            main = max(parts, key=lambda part: len(part[2]))
            sources = [{**facts, "first_token": places[0], "num_tokens": len(places)} for facts, _, places in parts]
            found[file.name].append(([token for token, *_ in tokens], main[1], sources))
    return found


def by_document(tokens: list) -> list:
    keyed = [((facts, kind), place) for _, facts, place, kind in tokens]
    return [(key, list(group)) for key, group in itertools.groupby(keyed, key=lambda item: item[0])]


@pytest.mark.parametrize(
    ("pack", "samples_per_shard", "cell_bytes"),
    [(17, 60, 1 << 29), (17, 60, 4000), (33, 7, 300), (33, 100, 60), (None, 50, 1000), (None, 9, 300), (17, 10_000, 50)],
)
def test_the_pool_is_as_defined(tmp_path: Path, pack: int | None, samples_per_shard: int, cell_bytes: int) -> None:
    """Cells by hash, cells one after the other, each permuted, cut into shards: worked out sample by sample."""
    options = BuildOptions(pack=pack, samples_per_shard=samples_per_shard, seed=3, cell_bytes=cell_bytes)
    build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), options)
    inputs = [(file.name, file.num_bytes) for file in find_inputs([tmp_path / "raw"])[0]]
    num_cells = count_cells(inputs, 2, cell_bytes)
    cells: list[list] = [[] for _ in range(num_cells)]
    for name, samples in plain_samples(tmp_path / "raw", options).items():
        for number, sample in enumerate(samples):
            hashed = int(permute(np.array([number]), 1 << 60, derive_key("pool cell", 3, name))[0])
            cells[(hashed >> 28) * num_cells >> 32].append(sample)
    expected = []
    for cell, samples in enumerate(cells):
        order = permute(np.arange(len(samples)), len(samples), derive_key("pool cell order", 3, cell)) if samples else []
        expected += [samples[place] for place in order]

    index = PoolIndex.open(tmp_path / "pool")
    assert [tokens.tolist() for tokens in PoolReader(index).read_many(range(index.num_samples))] == [ids for ids, *_ in expected]
    kinds = [None if kind < 0 else index.kinds[kind] for kind in index.kind_of]
    assert kinds == [kind for _, kind, _ in expected]
    sources = [source for name in index.shard_names for source in read_sources(index, name)]
    assert sources == [{"kind": kind, "documents": documents} for _, kind, documents in expected]
    full, rest = divmod(len(expected), samples_per_shard)
    assert index.rows_per_shard.tolist() == [samples_per_shard] * full + [rest] * (rest > 0)


@pytest.mark.parametrize(("member_format", "num_workers"), [("raw", 3), ("json.gz", 1)])
def test_same_arguments_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member_format: str, num_workers: int) -> None:
    """Whatever the workers, batches, blocks, where the data lies and in which order it is named."""
    options = BuildOptions(pack=17, samples_per_shard=60, seed=4, member_format=member_format, cell_bytes=2000)
    build_pool([raw(tmp_path / "raw")], tmp_path / "a", tiny_tokenizer(), options)
    moved = tmp_path / "elsewhere" / "raw"
    shutil.copytree(tmp_path / "raw", moved)
    inputs = [moved / "web.jsonl.zst", str(moved / "*.jsonl"), moved / "sub"]
    build_pool(inputs, tmp_path / "workers", tiny_tokenizer(), options, num_workers=num_workers)
    assert content(tmp_path / "a") == content(tmp_path / "workers")
    monkeypatch.setattr(encode_module, "_BATCH_CHARACTERS", 300)
    monkeypatch.setattr(scatter_module, "BLOCK_BYTES", 9000)
    build_pool(inputs, tmp_path / "b", tiny_tokenizer(), options)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_pools_are_frozen(tmp_path: Path) -> None:
    """A pool made by an earlier version can be made again: changing this digest breaks that promise."""
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name in ("a", "b"):
        write_raw(tmp_path / "raw" / f"{name}.jsonl", [{"text": f"{name}{line}" * (line % 7 + 1)} for line in range(200)])
    options = BuildOptions(pack=17, samples_per_shard=50, cell_bytes=1000)
    build_pool([tmp_path / "raw"], tmp_path / "pool", PoolTokenizer(tokenizer.to_str().encode(), "bytes"), options)
    digests = [sha256_file(path) for path in sorted((tmp_path / "pool").glob("shard_*.tar"))]
    assert sha256_json(digests) == "fc800568c2c0633dc4c2507ba9783d216dc8039f31458f21ec668a74f4db3d79"


def test_the_shuffle_is_over_the_whole_pool(tmp_path: Path) -> None:
    """The files' shares are alike in all parts of the pool, and neighbours in a file are strangers in the pool."""
    for number in range(4):
        write_raw(tmp_path / "raw" / f"{number}.jsonl", [{"text": f"cat {number} {line}"} for line in range(1000)])
    build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(samples_per_shard=500, cell_bytes=4000))
    index = PoolIndex.open(tmp_path / "pool")
    found = [(s["documents"][0]["file"], s["documents"][0]["line"]) for name in index.shard_names for s in read_sources(index, name)]
    assert len(set(found)) == 4000
    numbers = np.array([int(file[0]) * 1000 + line for file, line in found])
    shares = np.bincount(np.arange(4000) // 500 * 4 + (numbers - 1) // 1000, minlength=32)
    assert ((shares - 125) ** 2 / 125).sum() < 60  # chi-squared of 21 degrees of freedom: mean 21, standard deviation 6.5
    assert (np.abs(np.diff(numbers)) == 1).sum() < 15  # 2 are expected
    assert abs(np.corrcoef(numbers, np.arange(4000))[0, 1]) < 0.06  # standard deviation 0.016


def test_the_seed_changes_the_order_only(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        build_pool([raw(tmp_path / "raw")], tmp_path / str(seed), tiny_tokenizer(), BuildOptions(pack=17, seed=seed))
        index = PoolIndex.open(tmp_path / str(seed))
        found.append([tuple(ids.tolist()) for ids in PoolReader(index).read_many(range(index.num_samples))])
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1])


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    arguments = [raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer()
    first, _ = build_pool(*arguments, BuildOptions(pack=17))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()}
    again, built = build_pool(*arguments, BuildOptions(pack=17), num_workers=2)
    assert (again, built) == (first, False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()} == before
    with pytest.raises(UserError, match=r"made with other arguments \(pack was 17, is 18; seed was 0, is 2\)"):
        build_pool(*arguments, BuildOptions(pack=18, seed=2))
    write_raw(tmp_path / "raw" / "more.jsonl", documents(1))
    with pytest.raises(UserError, match="inputs was"):
        build_pool(*arguments, BuildOptions(pack=17))


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions())
    with pytest.raises(UserError, match="raw is not empty and not a pool"):
        build_pool([tmp_path / "raw"], tmp_path / "raw", tiny_tokenizer(), BuildOptions())
    with pytest.raises(UserError, match=r"none.jsonl is not empty and not a pool"):
        build_pool([tmp_path / "raw"], tmp_path / "raw" / "none.jsonl", tiny_tokenizer(), BuildOptions())


def test_too_many_rejects_end_the_run(tmp_path: Path) -> None:
    message = r"2 documents rejected so far, --max-rejects is 1; .*pool.work/rejects.jsonl lists .* \(1 broken_json, 1 empty_text\)"
    with pytest.raises(UserError, match=message):
        build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions(), max_rejects=1)
    assert len((tmp_path / "pool.work" / "rejects.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "pool").exists()
    build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(), max_rejects=2)
    assert not (tmp_path / "pool.work").exists()


def test_no_sample_at_all(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "a.jsonl", [{"text": "short"}, {"content": "x"}])
    message = r"no sample comes of the 1 input files: 1 documents with \d tokens, 1 documents rejected \(1 missing_text\)"
    with pytest.raises(UserError, match=message):
        build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(pack=100))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


BAD_LINES = {
    "broken_json": b'{"text": "a',
    "bad_utf8": b'{"text": "\xff"}',
    "missing_text": b'{"content": "a"}',
    "empty_text": b'{"text": " "}',
    "line_too_long": b'{"text": "' + b"a " * 300 + b'"}',
}


def test_every_bad_input_is_counted_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MAX_LINE_BYTES", 500)
    good = [{"text": "the cat"}]
    write_raw(tmp_path / "raw" / "bad.jsonl", [*good, *BAD_LINES.values(), *good])
    whole = write_raw(tmp_path / "raw" / "cut.jsonl.gz", [{"text": "the cat sat on a mat"}] * 50)
    whole.write_bytes(whole.read_bytes()[:-20])
    write_raw(tmp_path / "raw" / "kept.jsonl", [{"text": "a town"}, b"{", {"text": "a roof"}])
    shutil.copy(tmp_path / "raw" / "kept.jsonl", tmp_path / "raw" / "same.jsonl")
    summary, _ = build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(kind_field="url"))

    assert sum(summary["rejects_by_kind"].values()) == summary["documents_rejected"]
    assert summary["documents_read"] == summary["documents_accepted"] + summary["documents_rejected"]
    assert summary["rejects_by_kind"] == {**dict.fromkeys(BAD_LINES, 1), "broken_json": 3, "duplicate_input": 2, "truncated_file": 1}
    assert summary["tokens_encoded"] == summary["tokens_in_pool"] + summary["tokens_in_duplicates"] > summary["tokens_in_pool"]
    assert (summary["inputs"], summary["inputs_duplicate"], summary["inputs_named_twice"]) == (4, 1, 0)
    rejects = [json.loads(line) for line in (tmp_path / "pool" / "rejects.jsonl").read_text().splitlines()]
    places = [(reject["file"], reject["line"], reject["kind"]) for reject in rejects]
    assert places[:5] == [("bad.jsonl", line, kind) for line, kind in enumerate(BAD_LINES, start=2)]
    assert places[5][0] == "cut.jsonl.gz" and places[5][2] == "truncated_file"
    assert places[6:] == [("kept.jsonl", 2, "broken_json"), ("same.jsonl", 0, "duplicate_input"), ("same.jsonl", 2, "broken_json")]
    assert rejects[-2]["detail"] == "the same bytes as kept.jsonl; its 2 documents are left out"

    inputs = [json.loads(line) for line in (tmp_path / "pool" / "inputs.jsonl").read_text().splitlines()]
    assert [item["name"] for item in inputs] == ["bad.jsonl", "cut.jsonl.gz", "kept.jsonl", "same.jsonl"]
    assert [item["sha256"] for item in inputs] == [sha256_file(path) for path in sorted((tmp_path / "raw").iterdir())]
    assert [item["documents"] + item["rejects"] for item in inputs] == [7, inputs[1]["documents"] + 1, 3, 3]
    assert (inputs[3]["samples"], inputs[3]["duplicate_of"]) == (0, "kept.jsonl")
    assert sum(item["samples"] for item in inputs) == summary["samples"]
    assert sum(item["tokens"] for item in inputs) == summary["tokens_in_pool"]


def test_rejects_of_duplicates_count(tmp_path: Path) -> None:
    for name in "ab":
        write_raw(tmp_path / "raw" / f"{name}.jsonl", documents(5))
    with pytest.raises(UserError, match=r"5 documents rejected so far, --max-rejects is 4; .* \(5 duplicate_input\)"):
        build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(), max_rejects=4)
    assert "the same bytes as a.jsonl" in (tmp_path / "pool.work" / "rejects.jsonl").read_text()
    summary, _ = build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), BuildOptions(), max_rejects=5)
    assert summary["samples"] == 5


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    raw(tmp_path / "raw")
    summary, _ = build_pool([tmp_path / "raw", tmp_path / "raw" / "*.zst"], tmp_path / "pool", tiny_tokenizer(), BuildOptions())
    assert (summary["inputs"], summary["inputs_named_twice"], summary["samples"]) == (3, 1, 201)


def test_fields_and_domains_beside_the_documents(tmp_path: Path) -> None:
    lone = {"text": "a cat", "url": "https://www.b.org/1", "metadata": {"note": "\ud800"}, "quality": {"score": 0.5}}
    write_raw(tmp_path / "raw" / "a.jsonl", [*documents(3), lone])
    options = BuildOptions(kind_field="url.domain", metadata_fields=("url.domain", "quality.score", "metadata.note"))
    build_pool([tmp_path / "raw"], tmp_path / "pool", tiny_tokenizer(), options)
    index = PoolIndex.open(tmp_path / "pool")
    assert index.kinds == ["x", "b.org"]
    (shard,) = index.shard_names
    found = {source["documents"][0]["line"]: source for source in read_sources(index, shard)}
    assert found[1]["kind"] == "x" and found[1]["documents"][0]["fields"] == {"url.domain": "x"}
    assert found[4]["kind"] == "b.org"
    assert found[4]["documents"][0]["fields"] == {"url.domain": "b.org", "quality.score": "0.5", "metadata.note": "?"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack": 1}, "at least 2 tokens, not 1; change --pack"),
        ({"samples_per_shard": 0}, "at least 1 sample, not 0; change --samples-per-shard"),
        ({"cell_bytes": 0}, "at least 1 byte, not 0; change --cell-bytes"),
        ({"fasttext_threshold": 0.5}, "need --fasttext-model"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuildOptions(**options)


def test_too_many_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index cannot number them all: the rarest share a name. The sources still have their own."""
    monkeypatch.setattr(merge_module, "MAX_KINDS", 2)
    build_pool([raw(tmp_path / "raw")], tmp_path / "pool", tiny_tokenizer(), BuildOptions())
    index = PoolIndex.open(tmp_path / "pool")
    assert index.kinds == ["web", "(other)"]
    assert np.bincount(index.kind_of + 1).tolist() == [1, 120, 80]
    kinds = {source["kind"] for name in index.shard_names for source in read_sources(index, name)}
    assert kinds == {"web", "book", "essay", None}
