"""open_lm: a directory of ``shard_%08d.tar`` with ``manifest.jsonl``, for its ``--dataset-manifest``.

open_lm reads whole shards of ``.json.gz`` members, all of one length: its ``--seq-len`` and one more.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.subset import Subset, shard_keys, write_export
from megatron_groupmates.pool.formats.wids import refuse_partial
from megatron_groupmates.pool.index import MANIFEST_FILE
from megatron_groupmates.pool.writer import shard_name
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.files import write_text

KIND = "open_lm"
_SUFFIX = "json.gz"


def export_open_lm(subset: Subset, output: Path) -> None:
    """Write the manifest of the selected shards into the directory ``output``, and links to those that lie elsewhere.

    Raises:
        UserError: a shard is selected in part, its members are not ``.json.gz`` alone, samples have several lengths, or
            the shards lie in an object store.
        OSError: the export cannot be written.
    """
    index = subset.index
    refuse_lengths(subset)
    refuse_partial(subset, "open_lm reads every sample of a shard")
    if index.member_format != "json.gz":
        raise UserError("open_lm reads .json.gz members, this pool's are raw; export with --materialize --member-format json.gz")
    shards = np.flatnonzero(subset.selected_per_shard).tolist()
    for shard in shards:
        if storage.is_remote(index.shard_path(shard)):
            raise UserError(
                f"open_lm finds shards beside their manifest, {index.shard_path(shard)} is in a store; export with --materialize"
            )
        _check_names(subset, shard)
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, shard in enumerate(shards):
        name = link_shard(index.shard_path(shard), output, shard_name(number)).removesuffix(".tar")
        lines.append(f'{{"num_sequences":{index.rows_per_shard[shard]},"shard":"{name}"}}\n')
    # Every line ends in a newline: open_lm drops what follows the last one.
    write_text(output / MANIFEST_FILE, "".join(lines))
    length = int(index.lengths[subset.mask][0])
    write_export(output, KIND, subset, _SUFFIX, {"sequence_length": length - 1, "shards": [index.shard_names[shard] for shard in shards]})


def link_shard(path: Path, output: Path, name: str) -> str:
    """Link a shard into ``output`` as ``<name>.tar``, unless it lies there; its file name.

    Raises:
        UserError: there is another file by that name.
    """
    if os.path.abspath(path.parent) == os.path.abspath(output):
        return path.name
    link, target = output / f"{name}.tar", os.path.abspath(path)
    if link.is_symlink() and os.readlink(link) == target:
        return link.name
    if link.is_symlink() or link.exists():
        raise UserError(f"{link} is there already and is not a link to {target}; choose an empty --output")
    link.symlink_to(target)
    return link.name


def refuse_lengths(subset: Subset) -> None:
    """Refuse samples of several lengths, which no way of exporting mends.

    Raises:
        UserError: there are some.
    """
    lengths = subset.index.lengths[subset.mask]
    if lengths.min() != lengths.max():
        raise UserError(
            f"open_lm needs samples of one length, these have {lengths.min()} to {lengths.max()} tokens; "
            "make the pool with tools/preprocess_dclm.py --pack 2049"
        )


def _check_names(subset: Subset, shard: int) -> None:
    keys = shard_keys(subset.index, shard)
    if keys.num_foreign:
        raise UserError(
            f"shard {subset.index.shard_path(shard)} has {keys.num_foreign} samples that the pool has not, "
            "which open_lm would read; export with --materialize"
        )
    if keys.suffix != _SUFFIX:
        raise UserError(f"open_lm reads members called .{_SUFFIX}, this pool's are called .{keys.suffix}; export with --materialize")
