"""NVFP4 as a Triton program, interpreted: the golden vectors of modelopt and the torch reference, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("triton", reason="triton is not installed")

from fastkd._kernels import nvfp4, triton_nvfp4
from fastkd._kernels.nvfp4_ops import fake_quantize

GOLDEN = Path(__file__).parents[1] / "data" / "nvfp4_golden.safetensors"


def same_bits(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    return torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_modelopts_bits():
    with safe_open(GOLDEN, "pt") as file:
        names = sorted({name.split("/")[1] for name in list(file.keys()) if name.startswith("tensor/")})
        assert len(names) > 10
        for name in names:
            x, scale, wanted = (
                file.get_tensor(f"tensor/{name}/{part}") for part in ("input", "global_scale", "dequantized")
            )
            assert same_bits(triton_nvfp4.fake_quantize(x, scale), wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_references_bits(dtype):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, 700, 16, generator=make) * torch.logspace(-3, 2, 700)[:, None]  # more blocks than one program's
    x = x.to(dtype)
    for scale in (nvfp4.global_scale(x.abs().amax()), torch.tensor(1e-3), torch.tensor([0.1, 1e-3, 1e-5])):
        wanted = nvfp4.fake_quantize(x, scale if scale.dim() == 0 else scale[:, None, None])
        assert same_bits(fake_quantize(x, scale), wanted)


def test_parts_of_a_tensor():
    x = torch.randn(5, 64)[1:4]
    assert same_bits(fake_quantize(x[:, ::2], torch.tensor(0.01)), nvfp4.fake_quantize(x[:, ::2], torch.tensor(0.01)))
    assert fake_quantize(x[:0], torch.tensor(0.01)).shape == (0, 64)


def test_what_is_not_finite():
    for dtype in (torch.float32, torch.bfloat16):
        for wrong in (torch.nan, torch.inf, -torch.inf):
            x = torch.ones(2, 32, dtype=dtype)
            x[1, 20] = wrong
            got = fake_quantize(x, torch.tensor(0.01))
            assert got[1, 16:].isnan().all() and got[0].isfinite().all() and got[1, :16].isfinite().all()
    zeros = torch.zeros(2, 32)
    assert same_bits(fake_quantize(zeros, nvfp4.global_scale(zeros.amax())), zeros)
