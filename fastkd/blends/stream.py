"""The samples of a blend, step by step, as rollouts whose response is the text of the data.

What the student would have written is here what somebody else wrote: the same teacher scores it, the same student
trains on it, and nothing else of the engine knows the difference. ``consumed`` is the whole state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.batch import Prompt, Rollout
from fastkd.blends import foreign
from fastkd.blends.blend_file import BlendFile, read_blend
from fastkd.blends.indexed import IndexedSource, Pieces
from fastkd.blends.mixing import Mixture, Order
from fastkd.blends.places import find_blend
from fastkd.blends.records import Renderer, Text
from fastkd.blends.sources import Source, open_source, try_records
from fastkd.config.blend import Blend
from fastkd.log import logger


@dataclass(frozen=True, slots=True)
class Share:
    """What one source gives to a run."""

    path: str
    share: float
    """Of all samples, in [0, 1]."""
    documents: int
    samples: int
    """Drawn from it in the whole run, to within the number of sources."""

    @property
    def epochs(self) -> float:
        """How often each of its documents is read; above 1 documents repeat."""
        return self.samples / self.documents

    def __str__(self) -> str:
        """One line for the log."""
        return f"{self.share:6.1%} {self.samples:>11,} of {self.documents:,} documents, {self.epochs:.2f} epochs: " + (
            self.path
        )


class BlendStream:
    """Samples of one split; ``next`` gives those of a step.

    Args:
        sources: of the split, with a positive weight each.
        weights: relative shares.
        renderer: for sources of records.
        batch: samples of a step.
        limit: policy.max_total_sequence_length.
        config: data.blend.
        split: train, valid or test; with the seed it decides the order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        renderer: Renderer,
        batch: int,
        limit: int,
        config: Blend,
        split: str = "train",
    ):
        self.sources, self.renderer, self.batch, self.limit, self.config = sources, renderer, batch, limit, config
        self.names = _names([source.path for source in sources])
        """Of the sources, in metrics: files' names without ending, all different."""
        self.mixture = Mixture(weights)
        self._orders = [
            Order(len(source), config.seed, split, number, shuffle=config.shuffle)
            for number, source in enumerate(sources)
        ]
        self._vocabulary = len(renderer.tokenizer)
        self.consumed = 0
        """Samples given so far."""

    def origins(self, start: int, count: int) -> list[tuple[int, int]]:
        """(source, document) of samples start … start + count - 1."""
        draws = self.mixture.draws(start, count)
        return [(draw.source, self._orders[draw.source].document(draw.turn)) for draw in draws]

    def next(self, count: int | None = None) -> list[Rollout]:
        """The samples of the next step, or of ``count``.

        A document that has nothing to predict, or is dropped for its length, comes without a response: it is consumed
        and has no weight in the loss.

        Raises:
            DataError: a document cannot be used; it is named by file and line.
        """
        count = self.batch if count is None else count
        origins = self.origins(self.consumed, count)
        self.consumed += count
        return self._rollouts(origins)

    def skip(self, steps: int = 1) -> None:
        """Pass over the samples of some steps without reading them."""
        self.consumed += steps * self.batch

    def text(self, rollout: Rollout) -> str:
        """A sample as text again, special tokens included."""
        return self.renderer.tokenizer.decode([*rollout.prompt.tokens, *rollout.response])

    def shares(self, samples: int) -> list[Share]:
        """What each source gives to a run of so many samples."""
        rows = zip(self.sources, self.mixture.shares, strict=True)
        return [Share(source.path, share, len(source), round(share * samples)) for source, share in rows]

    def _rollouts(self, origins: list[tuple[int, int]]) -> list[Rollout]:
        texts: list[Text] = []
        ready: list[tuple[list[int], int] | None] = []
        for number, document in origins:
            source = self.sources[number]
            if isinstance(source, IndexedSource | Pieces):
                tokens = source.tokens(document)
                foreign.require_known(tokens, self._vocabulary, source.where(document))
                ready.append((tokens, 1))
            else:
                texts.append(self.renderer(source.record(document), source.where(document)))
                ready.append(None)
        encoded = iter(self.renderer.encode(texts))
        return [
            self._rollout(self.names[number], document, *(made or next(encoded)))
            for (number, document), made in zip(origins, ready, strict=True)
        ]

    def _rollout(self, source: str, document: int, tokens: list[int], read: int) -> Rollout:
        whole = len(tokens) <= self.limit
        if not whole:
            tokens = tokens[:1] if self.config.overlong == "drop" else tokens[: self.limit]
        response = tuple(tokens[read:])
        prompt = Prompt(document, "", None, "", tuple(tokens[:read]), masked=not response, source=source)
        return Rollout(prompt, 0, response, finished=whole, weights_version=0)


def _names(paths: Sequence[str]) -> list[str]:
    stems = [Path(path).stem for path in paths]
    # Two files of one name in different folders are told apart by their place in the blend.
    return [f"{stem}_{place}" if stems.count(stem) > 1 else stem for place, stem in enumerate(stems)]


def open_blend(
    config: Blend,
    tokenizer: Any,
    *,
    batch: int,
    limit: int,
    split: str = "train",
    folders: Sequence[Path] = (),
    template_kwargs: dict[str, Any] | None = None,
) -> BlendStream | None:
    """The samples of one split of the blend that a recipe names; None when the blend has no such split.

    Args:
        config: data.blend.
        tokenizer: the student's.
        batch: samples of a step.
        limit: longest sequence in tokens.
        split: train, valid or test.
        folders: where relative paths may lie, besides the current folder and that of the blend file.
        template_kwargs: policy.tokenizer.chat_template_kwargs.

    Raises:
        DataError: the file or a source is missing, empty or damaged, or was made with another tokenizer.
        ModelError: a chat variant without a chat template.
    """
    path, variant = find_blend(config, folders)
    blend: BlendFile = read_blend(path)
    renderer = Renderer(config, variant, tokenizer, template_kwargs)
    sources, weights = [], []
    for entry in blend.splits[split]:
        if entry.weight == 0:
            logger.info(f"data.blend: {entry.path} has weight 0 in {split} and is left out")
            continue
        source = open_source(entry.path, [path.parent, *folders], renderer.columns)
        if not isinstance(source, IndexedSource):
            try_records(source, renderer)
            if config.overlong == "split":
                logger.info(f"data.blend.overlong=split: texts of {source.path} are cut, their length is not known")
        elif config.check_tokenizer:
            foreign.check(source, tokenizer)
        if isinstance(source, IndexedSource) and config.overlong == "split":
            source = Pieces(source, limit)
        sources.append(source)
        weights.append(entry.weight if entry.weight is not None else float(len(source)))
    return BlendStream(sources, weights, renderer, batch, limit, config, split) if sources else None
