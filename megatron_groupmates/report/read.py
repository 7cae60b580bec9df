"""What a run directory says about its run, read once into plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_groupmates.config import RunPaths, UserError
from megatron_groupmates.utils.files import read_json, read_lines


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation a run has published: how it was made and, once adopted, from when on it served.

    Attributes:
        number: of the generation.
        provenance: as the server wrote it.
        effective_tokens: training tokens before its first sample, None while it is not adopted.
    """

    number: int
    provenance: dict[str, Any]
    effective_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm of an experiment.

    Attributes:
        label: unique among the runs of a report.
        name: ``run.name``.
        arm: what the run selects by; ``no selection`` where selection is off.
        seed: of the run.
        state: of the trainer; ``unknown`` before it wrote any.
        seconds: of training, this run's own.
        flops: of training from step 0 to the last one, the part before the branch included.
        consumed_tokens: training tokens up to the last step, likewise.
        branch_tokens: training tokens at which the runs compared branched; before it they are one run.
        tokens_per_step: of one optimizer step.
        evaluations: (training tokens, evaluation loss), tokens ascending, finite losses only.
        num_not_finite: evaluations left out because their loss was not finite.
        generations: numbers ascending, generation 0 (the whole pool) left out.
    """

    label: str
    name: str
    arm: str
    seed: int | None
    state: str
    seconds: float
    flops: float
    consumed_tokens: int
    branch_tokens: int
    tokens_per_step: int
    evaluations: tuple[tuple[int, float], ...]
    num_not_finite: int = 0
    generations: tuple[Generation, ...] = field(default=())

    @property
    def final(self) -> tuple[int, float] | None:
        """Tokens and loss of the last evaluation; None where there is none."""
        return self.evaluations[-1] if self.evaluations else None


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read several runs; those with the same arm are told apart by their seeds, else by their names.

    Raises:
        UserError: one is not a run directory or holds a damaged file, or one is given twice.
    """
    resolved = [Path(directory).resolve() for directory in directories]
    if len(set(resolved)) != len(resolved):
        raise UserError(f"a run is given twice: {', '.join(map(str, directories))}")
    runs = [read_run(Path(directory)) for directory in directories]
    labels = unique_labels([(run.arm, run.seed, run.name) for run in runs])
    # The run that others branched from took part in the comparison only from there on.
    branch_tokens = max(run.branch_tokens for run in runs)
    return [replace(run, label=label, branch_tokens=branch_tokens) for run, label in zip(runs, labels, strict=True)]


def unique_labels(keys: Sequence[tuple[str, int | None, str]]) -> list[str]:
    """Shortest distinct labels for (arm, seed, name): the arm alone, with its seed, with its name, or numbered."""
    forms = [lambda key: key[0], lambda key: f"{key[0]}, seed {key[1]}", lambda key: f"{key[0]}, {key[2]}"]
    labels = []
    for number, key in enumerate(keys, start=1):
        others = [other for position, other in enumerate(keys, start=1) if position != number]
        distinct = [form(key) for form in forms if form(key) not in {form(other) for other in others}]
        labels.append(distinct[0] if distinct else f"{key[0]}, run {number}")
    return labels


def read_run(directory: Path) -> Run:
    """Read one run directory. Nothing but ``config.yaml`` has to be there yet.

    Raises:
        UserError: it is not a run directory, or one of its files is damaged.
    """
    paths = RunPaths.below(directory)
    if not paths.config.is_file():
        raise UserError(f"{directory} is not a run directory: it has no {paths.config.name}")
    try:
        config = yaml.safe_load(paths.config.read_text())
        rows = read_lines(paths.metrics)
        training = read_json(paths.training_state) if paths.training_state.exists() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{directory} holds a damaged file: {error}; restore it from a copy") from error
    if not isinstance(config, dict):
        raise UserError(f"{paths.config} is not a run's config: a mapping expected, found {type(config).__name__}")
    output_dir, selection = _get(config, "run.output_dir", str(directory)), _get(config, "run.selection_dir", None)
    paths = RunPaths.recorded(directory, output_dir, None, selection)
    sequence_length = _get(config, "model.sequence_length", 0)
    name = _get(config, "run.name", directory.name)
    evaluations = {row["consumed_tokens"]: row["evaluation_loss"] for row in rows if "evaluation_loss" in row}
    finite = {tokens: loss for tokens, loss in sorted(evaluations.items()) if math.isfinite(loss)}
    return Run(
        label=name,
        name=name,
        arm=_arm(config),
        seed=_get(config, "run.seed", None),
        state=training.get("state", "unknown"),
        seconds=training.get("seconds", 0.0),
        flops=training.get("flops", 0.0),
        consumed_tokens=max([training.get("consumed_tokens", 0), *(row.get("consumed_tokens", 0) for row in rows)]),
        branch_tokens=training.get("branch_tokens", 0),
        tokens_per_step=sequence_length * _get(config, "training.global_batch_size", 0),
        evaluations=tuple(finite.items()),
        num_not_finite=len(evaluations) - len(finite),
        generations=_read_generations(paths, sequence_length),
    )


def _arm(config: dict[str, Any]) -> str:
    enabled = _get(config, "selection.enabled", False)
    return str(_get(config, "selection.method", "group")) if enabled else "no selection"


def _get(config: dict[str, Any], dotted_path: str, default: Any) -> Any:
    value: Any = config
    for key in dotted_path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else value


def _read_generations(paths: RunPaths, sequence_length: int) -> tuple[Generation, ...]:
    try:
        adopted: dict[int, int] = {}
        for entry in read_lines(paths.generation_log):
            adopted.setdefault(entry["generation"], entry["effective_sample"] * sequence_length)
        generations = []
        for path in sorted(paths.selection.glob("generation-*/generation.json")):
            number = int(path.parent.name.rpartition("-")[2])
            if number > 0:
                generations.append(
                    Generation(number=number, provenance=read_json(path).get("provenance", {}), effective_tokens=adopted.get(number))
                )
    except (ValueError, KeyError) as error:
        raise UserError(f"{paths.selection} holds a damaged file: {error!r}; restore it from a copy") from error
    return tuple(sorted(generations, key=lambda generation: generation.number))
