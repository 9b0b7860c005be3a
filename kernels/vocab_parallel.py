"""What tensor-parallel ranks tell each other about a row: a handful of scalars, never [N, K].

Each rank holds a range of vocabulary ids. One all-gather merges the logsumexps, maxima and picked logits of a chunk,
a second one sums the loss terms over the kept ids; complete gradient values stay with the rank that owns the id. Both
are gathered and reduced in rank order on every rank, so that all hold the same bits. Without a group every function
returns its argument.

Letters: R ranks, m scalars per row, c rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from fastkd._kernels.rows import LOG_ZERO, Tail


class Pending:
    """A collective under way; ``wait`` returns when its tensor is ready."""

    def __init__(self, work=None):
        self.work = work

    def wait(self) -> None:
        """Block until done (at once when nothing was sent)."""
        if self.work is not None:
            self.work.wait()


class Shards:
    """The ranks that share one vocabulary; ``name`` (of the process group) None: this process holds all of it."""

    def __init__(self, name: str | None = None):
        # By name, as compiled programs and the functional collectives of torch know their groups.
        self.group = None if name is None else _resolve_process_group(name)  # type: ignore[arg-type]
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)

    @property
    def parallel(self) -> bool:
        """Whether other ranks hold other ids."""
        return self.size > 1

    def gather(self, local_mc: Tensor) -> Tensor:
        """[R, m, c] of every rank's [m, c]."""
        gathered = local_mc.new_empty((self.size, *local_mc.shape))
        dist.all_gather(list(gathered.unbind(0)), local_mc.contiguous(), group=self.group)
        return gathered

    def gather_blocks(self, rows: Tensor) -> Tensor:
        """[R · n, …] of every rank's block of rows [n, …], in rank order."""
        whole = rows.new_empty((self.size * len(rows), *rows.shape[1:]))
        dist.all_gather(
            list(whole.chunk(self.size)) if len(rows) else [whole] * self.size, rows.contiguous(), group=self.group
        )
        return whole

    def sum(self, local_mc: Tensor) -> Tensor:
        """Sum over ranks, in rank order."""
        return self.gather(local_mc).sum(0) if self.parallel else local_mc

    def start_sum(self, tensor: Tensor) -> Pending:
        """Begin the in-place sum of a large tensor (dX) over the ranks."""
        if not self.parallel:
            return Pending()
        return Pending(dist.all_reduce(tensor, group=self.group, async_op=True))

    def merge(
        self,
        lse_kept: Tensor,
        tail: Tail | None,
        top_logit: Tensor | None,
        highest: Tensor | None,
        label_logit: Tensor | None,
    ) -> tuple[Tensor, Tail | None, Tensor | None, Tensor | None, Tensor | None]:
        """The same row scalars over all ids: logsumexps added, maxima taken, picked logits from their owner."""
        if not self.parallel:
            return lse_kept, tail, top_logit, highest, label_logit
        fields = [lse_kept, top_logit, highest, label_logit, *(tail or (None,) * 4)]
        gathered_Rmc = self.gather(torch.stack([field for field in fields if field is not None]))
        columns = iter(gathered_Rmc.unbind(1))
        lse_kept_R = next(columns)
        # A picked logit is LOG_ZERO on every rank but its owner.
        top_logit, highest, label_logit = (None if x is None else next(columns).amax(0) for x in fields[1:4])
        if tail is not None:
            lse_R, max_R = next(columns), next(columns)
            mean_R, raw_R = (None if x is None else next(columns) for x in (tail.mean, tail.lse_raw))
            tail = merge_tails(Tail(lse_R, max_R, mean_R, raw_R))
        return lse_kept_R.logsumexp(0), tail, top_logit, highest, label_logit


def merge_tails(parts: Tail) -> Tail:
    """One tail from several disjoint ones, whose fields are stacked along dimension 0."""
    lse = parts.lse.logsumexp(0)
    mean = None
    if parts.mean is not None:
        # Empty parts weigh 0; if all are empty the mean is LOG_ZERO and its mass will be 0.
        mean = (torch.exp(parts.lse - lse) * parts.mean).sum(0).clamp(min=LOG_ZERO)
    return Tail(lse, parts.max.amax(0), mean, None if parts.lse_raw is None else parts.lse_raw.logsumexp(0))


def last_id(group, end: int) -> int:
    """One past the highest id that any rank of ``group`` holds, from this rank's ``end``; waits for all ranks."""
    device = "cpu" if dist.get_backend(group) == "gloo" else torch.accelerator.current_accelerator()
    highest = torch.tensor([end], device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    return int(highest)
