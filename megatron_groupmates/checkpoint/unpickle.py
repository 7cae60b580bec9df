"""A pickle reader that cannot run anything: for ``torch.save`` files of unknown origin.

The pickle's instructions are carried out here, one by one, on plain data. A name that the file mentions never becomes
the object of that name: it becomes a :class:`Name`, and what it may stand for is the closed list in
:mod:`megatron_groupmates.checkpoint.constructors`. No callable ever lies on the stack, so there is nothing to call.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.checkpoint.archive import PlainPickle, TorchArchive
from megatron_groupmates.checkpoint.constructors import (
    CONSTRUCTORS,
    VALUES,
    Name,
    Record,
    Refused,
    Storage,
    StorageType,
)
from megatron_groupmates.config.errors import UserError

# Protocol 2, which torch.save uses, writes some modules under their names in Python 2.
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_PUSH_ARGUMENT = frozenset(
    {
        "BININT",
        "BININT1",
        "BININT2",
        "INT",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    }
)
_PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_FROM_MARK: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": frozenset,
    "DICT": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(path: Path | str) -> Any:
    """The object in a ``torch.save`` file: containers, numbers, strings and tensors mapped from the file.

    Objects of the few classes that DeepSpeed and Megatron put into their checkpoints come as
    :class:`~megatron_groupmates.checkpoint.constructors.Record`.

    Raises:
        UserError: when the file is damaged, or mentions a name outside the closed list.
    """
    return read(TorchArchive(Path(path)), str(path))


def read(archive: TorchArchive | PlainPickle, where: str) -> Any:
    """As :func:`load`, of an archive that is open already; ``where`` names it in messages."""
    try:
        return _Interpreter(archive).run()
    except Refused as refusal:
        raise UserError(
            f"{where}: refused: the file wants to create or call '{refusal}', which no checkpoint of DeepSpeed or Megatron "
            "needs. Nothing of it was run. If it is part of your own client_state, save it as numbers, "
            "strings, lists, dictionaries or tensors instead"
        ) from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{where} is damaged: its pickle cannot be read ({type(error).__name__}: {error})") from error


class _Interpreter:
    """State of one run: the stack, the marks on it and the memo."""

    def __init__(self, archive: TorchArchive | PlainPickle) -> None:
        self._archive = archive
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """Carry out all instructions and return the object they build."""
        for opcode, argument, _ in pickletools.genops(bytes(self._archive.record("data.pkl").numpy())):
            self._step(opcode.name, argument)
        [value] = self._stack
        return value

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _PUSH_NEW:
            stack.append(_PUSH_NEW[name]())
        elif name in _FROM_MARK:
            stack.append(_FROM_MARK[name](self._pop_mark()))
        elif name in _TUPLE_SIZES:
            size = _TUPLE_SIZES[name]
            items = tuple(stack[-size:])
            del stack[-size:]
            stack.append(items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            self._fill(name)
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._step_objects(name, argument)

    def _step_objects(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "MARK":
            self._marks.append(len(stack))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._pop_mark()
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, target = stack.pop(), stack.pop()
            stack.append(_construct(target, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        else:
            raise Refused(f"pickle instruction {name}")

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _fill(self, name: str) -> None:
        """APPEND(S), SETITEM(S), ADDITEMS: on containers themselves only, so that no method of anything else runs."""
        if name in ("APPEND", "SETITEM"):
            size = 1 if name == "APPEND" else 2
            items = self._stack[-size:]
            del self._stack[-size:]
        else:
            items = self._pop_mark()
        target = self._stack[-1]
        if name.startswith("APPEND") and type(target) is list:
            target.extend(items)
        elif name.startswith("SETITEM") and type(target) in (dict, OrderedDict):
            target.update(zip(items[::2], items[1::2], strict=True))
        elif name == "ADDITEMS" and type(target) is set:
            target.update(items)
        else:
            raise ValueError(f"{name} on {type(target).__name__}")

    def _storage(self, reference: Any) -> Storage:
        kind, storage_type, key, _, numel = reference
        if kind != "storage" or type(storage_type) is not StorageType or type(key) is not str:
            raise ValueError(f"unknown storage reference {reference!r}")
        if key not in self._storages:
            raw, dtype = self._archive.record(f"data/{key}"), storage_type.dtype
            if raw.numel() != numel * dtype.itemsize:
                raise ValueError(f"storage {key} holds {raw.numel()} bytes instead of {numel} x {dtype.itemsize}")
            self._storages[key] = Storage(raw, dtype)
        return self._storages[key]


def _named(module: Any, attribute: Any) -> Any:
    """What the closed list has for a name: a value, or a token that only REDUCE and NEWOBJ understand."""
    full = f"{_PYTHON_2_MODULES.get(module, module)}.{attribute}"
    if full in VALUES:
        return VALUES[full]
    if full in CONSTRUCTORS:
        return Name(full)
    raise Refused(full)


def _construct(target: Any, arguments: Any) -> Any:
    if type(target) is not Name or type(arguments) is not tuple:
        raise ValueError(f"call of {type(target).__name__} with {type(arguments).__name__}")
    return CONSTRUCTORS[target.full](target, *arguments)


def _build(target: Any, state: Any) -> None:
    """BUILD: only data objects take a state, and only one that is data."""
    if type(target) is Record and type(state) is tuple and len(state) != 2:
        target.args = state  # of a class that restores itself from a tuple
    elif type(target) is Record:
        members, slots = state if type(state) is tuple else (state, None)
        target.fields.update(members or {})
        target.fields.update(slots or {})
    elif type(target) is np.ndarray:
        version, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, np.dtype) or dtype.hasobject or type(content) is not bytes:
            raise Refused("numpy array of objects")
        target.__setstate__((version, shape, dtype, is_fortran, content))
    elif isinstance(target, np.dtype):
        if state[1] not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError(f"unsupported numpy dtype state {state!r}")
    elif type(target) is not OrderedDict:
        # A state on an OrderedDict is torch's '_metadata' of module versions, which nothing here needs.
        raise ValueError(f"state for {type(target).__name__}")
