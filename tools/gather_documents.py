#!/usr/bin/env python
"""Gather documentation text already on this machine and write it as a raw data set in DCLM's form.

    python tools/gather_documents.py --output RAW

writes ``RAW/pool/<kind>.jsonl.zst``, ``RAW/reference/reference.jsonl.zst``, ``RAW/evaluation/evaluation.jsonl.zst``
and ``RAW/gather.json`` (arguments and counts). Each line holds ``text``, ``url`` and ``metadata`` (kind, package).
The pool is heterogeneous and full of natural near-duplicates, as web pools are; reference and evaluation documents
are of one kind, and no text of theirs, nor a near copy of one, occurs in another set. Texts under 300 characters are
left out, those over 20,000 are cut at the last line end before that.

Nothing is downloaded: the Python installation and its packages suffice, man pages and ``/usr/share/doc`` are used
where they exist. With the same files, arguments and seed the output is the same.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html
import itertools
import json
import os
import re
import site
import sys
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import atomic_directory, read_json, write_json
from megatron_groupmates.utils.progress import progress_bar

MIN_CHARS = 300
MAX_CHARS = 20_000
MAX_FILE_BYTES = 1_000_000
POOL_TARGET_SHARE = 0.08  # of the pool: scarce enough that random selection mostly misses it
NEAR_COPY_SHARE = 0.5
SYSTEM_ROOTS = ("/usr/share/man", "/usr/share/doc", "/usr/share/perl", "/usr/share/perl5", "/usr/share/vim")
PRUNED = {"__pycache__", "site-packages", "dist-packages", "node_modules", ".git"}


@dataclass(frozen=True, kw_only=True)
class Document:
    """One raw document: its text, where it came from, its kind and the package it belongs to."""

    text: str
    url: str
    kind: str
    package: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())

    def line(self) -> bytes:
        """The document as one line of DCLM's raw format."""
        record = {"text": self.text, "url": self.url, "metadata": {"kind": self.kind, "package": self.package}}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"


# ---- From a file to texts: one extractor per way of reading ----


def read_text(path: Path) -> str:
    """Text of a plain or gzipped file; empty where it is unreadable, binary or too large."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return ""
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)[:MAX_FILE_BYTES]
        return content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""


def docstring_text(source: str) -> str:
    """The docstrings of a module, each under its name within the module; empty if there are none or it does not parse.

    Names leave the module's own path out, so that a vendored copy of a module gives exactly the same text.
    """
    if '"""' not in source and "'''" not in source:
        return ""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    parts = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        docstring = ast.get_docstring(node)
        if docstring:
            parts.append(f"{name}\n\n{docstring}" if name else docstring)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}" if name else child.name)

    visit(module, "")
    return "\n\n\n".join(parts)


_BLOCK_STRING = re.compile(r"^[ \t]*[rRuU]?(\"\"\"|''').*?\1[ \t]*\n", re.DOTALL | re.MULTILINE)
_MAN_MACRO = re.compile(r"^[.'](\w*)[ \t]*(.*)$")
_MAN_HIDDEN = {"TH", "ds", "de", "if", "ie", "el", "nr", "ft", "so", "nh", "ad", "hy", "in", "rm", "tr"}
_MAN_FONT = re.compile(r"\\f(?:\w|\(..|\[\w*\])|\\[&/,|^%]|\\s[+-]?\d+|\\\*\(..")
_MAN_SPECIAL = {
    r"\-": "-",
    r"\(bu": "*",
    r"\(aq": "'",
    r"\(em": "--",
    r"\(en": "-",
    r"\(lq": '"',
    r"\(rq": '"',
    r"\(co": "(c)",
    r"\e": "\\",
    r"\ ": " ",
    r"\~": " ",
    r"\(dq": '"',
    r"\(cq": "'",
    r"\(oq": "'",
}
_MAN_CHARACTER = re.compile("|".join(re.escape(name) for name in _MAN_SPECIAL))


def source_text(source: str) -> str:
    """Python source without its block strings, so that it does not repeat the documents of kind ``docstring``."""
    return _BLOCK_STRING.sub("", source)


