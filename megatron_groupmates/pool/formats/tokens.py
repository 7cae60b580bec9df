"""Token ids out of the samples that other packages hand over."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from megatron_groupmates.pool.formats.scan import member_format
from megatron_groupmates.pool.members import decode_json_member


def put_tokens(sample: dict[str, Any], suffix: str, token_dtype: str) -> dict[str, Any]:
    """A sample with ``tokens``, int64[length], in the place of the member that holds its ids.

    Args:
        sample: as webdataset, wids or Energon gives it; the member as bytes, as a stream, or decoded to a list.
        suffix: of the member, as in ``export.json``.
        token_dtype: of raw members, as in ``export.json``.

    Raises:
        ValueError: the sample has no such member, or its content is damaged.
    """
    # webdataset writes suffixes in lower case, wids with the dot before.
    for name in (suffix, suffix.lower(), f".{suffix}"):
        if name in sample:
            return {**{other: value for other, value in sample.items() if other != name}, "tokens": _ids(sample[name], suffix, token_dtype)}
    raise ValueError(f"sample {sample.get('__key__')!r} has no member .{suffix}, only {', '.join(sample)}")


def _ids(content: Any, suffix: str, token_dtype: str) -> np.ndarray:
    if isinstance(content, io.IOBase):
        content = content.read()
    if not isinstance(content, bytes):
        return np.asarray(content, dtype=np.int64)
    if member_format(suffix) == "raw":
        return np.frombuffer(content, dtype=np.dtype(token_dtype).newbyteorder("<")).astype(np.int64)
    return decode_json_member(content)
