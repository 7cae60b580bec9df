"""Megatron-Energon: a data set of links to the pool's shards, with a split file that leaves out what is not selected.

The export holds ``.nv-meta/``, a link and a ``.tar.idx`` for each shard, and ``metadataset.yaml``. Both it and the
directory can be given to Energon, with :func:`token_cooker` in a task encoder:

    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_train_dataset
    from megatron_groupmates.pool.formats.energon import token_cooker

    class TaskEncoder(DefaultTaskEncoder):
        cookers = [Cooker(token_cooker("exported"))]

    data = get_train_dataset("exported/metadataset.yaml", task_encoder=TaskEncoder(raw_sample_type=..., ...), ...)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.open_lm import link_shard
from megatron_groupmates.pool.formats.subset import ShardKeys, Subset, read_export, shard_keys, write_export
from megatron_groupmates.pool.formats.tokens import put_tokens
from megatron_groupmates.utils import storage
from megatron_groupmates.utils.files import write_bytes, write_json, write_text
from megatron_groupmates.utils.progress import progress_bar

KIND = "energon"
METADATASET_FILE = "metadataset.yaml"
_META = ".nv-meta"
_SPLIT_FILE = "split.json"
# Energon reads the list when a loader is built, in every process, and takes about ten seconds for a million.
MAX_EXCLUDES = 1_000_000


def export_energon(subset: Subset, output: Path, max_excludes: int = MAX_EXCLUDES) -> None:
    """Write an Energon data set into the directory ``output``.

    Args:
        subset: what it serves, as split part ``train``.
        output: a directory without other shards.
        max_excludes: most samples that the split file may leave out one by one.

    Raises:
        UserError: more samples would have to be left out, a shard has keys that Energon cannot leave out exactly, or
            the shards lie in an object store.
        OSError: a shard cannot be read or the export not written.
    """
    index = subset.index
    selected = subset.selected_per_shard
    shards = np.flatnonzero(selected).tolist()
    num_excludes = int((index.rows_per_shard - selected)[shards].sum())
    if num_excludes > max_excludes:
        raise UserError(
            f"{num_excludes} samples would have to be left out one by one, more than --max-excludes {max_excludes}: Energon takes about "
            "10 s a million to read them in every process; export with --materialize, which writes the selected samples as shards"
        )
    output.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    excludes: list[str] = []
    with progress_bar(len(shards), "index shards", unit="shard") as bar:
        for shard in shards:
            path = index.shard_path(shard)
            if storage.is_remote(path):
                raise UserError(f"Energon finds shards beside its metadata, {path} is in a store; export with --materialize")
            keys = shard_keys(index, shard)
            name = link_shard(path, output, index.shard_names[shard].replace("/", "_"))
            write_bytes(output / f"{name.removesuffix('.tar')}.tar.idx", keys.starts.astype("<u8").tobytes())
            counts[name] = len(keys.keys)
            excludes += _excluded(keys, subset.shard_mask(shard), path, name)
            bar.update()
    split_parts = {"train": list(counts), "val": [], "test": []}
    write_json(output / _META / ".info.json", {"shard_counts": counts})
    write_text(output / _META / _SPLIT_FILE, json.dumps({"split_parts": split_parts, "exclude": excludes}))
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_text(output / _META / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False))
    reference = {"path": ".", "split_part": "train", "split_config": _SPLIT_FILE}
    metadataset = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": reference, "val": reference}}
    write_text(output / METADATASET_FILE, json.dumps(metadataset, indent=2) + "\n")
    write_export(
        output, KIND, subset, keys.suffix, {"shards": [index.shard_names[shard] for shard in shards], "num_excludes": len(excludes)}
    )


def token_cooker(directory: Path | str) -> Callable[..., dict[str, Any]]:
    """A cooker for the samples of the export in ``directory``: raw and ``.json.gz`` members alike.

    Returns:
        A function of a crude sample that gives a dictionary of Energon's own fields and ``tokens``, int64[length]. It
        can be pickled.

    Raises:
        UserError: there is no such export.
    """
    facts = read_export(directory, KIND)
    cooker = functools.partial(_cook, facts["member_suffix"], facts["token_dtype"])
    # What megatron.energon.stateless sets, without which Energon takes no cooker; the mark survives pickling.
    cooker.__stateless__ = True
    return cooker


def _cook(suffix: str, token_dtype: str, sample: dict[str, Any]) -> dict[str, Any]:
    with_tokens = put_tokens(sample, suffix, token_dtype)
    return {name: value for name, value in with_tokens.items() if name.startswith("__") or name == "tokens"}


def _excluded(keys: ShardKeys, mask: np.ndarray, path: Path | str, name: str) -> list[str]:
    unwanted = (keys.row_of < 0) | ~mask[keys.row_of]
    if unwanted.any() and keys.repeated:
        raise UserError(
            f"shard {path} has the key {keys.repeated[0]!r} twice: Energon leaves out both or none; "
            "export with --materialize, which writes shards with keys of their own"
        )
    excludes = [f"{name}/{keys.keys[sample]}" for sample in np.flatnonzero(unwanted).tolist()]
    for exclude in excludes:
        if "{" in exclude or "}" in exclude:
            raise UserError(f"shard {path}: Energon would expand the braces in {exclude!r}; export with --materialize")
    return excludes
