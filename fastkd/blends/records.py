"""From a record to the text that is trained on: plain or through the chat template, with the reasoning or without.

A record is one of three things, told apart by its columns: a whole ``text``, taken as it is; a list of ``messages``
(role and content, or ShareGPT's from and value); or an ``input``, text or messages, with its ``output``. Reasoning
comes from a column of its own or from a leading ``<think>`` block of the last answer; the variants without ``cot``
leave it out. Plain text of a conversation names the speakers, "User: … Assistant: …", as the data of the QAD scripts
does.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, NamedTuple

from fastkd.config.blend import Blend, Variant
from fastkd.errors import DataError, ModelError, RecipeError, reason

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_ROLES = {"human": "user", "gpt": "assistant"}
_LABELS = {"system": "System", "user": "User", "assistant": "Assistant"}


class Text(NamedTuple):
    """A text in two parts."""

    read: str
    """What is only read: empty when every token counts."""
    counted: str
    """What counts in the loss."""


class Renderer:
    """Turns records into texts as ``data.blend`` says.

    Args:
        config: data.blend.
        variant: the one in force.
        tokenizer: the student's.
        template_kwargs: policy.tokenizer.chat_template_kwargs.

    Raises:
        ModelError: a chat variant, and the tokenizer has no chat template.
    """

    def __init__(self, config: Blend, variant: Variant, tokenizer: Any, template_kwargs: dict[str, Any] | None = None):
        self.config, self.tokenizer = config, tokenizer
        self.template_kwargs = template_kwargs or {}
        self.chat, self.cot = "chat" in variant, "cot" in variant
        if self.chat and not tokenizer.chat_template:
            raise ModelError(
                "policy.tokenizer.chat_template",
                f"the tokenizer has no chat template, and data.blend.variant is {variant}",
                "Give a template, or set data.blend.variant=plain",
            )
        # Only what the tokenizer itself puts before a text: Llama's begins with a token of its own, Qwen's does not.
        special = tokenizer("").input_ids
        self.start = special[:1] if special and special[0] == tokenizer.bos_token_id else []

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a record may need."""
        config = self.config
        keys = (config.text_key, config.messages_key, config.input_key, config.output_key, config.reasoning_key)
        return (*keys, "conversations")

    def __call__(self, record: dict[str, Any], where: str) -> Text:
        """The text of a record; ``where`` names it in errors. DataError: a column is missing or of the wrong kind."""
        config = self.config
        others = (config.messages_key, "conversations", config.input_key)
        if config.text_key in record and (
            record[config.text_key] is not None or all(record.get(key) is None for key in others)
        ):
            if config.train_on == "response":
                raise RecipeError(
                    "data.blend.train_on",
                    f"{where} has a whole text, in which no response can be told from its prompt",
                    "Set data.blend.train_on=all, or give messages, or input and output",
                    value=config.train_on,
                )
            return Text("", self._string(record, config.text_key, where))
        messages = self._messages(record, where)
        before, answer = messages[:-1], messages[-1]["content"]
        try:
            whole = self._whole([*before, {"role": "assistant", "content": answer}])
            if config.train_on == "all":
                return Text("", whole)
            prompt = self._prompt(before)
        except DataError:
            raise
        except Exception as error:  # whatever a template raises
            raise DataError(where, f"the chat template refuses it ({reason(error)})", "Mend the record") from error
        if not whole.startswith(prompt):
            raise RecipeError(
                "data.blend.train_on",
                f"the chat template writes the conversation of {where} otherwise than the prompt alone",
                "Set data.blend.train_on=all",
                value=config.train_on,
            )
        return Text(prompt, whole[len(prompt) :])

    # --- conversations --------------------------------------------------------------------------------------------

    def _messages(self, record: dict[str, Any], where: str) -> list[dict[str, str]]:
        """The conversation, its last message the answer, with or without reasoning."""
        config = self.config
        name = next((key for key in (config.messages_key, "conversations") if record.get(key) is not None), None)
        if name is not None:
            messages = self._list(record[name], name, where)
            if not messages or messages[-1]["role"] != "assistant":
                raise DataError(where, f"{name} does not end with a message of the assistant", "Mend or remove it")
        elif config.input_key in record and config.output_key in record:
            asked = record[config.input_key]
            messages = self._list(asked, config.input_key, where) if isinstance(asked, list) else None
            if messages is None:
                messages = [{"role": "user", "content": self._string(record, config.input_key, where)}]
            messages.append({"role": "assistant", "content": self._string(record, config.output_key, where)})
        else:
            raise self._no_columns(record, where)
        answer = messages[-1]["content"]
        thought = _THOUGHT.match(answer)
        if thought:
            answer = answer[thought.end() :]
        reasoning = record.get(config.reasoning_key) or (thought[1] if thought else "")
        if self.cot and str(reasoning).strip():
            answer = f"<think>\n{str(reasoning).strip()}\n</think>\n\n{answer}"
        return [*messages[:-1], {"role": "assistant", "content": answer}]

    def _no_columns(self, record: dict[str, Any], where: str) -> DataError:
        config = self.config
        wanted = (config.text_key, config.messages_key, config.input_key, config.output_key)
        near = [(key, match[0]) for key in wanted if (match := get_close_matches(key, record, n=1))]
        kinds = f"{config.text_key}, or {config.messages_key}, or {config.input_key} and {config.output_key}"
        setting = {config.text_key: "text_key", config.messages_key: "messages_key", config.input_key: "input_key"}
        remedy = "Name its columns with data.blend.text_key, messages_key, or input_key and output_key"
        if near:
            remedy = f"Set data.blend.{setting.get(near[0][0], 'output_key')}={near[0][1]}"
        return DataError(where, f"has columns {', '.join(record) or '(none)'}; needed: {kinds}", remedy)

    def _string(self, record: dict[str, Any], column: str, where: str) -> str:
        value = record[column]
        if not isinstance(value, str):
            raise DataError(where, f"{column} is {_kind(value)}, must be text", "Mend or remove it")
        return value

    def _list(self, value: Any, column: str, where: str) -> list[dict[str, str]]:
        found = []
        for place, message in enumerate(value if isinstance(value, list) else [value]):
            role = message.get("role", message.get("from")) if isinstance(message, dict) else None
            content = message.get("content", message.get("value")) if isinstance(message, dict) else None
            if not isinstance(role, str) or not isinstance(content, str):
                rule = f"{column}, message {place + 1}, is no mapping of role and content (text)"
                raise DataError(where, rule, "Mend or remove it")
            found.append({"role": _ROLES.get(role, role), "content": content})
        return found

    # --- texts ----------------------------------------------------------------------------------------------------

    def _whole(self, messages: list[dict[str, str]]) -> str:
        if self.chat:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.template_kwargs)
        return "\n\n".join(f"{_label(message)} {message['content']}" for message in messages)

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        if self.chat:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        return "\n\n".join([*(f"{_label(one)} {one['content']}" for one in messages), "Assistant: "])

    # --- tokens ---------------------------------------------------------------------------------------------------

    def encode(self, texts: list[Text]) -> list[tuple[list[int], int]]:
        """(token ids, how many of the first only are read) of each text; all are tokenised in one call.

        At least one token is only read: nothing predicts it.
        """
        flat = [part for text in texts for part in text]
        ids = self.tokenizer(flat, add_special_tokens=False).input_ids if flat else []
        found = []
        for read, counted in zip(ids[::2], ids[1::2], strict=True):
            # A template writes the first and the last special token itself.
            head = [] if self.chat else self.start
            tail = [] if self.chat or not self.config.append_eos else [self.tokenizer.eos_token_id]
            found.append((head + read + counted + tail, max(len(head) + len(read), 1)))
        return found


def _label(message: dict[str, str]) -> str:
    return f"{_LABELS.get(message['role'], message['role'].capitalize())}:"


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