def man_text(source: str) -> str:
    """A man page without its troff markup (man and mdoc macros become plain lines)."""
    lines = []
    for line in source.split("\n"):
        if line.startswith(('.\\"', "'\\\"")):
            continue
        macro = _MAN_MACRO.match(line)
        if macro:
            name, rest = macro.groups()
            if name in _MAN_HIDDEN:
                continue
            line = ("\n" if name in {"SH", "SS", "PP", "TP", "Sh", "Ss", "Pp"} else "") + rest.replace('"', "")
        line = _MAN_CHARACTER.sub(lambda match: _MAN_SPECIAL[match.group()], _MAN_FONT.sub("", line))
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def html_text(source: str) -> str:
    """A web page without tags, scripts and styles."""
    source = re.sub(r"<(script|style)\b.*?</\1>", "", source, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", source))).strip()


def description_text(metadata: str) -> str:
    """The long description of a package: what follows the headers of its METADATA."""
    return metadata.partition("\n\n")[2]


def topic_texts(source: str) -> Iterator[tuple[str, str]]:
    """Topics of the Python language reference in ``pydoc_data/topics.py``: name, text."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())


# ---- From a path to kinds ----

_SUFFIX_KINDS = {
    "type_stub": ".pyi",
    "c_header": ".h .hpp .hh .cuh .inl",
    "native_source": ".c .cc .cpp .cxx .cu .pyx .pxd .f .f90",
    "data_table": ".csv .tsv .dat .afm .arff .tab .decTest .sav",
    "config": ".json .yaml .yml .toml .cfg .ini .cmake .proto",
    "web": ".html .htm .css .js .ts .jinja .tpl .xml .xsl .svg",
    "script": ".sh .pl .pm .awk .vim .lua .tcl .zsh .fish .bat .ps1",
    "package_readme": ".md .rst",
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _SUFFIX_KINDS.items() for suffix in suffixes.split()}
_LICENCE = re.compile(r"(licen[cs]e|copying|copyright|notice|patents)", re.IGNORECASE)
_CHANGELOG = re.compile(r"(changelog|changes|news|history|release|whatsnew)", re.IGNORECASE)
_TEST = re.compile(r"/(tests?|_test)/|/(test_[^/]*|[^/]*_test)\.py$")


def kinds_of(path: str) -> tuple[str, ...]:
    """Kinds of document that the file at ``path`` may give, by its path alone; a module gives code and docstrings."""
    name = path.rsplit("/", 1)[-1]
    stem = name.removesuffix(".gz")
    suffix = os.path.splitext(stem)[1]
    if suffix == ".py":
        if path.endswith("/pydoc_data/topics.py"):
            return ("python_topic",)
        return ("python_test",) if _TEST.search(path) else ("docstring", "python_source")
    if name == "RECORD" and ".dist-info/" in path:
        return ("file_list",)
    if name in {"METADATA", "PKG-INFO"}:
        return ("package_description",)
    if "/man/" in path:
        return ("man_page",) if re.search(r"/man/man\d/", path) else ()
    if suffix in {"", ".txt", ".md", ".rst", ".html", ".htm", ".Debian", ".APACHE", ".MIT", ".BSD"}:
        if _LICENCE.match(stem) or "/licenses/" in path:
            return ("licence",)
        if _CHANGELOG.match(stem):
            return ("changelog",)
        if "/doc/" in path or "/share/vim/" in path:
            return ("system_doc",)
    if suffix == ".txt":
        return ("data_table",) if "/data/" in path or _TEST.search(path) else ("package_readme",)
    kind = _KIND_OF_SUFFIX.get(suffix)
    return (kind,) if kind else ()


def package_of(path: str, root: str) -> str:
    """Name of the package or system document folder that holds ``path``: its first component below ``root``."""
    first = path[len(root) :].strip("/").split("/")[0]
    return re.sub(r"(-[\w.+!]+)?\.(dist-info|libs)$|\.py$", "", first)


_EXTRACTORS: dict[str, Callable[[str], str]] = {
    "docstring": docstring_text,
    "python_source": source_text,
    "python_test": source_text,
    "man_page": man_text,
    "package_description": description_text,
}


def documents_of(path: str, root: str, kind: str) -> Iterator[Document]:
    """Documents of one kind in one file: cut at the last line end before ``MAX_CHARS``; short ones are left out."""
    source = read_text(Path(path))
    if not source:
        return
    if kind == "python_topic":
        texts = [(f"#{name}", text) for name, text in topic_texts(source)]
    elif kind == "system_doc" and re.search(r"\.html?(\.gz)?$", path):
        texts = [("", html_text(source))]
    else:
        texts = [("", _EXTRACTORS.get(kind, str)(source))]
    for fragment, text in texts:
        if len(text) > MAX_CHARS:
            text = text[: text.rfind("\n", MIN_CHARS, MAX_CHARS) + 1 or MAX_CHARS]
        text = text.strip()
        if len(text) >= MIN_CHARS and "\0" not in text:
            yield Document(text=text, url=f"{Path(path).as_uri()}{fragment}", kind=kind, package=package_of(path, root))


def search_roots(extra: Iterable[Path]) -> list[str]:
    """Folders to search, each once: the standard library, installed packages, system documentation, ``extra``."""
    paths = sysconfig.get_paths()
    installed = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    names = [*installed, *SYSTEM_ROOTS, *map(str, extra)]
    return sorted({os.path.realpath(name) for name in names if os.path.isdir(name)})


def list_files(roots: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """``(path, root)`` of every candidate file, by kind. Links are not followed; no file is listed twice."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    listed: set[str] = set()
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in PRUNED)
            for name in sorted(names):
                path = os.path.join(folder, name)
                if path not in listed and not os.path.islink(path):
                    listed.add(path)
                    for kind in kinds_of(path):
                        found[kind].append((path, root))
    return dict(sorted(found.items()))


