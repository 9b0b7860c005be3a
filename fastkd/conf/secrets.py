"""What must not be written: tokens and passwords, told by the variable's name or by the look of the value."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?|AUTH)(_|$)", re.I)
_VALUE = re.compile(
    r"\b(?:hf_\w{6,}|nvapi-[\w-]{6,}|sk-[\w-]{8,}|gh[pousr]_\w{8,}|github_pat_\w+|glpat-[\w-]{8,}|AKIA[0-9A-Z]{12,}"
    r"|xox[abp]-[\w-]{8,})|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"
)
HIDDEN = "***"


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return _NAME.search(name) is not None


class Secrets:
    """The secrets of one import; ``hide`` takes them out of a text."""

    def __init__(self, variables: Mapping[str, str]):
        # A short value ("1", "none") is no secret, and hiding it would spoil every other text.
        self._values = sorted(
            {value for name, value in variables.items() if is_secret(name) and len(value) >= 6}, key=len, reverse=True
        )

    def hide(self, text: str) -> str:
        """The text with every secret replaced."""
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return _VALUE.sub(HIDDEN, text)

    def holds(self, text: str) -> bool:
        """Whether a text contains one."""
        return self.hide(text) != text
