"""GPU monitoring: NVML's functions by their real names, with simulated answers, since tests have no GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fastkd.gpu_monitor import GpuMonitor
from fastkd.metrics import require_sinks

pynvml = pytest.importorskip("pynvml", reason="the package nvidia-ml-py is not installed")


@pytest.fixture
def two_gpus(monkeypatch):
    """Simulated answers of two GPUs; the second does not report its power. Returns their utilisations."""
    busy = {0: 90, 1: 10}

    def watts(device):
        if device == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 300_000

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=busy[device], memory=0),
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(used=(device + 1) << 30),
        "nvmlDeviceGetPowerUsage": watts,
        "nvmlDeviceGetTemperature": lambda device, sensor: 40 + busy[device] // 10,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)  # AttributeError if NVML has no such function
    return busy


def test_means_and_peaks_since_the_last_time(two_gpus):
    monitor = GpuMonitor("node-1", seconds=3600)
    monitor._sample()
    two_gpus[0] = 50
    monitor._sample()
    assert monitor.take() == {
        "gpu/node-1/0/utilization": 70.0,
        "gpu/node-1/0/memory_gib": 1.0,
        "gpu/node-1/0/watts": 300.0,
        "gpu/node-1/0/celsius": 49.0,
        "gpu/node-1/1/utilization": 10.0,
        "gpu/node-1/1/memory_gib": 2.0,
        "gpu/node-1/1/celsius": 41.0,
    }
    assert monitor.take()["gpu/node-1/0/utilization"] == 50.0  # a step shorter than the interval
    monitor.close()


def test_a_thread_samples(two_gpus):
    monitor = GpuMonitor(seconds=0.01)
    while len(monitor._seen.get("gpu/0/utilization", [])) < 3:
        pass
    monitor.close()
    assert monitor.take()["gpu/0/utilization"] == 90.0 and not monitor._thread.is_alive()


def test_a_machine_without_a_driver(monkeypatch, caplog):
    def no_driver():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    monitor = GpuMonitor("node-1")
    assert monitor.absent and monitor.take() == {}
    assert "logger.monitor_gpus: NVML does not answer on node-1" in caplog.text
    monitor.close()


def test_the_package_is_asked_for_before_anything_is_written(monkeypatch):
    from fastkd.config import Recipe
    from fastkd.errors import MissingDependency

    config = Recipe.model_fields["logger"].annotation(monitor_gpus=True)
    require_sinks(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"logger\.monitor_gpus(.|\n)*fastkd\[monitor\]"):
        require_sinks(config)


def test_a_run_records_them(two_gpus, tmp_path):
    from fastkd.recipe import load_recipe
    from fastkd.runner import run

    run(
        load_recipe(
            "recipes/arithmetic_cpu.yaml",
            [
                "distillation.max_num_steps=1",
                "distillation.val_period=0",
                "distillation.val_at_start=false",
                "distillation.num_prompts_per_step=4",
                "policy.train_global_batch_size=4",
                "logger.monitor_gpus=true",
                f"logger.log_dir={tmp_path / 'run'}",
                f"checkpointing.checkpoint_dir={tmp_path / 'run/checkpoints'}",
            ],
        )
    )
    last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert last["gpu/0/utilization"] == 90.0 and last["gpu/1/memory_gib"] == 2.0
