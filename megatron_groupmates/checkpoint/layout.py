"""How megatron-core splits each GPT parameter over tensor-parallel ranks. Pure functions; nothing is read or sent.

Attention's ``linear_qkv`` holds query groups one after the other, each with its queries, its key and its value, and a
rank holds whole groups, so plain concatenation merges it (the number of query groups must be a multiple of the
tensor-parallel size). A gated MLP's ``linear_fc1`` holds two matrices, gate and up, and each rank holds its part of
both: ``[gate_r; up_r]``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import torch

from megatron_groupmates.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a parameter is split.

    Attributes:
        dim: dimension that is divided, None for a parameter every rank holds whole.
        parts: matrices stacked along ``dim``, each divided on its own.
    """

    dim: int | None
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """``length`` indices from ``start`` along the divided dimension of what rank ``rank`` holds."""

    rank: int
    start: int
    length: int


_VOCABULARY = re.compile(r"(^|\.)(word_embeddings|output_layer)\.(weight|bias)$")
_ROW_OF_COLUMNS = re.compile(r"(^|\.)(linear_proj|linear_fc2)\.weight$")
_FIRST_MLP = re.compile(r"(^|\.)linear_fc1\.(weight|bias)$")
_FIRST_DIMENSION = re.compile(r"(^|\.)linear_qkv\.(weight|bias)$")
# 'layer_norm_weight' is a norm that Transformer Engine fuses into the linear layer after it.
_REPLICATED = re.compile(
    r"(^|\.)((\w*layernorm|position_embeddings)\.(weight|bias)"
    r"|(linear_qkv|linear_fc1)\.layer_norm_(weight|bias)|(linear_proj|linear_fc2)\.bias)$"
)


def is_vocabulary(name: str) -> bool:
    """True for the word embeddings and the output layer, whose rows are (padded) vocabulary entries."""
    return _VOCABULARY.search(name) is not None


def split_dimension(name: str) -> int | None:
    """The dimension of parameter ``name`` that tensor parallelism divides; None when every rank holds all of it.

    Raises:
        UserError: for a name that is not a parameter of megatron-core's GPT.
    """
    if _VOCABULARY.search(name) or _FIRST_DIMENSION.search(name) or _FIRST_MLP.search(name):
        return 0
    if _ROW_OF_COLUMNS.search(name):
        return 1
    if _REPLICATED.search(name):
        return None
    raise UserError(
        f"parameter '{name}' is not one of megatron-core's GPT: how tensor parallelism splits it is "
        "unknown; read the checkpoint at the tensor-parallel size it was saved with"
    )


def layout_of(name: str, gated: bool | None) -> Layout:
    """The layout of parameter ``name``.

    Args:
        name: as in the model's ``named_parameters()``.
        gated: whether the MLP is gated (SwiGLU), None when that is not known.

    Raises:
        UserError: for an unknown name, and for ``linear_fc1`` when ``gated`` is None.
    """
    dim = split_dimension(name)
    if not _FIRST_MLP.search(name):
        return Layout(dim)
    if gated is None:
        raise UserError(
            f"'{name}' is split differently in a gated MLP (SwiGLU) and a plain one, and the checkpoint does "
            "not say which it is; save it with client_state['gated_linear_unit'] set to True or False"
        )
    return Layout(dim, parts=2 if gated else 1)


def pieces(layout: Layout, full_length: int, saved_size: int, rank: int, size: int) -> list[Piece]:
    """Where the slice of rank ``rank`` of ``size`` lies in what ``saved_size`` ranks hold, in order.

    Args:
        layout: of the parameter; divided.
        full_length: length of the divided dimension of the whole parameter.
        saved_size: tensor-parallel size it is held at.
        rank: wanted rank.
        size: wanted tensor-parallel size.

    Raises:
        UserError: when either size does not divide the dimension.
    """
    for ranks in (saved_size, size):
        if full_length % (layout.parts * ranks):
            stacked = f" in each of {layout.parts} stacked matrices" if layout.parts > 1 else ""
            raise UserError(
                f"{full_length} rows cannot be divided over {ranks} tensor-parallel ranks{stacked}; "
                "choose a tensor_model_parallel_size that divides them"
            )
    part = full_length // layout.parts
    held, wanted = part // saved_size, part // size
    return [
        Piece(piece.rank, index * held + piece.start, piece.length)
        for index in range(layout.parts)
        for piece in _cut(rank * wanted, (rank + 1) * wanted, held)
    ]


def vocabulary_pieces(saved_rows: int, rows: int, saved_size: int, rank: int, size: int) -> tuple[list[Piece], int]:
    """As :func:`pieces` for a vocabulary that is padded to ``rows`` when read and was to ``saved_rows`` when saved.

    Megatron pads it to a multiple that depends on the tensor-parallel size. ``rows`` must not be below the number of
    real tokens: the rows of a checkpoint do not tell which of them are padding.

    Returns:
        The pieces, and how many rows of zeros follow them.

    Raises:
        UserError: when ``size`` does not divide ``rows``.
    """
    if rows % size:
        raise UserError(f"a vocabulary of {rows} rows cannot be divided over {size} tensor-parallel ranks; pad it to a multiple of {size}")
    wanted = rows // size
    start, stop = (min(index * wanted, saved_rows) for index in (rank, rank + 1))
    return list(_cut(start, stop, saved_rows // saved_size)), wanted - (stop - start)


def _cut(start: int, stop: int, held: int) -> Iterator[Piece]:
    """Cut the range ``start`` to ``stop`` at the borders of ranks that hold ``held`` indices each."""
    while start < stop:
        source, offset = divmod(start, held)
        length = min(held - offset, stop - start)
        yield Piece(source, offset, length)
        start += length


def split(tensor: torch.Tensor, layout: Layout, rank: int, size: int) -> torch.Tensor:
    """The slice of the whole ``tensor`` that rank ``rank`` of ``size`` holds.

    Raises:
        UserError: when ``size`` does not divide the dimension.
    """
    if layout.dim is None:
        return tensor
    found = pieces(layout, tensor.shape[layout.dim], 1, rank, size)
    return torch.cat([tensor.narrow(layout.dim, piece.start, piece.length) for piece in found], layout.dim)


def merge(slices: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    """The whole tensor from the slices of all ranks, in rank order; the first one when it is not divided.

    Raises:
        UserError: when the slices' dimension is not a multiple of the stacked matrices.
    """
    if layout.dim is None:
        return slices[0]
    full_length = sum(part.shape[layout.dim] for part in slices)
    found = pieces(layout, full_length, len(slices), 0, 1)
    return torch.cat([slices[piece.rank].narrow(layout.dim, piece.start, piece.length) for piece in found], layout.dim)
