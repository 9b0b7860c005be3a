"""What the GPUs of one machine do while a run goes on: utilisation, memory, power and temperature, asked of NVML.

NVML (package ``nvidia-ml-py``) sees every GPU of the machine, whoever uses it, without a CUDA context. A thread asks
once a second; ``take`` gives what it saw since the last time.
"""

from __future__ import annotations

import threading
from typing import Any

from fastkd.log import logger

_GIB = 2.0**30


class GpuMonitor:
    """Watches until ``close``. A machine without an NVIDIA driver is said once, and has nothing to tell.

    Args:
        node: put before a GPU's index in the names of metrics; empty where there is one machine.
        seconds: between two samples.
        nvml: the module pynvml, or one like it.
    """

    def __init__(self, node: str = "", seconds: float = 1.0, nvml: Any = None):
        if nvml is None:
            import pynvml as nvml  # pyright: ignore[reportMissingImports]
        self.nvml, self.prefix = nvml, f"gpu/{node}/" if node else "gpu/"
        self.absent = ""
        """Why there is nothing to see."""
        self._devices: list[Any] = []
        self._seen: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(seconds,), name="gpu monitor", daemon=True)
        try:
            nvml.nvmlInit()
            self._devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            self.absent = str(error)
            where = f" on {node}" if node else ""
            logger.warning(f"logger.monitor_gpus: NVML does not answer{where} ({error}): nothing is recorded")
            return
        self._thread.start()

    def take(self) -> dict[str, float]:
        """Of each GPU since the last time: mean ``utilization`` in percent and ``watts``, most ``memory_gib`` (of all
        processes) and ``celsius``; what a GPU does not report is left out."""
        if self._devices and not self._seen:
            self._sample()
        with self._lock:
            seen, self._seen = self._seen, {}
        return {
            name: max(values) if name.endswith(("memory_gib", "celsius")) else sum(values) / len(values)
            for name, values in seen.items()
        }

    def close(self) -> None:
        """No samples from here on."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            self._sample()

    def _sample(self) -> None:
        nvml = self.nvml
        questions = {
            "utilization": lambda device: float(nvml.nvmlDeviceGetUtilizationRates(device).gpu),
            "memory_gib": lambda device: nvml.nvmlDeviceGetMemoryInfo(device).used / _GIB,
            "watts": lambda device: nvml.nvmlDeviceGetPowerUsage(device) / 1000,  # it counts milliwatts
            "celsius": lambda device: float(nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
        }
        for index, device in enumerate(self._devices):
            for name, ask in questions.items():
                try:
                    value = ask(device)
                except nvml.NVMLError:  # not every board reports everything, and a GPU may fall off the bus
                    continue
                with self._lock:
                    self._seen.setdefault(f"{self.prefix}{index}/{name}", []).append(value)
