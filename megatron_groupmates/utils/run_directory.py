"""The run directory and the resolved config in it, shared by trainer and server."""

from __future__ import annotations

from pathlib import Path

from megatron_groupmates.config import Config, RunPaths, UserError, config_differences, dump_config, parse_config
from megatron_groupmates.utils.files import write_text


def check_run_directory(config: Config) -> RunPaths:
    """The run's paths, after checking that the directory is new or holds this run.

    Raises:
        UserError: the directory holds a run with other settings; lists those that differ.
    """
    paths = RunPaths.of(config)
    if paths.config.exists():
        differences = config_differences(read_run_config(paths.root), config)
        if differences:
            raise UserError(
                f"{paths.root} holds a run with other settings; use another {_directory_setting(config)}, or set these back:\n  "
                + "\n  ".join(differences)
            )
    return paths


def _directory_setting(config: Config) -> str:
    return "run.output_dir" if config.checkpoint.format == "groupmates" else "--group-mates-selection"


def write_run_config(config: Config) -> None:
    """Write the resolved config into the run directory. One process of a job calls."""
    write_text(RunPaths.of(config).config, dump_config(config))


def read_run_config(run: Path) -> Config:
    """The resolved config of the run in ``run``.

    Raises:
        UserError: ``run`` is not a run directory, or its config is damaged.
    """
    paths = RunPaths.below(run)
    if not paths.config.is_file():
        raise UserError(f"{run} is not a run directory: it has no config.yaml; give the run.output_dir of a trainer")
    return parse_config(paths.config.read_text(), source=str(paths.config))


def open_run(run: Path) -> tuple[Config, RunPaths]:
    """The resolved config of the run in ``run``, and where its files are.

    Raises:
        UserError: as :func:`read_run_config`.
    """
    config = read_run_config(run)
    return config, RunPaths.of(config, run)


def find_checkpoint(config: Config) -> tuple[Path, str | None] | None:
    """(directory, tag) of the checkpoint to go on from: the run's own newest, else the one it branches from, else None.

    A tag of None stands for the one that the directory's file ``latest`` names.

    Raises:
        UserError: ``checkpoint.load`` is not a directory.
    """
    own = RunPaths.of(config).checkpoints
    # The file of DeepSpeed, or of Megatron-LM.
    if any((own / name).is_file() for name in ("latest", "latest_checkpointed_iteration.txt")):
        return own, None
    if config.checkpoint.load is None:
        return None
    parent = Path(config.checkpoint.load)
    if not parent.is_dir():
        raise UserError(f"checkpoint.load: {parent} is not a directory; give the 'checkpoints' directory of another run")
    return parent, config.checkpoint.load_tag


def generation_log_source(config: Config) -> RunPaths:
    """The run whose generation log holds what has been consumed: this one, or the one it branches from until it has started."""
    own = RunPaths.of(config)
    if own.generation_log.exists() or config.checkpoint.load is None:
        return own
    return RunPaths.below(Path(config.checkpoint.load).parent)
