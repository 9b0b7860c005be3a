"""Finds out that a .bin was written with another tokenizer, before a run trains on nonsense.

Ids beyond the vocabulary say so at once. Otherwise: decoded with the right tokenizer and encoded again, a document
gives nearly the same ids; with a wrong one it becomes another text, of which only a part of the ids survives.
"""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from fastkd.blends.indexed import IndexedSource
from fastkd.errors import DataError

_DOCUMENTS, _TOKENS, _ALIKE = 32, 512, 0.9


def check(source: IndexedSource, tokenizer: Any) -> None:
    """Look at some documents spread over the source. DataError: they were not written with this tokenizer."""
    alike = []
    for document in range(0, len(source), max(len(source) // _DOCUMENTS, 1)):
        tokens = source.tokens(document)
        require_known(tokens, len(tokenizer), source.where(document))
        if tokens:
            alike.append(likeness(tokens[:_TOKENS], tokenizer))
    if alike and median(alike) < _ALIKE:
        raise DataError(
            "data.blend",
            f"{source.path}.bin was tokenised with another tokenizer than policy.tokenizer.name: decoded and encoded "
            f"again, its documents keep {median(alike):.0%} of their ids (at least {_ALIKE:.0%} with the right one)",
            "Tokenise the data again, or give the tokenizer it was made with; data.blend.check_tokenizer=false "
            "trains on it as it is",
        )


def require_known(tokens: list[int], vocabulary: int, where: str) -> None:
    """DataError when an id lies outside the vocabulary."""
    if tokens and (max(tokens) >= vocabulary or min(tokens) < 0):
        wrong = max(tokens) if max(tokens) >= vocabulary else min(tokens)
        raise DataError(
            where,
            f"holds token id {wrong}, and the tokenizer has ids 0 … {vocabulary - 1}: the data was made with another",
            "Tokenise the data again with policy.tokenizer.name, or give the tokenizer it was made with",
        )


def likeness(tokens: list[int], tokenizer: Any) -> float:
    """The share of ids that survive decoding and encoding, whatever their places: 1 for the tokenizer of the text."""
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False).input_ids
    return sum((Counter(tokens) & Counter(again)).values()) / max(len(tokens), len(again), 1)
