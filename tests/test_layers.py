"""The shape of the code: rooms import downwards only, config is pure, functions and files stay readable."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_groupmates"
ROOMS = (
    "config",
    "utils",
    "parallel",
    "pool",
    "model",
    "checkpoint",
    "influence",
    "selection",
    "training",
    "server",
    "report",
    "integrations",
    "cli",
)
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500
TOP_LEVEL = {"README.md", "requirements.txt", PACKAGE, "examples", "tools", "tests", "patches", "LICENSE", "pyproject.toml"}
# What a pure room may import, and calls that would touch a file system.
PURE_IMPORTS = {"__future__", "collections", "dataclasses", "difflib", "math", "pathlib", "types", "typing", "yaml"}
FILE_CALLS = {
    "open",
    "exists",
    "is_file",
    "is_dir",
    "iterdir",
    "glob",
    "rglob",
    "stat",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "mkdir",
    "unlink",
    "touch",
    "rename",
    "resolve",
    "absolute",
    "expanduser",
    "cwd",
    "home",
}


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in ``tree``, functions included; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def attribute_path(node: ast.Attribute) -> str:
    """``torch.distributed`` for that expression, '' for one that does not begin with a name."""
    parts = [node.attr]
    inner: ast.expr = node.value
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return ".".join([inner.id, *reversed(parts)]) if isinstance(inner, ast.Name) else ""


def called_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute):
                yield node.func.attr


def faults(source: str, room: str) -> list[str]:
    """What a module of ``room`` imports or calls that it must not."""
    tree = ast.parse(source)
    found = []
    for name in imported_modules(tree):
        if name.startswith("."):
            found.append(f"{name}: relative import")
        parts = name.split(".")
        if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in ROOMS:
            if ROOMS.index(parts[1]) > ROOMS.index(room):
                found.append(f"{name}: {room} is below {parts[1]}")
            if room == "selection" and parts[1] == "influence" and not is_within(name, f"{PACKAGE}.influence.relation"):
                found.append(f"{name}: selection may import influence.relation only")
        elif room == "config" and parts[0] != PACKAGE and parts[0] not in PURE_IMPORTS:
            found.append(f"{name}: config is pure")
        if room == "pool" and is_within(name, "torch.distributed"):
            found.append(f"{name}: pool knows nothing of processes")
    if room == "pool":
        paths = {attribute_path(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        found += [f"{path}: pool knows nothing of processes" for path in sorted(paths) if is_within(path, "torch.distributed")]
    if room == "config":
        found += [f"{name}(): config is pure" for name in called_names(tree) if name in FILE_CALLS]
    if room != "cli" and "print" in called_names(tree):
        found.append("print(): only the command line prints")
    return found


def room_of(path: Path) -> str | None:
    """The room a module lies in; None for the package's own two modules."""
    parts = path.relative_to(ROOT / PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in SOURCES if room_of(path)], ids=relative)
def test_rooms_import_downwards(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, "a room that is not in the order of rooms"
    assert faults(path.read_text(), room) == []


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        ("pool", "import megatron_groupmates.model.gpt", "pool is below model"),
        ("pool", "from megatron_groupmates.model import gpt", "pool is below model"),
        ("pool", "from megatron_groupmates import model", "pool is below model"),
        ("training", "def f():\n    from megatron_groupmates.server.watch import serve", "training is below server"),
        (
            "model",
            "class A:\n    def f(self):\n        if x:\n            import megatron_groupmates.checkpoint as c",
            "model is below checkpoint",
        ),
        (
            "utils",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_groupmates.pool import log",
            "utils is below pool",
        ),
        ("utils", "from ..pool import log", "relative import"),
        ("selection", "from megatron_groupmates.influence.fit import fit", "influence.relation only"),
        ("selection", "from megatron_groupmates.influence.relational import relational_scores", "influence.relation only"),
        ("selection", "from megatron_groupmates.influence import fit", "influence.relation only"),
        ("config", "import torch", "config is pure"),
        ("config", "def f():\n    import os", "config is pure"),
        ("config", "from pathlib import Path\nPath('x').read_text()", "read_text(): config is pure"),
        ("config", "open('x')", "open(): config is pure"),
        ("pool", "import torch.distributed as dist", "nothing of processes"),
        ("pool", "from torch import distributed", "nothing of processes"),
        ("pool", "import torch\ntorch.distributed.get_rank()", "nothing of processes"),
        ("server", "print('x')", "only the command line prints"),
    ],
)
def test_the_check_finds_what_it_is_for(room: str, source: str, fault: str) -> None:
    assert fault in " ".join(faults(source, room))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("server", "from megatron_groupmates.training.data import open_pool\nfrom megatron_groupmates import __version__"),
        ("selection", "from megatron_groupmates.influence.relation import ProductRelation"),
        ("selection", "from megatron_groupmates.influence import relation"),
        ("pool", "import torch\ntorch.utils.data.Dataset\nfrom megatron_groupmates.pool import log"),
        ("config", "from pathlib import Path\nfrom megatron_groupmates.config.errors import UserError\nPath('a') / 'b'"),
        ("cli", "print('x')"),
    ],
)
def test_the_check_lets_through_what_is_allowed(room: str, source: str) -> None:
    assert faults(source, room) == []


@pytest.mark.parametrize("path", SOURCES + TOOLS + TESTS, ids=relative)
def test_modules_say_what_they_are_and_stay_short(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "no docstring"
    assert len(source.splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_names_are_explained(path: Path) -> None:
    """Functions and classes at the top of a module and public methods of public classes."""
    bare = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        methods = [item for item in inner if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")]
        bare += [item.name for item in (node, *methods) if not ast.get_docstring(item)]
    assert bare == []


def test_the_top_level_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the project's own files")
    entries = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert PACKAGE in entries
    assert {entry for entry in entries if not entry.startswith(".")} - TOP_LEVEL == set()


def modules_after(statement: str) -> set[str]:
    """Names of all modules that a fresh process holds after ``statement``."""
    script = f"{statement}\nimport json, sys\nprint('modules:' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("modules:")]
    return set(json.loads(line.removeprefix("modules:")))


def test_training_without_selection_imports_no_selection_code() -> None:
    loaded = modules_after(f"import {PACKAGE}.training.loop")
    assert f"{PACKAGE}.training.live_order" in loaded
    for forbidden in ("selection", "influence", "server", "report", "training.adoption"):
        assert [name for name in loaded if is_within(name, f"{PACKAGE}.{forbidden}")] == []


def test_reading_a_config_needs_no_torch() -> None:
    loaded = modules_after(f"import {PACKAGE}.config")
    assert f"{PACKAGE}.config.load" in loaded
    assert {"torch", "numpy", "deepspeed", "megatron"} & loaded == set()
