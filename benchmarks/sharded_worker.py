"""One rank of bench_sharded.py: times the phases of a sharded training step; the first rank prints them as JSON.

Run as: torchrun --nproc-per-node=R sharded_worker.py '{"tp": 2, "cp": 1, …}'

Phases end when this rank has its result. "communication" is the time that gloo worked or waited for other ranks; it
lies inside the other phases and partly overlaps with their arithmetic.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import time
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from fastkd import attention, grad_norm, packing, parallel
from fastkd.batch import Prompt, Rollout, pack
from fastkd.kernels import TopK
from fastkd.losses import Divergence, FusedLoss, PackedModel
from fastkd.process_group import joined

DIVERGENCE = Divergence("reverse", "bucket")


def build(settings: dict[str, Any]) -> PackedModel:
    """A random student, the same on all ranks."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**settings), attn_implementation=attention.NAME)
    return PackedModel(model.train())


def rollouts(sequences: int, length: int, vocab: int) -> list[Rollout]:
    """Random ones of equal length, an eighth of it prompt; the last response token is not packed."""
    rng = random.Random(0)
    ids = [[rng.randrange(vocab) for _ in range(length + 1)] for _ in range(sequences)]
    cut = length // 8
    return [Rollout(Prompt(i, "", None, "", tuple(x[:cut])), 0, tuple(x[cut:]), True, 0) for i, x in enumerate(ids)]


def targets(all_rollouts: list[Rollout], vocab: int, k: int) -> list[TopK]:
    """A teacher's rows out of thin air: valid distributions, which is all that time depends on."""
    made = torch.Generator().manual_seed(1)
    rows = []
    for one in all_rollouts:
        n = len(one.response)
        logits = torch.randn(n, k, generator=made).sort(1, descending=True).values
        ids = torch.rand(n, vocab, generator=made).topk(k, 1).indices.sort(1).values.int()
        kept = logits.logsumexp(1)
        tail = kept - 3.0
        rows.append(TopK(ids, logits, torch.logaddexp(kept, tail), tail))
    return rows


class Step:
    """One optimizer step, phase by phase."""

    def __init__(self, job: dict[str, Any], mesh: Any):
        vocab, self.k = job["model"]["vocab_size"], job["k"]
        self.mesh, self.tokens_per_batch = mesh, job["mb_tokens"]
        self.root = build(job["model"])
        parallel.shard(self.root, self.root.causal_lm, mesh, sequence_parallel=job["sp"], recompute=job["recompute"])
        self.optimizer = torch.optim.AdamW(self.root.parameters(), lr=1e-4)
        self.rollouts = rollouts(job["sequences"], job["length"], vocab)
        self.rows = targets(self.rollouts, vocab, self.k)
        self.total = sum(len(one.response) for one in self.rollouts)
        self.phases: dict[str, float] = {}
        self.head_seconds = 0.0

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> float:
        """The loss over all ranks."""
        self.phases = {}
        lengths = [one.packed_length for one in self.rollouts]
        rank, ranks = parallel.data_rank(self.mesh)
        loss = torch.zeros(())
        for indices in packing.assign(packing.microbatches(lengths, tokens=self.tokens_per_batch), lengths, ranks)[
            rank
        ]:
            batch = pack([self.rollouts[index] for index in indices])
            rows = TopK(*map(torch.cat, zip(*(self.rows[index] for index in indices), strict=True)))
            head = FusedLoss(DIVERGENCE, rows, torch.full((len(batch.labels_A),), 1.0 / self.total))

            def timed(*args: Any, head: FusedLoss = head) -> Any:
                start = time.perf_counter()
                result = head(*args)
                self.head_seconds = time.perf_counter() - start
                return result

            with self.phase("forward"):
                out = self.root(batch, timed)
            self.phases["forward"] -= self.head_seconds
            self.phases["loss"] = self.phases.get("loss", 0.0) + self.head_seconds
            loss += out.loss.detach()
            with self.phase("backward"):
                out.loss.backward()
        with self.phase("optimizer"):
            grad_norm.clip_grad_norm(self.root.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(parallel.sum_over_data(loss, self.mesh))


def communication(step: Step) -> float:
    """Seconds in which gloo was at work during one step: the union of its spans, from the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step.run()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recorded.events() or ()
        if event.name.startswith("gloo:")
    )
    total, end = 0.0, 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total * 1e-6


def main(job: dict[str, Any]) -> None:
    """Warm up, then the asked number of steps."""
    with joined("cpu"):
        torch.set_num_threads(1)
        step = Step(job, parallel.build_mesh(job["tp"], job["cp"], None, "cpu"))
        first = step.run()
        phases: list[dict[str, float]] = []
        for _ in range(job["steps"]):
            dist.barrier()
            start = time.perf_counter()
            step.run()
            phases.append({**step.phases, "step": time.perf_counter() - start})
        seconds = {name: statistics.median(one[name] for one in phases) for name in phases[0]}
        seconds["communication"] = communication(step)
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if dist.get_rank() == 0:
            tokens = sum(one.packed_length for one in step.rollouts)
            print(
                json.dumps({"loss": first, "tokens": tokens, "seconds": seconds, "peak_bytes": max(peaks)}), flush=True
            )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
