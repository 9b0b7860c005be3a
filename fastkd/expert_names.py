"""How files name experts: one by one, where the model holds all of a block in one tensor.

    ….experts.gate_up_proj  [E, 2F, D]   is   ….experts.0.gate_proj.weight [F, D], ….experts.0.up_proj.weight, …
    ….experts.down_proj     [E, D, F]    is   ….experts.0.down_proj.weight [D, F], …

transformers describes it by conversions that stack experts and join projections; these are read here. A model with
conversions of another kind is left to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

_STACK, _JOIN = ("MergeModulelist", 0), ("Concatenate", 1)


class Pieces:
    """The tensors in files that make one tensor of the model.

    Args:
        patterns: their names with ``*`` for the expert's number, in the order of their rows.
    """

    def __init__(self, patterns: Sequence[str]):
        self.patterns = tuple(patterns)

    def names(self, experts: int) -> list[str]:
        """Of all of them: expert by expert."""
        return [name for expert in range(experts) for name in self.of(expert)]

    def of(self, expert: int) -> list[str]:
        """Of one expert."""
        return [pattern.replace("*", str(expert)) for pattern in self.patterns]

    def shape(self, fused: Sequence[int]) -> tuple[int, ...]:
        """Of each piece of a tensor of this shape."""
        return (fused[1] // len(self.patterns), *fused[2:])

    def cut(self, fused: Tensor) -> Iterator[Tensor]:
        """Views of the pieces, in the order of ``names``."""
        for expert in fused:
            yield from expert.chunk(len(self.patterns), 0)

    def overlaps(
        self, fused: Sequence[int], part: tuple[slice, ...]
    ) -> Iterator[tuple[str, tuple[slice, ...], tuple[Any, ...]]]:
        """(name, which part of that piece, where it goes in the part) for every piece that a part of the tensor needs.

        Args:
            fused: shape of the whole tensor.
            part: one slice per dimension.
        """
        rows = self.shape(fused)[0]
        for expert in range(part[0].start, part[0].stop):
            for number, name in enumerate(self.of(expert)):
                first, last = (max(part[1].start, number * rows), min(part[1].stop, (number + 1) * rows))
                if first < last:
                    inside = slice(first - number * rows, last - number * rows)
                    place = slice(first - part[1].start, last - part[1].start)
                    yield name, (inside, *part[2:]), (expert - part[0].start, place)


def understood(causal_lm: PreTrainedModel) -> bool:
    """Whether files hold this model's tensors as they are, but for experts one by one."""
    return _rules(causal_lm) is not None


def pieces(causal_lm: PreTrainedModel) -> dict[str, Pieces]:
    """By name, the tensors of the model that files hold in pieces; empty where ``understood`` is false."""
    rules = _rules(causal_lm) or {}
    found = {}
    for name, _ in causal_lm.named_parameters():
        for target, sources in rules.items():
            if name.endswith(f".{target}"):
                prefix = name.removesuffix(target)
                found[name] = Pieces([prefix + source for source in sources])
    return found


def _rules(causal_lm: PreTrainedModel) -> dict[str, list[str]] | None:
    """End of the fused name → ends of the names in files; None for conversions of another kind."""
    rules: dict[str, list[str]] = {}
    for conversion in get_model_conversion_mapping(causal_lm, add_legacy=False):
        steps = [(type(one).__name__, getattr(one, "dim", None)) for one in getattr(conversion, "operations", ())]
        sources, targets = list(conversion.source_patterns), list(conversion.target_patterns)
        one_by_one = len(targets) == 1 and all(source.count("*") == 1 for source in sources)
        if not one_by_one or steps != ([_STACK] if len(sources) == 1 else [_STACK, _JOIN]):
            return None
        rules[targets[0]] = sources
    return rules
