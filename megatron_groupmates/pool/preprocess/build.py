"""Raw documents to a pool, on any number of processes and hosts: scatter, gather, merge.

The first pass turns each input file into samples sorted by the cells of the shuffle, the second makes the shards of each
cell, the last step the index. Every piece of work depends on the inputs and arguments alone, and its result is complete or
absent in a work directory: who does it, and how often a run is killed in between, has no influence on the pool.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.index import POOL_FILE
from megatron_groupmates.pool.preprocess.gather import Destination
from megatron_groupmates.pool.preprocess.options import BuildOptions
from megatron_groupmates.pool.preprocess.passes import TOOL, Build
from megatron_groupmates.pool.preprocess.plan import count_cells
from megatron_groupmates.pool.preprocess.ranks import meet
from megatron_groupmates.pool.preprocess.records import find_inputs
from megatron_groupmates.pool.preprocess.work import WorkDirectory, differences, versions_of_compressors
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.storage import find_files, is_remote, join, read_all


def build_pool(
    inputs: Sequence[str | Path],
    output: Path | str,
    tokenizer: PoolTokenizer,
    options: BuildOptions,
    *,
    num_workers: int = 0,
    max_rejects: int | None = None,
    work_directory: Path | str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[dict[str, Any] | None, bool]:
    """Make a pool from raw documents; it is complete when it has a ``pool.json``. Every rank of a launch calls it.

    Args:
        inputs: files, glob patterns and directories, local or URLs.
        output: directory or URL of the pool; must not exist, or be empty, or be a pool or the beginnings of one made
            with the same arguments.
        tokenizer: of the pool.
        options: what shapes its content.
        num_workers: processes of this rank, 0 to work in this one; no influence on the content.
        max_rejects: documents that may be unusable, over all files; None for any number. What the quality filter leaves
            out does not count.
        work_directory: where finished work is kept until the pool is complete, ``<output>.work`` by default; on a local
            or network file system that all ranks share.
        rank: of this process.
        world_size: processes that were started together for this pool.

    Returns:
        (summary, built): counts that add up, None on ranks but the first; False where the pool was there already.

    Raises:
        UserError: an input matches nothing, no sample comes of the inputs, too many documents are rejected, ``output`` or
            the work directory is something else, or another rank failed.
        OSError: an input cannot be read or a result cannot be written; the same call continues with what is finished.
    """
    output = str(output)
    quality = options.quality_filter()
    files, named_twice = find_inputs(inputs)
    num_cells = count_cells([(file.name, file.num_bytes) for file in files], np.dtype(tokenizer.token_dtype).itemsize, options.cell_bytes)
    arguments = {
        "inputs": [[file.name, file.num_bytes] for file in files],
        "eot_id": tokenizer.eot_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **options.as_arguments(None if quality is None else quality.fingerprint),
    }
    plan = {**arguments, "versions": versions_of_compressors(options.member_format)}
    work = WorkDirectory(_work_path(output, work_directory))
    summary = _present_summary(output, arguments, work)
    if summary is not None:
        if rank == 0:
            work.remove_leftover(plan)
        return summary, False
    build = Build(
        files=tuple(files),
        num_named_twice=len(named_twice),
        output=output,
        tokenizer=tokenizer,
        options=options,
        quality=quality,
        arguments=arguments,
        num_cells=num_cells,
        work=work,
        num_workers=num_workers,
        max_rejects=max_rejects,
        destination=Destination(output, work),
    )
    with contextlib.ExitStack() as stack:
        if rank == 0:
            work.check_own()
            stack.enter_context(work.locked())
            work.begin(plan)
            build.forget_lost_shards()
        else:
            work.check_plan(plan)
        launch = meet(work.ranks, rank, world_size)
        work.check_plan(plan)
        stack.enter_context(launch.telling_failure())
        return build.run(launch), True


def _work_path(output: str, work_directory: Path | str | None) -> Path:
    if work_directory is not None:
        if is_remote(work_directory):
            raise UserError(f"the work directory is on a local or shared file system, not {work_directory}; change --work-directory")
        return Path(work_directory)
    if is_remote(output):
        raise UserError(f"output {output} is remote: name a directory for unfinished work, shared by all hosts, with --work-directory")
    return Path(f"{output.removeprefix('file://').rstrip('/')}.work")


def _present_summary(output: str, arguments: dict[str, Any], work: WorkDirectory) -> dict[str, Any] | None:
    """Summary of the pool that is there, if it was made with the same arguments; None where there is none yet.

    Raises:
        UserError: there is a pool made with other arguments, or something else.
    """
    if not is_remote(output) and Path(output.removeprefix("file://")).is_file():
        raise UserError(f"{output} is not empty and not a pool; choose another --output or remove it")
    try:
        made_by = json.loads(read_all(join(output, POOL_FILE))).get("made_by", {})
    except FileNotFoundError:
        if not work.plan.is_file() and find_files(output):
            raise UserError(f"{output} is not empty and not a pool; choose another --output or remove it") from None
        return None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{join(output, POOL_FILE)} is damaged: {error}; choose another --output or remove it") from error
    values = differences(made_by.get("arguments", {}), arguments)
    if made_by.get("tool") != TOOL or values:
        raise UserError(f"{output} is a pool made with other arguments ({values}); choose another --output or remove it")
    return made_by["summary"]
