"""Every setting of a run, one frozen dataclass per component. Pure: no I/O, no CUDA, no torch.distributed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

REQUIRED: Any = dataclasses.MISSING


def setting(
    default: Any,
    explanation: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its explanation, its range and whether a resumed run may differ in it."""
    metadata = {"help": explanation, "minimum": minimum, "maximum": maximum, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what it is called."""

    output_dir: str = setting(REQUIRED, "run directory: checkpoints, selection, metrics and report", may_change=True)
    selection_dir: str | None = setting(
        None, "generations, their log and the server's rounds; <output_dir>/selection when unset", may_change=True
    )
    name: str = setting("run", "name shown in reports and W&B", may_change=True)
    seed: int = setting(1234, "seed of initial weights, sample order and every random choice of the selection", minimum=0)
    wandb_mode: Literal["offline", "online", "disabled"] = setting("offline", "where metrics go besides metrics.jsonl", may_change=True)
    wandb_project: str = setting("megatron_groupmates", "W&B project", may_change=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the megatron-core GPT; by default SwiGLU, rotary, QK-norm, RMS norms, no biases, untied output. Megatron's names."""

    num_layers: int = setting(REQUIRED, "transformer layers", minimum=1)
    hidden_size: int = setting(REQUIRED, "width of the residual stream", minimum=8)
    num_attention_heads: int = setting(REQUIRED, "attention heads", minimum=1)
    num_query_groups: int | None = setting(None, "key/value heads (grouped-query attention); the attention heads when unset", minimum=1)
    ffn_hidden_size: int | None = setting(
        None, "MLP width; when unset 8/3 of hidden_size rounded up to 256 (DCLM's rule) for swiglu, else 4 x hidden_size", minimum=8
    )
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = setting("swiglu", "of the MLP; gelu_tanh: gelu by its tanh approximation")
    normalization: Literal["RMSNorm", "LayerNorm"] = setting("RMSNorm", "of the residual stream")
    qk_layernorm: bool = setting(True, "norms of queries and keys")
    add_bias_linear: bool = setting(False, "biases in the linear layers of attention and MLP")
    position_embedding_type: Literal["rope", "learned_absolute"] = setting("rope", "how positions enter")
    rotary_percent: float = setting(1.0, "rope: share of each head's dimensions that is rotated", minimum=0.0, maximum=1.0)
    rotary_angles: Literal["positions", "cosines"] = setting(
        "positions",
        "rope: angles that queries and keys are rotated by: position x frequency, or the cosines of those, which is what "
        "Megatron-DeepSpeed computes since it caches rotary embeddings",
    )
    max_position_embeddings: int | None = setting(
        None, "learned_absolute: rows of the table of positions; sequence_length when unset", minimum=1
    )
    untie_embeddings_and_output_weights: bool = setting(True, "an output layer of its own instead of the word embeddings")
    sequence_length: int = setting(2048, "tokens per training sequence", minimum=2)
    vocab_size: int = setting(50432, "rows of the embedding, padding included", minimum=2)
    rotary_base: int = setting(10000, "base of the rotary position embedding", minimum=2)
    norm_epsilon: float = setting(1e-5, "epsilon of the norms", minimum=0.0)
    init_std: float = setting(0.02, "standard deviation of the initial weights", minimum=0.0)
    z_loss: float = setting(0.0, "coefficient of the squared log-partition term in the training loss (DCLM: 1e-4)", minimum=0.0)
    transformer_engine: Literal["auto", "off"] = setting("auto", "use Transformer Engine layers where it is installed and a GPU is present")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over processes; the rest of the world is data parallel (or oracle workers)."""

    tensor_model_parallel_size: int = setting(1, "ranks that share each layer", minimum=1, may_change=True)
    sequence_parallel: bool = setting(
        False, "Megatron's sequence parallelism: tensor-parallel ranks share the activations between layers too", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Pools written by tools/preprocess_dclm.py or indexed by tools/index_pool.py; held-out sets also by tools/make_reference.py."""

    pool: str = setting(REQUIRED, "candidate samples", may_change=True)
    evaluation: str | None = setting(
        None, "held-out pool or reference set for the evaluation loss; selection never sees it", may_change=True
    )
    reference: str | None = setting(None, "held-out pool or reference set whose loss the selection minimises (D_ref)", may_change=True)
    exclude: str | None = setting(
        None, "exclusion file of tools/check_contamination.py: samples of the pool that no generation may serve; fixed for a run"
    )
    packing: Literal["none", "documents"] = setting(
        "none",
        "none: each sample of the pool is one training sequence; documents: sequences are cut from the stream of the pool's documents",
    )
    reset_attention_mask: bool = setting(False, "tokens attend only to their own document; documents end at the end-of-text token")
    reset_position_ids: bool = setting(False, "positions begin at 0 again in each document of a sequence")
    eod_mask_loss: bool = setting(
        False, "no loss where the input is the end-of-text token, that is on the first token of the next document"
    )
    on_damaged_sample: Literal["raise", "skip"] = setting(
        "raise",
        "a sample that cannot be read ends training, or end-of-text tokens without loss take its place, as skipped.jsonl records",
        may_change=True,
    )
    max_skipped_samples: int = setting(
        100, "skipped samples of the whole run, counted once per sequence they are part of, above which it ends", minimum=0, may_change=True
    )
    cache_directory: str = setting(
        "~/.cache/megatron_groupmates", "remote pools: where this host keeps copies of indices and samples", may_change=True
    )
    cache_bytes: int = setting(
        10 << 30,
        "remote pools: disk space for samples read, which later reads then find; 0 keeps none",
        minimum=0,
        may_change=True,
    )
    storage_options: Mapping[str, Any] | None = setting(
        None,
        "remote pools: arguments of fsspec file systems by protocol, such as {s3: {endpoint_url: ...}}; "
        "written into the run directory, so leave secrets to the store's own credential files",
        may_change=True,
    )
    num_workers: int = setting(2, "DataLoader processes per rank; 0 reads in the training process", minimum=0, may_change=True)
    prefetch_factor: int = setting(4, "micro-batches each DataLoader process reads ahead", minimum=1, may_change=True)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batches, length, precision and what is logged."""

    train_iters: int = setting(REQUIRED, "optimizer steps of the whole run", minimum=1, may_change=True)
    global_batch_size: int = setting(REQUIRED, "sequences per optimizer step over all ranks", minimum=1)
    micro_batch_size: int = setting(REQUIRED, "sequences per forward pass and rank", minimum=1, may_change=True)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: bf16 on GPU, fp32 on CPU")
    recompute_granularity: Literal["none", "selective", "full"] = setting(
        "none",
        "activation checkpointing: recompute nothing, attention alone (selective) or whole layers (full) in the backward pass",
        may_change=True,
    )
    gradient_clipping: float = setting(1.0, "largest global gradient norm; 0 switches clipping off", minimum=0.0)
    log_interval: int = setting(10, "steps between lines in metrics.jsonl", minimum=1, may_change=True)
    eval_interval: int = setting(100, "steps between evaluations", minimum=1, may_change=True)
    eval_samples: int | None = setting(None, "evaluation samples used, from the first; all when unset", minimum=1, may_change=True)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under DeepSpeed ZeRO, and its learning-rate schedule."""

    learning_rate: float = setting(3e-3, "peak learning rate", minimum=0.0)
    min_learning_rate: float = setting(3e-5, "learning rate at the end of the decay (DCLM's cd)", minimum=0.0)
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "decay after the warm-up; wsd: stable, then linear over decay_fraction"
    )
    warmup_iters: int = setting(0, "steps of linear warm-up", minimum=0)
    decay_iters: int | None = setting(None, "step at which the decay ends; train_iters when unset", minimum=1, may_change=True)
    decay_fraction: float = setting(0.2, "wsd: share of decay_iters spent decaying", minimum=0.0, maximum=1.0)
    weight_decay: float = setting(0.033, "decoupled weight decay of matrices and embeddings; norms and biases have none", minimum=0.0)
    beta1: float = setting(0.9, "AdamW beta1", minimum=0.0, maximum=0.9999999)
    beta2: float = setting(0.95, "AdamW beta2", minimum=0.0, maximum=0.9999999)
    epsilon: float = setting(1e-8, "AdamW epsilon", minimum=0.0)
    zero_stage: Literal[0, 1, 2, 3] = setting(1, "DeepSpeed ZeRO stage", may_change=True)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """DeepSpeed checkpoints in <output_dir>/checkpoints, or those of a trainer of the user's own."""

    directory: str | None = setting(None, "where the checkpoints are; <output_dir>/checkpoints when unset", may_change=True)
    format: Literal["groupmates", "megatron_deepspeed", "megatron_lm"] = setting(
        "groupmates", "who trains: this package, or a checkout of Megatron-DeepSpeed or Megatron-LM (then written by the integration)"
    )
    save_interval: int = setting(1000, "steps between checkpoints; planned selection refreshes always save one", minimum=1, may_change=True)
    load: str | None = setting(
        None, "another run's checkpoint directory to branch from when this run has none of its own yet", may_change=True
    )
    load_tag: str | None = setting(None, "tag to branch from; the one named by 'latest' when unset", may_change=True)


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """When and how the training data are re-selected (paper sections 3 and 4)."""

    enabled: bool = setting(False, "off: the trainer reads the whole pool in one seeded order and imports no selection code")
    mode: Literal["async", "blocking", "inline"] = setting(
        "async",
        "async: adopt when ready; blocking: wait at each refresh; "
        "inline: the trainer ends at each refresh so that the same GPUs can select",
    )
    method: Literal["group", "individual", "similarity", "random"] = setting("group", "what the server selects by")
    recipe: Literal["default", "paper"] = setting("default", "paper: the published choices throughout; default: the measured better ones")
    ratio: float = setting(0.5, "share of the unconsumed pool, by tokens, that a round keeps", minimum=0.0, maximum=1.0)
    first_refresh_step: int = setting(1000, "step whose checkpoint starts the first round (after the warm-up on random data)", minimum=1)
    refresh_interval: int = setting(10000, "steps between rounds", minimum=1)
    max_refreshes: int | None = setting(None, "rounds in the whole run; as many as fit when unset", minimum=0)
    poll_interval_steps: int = setting(1, "steps between looks at the selection pointer", minimum=1, may_change=True)
    max_staleness_steps: int | None = setting(
        None,
        "async: steps the trainer may run past a refresh before it waits for its generation; never waits when unset",
        minimum=0,
        may_change=True,
    )
    wait_timeout_seconds: float = setting(
        3600.0,
        "longest such wait (and blocking wait); then training goes on with what it has",
        minimum=0.0,
        may_change=True,
    )
    num_clusters: int | None = setting(
        None, "clusters of the pool; about one per 3,000 samples (the paper's density) when unset", minimum=1
    )
    kmeans_iterations: int = setting(100, "iterations of spherical k-means", minimum=1)
    share_per_cluster: Literal["auto", "equal", "global"] = setting(
        "auto",
        "group: equal takes the same share of each cluster; global lets clusters compete for one budget by the score of their next "
        "sample; auto follows the recipe",
    )
    minimum_source_share: Mapping[str, Any] | None = setting(
        None, "least share of the budget's tokens that a kind of source of the pool gets, such as {code: 0.05}"
    )
    gumbel_temperature: float = setting(0.0, "individual: temperature of Gumbel top-k; 0 takes the lowest influences", minimum=0.0)


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """Oracle data influences measured from the checkpoint (paper section 3.1)."""

    estimator: Literal["auto", "exact", "first_order", "directional"] = setting(
        "auto",
        "exact: reference loss after every step; first_order: reference gradient times parameter change, far cheaper; "
        "directional: each candidate's loss along the reference gradient, no steps, beside exact rollouts for the relations; "
        "auto follows the recipe: exact for the paper's, else first_order",
    )
    estimator_floor: float = setting(
        0.5, "rank correlation with exact increments below which a round falls back to exact", minimum=-1.0, maximum=1.0
    )
    validation_share: float = setting(
        0.05, "share of random rollouts that a cheaper estimator also measures exactly, each round", minimum=0.001, maximum=0.5
    )
    rollout_length: int = setting(10, "steps per rollout (T)", minimum=2)
    num_random_rollouts: int = setting(20000, "random rollouts per round", minimum=4)
    budget: Literal["fixed", "adaptive"] = setting(
        "fixed", "fixed: num_random_rollouts (the paper's); adaptive: at most so many, until the held-out fit stops improving"
    )
    budget_batch: int = setting(128, "adaptive budget: random rollouts between fits", minimum=4)
    budget_patience: int = setting(3, "adaptive budget: batches without a better held-out Spearman before collection stops", minimum=1)
    num_bootstrap_rollouts: int = setting(20000, "bootstrap rollouts per round, half lowest and half highest", minimum=0)
    bootstrap: Literal["auto", "plain", "diverse"] = setting(
        "auto",
        "plain: the paper's beam search; diverse: no two rollouts of the same samples, each sample in few of them; auto follows the recipe",
    )
    num_candidates: int = setting(81920, "samples the rollouts are drawn from", minimum=16)
    reference_samples: int = setting(128, "reference examples used, from the first", minimum=1)
    reference_batch_size: int = setting(
        16, "reference tokens per forward pass, in sequences of model.sequence_length", minimum=1, may_change=True
    )
    learning_rate: float | None = setting(
        None,
        "learning rate of the oracle steps; when unset the schedule's at the checkpoint, but at most 3e-4 where the estimator is not exact",
        minimum=0.0,
    )
    noise_rollouts: int = setting(
        16, "rollouts measured exactly against a second, disjoint reference set to show the labels' noise; 0: none", minimum=0
    )
    noise_learning_rate: float | None = setting(
        None, "second learning rate at which the noise is shown; a tenth of the oracle's when unset", minimum=0.0
    )
    chunk_rollouts: int = setting(
        16, "rollouts each worker finishes between saves: what a killed server may lose", minimum=1, may_change=True
    )

    def validation_rollouts(self, collected: int) -> int:
        """Of so many random rollouts, those that ``first_order`` measures exactly too: their share, and at least 4."""
        return min(collected, max(4, math.ceil(self.validation_share * collected)))


