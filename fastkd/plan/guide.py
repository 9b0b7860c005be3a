"""Training state by hand: the tables of guides that count bytes per parameter over ZeRO-3 ranks.

A state of b bytes per parameter over n ranks takes b · P / n on each. Engines with bfloat16 weights, gradients of the
same kind and float32 Adam count 2 + 2 + 8 = 12; fastkd keeps float32 weights (the masters), float32 gradients and two
float32 moments, 4 + 4 + 8 = 16. Which one a figure means must be said with it. Decimal gigabytes, as such guides print.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMES: dict[str, tuple[int, int, int]] = {"bf16": (2, 2, 8), "fp32": (4, 4, 8)}
"""Bytes per parameter of parameters, gradients and Adam. "bf16": no masters; "fp32": weights are the masters."""
GB = 1e9


@dataclass(frozen=True, slots=True)
class StateTable:
    """Training state on each of n ranks, in GB, with an estimate of activations as a range."""

    parameters: float
    """Of the model."""
    ranks: int
    scheme: str = "bf16"
    activations_gb: tuple[float, float] = (0.0, 0.0)
    device_gb: float = 95.0

    @property
    def state_gb(self) -> float:
        """Of the whole model, over all ranks."""
        return self.parameters * sum(SCHEMES[self.scheme]) / GB

    @property
    def parts_gb(self) -> tuple[float, float, float]:
        """Parameters, gradients and optimizer on one rank."""
        weights, gradients, optimizer = (self.parameters * size / self.ranks / GB for size in SCHEMES[self.scheme])
        return weights, gradients, optimizer

    @property
    def total_gb(self) -> tuple[float, float]:
        """Least and most on one rank."""
        state = sum(self.parts_gb)
        return state + self.activations_gb[0], state + self.activations_gb[1]

    @property
    def used(self) -> tuple[float, float]:
        """The same as shares of the device, in per cent."""
        low, high = self.total_gb
        return 100 * low / self.device_gb, 100 * high / self.device_gb

    def lines(self) -> list[str]:
        """As a guide prints it."""
        weights, gradients, optimizer = self.parts_gb
        (low, high), (used_low, used_high) = self.total_gb, self.used

        def line(name: str, amount: float) -> str:
            return f"{name:<25}{f'~{amount:.0f}':>3} GB"

        return [
            line("Parameters (sharded):", weights),
            line("Gradients (sharded):", gradients),
            line("Optimizer states:", optimizer),
            f"Activations (estimated): ~{self.activations_gb[0]:.0f}-{self.activations_gb[1]:.0f} GB",
            f"{'TOTAL:':<25}~{low:.0f}-{high:.0f} GB / {self.device_gb:.0f} GB "
            f"({used_low:.0f}-{used_high:.0f}% utilization)",
        ]

    def least_ranks(self, share: float = 1.0) -> int:
        """Fewest ranks, a power of two, whose state and least activations stay within a share of the device."""
        ranks = 1
        while StateTable(self.parameters, ranks, self.scheme, self.activations_gb, self.device_gb).total_gb[0] > (
            share * self.device_gb
        ):
            ranks *= 2
        return ranks
