"""The student worker: takes rollouts and the teacher's rows, does the optimizer steps of one distillation step.

Semantics users tuned against: the B rollouts of a step are cut into B / train_global_batch_size optimizer steps on
the same rollouts; each loss is the sum over counted tokens divided by their number in the whole global batch, so
gradients do not depend on how sequences are packed into micro-batches; the schedule ticks once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers.utils import logging as transformers_logging

from fastkd import models, optim, packing
from fastkd.batch import Rollout, pack
from fastkd.config import Recipe
from fastkd.errors import NonFiniteLoss
from fastkd.kernels import TopK, TopKLoss
from fastkd.log import bars
from fastkd.losses import Divergence, StudentModel

# Per-token figures of the fused loss that become metrics: name in TopKLoss → name in metrics.jsonl.
_PER_TOKEN = {
    "teacher_mass": "train/teacher_mass",
    "student_mass": "train/student_mass",
    "entropy": "train/entropy",
    "top1_agree": "train/top1_agreement",
    "label_logprob": "train/label_logprob",
}


class Student:
    """A model with its optimizer and schedule."""

    def __init__(self, recipe: Recipe, device: torch.device, valid_vocab: int | None):
        self.policy = recipe.policy
        self.device = device
        loss = recipe.loss_fn
        self.divergence = Divergence(loss.kl_type, loss.outside, loss.mixed_kl_weight, loss.jsd_beta, loss.temperature)
        # float32 masters; with precision bfloat16 the forward and backward run in bf16 under autocast, so small
        # updates are never lost to a bf16 weight's 8 bits.
        causal_lm = models.load_causal_lm(
            "policy.model_name", self.policy.model_name, dtype=torch.float32, device=device
        )
        if self.policy.dtensor_cfg.activation_checkpointing:
            # The method's name depends on the transformers version. use_reentrant=False keeps autocast and works on
            # a frozen input; the fused head stays outside.
            enable = getattr(causal_lm, "activation_checkpointing_enable", None)
            (enable or causal_lm.gradient_checkpointing_enable)({"use_reentrant": False})
        self.causal_lm = causal_lm.train()
        self.model = StudentModel(causal_lm, valid_vocab)
        self.parameters = [p for p in causal_lm.parameters() if p.requires_grad]
        self.optimizer = optim.build_optimizer(self.policy.optimizer, self.parameters)
        self.scheduler = optim.build_scheduler(self.policy, self.optimizer)
        self.version = 0
        """Optimizer steps taken; stamped on every rollout."""

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Compute dtype when it differs from the float32 masters."""
        return None if self.policy.precision == "float32" else models.DTYPES[self.policy.precision]

    def autocast(self) -> AbstractContextManager:
        """The context that model code runs in."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def train(self, rollouts: Sequence[Rollout], targets: Sequence[TopK | None]) -> dict[str, float]:
        """All optimizer steps of one distillation step; returns its metrics.

        Raises:
            NonFiniteLoss: before the weights change.
        """
        size = self.policy.train_global_batch_size
        totals: dict[str, float] = {}
        steps = 0
        for start in range(0, len(rollouts), size):
            part = self._optimizer_step(rollouts[start : start + size], targets[start : start + size])
            if part:
                steps += 1
                for name, value in part.items():
                    totals[name] = totals.get(name, 0.0) + value
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        # Means over the optimizer steps, as NeMo RL reports them.
        return {name: value / steps for name, value in totals.items()} | {"train/lr": float(lr)}

    def _optimizer_step(self, rollouts: Sequence[Rollout], targets: Sequence[TopK | None]) -> dict[str, float]:
        tokens = sum(len(rollout.response) for rollout in rollouts)
        if tokens == 0:
            bars.advance(len(rollouts))
            return {}  # every prompt was masked: nothing to learn from, and no step with stale momentum
        sums: dict[str, Tensor] = {}
        for loss, count in self._forward(rollouts, targets, weight=1.0 / tokens, divergence=self.divergence):
            loss.loss.backward()
            _accumulate(sums, "train/loss", loss.loss.detach())
            for field, name in _PER_TOKEN.items():
                value = getattr(loss, field)
                if value is not None:
                    _accumulate(sums, name, value.float().sum() / tokens)
            bars.advance(count)
        norm = optim.clip_grad_norm(self.parameters, self.policy.max_grad_norm)
        # One host synchronisation per optimizer step: everything that must be known before the weights change.
        names = list(sums)
        values = torch.stack([*(sums[name].float() for name in names), norm.float()]).tolist()
        metrics = dict(zip([*names, "train/grad_norm"], values, strict=True))
        if not all(torch.isfinite(torch.tensor([metrics["train/loss"], metrics["train/grad_norm"]]))):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(
                f"loss {metrics['train/loss']} and gradient norm {metrics['train/grad_norm']} at optimizer step "
                f"{self.version + 1}: the weights were left as they were. Lower policy.optimizer.kwargs.lr or "
                "policy.max_grad_norm, or use policy.precision=float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.version += 1
        return metrics | {"train/global_valid_toks": float(tokens)}

    def _forward(self, rollouts, targets, *, weight: float, divergence: Divergence):
        """Yields (TopKLoss, sequences) per micro-batch; the caller runs backward before asking for the next."""
        lengths = [rollout.packed_length for rollout in rollouts]
        for indices in packing.for_policy(self.policy, lengths, training=True):
            batch = pack([rollouts[index] for index in indices]).to(self.device)
            teacher = _concatenate([targets[index] for index in indices], self.device)
            weights_A = torch.full((len(batch.labels_A),), weight, device=self.device)
            with self.autocast():
                loss: TopKLoss = self.model(batch, teacher, divergence, weights_A)
            yield loss, len(indices)

    @torch.no_grad()
    def divergences(
        self, rollouts: Sequence[Rollout], targets: Sequence[TopK | None], *, with_loss: bool = False
    ) -> dict[str, float]:
        """Mean per-token reverse and forward KL to the teacher, with the tail in one bucket, whatever the loss is.

        Keys: kl (reverse), kl_forward, and loss (the recipe's) when asked for.
        """
        tokens = sum(len(rollout.response) for rollout in rollouts)
        result = {}
        self.causal_lm.eval()
        temperature = self.divergence.temperature
        wanted = {
            "kl": Divergence("reverse", "bucket", temperature=temperature),
            "kl_forward": Divergence("forward", "bucket", temperature=temperature),
        }
        if with_loss:
            wanted["loss"] = self.divergence
        for name, divergence in wanted.items():
            parts = [loss.loss for loss, _ in self._forward(rollouts, targets, weight=1.0, divergence=divergence)]
            result[name] = float(sum(parts)) / max(tokens, 1)
        self.causal_lm.train()
        return result

    def export(self, path: Path) -> None:
        """Write the weights in Hugging Face format, in the recipe's precision."""
        dtype = models.DTYPES[self.policy.precision]
        state = {name: tensor.to(dtype) for name, tensor in self.causal_lm.state_dict().items()}
        config_dtype, self.causal_lm.config.dtype = self.causal_lm.config.dtype, dtype
        transformers_logging.disable_progress_bar()
        try:
            self.causal_lm.save_pretrained(path, state_dict=state)
        finally:
            self.causal_lm.config.dtype = config_dtype
        for file in path.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes its files readable by the owner alone

    def state_dict(self) -> dict[str, Any]:
        """Everything that training depends on, keyed by parameter name: weights, optimizer, schedule, version."""
        model, optimizer = get_state_dict(self.causal_lm, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "version": torch.tensor(self.version),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        set_state_dict(
            self.causal_lm,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.version = int(state["version"])


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _concatenate(rows: Sequence[TopK | None], device: torch.device) -> TopK:
    """The teacher rows of one micro-batch, in its order."""
    present = [row for row in rows if row is not None]
    fields = [
        torch.cat(parts).to(device) if parts[0] is not None else None  # pyright: ignore[reportArgumentType]
        for parts in zip(*present, strict=True)
    ]
    return TopK(*fields)  # pyright: ignore[reportArgumentType]
