"""Vocabulary-parallel kernels on two gloo ranks with uneven shards (V = 101), against one process.

One launch runs every case in sequence: this file is its own worker program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

N, D, V, K, RANKS = 13, 8, 101, 9, 2
SHARDS = [(0, 60), (60, 101)]
VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]


def test_two_ranks_equal_one_process(tmp_path):
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, str(tmp_path / "rendezvous")]
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        messages = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * RANKS, "\n".join(messages)


def case(seed=0):
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    weights = torch.rand(N, generator=make, dtype=torch.float64) + 0.1
    weights[3] = 0.0
    return normal(N, D), normal(V, D), normal(N, D), normal(V, D), weights, torch.randint(V, (N,), generator=make)


def same_on_all_ranks(tensors):
    """Every tensor has the same bits on every rank."""
    for tensor in tensors:
        copies = [torch.empty_like(tensor) for _ in range(RANKS)]
        dist.all_gather(copies, tensor.contiguous())
        assert all(torch.equal(copy, copies[0]) for copy in copies)


def check_topk(rank):
    from fastkd._kernels import reference
    from fastkd.kernels import vocab_topk

    _, _, hidden, weight, _, _ = case()
    start, stop = SHARDS[rank]
    # K above one shard's size, K = V, rows that do not divide among the ranks, and no rows.
    for k in (1, K, 70, V):
        for rows in (N, 1, 0):
            for temperature in (1.0, 2.0):
                options = dict(temperature=temperature, chunk_bytes=3 * V * 8)
                whole = vocab_topk(hidden[:rows], weight, k, **options)
                shard = vocab_topk(
                    hidden[:rows], weight[start:stop], k, vocab_start=start, group=dist.group.WORLD, **options
                )
                assert torch.equal(shard.indices, whole.indices)
                torch.testing.assert_close(shard[1:], whole[1:], rtol=1e-12, atol=1e-12)
                same_on_all_ranks(shard)
    # Ties across the border between the shards go to the lower id.
    logits = torch.zeros(4, V, dtype=torch.float64)
    logits[:, 58:63] = 1.0
    tied = vocab_topk(
        torch.eye(4, dtype=torch.float64),
        logits.T[start:stop].contiguous(),
        7,
        vocab_start=start,
        group=dist.group.WORLD,
    )
    assert torch.equal(tied.indices.long(), reference.topk(logits, 7)[0])
    # Padding at the end of the last shard, and a whole shard of padding.
    for valid in (90, 50):
        whole = vocab_topk(hidden, weight, K, valid_vocab=valid)
        shard = vocab_topk(hidden, weight[start:stop], K, vocab_start=start, group=dist.group.WORLD, valid_vocab=valid)
        torch.testing.assert_close(tuple(shard), tuple(whole), rtol=1e-12, atol=1e-12)


def check_kl(rank):
    from fastkd.kernels import topk_kl, topk_kl_from_logits, vocab_topk

    hidden, weight, other, other_weight, weights, labels = case()
    start, stop = SHARDS[rank]
    for valid in (None, 90):
        teacher = vocab_topk(other, other_weight, K, temperature=1.5, valid_vocab=valid)
        for kl, outside in VARIANTS:
            for memory in ("fast", "low"):
                for stats in (True, False):
                    options = dict(
                        kl=kl, outside=outside, memory=memory, stats=stats, temperature=1.5, token_weights=weights,
                        labels=labels.clamp(max=89), chunk_bytes=3000, valid_vocab=valid,
                    )  # fmt: skip
                    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                    expected = topk_kl(x, w, teacher, **options)
                    expected.loss.backward()
                    xs, ws = hidden.clone().requires_grad_(), weight[start:stop].clone().requires_grad_()
                    shard = dict(vocab_start=start, group=dist.group.WORLD, **options)
                    result = topk_kl(xs, ws, teacher, **shard)
                    result.loss.backward()
                    where = f"{kl}, {outside}, {memory}, stats={stats}, valid={valid}"
                    for got, wanted in zip(
                        (*result, xs.grad, ws.grad), (*expected, x.grad, w.grad[start:stop]), strict=True
                    ):
                        torch.testing.assert_close(
                            got, wanted, rtol=1e-10, atol=1e-12, msg=lambda m, at=where: f"{at}: {m}"
                        )
                    same_on_all_ranks([field for field in (*result, xs.grad) if field is not None])
                    if memory == "fast":
                        logits = (hidden @ weight.T)[:, start:stop].requires_grad_()
                        given = topk_kl_from_logits(logits, teacher, **shard)
                        given.loss.backward()
                        torch.testing.assert_close(given[:2], expected[:2], rtol=1e-10, atol=1e-12)
                        torch.testing.assert_close(logits.grad.T @ hidden, ws.grad, rtol=1e-9, atol=1e-12)


def check_same_bits_in_float32(rank):
    from fastkd.kernels import topk_kl, vocab_topk

    hidden, weight, other, other_weight, weights, labels = case(seed=1)
    hidden, weight, start, stop = hidden.float(), weight.float(), *SHARDS[rank]
    teacher = vocab_topk(other.float(), other_weight.float(), K)
    for kl, outside in VARIANTS:
        x, w = hidden.clone().requires_grad_(), weight[start:stop].clone().requires_grad_()
        result = topk_kl(
            x, w, teacher, kl=kl, outside=outside, token_weights=weights, labels=labels, vocab_start=start,
            group=dist.group.WORLD,
        )  # fmt: skip
        result.loss.backward()
        same_on_all_ranks([*result, x.grad])


def main(rendezvous: str, rank: int):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    check_topk(rank)
    check_kl(rank)
    check_same_bits_in_float32(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
