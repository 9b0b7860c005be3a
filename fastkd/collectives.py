"""Collectives between the ranks of a group, and their gradients.

A collective of the forward pass has its transpose in the backward pass: a gather scatters sums, a sum hands its
gradient on (or the other way round), so that every rank's result is right without any rank knowing the whole.

Functional collectives are used throughout: torch 2.11 compiles those in place wrongly in a backward (silently).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 has new names.
_all_gather: Any = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter: Any = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def gather(x: Tensor, group: Any) -> Tensor:
    """The ranks' equal blocks, joined along the first dimension in rank order. No gradient."""
    return functional.wait_tensor(_all_gather(x.contiguous(), 0, group))


def scatter(x: Tensor, group: Any) -> Tensor:
    """This rank's block, along the first dimension, of the sum over the ranks. No gradient."""
    return functional.wait_tensor(_reduce_scatter(x.contiguous(), "sum", 0, group))


def move(x: Tensor, there: str, back: str, dim: int, mesh: DeviceMesh) -> Tensor:
    """A collective forward and another one backward.

    Args:
        there, back: "keep" does nothing, "sum" all-reduces, "gather" joins blocks along ``dim``, "scatter" sums and
            keeps this rank's block of ``dim``, "slice" keeps this rank's block. Blocks are equal.
    """
    return _Move.apply(x, there, back, dim, mesh)  # type: ignore


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: str, back: str, dim: int, mesh: DeviceMesh) -> Tensor:
        ctx.back, ctx.dim, ctx.mesh = back, dim, mesh
        return _collective(x, there, dim, mesh)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _collective(gradients[0], ctx.back, ctx.dim, ctx.mesh), None, None, None, None


def _collective(x: Tensor, what: str, dim: int, mesh: DeviceMesh) -> Tensor:
    if what == "keep":
        return x.view_as(x)
    group = mesh.get_group()
    if what == "sum":
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))
    if what == "slice":
        return x.chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()
    # Along the first dimension the blocks lie in one piece; for [1, N, D] and dim 1 moving it there is free.
    x = x.movedim(dim, 0)
    return (gather(x, group) if what == "gather" else scatter(x, group)).movedim(0, dim)
