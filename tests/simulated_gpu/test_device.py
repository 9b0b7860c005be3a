"""The simulated GPU does what its users rely on: it refuses what CUDA refuses, and counts what it is said to count."""

from __future__ import annotations

import gc

import pytest
import torch


def test_tensors_of_two_devices_do_not_meet():
    here, there = torch.ones(3, device="cuda"), torch.ones(3)
    assert here.is_cuda and here.device == torch.device("cuda", 0) and not there.is_cuda
    for wrong in (
        lambda: here + there,
        lambda: torch.cat((here, there)),
        lambda: here.index_select(0, torch.tensor(1)),
        lambda: there.mul_(here.sum()),
        lambda: torch._foreach_mul_([there], here.sum()),
        lambda: torch.mm(here[None], there[:, None]),
    ):
        with pytest.raises(RuntimeError, match=r"same device|two devices"):
            wrong()
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        here.numpy()
    assert (here + torch.tensor(1.0)).tolist() == [2.0] * 3  # a number of the host is none of its tensors
    assert here[torch.tensor([0, 2])].tolist() == [1.0] * 2
    with pytest.raises(RuntimeError, match="cuda:1"):
        torch.empty(1, device="cuda:1")


def test_views_and_results_are_where_their_source_is():
    x = torch.arange(12.0, device="cuda").view(3, 4)
    x[1].zero_()
    x.t()[0].fill_(7.0)
    assert x.tolist() == [[7, 1, 2, 3], [7, 0, 0, 0], [7, 9, 10, 11]]
    out = torch.empty(0, device="cuda")
    assert torch.mul(x, 2.0, out=out) is out and out.shape == (3, 4) and out.is_cuda
    copy = x.cpu()
    x.add_(1.0)
    assert copy[0, 1] == 1.0 and x[0, 1].item() == 2.0
    leaf = torch.ones(4, 2, device="cuda", requires_grad=True)
    (x @ leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.is_cuda
    torch.testing.assert_close(leaf.grad.cpu(), 2 * x.cpu().T @ (x.cpu() @ torch.ones(4, 2)))


def test_bytes_on_the_device_are_counted():
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4 << 20
    view, twice = x[5:], x * 2
    del x, twice
    assert torch.cuda.memory_allocated() - before == 4 << 20  # of the view
    assert torch.cuda.max_memory_allocated() - before == 8 << 20
    del view
    assert torch.cuda.memory_allocated() == before


def test_calls_that_wait_are_counted_and_refused(simulated):
    x = torch.arange(6.0, device="cuda")
    simulated.waits()
    x.sum().item(), x[x > 2], x.cpu(), torch.ones(2).to("cuda")
    assert simulated.waits() == {"aten::_local_scalar_dense": 1, "aten::nonzero": 1, "aten::copy_": 2}
    x[x > 2] = 0.0
    assert simulated.waits() == {"aten::_index_put_impl_ by a mask": 1}
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = torch.ones(2).to("cuda", non_blocking=True)
        assert x.add(1).mul_(2).index_select(0, y.long()).is_cuda
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.max().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gemms_with_another_output_dtype():
    a, b = (torch.randn(*s, device="cuda").bfloat16() for s in ((3, 8), (8, 5)))
    exact = a.float() @ b.float()
    assert torch.equal(torch.mm(a, b, out_dtype=torch.float32), exact)
    total = torch.ones(3, 5, device="cuda")
    torch.addmm(total, a, b, out_dtype=torch.float32, beta=1, out=total)
    assert torch.equal(total, torch.addmm(torch.ones(3, 5, device="cuda"), a.float(), b.float()))
    with pytest.raises(RuntimeError, match="out_dtype"):
        torch.mm(a, b, out_dtype=torch.float32, out=torch.empty(3, 5, device="cuda", dtype=torch.bfloat16))
