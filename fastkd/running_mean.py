"""A running mean of the weights that a model trains: a teacher that follows its student slowly.

After every step mean ← decay · mean + (1 − decay) · weights (Polyak averaging; as a teacher: Tarvainen & Valpola,
"Mean teachers are better role models", NeurIPS 2017). The mean has no module of its own. While it is the teacher, its
values and the model's change places, tensor by tensor, and then change back bit for bit. So a mean teacher costs one
copy of the trained weights (with adapters: of the adapters), sharded as they are, and four passes over memory a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class RunningMean:
    """The mean of a model's trained weights.

    Args:
        root: the outermost module, sharded or not.
        trained: its trained parameters by name; a rank holds its own part of each.
        decay: in [0, 1]; 0 follows at once, 1 never.
    """

    def __init__(self, root: nn.Module, trained: Mapping[str, nn.Parameter], decay: float):
        self.root, self.trained, self.decay = root, trained, decay
        self.means: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the mean towards the weights as they are now."""
        for mean, weight in self._pairs():
            mean.mul_(self.decay).add_(weight, alpha=1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the mean."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                # The root unit keeps what it has gathered after a forward without backward, and would use it again.
                module.reshard()
        for mean, weight in self._pairs():
            before = weight.clone()
            weight.copy_(mean)
            mean.copy_(before)

    def load(self, means: Mapping[str, Tensor]) -> None:
        """Take up the means of a checkpoint, laid out as these are."""
        with torch.no_grad():
            for name, mean in self.means.items():
                _local(mean).copy_(_local(means[name]))

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, weight in self.trained.items():
            yield _local(self.means[name]), _local(weight.detach())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
