"""What fastkd raises: errors a person can act on, each also a standard exception type."""

from __future__ import annotations

from typing import Any

_UNSET = object()


def reason(error: BaseException) -> str:
    """The first line of what a library said, or the error's type when it said nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _again(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class _Portable(BaseException):
    """Pickles as it is: an exception's own way calls ``__init__`` with the message alone."""

    def __reduce__(self) -> Any:
        return _again, (type(self), self.args, self.__dict__)


class UserError(_Portable, ValueError):
    """A mistake in what the user gave: says which key, its value, the rule it breaks, and the remedy.

    ``str(error)`` is one paragraph, ``"policy.model_name='x': no such folder. Give ..."``. The command
    line prints it without a traceback and exits with code 2; nothing has been written by then.
    """

    def __init__(self, key: str, rule: str, remedy: str = "", *, value: Any = _UNSET):
        self.key, self.rule, self.remedy, self.value = key, rule, remedy, value
        head = key if value is _UNSET else f"{key}={value!r}"
        text = f"{head}: {rule.rstrip('.')}."
        if remedy:
            text += f" {remedy.rstrip('.')}" + ("" if remedy.endswith("?") else ".")
        super().__init__(text)


class RecipeError(UserError):
    """The recipe (or an override) is wrong: unknown key, bad type, broken rule."""


class RecipeErrors(RecipeError):
    """Several problems of one recipe, reported together."""

    def __init__(self, errors: list[RecipeError]):
        self.errors = errors
        ValueError.__init__(self, "\n".join(str(error) for error in errors))
        first = errors[0]
        self.key, self.rule, self.remedy, self.value = first.key, first.rule, first.remedy, first.value


class DataError(UserError):
    """A dataset cannot be used: missing, empty, or without the column asked for."""


class ModelError(UserError):
    """A model or tokenizer cannot be used: missing, unreadable, or a pair that does not fit."""


class CheckpointError(UserError):
    """A checkpoint cannot be read or written."""


class MissingDependency(UserError, ImportError):
    """An optional package is needed; the remedy is the pip command that adds it."""


class WorkerError(_Portable, RuntimeError):
    """A worker failed; the message carries its role and rank, the cause its traceback."""

    gone = False
    """Whether its process or its node is gone, which says nothing against what it was given."""

    def __init__(self, role: str, rank: int, cause: BaseException):
        self.role, self.rank = role, rank
        super().__init__(f"{role} rank {rank}: {type(cause).__name__}: {cause}")


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient norm became NaN or infinite; training stopped before the weights changed."""
