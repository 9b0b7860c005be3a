"""Vocabulary-parallel kernels on 2, 4 and 8 gloo ranks with uneven shards (V = 101), against one process.

One launch per number of ranks runs every case in sequence: this file is its own worker program. Shards range from one
row to sixty: most are smaller than the largest K, and with ``valid_vocab`` the last of four and of eight is padding
only. Four ranks hold their shards in descending order of ids.

Letters: N tokens, D hidden, V vocabulary, K kept, R ranks.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

N, D, V, K = 13, 8, 101, 9
WIDTHS = {2: [60, 41], 4: [3, 50, 40, 8], 8: [1, 20, 5, 30, 2, 25, 10, 8]}
PADDED = 93  # with so many valid ids the last shard of 8 rows is all padding
VARIANTS = [
    (kl, outside)
    for kl in ("forward", "reverse", "mixed", "jsd")
    for outside in ("renormalize", "zero", "bucket", "drop")
    if kl != "jsd" or outside in ("renormalize", "bucket")
]


@pytest.mark.parametrize("ranks", WIDTHS)
def test_ranks_equal_one_process(ranks, tmp_path, launch):
    launch(__file__, ranks, tmp_path / "rendezvous")


def shard_of(rank, ranks):
    """(start, stop) of a rank's ids."""
    place = ranks - 1 - rank if ranks == 4 else rank
    start = sum(WIDTHS[ranks][:place])
    return start, start + WIDTHS[ranks][place]


class Case:
    """Student and teacher of n tokens in float64, token weights (one of them 0), labels, bias; this rank's shard."""

    def __init__(self, n=N, seed=0, dtype=torch.float64):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

        self.hidden, self.weight, self.bias = normal(n, D), normal(V, D), normal(V)
        self.teacher_hidden, self.teacher_weight = normal(n, D), normal(V, D)
        self.weights = torch.rand(n, generator=make, dtype=torch.float64).to(dtype) + 0.1
        self.weights[3] = 0.0
        self.labels = torch.randint(PADDED, (n,), generator=make)
        self.start, self.stop = shard_of(dist.get_rank(), dist.get_world_size())

    def cut(self, rows):
        """This rank's share of something with V rows."""
        return rows[self.start : self.stop]

    @property
    def shard(self):
        """The arguments that say so."""
        return dict(vocab_start=self.start, group=dist.group.WORLD)


def same_on_all_ranks(tensors):
    """Every tensor has the same bits on every rank."""
    for tensor in tensors:
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.contiguous())
        assert all(torch.equal(copy, copies[0]) for copy in copies)


def assert_same(got, wanted, where):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m: f"{where}: {m}")


def run(hidden, weight, teacher, bias=None, **options):
    """(result, [dX, dW, db]) of topk_kl."""
    from fastkd.kernels import topk_kl

    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    if bias is not None:
        options["bias"] = leaves[2]
    result = topk_kl(leaves[0], leaves[1], teacher, **options)
    return result, list(torch.autograd.grad(result.loss, leaves))


# ---------------------------------------------------------------- the checks, each on every rank


def check_topk():
    from fastkd._kernels import reference
    from fastkd.kernels import vocab_topk

    case = Case()
    hidden, weight = case.teacher_hidden, case.teacher_weight
    # K above every shard's size, K = V, rows that do not divide among the ranks, fewer rows than ranks, no rows.
    for k, rows in ((1, N), (1, 1), (K, N), (K, 1), (K, 0), (70, N), (70, 1), (V, N), (V, 0)):
        temperature = 1.0 + (rows + k) % 2
        options = dict(temperature=temperature, chunk_bytes=3 * V * 8)
        whole = vocab_topk(hidden[:rows], weight, k, **options)
        shard = vocab_topk(hidden[:rows], case.cut(weight), k, **case.shard, **options)
        assert torch.equal(shard.indices, whole.indices)
        assert_same(shard[1:], whole[1:], f"k={k}, rows={rows}")
        same_on_all_ranks(shard)
    # Ties across the border between two shards, and over all of them, go to the lower id.
    logits = torch.zeros(4, V, dtype=torch.float64)
    logits[:, case.start : case.start + 3] = 1.0
    logits = logits.clone()
    dist.all_reduce(logits, dist.ReduceOp.MAX)
    logits[3] = 0.0
    tied = vocab_topk(torch.eye(4, dtype=torch.float64), case.cut(logits.T).contiguous(), 7, **case.shard)
    assert torch.equal(tied.indices.long(), reference.topk(logits, 7)[0])
    # Padding at the end of the last shard, and whole shards of padding.
    for valid in (PADDED, 50):
        whole = vocab_topk(hidden, weight, K, valid_vocab=valid)
        shard = vocab_topk(hidden, case.cut(weight), K, valid_vocab=valid, **case.shard)
        assert torch.equal(shard.indices, whole.indices)
        assert_same(shard[1:], whole[1:], f"valid={valid}")


