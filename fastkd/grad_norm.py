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
    """Scale gradients to a global L2 norm of at most ``max_norm``; the norm before. None only measures.

    See ``global_norm``; every rank of a mesh must call it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = global_norm(gradients)
    if max_norm is not None and gradients:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        by_device: dict[torch.device, list[Tensor]] = {}
        for one in gradients:
            local = one.to_local() if isinstance(one, DTensor) else one
            by_device.setdefault(local.device, []).append(local)
        for device, parts in by_device.items():  # offloaded gradients are on the host, the norm is not
            torch._foreach_mul_(parts, scale.to(device))  # pyright: ignore[reportPrivateImportUsage]
    return norm


@torch.no_grad()
def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all tensors together, a scalar, the same on all ranks.

    Works on plain tensors and on DTensors of any mix of meshes: every rank adds the squares of its local part, divided
    by the number of ranks that hold a copy of it; one sum over each mesh follows. Every rank of a mesh must call it.

    Raises:
        RuntimeError: a tensor is a partial sum that was not reduced yet.
    """
    by_mesh: dict[DeviceMesh | None, dict[int, list[Tensor]]] = {}  # and by number of copies
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            by_mesh.setdefault(None, {}).setdefault(1, []).append(tensor)
            continue
        copies = 1
        for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
            if isinstance(placement, Replicate):
                copies *= size
            elif placement.is_partial():
                raise RuntimeError("global_norm: a gradient is not reduced yet; call it after backward")
        by_mesh.setdefault(tensor.device_mesh, {}).setdefault(copies, []).append(tensor.to_local())
    total: Tensor | None = None
    for mesh, by_copies in by_mesh.items():
        shares = [
            torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).square().sum() / copies  # pyright: ignore[reportPrivateImportUsage]
            for copies, parts in by_copies.items()
        ]
        squares = torch.stack(shares).sum()
        if mesh is not None:
            squares = squares.to(mesh.device_type)  # offloaded tensors: the group's device does the sum
            for dimension in range(mesh.ndim):
                dist.all_reduce(squares, group=mesh.get_group(dimension))
        total = squares if total is None else total.to(squares.device) + squares
    return torch.zeros(()) if total is None else total.sqrt()
