"""What the ranks of one worker group write and read of a checkpoint: tensors, through torch.distributed.checkpoint.

Each rank writes the parts that it holds (replicated ones are written once) into files of its own, and hashes them. A
read takes from those files whatever this rank holds now, so the number of ranks and the layout may differ.

**Asynchronous writes.** ``save`` copies this rank's parts to host memory and returns; a thread writes the copies while
training goes on. It costs host memory of the size of the copies (12 bytes per parameter with Adam, divided by the
ranks) until the write has ended. The thread's collectives need a process group of their own: on a shared one they
would mix with those of training, in an order that differs from rank to rank. It is a gloo group, since the copies
are in host memory.

**Offsets are computed here.** torch cuts a tensor that FSDP and tensor parallelism split along one dimension as if it
were cut by dp and then again by tp. In truth tp cuts first. The two differ when the pieces of tp are uneven and dp
then cuts them into different sizes (105 rows over tp 2: 53 and 52; over dp 4: 14, 14, 14, 11 and 13, 13, 13, 13), and
a file written with the wrong sizes is found out only when it is read.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor, Shard

from fastkd.errors import CheckpointError, reason

Files = dict[str, tuple[int, str]]
"""Name of a file → its bytes and its SHA-256."""

# A group of one is intended. Filtered here and not around the call: the thread that writes must not change the
# filters under the feet of the thread that trains.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class StateFiles:
    """Writes and reads states, one at a time. Every rank of the group calls the same methods in the same order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Files] | None = None
        self._groups: dict[tuple[int, ...], Any] = {}

    def save(self, state: dict[str, Any], path: Path, *, asynchronous: bool) -> None:
        """Begin to write ``state`` (nested dicts and lists) into the folder ``path``; ``saved`` tells the end.

        With ``asynchronous`` the tensors may be changed as soon as this returns; else it returns when all is written.
        """
        if self._writing is not None:
            self._writing.exception()  # waits: the driver may have heard of the end from another rank
        group = self._group(state)
        if asynchronous:
            state = _map_tensors(state, _host_copy)
        self._writing = self._thread.submit(_write, _map_tensors(state, _exact), path, group)
        if not asynchronous:
            self._writing.exception()

    def saved(self, wait: bool) -> Files | None:
        """The files that all ranks have written since ``save``, the same on every rank; None while this one writes.

        May be asked again: ranks that are asked at one moment may give different answers.

        Raises:
            OSError: a rank could not write. All of them raise it.
        """
        assert self._writing is not None, "there is no save"
        return self._writing.result() if wait or self._writing.done() else None

    def load(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        """Read into the tensors of ``state``, in place; returns ``state`` with the plain values that were saved.

        Entries of ``optimizer.state`` are left out of the result when none of a parameter's was saved: it had taken no
        step.

        Raises:
            CheckpointError: the files hold other tensors than ``state``.
            OSError: they cannot be read.
        """
        group, planner = self._group(state), _Planner()
        shards = _map_tensors(state, _exact)
        try:
            dcp_load(shards, checkpoint_id=path, planner=planner, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise _cause(error) from error
        return planner.without_unsaved(_merge(state, shards))

    def _group(self, state: dict[str, Any]) -> Any:
        """The group of the ranks that hold a part; None when nothing is sharded."""
        ranks: set[int] = set()

        def add(tensor: Tensor) -> Tensor:
            if isinstance(tensor, DTensor):
                ranks.update(tensor.device_mesh.mesh.flatten().tolist())
            return tensor

        _map_tensors(state, add)
        key = tuple(sorted(ranks))
        if key not in self._groups:
            self._groups[key] = (
                dist.new_group(list(key), backend="gloo", use_local_synchronization=True) if key else None
            )
        return self._groups[key]


def digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- writing


def _write(shards: dict[str, Any], path: Path, group: Any) -> Files:
    """On every rank, in the thread: write, hash one's own files, tell one another."""
    try:
        dcp_save(shards, checkpoint_id=path, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # the same on all ranks
        raise _cause(error) from error
    rank = 0 if group is None else dist.get_rank(group)
    mine: Files | str
    try:
        files = [*path.glob(f"__{rank}_*"), *(path.glob(".metadata") if rank == 0 else ())]
        mine = {file.name: digest(file) for file in files}
    except OSError as error:
        mine = f"rank {rank}: {reason(error)}"  # told to the others, who wait for it
    everyone: list[Any] = [mine]
    if group is not None:
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    for one in everyone:
        if isinstance(one, str):
            raise OSError(one)
    return {name: entry for one in everyone for name, entry in one.items()}


def _cause(error: CheckpointException) -> Exception:
    """The error of the first rank that failed. CheckpointException itself is a BaseException, which pools let pass."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    if isinstance(cause, _OtherModel):
        return CheckpointError(
            "checkpointing.checkpoint_dir",
            f"holds checkpoints of another model or optimizer: {cause}",
            "Use the model and optimizer of its recipe.yaml, or another folder",
        )
    return OSError(f"rank {rank}: {type(cause).__name__}: {reason(cause)}")


# ---------------------------------------------------------------- reading


class _OtherModel(Exception):
    """Names or shapes differ. Ranks send it to one another, so it is made from one string."""


class _Planner(DefaultLoadPlanner):
    """Compares names and shapes first. Runs on all ranks; torch tells all of them what one raises."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        saved = metadata.state_dict_metadata
        # Name → the parameter whose optimizer state it belongs to.
        owners = {name: str(path[2]) for name, path in self.mappings.items() if path[:2] == ("optimizer", "state")}
        self.unsaved = set(owners.values()) - {owner for name, owner in owners.items() if name in saved}
        self.state_dict = {
            name: value
            for name, value in self.state_dict.items()
            # Plain values that only this version of torch knows stay what they are.
            if owners.get(name) not in self.unsaved and (isinstance(value, Tensor) or name in saved)
        }
        shapes = {name: tuple(v.shape) for name, v in self.state_dict.items() if isinstance(v, Tensor)}
        stored = {name: tuple(v.size) for name, v in saved.items() if isinstance(v, TensorStorageMetadata)}
        for name in sorted(shapes.keys() | stored.keys()):
            if shapes.get(name) != stored.get(name):
                here, there = _shape(shapes.get(name)), _shape(stored.get(name))
                raise _OtherModel(f"{name} is {there} there and {here} here")

    def without_unsaved(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` without the optimizer state of parameters that had none."""
        for name in self.unsaved:
            del state["optimizer"]["state"][name]
        return state


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"{list(shape)}"


# ---------------------------------------------------------------- tensors


def _map_tensors(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: _map_tensors(value, function) for name, value in state.items()}
    if isinstance(state, list):
        return [_map_tensors(value, function) for value in state]
    return state


def _merge(tensors: Any, values: Any) -> Any:
    """Tensors of one tree, everything else of the other."""
    if isinstance(tensors, Tensor):
        return tensors
    if isinstance(tensors, dict):
        return {name: _merge(tensors.get(name), value) for name, value in values.items()}
    if isinstance(tensors, list) and len(tensors) == len(values):
        return [_merge(one, other) for one, other in zip(tensors, values, strict=True)]
    return values


def _host_copy(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    copy = local.detach().to("cpu", copy=True)
    # The mesh stays the one of the device: it is only asked where this part lies.
    return DTensor(copy, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copy


def _exact(tensor: Tensor) -> Tensor:
    """A view of the same memory that tells torch where in the whole tensor it lies."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    part, filled = tensor.to_local().detach(), bool(tensor.to_local().numel())
    chunk = ChunkStorageMetadata(offsets=torch.Size(_offsets(tensor)), sizes=part.shape)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(part), size=tensor.shape)

    def write_items(name: str, _: Any) -> list[WriteItem]:
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)] if filled else []

    # torch asks the local tensor of a DTensor first. It is one more view: hooks that refer to the tensor they hang on
    # would keep its memory until the next garbage collection.
    hooked: Any = part.detach()
    hooked.__create_write_items__ = write_items
    hooked.__create_chunk_list__ = lambda: [chunk] if filled else []
    hooked.__get_tensor_shard__ = lambda index: part
    return DTensor(hooked, tensor._spec, requires_grad=False)


def _offsets(tensor: DTensor) -> list[int]:
    """Where this rank's part begins. tp (plain Shards) cuts first, FSDP (a strided Shard) cuts what is left."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
    cuts: list[tuple[Any, int]] = [
        (placement, dimension) for dimension, placement in enumerate(tensor.placements) if not placement.is_replicate()
    ]
    for placement, dimension in sorted(cuts, key=lambda cut: type(cut[0]) is not Shard):
        dim, left = placement.dim, sizes[placement.dim]
        each = -(-left // mesh.size(dimension))
        begin = min(each * coordinate[dimension], left)
        offsets[dim] += begin
        sizes[dim] = min(each, left - begin)
    assert sizes == list(tensor.to_local().shape), f"{tensor.placements}: {sizes} is not {tensor.to_local().shape}"
    return offsets
