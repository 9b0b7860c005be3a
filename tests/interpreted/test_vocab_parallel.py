"""The Triton passes with the vocabulary on two gloo ranks, against one process: the three launches of ``finish_rows``.

One launch runs every case in sequence: this file is its own worker program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

N, D, V, K, RANKS = 5, 8, 90, 9, 2
SHARDS = [(0, 50), (50, 90)]
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


def main(rendezvous: str, rank: int):
    from fastkd._kernels import row_passes
    from fastkd.kernels import topk_kl, vocab_topk

    assert row_passes.row_passes(torch.device("cpu"), torch.float32).narrows_in_place, "not interpreted"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    make = torch.Generator().manual_seed(0)
    hidden, weight, other = (torch.randn(size, D, generator=make) for size in (N, V, N))
    weights, labels = torch.rand(N, generator=make) + 0.1, torch.randint(V, (N,), generator=make)
    start, stop = SHARDS[rank]
    shard = dict(vocab_start=start, group=dist.group.WORLD, valid_vocab=V - 3)
    whole = vocab_topk(other, weight, K, valid_vocab=V - 3, temperature=1.5)
    split = vocab_topk(other, weight[start:stop], K, temperature=1.5, **shard)
    assert torch.equal(split.indices, whole.indices)
    torch.testing.assert_close(split[1:], whole[1:])
    for kl, outside in VARIANTS:
        options = dict(kl=kl, outside=outside, token_weights=weights, labels=labels, temperature=1.5, softcap=8.0)
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        expected = topk_kl(x, w, whole, valid_vocab=V - 3, **options)
        expected.loss.backward()
        for memory in ("fast", "low"):
            xs, ws = hidden.clone().requires_grad_(), weight[start:stop].clone().requires_grad_()
            result = topk_kl(xs, ws, whole, memory=memory, **options, **shard)
            result.loss.backward()
            where = f"{kl}, {outside}, {memory}"
            for got, wanted in zip((*result, xs.grad, ws.grad), (*expected, x.grad, w.grad[start:stop]), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=3e-5, msg=lambda m, at=where: f"{at}: {m}")
            for field in (*result, xs.grad):
                copies = [torch.empty_like(field) for _ in range(RANKS)]
                dist.all_gather(copies, field)
                assert all(torch.equal(copy, copies[0]) for copy in copies), where
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
