"""On CUDA no call waits for the device: shown without one, by running the CUDA path on tensors that have no values.

Whatever needs a value of a fake tensor on the host (``item``, ``nonzero``, a branch on a tensor) raises. The tensors
claim to be on the CPU, because a torch without CUDA cannot even slice others; the path is chosen as on CUDA. Triton
launches are recorded instead of run, and the mixed GEMMs, which CUDA alone has, check shapes and dtypes.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd._kernels import heads, linear_kl_low, linear_topk, ops, problem, row_passes, row_stats, rows, tuning
from fastkd._kernels.gemm import HeadGemms
from fastkd._kernels.linear_kl import solve
from fastkd._kernels.rows import Objective, TopK, default_chunk_bytes
from fastkd._kernels.vocab_parallel import Shards

pytest.importorskip("triton")
if tuning.interpreting():
    pytest.skip("interpreted kernels run on the CPU", allow_module_level=True)

VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]
N, D, V, K = 2048, 256, 50_000, 512


class MixedGemms(HeadGemms):
    """bfloat16 operands and float32 results, as on CUDA; float32 is the same everywhere."""

    def __init__(self, weight, scratch_bytes):
        super().__init__(weight, scratch_bytes)
        self.mixed, self.scratch_bytes = not self.native, 0

    def product(self, a, b, out):
        assert a.dtype == b.dtype == self.weight.dtype
        assert all(1 in matrix.stride() for matrix in (a, b, out))  # cuBLAS needs a contiguous direction
        assert a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
        assert out.dtype in (torch.float32, self.weight.dtype)

    def logits(self, x, out):
        assert out.dtype == torch.float32
        self.product(x, self.weight.t(), out)

    def grad_hidden(self, dz, out, accumulate=False):
        assert out.dtype == torch.float32
        self.product(dz, self.weight, out)

    def grad_weight(self, dz, x, out, accumulate):
        assert out.dtype == torch.float32 or not accumulate
        self.product(dz.t(), x, out)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    from triton.runtime import JITFunction

    from fastkd._kernels import triton_finish, triton_stats, triton_sum, triton_topk

    names = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert all(size > 0 for size in grid)
            return lambda *a, **k: names.append(self.name)

    for module in (triton_finish, triton_stats, triton_sum, triton_topk):
        for name in [name for name in vars(module) if isinstance(getattr(module, name), JITFunction)]:
            monkeypatch.setattr(module, name, Recorder(name))
    for module in (rows, problem, row_stats, ops, linear_kl_low):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    for module in (row_passes, linear_topk, ops):
        monkeypatch.setattr(module, "use_triton", lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(linear_topk, "HeadGemms", MixedGemms)
    monkeypatch.setattr(heads, "HeadGemms", MixedGemms)
    monkeypatch.setattr(linear_kl_low, "HeadGemms", MixedGemms)
    return names


def teacher_rows(n):
    return TopK(
        torch.empty(n, K, dtype=torch.int32), torch.empty(n, K, dtype=torch.bfloat16),
        torch.empty(n), torch.empty(n),
    )  # fmt: skip


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and their peak."""

    def __init__(self, *inputs):
        super().__init__()
        self.seen, self.now, self.peak = {x.untyped_storage()._cdata for x in inputs}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.seen:
                storage = value.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size


def problem_of(n, valid, objective, *, k=K, rows=None, low=False, chunk_bytes=1 << 28, labels=True):
    """A problem of ``n`` tokens, built as on CUDA."""
    teacher = TopK(
        torch.empty(n, k, dtype=torch.int32), torch.empty(n, k, dtype=torch.bfloat16), torch.empty(n), torch.empty(n)
    )
    return ops._problem(
        teacher, n, torch.empty(n), rows, torch.empty(n, dtype=torch.int64) if labels else None, objective,
        valid=valid, columns=valid, vocab_start=0, chunk_bytes=chunk_bytes, low=low, sequence_parallel=False,
        shards=Shards(), validate=False, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize(
    ("kl", "outside", "stats"),
    [(*variant, True) for variant in VARIANTS] + [("forward", "bucket", False), ("reverse", "renormalize", False)],
)
def test_the_loss(kl, outside, stats, memory, launches):
    objective = Objective(kl, outside, temperature=1.5, stats=stats, softcap=30.0)
    for dtype, active in ((torch.bfloat16, False), (torch.float32, True)):
        with FakeTensorMode():
            hidden, weight = (torch.empty(size, D, dtype=dtype) for size in (N, V))
            bias = torch.empty(V, dtype=dtype)
            for rows in (torch.empty(1500, dtype=torch.int64) if active else None,):
                problem = problem_of(N, V - 9, objective, rows=rows, low=memory == "low")
                result, gradients = solve(hidden, weight, bias, problem, heads.Needs(True, True, True))
                assert result.loss.shape == () and result.per_token.shape == (N,)
                for gradient, of in zip(gradients, (hidden, weight, bias), strict=True):
                    assert gradient.shape == of.shape and gradient.dtype == of.dtype
    assert {"poison_kernel", "finish_kernel", "dlogits_kernel"} <= set(launches)
    assert ("tail_kernel" in launches) == (stats or outside != "renormalize")


@pytest.mark.parametrize(("memory", "gigabytes"), [("fast", 1.4), ("low", 0.30)])
def test_memory_at_the_reference_shape(memory, gigabytes, launches):
    """N 16,384, D 4,096, V 151,936, K 512 in bfloat16: what is alive at a time, as the allocations say."""
    n, d, v, k = 16_384, 4096, 151_936, 512
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, d, dtype=torch.bfloat16) for size in (n, v))
        problem = problem_of(
            n,
            v,
            Objective("mixed"),
            k=k,
            low=memory == "low",
            chunk_bytes=default_chunk_bytes(weight.device, None, memory),
        )
        with Live(hidden, weight, *problem.teacher, problem.weights, problem.labels) as live:
            _, gradients = solve(hidden, weight, None, problem, heads.Needs(True, True))
        # dX and dW are what was asked for; "fast" holds dW in float32, in which it is summed, until it is rounded once.
        asked = n * d * 2 + v * d * (4 if memory == "fast" else 2)
        assert gradients.weight.dtype == torch.bfloat16
    extra = (live.peak - asked) / 1e9
    print(f"{memory}: {extra:.2f} GB beyond dX and dW")
    assert extra <= gigabytes


def test_the_teachers_head(launches):
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, D, dtype=torch.bfloat16) for size in (N, V))
        found = linear_topk.linear_topk(
            hidden, weight, None, K, temperature=1.0, softcap=None, columns=V, vocab_start=0, chunk_bytes=1 << 28,
            shards=Shards(),
        )  # fmt: skip
        assert found.indices.shape == (N, K) and found.indices.dtype == torch.int32
    assert launches


def test_a_value_on_the_host_would_be_noticed():
    with FakeTensorMode(), pytest.raises(Exception, match="local_scalar_dense"):
        bool(torch.empty(3).isfinite().all())


def test_float64_goes_through_torch():
    assert row_passes.row_passes(torch.device("cuda"), torch.float64) is row_passes.TORCH
    assert row_passes.row_passes(torch.device("cuda"), torch.float32) is not row_passes.TORCH
