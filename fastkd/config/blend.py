"""``data.blend``: off-policy training on texts that exist, mixed from several sources as a Megatron blend says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastkd.config.base import Count, Index, Section, derived

Variant = Literal["plain", "cot", "chat", "cot_chat"]


class Blend(Section):
    """A mix of texts to train on in place of the student's own samples. Off until `path` or `name` is set."""

    path: str | None = None
    """A Megatron blend file, `{"train": [weight, source, …], "valid": […], "test": […]}`. A source is a .jsonl or
    .parquet file (or a folder or pattern of the latter), or the prefix of a Megatron .bin/.idx pair."""
    name: str | None = None
    """A blend known by name (`openscience`, `combined_v2_cot_chat`, …): the file `datablend_<name>.json` in `folder`,
    and a default for `train_samples`. With `path` it is only a label."""
    folder: str = "."
    """Where the file of a named blend is."""
    train_samples: Count | None = None
    """Samples to train on, a sample being one document; null = the size of the named blend, else
    `distillation.max_num_steps` steps."""
    variant: Variant | None = None
    """How records of messages or of input and output become text: `plain` (User: … Assistant: …), `cot` (with the
    reasoning), `chat` (through the chat template) or `cot_chat`; null = what its name or file name ends in. A `text`
    column is taken as it is."""
    train_on: Literal["all", "response"] = "all"
    """Which tokens count in the loss: all, or those of the last assistant turn alone."""
    overlong: Literal["truncate", "drop", "split"] = "truncate"
    """A document longer than `policy.max_total_sequence_length`: cut it, give it no weight, or make several samples of
    it (those of .bin/.idx sources; the others are cut)."""
    append_eos: bool = True
    """End plain texts with the end-of-sequence token (a chat template ends its turns itself)."""
    shuffle: bool = derived("${data.shuffle}")
    """Read each source in a new random order in every epoch; false = in the order of the file."""
    seed: Index = derived("${distillation.seed}")
    """Seed of those orders."""
    iterations_to_skip: Index | list[Count] = 0
    """Steps whose samples are passed over without training: the first N, or a list of step numbers (from 1)."""
    text_key: str = Field(default="text", min_length=1)
    """Column of whole texts."""
    messages_key: str = Field(default="messages", min_length=1)
    """Column of conversations; `conversations` is recognised too."""
    input_key: str = Field(default="input", min_length=1)
    """Column of what is asked: text, or a list of messages."""
    output_key: str = Field(default="output", min_length=1)
    """Column of what is answered."""
    reasoning_key: str = Field(default="reasoning", min_length=1)
    """Column of the reasoning before the answer; without it, a leading `<think>` block of the answer is meant."""
    check_tokenizer: Annotated[bool, Field(strict=True)] = True
    """Decode and encode some .bin documents again at the start, to find out a foreign tokenizer."""

    @property
    def enabled(self) -> bool:
        """Whether the run trains on a blend."""
        return self.path is not None or self.name is not None

    def skips(self, step: int) -> bool:
        """Whether a step (from 1) is passed over."""
        skipped = self.iterations_to_skip
        return step in skipped if isinstance(skipped, list) else step <= skipped
