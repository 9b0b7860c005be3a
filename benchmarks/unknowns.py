"""The five unknowns that decide how fast the kernels can be, measured apart from them (notes.md has the predictions).

(a) a GEMM with float32 output against one with bfloat16 output; (b) dW accumulated in float32 with β = 1, by chunk
rows; (c) a bfloat16 operand whose rows are 2V apart, as dlogits written in place of float32 logits are; (d) the
bandwidth of the row kernels against a copy; (e) how much of the row kernels hides behind a GEMM on a second stream.
And two profiles: where the time of one ``topk_kl`` and one ``vocab_topk`` goes, kernel by kernel.

On a CPU the same functions run (in float32), to see that they are sound; what only CUDA has is skipped by name.

Letters: c rows of a chunk, D hidden, V vocabulary, K kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.measure import Bench, Skipped, Timing, Work
from benchmarks.providers import Shape, fused, make, step, work_dtype
from benchmarks.records import Row
from fastkd._kernels.row_passes import row_passes
from fastkd._kernels.rows import Objective, RowGradient, leading_dimension
from fastkd.kernels import vocab_topk

CHUNK = 2048


def unknowns_tables(bench: Bench, shape: Shape, chunk: int = CHUNK) -> None:
    """All of them at a shape; N is not used, a chunk of ``chunk`` rows is."""
    for table in (float32_output, accumulation, leading, bandwidth, overlap, profiles):
        if bench.late:
            bench.report(f"unknown_{table.__name__}", table.__name__, [{"what": "", "note": "not run: no time left"}])
            continue
        table(bench, shape, chunk)
        bench.clean()


def _random(bench: Bench, *size: int) -> Tensor:
    return torch.randn(*size, device=bench.device, dtype=work_dtype(bench.device)).mul_(0.1)


def _rows(timings: Mapping[str, Timing | Skipped], baseline: str, work: float, unit: str) -> list[Row]:
    """Times, rate (``work`` in 10¹² FLOP or 10⁹ bytes) and speed against ``baseline``."""
    base = timings.get(baseline)
    rows: list[Row] = []
    for name, timing in timings.items():
        if isinstance(timing, Skipped):
            rows.append({"what": name, "note": f"skipped: {timing.reason}"})
            continue
        row: Row = {"what": name, **timing.cells(), unit: work / timing.median}
        if isinstance(base, Timing):
            row["% of the first"] = 100.0 * base.median / timing.median
        rows.append(row)
    return rows


def float32_output(bench: Bench, shape: Shape, chunk: int) -> None:
    """(a)"""
    x, w = _random(bench, chunk, shape.d), _random(bench, shape.v, shape.d)
    same = torch.empty(chunk, shape.v, device=x.device, dtype=x.dtype)
    wide = torch.empty(chunk, shape.v, device=x.device)
    timings = bench.race(
        {
            "output in the operands' dtype": lambda: torch.mm(x, w.T, out=same),
            "output in float32": lambda: torch.mm(x, w.T, out_dtype=torch.float32, out=wide),
        },
        memory=False,
        limit=10.0,
    )
    rows = _rows(timings, "output in the operands' dtype", 2e-12 * chunk * shape.d * shape.v, "TFLOP/s")
    bench.report("unknown_a", f"(a) logits GEMM [{chunk}, {shape.d}] × [{shape.d}, {shape.v}]: output dtype", rows)


def accumulation(bench: Bench, shape: Shape, chunk: int) -> None:
    """(b)"""
    acc = torch.zeros(shape.v, shape.d, device=bench.device)
    rows = [row for c in (chunk // 2, chunk, 2 * chunk) for row in _accumulation(bench, shape, c, acc)]
    bench.report("unknown_b", f"(b) dW [{shape.v}, {shape.d}] accumulated in float32", rows)


def _accumulation(bench: Bench, shape: Shape, c: int, acc: Tensor) -> list[Row]:
    dz, x = _random(bench, c, shape.v), _random(bench, c, shape.d)
    same = torch.empty(shape.v, shape.d, device=x.device, dtype=x.dtype)
    mixed = {} if x.dtype == torch.float32 else {"out_dtype": torch.float32}

    def accumulate(beta: int) -> None:
        torch.addmm(acc, dz.T, x, beta=beta, out=acc, **mixed)

    first = f"{c} rows: no accumulation, operands' dtype"
    work: dict[str, Work] = {
        first: lambda: torch.mm(dz.T, x, out=same),
        f"{c} rows: float32, beta=0": lambda: accumulate(0),
        f"{c} rows: float32, beta=1": lambda: accumulate(1),
    }
    timings = bench.race(work, memory=False, limit=5.0)
    return _rows(timings, first, 2e-12 * c * shape.d * shape.v, "TFLOP/s")


def leading(bench: Bench, shape: Shape, chunk: int) -> None:
    """(c)"""
    x, w = _random(bench, chunk, shape.d), _random(bench, shape.v, shape.d)
    plain = _random(bench, chunk, shape.v)
    spread = torch.empty(chunk, 2 * leading_dimension(shape.v), device=x.device, dtype=x.dtype)[:, : shape.v]
    spread.copy_(plain)
    dx = torch.empty(chunk, shape.d, device=x.device, dtype=x.dtype)
    dw = torch.empty(shape.v, shape.d, device=x.device, dtype=x.dtype)
    rows: list[Row] = []
    for what, product in (
        ("dX = dZ W", lambda dz: torch.mm(dz, w, out=dx)),
        ("dW = dZᵀ X", lambda dz: torch.mm(dz.T, x, out=dw)),
    ):
        first = f"{what}: contiguous"
        timings = bench.race(
            {first: lambda f=product: f(plain), f"{what}: rows 2V apart": lambda f=product: f(spread)},
            memory=False,
            limit=5.0,
        )
        rows += _rows(timings, first, 2e-12 * chunk * shape.d * shape.v, "TFLOP/s")
    bench.report("unknown_c", f"(c) operand dZ [{chunk}, {shape.v}] with its rows 2V apart", rows)


def _row_work(bench: Bench, shape: Shape, chunk: int) -> tuple[str, dict[str, tuple[Work, float]]]:
    """Which passes run here (torch or Triton), and each with the bytes it has to move at least."""
    passes = row_passes(bench.device, torch.float32)
    o = Objective("forward", "bucket")
    leading_, v, k = leading_dimension(shape.v), shape.v, min(shape.k, shape.v)
    measured, written = (torch.randn(chunk, leading_, device=bench.device) for _ in range(2))
    ids_K = torch.rand(chunk, v, device=bench.device).topk(k, 1).indices.sort(1).values.int()
    _, columns_K = passes.pick_poison(written, ids_K, None, 0, v, o)
    tail = passes.tail_stats(written[:, :v], o)
    complete_K = measured.new_zeros(chunk, k)
    gradient = RowGradient(measured.new_full((chunk,), 1e-3), None, complete_K)
    narrow = work_dtype(bench.device)
    logits = float(chunk * v)
    kind = passes.tail_stats.__module__.rpartition(".")[2]
    return kind, {
        "pick_poison (K ids a row)": (
            lambda: passes.pick_poison(measured, ids_K, None, 0, v, o), chunk * k * (4 + 4 + 2 * 32.0)
        ),
        "tail_stats (read)": (lambda: passes.tail_stats(measured[:, :v], o), 4 * logits),
        "write_dlogits (read, write)": (
            lambda: passes.write_dlogits(written, v, columns_K, tail.max, tail.lse, gradient, o, narrow),
            (4 + narrow.itemsize) * logits,
        ),
    }  # fmt: skip


def bandwidth(bench: Bench, shape: Shape, chunk: int) -> None:
    """(d)"""
    source = torch.randn(chunk, shape.v, device=bench.device)
    target = torch.empty_like(source)
    kind, passes = _row_work(bench, shape, chunk)
    moved = {"copy (read, write)": 8.0 * source.numel(), "amax (read)": 4.0 * source.numel()}
    work: dict[str, Work] = {
        "copy (read, write)": lambda: target.copy_(source),
        "amax (read)": lambda: source.amax(1),
    }
    for name, (function, size) in passes.items():
        work[name], moved[name] = function, size
    timings = bench.race(work, memory=False, limit=10.0)
    rows: list[Row] = []
    copied = timings["copy (read, write)"]
    for name, timing in timings.items():
        if isinstance(timing, Skipped):
            rows.append({"what": name, "note": f"skipped: {timing.reason}"})
            if name in passes:
                bench.failures.append(f"{name}: {timing.reason}")
            continue
        rate = 1e-9 * moved[name] / timing.median
        row: Row = {"what": name, **timing.cells(), "least GB": 1e-9 * moved[name], "GB/s": rate}
        if isinstance(copied, Timing):
            row["% of the copy's"] = 100.0 * rate / (1e-9 * moved["copy (read, write)"] / copied.median)
        rows.append(row)
    bench.report("unknown_d", f"(d) row kernels ({kind}) on float32 [{chunk}, {shape.v}], K={shape.k}", rows)


def overlap(bench: Bench, shape: Shape, chunk: int) -> None:
    """(e)"""
    title = "(e) row kernels beside the dW GEMM, on two streams"
    if bench.device.type != "cuda":
        bench.report("unknown_e", title, [{"what": "two streams", "note": "skipped: needs a CUDA device"}])
        return
    dz, x = _random(bench, chunk, shape.v), _random(bench, chunk, shape.d)
    acc = torch.zeros(shape.v, shape.d, device=x.device)
    _, passes = _row_work(bench, shape, chunk)
    side = torch.cuda.Stream()

    def gemm() -> None:
        torch.addmm(acc, dz.T, x, out_dtype=torch.float32, beta=1, out=acc)

    def rows() -> None:
        for function, _ in passes.values():
            function()

    def one_after_the_other() -> None:
        gemm()
        rows()

    def side_by_side() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            rows()
        gemm()
        torch.cuda.current_stream().wait_stream(side)

    timings = bench.race(
        {"GEMM": gemm, "row kernels": rows, "one after the other": one_after_the_other, "two streams": side_by_side},
        memory=False,
        limit=5.0,
    )
    table: list[Row] = [
        {"what": name, "note": f"skipped: {t.reason}"} if isinstance(t, Skipped) else {"what": name, **t.cells()}
        for name, t in timings.items()
    ]
    alone, serial, both = (timings[name] for name in ("row kernels", "one after the other", "two streams"))
    if isinstance(alone, Timing) and isinstance(serial, Timing) and isinstance(both, Timing):
        table[-1]["% of the row kernels hidden"] = 100.0 * (serial.median - both.median) / alone.median
    bench.report("unknown_e", title, table)


def profiles(bench: Bench, shape: Shape, chunk: int) -> None:
    """Kernels (operators on a CPU) of one call at a few chunks, by their own time."""
    from torch.profiler import ProfilerActivity, profile

    shape = shape._replace(n=2 * chunk)
    case = make(shape, bench.device, work_dtype(bench.device))
    loss = fused("forward", "bucket")
    x, w = case.hidden.detach(), case.weight.detach()
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for name, work in (
        ("topk_kl", lambda: step(loss.loss(case), case)),
        ("vocab_topk", lambda: vocab_topk(x, w, shape.k)),
    ):
        work()
        bench.wait()
        with profile(activities=activities) as found:
            work()
            bench.wait()
        used = []
        for event in found.key_averages():
            # Entries of the device are kernels; operators carry the time of their kernels a second time.
            if on_gpu and str(event.device_type).rpartition(".")[2] != "CUDA":
                continue
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if time > 0:
                used.append((time, event.key, event.count))
        used.sort(reverse=True)
        total = sum(time for time, _, _ in used) or 1.0
        rows: list[Row] = [
            {"kernel": key[:70], "calls": count, "ms": time / 1e3, "%": 100.0 * time / total}
            for time, key, count in used[:14]
        ]
        bench.report(f"profile_{name}", f"Profile of one {name}, {shape}", rows or [{"kernel": "", "note": "empty"}])
