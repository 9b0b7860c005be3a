"""Weight sync: the trainer's weights into running vLLM engines, through vLLM's weight-transfer interface.

All that depends on vLLM's trainer side is in this file: it changes between releases. Three transports:

* ``nccl``: vLLM's own packed broadcast from GPU to GPU;
* ``gloo``: the same over gloo, for CPU engines (its receiver is registered by ``fastkd.vllm_extension``);
* ``file``: a folder that both sides see. Slower, but needs no connection and takes every kind of model.

The first rank of the training group sends; the others only help to gather. At any time there is one whole tensor (or
one bucket), in the engines' dtype: masters in float32 are cast part by part before they are gathered, and a tensor
that has that dtype already is not touched. A head tied to the embedding is sent once. Experts are sent one by one, as
files hold them. vLLM's CPU build computes with wrong experts after such an update, and says nothing: refused
(``check_experts``). On GPUs the probe (``fastkd.sync_probe``) tells.

``send`` returns the cost. Whether the engines compute with what they got is for ``fastkd.sync_probe`` to say.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from fastkd import weights_export
from fastkd.errors import UserError, reason
from fastkd.experts import experts_of
from fastkd.weights import stored_as_is, stored_tensors

NCCL, GLOO, FILE = "nccl", "fastkd_gloo", "fastkd_file"
"""Names in vLLM's registry of receivers (``WeightTransferConfig(backend=...)``)."""
BUCKET_BYTES = 64 << 20
_ALIGN = 16
"""Bytes; every tensor starts at a multiple of it, so that it can be viewed in its own dtype."""


class SyncError(RuntimeError):
    """Weights did not arrive. The engines must get a whole update before they are used again."""


class Entry(NamedTuple):
    """One tensor of the stream."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its data alone."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Bucket(NamedTuple):
    """Tensors that travel together, and where each begins."""

    entries: tuple[Entry, ...]
    offsets: tuple[int, ...]
    nbytes: int


class SyncCost(NamedTuple):
    """What one sync took."""

    seconds: float
    nbytes: int


def transport_for(device_type: str, *, shares_device: bool = False) -> str:
    """The receiver that fits the engines' devices. NCCL refuses two ranks on one GPU: those meet in host memory."""
    return NCCL if device_type == "cuda" and not shares_device else GLOO


