"""Write a ZeRO checkpoint as a Hugging Face directory, complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.checkpoint.discovery import check_complete, latest_tag
from megatron_groupmates.checkpoint.export import (
    ExportedTensor,
    check_architecture,
    check_parameters,
    exported_tensors,
    has_fused_norms,
    hugging_face_config,
)
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, RunPaths, config_from_dict, config_to_dict
from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.tokenizer import PoolTokenizer, parse_tokenizer
from megatron_groupmates.utils.files import atomic_directory, read_sealed_json, sealed, write_bytes, write_json
from megatron_groupmates.utils.progress import progress_bar

RECORD_FILE = "export.json"
RECORD_FORMAT, RECORD_VERSION = "megatron_groupmates Hugging Face export", 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What an export may differ in.

    Attributes:
        dtype: ``float32``, the master weights as they are, or ``bfloat16``, rounded to nearest.
        max_shard_size: largest safetensors file, such as ``5GB``; a larger tensor has a file of its own.
    """

    dtype: str = "float32"
    max_shard_size: str = "5GB"


def find_tag(path: Path | str, tag: str | None = None) -> Path:
    """The directory of a complete checkpoint.

    Args:
        path: of a run, of DeepSpeed's save directory, or of a tag in it.
        tag: of the checkpoint, the one that ``latest`` names when None; None where ``path`` is a tag's.

    Raises:
        UserError: there is none, or it is not complete.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give a run, its 'checkpoints' or a tag such as <checkpoints>/global_step100")
    paths = RunPaths.below(path)
    saves = paths.checkpoints if paths.config.is_file() else path
    found = path
    if saves != path or tag is not None or (path / "latest").is_file():
        name = tag or latest_tag(saves)
        if name is None:
            raise UserError(f"{saves} has no complete checkpoint yet: it has no file 'latest'; wait for the trainer's first")
        found = saves / name
    check_complete(found)
    return found


def config_of_checkpoint(checkpoint: ZeroCheckpoint) -> Config:
    """The config that the trainer saved with the checkpoint.

    Raises:
        UserError: there is none, or it has settings that are not known.
    """
    tree = checkpoint.client_state.get("config")
    if not isinstance(tree, dict):
        raise UserError(f"checkpoint {checkpoint.path} does not hold its run's config; give it (--config)")
    try:
        return config_from_dict(tree)
    except UserError as error:
        raise UserError(f"the config in checkpoint {checkpoint.path} cannot be used: {error}; give the run's config (--config)") from error


def export_checkpoint(
    checkpoint: ZeroCheckpoint, config: Config, tokenizer: PoolTokenizer | None, output: Path | str, options: ExportOptions
) -> tuple[dict[str, Any], bool]:
    """Write the float32 master weights of a checkpoint, its config and tokenizer for ``transformers``.

    No more than one file's tensors and one parameter are in memory at a time.

    Args:
        checkpoint: to export.
        config: the run that saved it.
        tokenizer: of its pool; the rows of the vocabulary beyond it are left out. All rows are kept when None.
        output: directory to write; an earlier export in it is replaced.
        options: see :class:`ExportOptions`.

    Returns:
        The record written to ``export.json``, and whether it was written now: False where ``output`` holds the same already.

    Raises:
        UserError: the checkpoint is not of the config's model, the tokenizer does not fit it, the shard size cannot be
            read, or ``output`` holds something else than an export.
    """
    output = Path(output)
    rows = config.model.vocab_size
    vocab_size = rows if tokenizer is None else tokenizer.vocab_size
    if vocab_size > rows:
        raise UserError(
            f"tokenizer {tokenizer.name} has {vocab_size} tokens, the model's vocabulary {rows} rows: it is not the tokenizer of "
            "this run's pool; give that one (--tokenizer)"
        )
    check_architecture(config)
    tensors = exported_tensors(config, vocab_size, has_fused_norms(checkpoint.names))
    check_parameters(tensors, checkpoint.names, checkpoint.shape, checkpoint.path)
    files, index = shards(tensors, options)
    record = sealed(_description(checkpoint, config, tokenizer, options, vocab_size, sorted(files)))
    if _holds(output, record):
        return record, False
    with _replaced(output) as directory:
        _write_weights(directory, checkpoint, files, tensors, DTYPES[options.dtype])
        if len(files) > 1:
            write_json(directory / "model.safetensors.index.json", index)
        eot_id = None if tokenizer is None else tokenizer.eot_id
        write_json(directory / "config.json", hugging_face_config(config, vocab_size, DTYPES[options.dtype], eot_id))
        write_json(directory / "generation_config.json", {"bos_token_id": None, "eos_token_id": eot_id})
        for name, content in tokenizer_files(tokenizer, config.model.sequence_length).items():
            write_bytes(directory / name, content)
        write_json(directory / RECORD_FILE, record)
    return record, True


def shards(tensors: list[ExportedTensor], options: ExportOptions) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Names of the tensors by safetensors file, and the content of the index over the files.

    Raises:
        UserError: ``options.max_shard_size`` cannot be read.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {tensor.name: torch.empty(tensor.shape, dtype=DTYPES[options.dtype], device="meta") for tensor in tensors}
    try:
        split = split_torch_state_dict_into_shards(empty, max_shard_size=options.max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {options.max_shard_size!r} is not a size such as 5GB or 500MB") from error
    return split.filename_to_tensors, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def tokenizer_files(tokenizer: PoolTokenizer | None, max_length: int) -> dict[str, bytes]:
    """Content by name of the files that ``AutoTokenizer`` reads; none without a tokenizer.

    Args:
        tokenizer: of the pool; its ``tokenizer.json`` is copied byte for byte.
        max_length: longest text in tokens that the model was trained with.
    """
    if tokenizer is None:
        return {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": parse_tokenizer(tokenizer.content, tokenizer.name).id_to_token(tokenizer.eot_id),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.content, "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def _write_weights(
    directory: Path, checkpoint: ZeroCheckpoint, files: dict[str, list[str]], tensors: list[ExportedTensor], dtype: torch.dtype
) -> None:
    from safetensors.torch import save_file

    by_name = {tensor.name: tensor for tensor in tensors}

    # Neighbours share a parameter: it is read once for all its parts.
    @functools.lru_cache(maxsize=1)
    def read(source: str) -> torch.Tensor:
        return checkpoint.read(source, "param")

    with progress_bar(len(tensors), "exporting", unit="tensor") as bar:
        for file, names in files.items():
            content = {}
            for name in names:
                tensor = by_name[name]
                # A copy, since parts of one parameter may share its memory, which safetensors does not write.
                content[name] = tensor.cut(read(tensor.source)).to(dtype, copy=True, memory_format=torch.contiguous_format)
                assert content[name].shape == tensor.shape
                bar.update()
            save_file(content, directory / file, metadata={"format": "pt"})


def _description(
    checkpoint: ZeroCheckpoint, config: Config, tokenizer: PoolTokenizer | None, options: ExportOptions, vocab_size: int, files: list[str]
) -> dict[str, Any]:
    """What tells exports apart. No path: an export may be published."""
    return {
        "format": RECORD_FORMAT,
        "version": RECORD_VERSION,
        "run": config.run.name,
        "tag": checkpoint.path.name,
        "step": checkpoint.step,
        "saved_ns": max(path.stat().st_mtime_ns for path in checkpoint.path.iterdir()),
        "model": config_to_dict(config)["model"],
        "vocab_size": vocab_size,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "end_of_text": None if tokenizer is None else tokenizer.eot_id,
        **dataclasses.asdict(options),
        "files": files,
    }


def _holds(output: Path, record: dict[str, Any]) -> bool:
    """Whether ``output`` holds the export that ``record`` describes; it may be absent, empty or another export too."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; give a directory that is absent, empty or an earlier export (--output)")
    if not output.is_dir() or not any(output.iterdir()):
        return False
    remedy = "nothing in it was changed; remove it, or give another directory (--output)"
    if not (output / RECORD_FILE).is_file():
        raise UserError(f"{output} is not empty and not an export of this tool (it has no {RECORD_FILE}); {remedy}")
    found = read_sealed_json(output / RECORD_FILE, "an export", RECORD_FORMAT, RECORD_VERSION, remedy)
    return found["digest"] == record["digest"] and all((output / name).is_file() for name in record["files"])


@contextlib.contextmanager
def _replaced(output: Path) -> Iterator[Path]:
    """As :func:`atomic_directory`, where an export may be in the way: it stays until the new one is written."""
    # Under this name a leftover of a killed process is removed by the next export.
    old = output.with_name(f"{output.name}.tmp-old-{os.getpid()}")
    with atomic_directory(output) as directory:
        yield directory
        if output.exists():
            os.rename(output, old)
    shutil.rmtree(old, ignore_errors=True)
