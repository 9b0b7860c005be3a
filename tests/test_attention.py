"""Packed sequences do not see one another, and packed attention equals attention on each sequence alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import attention
from fastkd.attention import attend_packed
from fastkd.batch import Prompt, Rollout, pack
from fastkd.models import packed_hidden


def alone(model, rollout):
    tokens = torch.tensor([*rollout.prompt.tokens, *rollout.response[:-1]])[None]
    model.set_attn_implementation("sdpa")
    out = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    model.set_attn_implementation("fastkd_packed")
    return out


@pytest.mark.parametrize("longest", [12, 60])
def test_packed_equals_each_sequence_alone(tiny_qwen3, rollouts, longest):
    model = tiny_qwen3(dtype=torch.float64).eval()
    sequences = rollouts(7, longest=longest)
    with torch.no_grad():
        packed = packed_hidden(model, pack(sequences))
        expected = torch.cat([alone(model, one) for one in sequences])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)


def test_changing_the_first_sequence_leaves_the_second_alone(tiny_qwen3, rollouts):
    model = tiny_qwen3().eval()
    first, second = rollouts(2)
    changed = Rollout(
        Prompt(0, "", None, "", tuple((t + 1) % 101 for t in first.prompt.tokens)), 0, first.response, True, 0
    )
    with torch.no_grad():
        before = packed_hidden(model, pack([first, second]))
        after = packed_hidden(model, pack([changed, second]))
    start = first.packed_length
    assert torch.equal(before[start:], after[start:])
    assert not torch.allclose(before[:start], after[:start])


def test_one_long_sequence_among_short_ones_takes_the_other_path_with_the_same_result():
    torch.manual_seed(0)
    lengths = (50, 1, 2, 3, 1)
    query, key, value = (torch.randn(57, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 50, 51, 53, 56, 57], dtype=torch.int32)
    together = attend_packed(query, key, value, lengths=lengths, cu_seqlens=cu_seqlens)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        own = attend_packed(
            query[part], key[part], value[part], lengths=(length,), cu_seqlens=torch.tensor([0, length]).int()
        )
        torch.testing.assert_close(together[part], own, rtol=0, atol=1e-12)
        start += length


@pytest.mark.parametrize("window", [1, 3, 40])
def test_sliding_window(window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(12, 2, 8, dtype=torch.float64) for _ in range(3))
    out = attend_packed(query, key, value, lengths=(7, 5), cu_seqlens=torch.tensor([0, 7, 12]).int(), window=window)
    for start, length in ((0, 7), (7, 5)):
        for row in range(length):
            seen = slice(start + max(0, row - window + 1), start + row + 1)
            scores = torch.einsum("hd,khd->hk", query[start + row], key[seen]) / 8**0.5
            expected = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen])
            torch.testing.assert_close(out[start + row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 12])
@pytest.mark.parametrize("block", [2, 3, 512])
def test_queries_that_are_the_last_tokens_of_their_sequences(window, block, monkeypatch):
    # As context parallelism needs it; cut into blocks of few queries, as long sequences are.
    monkeypatch.setattr(attention, "_BLOCK", block)
    torch.manual_seed(0)
    query, key, value = (torch.randn(20, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = {"lengths": (13, 7), "cu_seqlens": torch.tensor([0, 13, 20]).int()}
    rows = torch.tensor([*range(8, 13), *range(13, 20)])  # the last 5 of the first sequence, all of the second
    out = attend_packed(
        query[rows], key, value, lengths=(5, 7), cu_seqlens=torch.tensor([0, 5, 12]).int(), window=window,
        key_lengths=whole["lengths"], key_cu_seqlens=whole["cu_seqlens"],
    )  # fmt: skip
    monkeypatch.undo()
    torch.testing.assert_close(out, attend_packed(query, key, value, window=window, **whole)[rows], rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize(("queries", "window"), [(512, None), (512, 100), (300, None), (300, 100)])
def test_no_mask_of_all_tokens(queries, window, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 16)
    tokens, size = 512, 4
    query = torch.randn(queries, 2, size, requires_grad=True)
    key, value = (torch.randn(tokens, 1, size, requires_grad=True) for _ in range(2))
    ends = {"cu_seqlens": torch.tensor([0, queries]), "key_cu_seqlens": torch.tensor([0, tokens])}
    with Largest() as largest:
        out = attend_packed(query, key, value, lengths=(queries,), key_lengths=(tokens,), window=window, **ends)
        out.sum().backward()
    assert largest.elements <= max(2 * 16 * tokens, 2 * tokens * size)


class Calls(TorchDispatchMode):
    """What torch's packed attention was asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_attn._varlen_attn.default:
            self.arguments = dict(zip([a.name for a in func._schema.arguments], args, strict=False), **kwargs or {})
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("window", [None, 5, 12])
def test_how_flash_attention_is_called(window, monkeypatch):
    # Tensors without values stand for those on a GPU: torch's operator knows the shapes of its results and gradients.
    monkeypatch.setattr(attention, "_flash_runs", lambda query: True)
    with FakeTensorMode(allow_non_fake_inputs=True), Calls() as calls:
        sizes = ((9, 4, 16), (12, 2, 16), (12, 2, 16))
        query, key, value = (torch.randn(size, dtype=torch.bfloat16, requires_grad=True) for size in sizes)
        cu_seqlens = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 9], [0, 5, 12])]
        out = attend_packed(
            query, key, value, lengths=(2, 7), cu_seqlens=cu_seqlens[0], key_lengths=(5, 7),
            key_cu_seqlens=cu_seqlens[1], scale=0.5, window=window,
        )  # fmt: skip
        out.sum().backward()
    assert out.shape == query.shape and out.dtype == torch.bfloat16
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (query, key, value))
    found = calls.arguments
    assert found["cu_seq_q"] is cu_seqlens[0] and found["cu_seq_k"] is cu_seqlens[1]
    assert (found["max_q"], found["max_k"], found["scale"]) == (7, 7, 0.5)
    # Itself and window - 1 tokens before it, none after it; a window as long as the longest sequence is none.
    assert found["window_size"] == ([4, 0] if window == 5 else [-1, 0])
    assert found["is_causal"] == (window != 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("key_lengths", [None, (300, 40, 7, 641)])
def test_flash_attention_equals_float64(window, key_lengths):
    lengths = (300, 40, 7, 129)
    torch.manual_seed(0)
    sizes = {"query": (sum(lengths), 8, 64), "key": (sum(key_lengths or lengths), 2, 64)}
    sizes["value"] = sizes["key"]
    inputs = {name: torch.randn(size, device="cuda", dtype=torch.bfloat16) for name, size in sizes.items()}
    options = {"lengths": lengths, "cu_seqlens": cumulative(lengths), "window": window}
    if key_lengths:
        options |= {"key_lengths": key_lengths, "key_cu_seqlens": cumulative(key_lengths)}
    results = {}
    for dtype in (torch.bfloat16, torch.float64):
        x = {name: value.clone().to(dtype).requires_grad_() for name, value in inputs.items()}
        assert attention._flash_runs(x["query"]) == (dtype == torch.bfloat16)
        out = attend_packed(x["query"], x["key"], x["value"], **options)
        out.backward(torch.cos(torch.arange(out.numel(), device="cuda")).view_as(out).to(dtype))
        results[dtype] = [out.detach(), *(value.grad for value in x.values())]
    for got, wanted in zip(results[torch.bfloat16], results[torch.float64], strict=True):
        assert (got.double() - wanted).norm() <= 0.01 * wanted.norm()
    with torch.autocast("cuda", dtype=torch.bfloat16):  # the operator itself does not know autocast
        out = attend_packed(*(value.float() for value in inputs.values()), **options)
    assert torch.equal(out, results[torch.bfloat16][0])


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def test_gradients_match_each_sequence_alone(tiny_qwen3, rollouts):
    sequences = rollouts(5)
    gradients = []
    for packed in (True, False):
        model = tiny_qwen3(dtype=torch.float64)
        hidden = packed_hidden(model, pack(sequences)) if packed else torch.cat([alone(model, s) for s in sequences])
        hidden.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-9, atol=1e-9, msg=name)
