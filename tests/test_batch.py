"""Rows of a packed batch predict exactly the response tokens."""

import pytest
import torch

from fastkd.batch import Prompt, Rollout, pack


def rollout(prompt, response):
    return Rollout(Prompt(0, "", None, "", tuple(prompt)), 0, tuple(response), True, 0)


def test_rows_and_labels():
    batch = pack([rollout([1, 2, 3], [4, 5]), rollout([6], [7, 8, 9])])
    assert batch.tokens_N.tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.active_A.tolist() == [2, 3, 4, 5, 6]
    assert batch.labels_A.tolist() == [4, 5, 7, 8, 9]
    assert (batch.lengths, batch.responses, batch.max_seqlen) == ((4, 3), (2, 3), 4)


def test_the_token_before_each_label_is_its_row(rollouts):
    sequences = rollouts(6)
    batch = pack(sequences)
    full = [[*one.prompt.tokens, *one.response] for one in sequences]
    rows = iter(zip(batch.active_A.tolist(), batch.labels_A.tolist(), strict=True))
    for one, tokens, start in zip(sequences, full, batch.cu_seqlens.tolist()[:-1], strict=True):
        for position in range(len(one.prompt.tokens), len(tokens)):
            row, label = next(rows)
            assert label == tokens[position]
            assert row == start + position - 1


def test_refuses_what_has_no_active_row():
    with pytest.raises(ValueError, match="no response tokens"):
        pack([rollout([1, 2], [])])
    with pytest.raises(ValueError, match="no rollouts"):
        pack([])


def test_moves_to_a_device():
    batch = pack([rollout([1, 2], [3])]).to("meta")
    assert all(getattr(batch, name).device == torch.device("meta") for name in ("tokens_N", "active_A", "labels_A"))
    assert batch.lengths == (2,)
