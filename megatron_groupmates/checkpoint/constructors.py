"""The closed list of names a checkpoint may mention, and the harmless thing each one becomes."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class Refused(Exception):
    """A name or instruction outside the closed list; the text is the name."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A class or function that the file mentions. Not the thing itself, and not callable."""

    full: str


@dataclasses.dataclass(eq=False)
class Record:
    """An object of a class that is read as data: constructor arguments and attributes, no behaviour."""

    type_name: str
    args: tuple[Any, ...] = ()
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StorageType:
    """Element type of a storage."""

    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes of a storage, mapped from the file."""

    raw: torch.Tensor
    dtype: torch.dtype

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """One-dimensional view; a copy where the file does not align the storage to its elements."""
        aligned = self.raw if self.raw.storage_offset() % dtype.itemsize == 0 else self.raw.clone()
        return aligned.view(dtype)


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint8", "bool")
VALUES: dict[str, Any] = {
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
    **{f"torch.{name}": getattr(torch, name) for name in _DTYPES},
}

_DISTRIBUTED_METADATA = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
)
# Classes that DeepSpeed, Megatron and argparse users store whole; instances become records.
_RECORDS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "builtins.object",
    "_io.BytesIO",
    "signal.Signals",
    "numpy.ndarray",
    "torch.device",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in _DISTRIBUTED_METADATA),
    *(f"torch.distributed.checkpoint.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "megatron.model.enums.AttnMaskType",
    "megatron.model.enums.AttnType",
    "megatron.model.enums.LayerType",
    "megatron.model.enums.PositionEmbeddingType",
    "megatron.core.enums.ModelType",
    "megatron.core.enums.Fp4Recipe",
    "megatron.core.enums.Fp8Recipe",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnType",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.enums.ModelType",
)


def _record(name: Name, *args: Any) -> Record:
    return Record(name.full, args)


def _tensor(_: Name, storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    """``_rebuild_tensor_v2`` and v3: a view of the mapped storage; v3 names its dtype after requires_grad and hooks."""
    if type(storage) is not Storage:
        raise ValueError(f"a tensor of {type(storage).__name__}")
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype
    elements = storage.typed(dtype)
    if min(offset, *size, *stride, 0) < 0 or len(size) != len(stride):
        raise ValueError(f"a tensor of shape {tuple(size)}, strides {tuple(stride)}, offset {offset}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= elements.numel():
        raise ValueError(f"a tensor that ends at element {last} of a storage of {elements.numel()}")
    return elements.as_strided(tuple(size), tuple(stride), elements.storage_offset() + offset)


def _parameter(_: Name, data: torch.Tensor, *rest: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise ValueError(f"a parameter of {type(data).__name__}")
    return data


def _tensor_with_attributes(_: Name, rebuild: Name, __: Name, arguments: tuple[Any, ...], *state: Any) -> torch.Tensor:
    """A tensor that had attributes, such as megatron-core's ``tensor_model_parallel``; they are dropped."""
    if type(rebuild) is not Name or rebuild.full not in _TENSORS:
        raise Refused(getattr(rebuild, "full", type(rebuild).__name__))
    return _TENSORS[rebuild.full](rebuild, *arguments)


def _numpy_dtype(_: Name, code: str, *flags: Any) -> np.dtype[Any]:
    if not isinstance(code, str) or not re.fullmatch(r"[<|=]?[biufcSU?]\d*", code):
        raise Refused(f"numpy dtype {code!r}")
    return np.dtype(code)


def _numpy_array(_: Name, *args: Any) -> np.ndarray:
    """An empty array; the BUILD that follows gives it shape, dtype and content."""
    return np.ndarray((0,), np.uint8)


def _numpy_scalar(_: Name, dtype: np.dtype[Any], content: bytes) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or type(content) is not bytes:
        raise Refused("numpy scalar of objects")
    return np.frombuffer(content, dtype)[0]


def _encode(_: Name, text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _defaultdict(_: Name, *factory: Any) -> dict[Any, Any]:
    return {}


def _container(kind: Callable[..., Any]) -> Callable[..., Any]:
    def build(_: Name, *args: Any) -> Any:
        plain = (list, tuple, set, dict, OrderedDict, bytes, int, float, str)
        if any(type(argument) not in plain for argument in args):
            raise ValueError(f"{kind.__name__} of {[type(argument).__name__ for argument in args]}")
        return kind(*args)

    return build


def _byte_string(_: Name, *args: Any) -> bytes:
    # Only the forms that pickle writes: bytes(10**12) would allocate as much.
    if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin-1":
        return args[0].encode("latin-1")
    if args and type(args[0]) not in (list, bytes):
        raise ValueError(f"bytes from {type(args[0]).__name__}")
    return bytes(*args)


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_RECORDS, _record),
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Size": _container(torch.Size),
    "collections.OrderedDict": _container(OrderedDict),
    "collections.defaultdict": _defaultdict,
    "builtins.dict": _container(dict),
    "builtins.list": _container(list),
    "builtins.set": _container(set),
    "builtins.frozenset": _container(frozenset),
    "builtins.complex": _container(complex),
    "builtins.slice": _record,
    "builtins.bytes": _byte_string,
    "builtins.bytearray": _byte_string,
    "_codecs.encode": _encode,
    "pathlib.PosixPath": _container(pathlib.PurePosixPath),
    "numpy.dtype": _numpy_dtype,
    **{
        f"numpy.{core}.multiarray.{name}": function
        for core in ("core", "_core")
        for name, function in (("_reconstruct", _numpy_array), ("scalar", _numpy_scalar))
    },
}
