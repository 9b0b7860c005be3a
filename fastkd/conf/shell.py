"""Reads assignments from a shell file without running anything.

What is understood: ``A=1``, ``export A=1 B=2``, ``readonly``, ``declare``/``typeset``, ``A+=x``, arrays ``A=(x y)``,
``: ${A:=x}``, single and double quotes, comments, continued lines, ``$A``, ``${A}`` and the defaults ``${A:-x}``,
``${A-x}``, ``${A:=x}``, ``${A:?why}``, ``${A:+x}``, nested too. What is not: conditions, loops, functions, other
commands, ``$(…)``, backquotes and ``$((…))``. Those are reported with their line, and what they would have set stays
unset: a value that is guessed is worse than one that is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastkd.errors import DataError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DECLARING = {"export", "readonly", "declare", "typeset", "local"}
_OPENS = {"if": "fi", "for": "done", "while": "done", "until": "done", "select": "done", "case": "esac", "{": "}"}
_HARMLESS = {"set", "unset", "echo", "printf", "true", ":", "return", "exit", "shopt", "umask", "ulimit"}


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a variable was set to."""

    value: str
    """Expanded; the items of an array joined by spaces."""
    line: int
    """0 when it does not come from the file."""
    computed: str | None = None
    """The part that only a shell could work out (``$(…)``), else None: the value is then incomplete."""


@dataclass(slots=True)
class ShellFile:
    """The outcome of reading a file."""

    variables: dict[str, Assignment] = field(default_factory=dict)
    unread: list[tuple[int, str]] = field(default_factory=list)
    """(line, text) of statements that were not read."""


class _Computed(Exception):
    """A part that only a shell could work out."""


