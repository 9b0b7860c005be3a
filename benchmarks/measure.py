"""The stopwatch of the benchmarks: interleaved rounds, medians with p20 and p80, peak memory, a time limit.

Competitors take turns: every round runs each of them once, so that a slow minute of the machine hits all alike. One
that fails (out of memory, an unsupported device) becomes a ``Skipped`` with its reason and the others go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import Book, Row, slug, table_lines

Work = Callable[[], object]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Skipped:
    """Why a competitor has no figures."""

    reason: str


@dataclass
class Timing:
    """Seconds of every round, and bytes above the level before the call (None: not measurable here)."""

    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Seconds below which ``share`` of the rounds lie, interpolated."""
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def cells(self) -> dict[str, float]:
        """Columns of a table: milliseconds."""
        return {"ms": 1e3 * self.median, "p20": 1e3 * self.quantile(0.2), "p80": 1e3 * self.quantile(0.8)}


class Bench:
    """Times functions against each other and keeps the tables.

    Args:
        rounds: interleaved rounds per table.
        out: folder of the results; ``benchmarks/results`` when None.
        stem: name of the result files in it; device and date when None.
        show: prints a line.
        deadline: ``time.monotonic()`` after which nothing new is started.
    """

    def __init__(
        self,
        *,
        rounds: int = 7,
        out: Path | None = None,
        stem: str | None = None,
        show: Callable[[str], object] = print,
        deadline: float = float("inf"),
    ):
        self.rounds, self.show, self.deadline = rounds, show, deadline
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        results = Path(__file__).parent / "results"
        self.folder: Path = out or results / slug()  # of benchmarks that write files of their own
        self.book = Book(out or results, stem)
        self.failures: list[str] = []
        """What of fastkd's own failed: the run fails for it, after the tables are written."""

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def race(
        self,
        competitors: Mapping[str, Work],
        *,
        rounds: int | None = None,
        limit: float = 60.0,
        warm: bool = True,
        memory: bool = True,
    ) -> dict[str, Timing | Skipped]:
        """Time and peak memory of each: a warm-up, a call for the memory, then interleaved rounds.

        Args:
            rounds: at most so many; ``self.rounds`` when None.
            limit: seconds for the rounds; they end early (after one at least) when the next would not fit.
            warm: False where the memory call is warm-up enough.
            memory: False leaves the memory out.
        """
        results: dict[str, Timing | Skipped] = {}
        for name, work in competitors.items():
            results[name] = timing = Timing()
            try:
                if self.late:
                    raise TimeoutError("no time left")
                if warm or not memory:
                    work()
                    self.wait()
                if memory:
                    timing.extra_bytes = self.peak_bytes(work)
            except Exception as error:
                results[name] = Skipped(reason(error))
                error.__traceback__ = None  # its frames would keep the tensors alive
                self.clean()
        running = {name: work for name, work in competitors.items() if isinstance(results[name], Timing)}
        began = time.monotonic()
        for number in range(self.rounds if rounds is None else rounds):
            spent = time.monotonic() - began
            if number and (spent + spent / number > limit or self.late):
                break
            for name, work in running.items():
                timing = results[name]
                if isinstance(timing, Timing):
                    try:
                        timing.seconds.append(self.seconds(work))
                    except Exception as error:
                        results[name] = Skipped(reason(error))
                        error.__traceback__ = None
                        self.clean()
        return results

    def seconds(self, work: Work) -> float:
        """One call: between two CUDA events on the GPU, by the clock elsewhere."""
        self.wait()
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, work: Work) -> int | None:
        """Most memory above the level before: the allocator's count on CUDA, resident memory on Linux, else None."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            self.wait()
            return torch.cuda.max_memory_allocated() - before
        self.trim()
        try:
            _CLEAR.write_text("5")  # the peak (VmHWM) becomes what is resident now
        except OSError:
            work()
            return None
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Drop what only reference cycles hold, and give freed memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.trim()

    def trim(self) -> None:
        """Give freed host memory back, so that the next measurement starts from a true level."""
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def free_bytes(self) -> int:
        """Memory that can still be allocated."""
        if self.device.type == "cuda":
            self.clean()  # cached blocks count as used
            return torch.cuda.mem_get_info()[0]
        info = Path("/proc/meminfo")
        if not info.exists():
            return 8 << 30
        line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024

    def lacks(self, needed: int) -> str | None:
        """The reason to skip what needs so many bytes, or None when they are there."""
        free = self.free_bytes()
        if needed <= 0.9 * free:
            return None
        return f"would need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"

    def report(self, name: str, title: str, rows: list[Row], **facts: Any) -> None:
        """Print a table and put it into the result files; ``rounds`` among the facts joins the title."""
        if facts.get("rounds", 0) > 1:
            title = f"{title}; medians of {facts['rounds']} rounds"
        self.show(f"\n\n{title}\n")
        for line in table_lines(rows):
            self.show(line)
        self.book.put(name, title, rows, facts)


def reason(error: BaseException) -> str:
    """One line of what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"error: {type(error).__name__}: {text}"[:160].rstrip(": ")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
