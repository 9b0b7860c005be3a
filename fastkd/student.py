"""The student worker: takes rollouts and the teacher's rows, does the optimizer steps of one distillation step.

Semantics users tuned against: the B rollouts of a step are cut into B / train_global_batch_size optimizer steps on
the same rollouts; each loss is the sum over counted tokens divided by their number in the whole global batch, so
gradients do not depend on how sequences are packed into micro-batches; the schedule ticks once per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastkd import (
    by_source,
    grad_norm,
    lora,
    lora_export,
    models,
    nvfp4_export,
    optim,
    packing,
    parallel,
    quantization,
    train_state,
    weights_export,
)
from fastkd.batch import Rollout, idle, pack
from fastkd.config import Recipe
from fastkd.errors import NonFiniteLoss
from fastkd.host_copies import to_device
from fastkd.kernels import TopK
from fastkd.log import bars
from fastkd.losses import Divergence, FusedLoss, LossBySource, PackedModel
from fastkd.running_mean import RunningMean
from fastkd.state_files import Files, StateFiles

# Per-token figures of the fused loss that become metrics: name in TopKLoss → name in metrics.jsonl.
_PER_TOKEN = {
    "teacher_mass": "train/teacher_mass",
    "student_mass": "train/student_mass",
    "entropy": "train/entropy",
    "top1_agree": "train/top1_agreement",
    "label_logprob": "train/label_logprob",
}


class Student:
    """A model with its optimizer and schedule.

    With a mesh it is one rank of a group: every rank calls the same methods with the same rollouts, works on its own
    share of them, and returns the same metrics.
    """

    def __init__(self, recipe: Recipe, device: torch.device, valid_vocab: int | None, mesh: DeviceMesh | None = None):
        self.policy = recipe.policy
        self.logs_norm = recipe.logger.log_params_norm
        self.device, self.mesh, self.valid_vocab = device, mesh, valid_vocab
        loss = recipe.loss_fn
        self.divergence = Divergence(loss.kl_type, loss.outside, loss.mixed_kl_weight, loss.jsd_beta, loss.temperature)
        adapters = self.policy.dtensor_cfg.lora_cfg
        self.adapters = adapters if adapters.enabled else None
        # float32 masters; with precision bfloat16 the forward and backward run in bf16 under autocast, so small
        # updates are never lost to a bf16 weight's 8 bits. A frozen base has no updates; its adapters are float32.
        self.model = PackedModel.load(
            "policy",
            self.policy,
            device,
            mesh,
            torch.float32 if self.adapters is None else models.DTYPES[self.policy.precision],
            trained=True,
            adapters=self.adapters,
            quantized=self.policy.quantization,
            seed=recipe.distillation.seed,
        )
        self.causal_lm = self.model.causal_lm
        self.parameters = [p for p in self.causal_lm.parameters() if p.requires_grad]
        self.optimizer = optim.build_optimizer(self.policy.optimizer, self.parameters)
        self.scheduler = optim.build_scheduler(self.policy, self.optimizer)
        self.version = 0
        """Optimizer steps taken; stamped on every rollout."""
        context = recipe.distillation.context_distillation
        self.lends_itself = context.shares_weights
        self.mean: RunningMean | None = None
        if context.enabled and context.frozen_teacher_source == "ema":
            trained = {name: p for name, p in self.causal_lm.named_parameters() if p.requires_grad}
            self.mean = RunningMean(self.model, trained, context.ema_decay)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Compute dtype when it differs from the weights'. A sharded model casts the weights it gathers."""
        plain = self.policy.precision == "float32" or self.mesh is not None or self.adapters is not None
        return None if plain else models.DTYPES[self.policy.precision]

    def autocast(self) -> AbstractContextManager:
        """The context that model code runs in."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Inside, this model is the teacher that shares its weights: the frozen base under its adapters or, as the
        recipe asks, the running mean of the student or the student as it is."""
        was_training = self.causal_lm.training
        self.causal_lm.eval()
        try:
            if self.mean is not None:
                with self.autocast(), self.mean.in_place():
                    yield
            elif self.lends_itself:
                with self.autocast():
                    yield
            else:
                with lora.disabled(self.causal_lm):
                    yield
        finally:
            self.causal_lm.train(was_training)

    def train(self, rollouts: Sequence[Rollout], targets: Sequence[TopK | None]) -> dict[str, float]:
        """All optimizer steps of one distillation step; returns its metrics.

        Raises:
            NonFiniteLoss: before the weights change.
        """
        assert not self.needs_calibration, "calibrate the student first"
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
        if self.mean is not None:
            self.mean.update()
        # A source's loss is the mean over its tokens, however the optimizer steps share them.
        losses = {name: totals.pop(name) / count for name, count in by_source.tokens(rollouts).items()}
        # Means over the optimizer steps, as NeMo RL reports them.
        found = {name: value / steps for name, value in totals.items()} | losses | {"train/lr": float(lr)}
        if self.logs_norm:
            found["train/params_norm"] = float(grad_norm.global_norm(p.detach() for p in self.causal_lm.parameters()))
        return found

    def _optimizer_step(self, rollouts: Sequence[Rollout], targets: Sequence[TopK | None]) -> dict[str, float]:
        tokens = sum(len(rollout.response) for rollout in rollouts)
        if tokens == 0:
            bars.advance(len(rollouts))
            return {}  # every prompt was masked: nothing to learn from, and no step with stale momentum
        if self.adapters is not None:
            lora.set_step(self.causal_lm, self.version)
        sums: dict[str, Tensor] = {}
        sources = list(by_source.tokens(rollouts))
        passes = self._forward(rollouts, targets, weight=1.0 / tokens, divergence=self.divergence, sources=sources)
        for loss, sums_S, count in passes:
            loss.loss.backward()
            _accumulate(sums, "train/loss", loss.loss.detach())
            for field, name in _PER_TOKEN.items():
                value = getattr(loss, field)
                if value is not None:
                    _accumulate(sums, name, value.float().sum() / tokens)
            for name, value in zip(sources, sums_S, strict=True):
                _accumulate(sums, name, value)
            bars.advance(count)
        norm = grad_norm.clip_grad_norm(self.parameters, self.policy.max_grad_norm)
        names = list(sums)
        totals = parallel.sum_over_data(torch.stack([sums[name].float() for name in names]), self.mesh)
        # One host synchronisation per optimizer step: everything that must be known before the weights change.
        values = torch.cat((totals, norm.float().to(totals.device)[None])).tolist()
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

    def _forward(self, rollouts, targets, *, weight: float, divergence: Divergence, sources: Sequence[str] = ()):
        """Yields (TopKLoss, its sum by source, sequences) per micro-batch of this rank; the caller runs backward
        before the next."""
        for indices in self._micro_batches(rollouts):
            batch = pack([rollouts[index] for index in indices]) if indices else idle()
            batch = batch.to(self.device)
            teacher = _concatenate([targets[index] for index in indices], self.device)
            weights_A = torch.full((len(batch.labels_A),), weight, device=self.device)
            head = FusedLoss(divergence, teacher, weights_A, self.valid_vocab)
            with self.autocast():
                if sources:
                    places_A = by_source.places([rollouts[index] for index in indices], sources)
                    sources_A = to_device(places_A, self.device)
                    loss, sums_S = self.model(batch, LossBySource(head, sources_A, len(sources)))
                else:
                    loss, sums_S = self.model(batch, head), ()
            yield loss, sums_S, len(indices)

    def _micro_batches(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """What this rank trains on: places in ``rollouts`` by micro-batch, empty for one that it idles through."""
        lengths = [rollout.packed_length for rollout in rollouts]
        bins = packing.for_policy(self.policy, lengths, training=True)
        rank, ranks = parallel.data_rank(self.mesh)
        return packing.assign(bins, lengths, ranks)[rank]

    def share(self, rollouts: Sequence[Rollout], *, training: bool = True) -> set[int]:
        """Places of the rollouts that this rank needs the teacher's rows of, in ``train`` or in ``divergences``."""
        size = self.policy.train_global_batch_size if training else max(len(rollouts), 1)
        return {
            start + index
            for start in range(0, len(rollouts), size)
            for indices in self._micro_batches(rollouts[start : start + size])
            for index in indices
        }

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
            parts = [loss.loss for loss, *_ in self._forward(rollouts, targets, weight=1.0, divergence=divergence)]
            total = torch.stack(parts).sum() if parts else torch.zeros((), device=self.device)
            result[name] = float(parallel.sum_over_data(total, self.mesh)) / max(tokens, 1)
        self.causal_lm.train()
        return result

    def export(self, path: Path) -> None:
        """Write the weights in Hugging Face format, in the recipe's precision; every rank calls it.

        Adapters are merged into the weights, and written by themselves to ``adapter/`` in PEFT's format. A quantised
        student is written as ``fastkd.nvfp4_export`` says.
        """
        if quantization.has_quantizers(self.causal_lm):
            nvfp4_export.export(self.causal_lm, path)
            return
        weights_export.export(self.causal_lm, path, models.DTYPES[self.policy.precision])
        if self.adapters is not None:
            lora_export.export(self.causal_lm, path / "adapter", self.policy.model_name)
            parallel.meet(self.mesh)  # the first rank writes: nobody goes on before the files are there

    # --- quantisation ---------------------------------------------------------------------------------------------

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe quantises activations, and their scales are not known yet."""
        return quantization.has_quantizers(self.causal_lm) and not quantization.quantizers_of(self.causal_lm).on

    def calibrate(self, rollouts: Sequence[Rollout]) -> None:
        """Fix the activations' scales by what they are on these sequences; from then on the student is quantised.

        Every rank calls it with the same sequences.
        """
        self.causal_lm.eval()
        with quantization.calibrating(self.causal_lm), self.autocast():
            for indices in self._micro_batches(rollouts):
                batch = pack([rollouts[index] for index in indices]) if indices else idle()
                self.model(batch.to(self.device), lambda hidden, shard, batch: hidden.sum())
        self.causal_lm.train()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self, *, room: bool = False) -> dict[str, Any]:
        """Everything that training depends on, by parameter name; ``fastkd.train_state.capture`` explains."""
        state = train_state.capture(self.causal_lm, self.optimizer, self.scheduler, self.version, room=room)
        return state if self.mean is None else state | {"mean": self.mean.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.version = train_state.restore(state, self.causal_lm, self.optimizer, self.scheduler)
        if quantization.has_quantizers(self.causal_lm):
            quantization.resume(self.causal_lm)  # with the scales of the state
        if self.mean is not None:
            self.mean.load(state["mean"])

    @cached_property
    def _files(self) -> StateFiles:
        return StateFiles()

    def save(self, path: Path, asynchronous: bool) -> None:
        """Write this rank's part of the state into a folder, in the background if asked to; ``saved`` tells the end."""
        self._files.save(self.state_dict(), path, asynchronous=asynchronous)

    def saved(self, wait: bool) -> Files | None:
        """The files that all ranks have written since ``save``, or None while they write. OSError: one could not."""
        return self._files.saved(wait)

    def load(self, path: Path) -> None:
        """Take up a state, whatever the layout it was written in. Raises CheckpointError: it does not fit."""
        self.load_state_dict(self._files.load(self.state_dict(room=True), path))


_NO_ROWS = TopK(torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1), torch.zeros(0), torch.zeros(0))


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _concatenate(rows: Sequence[TopK | None], device: torch.device) -> TopK:
    """The teacher rows of one micro-batch, in its order."""
    present = [row for row in rows if row is not None] or [_NO_ROWS]
    fields = [
        to_device(torch.cat(parts), device) if parts[0] is not None else None  # pyright: ignore[reportArgumentType]
        for parts in zip(*present, strict=True)
    ]
    return TopK(*fields)  # pyright: ignore[reportArgumentType]
