"""Where in a source file something is called: read from its syntax tree, nothing is imported."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: of what is called; the last part of a dotted name.
        function: innermost function that holds the call, with those and the classes around it (``A.b``); '' outside all.
        line: number of its first line, from 1.
    """

    name: str
    function: str
    line: int


def calls(source: str) -> list[Call]:
    """All calls in a module's source, those in the order of its lines.

    Raises:
        SyntaxError: the source is not Python.
    """
    return sorted(_calls(ast.parse(source), ""), key=lambda call: call.line)


def _calls(node: ast.AST, function: str) -> Iterator[Call]:
    for child in ast.iter_child_nodes(node):
        inner = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{function}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call):
            name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
            yield Call(name, function, child.lineno)
        yield from _calls(child, inner)


def calling_functions(source: str, name: str) -> list[str]:
    """Functions of a module that call ``name``, each once, in order."""
    return list(dict.fromkeys(call.function for call in calls(source) if call.name == name))


def mentions_us(source: str) -> bool:
    """Whether a file of a checkout has a hunk of ours."""
    return "megatron_groupmates" in source
