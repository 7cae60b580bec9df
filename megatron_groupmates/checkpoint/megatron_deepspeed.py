"""Checkpoints of a Megatron-DeepSpeed checkout, as megatron-core would have named and laid out their parameters.

Its attention holds, on each tensor-parallel rank, all queries, then all keys, then all values of the rank's heads, where
megatron-core holds one head after the other, each with its query, key and value. All else is laid out alike.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_groupmates.checkpoint import layout, partitions
from megatron_groupmates.checkpoint.constructors import Record
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config.errors import UserError
from megatron_groupmates.config.forks import left_out_of_oracles

_NAMES = (
    (r"language_model\.embedding\.(word|position)_embeddings\.weight", r"embedding.\1_embeddings.weight"),
    (r"language_model\.output_layer\.weight", r"output_layer.weight"),
    (r"language_model\.encoder\.final_layernorm\.(weight|bias)", r"decoder.final_layernorm.\1"),
    (r"language_model\.encoder\.layers\.(\d+)\.input_layernorm\.(weight|bias)", r"decoder.layers.\1.input_layernorm.\2"),
    (r"language_model\.encoder\.layers\.(\d+)\.post_attention_layernorm\.(weight|bias)", r"decoder.layers.\1.pre_mlp_layernorm.\2"),
    (
        r"language_model\.encoder\.layers\.(\d+)\.self_attention\.query_key_value\.(weight|bias)",
        r"decoder.layers.\1.self_attention.linear_qkv.\2",
    ),
    (r"language_model\.encoder\.layers\.(\d+)\.self_attention\.dense\.(weight|bias)", r"decoder.layers.\1.self_attention.linear_proj.\2"),
    (r"language_model\.encoder\.layers\.(\d+)\.mlp\.dense_h_to_4h\.(weight|bias)", r"decoder.layers.\1.mlp.linear_fc1.\2"),
    (r"language_model\.encoder\.layers\.(\d+)\.mlp\.dense_4h_to_h\.(weight|bias)", r"decoder.layers.\1.mlp.linear_fc2.\2"),
)
_QUERY_KEY_VALUE = re.compile(r"\.linear_qkv\.(weight|bias)$")


class MegatronDeepSpeedCheckpoint(ZeroCheckpoint):
    """Reader of one tag that a Megatron-DeepSpeed checkout saved without its pipeline engine.

    Its parsed arguments are read as data: ``client_state["args"].fields``.

    Args:
        tag_dir: directory with the files.

    Raises:
        UserError: as :class:`ZeroCheckpoint`, and when it is not of a Megatron-DeepSpeed GPT.
    """

    def __init__(self, tag_dir: Path | str) -> None:
        self._saved: dict[str, str] = {}
        super().__init__(tag_dir)
        args = self.client_state.get("args")
        if not isinstance(args, Record) or "iteration" not in self.client_state:
            raise UserError(f"checkpoint {self.path} was not saved by Megatron-DeepSpeed: it holds no arguments of one (checkpoint.format)")
        self._saved = {megatron_core_name(name): name for name in self.names}
        self.names = list(self._saved)
        for group in self.param_groups:
            group["param_names"] = [megatron_core_name(name) for name in group["param_names"]]
        self.step = int(self.client_state["iteration"])
        self.client_state["gated_linear_unit"] = bool(args.fields["swiglu"])
        self._heads: int = args.fields["num_attention_heads"]

    @property
    def consumed_train_samples(self) -> int:
        """Samples that training had taken when it saved this."""
        return int(self.client_state["args"].fields["consumed_train_samples"])

    @property
    def next_learning_rate(self) -> float:
        """Of the next optimizer step: the checkout sets it right after each step."""
        return float(self.param_groups[0]["lr"])

    @property
    def left_out_of_oracles(self) -> list[str]:
        """One line for each thing that this trainer does and an oracle's step does not."""
        return left_out_of_oracles(self.client_state["args"].fields)

    def _parameter(self, name: str, rank: int) -> partitions.LocalParameter:
        return super()._parameter(self._saved.get(name, name), rank)

    def _plan(self, name: str, rank: int, size: int, vocabulary_rows: int | None) -> tuple[tuple[int, ...], int, list[layout.Piece]]:
        if not _QUERY_KEY_VALUE.search(name):
            return super()._plan(name, rank, size, vocabulary_rows)
        rows, *columns = self.shape(name)
        found = query_key_value_pieces(rows, self._heads, self.tensor_model_parallel_size, rank, size)
        return (rows // size, *columns), 0, found


def megatron_core_name(name: str) -> str:
    """megatron-core's name of a parameter of Megatron-DeepSpeed's GPT.

    Raises:
        UserError: for any other name.
    """
    for pattern, replacement in _NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise UserError(f"parameter '{name}' is not one of Megatron-DeepSpeed's GPT: the selection server has no place for it")


def query_key_value_pieces(rows: int, heads: int, saved_size: int, rank: int, size: int) -> list[layout.Piece]:
    """Where the rows of attention's first matrix that rank ``rank`` of ``size`` holds in megatron-core's order are saved.

    Args:
        rows: of the whole matrix: queries, keys and values of as many heads each.
        heads: of the model.
        saved_size: tensor-parallel size it was saved at.
        rank: wanted rank.
        size: wanted tensor-parallel size.

    Raises:
        UserError: when the heads cannot be divided over the ranks.
    """
    if heads % size:
        raise UserError(
            f"{heads} attention heads cannot be divided over {size} tensor-parallel ranks; choose a tensor_model_parallel_size that does"
        )
    per_head, held, wanted = rows // (3 * heads), heads // saved_size, heads // size
    return [
        layout.Piece(head // held, (part * held + head % held) * per_head, per_head)
        for head in range(rank * wanted, (rank + 1) * wanted)
        for part in range(3)
    ]
