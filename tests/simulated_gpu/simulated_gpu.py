"""A simulated GPU: torch built without CUDA is given a device "cuda:0" whose bytes lie in host memory.

``install()`` compiles and loads ``device.cpp``, which says what is simulated and what is not, and answers for the
functions of ``torch.cuda`` that ask the driver. Programs then run as on a GPU: ``sitecustomize.py`` beside this file
installs it in every process whose PYTHONPATH holds this folder.

It finds operands of two devices, tensors made on the wrong one, values read from the device where that waits for it,
and what lives in its memory. It knows nothing of speed, of streams that run side by side, or of Triton's compiler:
kernels run interpreted (TRITON_INTERPRET=1), or as torch operators when that is not set.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "simulated GPU"
CAPABILITY = (9, 0)
MEMORY = 8 << 30
"""Bytes that the device claims to have; nothing is refused for them."""
_SOURCE = Path(__file__).with_name("device.cpp")
_loaded: Any = None


def why_not() -> str | None:
    """Why it cannot run here, or None when it can."""
    from shutil import which

    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this torch was built for real GPUs"
    if sys.platform != "linux":
        return "only on Linux"
    return None if which("g++") else "needs g++"


def build() -> Path:
    """The compiled device; compiled once (half a minute) for a version of torch."""
    folder = _torch_folder()
    key = hashlib.sha256(_SOURCE.read_bytes() + str(folder).encode() + (folder / "version.py").read_bytes())
    library = Path(tempfile.gettempdir()) / f"simulated_gpu_{os.getuid()}_{key.hexdigest()[:16]}.so"
    if not library.exists():
        temporary = library.with_suffix(f".{os.getpid()}.tmp")
        include = folder / "include"
        command = [
            "g++",
            "-O1",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{include}",
            f"-I{include}/torch/csrc/api/include",
        ]
        command += [str(_SOURCE), "-o", str(temporary), f"-L{folder}/lib", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        temporary.replace(library)
    return library


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def install() -> None:
    """From here on there is one GPU in this process. Before anything imports torch: its libraries ask once."""
    global _loaded
    if _loaded is not None:
        return
    assert "torch" not in sys.modules, "torch has already looked for devices"
    ctypes.CDLL(str(_torch_folder() / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(build()))
    for name in ("gpu_memory", "gpu_peak"):
        getattr(library, name).restype = ctypes.c_int64
    library.gpu_take_waits.restype = ctypes.c_char_p
    _loaded = library
    _answer_for_the_driver(library)
    _answer_for_nccl()
    import flash

    flash.register()
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Kernels cannot be launched here; without Triton they are torch operators, on the device.
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)


def waits() -> dict[str, int]:
    """Calls since the last time that a real program would have waited for the device in, by operator."""
    lines = (_loaded.gpu_take_waits() or b"").decode().splitlines()
    return {name: int(count) for name, _, count in (line.rpartition(" ") for line in lines)}


class Stream:
    """Everything is done at once, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any):
        import torch

        self.cuda_stream = self.stream_id = 0
        self.device = torch.device("cuda", torch.cuda.current_device())

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def record_event(self, event: Any = None) -> Any:
        import torch

        event = event or torch.cuda.Event()
        event.record()
        return event


def _answer_for_nccl() -> None:
    """Groups of the "nccl" backend: what they are asked to do never reaches them (``device.cpp``)."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    class ProcessGroupNCCL(c10d.ProcessGroupGloo):
        class Options(SimpleNamespace):
            pass

        uid = 0

        def __init__(self, store: Any, rank: int, size: int, options: Options):
            super().__init__(store, rank, size, timeout=options._timeout)

    c10d._NCCL_AVAILABLE = True
    c10d.ProcessGroupNCCL = ProcessGroupNCCL
    c10d.default_pg_nccl_timeout = c10d.default_pg_timeout
    # A group bound to a device is split where a mesh needs parts of it; both of its backends are gloo here, and would
    # meet under one name then. Parts are made anew instead.
    begin = c10d.init_process_group
    dist.init_process_group = lambda *args, device_id=None, **options: begin(*args, **options)


def _answer_for_the_driver(library: Any) -> None:
    import torch

    own = int(os.environ.get("LOCAL_RANK", "0"))

    def properties(device: Any = None) -> SimpleNamespace:
        # Ray says which GPU a process has after it has started it.
        return SimpleNamespace(
            name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=1,
            uuid=f"simulated {os.environ.get('CUDA_VISIBLE_DEVICES', own)}", warp_size=32, is_integrated=0,
        )  # fmt: skip

    modes = {0: 0, 1: 1, 2: 2, "default": 0, "warn": 1, "error": 2}
    state = SimpleNamespace(mode=0)

    def set_sync_debug_mode(mode: int | str) -> None:
        state.mode = modes[mode]
        library.gpu_wait_mode(state.mode)

    class Event(torch.Event):  # C++ takes it for one of its own
        """The time at which it was recorded."""

        def __new__(cls, *args: Any, **kwargs: Any):
            return super().__new__(cls, device="cuda")

        def record(self, stream: Any = None) -> None:
            self.time = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.time - self.time)

        def wait(self, stream: Any = None) -> None: ...
        def synchronize(self) -> None: ...
        def query(self) -> bool:
            return True

    @contextlib.contextmanager
    def on_stream(chosen: Any):
        yield

    answers = dict(
        _lazy_init=lambda: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda including_emulation=True: True,
        device_count=lambda: 8,
        current_device=lambda: own,
        set_device=lambda device: None,
        _exchange_device=lambda device: own,
        _maybe_exchange_device=lambda device: own,
        get_device_name=lambda device=None: NAME,
        get_device_capability=lambda device=None: CAPABILITY,
        get_device_properties=properties,
        get_arch_list=lambda: ["sm_90"],
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
        memory_allocated=lambda device=None: library.gpu_memory(),
        memory_reserved=lambda device=None: library.gpu_memory(),
        max_memory_allocated=lambda device=None: library.gpu_peak(),
        max_memory_reserved=lambda device=None: library.gpu_peak(),
        reset_peak_memory_stats=lambda device=None: library.gpu_reset_peak(),
        mem_get_info=lambda device=None: (MEMORY - library.gpu_memory(), MEMORY),
        memory_stats=lambda device=None: {
            "allocated_bytes.all.current": library.gpu_memory(), "allocated_bytes.all.peak": library.gpu_peak()
        },
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda new, device="cuda": None,
        Stream=Stream,
        Event=Event,
        current_stream=lambda device=None: Stream(),
        default_stream=lambda device=None: Stream(),
        set_stream=lambda chosen: None,
        stream=on_stream,
        set_sync_debug_mode=set_sync_debug_mode,
        get_sync_debug_mode=lambda: state.mode,
        is_current_stream_capturing=lambda: False,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    resize = torch.UntypedStorage.resize_

    def resize_storage(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if self.device.type != "cuda":
            return resize(self, size)
        library.gpu_resize_storage(ctypes.c_void_p(self._cdata), ctypes.c_int64(size))
        return self

    torch.UntypedStorage.resize_ = resize_storage  # torch's own needs a build with CUDA
    for name in (
        "memory_allocated",
        "memory_reserved",
        "max_memory_allocated",
        "reset_peak_memory_stats",
        "empty_cache",
    ):
        setattr(torch.cuda.memory, name, answers[name])
