"""``distillation.context_distillation``: the teacher reads more than the student (a trace, dataset columns)."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from fastkd import prefix_template
from fastkd.config.base import Section, Share, broken_rule, section


class StaticTrace(Section):
    """Where a static trace comes from."""

    answer_column: str | None = None
    """Dataset column that holds the worked answer; needed when `trace_source: static_dataset`."""


class TraceExtractor(Section):
    """How the trace is cut out of a text."""

    type: Literal["think_tag", "regex"] = "think_tag"
    """`think_tag`: the text between `<think>` and the first `</think>` after it. `regex`: what `pattern` finds."""
    pattern: str | None = None
    """Regular expression of `type: regex`, `.` matching line ends too: its group named `trace`, else its
    first group, else the whole match."""
    selection: Literal["first", "last"] = "first"
    """Which span when there are several."""
    missing_trace_policy: Literal["empty", "drop_sample"] = "empty"
    """Without a span: use an `empty` trace, or `drop_sample` from the loss."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise broken_rule(
                    f"is no regular expression ({error})", "Write one, as in <think>(.*?)</think>", value=pattern
                ) from None
        return pattern


class ContextMetrics(Section):
    """Metrics of context distillation."""

    enabled: bool = True
    """Record `context_distillation_*` (trace coverage, prefix truncation, dropped samples)."""


class ContextDistillation(Section):
    """Self-distillation: the student's own checkpoint, shown a worked trace, teaches the student without
    it."""

    enabled: bool = False
    """Score the student's responses under the teacher's own prompt (problem and trace)."""
    mode: Literal["self_frozen"] = "self_frozen"
    """The teacher starts as the student's checkpoint; `frozen_teacher_source` says what becomes of it."""
    problem_source: Literal["original_user_problem"] = "original_user_problem"
    """`{problem}` is the problem as the dataset has it."""
    trace_source: Literal["dynamic", "static_dataset"] = "dynamic"
    """`{trace}` comes from the student's own response, or from `static_trace.answer_column`."""
    static_trace: StaticTrace = section(StaticTrace)
    """The column of a static trace."""
    teacher_prefix_template: str = "You are given a problem and a trace: {problem} + {trace}. Solve it on your own."
    """The teacher's user message, or a file that holds it: `{problem}` and `{trace}`, or `{column}` for any
    column of the dataset; other braces are doubled."""
    alignment: Literal["response_token_index"] = "response_token_index"
    """Teacher rows are matched to student rows by position in the response."""
    overflow_policy: Literal["truncate_prefix_only", "truncate_prefix_from_end"] = "truncate_prefix_only"
    """A teacher prefix that is too long keeps its tail (`truncate_prefix_only`) or its head."""
    frozen_teacher_source: Literal["base_model", "ema", "live"] = "base_model"
    """Which weights the teacher has: the checkpoint, a running mean of the student's, or the student's own."""
    ema_decay: Share = 0.99
    """With `ema`: mean = decay × mean + (1 − decay) × student, after every step."""
    trace_extractor: TraceExtractor = section(TraceExtractor)
    """How the trace is found."""
    metrics: ContextMetrics = section(ContextMetrics)
    """What is recorded."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the dataset that the teacher reads; empty when off. The template is text by now."""
        if not self.enabled:
            return ()
        named = prefix_template.places(self.teacher_prefix_template)
        found = [name for name in named if name not in (prefix_template.PROBLEM, prefix_template.TRACE)]
        if prefix_template.TRACE in named and self.trace_source == "static_dataset" and self.static_trace.answer_column:
            found.append(self.static_trace.answer_column)
        return tuple(dict.fromkeys(found))

    @property
    def shares_weights(self) -> bool:
        """Whether the teacher's weights come from the student while it trains, and not from a checkpoint."""
        return self.enabled and self.frozen_teacher_source != "base_model"
