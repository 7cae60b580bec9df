"""Gathering documents: extraction, separation of the three sets, and a whole run on a small made-up machine."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import gather_documents as gather

WORDS = "data selection model influence oracle rollout relation group sample training weights cluster budget".split()


def prose(seed: str, num_words: int = 90) -> str:
    """Deterministic text, different for each seed, in lines of ten words."""
    digest = hashlib.shake_128(seed.encode()).digest(num_words)
    words = [f"{WORDS[byte % len(WORDS)]}{byte}" for byte in digest]
    return "\n".join(" ".join(words[start : start + 10]) for start in range(0, num_words, 10))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made-up packages that is all this machine has."""
    root = tmp_path / "machine"
    for number in range(40):
        package = root / f"package{number % 5}"
        package.mkdir(parents=True, exist_ok=True)
        docstring, value = prose(f"d{number}"), prose(f"v{number}")
        (package / f"module{number}.py").write_text(f'"""{docstring}"""\n\nVALUE = """{value}"""\n')
        (package / f"header{number}.h").write_text(prose(f"h{number}"))
    for number in range(5):
        (root / f"package{number}" / "LICENSE").write_text(prose("the same licence"))
        (root / f"package{number}" / "NOTICE").write_text(prose(f"notice {number}"))
    monkeypatch.setattr(gather, "search_roots", lambda extra: [str(root)])
    return root


def read(path: Path) -> list[dict]:
    """Records of a ``.jsonl.zst`` file."""
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(output: Path, *arguments: str) -> int:
    """The tool with sizes that suit the made-up machine."""
    return gather.main(["--output", str(output), "--max-bytes", "30K", "--reference-bytes", "3K", "--evaluation-bytes", "3K", *arguments])


# ---- Extraction ----


def test_docstrings_come_with_their_names_and_without_the_code() -> None:
    source = (
        '"""Top."""\nimport os\nclass A:\n    """Class."""\n'
        '    def f(self):\n        """Method\n        text."""\n'
        'async def g():\n    """Function."""\ndef silent(): return "code"\n'
    )
    assert gather.docstring_text(source) == "Top.\n\n\nA\n\nClass.\n\n\nA.f\n\nMethod\ntext.\n\n\ng\n\nFunction."


@pytest.mark.parametrize("source", ["x = 1\n", 'broken = """\n', "def f(:\n '''no'''", 'x = """a\0b"""'])
def test_modules_without_docstrings_or_with_errors_give_nothing(source: str) -> None:
    assert gather.docstring_text(source) == ""


def test_sources_lose_their_docstrings_and_keep_their_code() -> None:
    source = '"""Module\ntext."""\nx = """kept"""\ndef f():\n    r\'\'\'Gone.\'\'\'\n    return x  # comment\n'
    assert gather.source_text(source) == 'x = """kept"""\ndef f():\n    return x  # comment\n'


def test_man_pages_lose_their_markup() -> None:
    page = '.\\" comment\n.TH LS 1\n.SH NAME\nls \\- list \\fIfiles\\fR\n.TP\n.B \\-a\nshow \\(bu all\\&.\n.IP "two words" 4\n'
    assert gather.man_text(page) == "NAME\nls - list files\n\n-a\nshow * all.\ntwo words 4"


def test_web_pages_lose_tags_scripts_and_entities() -> None:
    assert gather.html_text("<p>a &lt; b</p>\n<script>x()</script>\n\n\n<b>c</b>") == "a < b\n\nc"


def test_topics_of_the_language_reference_are_separate_documents() -> None:
    assert list(gather.topic_texts("x = 1\ntopics = {'b': 'B', 'a': 'A'}\n")) == [("a", "A"), ("b", "B")]


def test_the_long_description_follows_the_headers() -> None:
    assert gather.description_text("Name: x\nVersion: 1\n\n# Title\n\nText") == "# Title\n\nText"


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("/lib/pkg/mod.py", ("docstring", "python_source")),
        ("/lib/pkg/tests/helper.py", ("python_test",)),
        ("/lib/pkg/test_mod.py", ("python_test",)),
        ("/lib/pydoc_data/topics.py", ("python_topic",)),
        ("/lib/pkg-1.0.dist-info/RECORD", ("file_list",)),
        ("/lib/pkg-1.0.dist-info/METADATA", ("package_description",)),
        ("/lib/pkg-1.0.dist-info/licenses/Apache.txt", ("licence",)),
        ("/lib/pkg/LICENSE.txt", ("licence",)),
        ("/usr/share/doc/pkg/copyright", ("licence",)),
        ("/usr/share/doc/pkg/changelog.Debian.gz", ("changelog",)),
        ("/usr/share/doc/pkg/guide.html", ("system_doc",)),
        ("/usr/share/man/man1/ls.1.gz", ("man_page",)),
        ("/usr/share/man/de/man1/ls.1.gz", ()),
        ("/usr/share/man/index.db", ()),
        ("/lib/pkg/tests/data/x.txt", ("data_table",)),
        ("/lib/pkg/x.txt", ("package_readme",)),
        ("/lib/pkg/x.pyi", ("type_stub",)),
        ("/lib/pkg/x.json", ("config",)),
        ("/lib/pkg/x.so", ()),
        ("/lib/pkg/x.png", ()),
    ],
)
def test_the_kind_follows_from_the_path(path: str, kinds: tuple[str, ...]) -> None:
    assert gather.kinds_of(path) == kinds


