"""Turn one YAML file and ``--set`` overrides into a checked :class:`Config`. Strict: nothing unknown is let through."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_groupmates.config.checks import check_config
from megatron_groupmates.config.errors import UserError
from megatron_groupmates.config.schedule import decay_end
from megatron_groupmates.config.sections import Config


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "the config") -> Config:
    """Parse YAML ``text``, apply ``overrides`` (``section.key=value``) and check the result.

    Args:
        text: YAML with one mapping per section of :class:`Config`.
        overrides: later ones win; the value is read as YAML.
        source: the file's name, for messages.

    Raises:
        UserError: naming the dotted path, the value and what to change.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{source} must hold a mapping of sections ({_section_names()}), got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    config = _build(Config, tree, "")
    check_config(config)
    return config


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The inverse of :func:`config_to_dict`, with the same checks as :func:`parse_config`."""
    config = _build(Config, dict(tree), "")
    check_config(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of every setting, defaults included: what is written as the resolved config."""
    return dataclasses.asdict(config)


def dump_config(config: Config) -> str:
    """The resolved config as YAML that :func:`parse_config` reads back unchanged."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


# What the oracle's steps take from the config whoever trains.
_STEP = ("weight_decay", "beta1", "beta2", "epsilon")


def config_differences(saved: Config, current: Config) -> list[str]:
    """Lines ``path: saved -> current`` for settings that a resumed run must not change.

    Where the trainer is a checkout of the user's own its learning rate and ZeRO stage are its own affair: those of the
    oracle are the checkpoint's.
    """
    lines = []
    ours = current.checkpoint.format == "groupmates"
    if ours and saved.optimizer.schedule != "constant" and decay_end(saved) != decay_end(current):
        # Unset it follows train_iters: without this rule a longer run would silently get another schedule.
        lines.append(
            f"optimizer.decay_iters: {decay_end(saved)} -> {decay_end(current)} (it follows training.train_iters when unset; "
            f"set optimizer.decay_iters={decay_end(saved)} to go on with the saved schedule)"
        )
    for section in dataclasses.fields(Config):
        before, after = getattr(saved, section.name), getattr(current, section.name)
        for item in dataclasses.fields(before):
            old, new = getattr(before, item.name), getattr(after, item.name)
            free = item.metadata["may_change"] or (not ours and section.name == "optimizer" and item.name not in _STEP)
            if old != new and not free:
                lines.append(f"{section.name}.{item.name}: {old!r} -> {new!r}")
    return lines


def _section_names() -> str:
    return ", ".join(field.name for field in dataclasses.fields(Config))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    keys = path.strip().split(".")
    if not separator or len(keys) != 2 or not all(keys):
        raise UserError(f"--set takes section.key=value, got {override!r}")
    section = tree.setdefault(keys[0], {})
    if section is None:
        section = tree[keys[0]] = {}
    if not isinstance(section, dict):
        raise UserError(f"{keys[0]}: expected a mapping of settings, got {section!r}")
    try:
        section[keys[1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}") from error


def _build(kind: type, tree: Any, path: str) -> Any:
    """An instance of dataclass ``kind`` from ``tree``, which came from dotted ``path``."""
    where = path or "the config"
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected a mapping of settings, got {tree!r}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {_join(path, near[0])}?" if near else f"valid keys: {', '.join(known)}"
            raise UserError(f"{_join(path, key)}: unknown setting; {hint}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, field in known.items():
        dotted = _join(path, name)
        if dataclasses.is_dataclass(hints[name]):
            if name in tree or field.default_factory is dataclasses.MISSING:
                values[name] = _build(hints[name], tree.get(name), dotted)
        elif name in tree:
            values[name] = _convert(tree[name], hints[name], dotted)
            _check_range(values[name], field.metadata, dotted)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{dotted}: required setting is missing ({field.metadata['help']})")
    return kind(**values)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the annotated type; numbers are never guessed from booleans or the other way round."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [option for option in typing.get_args(hint) if option is not type(None)]
        return _convert(value, inner, path)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        # YAML 1.1 reads a bare off/on as a boolean.
        if value is False and "off" in choices:
            value = "off"
        if value not in choices or isinstance(value, bool):
            raise UserError(f"{path}: {value!r} is not one of {', '.join(map(str, choices))}")
        return choices[choices.index(value)]  # 1, not 1.0
    if origin is Mapping:
        hint = dict
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 3e-4 (no dot) as a string.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif type(value) is hint:
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}[hint]
    raise UserError(f"{path}: expected {expected}, got {value!r}")


def _check_range(value: Any, limits: Mapping[str, Any], path: str) -> None:
    if value is None or isinstance(value, (str, bool)):
        return
    if limits["minimum"] is not None and not value >= limits["minimum"]:
        raise UserError(f"{path}: {value} is below the smallest allowed value {limits['minimum']}")
    if limits["maximum"] is not None and not value <= limits["maximum"]:
        raise UserError(f"{path}: {value} is above the largest allowed value {limits['maximum']}")
