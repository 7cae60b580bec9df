"""The probe: a checkpoint that can be stepped, evaluated and put back exactly, without reloading anything.

One step of the probe is the trainer's next step on the same batch: same loss, clipping, AdamW and weight-decay groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config import Config, UserError
from megatron_groupmates.influence.reference import ReferenceSet
from megatron_groupmates.model.batch import Batch, DocumentRules, document_inputs, training_batch
from megatron_groupmates.model.gpt import token_logits
from megatron_groupmates.model.losses import TokenLosses, token_losses
from megatron_groupmates.parallel import ParallelGroups


@dataclass
class _FlatGroup:
    """One weight-decay group as contiguous buffers; sharded parameters first, then those every rank holds whole.

    Attributes:
        names: parameter names in buffer order.
        parameters: the model's parameters in buffer order.
        num_sharded: leading elements that belong to this tensor-parallel rank alone.
        master: float32 weights that AdamW updates; the model's own memory when it computes in float32.
        gradient: gradients in the model's dtype, where autograd accumulates them.
    """

    names: list[str]
    parameters: list[torch.nn.Parameter]
    num_sharded: int
    master: torch.Tensor
    gradient: torch.Tensor


class Probe:
    """A model with optimizer state that measures what single training steps do to the reference loss.

    Every rank of a tensor-parallel group must call each method together; groups are independent of each other.

    Args:
        model: from ``build_gpt``; the probe takes over its parameters' memory.
        config: the run, for z-loss, clipping and AdamW's settings.
        groups: this rank's groups.
        reference: D_ref.
        reference_batch_size: examples per forward pass of an evaluation.
        rules: of the run: what the documents of a sequence change.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: Config,
        groups: ParallelGroups,
        reference: ReferenceSet,
        reference_batch_size: int,
        rules: DocumentRules,
    ) -> None:
        self.model = model
        self._rules = rules
        self._config = config
        self._groups = groups
        self._reference = [
            Batch(tokens, labels, *document_inputs(tokens, rules)) for tokens, labels in reference.batches(reference_batch_size)
        ]
        named = list(model.named_parameters())
        decayed = [(n, p) for n, p in named if p.ndim > 1]
        others = [(n, p) for n, p in named if p.ndim <= 1]
        self._flat = [_flatten(part) for part in (decayed, others)]
        settings = config.optimizer
        # The groups of training/optimizer.py, each as one flat tensor.
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [flat.master], "weight_decay": decay}
                for flat, decay in zip(self._flat, (settings.weight_decay, 0.0), strict=True)
            ],
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            foreach=False,
            fused=groups.device.type == "cuda",
        )
        self._saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._saved_step = 0

    def load(self, checkpoint: ZeroCheckpoint) -> None:
        """Take weights and Adam moments from ``checkpoint`` (any tensor-parallel size) and remember them for :meth:`restore`.

        Raises:
            UserError: the checkpoint's model is not this one; names the first tensor that differs and both shapes.
        """
        rank, size = self._groups.tensor_rank, self._groups.tensor_size
        expected = {name for flat in self._flat for name in flat.names}
        for name in sorted(expected ^ set(checkpoint.names)):
            holder, other = ("the config's model", "the checkpoint") if name in expected else ("the checkpoint", "the config's model")
            raise UserError(f"{holder} has parameter {name}, {other} has not: the checkpoint is of another model")
        self._saved = []
        for flat in self._flat:
            parts: dict[str, list[torch.Tensor]] = {"param": [], "exp_avg": [], "exp_avg_sq": []}
            for name, parameter in zip(flat.names, flat.parameters, strict=True):
                for kind, tensors in parts.items():
                    tensor = checkpoint.read_slice(name, kind, rank, size)
                    if tensor.shape != parameter.shape:
                        raise UserError(
                            f"parameter {name}: the checkpoint's slice for tensor-parallel rank {rank} of {size} has shape "
                            f"{tuple(tensor.shape)}, the config's model {tuple(parameter.shape)}: the checkpoint is of another model"
                        )
                    tensors.append(tensor.reshape(-1))
            master, average, square = (torch.cat(tensors).to(self._groups.device) for tensors in parts.values())
            self._saved.append((master, average, square))
        self._saved_step = checkpoint.adam_step
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put weights, moments and step count back to the checkpoint's, bit for bit."""
        for flat, (master, average, square) in zip(self._flat, self._saved, strict=True):
            flat.master.copy_(master)
            state = self._optimizer.state[flat.master]
            if not state:
                state.update(
                    step=torch.zeros((), device=flat.master.device if flat.master.is_cuda else None),
                    exp_avg=torch.empty_like(average),
                    exp_avg_sq=torch.empty_like(square),
                )
            state["step"].fill_(float(self._saved_step))
            state["exp_avg"].copy_(average)
            state["exp_avg_sq"].copy_(square)
        self._publish_master()

    def step(self, samples: torch.Tensor, learning_rate: float) -> float:
        """One training step on int64 ``[b, s + 1]`` samples; returns the gradient norm before clipping."""
        self._backward(training_batch(samples, self._rules), self._config.model.z_loss)
        norm = self._gradient_norm()
        limit = self._config.training.gradient_clipping
        for group, flat in zip(self._optimizer.param_groups, self._flat, strict=True):
            group["lr"] = learning_rate
            flat.master.grad = flat.gradient if flat.gradient.dtype == torch.float32 else flat.gradient.float()
            if limit > 0.0:
                # DeepSpeed's order of operations, so that the step is the trainer's to the last bit.
                flat.master.grad.mul_(1.0 / torch.clamp((norm + 1e-6) / limit, min=1.0))
        self._optimizer.step()
        self._publish_master()
        return norm.item()

    @torch.no_grad()
    def reference_loss(self) -> float:
        """L(D_ref): cross-entropy per scored token, one mean over all tokens whatever the batch size."""
        total = torch.zeros(2, dtype=torch.float64, device=self._groups.device)
        for batch in self._reference:
            losses = self._losses(batch)
            total += torch.stack((losses.cross_entropy, losses.num_tokens)).double()
        return (total[0] / total[1]).item()

    def reference_gradient(self) -> list[torch.Tensor]:
        """Gradient of L(D_ref) at the present weights, float32, flat as the masters."""
        totals = [torch.zeros_like(flat.master) for flat in self._flat]
        num_tokens = 0.0
        for batch in self._reference:
            scored = float((batch.labels >= 0).sum())
            if not scored:
                continue
            self._backward(batch, 0.0)
            for total, flat in zip(totals, self._flat, strict=True):
                total.add_(flat.gradient, alpha=scored)
            num_tokens += scored
        return [total / num_tokens for total in totals]

    def masters(self) -> list[torch.Tensor]:
        """Copies of the float32 weights, flat."""
        return [flat.master.detach().clone() for flat in self._flat]

    def inner_product(self, gradients: list[torch.Tensor], before: list[torch.Tensor]) -> float:
        """Gradient times the change of the weights since ``before``, over the whole model, in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        for flat, gradient, old in zip(self._flat, gradients, before, strict=True):
            # Parameters that every rank holds whole are counted once.
            stop = None if self._groups.tensor_rank == 0 else flat.num_sharded
            change = (flat.master.detach() - old)[:stop].double()
            total += torch.dot(gradient[:stop].double(), change)
        dist.all_reduce(total, group=self._groups.tensor_group)
        return total.item()

    def _backward(self, batch: Batch, z_loss: float) -> None:
        for flat in self._flat:
            flat.gradient.zero_()
        self._losses(batch).training_loss(z_loss).backward()

    def _losses(self, batch: Batch) -> TokenLosses:
        logits = token_logits(self.model, batch.tokens, batch.attention_mask, batch.position_ids)
        return token_losses(logits, batch.labels, self._groups.tensor_group)

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
    return _FlatGroup(
        names=[name for name, _ in named],
        parameters=parameters,
        num_sharded=num_sharded,
        master=weights if weights.dtype == torch.float32 else weights.float(),
        gradient=gradient,
    )
