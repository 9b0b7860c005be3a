"""NVFP4 arithmetic: golden vectors of modelopt, every E4M3 and E2M1 value and midpoint, the operator's gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fastkd._kernels import nvfp4
from fastkd._kernels.nvfp4_ops import fake_quantize, nvfp4_fake

GOLDEN = Path(__file__).with_name("data") / "nvfp4_golden.safetensors"
PARTS = ("input", "global_scale", "packed", "scales", "dequantized")


def golden_names():
    with safe_open(GOLDEN, "pt") as file:
        names = [name for name in list(file.keys()) if name.startswith("tensor/")]
    return sorted({name.split("/")[1] for name in names})


def golden(name):
    with safe_open(GOLDEN, "pt") as file:
        return [file.get_tensor(f"tensor/{name}/{part}") for part in PARTS]


def same_bits(got, wanted):
    """Equal to the bit, zeros' signs included."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    return torch.equal(got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", golden_names())
def test_modelopts_bits(name):
    x, scale, packed, scales, dequantized = golden(name)
    got_packed, got_scales = nvfp4.quantize(x, scale)
    assert same_bits(got_scales, scales)
    assert same_bits(got_packed, packed)
    assert same_bits(nvfp4.dequantize(packed, scales, scale, x.dtype), dequantized)
    assert same_bits(nvfp4.fake_quantize(x, scale), dequantized)
    assert same_bits(fake_quantize(x, scale), dequantized)
    if name.startswith(("random", "huge", "constant")):
        assert dequantized.count_nonzero() > x.numel() / 2


def test_the_golden_cases_reach_every_code_and_the_ends_of_e4m3():
    codes, scales = set(), set()
    for name in golden_names():
        _, _, packed, block, _ = golden(name)
        codes |= set((packed & 15).flatten().tolist()) | set((packed >> 4).flatten().tolist())
        scales |= set(block.float().flatten().tolist())
    assert codes == set(range(16)) and {2.0**-9, 1.0, 448.0} <= scales and len(scales) > 100


def test_e4m3_is_torchs():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 … 448
    between = (every[1:] + every[:-1]) / 2
    near = torch.cat([torch.nextafter(between, torch.tensor(end)) for end in (0.0, 500.0)])
    x = torch.cat((every, between, near, torch.tensor([torch.nan])))
    torch.testing.assert_close(nvfp4.round_e4m3(x), x.to(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_e2m1_ties_to_the_even_code():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 1e30, torch.inf])
    assert nvfp4.round_e2m1(x).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 6, 6]
    values = torch.tensor(nvfp4.VALUES)
    middle = (values[1:] + values[:-1]) / 2
    assert nvfp4.round_e2m1(torch.nextafter(middle, torch.tensor(0.0))).tolist() == values[:-1].tolist()
    assert nvfp4.round_e2m1(torch.nextafter(middle, torch.tensor(9.0))).tolist() == values[1:].tolist()
    assert nvfp4.round_e2m1(torch.tensor([torch.nan])).isnan().all()
    assert nvfp4.round_e2m1(-x).tolist() == [-value for value in nvfp4.round_e2m1(x).tolist()]
    assert not nvfp4.round_e2m1(torch.tensor([-0.0, -0.1])).signbit().any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.floats(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    clip=st.sampled_from([1.0, 0.3]),
)
def test_what_is_packed_is_what_was_trained_with(seed, size, dtype, clip):
    x = (torch.randn(3, 48, generator=torch.Generator().manual_seed(seed)) * 10.0**size).to(dtype)
    scale = nvfp4.global_scale(x.abs().amax() * clip)
    fake = nvfp4.fake_quantize(x, scale)
    assert same_bits(nvfp4.dequantize(*nvfp4.quantize(x, scale), scale, dtype), fake)
    assert fake.abs().max() <= x.abs().max() * clip * 1.07  # the scale of a block is rounded too
    if clip == 1.0:
        assert (fake.double() - x.double()).norm() < 0.15 * x.double().norm()


def test_zeros_and_what_is_not_finite():
    zeros = torch.zeros(2, 32)
    scale = nvfp4.global_scale(zeros.abs().amax())
    assert scale == 1 and same_bits(fake_quantize(zeros, scale), zeros)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 32)
        x[1, 20] = wrong
        got = fake_quantize(x, torch.tensor(0.01))
        assert got[1, 16:].isnan().all() and got[0].isfinite().all() and got[1, :16].isfinite().all()


def test_one_scale_for_each_expert():
    x = (
        torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    )
    scales = nvfp4.global_scale(x.abs().amax((1, 2)))
    got = fake_quantize(x, scales)
    for expert in range(3):
        assert same_bits(got[expert], fake_quantize(x[expert], scales[expert]))


def test_a_straight_through_gradient():
    x = torch.randn(4, 32, requires_grad=True)
    factor = torch.randn(4, 32)
    (fake_quantize(x, torch.tensor(1e-4)) * factor).sum().backward()  # clips nearly everything
    assert torch.equal(x.grad, factor)


def test_torch_knows_the_operator():
    torch.library.opcheck(nvfp4_fake, (torch.randn(4, 32, requires_grad=True), torch.tensor(0.01)))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"24 values.*multiple of 16"):
        fake_quantize(torch.zeros(2, 24), torch.tensor(1.0))
    with pytest.raises(ValueError, match="float64"):
        fake_quantize(torch.zeros(2, 32, dtype=torch.float64), torch.tensor(1.0))