def test_packages_are_named_without_versions() -> None:
    assert gather.package_of("/lib/numpy-2.4.6.dist-info/METADATA", "/lib") == "numpy"
    assert gather.package_of("/lib/numpy/core/x.py", "/lib") == "numpy"
    assert gather.package_of("/lib/six.py", "/lib/") == "six"


def test_long_documents_are_cut_at_a_line_end_and_short_ones_left_out(tmp_path: Path) -> None:
    line = "x" * 99 + "\n"
    (tmp_path / "long.h").write_text(line * 300)
    (tmp_path / "one_line.h").write_text("y" * 30_000)
    (tmp_path / "short.h").write_text("z" * 299)
    (long,) = gather.documents_of(str(tmp_path / "long.h"), str(tmp_path), "c_header")
    assert long.text == (line * 200).strip() and long.url == f"file://{tmp_path}/long.h" and long.package == "long.h"
    (one_line,) = gather.documents_of(str(tmp_path / "one_line.h"), str(tmp_path), "c_header")
    assert len(one_line.text) == gather.MAX_CHARS
    assert list(gather.documents_of(str(tmp_path / "short.h"), str(tmp_path), "c_header")) == []


def test_unreadable_files_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe" * 500)
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"text" * 500)[:20])
    (tmp_path / "not.gz").write_bytes(b"text" * 500)
    (tmp_path / "large.txt").write_bytes(b"x" * (gather.MAX_FILE_BYTES + 1))
    for name in ("binary.txt", "torn.gz", "not.gz", "large.txt", "missing.txt"):
        assert gather.read_text(tmp_path / name) == ""
    (tmp_path / "fine.gz").write_bytes(gzip.compress(b"text"))
    assert gather.read_text(tmp_path / "fine.gz") == "text"


# ---- Separation ----


def test_a_text_is_taken_once_whatever_its_spacing_and_case() -> None:
    separator = gather.Separator()
    assert separator.accept("Some text\nof one document")
    assert not separator.accept("some  TEXT of one\n\ndocument ")
    assert separator.accept("Some other text of one document")


def test_a_document_that_mostly_repeats_a_held_out_one_is_refused() -> None:
    first, second, third = (prose(name) for name in "abc")
    separator = gather.Separator()
    held_out = gather.Document(text=f"{first}\n\n{second}", url="", kind="k", package="p")
    assert separator.accept(held_out.text)
    assert separator.accept(f"{first}\n\n{second}\n\nshort end"), "nothing is held out yet"
    separator.hold_out([held_out])
    assert not separator.accept(f"  {first}\n\n{second.upper()}\n\nanother short end")
    assert separator.accept(f"{first}\n\n{third}\n\n{prose('d')}")


def documents(kind: str, sizes: list[int]) -> Iterator[gather.Document]:
    """Documents of the given lengths, no two alike."""
    for number, size in enumerate(sizes):
        yield gather.Document(text=f"{kind}{number}".ljust(size, "x"), url="", kind=kind, package="p")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcde"), st.lists(st.integers(20, 60), min_size=1, max_size=40), min_size=1), st.integers(1, 3000))
def test_kinds_get_equal_bytes_as_far_as_they_go(sizes: dict[str, list[int]], budget: int) -> None:
    streams = {kind: documents(kind, lengths) for kind, lengths in sizes.items()}
    filled = gather.fill_evenly(streams, budget, gather.Separator())
    used = {kind: sum(document.num_bytes for document in filled.get(kind, [])) for kind in sizes}
    available = {kind: sum(lengths) for kind, lengths in sizes.items()}
    assert sum(used.values()) >= min(budget, sum(available.values()))
    assert sum(used.values()) < budget + 60 * len(sizes)
    unfinished = [kind for kind in sizes if used[kind] < available[kind]]
    if unfinished:  # a kind that had more got as much as any other, to within a document
        assert max(used.values()) < min(used[kind] for kind in unfinished) + 2 * 60


# ---- The whole tool ----


