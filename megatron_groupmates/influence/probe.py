"""The probe: a checkpoint that can be stepped, evaluated and put back exactly, without reloading anything.

One step of the probe is the trainer's next step on the same batch: same loss, clipping, AdamW and weight-decay groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_groupmates.checkpoint.partitions import KINDS
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, UserError
from megatron_groupmates.influence.flat import inner_product
from megatron_groupmates.influence.reference import ReferenceSet
from megatron_groupmates.model.batch import DocumentRules, PackedBatch, Samples, pack_samples, training_batch
from megatron_groupmates.model.gpt import packed_logits, token_logits
from megatron_groupmates.model.losses import losses_by_token, token_losses
from megatron_groupmates.parallel import ParallelGroups
from megatron_groupmates.utils.stopwatch import Stopwatch

# Share of the norm of the weights by which they are displaced, either way, for a central difference. Below it rounding tells (of
# losses in float32, of the displaced weights themselves in bfloat16), above it curvature. With a byte-level model of 0.7 million
# parameters on text the differences are within 0.01 % of the derivative in float32 and 2 % in bfloat16 (Spearman .999). Where
# samples are all but memorised they are within 0.4 % in float32; bfloat16 keeps the order there (.97) and less of the sizes.
_DIFFERENCE_SHARE = {torch.float32: 1e-4, torch.bfloat16: 3e-3}
# Large enough to leave alone every weight that was in use lately.
_LIMIT_OF_BOUND = 30.0

# Logits of a rank that exist at a time in an evaluation: few enough for the caches of a CPU, enough to fill a GPU.
_LOGITS = {"cpu": 2**21, "cuda": 2**28}

# Elements of a part of a flat buffer.
_PART = 2**16


@dataclass
class _FlatGroup:
    """One weight-decay group as contiguous buffers; sharded parameters first, then those every rank holds whole.

    Attributes:
        names: parameter names in buffer order.
        parameters: the model's parameters in buffer order.
        num_sharded: leading elements that belong to this tensor-parallel rank alone.
        master: float32 weights that AdamW updates; the model's own memory when it computes in float32.
        gradient: gradients in the model's dtype, where autograd accumulates them.
        average: Adam's first moment, float32.
        square: Adam's second moment, float32.
    """

    names: list[str]
    parameters: list[torch.nn.Parameter]
    num_sharded: int
    master: torch.Tensor
    gradient: torch.Tensor
    average: torch.Tensor
    square: torch.Tensor


class Probe:
    """A model with optimizer state that measures what single training steps do to the reference loss.

    Every rank of a tensor-parallel group must call each method together; groups are independent of each other.

    Args:
        model: from ``build_gpt``; the probe takes over its parameters' memory.
        config: the run, for z-loss, clipping and AdamW's settings.
        groups: this rank's groups.
        reference: D_ref.
        reference_batch_size: bounds a forward pass of an evaluation: at most the tokens of as many whole sequences.
        rules: of the run: what the documents of a sequence change.
        stopwatch: times ``step``, ``evaluation`` and ``restore``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Config,
        groups: ParallelGroups,
        reference: ReferenceSet,
        reference_batch_size: int,
        rules: DocumentRules,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.model = model
        self._stopwatch = stopwatch or Stopwatch()
        self._rules = rules
        self._config = config
        self._groups = groups
        self._reference_tokens = reference_batch_size * config.model.sequence_length
        self._reference = reference.batches(self._reference_tokens, rules)
        self._logit_tokens = _LOGITS[groups.device.type] * groups.tensor_size // config.model.vocab_size + 1
        named = list(model.named_parameters())
        decayed = [(n, p) for n, p in named if p.ndim > 1]
        others = [(n, p) for n, p in named if p.ndim <= 1]
        self._flat = [_flatten(part) for part in (decayed, others)]
        settings = config.optimizer
        # The groups of training/optimizer.py, each in parts of the flat buffer.
        self._optimizer = torch.optim.AdamW(
            [
                {"params": _parts(flat.master), "weight_decay": decay}
                for flat, decay in zip(self._flat, (settings.weight_decay, 0.0), strict=True)
            ],
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            foreach=False,
            fused=groups.device.type == "cuda",
        )
        for group, flat in zip(self._optimizer.param_groups, self._flat, strict=True):
            for part, average, square in zip(group["params"], _parts(flat.average), _parts(flat.square), strict=True):
                step = torch.zeros((), device=part.device if part.is_cuda else None)
                self._optimizer.state[part] = {"step": step, "exp_avg": average, "exp_avg_sq": square}
        self._saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._saved_step = 0
        self._checkpoint_gradient: list[torch.Tensor] | None = None

    @torch.no_grad()
    def load(self, checkpoint: ZeroCheckpoint) -> None:
        """Take weights and Adam moments from ``checkpoint`` (any tensor-parallel size) and remember them for :meth:`restore`.

        Each value goes from the mapped file straight to where it is kept. The vocabulary has the rows that training gave
        it: rows of padding take part in the softmax, so another number of them would be another model.

        Raises:
            UserError: the checkpoint's model is not this one; names the first tensor that differs and both shapes.
        """
        rank, size = self._groups.tensor_rank, self._groups.tensor_size
        expected = {name for flat in self._flat for name in flat.names}
        for name in sorted(expected ^ set(checkpoint.names)):
            holder, other = ("the config's model", "the checkpoint") if name in expected else ("the checkpoint", "the config's model")
            raise UserError(f"{holder} has parameter {name}, {other} has not: the checkpoint is of another model")
        # Nothing is kept of an earlier checkpoint while this one is read: it would be held twice, and a failure leave a mixture.
        self._saved, self._checkpoint_gradient = [], None
        for flat in self._flat:
            kept = torch.empty_like(flat.master), torch.empty_like(flat.master), torch.empty_like(flat.master)
            offset = 0
            for name, parameter in zip(flat.names, flat.parameters, strict=True):
                for kind, buffer in zip(KINDS, kept, strict=True):
                    out = buffer[offset : offset + parameter.numel()].view(parameter.shape)
                    checkpoint.read_slice_into(name, kind, out, rank, size)
                offset += parameter.numel()
            self._saved.append(kept)
        self._saved_step = checkpoint.adam_step
        # torch's Adam, which some trainers use where AdamW is not at hand, decays weights by way of their gradients.
        decoupled = all(group.get("decoupled_weight_decay", True) for group in checkpoint.param_groups)
        for group in self._optimizer.param_groups:
            group["decoupled_weight_decay"] = decoupled
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put weights, moments and step count back to the checkpoint's, bit for bit."""
        with self._stopwatch.timing("restore"):
            self._restore()

    def _restore(self) -> None:
        for flat, (master, average, square) in zip(self._flat, self._saved, strict=True):
            flat.master.copy_(master)
            flat.average.copy_(average)
            flat.square.copy_(square)
        for state in self._optimizer.state.values():
            state["step"].fill_(float(self._saved_step))
        self._publish_master()

    def step(self, samples: torch.Tensor, learning_rate: float) -> float:
        """One training step on int64 ``[b, s + 1]`` samples; returns the gradient norm before clipping."""
        with self._stopwatch.timing("step"):
            return self._step(samples, learning_rate).item()

    def _step(self, samples: torch.Tensor, learning_rate: float) -> torch.Tensor:
        batch = training_batch(samples, self._rules)
        logits = token_logits(self.model, batch.tokens, batch.attention_mask, batch.position_ids)
        self._backward(token_losses(logits, batch.labels, self._groups.tensor_group).training_loss(self._config.model.z_loss))
        norm = self._gradient_norm()
        limit = self._config.training.gradient_clipping
        for group, flat in zip(self._optimizer.param_groups, self._flat, strict=True):
            group["lr"] = learning_rate
            gradient = flat.gradient if flat.gradient.dtype == torch.float32 else flat.gradient.float()
            if limit > 0.0:
                # DeepSpeed's order of operations, so that the step is the trainer's to the last bit.
                gradient.mul_(1.0 / torch.clamp((norm + 1e-6) / limit, min=1.0))
            for part, part_gradient in zip(group["params"], _parts(gradient), strict=True):
                part.grad = part_gradient
        self._optimizer.step()
        self._publish_master()
        return norm

    @contextlib.contextmanager
    def referring_to(self, reference: ReferenceSet) -> Iterator[None]:
        """Within the block the probe evaluates ``reference`` in place of its own reference set."""
        kept = self._reference, self._checkpoint_gradient
        self._reference, self._checkpoint_gradient = reference.batches(self._reference_tokens, self._rules), None
        try:
            yield
        finally:
            self._reference, self._checkpoint_gradient = kept

    @property
    def num_reference_tokens(self) -> int:
        """Tokens that one evaluation of L(D_ref) reads."""
        return sum(batch.tokens.numel() for batch in self._reference)

    @torch.no_grad()
    def reference_loss(self) -> float:
        """L(D_ref): cross-entropy per scored token, one mean over all tokens whatever the batch size."""
        with self._stopwatch.timing("evaluation"):
            return self._reference_loss()

    def _reference_loss(self) -> float:
        total = torch.zeros(2, dtype=torch.float64, device=self._groups.device)
        for batch in self._reference:
            for logits, labels in packed_logits(self.model, batch, self._logit_tokens):
                losses = token_losses(logits, labels, self._groups.tensor_group)
                total += torch.stack((losses.cross_entropy, losses.num_tokens)).double()
        return (total[0] / total[1]).item()

    def reference_gradient(self) -> list[torch.Tensor]:
        """Gradient of L(D_ref) at the present weights, float32, flat as the masters."""
        totals = [torch.zeros_like(flat.master) for flat in self._flat]
        num_tokens = 0
        for batch in self._reference:
            ((logits, labels),) = packed_logits(self.model, batch, batch.labels.numel())
            self._backward(token_losses(logits, labels, self._groups.tensor_group).training_loss(0.0))
            for total, flat in zip(totals, self._flat, strict=True):
                total.add_(flat.gradient, alpha=batch.labels.numel())
            num_tokens += batch.labels.numel()
        return [total / num_tokens for total in totals]

    def checkpoint_gradient(self) -> list[torch.Tensor]:
        """:meth:`reference_gradient` at the checkpoint, computed at the first call after :meth:`load`; leaves the probe there."""
        self.restore()
        if self._checkpoint_gradient is None:
            with self._stopwatch.timing("evaluation"):
                self._checkpoint_gradient = self.reference_gradient()
        return self._checkpoint_gradient

    @torch.no_grad()
    def change_along(self, gradients: list[torch.Tensor]) -> float:
        """Gradient times the change of the weights since the checkpoint, over the whole model, in float64."""
        with self._stopwatch.timing("evaluation"):
            return self._total(
                [
                    inner_product(gradient[:stop], flat.master[:stop], saved[0][:stop])
                    for flat, gradient, saved, stop in zip(self._flat, gradients, self._saved, self._counted(), strict=True)
                ]
            )

    @torch.no_grad()
    def precondition(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """What AdamW's next step from the checkpoint subtracts on account of these gradients, for a learning rate of 1.

        That is ``(1 - beta1) / (1 - beta1^k) g / (sqrt(v_hat) + epsilon)`` at the next step k, with v_hat the saved second
        moment corrected for k: without the saved momentum, the weight decay and the gradients' own share of v_hat. That
        share bounds what Adam does to a weight whose v is near 0, as of a token's embedding that was not used for long; here
        a multiple of the same bound keeps such weights from drowning all others.

        Returns:
            float32, flat as the masters.

        Raises:
            UserError: nothing has been accumulated in the second moment yet.
        """
        if self._saved_step == 0:
            raise UserError(
                "the checkpoint is of before the first optimizer step and has no second moment, which oracle.estimator: directional "
                "needs; select from a later checkpoint, or set oracle.estimator to exact or first_order"
            )
        settings, step = self._config.optimizer, self._saved_step + 1
        share = (1.0 - settings.beta1) / (1.0 - settings.beta1**step)
        correction = (1.0 - settings.beta2**step) ** 0.5
        # As far as Adam moves a weight whose first gradient ever is this step's.
        bound = _LIMIT_OF_BOUND * share * correction / (1.0 - settings.beta2) ** 0.5
        return [
            square.sqrt().div_(correction).add_(settings.epsilon).reciprocal_().mul_(gradient).mul_(share).clamp_(-bound, bound)
            for gradient, (_, _, square) in zip(gradients, self._saved, strict=True)
        ]

    @torch.no_grad()
    def displace(self, direction: list[torch.Tensor], step: float) -> None:
        """Set the weights to the checkpoint's plus ``step`` times ``direction``; the moments stay as they are."""
        for flat, values, saved in zip(self._flat, direction, self._saved, strict=True):
            torch.add(saved[0], values, alpha=step, out=flat.master)
        self._publish_master()

    def difference_step(self, direction: list[torch.Tensor]) -> float:
        """A step along ``direction`` to take differences of losses over: a fixed share of the norm of the weights."""
        squares = [
            self._total([inner_product(part[:stop], part[:stop]) for part, stop in zip(parts, self._counted(), strict=True)])
            for parts in ([saved[0] for saved in self._saved], direction)
        ]
        return _DIFFERENCE_SHARE[self._flat[0].gradient.dtype] * (squares[0] / squares[1]) ** 0.5

    def pack(self, samples: Samples) -> tuple[PackedBatch, list[int]]:
        """Samples of at least two tokens, of any lengths, as :meth:`sample_losses` takes them."""
        return pack_samples(samples, self._rules)

    @torch.no_grad()
    def sample_losses(self, batch: PackedBatch, num_scored: list[int]) -> torch.Tensor:
        """Training loss float64 ``[n]`` at the present weights of each of n samples by itself, in one forward pass; from :meth:`pack`."""
        with self._stopwatch.timing("evaluation"):
            losses = [
                losses_by_token(logits, labels, self._config.model.z_loss, self._groups.tensor_group).squeeze(0)
                for logits, labels in packed_logits(self.model, batch, self._logit_tokens)
            ]
            # Sums of slices: the same at every run on a GPU too, where scattered additions are not.
            return torch.stack([part.sum() / max(len(part), 1) for part in torch.cat(losses).split(num_scored)])

    def _counted(self) -> list[int | None]:
        """Where each flat buffer ends for sums over the model: what every rank holds whole is counted once."""
        return [None if self._groups.tensor_rank == 0 else flat.num_sharded for flat in self._flat]

    def _total(self, parts: list[torch.Tensor]) -> float:
        """Sum of float64 scalars over the buffers and the tensor-parallel group."""
        total = torch.stack(parts).sum()
        dist.all_reduce(total, group=self._groups.tensor_group)
        return total.item()

    def _backward(self, loss: torch.Tensor) -> None:
        for flat in self._flat:
            flat.gradient.zero_()
        loss.backward()

    def _gradient_norm(self) -> torch.Tensor:
        """Global gradient norm as DeepSpeed's ZeRO-1 computes it: by weight-decay group, in float64 within a parameter."""
        squares = torch.zeros(len(self._flat), device=self._groups.device)
        for number, flat in enumerate(self._flat):
            counted = [p for p in flat.parameters if getattr(p, "tensor_model_parallel", False) or self._groups.tensor_rank == 0]
            if counted:
                squares[number] = torch.stack([torch.linalg.vector_norm(p.grad.double()) for p in counted]).pow(2).sum().float()
        dist.all_reduce(squares, group=self._groups.tensor_group)
        return torch.linalg.vector_norm(squares.pow(0.5))

    @torch.no_grad()
    def _publish_master(self) -> None:
        """Where the model computes in lower precision, round the masters into its parameters."""
        for flat in self._flat:
            if flat.gradient.dtype != torch.float32:
                sizes = [p.numel() for p in flat.parameters]
                torch._foreach_copy_(
                    flat.parameters,
                    [part.view_as(p) for part, p in zip(flat.master.split(sizes), flat.parameters, strict=True)],
                )


@torch.no_grad()
def _flatten(named: list[tuple[str, torch.nn.Parameter]]) -> _FlatGroup:
    """Move parameters and their gradients into contiguous buffers."""
    named = sorted(named, key=lambda item: not getattr(item[1], "tensor_model_parallel", False))
    parameters = [parameter for _, parameter in named]
    weights = torch.cat([p.reshape(-1) for p in parameters])
    gradient = torch.zeros_like(weights)
    sizes = [p.numel() for p in parameters]
    for p, weight, grad in zip(parameters, weights.split(sizes), gradient.split(sizes), strict=True):
        p.data = weight.view_as(p)
        p.grad = grad.view_as(p)
    num_sharded = sum(p.numel() for p in parameters if getattr(p, "tensor_model_parallel", False))
    master = weights if weights.dtype == torch.float32 else weights.float()
    return _FlatGroup(
        names=[name for name, _ in named],
        parameters=parameters,
        num_sharded=num_sharded,
        master=master,
        gradient=gradient,
        average=torch.zeros_like(master),
        square=torch.zeros_like(master),
    )


def _parts(buffer: torch.Tensor) -> list[torch.Tensor]:
    """A flat buffer as AdamW takes it: whole on a GPU; on a CPU in parts that stay in its caches from one operation to the next."""
    return [buffer] if buffer.is_cuda else list(buffer.split(_PART))