def sampled_documents(files: list[tuple[str, str]], kind: str, seed: int) -> Iterator[Document]:
    """Documents of one kind in an order that depends on the seed and the files' paths below their roots only."""

    def rank(file: tuple[str, str]) -> bytes:
        path, root = file
        return hashlib.blake2b(f"{seed}:{kind}:{path[len(root) :]}".encode(), digest_size=16).digest()

    for path, root in sorted(files, key=rank):
        yield from documents_of(path, root, kind)


# ---- From documents to three disjoint sets ----


def normalised(text: str) -> str:
    """Lower case, every run of white space one space: the form in which texts are compared."""
    return " ".join(text.lower().split())


@dataclass
class Separator:
    """Keeps the three sets apart: refuses texts already taken, and near copies of held-out documents."""

    taken: set[int] = field(default_factory=set)
    held_out: set[int] = field(default_factory=set)

    @staticmethod
    def _digest(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())

    @classmethod
    def _paragraphs(cls, text: str) -> list[tuple[int, int]]:
        """Digest and length of each paragraph long enough to tell documents apart."""
        paragraphs = (normalised(part) for part in re.split(r"\n\s*\n", text))
        return [(cls._digest(part), len(part)) for part in paragraphs if len(part) >= 60]

    def accept(self, text: str) -> bool:
        """Take ``text``, unless it was taken before or most of it stands in a held-out document."""
        digest = self._digest(normalised(text))
        if digest in self.taken:
            return False
        paragraphs = self._paragraphs(text)
        copied = sum(length for paragraph, length in paragraphs if paragraph in self.held_out)
        if copied > NEAR_COPY_SHARE * sum(length for _, length in paragraphs):
            return False
        self.taken.add(digest)
        return True

    def hold_out(self, documents: Iterable[Document]) -> None:
        """From now on refuse near copies of ``documents`` as well."""
        for document in documents:
            self.held_out.update(paragraph for paragraph, _ in self._paragraphs(document.text))


def take(stream: Iterator[Document], num_bytes: float, separator: Separator) -> list[Document]:
    """Accepted documents from ``stream`` until they reach ``num_bytes`` (fewer where it ends first)."""
    taken: list[Document] = []
    total = 0
    while total < num_bytes and (document := next(stream, None)) is not None:
        if separator.accept(document.text):
            taken.append(document)
            total += document.num_bytes
    return taken


def fill_evenly(streams: dict[str, Iterator[Document]], num_bytes: int, separator: Separator) -> dict[str, list[Document]]:
    """About ``num_bytes`` of documents, equal bytes of each kind; what a small kind lacks is shared by the others."""
    filled: dict[str, list[Document]] = {kind: [] for kind in streams}
    used = dict.fromkeys(streams, 0)
    unfinished = set(streams)
    with progress_bar(num_bytes, "gather", unit="B", unit_scale=True) as bar:
        while unfinished and (missing := num_bytes - sum(used.values())) > 0:
            level = max(used[kind] for kind in unfinished) + missing / len(unfinished)
            for kind in sorted(unfinished):
                documents = take(streams[kind], level - used[kind], separator)
                size = sum(document.num_bytes for document in documents)
                filled[kind] += documents
                used[kind] += size
                bar.update(size)
                if used[kind] < level:
                    unfinished.remove(kind)
    return {kind: documents for kind, documents in filled.items() if documents}