@dataclass(frozen=True, kw_only=True)
class RelationalConfig:
    """The relational data influence model (paper section 3.2)."""

    encoder: str = setting("probe", "'probe' (hidden states of the checkpoint) or a Hugging Face encoder by name or path")
    encoder_max_tokens: int = setting(2048, "Hugging Face encoder: tokens of a sample that are encoded, in windows of 512", minimum=8)
    encoder_layout: Literal["windows", "cut"] = setting(
        "windows",
        "Hugging Face encoder: windows: each of 512 tokens with a [CLS] and [SEP] of its own; cut: the whole text has one of each, "
        "is cut into four of 512 and windows of padding count too, as the paper's authors do",
    )
    finetune_encoder: Literal["auto", "yes", "no"] = setting(
        "auto", "Hugging Face encoder: train it with the rest of the model (no: as it is); auto: yes"
    )
    warm_start: bool = setting(False, "begin each round's fits at the previous round's model; the report compares with a fit from scratch")
    embedding_dim: int = setting(
        64, "size of the learned projection of the encoder's features (the paper recipe has none for a Hugging Face encoder)", minimum=2
    )
    labels: Literal["auto", "increments", "momentum_corrected"] = setting("auto", "target of the fit; auto follows the recipe")
    standardisation: Literal["auto", "pooled", "per_position"] = setting("auto", "how targets are standardised; auto follows the recipe")
    relation: Literal["auto", "product", "additive"] = setting("auto", "how a group changes a sample's influence; auto follows the recipe")
    learning_rate: float | None = setting(
        None, "AdamW peak learning rate of the fit; when unset 3e-3, and 5e-5 where an encoder is trained with it", minimum=0.0
    )
    weight_decay: float = setting(0.01, "AdamW weight decay of the fit", minimum=0.0)
    warmup_steps: int = setting(50, "linear warm-up steps of the fit", minimum=0)
    epochs: int | None = setting(
        None,
        "most passes over the training rollouts, fewer where the held-out Spearman stops improving; when unset 30, and the paper's 5 in "
        "the paper recipe and where an encoder is trained",
        minimum=1,
    )
    batch_rollouts: int = setting(4, "rollouts per batch", minimum=1)
    held_out_fraction: float = setting(
        0.1,
        "share of rollouts held out (at most 1,000) to choose the best epoch and to report the fit",
        minimum=0.01,
        maximum=0.5,
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The selection server's own process settings."""

    poll_interval_seconds: float = setting(2.0, "seconds between looks for a new checkpoint", minimum=0.05, may_change=True)
    idle_timeout_seconds: float | None = setting(
        None, "end when no new checkpoint came for so long; never when unset", minimum=0.0, may_change=True
    )
    embed_batch_size: int = setting(
        64, "pool tokens per forward pass while embedding, in sequences of model.sequence_length", minimum=1, may_change=True
    )
    tensor_model_parallel_size: int | None = setting(None, "ranks per oracle worker; the trainer's when unset", minimum=1, may_change=True)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: what the trainer, the server and every command read."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    oracle: OracleConfig = dataclasses.field(default_factory=OracleConfig)
    relational: RelationalConfig = dataclasses.field(default_factory=RelationalConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
