"""The resolved config of a run in a trainer of the user's own: that trainer's arguments and the file of --group-mates-config."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_groupmates.config import Config, UserError, config_from_dict, refresh_steps
from megatron_groupmates.integrations.arguments import GroupMatesArguments, absolute
from megatron_groupmates.integrations.forks import Fork
from megatron_groupmates.pool.index import PoolIndex

# What the file may set; None for a whole section. The rest follows from the trainer's own arguments.
SECTIONS_OF_FILE: dict[str, tuple[str, ...] | None] = {
    "run": ("name", "wandb_mode", "wandb_project"),
    "data": ("reference", "exclude", "packing", "cache_directory", "cache_bytes", "storage_options"),
    "selection": None,
    "oracle": None,
    "relational": None,
    "server": None,
}


def resolve_config(args: argparse.Namespace, arguments: GroupMatesArguments, fork: Fork) -> Config:
    """What the run's config.yaml says.

    Args:
        args: the trainer's, as they are when it asks for its data.
        arguments: ours.
        fork: which trainer it is.

    Raises:
        UserError: naming the trainer's flag or the dotted path in the file, its value, and what to change.
    """
    _check_loader(args)
    tree = fork.settings(vars(args))
    given = _read_file(arguments.config) if arguments.config else {"selection": {"method": "random", "max_refreshes": 0}}
    for section, settings in given.items():
        tree[section] = tree.get(section, {}) | settings
    run, data, selection = (tree.setdefault(name, {}) for name in ("run", "data", "selection"))
    run |= {"output_dir": arguments.selection, "selection_dir": arguments.selection, "seed": args.seed}
    data |= {"pool": arguments.pool, "evaluation": arguments.evaluation, "num_workers": args.num_workers}
    data |= {name: absolute(data[name]) for name in ("reference", "exclude", "cache_directory") if isinstance(data.get(name), str)}
    relational = tree.get("relational", {})
    if os.path.isdir(encoder := absolute(str(relational.get("encoder")))):
        relational["encoder"] = encoder
    selection.setdefault("enabled", True)
    if arguments.poll_interval is not None:
        selection["poll_interval_steps"] = arguments.poll_interval
    save = getattr(args, "save", None)
    tree["checkpoint"] = {
        "format": fork.checkpoint_format,
        "directory": absolute(save) if save else None,
        "save_interval": getattr(args, "save_interval", None) or args.train_iters,
    }
    config = config_from_dict(tree)
    _check_selection(args, config)
    return config


def check_end_of_document(config: Config, pool: PoolIndex, fork: Fork) -> None:
    """Refuse rules about documents under a tokenizer that ends them with another token than the pool's.

    Raises:
        UserError: naming both ids.
    """
    names = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    used = ["--" + name.replace("_", "-") for name in names if getattr(config.data, name)]
    if used and (own := fork.end_of_document()) != pool.eot_id:
        raise UserError(
            f"{', '.join(used)}: the trainer's tokenizer ends documents with token {own}, the pool {pool.directory} with {pool.eot_id}; "
            "give the trainer the tokenizer that the pool was made with"
        )


def check_first_refresh(config: Config, iteration: int) -> None:
    """Refuse a refresh before the step at which selection is switched on: nobody would make its generation.

    Raises:
        UserError: naming the step.
    """
    steps = refresh_steps(config)
    if iteration and steps and steps[0] <= iteration:
        raise UserError(
            f"selection.first_refresh_step: {steps[0]} is over when selection is switched on, at step {iteration}; choose a later step"
        )


def _check_loader(args: argparse.Namespace) -> None:
    loader = getattr(args, "dataloader_type", None) or "single"
    if loader != "single":
        raise UserError(
            f"--dataloader-type {loader}: Group-MATES decides the order of the samples itself and needs --dataloader-type single, "
            "which asks for them by number"
        )
    if getattr(args, "rampup_batch_size", None):
        raise UserError(
            f"--rampup-batch-size {' '.join(map(str, args.rampup_batch_size))}: Group-MATES needs one global batch size in the whole run; "
            "leave it out"
        )


def _read_file(path: str) -> dict[str, dict[str, Any]]:
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--group-mates-config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--group-mates-config {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict) or not all(isinstance(settings, dict) for settings in tree.values()):
        raise UserError(
            f"--group-mates-config {path} must hold a mapping of sections ({', '.join(SECTIONS_OF_FILE)}), each with its settings"
        )
    for section, settings in tree.items():
        allowed = SECTIONS_OF_FILE.get(section, ())
        refused = [] if allowed is None else [f"{section}.{name}" for name in settings if name not in allowed]
        if refused:
            raise UserError(
                f"--group-mates-config {path}: {refused[0]} follows from the trainer's own arguments and the --group-mates ones; leave "
                f"it out (the file may set {_may_set()})"
            )
    return tree


def _may_set() -> str:
    return ", ".join(section if names is None else f"{section}: {', '.join(names)}" for section, names in SECTIONS_OF_FILE.items())


def _check_selection(args: argparse.Namespace, config: Config) -> None:
    selection, steps = config.selection, refresh_steps(config)
    if not selection.enabled:
        raise UserError("selection.enabled: false, but --group-mates-selection switches it on; leave one of them out")
    if selection.mode == "inline":
        raise UserError(
            "selection.mode: inline needs the trainer to end at each refresh, which only this package's own does; use async or blocking"
        )
    interval = getattr(args, "save_interval", None)
    if steps and not (config.checkpoint.directory and interval):
        raise UserError(
            f"--save, --save-interval: selection is planned at step {steps[0]}, but the trainer saves no checkpoints to select with; give "
            "both, or set selection.max_refreshes to 0"
        )
    if odd := [step for step in steps if step % interval]:
        raise UserError(
            f"--save-interval {interval}: selection is planned at step {odd[0]}, where no checkpoint is saved; make "
            f"selection.first_refresh_step ({selection.first_refresh_step}) and selection.refresh_interval "
            f"({selection.refresh_interval}) multiples of it"
        )
