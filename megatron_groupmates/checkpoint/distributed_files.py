"""The files of torch's distributed checkpoints (``.metadata`` and ``*.distcp``), read as data: nothing in them is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_groupmates.checkpoint.archive import PlainPickle, TorchArchive
from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.checkpoint.unpickle import read
from megatron_groupmates.config.errors import UserError

_METADATA = ".metadata"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of a tensor that was saved by itself.

    Attributes:
        offsets: its first element, by dimension.
        sizes: its shape.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class DistributedFiles:
    """Tensors and objects of one checkpoint by key. Reads map the files: they touch the bytes they return.

    Attributes:
        shapes: of the tensors, by key.
        objects: keys of everything else.

    Args:
        directory: with the files.

    Raises:
        UserError: no such checkpoint, or one that holds anything but data.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        metadata = read(PlainPickle(directory / _METADATA), str(directory / _METADATA))
        try:
            entries = metadata.fields["state_dict_metadata"]
            tensors = {key: entry for key, entry in entries.items() if "chunks" in entry.fields}
            self.shapes = {key: tuple(entry.fields["size"]) for key, entry in tensors.items()}
            self._chunks = {key: [_chunk(each) for each in entry.fields["chunks"]] for key, entry in tensors.items()}
            self.objects = [key for key in entries if key not in tensors]
            self._places = {_place(index): info for index, info in metadata.fields["storage_data"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{directory / _METADATA} is not what torch.distributed.checkpoint writes ({error!r})") from error

    def read_object(self, key: str) -> Any:
        """The object of that key, of :attr:`objects`.

        Raises:
            UserError: it is damaged or holds anything but data.
        """
        return self._read(key, None)

    def read_tensor(self, key: str, first: int | None = None) -> torch.Tensor:
        """The tensor of that key, in the type it was saved in.

        Args:
            key: of :attr:`shapes`.
            first: index into its first dimension, which the result then lacks; None for the whole tensor.

        Raises:
            UserError: a file is damaged, or its chunks do not cover what is wanted.
        """
        shape = self.shapes[key] if first is None else (1, *self.shapes[key][1:])
        whole, covered = None, 0
        for chunk in self._chunks[key]:
            if first is not None and not chunk.offsets[0] <= first < chunk.offsets[0] + chunk.sizes[0]:
                continue
            part = self._read(key, chunk.offsets)
            if not isinstance(part, torch.Tensor) or tuple(part.shape) != chunk.sizes:
                raise UserError(f"{self.directory} is damaged: what lies at {chunk.offsets} of '{key}' is not a tensor of {chunk.sizes}")
            if whole is None:
                whole = torch.empty(shape, dtype=part.dtype)
            boxes = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if first is not None:
                part, boxes[0] = part[first - chunk.offsets[0] :][:1], slice(0, 1)
            whole[tuple(boxes)] = part
            covered += part.numel()
        if whole is None or covered != whole.numel():
            raise UserError(f"{self.directory} is damaged: '{key}' of shape {self.shapes[key]} is not saved in full")
        return whole if first is None else whole[0]

    def _read(self, key: str, offsets: tuple[int, ...] | None) -> Any:
        info = self._places.get((key, offsets))
        if info is None:
            raise UserError(f"{self.directory} is damaged: its metadata do not say where '{key}' lies")
        name, offset, length = (info.fields[field] for field in ("relative_path", "offset", "length"))
        if info.fields.get("transform_descriptors"):
            raise UserError(f"{self.directory / name} is compressed, which is not supported; save checkpoints without a transformation")
        path = self.directory / name
        return read(TorchArchive(path, offset, length), f"{path}, '{key}'")


def _chunk(record: Record) -> Chunk:
    return Chunk(tuple(record.fields["offsets"]), tuple(record.fields["sizes"]))


def _place(index: Record) -> tuple[str, tuple[int, ...] | None]:
    offset = index.fields.get("offset")
    return index.fields["fqn"], None if offset is None else tuple(offset)
