"""Packed sequences do not see one another, and packed attention equals attention on each sequence alone."""

import pytest
import torch

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
