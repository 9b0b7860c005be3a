"""``loss_fn``: which divergence pulls the student to the teacher, and what happens outside the kept top-k."""

from __future__ import annotations

from typing import Literal

from fastkd.config.base import Fraction, Positive, Section, Share

KLType = Literal["forward", "reverse", "mixed", "jsd"]
Outside = Literal["renormalize", "zero", "bucket", "drop"]


class LossFn(Section):
    """The per-token divergence between teacher p and student q on the teacher's kept ids."""

    kl_type: KLType = "mixed"
    """`forward` KL(p‖q), `reverse` KL(q‖p), `mixed` (a weighted sum of both) or `jsd` (generalised
    Jensen-Shannon)."""
    mixed_kl_weight: Share = 0.5
    """Share of the FORWARD term when `kl_type: mixed`."""
    jsd_beta: Fraction = 0.5
    """Weight of the teacher in the mixture m = βp + (1−β)q when `kl_type: jsd`."""
    zero_outside_topk: bool = False
    """Short form of `outside_topk`: true means `zero`, false means `renormalize`. Not read when
    `outside_topk` is set."""
    outside_topk: Outside | None = None
    """Probability outside the kept ids: `renormalize` both sides on them, teacher `zero` there, one
    `bucket` for the rest (recommended for new recipes), or `drop` the terms. null follows
    `zero_outside_topk`."""
    temperature: Positive = 1.0
    """Distillation temperature, dividing the logits of both sides in the loss. Separate from the sampling
    temperature."""

    @property
    def outside(self) -> Outside:
        """The resolved treatment of the tail: `outside_topk`, else what `zero_outside_topk` stands for."""
        return self.outside_topk or ("zero" if self.zero_outside_topk else "renormalize")