def test_the_three_sets_have_no_text_in_common(machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "raw") == 0
    reference = read(tmp_path / "raw/reference/reference.jsonl.zst")
    evaluation = read(tmp_path / "raw/evaluation/evaluation.jsonl.zst")
    pool = [record for path in sorted((tmp_path / "raw/pool").iterdir()) for record in read(path)]
    texts = [gather.normalised(record["text"]) for record in (*reference, *evaluation, *pool)]
    assert len(set(texts)) == len(texts)
    assert {record["metadata"]["kind"] for record in (*reference, *evaluation)} == {"docstring"}
    assert {path.name for path in (tmp_path / "raw/pool").iterdir()} == {
        f"{kind}.jsonl.zst" for kind in ("docstring", "python_source", "c_header", "licence")
    }
    assert sum(prose("the same licence") in record["text"] for record in pool) == 1
    assert all(set(record) == {"text", "url", "metadata"} and record["url"].startswith("file:///") for record in pool)
    docstring_bytes = sum(len(record["text"]) for record in pool if record["metadata"]["kind"] == "docstring")
    assert 0.08 * 30_000 <= docstring_bytes < 0.08 * 30_000 + 1500
    assert "docstring" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["reference", "evaluation"])
def test_copies_of_a_held_out_document_stay_out_of_every_kind(machine: Path, tmp_path: Path, name: str) -> None:
    assert run(tmp_path / "first", "--max-bytes", "1M") == 0
    held_out = read(tmp_path / f"first/{name}/{name}.jsonl.zst")[0]["text"]
    (machine / "package0" / "copy.h").write_text(held_out.upper())
    (machine / "package0" / "near_copy.h").write_text(f"{held_out}\n\nand a little more")
    (machine / "package0" / "other.h").write_text(f"{prose('other')}\n\nand a little more")
    assert run(tmp_path / "second", "--max-bytes", "1M") == 0
    assert read(tmp_path / f"second/{name}/{name}.jsonl.zst")[0]["text"] == held_out
    headers = {Path(record["url"]).name for record in read(tmp_path / "second/pool/c_header.jsonl.zst")}
    assert headers == {*(f"header{number}.h" for number in range(40)), "other.h"}


def test_the_same_machine_and_seed_give_the_same_bytes(machine: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(tmp_path / name, "--seed", seed) == 0
    reference = {name: (tmp_path / name / "reference/reference.jsonl.zst").read_bytes() for name in "abc"}
    assert reference["a"] == reference["b"] != reference["c"]
    for path in (tmp_path / "a/pool").iterdir():
        assert path.read_bytes() == (tmp_path / "b/pool" / path.name).read_bytes()


def test_a_second_start_does_nothing_and_says_so(machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    assert run(tmp_path / "raw") == 0
    before = (tmp_path / "raw/gather.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(tmp_path / "raw") == 0
    assert capsys.readouterr().out == f"{tmp_path}/raw is complete already, nothing to do\n"
    assert (tmp_path / "raw/gather.json").stat().st_mtime_ns == before


def test_other_arguments_or_other_content_are_refused(machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "raw") == 0
    assert run(tmp_path / "raw", "--seed", "7") == 1
    assert "gathered with other arguments (seed: 1234 there, 7 asked for)" in capsys.readouterr().err
    assert run(machine) == 1
    assert "exists and was not written by this tool" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-kind", "poem"), "--target-kind poem: no such documents here; kinds found: c_header, docstring"),
        (("--target-kind", "licence"), "bytes of licence text are left; lower it, choose another --target-kind"),
        (("--reference-bytes", "10M"), "--reference-bytes 10000000: only"),
        (("--root", "/nowhere"), "--root /nowhere is not a folder"),
    ],
)
def test_impossible_requests_say_why(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(tmp_path / "raw", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "raw").exists()


def test_nothing_left_for_the_pool_is_said(machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [len(gather.docstring_text(path.read_text())) for path in machine.rglob("*.py")]
    half = str(sum(sizes) // 2 - 500)
    assert gather.main(["--output", str(tmp_path / "raw"), "--reference-bytes", half, "--evaluation-bytes", half]) == 1
    assert "no docstring text is left for the pool" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gather, "write_json", full)
    assert run(tmp_path / "raw") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]


def test_sizes_are_read_with_units() -> None:
    assert [gather.byte_count(text) for text in ("24M", "500k", "1.5MB", "12")] == [24_000_000, 500_000, 1_500_000, 12]
    for text in ("", "0", "M", "12 apples", "-3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of bytes such as 24M"):
            gather.byte_count(text)


def test_this_machine_has_many_kinds() -> None:
    roots = gather.search_roots([])
    assert roots == sorted(set(roots)) and all(Path(root).is_dir() for root in roots)
    files = gather.list_files(roots)
    assert len(files) >= 10 and {"docstring", "python_source", "licence", "package_description"} <= set(files)
    assert next(gather.sampled_documents(files["docstring"], "docstring", 1)).kind == "docstring"


def test_lines_are_utf8_json() -> None:
    document = gather.Document(text="caf\u00e9\n", url="file:///x", kind="k", package="p")
    assert document.num_bytes == 6
    (line,) = io.BytesIO(document.line()).readlines()
    assert json.loads(line) == {"text": "caf\u00e9\n", "url": "file:///x", "metadata": {"kind": "k", "package": "p"}}
