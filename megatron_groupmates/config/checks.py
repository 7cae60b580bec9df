"""Rules that span sections. Pure arithmetic on settings: the trainer, the server and a laptop check the same file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.config.schedule import decay_end, wsd_decay_steps
from megatron_groupmates.config.sections import Config, ModelConfig


def check_config(config: Config) -> None:
    """Refuse combinations that cannot run.

    Raises:
        UserError: naming the settings by dotted path, both values and what to change.
    """
    _check_model(config)
    _check_places(config)
    _check_storage(config)
    _check_batches(config)
    _check_schedule(config)
    if config.selection.enabled:
        _check_selection(config)


def check_world_size(config: Config, world_size: int) -> int:
    """The data-parallel size of a trainer with ``world_size`` ranks.

    Raises:
        UserError: when the ranks do not divide into tensor-parallel groups or the batch not over them.
    """
    tensor = config.parallel.tensor_model_parallel_size
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor_model_parallel_size: {tensor} does not divide the {world_size} started ranks; start a multiple of {tensor}"
        )
    data = world_size // tensor
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    if batch % (micro * data):
        raise UserError(
            f"training.global_batch_size: {batch} is not a multiple of micro_batch_size {micro} x data-parallel size {data} "
            f"({world_size} ranks / tensor_model_parallel_size {tensor}); choose a multiple of {micro * data}"
        )
    return data


def server_tensor_parallel_size(config: Config) -> int:
    """Ranks per oracle worker."""
    return config.server.tensor_model_parallel_size or config.parallel.tensor_model_parallel_size


def _check_model(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    groups = model.num_query_groups or model.num_attention_heads
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"model.hidden_size: {model.hidden_size} is not a multiple of model.num_attention_heads {model.num_attention_heads}"
        )
    _check_positions(model)
    if model.num_attention_heads % groups:
        raise UserError(f"model.num_query_groups: {groups} does not divide model.num_attention_heads {model.num_attention_heads}")
    for parallel, where in ((tensor, "parallel"), (server_tensor_parallel_size(config), "server")):
        path = f"{where}.tensor_model_parallel_size"
        if groups % parallel:
            raise UserError(f"{path}: {parallel} does not divide the {groups} query groups of the model")
        if model.vocab_size % parallel:
            raise UserError(
                f"{path}: {parallel} does not divide model.vocab_size {model.vocab_size}; pad the vocabulary to a multiple of {parallel}"
            )
        if ffn_hidden_size(config) % parallel:
            raise UserError(f"{path}: {parallel} does not divide the MLP width {ffn_hidden_size(config)}")


def _check_positions(model: ModelConfig) -> None:
    if model.position_embedding_type == "learned_absolute":
        rows = model.max_position_embeddings
        if rows is not None and rows < model.sequence_length:
            raise UserError(
                f"model.max_position_embeddings: {rows} positions are fewer than the {model.sequence_length} tokens of "
                "model.sequence_length; raise it, or leave it unset"
            )
        return
    head = model.hidden_size // model.num_attention_heads
    rotated = int(head * model.rotary_percent)
    if rotated % 2 and rotated == head:
        raise UserError(
            f"model.num_attention_heads: {model.num_attention_heads} gives heads of odd size {head}; rotary embeddings need an even size"
        )
    if rotated % 2 or not rotated:
        raise UserError(
            f"model.rotary_percent: {model.rotary_percent} of heads of size {head} rotates {rotated} of their dimensions; "
            "choose a share that makes it an even number above 0"
        )


def has_gated_mlp(config: Config) -> bool:
    """Whether the first matrix of the MLP is two, gate and up."""
    return config.model.activation == "swiglu"


def num_positions(config: Config) -> int:
    """Positions that the model has: rows of its table of them where they are learned."""
    return config.model.max_position_embeddings or config.model.sequence_length


def ffn_hidden_size(config: Config) -> int:
    """MLP width: as set, or for swiglu DCLM's rule (8/3 of the hidden size, rounded up to a multiple of 256), else 4 times that size."""
    if config.model.ffn_hidden_size is not None:
        return config.model.ffn_hidden_size
    if not has_gated_mlp(config):
        return 4 * config.model.hidden_size
    return 256 * ((8 * config.model.hidden_size // 3 + 255) // 256)


def _check_places(config: Config) -> None:
    if config.checkpoint.format != "groupmates":
        return
    for path, value in (("checkpoint.directory", config.checkpoint.directory), ("run.selection_dir", config.run.selection_dir)):
        if value is not None:
            raise UserError(
                f"{path}: {value}: this trainer keeps everything in run.output_dir, so that a run can branch from another by its directory "
                "alone; leave it out (a checkout of your own sets it)"
            )


def _check_storage(config: Config) -> None:
    for protocol, options in (config.data.storage_options or {}).items():
        if not isinstance(options, dict):
            raise UserError(
                f"data.storage_options: {protocol}: {options!r} is not a mapping of arguments; "
                "write {protocol: {argument: value}}, such as {s3: {endpoint_url: ...}}"
            )


def _check_batches(config: Config) -> None:
    training = config.training
    if training.global_batch_size % training.micro_batch_size:
        raise UserError(
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size {training.micro_batch_size}"
        )
    tensor, length = config.parallel.tensor_model_parallel_size, config.model.sequence_length
    if config.parallel.sequence_parallel and length % tensor:
        raise UserError(
            f"parallel.sequence_parallel: model.sequence_length {length} does not divide over parallel.tensor_model_parallel_size {tensor} "
            f"ranks; choose a multiple of {tensor}, or parallel.sequence_parallel=false"
        )


def _check_schedule(config: Config) -> None:
    optimizer, decay = config.optimizer, decay_end(config)
    if optimizer.warmup_iters > decay:
        raise UserError(f"optimizer.warmup_iters: {optimizer.warmup_iters} is longer than the schedule ({decay} steps)")
    falling = wsd_decay_steps(optimizer.decay_fraction, decay)
    if optimizer.schedule == "wsd" and optimizer.warmup_iters + falling > decay:
        raise UserError(
            f"optimizer.decay_fraction: {optimizer.decay_fraction} of {decay} steps is {falling} steps of decay, which begin before "
            f"the {optimizer.warmup_iters} steps of optimizer.warmup_iters end; lower one of them"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate: {optimizer.min_learning_rate} is above optimizer.learning_rate {optimizer.learning_rate}"
        )


def _check_selection(config: Config) -> None:
    selection = config.selection
    check_share_values(selection.minimum_source_share or {})
    if config.data.reference is None and selection.method != "random":
        raise UserError(
            f"data.reference: required by selection.method {selection.method!r}: the held-out examples whose loss selection minimises"
        )
    if selection.ratio == 0.0:
        raise UserError("selection.ratio: 0 selects nothing; use a share above 0 and at most 1")
    if selection.max_staleness_steps is not None and selection.mode != "async":
        raise UserError(f"selection.max_staleness_steps: only async mode uses it, selection.mode is {selection.mode!r}; unset it")
    if selection.recipe == "paper":
        for path, value, paper in (
            ("relational.labels", config.relational.labels, "increments"),
            ("relational.standardisation", config.relational.standardisation, "pooled"),
            ("relational.relation", config.relational.relation, "product"),
            ("oracle.estimator", config.oracle.estimator, "exact"),
            ("oracle.budget", config.oracle.budget, "fixed"),
            ("oracle.bootstrap", config.oracle.bootstrap, "plain"),
            ("selection.share_per_cluster", config.selection.share_per_cluster, "equal"),
        ):
            if value not in ("auto", paper):
                raise UserError(f"{path}: {value!r} is not the paper's choice ({paper!r}); use it with selection.recipe=default")
    _check_encoder_training(config)
    if config.oracle.num_candidates < config.oracle.rollout_length:
        raise UserError(
            f"oracle.num_candidates: {config.oracle.num_candidates} is below oracle.rollout_length {config.oracle.rollout_length}"
        )


def _check_encoder_training(config: Config) -> None:
    encoder, finetune = config.relational.encoder, config.relational.finetune_encoder
    if encoder == "probe" and finetune == "yes":
        raise UserError(
            "relational.finetune_encoder: yes, but relational.encoder 'probe' is the checkpoint whose data is being selected and is "
            "not trained here; name a Hugging Face encoder or use auto"
        )
    if encoder != "probe" and finetune == "no" and config.selection.recipe == "paper":
        raise UserError(
            f"relational.finetune_encoder: no, but the paper's recipe trains the encoder {encoder!r}; use auto or selection.recipe=default"
        )


def check_share_values(shares: Mapping[str, Any]) -> None:
    """Raise UserError for a ``selection.minimum_source_share`` that is no number from 0 to 1, or where they sum above 1."""
    for kind, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"selection.minimum_source_share: {kind}: {share!r} is not a share of the budget; give a number from 0 to 1")
    if (total := math.fsum(shares.values())) > 1:
        raise UserError(f"selection.minimum_source_share: the shares sum to {total:g}, above the whole budget; lower them to 1 at most")
