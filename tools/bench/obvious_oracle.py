"""The oracle as one would first write it, for bench_oracle.py to compare with: reload, step, evaluate with padding."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_groupmates.config import Config
from megatron_groupmates.influence.reference import ReferenceSet
from megatron_groupmates.model.losses import IGNORED_LABEL, next_token_batch
from megatron_groupmates.parallel import ParallelGroups, resolve_precision


class Obvious:
    """The oracle as one would first write it. In bf16, AdamW keeps float32 copies of the weights."""

    def __init__(self, config: Config, groups: ParallelGroups, tag_dir: Path, reference: ReferenceSet, batch_size: int) -> None:
        from megatron_groupmates.model.gpt import build_gpt

        self.config, self.reference, self.batch_size = config, reference, batch_size
        self.model = build_gpt(config, groups, 1, resolve_precision(config.training.precision))
        self.weights = list(self.model.parameters())
        low = self.weights[0].dtype != torch.float32
        self.masters = [p.detach().clone().float().requires_grad_() for p in self.weights] if low else self.weights
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.masters if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in self.masters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )
        self.path = tag_dir.parent / "state.pt"
        self._write_state_dict(tag_dir)
        self.reload()

    def _write_state_dict(self, tag_dir: Path) -> None:
        """The checkpoint as one file of state dicts."""
        from megatron_groupmates.checkpoint.zero import ZeroCheckpoint

        checkpoint, names = ZeroCheckpoint(tag_dir), [name for name, _ in self.model.named_parameters()]
        read = {kind: [checkpoint.read_slice(name, kind, 0, 1).clone() for name in names] for kind in ("param", "exp_avg", "exp_avg_sq")}
        step = torch.tensor(float(checkpoint.adam_step))
        number = {id(p): n for n, p in enumerate(self.masters)}
        order = [number[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            position: {"step": step.clone(), "exp_avg": read["exp_avg"][n], "exp_avg_sq": read["exp_avg_sq"][n]}
            for position, n in enumerate(order)
        }
        torch.save({"weights": read["param"], "optimizer": {**self.optimizer.state_dict(), "state": state}}, self.path)

    @torch.no_grad()
    def reload(self) -> None:
        """Weights and optimizer state from disk."""
        content = torch.load(self.path, map_location=self.weights[0].device)
        for values, master, weight in zip(content["weights"], self.masters, self.weights, strict=True):
            master.copy_(values)
            weight.copy_(values)
        self.optimizer.load_state_dict(content["optimizer"])

    def step(self, sample: torch.Tensor) -> None:
        """One training step on int64 ``[1, s + 1]``."""
        from megatron_groupmates.model.gpt import token_logits

        tokens, labels = next_token_batch(sample)
        logits = token_logits(self.model, tokens).float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
        loss = loss + self.config.model.z_loss * logits.logsumexp(-1).square().mean()
        self.model.zero_grad()
        loss.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, self.config.training.gradient_clipping)
        self.optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                if master is not weight:
                    weight.copy_(master)

    @torch.no_grad()
    def reference_loss(self) -> float:
        """Mean over scored tokens, all examples padded to the sequence length."""
        from megatron_groupmates.model.gpt import token_logits

        total = 0.0
        batches = zip(self.reference.tokens.split(self.batch_size), self.reference.labels.split(self.batch_size), strict=True)
        for tokens, labels in batches:
            logits = token_logits(self.model, tokens).float().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum").item()
        return total / self.reference.num_scored_tokens

    def rollout(self, samples: torch.Tensor) -> list[float]:
        """The reference loss after each step."""
        self.reload()
        losses = []
        for sample in samples:
            self.step(sample.unsqueeze(0))
            losses.append(self.reference_loss())
        return losses
