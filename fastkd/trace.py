"""Cutting the trace, the reasoning that a teacher is shown, out of a text.

* Think tags: a span runs from ``<think>`` to the first ``</think>`` after it. Tags do not nest: of
  ``<think>a<think>b</think>c</think>`` the span is ``a<think>b``. An opening tag that is never closed opens nothing.
* Regular expression: any span that the recipe's pattern finds.
* Spans are stripped of surrounding white space. One of nothing but white space counts as missing: it would show the
  teacher nothing, and the recipe says what to do with a sample whose trace is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fastkd.config import TraceExtractor

OPEN, CLOSE = "<think>", "</think>"


def extract(text: str, extractor: TraceExtractor) -> str | None:
    """The trace in a response, or None when it is missing."""
    spans = _think_spans(text) if extractor.type == "think_tag" else _matches(text, extractor.pattern or "")
    chosen = next(spans, "") if extractor.selection == "first" else ([*spans] or [""])[-1]
    return chosen.strip() or None


def static(text: str | None, extractor: TraceExtractor) -> str | None:
    """The trace in a cell of a dataset, or None when it is missing.

    With the think-tag extractor, a cell without an opening tag is a trace as a whole: few worked solutions have tags.
    """
    if text is None:
        return None
    if extractor.type == "think_tag" and OPEN not in text:
        return text.strip() or None
    return extract(text, extractor)


def _think_spans(text: str) -> Iterator[str]:
    # Two searches per span, never back: a pattern would take quadratic time on many tags that nothing closes.
    end = 0
    while (start := text.find(OPEN, end)) >= 0:
        start += len(OPEN)
        stop = text.find(CLOSE, start)
        if stop < 0:
            return
        yield text[start:stop]
        end = stop + len(CLOSE)


def _matches(text: str, pattern: str) -> Iterator[str]:
    for match in re.finditer(pattern, text, re.DOTALL):
        group = "trace" if "trace" in match.re.groupindex else min(match.re.groups, 1)
        yield match[group] or ""
