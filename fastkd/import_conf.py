"""``python -m fastkd.import_conf x.conf``: a recipe from a configuration of Megatron's QAD scripts.

The file is read, never run. A table says of every variable which key it became, why it has none, or what is wrong with
it. With an error nothing is written and the exit code is 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from pathlib import Path

from omegaconf import OmegaConf

from fastkd.conf.convert import convert
from fastkd.conf.draft import Conversion, Row
from fastkd.config.interpolate import escape
from fastkd.errors import RecipeError, UserError
from fastkd.files import write_text

OK, USER_MISTAKE = 0, 2

_EPILOG = """\
examples:
  python -m fastkd.import_conf qwen3-8b-default.conf --hf
  python -m fastkd.import_conf qwen3-8b-default.conf STUDENT_CKPT=Qwen/Qwen3-8B TEACHER_CKPT=Qwen/Qwen3-8B LR=1e-5
  python -m fastkd.import_conf moe.conf --hf NNODES=4 -o recipes/moe.yaml --force
"""


def main(argv: list[str] | None = None) -> int:
    """Convert a file; returns the exit code. ``argv`` defaults to the process's arguments."""
    options = _parser().parse_intermixed_args(argv)
    target = Path(options.output or f"{Path(options.conf).stem}.yaml")
    try:
        overrides = _overrides(options.variable)
        converted = convert(options.conf, overrides, os.environ, take_hugging_face=options.hf)
        print(table(converted.rows))
        if converted.errors:
            print(
                f"\nerror: {len(converted.errors)} of them must be settled first; nothing was written", file=sys.stderr
            )
            return USER_MISTAKE
        write(converted, target, Path(options.conf).name, force=options.force)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_MISTAKE
    print(f"\nwrote {target}. Check it with: python -m fastkd.run {target} --check")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.import_conf",
        description="Make a recipe of a .conf file of Megatron's QAD scripts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("conf", metavar="CONF", help="the shell file; it is read, never run")
    parser.add_argument("variable", nargs="*", metavar="NAME=VALUE", help="variables that win over the file")
    parser.add_argument("-o", "--output", help="the recipe to write (default: the file's name with .yaml, here)")
    parser.add_argument("--hf", action="store_true", help="for Megatron checkpoints take the Hugging Face models")
    parser.add_argument("--force", action="store_true", help="overwrite a recipe that is there")
    return parser


def _overrides(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise RecipeError("NAME=VALUE", f"{name!r} is no assignment", "Write LR=1e-5")
        found[name] = value
    return found


def write(converted: Conversion, path: Path, source: str, *, force: bool = False) -> None:
    """Write the recipe under a temporary name, then rename. RecipeError: it is there already, or cannot be written."""
    if path.exists() and not force:
        raise RecipeError("--output", "the file is there already", "Add --force to overwrite it", value=str(path))
    text = f"# Made of {source} by fastkd.import_conf.\n" + OmegaConf.to_yaml(
        OmegaConf.create(escape(converted.recipe))
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise RecipeError(
            "--output", f"cannot be written ({error.strerror})", "Give another", value=str(path)
        ) from error


def table(rows: list[Row], width: int = 118) -> str:
    """The rows by outcome, as text: what is mapped, what is a default, what is ignored, what is wrong."""
    blocks = []
    first = max([len(row.variable) for row in rows], default=0)
    for outcome, title in (
        ("mapped", "mapped"),
        ("default", "not given: as the scripts have it"),
        ("ignored", "without a key"),
        ("error", "errors"),
    ):
        chosen = [row for row in rows if row.outcome == outcome]
        if not chosen:
            continue
        lines = [f"{title}:"]
        for row in chosen:
            head = f"  {row.variable:<{first}}  "
            shown = f"{row.value} → " if row.value and outcome == "mapped" else f"{row.value}: " if row.value else ""
            lines += textwrap.wrap(
                shown + row.text,
                width,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    raise SystemExit(main())
