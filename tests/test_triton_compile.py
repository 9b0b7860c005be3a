"""Every Triton kernel compiles for the chips it is shipped for: no spills, shared memory within the chip's limit.

Runs on a machine without a GPU: triton compiles ahead of time and carries ptxas and cuobjdump.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastkd._kernels import triton_finish, triton_nvfp4, triton_stats, triton_sum, triton_topk, tuning

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
)

ARCHITECTURES = (80, 90, 100)
# Largest shared memory of a block (CUDA programming guide, "technical specifications per compute capability").
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
V = 151_936


@dataclass(frozen=True)
class Case:
    """One compilation; ``tile`` names the kernel's entry in the tuning table.

    ``types`` are the runtime arguments in order: "i32:16" is divisible by 16 as at run time, and pointers are unless
    "*fp32:1" says that the kernel does not specialise on it. ``constexprs`` are values, or functions of the tile's
    block; ``launch`` gives the launch options from the tile's block and warps and the architecture, where they are
    more than the warps.
    """

    name: str
    kernel: Any
    tile: str
    types: str
    constexprs: dict = field(default_factory=dict)
    launch: Callable[[int, int, int], dict[str, int]] = lambda block, warps, architecture: {"num_warps": warps}

    def on(self, architecture: int) -> tuple[dict, dict[str, int]]:
        """constexprs and launch options on a chip."""
        block, warps = tuning.TABLE[architecture][self.tile]
        constants = {name: value(block) if callable(value) else value for name, value in self.constexprs.items()}
        return constants, self.launch(block, warps, architecture)


@dataclass(frozen=True)
class Resources:
    """What a program of the compiled kernel takes."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_for(case: Case, architecture: int) -> Resources:
    """Compile ahead of time and read the resource report of the binary."""
    names = case.kernel.arg_names
    constants, options = case.on(architecture)
    runtime = [name for name in names if name not in constants]
    types = case.types.split()
    assert len(types) == len(runtime), f"{case.name}: {len(runtime)} runtime arguments {runtime}, {len(types)} types"
    signature = dict.fromkeys(names, "constexpr")
    attributes = {}
    for name, kind in zip(runtime, types, strict=True):
        signature[name], _, divisor = kind.partition(":")
        if divisor or kind.startswith("*"):  # torch allocates at multiples of 16 bytes and more
            attributes[(names.index(name),)] = [["tt.divisibility", int(divisor or 16)]]
    source = ASTSource(case.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    report = resource_report(binary.asm["cubin"])
    return Resources(report["REG"], report["STACK"], report["LOCAL"], max(report["SHARED"], binary.metadata.shared))


@functools.cache
def cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resource_report(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a binary with one kernel; cuobjdump wants a file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def topk_cases(k: int, capped: bool) -> list[Case]:
    """The kernels of ``triton_topk`` as ``topk_rows`` launches them at V = 151,936."""
    lanes, places = triton_topk.lanes_for(k, tuning.TABLE[90]["lane_maxima"].block), triton_topk.places_for(k)
    assert lanes is not None
    label = f"K={k}{' softcap' if capped else ''}"
    flags = {"CAPPED": capped}
    scratch = "*fp32 *i32 *i32 *i32 *fp32"
    per_lane = triton.next_power_of_2(triton.cdiv(V, lanes))
    return [
        Case(
            f"lane_maxima {label}", triton_topk.lane_maxima, "lane_maxima",
            f"*fp32:1 {scratch} i32 i32:16 i32 i32 fp32 fp32",
            flags | {"LANES": lanes, "PLACES": places, "STAGES": triton_topk.STAGES},
            lambda block, warps, architecture: triton_topk.lane_launch(warps, lanes, block, architecture // 10),
        ),
        Case(
            f"lane_candidates {label}", triton_topk.lane_candidates, "lane_candidates",
            f"*fp32 {scratch} i32:16 i32:16 fp32 fp32",
            flags | {"LANES": lanes, "PER_LANE": per_lane, "BLOCK": lambda block: max(block, per_lane),
                     "PLACES": places},
        ),
        Case(
            f"select_rows {label}", triton_topk.select_rows, "select_rows",
            "*fp32 *i32 *i32 *fp32 *i32 *fp32 *fp32 *fp32 i32:16 i32 fp32 fp32 fp32",
            flags | {"PLACES": places, "WIDE": False},
            lambda block, warps, architecture: triton_topk.select_launch(warps, places, block),
        ),
        Case(
            f"select_whole_row {label}", triton_topk.select_whole_row, "lane_maxima",
            "*fp32 *i32 *i32 *fp32 *fp32 *fp32 i32:16 i32:16 i32 fp32 fp32 fp32",
            flags | {"ALL": False, "BLOCK": lambda block: block},
        ),
    ]  # fmt: skip


def sweep_cases(capped: bool) -> list[Case]:
    """The passes over [c, V] of ``triton_stats``, and the 24-bit sum."""
    cap, label = {"CAP": capped}, " softcap" if capped else ""
    cases = []
    for ids in ("*i32", "*i64"):
        cases.append(
            Case(
                f"poison {ids}{label}", triton_stats.poison_kernel, "poison",
                f"*fp32 i32:16 {ids} *bf16 *fp32 *i32 i32 i32:16 i32:16 fp32",
                cap | {"PICK": True, "BLOCK": lambda block: min(block, 512)},
            )
        )  # fmt: skip
    for name, absent in (("lse", ("mean", "lse_raw")), ("mean", ("lse_raw",)), ("mean and T=1", ())):
        pointers = "*fp32 " * (2 - len(absent))
        cases.append(
            Case(
                f"tail_stats {name}{label}", triton_stats.tail_kernel, "tail_stats",
                f"*fp32 i32:16 *fp32 *fp32 {pointers}i32:16 fp32 fp32",
                cap | dict.fromkeys(absent) | {"BLOCK": lambda block: block},
            )
        )  # fmt: skip
    for out, beta, dense in (("bf16", True, True), ("bf16", False, True), ("fp32", True, True), ("bf16", False, False)):
        scalars = "*fp32 *fp32 *fp32" if beta else "*fp32 *fp32"
        constants = {"BLOCK": lambda block: block, "BLOCK_K": 512, "DENSE": dense}
        cases.append(
            Case(
                f"write_dlogits {out}{' beta' if beta else ''}{'' if dense else ' kept only'}{label}",
                triton_stats.dlogits_kernel, "write_dlogits",
                f"*fp32 i32:16 *{out} i32:16 *i32 *{out} {scalars} i32:16 i32:16 fp32 fp32",
                cap | constants | ({} if beta else {"beta": None}),
            )
        )  # fmt: skip
    if not capped:
        block = {"BLOCK": lambda block: block}
        cases += [
            Case("scale", triton_stats.scale_kernel, "write_dlogits", "*bf16 *fp32 i32:16", block),
            Case("add24", triton_sum.add24_kernel, "sum24", "*i16 *u8 *fp32 i32:16", block | {"FIRST": False}),
            Case("read24", triton_sum.read24_kernel, "sum24", "*i16 *u8 *fp32 i32:16", block),
        ]
    return cases


def finish_case(k: int, kl: str, outside: str, phase: str = "EVERYTHING") -> Case:
    """``finish_rows`` with every field reported."""
    kernel, alone = triton_finish.finish_kernel, phase == "EVERYTHING"
    types = {"held": "*i1", "teacher_logits": "*bf16", "rows": "*i64", "top1_agree": "*i8", "kept": "i32:16"}
    types |= dict.fromkeys(("first_row", "count"), "i32")
    types |= dict.fromkeys(
        ("per_temperature", "cap", "mixed_weight", "jsd_beta", "log_beta", "log_rest"), "fp32"
    )  # fmt: skip
    constants = {
        "KL": triton_finish._KL[kl].value, "OUTSIDE": triton_finish._OUTSIDE[outside].value,
        "SHIPPED": triton_finish.TAIL.value,
        "MAY_IGNORE": True, "CAP": True, "PHASE": getattr(triton_finish, phase).value,
        "BLOCK": triton.next_power_of_2(k),
    } | ({"held": None} if alone else {})  # fmt: skip
    runtime = [name for name in kernel.arg_names if name not in constants]
    return Case(
        f"finish_rows K={k} {kl} {outside} {phase}", kernel, "finish_rows",
        " ".join(types.get(name, "*fp32") for name in runtime), constants,
        lambda block, warps, architecture: {"num_warps": triton_finish.warps_for(k, tuning.Tile(block, warps))},
    )  # fmt: skip


def nvfp4_cases() -> list[Case]:
    """Fake quantisation of every dtype."""
    return [
        Case(
            f"nvfp4 {dtype}", triton_nvfp4.fake_quantize_kernel, "nvfp4", f"*{dtype} *fp32 *{dtype} i32:16 i32:16",
            {"BLOCKS": lambda block: block},
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]  # fmt: skip


VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]
CASES = [case for k in (64, 512) for capped in (False, True) for case in topk_cases(k, capped)]
CASES += [case for capped in (False, True) for case in sweep_cases(capped)]
CASES += [finish_case(512, kl, outside) for kl, outside in VARIANTS]
CASES += [finish_case(512, "mixed", "bucket", phase) for phase in ("MEASURE", "SUM", "WRITE")]
CASES += [finish_case(k, "mixed", "zero") for k in (64, 2048, 8192)]
CASES += nvfp4_cases()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda number: f"sm_{number}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_compiles_without_spills(case, architecture):
    resources = compile_for(case, architecture)
    print(case.name, f"sm_{architecture}", resources)
    assert resources.registers > 0
    assert resources.stack == 0 and resources.local == 0, f"registers spill: {resources}"
    assert resources.shared <= SHARED_BYTES[architecture], f"too much shared memory: {resources}"
