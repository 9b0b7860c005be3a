"""Where figures go: one JSON and one Markdown per device and day, merged table by table; and the hardware's name.

``<device>_<date>.json`` holds every table measured on that day, each with its time and commit, so that several
benchmark files and re-runs of a part end up in one record. The Markdown beside it is made from the JSON.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
"""Column heading → number or text. A row without figures says why under "note"."""
ROOT = Path(__file__).resolve().parents[1]


def hardware() -> str:
    """Name of the accelerator, or of the processor and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1]
    return f"{name} {torch.get_num_threads()} threads"


def slug() -> str:
    """The hardware as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")


def facts() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {name: _version(name) for name in ("triton", "transformers", "liger-kernel", "cut-cross-entropy")}
    return {
        "hardware": hardware(),
        "driver": _driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        **versions,
        "threads": torch.get_num_threads(),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "commit": commit(),
    }


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query)


@functools.cache
def commit() -> str | None:
    """Commit of the checkout, with a + where tracked files differ from it; None outside of git."""
    found = _output(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"])
    if found is None:
        return None
    return found + ("+" if _output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]) else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.strip()
    return text.splitlines()[0] if done.returncode == 0 and text else None


class Book:
    """The result files of one device and day in ``folder``."""

    def __init__(self, folder: Path, stem: str | None = None):
        self.path = folder / f"{stem or f'{slug()}_{datetime.date.today().isoformat()}'}.json"

    def read(self) -> dict[str, Any]:
        """What is there already."""
        return json.loads(self.path.read_text()) if self.path.exists() else {"tables": {}}

    def put(self, name: str, title: str, rows: Sequence[Row], more: Mapping[str, Any]) -> None:
        """Add or replace one table in the JSON, and write the Markdown again."""
        known = facts()
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        table = {"title": title, "measured": now, "commit": known["commit"], **more, "rows": list(rows)}
        record = self.read()
        self.write({**known, "tables": {**record["tables"], name: table}})

    def write(self, record: Mapping[str, Any]) -> None:
        """Both files, each replaced in one piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.path, json.dumps(record, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown(record, self.path.with_suffix(".png"))),
        ):
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text)
            temporary.replace(path)


def facts_line(record: Mapping[str, Any]) -> str:
    """Hardware and versions in one line."""
    known = {key: value for key, value in record.items() if key not in ("tables", "hardware", "commit") and value}
    line = ", ".join(f"{key} {value}" if value is not True else key for key, value in known.items())
    return f"{record['hardware']}: {line}; commit {record['commit']}."


def markdown(record: Mapping[str, Any], picture: Path) -> str:
    """The document of a record."""
    lines = [f"# {record['hardware']}", "", facts_line(record)]
    if picture.exists():
        lines += ["", f"![time and memory against N]({picture.name})"]
    for table in record["tables"].values():
        lines += ["", f"## {table['title']}", "", *table_lines(table["rows"])]
    return "\n".join(lines) + "\n"


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Markdown of a table; its columns are those of any row, in the order they appear, notes last."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "note"))
    if any("note" in row for row in rows):
        columns.append("note")
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    return [line(columns), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, cells)]


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
