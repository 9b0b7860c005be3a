"""Copies from host memory that do not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``.

    From the host to a GPU it goes through pinned memory: a plain copy would first wait for everything the GPU has been
    given to do, and with it for the backward pass of the micro-batch before.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