def check_kl():
    from fastkd.kernels import topk_kl_from_logits, vocab_topk

    case = Case()
    # All combinations on two ranks, a third of them on four, a fifth on eight: every variant, every mode.
    combinations = [
        (variant, memory, stats, valid)
        for variant in VARIANTS
        for memory in ("fast", "low")
        for stats in (True, False)
        for valid in (None, PADDED)
    ]
    if dist.get_world_size() > 2:
        combinations = combinations[:: dist.get_world_size() // 2 + 1]
    for (kl, outside), memory, stats, valid in combinations:
        teacher = vocab_topk(case.teacher_hidden, case.teacher_weight, K, temperature=1.5, valid_vocab=valid)
        options = dict(
            kl=kl, outside=outside, memory=memory, stats=stats, temperature=1.5, token_weights=case.weights,
            labels=case.labels, chunk_bytes=6000, valid_vocab=valid,
        )  # fmt: skip
        where = f"{kl}, {outside}, {memory}, stats={stats}, valid={valid}"
        expected, (dx, dw) = run(case.hidden, case.weight, teacher, **options)
        options |= case.shard
        result, (shard_dx, shard_dw) = run(case.hidden, case.cut(case.weight), teacher, **options)
        assert_same((*result, shard_dx, shard_dw), (*expected, dx, case.cut(dw)), where)
        same_on_all_ranks([field for field in (*result, shard_dx) if field is not None])
        if memory == "fast":
            logits = case.cut((case.hidden @ case.weight.T).T).T.clone().requires_grad_()
            given = topk_kl_from_logits(logits, teacher, **options)
            given.loss.backward()
            assert_same(given[:2], expected[:2], f"from logits, {where}")
            torch.testing.assert_close(logits.grad.T @ case.hidden, shard_dw, rtol=1e-9, atol=1e-12)


def check_one_kept_id():
    # K = 1: on most ranks no row keeps an id.
    from fastkd.kernels import vocab_topk

    case = Case(seed=2)
    teacher = vocab_topk(case.teacher_hidden, case.teacher_weight, 1)
    for kl, outside in VARIANTS if dist.get_world_size() < 8 else VARIANTS[::4]:
        options = dict(kl=kl, outside=outside, labels=case.labels)
        expected, (dx, dw) = run(case.hidden, case.weight, teacher, **options)
        result, (shard_dx, shard_dw) = run(case.hidden, case.cut(case.weight), teacher, **options, **case.shard)
        assert_same((*result, shard_dx, shard_dw), (*expected, dx, case.cut(dw)), f"K=1, {kl}, {outside}")


def check_same_bits_in_float32():
    from fastkd.kernels import vocab_topk

    case = Case(seed=1, dtype=torch.float32)
    teacher = vocab_topk(case.teacher_hidden, case.teacher_weight, K)
    for index, (kl, outside) in enumerate(VARIANTS):
        options = dict(
            kl=kl, outside=outside, token_weights=case.weights, labels=case.labels, memory=("fast", "low")[index % 2]
        )
        result, (dx, _) = run(case.hidden, case.cut(case.weight), teacher, **options, **case.shard)
        same_on_all_ranks([*result, dx])


def check_softcap_and_bias():
    from fastkd.kernels import vocab_topk

    case = Case(seed=3)
    heads = [dict(softcap=3.0, bias=case.bias), dict(softcap=3.0), dict(bias=case.bias)]
    for head in heads if dist.get_world_size() < 8 else heads[:1]:
        shard = {name: case.cut(value) if name == "bias" else value for name, value in head.items()}
        teacher = vocab_topk(case.teacher_hidden, case.teacher_weight, K, **head)
        merged = vocab_topk(case.teacher_hidden, case.cut(case.teacher_weight), K, **shard, **case.shard)
        assert torch.equal(merged.indices, teacher.indices)
        assert_same(merged[1:], teacher[1:], f"{list(head)}")
        for index, (kl, outside) in enumerate(VARIANTS if len(head) == 2 else VARIANTS[::4]):
            options = dict(
                kl=kl, outside=outside, token_weights=case.weights, labels=case.labels, chunk_bytes=6000,
                memory=("fast", "low")[index % 2],
            )  # fmt: skip
            expected, whole = run(case.hidden, case.weight, teacher, **head, **options)
            result, parts = run(case.hidden, case.cut(case.weight), teacher, **shard, **options, **case.shard)
            wanted = [whole[0], *map(case.cut, whole[1:])]
            assert_same((*result, *parts), (*expected, *wanted), f"{list(head)}, {kl}, {outside}")


def check_sequence_parallel():
    from fastkd.kernels import vocab_topk

    case = Case(n=16, seed=4)
    each = 16 // dist.get_world_size()
    mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    sequence = dict(sequence_parallel=True, **case.shard)
    teacher = vocab_topk(case.teacher_hidden, case.teacher_weight, K)
    gathered = vocab_topk(case.teacher_hidden[mine], case.cut(case.teacher_weight), K, **sequence)
    assert torch.equal(gathered.indices, teacher.indices)
    assert_same(gathered[1:], teacher[1:], "sequence-parallel vocab_topk")
    active = torch.tensor([0, 2, 3, 7, 8, 9, 15])
    for index, (kl, outside) in enumerate(VARIANTS):
        options = dict(
            kl=kl, outside=outside, token_weights=case.weights, labels=case.labels, chunk_bytes=6000,
            memory=("fast", "low")[index % 2], active=active if index % 3 == 0 else None,
        )  # fmt: skip
        expected, (dx, dw) = run(case.hidden, case.weight, teacher, **options)
        result, (block_dx, shard_dw) = run(case.hidden[mine], case.cut(case.weight), teacher, **sequence, **options)
        assert_same(
            (*result, block_dx, shard_dw), (*expected, dx[mine], case.cut(dw)), f"sequence-parallel {kl}, {outside}"
        )
        same_on_all_ranks(result)


def check_group_inside_a_mesh():
    """Data parallel × tensor parallel, 2 × 2: each pair of ranks shares a vocabulary and has a batch of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    from fastkd.kernels import vocab_topk

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    start, stop = shard_of(mesh["tp"].get_local_rank(), 2)
    shard = dict(vocab_start=start, group=mesh["tp"].get_group())
    batches = [Case(seed=seed) for seed in (5, 6)]
    weight, teacher_weight = batches[0].weight, batches[0].teacher_weight
    runs = []
    for case in batches:
        teacher = vocab_topk(case.teacher_hidden, teacher_weight, K)
        runs.append((teacher, *run(case.hidden, weight, teacher, token_weights=case.weights)))
    place = mesh["dp"].get_local_rank()
    case, (teacher, expected, (dx, _)) = batches[place], runs[place]
    merged = vocab_topk(case.teacher_hidden, teacher_weight[start:stop], K, **shard)
    assert torch.equal(merged.indices, teacher.indices)
    result, (shard_dx, shard_dw) = run(case.hidden, weight[start:stop], merged, token_weights=case.weights, **shard)
    assert_same((*result, shard_dx), (*expected, dx), f"batch {place} of a mesh")
    dist.all_reduce(shard_dw, group=mesh["dp"].get_group())
    assert_same([shard_dw], [sum(dw for _, _, (_, dw) in runs)[start:stop]], "weight gradient over the mesh")


def main(rendezvous: str, ranks: int, rank: int):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    check_topk()
    check_kl()
    check_one_kept_id()
    check_same_bits_in_float32()
    check_softcap_and_bias()
    check_sequence_parallel()
    if ranks == 4:
        check_group_inside_a_mesh()
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
