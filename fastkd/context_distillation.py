"""Context distillation: what the teacher reads of a rollout when it is shown more than the student.

The teacher's sequence is a prefix of its own (the recipe's template, filled and rendered as a user message) and then
the student's response, token for token: the response is never decoded and encoded again. A prefix of P tokens and a
student's prompt of r tokens before a response of n:

    teacher   prefix  [0, P)   response [P, P + n)     row P-1+j predicts response token j
    student   prompt  [0, r)   response [r, r + n)     row r-1+j predicts response token j,   j = 0 … n-1

So both sides are rollouts with the same response behind another prompt, and packing, scoring and the loss need to know
nothing: a teacher's row j is the student's row j. The prefix may take what the teacher's own longest sequence leaves,
max_total - n tokens; a longer one is cut, and the response never is.

A sample that is left out (no room for a prefix, no trace where the recipe asks for one) keeps its place with an empty
response on both sides. It has no token, so the loss is the mean over the tokens of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastkd import prefix_template, trace
from fastkd.batch import Prompt, Rollout
from fastkd.config import ContextDistillation

MISSING_TRACE, NO_PREFIX_BUDGET, EMPTY_PREFIX = "missing_trace", "no_prefix_budget", "empty_prefix"
CAUSES: tuple[str, ...] = (MISSING_TRACE, NO_PREFIX_BUDGET, EMPTY_PREFIX)
"""Why a sample is left out."""
PER_SAMPLE = ("trace_coverage", "prefix_truncation_rate", "prefix_length")
COUNTS = ("dropped_samples", *(f"dropped_{cause}" for cause in CAUSES))
"""What is recorded, each with ``context_distillation_`` before it."""


@dataclass(frozen=True, slots=True)
class Readings:
    """One batch as each side reads it; entry i of both is the same sample, with the same response."""

    student: Sequence[Rollout]
    teacher: Sequence[Rollout]
    metrics: dict[str, float]
    """``context_distillation_*``; empty when the recipe records none."""


class TeacherPrompts:
    """Gives the rollouts of a batch the prompts that the teacher reads.

    Args:
        config: its template is text, not the name of a file.
        tokenizer: with the teacher's chat template; ids are the student's.
        chat_template_kwargs: passed to the template (``enable_thinking`` and the like).
        max_total_tokens: of the teacher's prefix and response together.
    """

    def __init__(
        self,
        config: ContextDistillation,
        tokenizer: Any,
        chat_template_kwargs: dict[str, Any] | None,
        max_total_tokens: int,
    ):
        self.config, self.tokenizer, self.max_total_tokens = config, tokenizer, max_total_tokens
        self.template_kwargs = chat_template_kwargs or {}
        self.places = prefix_template.places(config.teacher_prefix_template)
        # In a trace they would end the teacher's message, or begin another.
        special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def __call__(self, rollouts: Sequence[Rollout]) -> Readings:
        """Both sides' readings of a batch; rollouts without a response pass through and count nowhere."""
        sampled = [index for index, rollout in enumerate(rollouts) if rollout.response]
        shown = dict(zip(sampled, self._texts([rollouts[index] for index in sampled]), strict=True))
        student, teacher = list(rollouts), list(rollouts)
        dropped = dict.fromkeys(CAUSES, 0)
        covered = truncated = prefix_tokens = 0
        prefixes = self._tokens([text for text, _ in shown.values() if text is not None])
        for index, (text, complete) in shown.items():
            rollout = rollouts[index]
            prefix = None if text is None else prefixes[text]
            covered += complete
            cause = self._cause(prefix, len(rollout.response))
            if cause is not None or text is None or prefix is None:
                dropped[cause or MISSING_TRACE] += 1
                student[index] = teacher[index] = replace(rollout, response=())
                continue
            kept = self._cut(prefix, self.max_total_tokens - len(rollout.response))
            truncated += len(kept) < len(prefix)
            prefix_tokens += len(kept)
            teacher[index] = replace(rollout, prompt=replace(rollout.prompt, text=text, tokens=kept))
        return Readings(student, teacher, self._metrics(len(sampled), covered, truncated, prefix_tokens, dropped))

    def example(self, prompt: Prompt) -> str:
        """What the teacher would read for a prompt; an ellipsis stands for what only a response can tell."""
        one = Rollout(prompt, 0, (), False, 0)
        dynamic = self.config.trace_source == "dynamic"
        [(text, _)] = self._texts([one], ["…"] if dynamic else None)
        return "nothing: its trace is missing" if text is None else text

    # --- texts ----------------------------------------------------------------------------------------------------

    def _texts(
        self, rollouts: Sequence[Rollout], traces: Sequence[str | None] | None = None
    ) -> list[tuple[str | None, bool]]:
        """Each rollout's rendered prefix, None when it is left out, and whether all that it shows is there."""
        found = []
        for rollout, cut in zip(rollouts, traces or self._traces(rollouts), strict=True):
            columns = dict(rollout.prompt.columns)
            shown = {name: cut if name == prefix_template.TRACE else columns.get(name) for name in self.places}
            shown.pop(prefix_template.PROBLEM, None)
            complete = all(text is not None and text.strip() for text in shown.values())
            if not complete and self.config.trace_extractor.missing_trace_policy == "drop_sample":
                found.append((None, False))
                continue
            texts = {name: self._special.sub("", text or "") for name, text in shown.items()}
            texts[prefix_template.PROBLEM] = rollout.prompt.problem
            message = prefix_template.fill(self.config.teacher_prefix_template, texts)
            found.append((self._render(rollout.prompt, message), complete))
        return found

    def _traces(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        extractor = self.config.trace_extractor
        if prefix_template.TRACE not in self.places:
            return [None] * len(rollouts)
        if self.config.trace_source == "static_dataset":
            column = self.config.static_trace.answer_column
            return [trace.static(dict(rollout.prompt.columns).get(column or ""), extractor) for rollout in rollouts]
        texts = self.tokenizer.batch_decode([list(rollout.response) for rollout in rollouts])
        # Some chat templates open the tag themselves, at the end of the prompt: the span then starts the response.
        opened = [rollout.prompt.text.rstrip().endswith(trace.OPEN) for rollout in rollouts]
        return [trace.extract(trace.OPEN * own + text, extractor) for own, text in zip(opened, texts, strict=True)]

    def _render(self, prompt: Prompt, message: str) -> str:
        messages = [{"role": "user", "content": message}]
        if prompt.system is not None:
            messages.insert(0, {"role": "system", "content": prompt.system})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )

    # --- tokens ---------------------------------------------------------------------------------------------------

    def _tokens(self, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        distinct = list(dict.fromkeys(texts))  # generations of one prompt share a static prefix
        if not distinct:
            return {}
        encoded = self.tokenizer(distinct, add_special_tokens=False, verbose=False).input_ids
        return {text: tuple(tokens) for text, tokens in zip(distinct, encoded, strict=True)}

    def _cause(self, prefix: tuple[int, ...] | None, response: int) -> str | None:
        if prefix is None:
            return MISSING_TRACE
        if response >= self.max_total_tokens:
            return NO_PREFIX_BUDGET
        return None if prefix else EMPTY_PREFIX  # the first response token is predicted by the prefix's last

    def _cut(self, prefix: tuple[int, ...], budget: int) -> tuple[int, ...]:
        if self.config.overflow_policy == "truncate_prefix_only":
            return prefix[-budget:]
        return prefix[:budget]

    def _metrics(
        self, samples: int, covered: int, truncated: int, prefix_tokens: int, dropped: dict[str, int]
    ) -> dict[str, float]:
        if not self.config.metrics.enabled:
            return {}
        left_out = sum(dropped.values())
        scored = max(samples - left_out, 1)
        rates = (covered / max(samples, 1), truncated / scored, prefix_tokens / scored)
        values = (*rates, float(left_out), *(float(dropped[cause]) for cause in CAUSES))
        names = (f"context_distillation_{name}" for name in (*PER_SAMPLE, *COUNTS))
        return dict(zip(names, values, strict=True))


def summary(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the lines of metrics.jsonl: means of the rates and of the prefix length, sums of the counts."""
    found = {}
    for name in (*PER_SAMPLE, *COUNTS):
        key = f"context_distillation_{name}"
        values = [line[key] for line in lines if key in line]
        if values:
            found[key] = sum(values) / (1 if name in COUNTS else len(values))
    return found
