"""wids: an index of whole shards, for ``wids.ShardListDataset(".../index.json")``.

wids serves every sample of a shard that its index lists, so a selection within shards is refused. By itself it decodes
``.json.gz`` members to lists; :func:`token_transform` decodes these and raw ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.shard_lists import enumerate_names
from megatron_groupmates.pool.formats.subset import Subset, read_export, shard_keys, shard_url, write_export
from megatron_groupmates.pool.formats.tokens import put_tokens
from megatron_groupmates.utils.files import write_json
from megatron_groupmates.utils.progress import progress_bar

KIND = "wids"
INDEX_FILE = "index.json"


def export_wids(subset: Subset, output: Path) -> None:
    """Write an index of the selected shards into the directory ``output``.

    Raises:
        UserError: a shard is selected in part, or wids would see other samples in it than the pool has.
        OSError: a shard cannot be read or the export not written.
    """
    refuse_partial(subset, "wids serves every sample of a shard")
    index = subset.index
    shards = np.flatnonzero(subset.selected_per_shard).tolist()
    urls = [shard_url(index, shard, output) for shard in shards]
    by_file_name: dict[str, str] = {}
    for url in urls:
        other = by_file_name.setdefault(url.rsplit("/", 1)[-1], url)
        if other != url:
            raise UserError(
                f"{other} and {url} have one file name, by which wids keeps its copies: it would serve one for the other; "
                "export with --materialize, which writes shards with names of their own"
            )
    with progress_bar(len(shards), "check names", unit="shard") as bar:
        for shard in shards:
            suffix = _check_names(subset, shard)
            bar.update()
    output.mkdir(parents=True, exist_ok=True)
    shard_list = [
        {"url": url, "nsamples": int(index.rows_per_shard[shard]), "filesize": int(index.shard_sizes[shard])}
        for url, shard in zip(urls, shards, strict=True)
    ]
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": index.fingerprint, "shardlist": shard_list}
    write_json(output / INDEX_FILE, content)
    write_export(output, KIND, subset, suffix, {"shards": [index.shard_names[shard] for shard in shards]})


def refuse_partial(subset: Subset, reason: str) -> None:
    """Refuse a selection within shards, for a reader of whole shards only.

    Raises:
        UserError: a shard is selected in part.
    """
    partial = subset.partial_shards()
    if partial:
        raise UserError(
            f"{len(partial)} shards are selected in part ({enumerate_names(partial)}), and {reason}: the export would serve "
            "samples that were not selected; export with --materialize, which writes the selected samples as shards"
        )


def _check_names(subset: Subset, shard: int) -> str:
    """Refuse what wids would see otherwise; the suffix of the members."""
    keys = shard_keys(subset.index, shard)
    path = subset.index.shard_path(shard)
    if keys.num_foreign:
        raise UserError(
            f"shard {path} has {keys.num_foreign} samples that the pool has not, which wids would serve; export with --materialize"
        )
    if keys.repeated:
        raise UserError(f"shard {path} has the key {keys.repeated[0]!r} twice, of which wids sees one; export with --materialize")
    if not keys.plain_names:
        raise UserError(f"shard {path} has member names of 100 bytes or more, which wids cannot read; export with --materialize")
    return keys.suffix


def token_transform(directory: Path | str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A transformation for ``wids.ShardListDataset(..., transformations=[...])`` that gives samples their ``tokens``.

    Returns:
        A function of a sample, see :func:`megatron_groupmates.pool.formats.tokens.put_tokens`.

    Raises:
        UserError: there is no such export.
    """
    facts = read_export(directory, KIND)
    return functools.partial(put_tokens, suffix=facts["member_suffix"], token_dtype=facts["token_dtype"])