def read_shell(
    path: str | Path, environment: Mapping[str, str] | None = None, fixed: Mapping[str, str] | None = None
) -> ShellFile:
    """Read a file of assignments.

    Args:
        path: the file.
        environment: values of variables that the file uses without setting them.
        fixed: values that the file cannot change.

    Raises:
        DataError: it cannot be read, or a quote or bracket is never closed.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("conf", f"cannot be read ({error})", "Give a shell file of assignments", value=str(path)) from (
            error
        )
    return parse(text, environment, fixed, str(path))


def parse(
    text: str,
    environment: Mapping[str, str] | None = None,
    fixed: Mapping[str, str] | None = None,
    name: str = "conf",
) -> ShellFile:
    """``read_shell`` of a text; ``name`` is what errors call it."""
    return _Reader(text, environment or {}, fixed or {}, name).read()


class _Reader:
    def __init__(self, text: str, environment: Mapping[str, str], fixed: Mapping[str, str], name: str):
        self.text, self.environment, self.fixed, self.name = text, environment, fixed, name
        self.found = ShellFile({variable: Assignment(value, 0) for variable, value in fixed.items()})

    def read(self) -> ShellFile:
        waiting: list[str] = []  # the words that end the blocks that are open
        for line, words, conditional in _split(self.text, self.name):
            if waiting:
                while len(words) > 1 and words[0] in ("then", "do", "else", "!"):
                    words = words[1:]
                if words[0] in _OPENS:
                    waiting.append(_OPENS[words[0]])
                elif words[0] == waiting[-1]:
                    waiting.pop()
                continue
            first = words[0]
            if first in _OPENS or first.endswith("()") or words[1:2] == ["()"] or first == "function":
                self._leave_out(line, words)
                waiting.append(_OPENS.get(first, "}"))
            elif conditional:  # behind && or ||: whether it runs, only a shell can say
                self._leave_out(line, words)
            else:
                self._statement(line, words)
        return self.found

    def _leave_out(self, line: int, words: list[str]) -> None:
        # What a command is given may be secret; its name is not.
        if words[0] not in _HARMLESS:
            self.found.unread.append((line, _short(words[0]) + " …" * (len(words) > 1)))

    def _statement(self, line: int, words: list[str]) -> None:
        if words[0] in _DECLARING:
            for word in words[1:]:
                if not word.startswith("-") and "=" in word:
                    self._assign(line, word)
            return
        if all(_is_assignment(word) for word in words):
            for word in words:
                self._assign(line, word)
            return
        if words[0] == ":":  # ": ${A:=x}" sets A as it expands
            for word in words[1:]:
                try:
                    self._expand(word, line)
                except _Computed:
                    self.found.unread.append((line, ": …"))
            return
        self._leave_out(line, words)

    def _assign(self, line: int, word: str) -> None:
        match = _NAME.match(word)
        if match is None:
            self._leave_out(line, [word.partition("=")[0], "…"])
            return
        name, rest = match[0], word[match.end() :]
        if name in self.fixed:
            return
        add = rest.startswith("+=")
        raw = rest[2 if add else 1 :]
        before = self.found.variables.get(name)
        computed = before.computed if add and before else None
        array = raw.startswith("(") and raw.endswith(")")
        try:
            if array:
                items = [self._expand(item, line) for _, one, _ in _split(raw[1:-1], self.name) for item in one]
                value = " ".join(items)
            else:
                value = self._expand(raw, line)
        except _Computed as error:
            value, computed = "", str(error)
        if add and before is not None:
            value = f"{before.value} {value}" if array else before.value + value
        self.found.variables[name] = Assignment(value, line, computed)

    # --- expansion ------------------------------------------------------------------------------------------------

    def _expand(self, word: str, line: int) -> str:
        out, at, quoted = [], 0, False
        while at < len(word):
            char = word[at]
            if char == "'" and not quoted:
                end = word.index("'", at + 1)
                out.append(word[at + 1 : end])
                at = end + 1
            elif char == '"':
                quoted = not quoted
                at += 1
            elif char == "\\" and at + 1 < len(word):
                following = word[at + 1]
                keep = quoted and following not in '$`"\\\n'
                out.append(("\\" if keep else "") + ("" if following == "\n" else following))
                at += 2
            elif char == "`":
                raise _Computed("`…`")
            elif char == "$":
                value, at = self._parameter(word, at, line)
                out.append(value)
            else:
                out.append(char)
                at += 1
        return "".join(out)

    def _parameter(self, word: str, at: int, line: int) -> tuple[str, int]:
        """The value of what begins with the ``$`` at this place, and the place behind it."""
        if word.startswith("$(", at):
            raise _Computed("$((…))" if word.startswith("$((", at) else "$(…)")
        if word.startswith("${", at):
            end = _closing(word, at + 1, self.name)
            return self._braced(word[at + 2 : end], line), end + 1
        match = _NAME.match(word, at + 1)
        if match is None:
            return "$", at + 1
        return self._value(match[0]) or "", match.end()

    def _braced(self, inside: str, line: int) -> str:
        match = _NAME.match(inside)
        if match is None:
            raise _Computed("${…}")
        name, rest = match[0], inside[match.end() :]
        if rest in ("", "[@]", "[*]"):
            return self._value(name) or ""
        colon = rest.startswith(":")
        operator, other = rest[colon : colon + 1], rest[colon + 1 :]
        if operator not in ("-", "=", "?", "+") or not operator:
            raise _Computed(f"${{{name}…}}")  # substrings, lengths, replacements
        value = self._value(name)
        there = bool(value) if colon else value is not None
        if operator == "+":
            return self._expand(other, line) if there else ""
        if there:
            return value or ""
        if operator == "?":
            return ""  # what is required and absent is reported by name later
        value = self._expand(other, line)
        if operator == "=":
            self.found.variables[name] = Assignment(value, line)
        return value

    def _value(self, name: str) -> str | None:
        assignment = self.found.variables.get(name)
        if assignment is None:
            return self.environment.get(name)
        if assignment.computed is not None:
            raise _Computed(assignment.computed)
        return assignment.value


def _split(text: str, name: str) -> Iterator[tuple[int, list[str], bool]]:
    """(line, words, whether a condition or pipe comes before) of each statement.

    Quotes, brackets and expansions stay inside their word.
    """
    words: list[str] = []
    word = ""
    conditional = False
    line = begin = 1
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\" and at + 1 < len(text):
            word += "" if text[at + 1] == "\n" else text[at : at + 2]
            line += text[at + 1] == "\n"
            at += 2
            continue
        if char == "#" and not word:
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        if char in "'\"`" or text.startswith(("${", "$("), at) or (char == "(" and word.endswith("=")):
            end = _closing(text, at + (char == "$"), name)
            if not words and not word:
                begin = line
            word += text[at : end + 1]
            line += text.count("\n", at, end + 1)
            at = end + 1
            continue
        if char in " \t\n;&|" and not (char == "&" and word.endswith(">")):
            if word:
                words.append(word)
                word = ""
            if char in "\n;&|":
                if words:
                    yield begin, words, conditional
                    conditional = char in "&|"
                    words = []
                elif char != "\n":  # the second of && or ||; a new line may follow it
                    conditional = char in "&|"
            line += char == "\n"
        else:
            if not words and not word:
                begin = line
            word += char
        at += 1
    if word:
        words.append(word)
    if words:
        yield begin, words, conditional


def _closing(text: str, at: int, name: str) -> int:
    """The place of what closes the quote or bracket at a place."""
    opening = text[at]
    if opening in "'`":
        end = text.find(opening, at + 1)
        if end < 0:
            raise _unclosed(text, at, name)
        return end
    closing = {'"': '"', "{": "}", "(": ")"}[opening]
    here = at + 1
    while here < len(text):
        char = text[here]
        if char == "\\":
            here += 2
            continue
        if char == closing:
            return here
        if text.startswith(("${", "$("), here):
            here = _closing(text, here + 1, name)
        elif (opening != '"' and char in "\"'`") or (opening == "(" and char == "("):
            here = _closing(text, here, name)
        elif opening == "(" and char == "#" and text[here - 1] in " \t\n(":
            end = text.find("\n", here)
            here = len(text) if end < 0 else end
        here += 1
    raise _unclosed(text, at, name)


def _unclosed(text: str, at: int, name: str) -> DataError:
    line = text.count("\n", 0, at) + 1
    return DataError(f"{name}:{line}", f"{text[at]} is never closed", "Close it")


def _is_assignment(word: str) -> bool:
    match = _NAME.match(word)
    return match is not None and word[match.end() :].startswith(("=", "+="))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}…"
