"""One rank of a test: a program run in a forked process, its output in a file."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path


def run(program: str, arguments: list[str], log: str) -> None:
    """``python program arguments…`` in this process; its exit status becomes the process's."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).parent))
    try:
        runpy.run_path(program, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