def gather(arguments: argparse.Namespace) -> dict[str, dict[str, list[Document]]]:
    """The three sets, ``{"pool" | "reference" | "evaluation": {kind: documents}}``.

    Raises:
        UserError: the target kind is unknown here or has too little text for the held-out sets and the pool.
    """
    files = list_files(search_roots(arguments.root))
    target = arguments.target_kind
    if target not in files:
        raise UserError(f"--target-kind {target}: no such documents here; kinds found: {', '.join(files)}")
    streams = {kind: sampled_documents(paths, kind, arguments.seed) for kind, paths in files.items()}
    separator = Separator()
    held_out = {}
    for name, num_bytes in (("reference", arguments.reference_bytes), ("evaluation", arguments.evaluation_bytes)):
        held_out[name] = take(streams[target], num_bytes, separator)
        separator.hold_out(held_out[name])
        found = sum(document.num_bytes for document in held_out[name])
        if found < num_bytes:
            raise UserError(
                f"--{name}-bytes {num_bytes}: only {found} bytes of {target} text are left; lower it, "
                "choose another --target-kind or add a folder with --root"
            )
    target_documents = take(streams.pop(target), POOL_TARGET_SHARE * arguments.max_bytes, separator)
    if not target_documents:
        raise UserError(f"no {target} text is left for the pool; lower --reference-bytes and --evaluation-bytes")
    pool = {target: target_documents}
    used = sum(document.num_bytes for document in target_documents)
    pool |= fill_evenly(streams, arguments.max_bytes - used, separator)
    return {"pool": pool, **{name: {target: documents} for name, documents in held_out.items()}}


# ---- Output ----


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write one ``.jsonl.zst`` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as writer:
        for document in documents:
            writer.write(document.line())


def write_sets(output: Path, sets: dict[str, dict[str, list[Document]]], settings: dict[str, Any]) -> list[list[Any]]:
    """Write the raw data set to ``output``, complete or not at all; returns the rows of the summary."""
    rows = []
    with atomic_directory(output) as directory:
        for name, kinds in sets.items():
            for kind, documents in sorted(kinds.items()):
                write_documents(directory / name / f"{kind if name == 'pool' else name}.jsonl.zst", documents)
                rows.append([name, kind, len(documents), sum(document.num_bytes for document in documents)])
        write_json(directory / "gather.json", {"settings": settings, "contents": rows})
    return rows


def print_summary(rows: list[list[Any]]) -> None:
    """Print documents and bytes of each set and kind."""
    print(f"{'set':<12}{'kind':<22}{'documents':>10}{'MB':>9}")
    for name, group in itertools.groupby(rows, key=lambda row: row[0]):
        group_rows = list(group)
        for _, kind, count, num_bytes in group_rows:
            print(f"{name:<12}{kind:<22}{count:>10}{num_bytes / 1e6:>9.2f}")
        if len(group_rows) > 1:
            count, num_bytes = (sum(row[column] for row in group_rows) for column in (2, 3))
            print(f"{name:<12}{'all':<22}{count:>10}{num_bytes / 1e6:>9.2f}")


def already_done(output: Path, settings: dict[str, Any]) -> bool:
    """Whether ``output`` is complete with the same arguments; a UserError where it is something else."""
    if not output.exists():
        return False
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
        return False
    manifest = output / "gather.json"
    if not manifest.is_file():
        raise UserError(f"--output {output} exists and was not written by this tool; choose another folder")
    saved = read_json(manifest)["settings"]
    different = [f"{key}: {saved.get(key)} there, {value} asked for" for key, value in settings.items() if saved.get(key) != value]
    if different:
        raise UserError(f"--output {output} was gathered with other arguments ({'; '.join(different)}); choose another folder or remove it")
    return True


def byte_count(text: str) -> int:
    """``24M``, ``512K`` or plain digits as a number of bytes (powers of 1000)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 24M or 500K")
    return round(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write, must not exist yet")
    parser.add_argument(
        "--target-kind", default="docstring", help="kind of the reference and evaluation documents, 8%% of the pool (default: %(default)s)"
    )
    parser.add_argument("--max-bytes", type=byte_count, default="24M", help="text in the pool (default: %(default)s)")
    parser.add_argument("--reference-bytes", type=byte_count, default="500K", help="text in the reference set (default: %(default)s)")
    parser.add_argument("--evaluation-bytes", type=byte_count, default="500K", help="text in the evaluation set (default: %(default)s)")
    parser.add_argument("--root", type=Path, action="append", default=[], help="another folder to search; repeatable")
    parser.add_argument("--seed", type=int, default=1234, help="which files are sampled (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    arguments = parse_arguments(argv)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    settings["root"] = [str(root.resolve()) for root in arguments.root]
    try:
        for root in arguments.root:
            if not root.is_dir():
                raise UserError(f"--root {root} is not a folder")
        if already_done(arguments.output, settings):
            print(f"{arguments.output} is complete already, nothing to do")
            return 0
        print_summary(write_sets(arguments.output, gather(arguments), settings))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
