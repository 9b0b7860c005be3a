"""Gradient clipping over any mix of shardings: one global norm, the same on every rank and on every mesh."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients to a global L2 norm of at most ``max_norm``; the norm before, a scalar, the same on all ranks.

    Works on plain tensors and on DTensors of any mix of meshes: every rank adds the squares of its local part, divided
    by the number of ranks that hold a copy of it; one sum over each mesh follows. None only measures. Every rank of
    a mesh must call it.
    """
    by_mesh: dict[DeviceMesh | None, list[tuple[Tensor, int]]] = {}
    local: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
            copies = 1
            for placement, size in sizes:
                if isinstance(placement, Replicate):
                    copies *= size
                elif placement.is_partial():
                    raise RuntimeError("clip_grad_norm: a gradient is not reduced yet; call it after backward")
            by_mesh.setdefault(gradient.device_mesh, []).append((gradient.to_local(), copies))
            local.append(gradient.to_local())
        elif gradient is not None:
            by_mesh.setdefault(None, []).append((gradient, 1))
            local.append(gradient)
    if not local:
        return torch.zeros(())
    total = torch.zeros((), device=local[0].device)
    for mesh, entries in by_mesh.items():
        parts = [part for part, _ in entries]
        norms = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32))  # pyright: ignore[reportPrivateImportUsage]
        copies = torch.tensor([1.0 / copies for _, copies in entries], device=norms.device)
        squares = (norms.square() * copies).sum()
        if mesh is not None:
            squares = squares.to(mesh.device_type)  # offloaded gradients: the group's device does the sum
            for dimension in range(mesh.ndim):
                dist.all_reduce(squares, group=mesh.get_group(dimension))
        total = total + squares.to(total.device)
    norm = total.sqrt()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local, scale)  # pyright: ignore[reportPrivateImportUsage]
    return norm