def buckets(entries: Iterable[Entry], limit: int) -> Iterator[Bucket]:
    """Cut the stream: as many tensors as fit into ``limit`` bytes, at least one. Both sides cut alike."""
    held: list[Entry] = []
    offsets: list[int] = []
    end = 0
    for entry in entries:
        size = -(-entry.nbytes // _ALIGN) * _ALIGN
        if held and end + size > limit:
            yield Bucket(tuple(held), tuple(offsets), end)
            held, offsets, end = [], [], 0
        held.append(entry)
        offsets.append(end)
        end += size
    if held:
        yield Bucket(tuple(held), tuple(offsets), end)


def unpack(bucket: Bucket, data: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a received bucket; views of ``data`` [nbytes] uint8."""
    for entry, start in zip(bucket.entries, bucket.offsets, strict=True):
        yield entry.name, data[start : start + entry.nbytes].view(entry.dtype).view(entry.shape)


def gloo_group(address: str, port: int, rank: int, size: int, timeout: timedelta, store: Any = None) -> Any:
    """A process group of its own, beside whatever default group either side is in."""
    store = store or TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.ProcessGroupGloo(PrefixStore("fastkd", store), rank, size, timeout)


class Weights:
    """The stream of a model's tensors under their checkpoint names; what vLLM calls a weight source.

    Iterating is a collective of the model's ranks. The first one gets whole tensors, the others None.

    Args:
        causal_lm: the student's model, sharded or not; adapters are sent merged.
        dtype: of the engines' weights.
        device: where the first rank wants the tensors; None: where they are.

    Raises:
        UserError: the files of this model hold other tensors than it has.
    """

    def __init__(self, causal_lm: Any, dtype: torch.dtype, device: torch.device | None = None):
        self.causal_lm, self.dtype, self.device = causal_lm, dtype, device
        self._running: Iterator[Any] | None = None

    def check_names(self) -> None:
        """Engines know tensors by their names in checkpoint files."""
        if not stored_as_is(self.causal_lm):
            raise UserError(
                "weight sync",
                f"checkpoints of {type(self.causal_lm).__name__} hold other tensors than the model has (quantised "
                "weights, experts of another layout), so they cannot be streamed one by one",
                "Use the file transport",
            )

    def check_experts(self) -> None:
        """Not for CPU engines: what they compute after an update is wrong by half a nat per token (vLLM 0.32)."""
        layout = getattr(self.causal_lm, "fastkd_layout", None)
        kind = self.causal_lm.device.type if layout is None else layout.mesh.device_type
        if kind == "cpu" and any(True for _ in experts_of(self.causal_lm)):
            raise UserError(
                "policy.generation.backend",
                "vLLM's CPU build computes with wrong experts once their weights have been replaced",
                "Use backend=transformers, or GPUs",
                value="vllm",
            )

    def metadata(self) -> list[Entry]:
        """Names, dtypes and whole shapes, without moving anything."""
        tensors, _ = stored_tensors(self.causal_lm)
        entries = weights_export.file_entries(self.causal_lm, tensors, self.dtype)
        return [Entry(name, dtype, tuple(shape)) for name, (dtype, shape) in entries.items()]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._running = self._stream()
        return self._running

    def rewind(self) -> None:
        """Forget the last stream."""
        self._running = None

    def finish(self) -> None:
        """Run a stream that was broken off to its end, or one that never began: the other ranks wait in its gathers."""
        for _ in self._running or self:
            pass

    @torch.no_grad()
    def _stream(self) -> Iterator[tuple[str, Any]]:
        tensors, _ = stored_tensors(self.causal_lm)
        stream = weights_export.gathered(self.causal_lm, tensors, self.dtype, self.device)
        names = weights_export.file_entries(self.causal_lm, tensors, self.dtype)
        yield from zip(names, weights_export.in_files(self.causal_lm, tensors, stream), strict=True)


class Engines:
    """The control plane: one method of every engine at once, as vLLM's trainer side wants it.

    Args:
        call: runs ``method`` on all engines, each with its own tuple of arguments, and waits for all. In Ray:
            ``lambda method, args: ray.get([getattr(e, method).remote(*a) for e, a in zip(engines, args)])``.
        workers: per engine, its tensor × pipeline parallel size.
    """

    version = 0

    def __init__(self, call: Callable[[str, list[tuple[Any, ...]]], Any], workers: Sequence[int]):
        self.call, self.workers = call, tuple(workers)

    @classmethod
    def local(cls, engines: Sequence[Any]) -> Engines:
        """Engines that live in this process."""
        threads = ThreadPoolExecutor(len(engines))

        def call(method: str, args: list[tuple[Any, ...]]) -> list[Any]:
            running = [threads.submit(getattr(one, method), *its) for one, its in zip(engines, args, strict=True)]
            return [one.result() for one in running]

        return cls(call, [one.workers for one in engines])

    def logprobs(self, tokens: Sequence[int]) -> list[list[float]]:
        """Of these tokens, by each engine."""
        return self.call("logprobs", [(tokens,)] * len(self.workers))

    def _all(self, method: str, *args: Any) -> None:
        self.call(method, [args] * len(self.workers))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine joins with ranks of its own: 1 … for the first one, then the next ones'."""
        offsets = [1 + sum(self.workers[:index]) for index in range(len(self.workers))]
        self.call("init_weight_transfer_engine", [({**init_info, "rank_offset": offset},) for offset in offsets])

    def start_weight_update(self) -> None:
        """No engine takes a step from here on."""
        self._all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load; returns when all have."""
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Go on with the new weights."""
        self._all("finish_weight_update", self.version)

    def abandon_weight_update(self) -> None:
        """After a failure: engines refuse to sample until a whole update has arrived."""
        self._all("abandon_weight_update")


class WeightSender:
    """The trainer's end. Every rank of the training group makes one and calls ``send``; the first one sends.

    Args:
        weights: this rank's view of the student.
        engines: control plane; needed on the first rank alone.
        transport: NCCL, GLOO or FILE, as the engines were built with.
        rank: of this process in the training group.
        address: of this host, as engines reach it. Port 0: any free one.
        folder: for FILE; all sides see it.
        timeout: of one bucket: an engine that died shows after it, at the latest.
    """

    def __init__(
        self,
        weights: Weights,
        engines: Engines | None,
        transport: str,
        *,
        rank: int = 0,
        address: str = "127.0.0.1",
        port: int = 0,
        folder: Path | None = None,
        timeout: timedelta = timedelta(minutes=5),
        bucket_bytes: int = BUCKET_BYTES,
    ):
        if rank == 0 and engines is None:
            raise UserError("weight sync", "the first rank sends", "Give it the engines")
        weights.check_experts()
        if transport == FILE:
            if folder is None:
                raise UserError("weight sync", "the file transport needs a folder", "Give one that all nodes see")
        else:
            weights.check_names()
        self.weights, self.transport, self.rank = weights, transport, rank
        self.engines: Any = engines
        self.folder, self.bucket_bytes, self.timeout = folder, bucket_bytes, timeout
        self.nbytes = sum(entry.nbytes for entry in weights.metadata())
        self._group: Any = None
        self._native: Any = None
        if transport == NCCL:
            self._native = self._join_nccl(address, port)
        elif rank == 0 and transport == GLOO:
            self._join_gloo(address, port)
        elif rank == 0:
            self.engines.call("init_weight_transfer_engine", [({},)] * len(self.engines.workers))

    def send(self, version: int) -> SyncCost:
        """Give all engines the weights after ``version`` optimizer steps. Every rank calls it.

        Raises:
            SyncError: on all ranks, with the engines' or the network's reason. Make a new sender, with the engines
                that are alive, and send again.
        """
        start = time.perf_counter()
        failure: Exception | None = None
        self.weights.rewind()
        try:
            if self.rank == 0:
                self.engines.version = version
            if self._native is not None:
                self._native.send_weights()
            elif self.transport == FILE:
                self._send_file(version)
            elif self.rank == 0:
                self._send_gloo()
            else:
                self.weights.finish()
        except Exception as error:
            failure = error
            if self.transport != FILE:
                self.weights.finish()
            if self.rank == 0:
                self._group = None  # its connections close: engines that wait for the rest hear of it
                self._abandon()
        said = [failure and reason(failure)]
        if dist.is_initialized():
            dist.broadcast_object_list(said, src=0)
        if said[0] or failure:
            raise SyncError(f"weights of version {version} did not reach the engines: {said[0]}") from failure
        return SyncCost(time.perf_counter() - start, self.nbytes)

    def close(self) -> None:
        """Release connections."""
        if self._native is not None:
            self._native.shutdown()
        self._group = self._native = None

    # --- transports -----------------------------------------------------------------------------------------------

    def _join_nccl(self, address: str, port: int) -> Any:
        from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import (  # pyright: ignore[reportMissingImports]
            NCCLTrainerInitInfo,
        )

        world = 1 + sum(self.engines.workers) if self.rank == 0 else 0
        info = NCCLTrainerInitInfo(address, port or _free_port(), world, rank=self.rank)
        return WeightTransferTrainerFactory.trainer_init(info, client=self.engines, source=self.weights)

    def _join_gloo(self, address: str, port: int) -> None:
        world = 1 + sum(self.engines.workers)
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=self.timeout)
        init = {
            "address": address,
            "port": store.port,
            "world_size": world,
            "bucket_bytes": self.bucket_bytes,
            "timeout_s": self.timeout.total_seconds(),
        }
        joining = _in_background(self.engines.init_weight_transfer_engine, init)
        self._group = gloo_group(address, store.port, 0, world, self.timeout, store)
        joining.result()

    def _send_gloo(self) -> None:
        entries = self.weights.metadata()
        group = self._group
        if group is None:
            raise SyncError("the last update broke off, and its connections are closed: make a new sender")
        self.engines.start_weight_update()
        stream = iter(self.weights)
        receiving = _in_background(
            self.engines.update_weights,
            {
                "names": [entry.name for entry in entries],
                "dtype_names": [str(entry.dtype).removeprefix("torch.") for entry in entries],
                "shapes": [list(entry.shape) for entry in entries],
            },
        )
        try:
            for bucket in buckets(entries, self.bucket_bytes):
                data = torch.empty(bucket.nbytes, dtype=torch.uint8)
                for entry, start in zip(bucket.entries, bucket.offsets, strict=True):
                    name, tensor = next(stream)
                    if (name, tensor.dtype, tuple(tensor.shape)) != entry:
                        raise SyncError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was announced as {entry}")
                    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
                    data[start : start + entry.nbytes].copy_(flat)
                if receiving.done():
                    receiving.result()  # an engine refused: say why, and do not wait for it
                group.broadcast([data]).wait()
            receiving.result()
        except Exception:
            del group
            if receiving.done():
                receiving.result()  # the engines' reason tells more than a broken connection
            raise
        self.engines.finish_weight_update()

    def _send_file(self, version: int) -> None:
        path = Path(self.folder or "") / f"weights_{version}"
        weights_export.export(self.weights.causal_lm, path, self.weights.dtype)
        if self.rank == 0:
            try:
                self.engines.start_weight_update()
                self.engines.update_weights({"path": str(path.resolve())})
                self.engines.finish_weight_update()
            finally:
                shutil.rmtree(path, ignore_errors=True)

    def _abandon(self) -> None:
        with suppress(Exception):  # a dead engine cannot be told; the failure that led here is the one to report
            self.engines.abandon_weight_update()


def _in_background(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Its result; the thread is not waited for, because after a failure it may never return."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *args)
    pool.shutdown(wait=False)
    return future


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]
