"""Export: a model, sharded or not, as a Hugging Face folder that transformers and vLLM load.

Every tensor in turn is cast, sent to the first rank part by part, and appended to its file there: there is one whole
tensor at a time, and on one rank. Adapters are merged into their layers, and quantised layers are written as the values
they compute with (``fastkd.nvfp4_export`` writes codes and scales instead). The header of a safetensors file needs only
names and shapes, which are known before. (The library's own writer wants all tensors of a file in memory.)
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from fastkd import expert_names
from fastkd.errors import CheckpointError, reason
from fastkd.files import write_json
from fastkd.lora_export import merged_state
from fastkd.quantization import fold, has_quantizers, quantized_tensors
from fastkd.safetensors_files import DTYPES
from fastkd.weights import local_part, stored_as_is, stored_tensors

_NAMES = DTYPES | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
_NAMES[torch.float8_e4m3fn] = "F8_E4M3"
"""Of dtypes in safetensors headers."""
Entries = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Name → dtype and shape of tensors in a file."""


@torch.no_grad()
def export(causal_lm: Any, path: Path, dtype: torch.dtype, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json, generation_config.json and safetensors files.

    All ranks call it; the first one writes, and all return when everything is on disk. The values are those in memory,
    cast to ``dtype``, bit for bit.

    Args:
        causal_lm: a transformers model.
        path: a folder, made if missing. Give a temporary one and rename it: a crash leaves half an export.
        dtype: of floating-point tensors.
        max_shard_bytes: tensors that take more are split over several files with an index. A larger tensor gets a file
            of its own.

    Raises:
        CheckpointError: on all ranks, when the first one could not write.
    """
    tensors, _ = stored_tensors(causal_lm)
    stream = gathered(causal_lm, tensors, dtype)

    def write() -> None:
        if not stored_as_is(causal_lm):
            _save_pretrained(causal_lm, path, dtype, stream, max_shard_bytes)
            return
        write_config(causal_lm, path, dtype)
        parameters = sum(tensor.numel() for tensor in tensors.values())
        entries = file_entries(causal_lm, tensors, dtype)
        write_files(path, entries, in_files(causal_lm, tensors, stream), max_shard_bytes, parameters)

    together(path, stream, write)


def together(path: Path, stream: Iterator[Any], write: Callable[[], None]) -> None:
    """``write()`` on the first rank, which takes the tensors of ``stream``; the others only help to gather them.

    Raises:
        CheckpointError: on all ranks, when the first one could not write.
    """
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            write()
        except Exception as error:  # the other ranks wait in a gather: go on with them, then stop together
            failure = error
    for _ in stream:
        pass
    said = [failure and reason(failure)]
    if dist.is_initialized():
        dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise CheckpointError(
            "export",
            f"cannot write the model ({said[0]})",
            "Give a folder that can be written, with enough space",
            value=str(path),
        ) from failure


def file_entries(causal_lm: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Entries:
    """What files hold of ``tensors``: experts one by one. Floating-point tensors are of ``dtype``."""
    pieces = expert_names.pieces(causal_lm)
    entries: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for name, tensor in tensors.items():
        own = dtype if tensor.is_floating_point() else tensor.dtype
        if name in pieces:
            shape = pieces[name].shape(tensor.shape)
            entries |= dict.fromkeys(pieces[name].names(tensor.shape[0]), (own, shape))
        else:
            entries[name] = (own, tensor.shape)
    return entries


def in_files(causal_lm: Any, names: Iterable[str], stream: Iterator[Any]) -> Iterator[Any]:
    """The stream of whole tensors as files hold them, in the order of ``file_entries``; None for pieces of None.

    Args:
        causal_lm: whose tensors they are.
        names: of the stream's tensors.
        stream: of :func:`gathered`.
    """
    pieces = expert_names.pieces(causal_lm)
    for name in names:
        whole = next(stream)
        if name not in pieces:
            yield whole
        elif whole is None:
            yield from [None] * len(pieces[name].names(causal_lm.get_parameter(name).shape[0]))
        else:
            yield from pieces[name].cut(whole)
        del whole  # before the next one is gathered


def gathered(
    causal_lm: Any,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    folded: bool = True,
) -> Iterator[Tensor | None]:
    """Whole tensors, cast, one after another on the first rank; None on the others. The ranks advance together.

    Not ``full_tensor``: that makes every rank hold the whole tensor several times.

    Args:
        causal_lm: a transformers model, its parameters plain or DTensors; adapters are merged.
        tensors: which, in the order of the result (``weights.stored_tensors``).
        dtype: of floating-point tensors.
        device: where the first rank wants them. Default: host memory for what is sharded, else where it is.
        folded: weights of quantised layers as the layers use them.
    """
    parts: list[Any] = [{name: local_part(tensor)[0] for name, tensor in tensors.items()}]
    if dist.is_initialized():
        mine, parts = parts[0], [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    quantized = quantized_tensors(causal_lm) if folded and has_quantizers(causal_lm) else {}
    for name, tensor in merged_state(causal_lm):
        if name not in tensors:
            continue  # another name of a tied one
        part, local = local_part(tensor)
        if name in quantized:
            local = fold(causal_lm, quantized[name], local, part[0])
        local = local.to(dtype) if tensor.is_floating_point() else local
        if isinstance(tensor, DTensor):
            yield _gather(local, tensor.shape, [one[name] for one in parts], device or torch.device("cpu"))
        else:
            yield local if device is None else local.to(device)


def _gather(local: Tensor, shape: Sequence[int], parts: list[tuple[slice, ...]], device: torch.device) -> Tensor | None:
    """One tensor, put together from the ranks' parts on the first rank; copies are sent once."""
    rank = dist.get_rank()
    whole = torch.empty(shape, dtype=local.dtype, device=device) if rank == 0 else None
    for sender, part in enumerate(parts):
        size = [one.stop - one.start for one in part]
        if 0 in size or part in parts[:sender] or rank not in (0, sender):
            continue
        if sender:
            # Batched, though it is one: NCCL then uses the group's communicator, and makes none for each pair.
            piece = local.contiguous() if rank else local.new_empty(size)
            transfer = dist.P2POp(dist.isend if rank else dist.irecv, piece, 0 if rank else sender)
            for work in dist.batch_isend_irecv([transfer]):
                work.wait()
        else:
            piece = local
        if whole is not None:
            whole[part] = piece.to(device)
        del piece  # before the next one arrives
    return whole


def write_files(path: Path, entries: Entries, stream: Iterator[Any], limit: int, parameters: int) -> None:
    """Write safetensors files, and an index when there are several.

    Args:
        path: a folder.
        entries: what is written, in the order of ``stream``.
        stream: the whole tensors.
        limit: bytes of a file.
        parameters: of the model, for the index.
    """
    parts = list(_split(entries, limit))
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [SAFE_WEIGHTS_NAME]
    for name, inside in zip(names, parts, strict=True):
        with (path / name).open("wb") as file:
            _write_header(file, {one: entries[one] for one in inside})
            for _ in inside:
                whole: Any = next(stream)
                file.write(whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del whole  # before the next one is gathered
            file.flush()
            os.fsync(file.fileno())
    if len(parts) > 1:
        places = {one: name for name, inside in zip(names, parts, strict=True) for one in inside}
        counts = {"total_parameters": parameters, "total_size": sum(map(_bytes, entries.values()))}
        write_json(path / SAFE_WEIGHTS_INDEX_NAME, {"metadata": counts, "weight_map": dict(sorted(places.items()))})


def _split(entries: Entries, limit: int) -> Iterator[list[str]]:
    """What each file holds, in the order of ``entries``: huggingface_hub's own split moves large tensors forward."""
    held: list[str] = []
    size = 0
    for name, entry in entries.items():
        if held and size + _bytes(entry) > limit:
            yield held
            held, size = [], 0
        held.append(name)
        size += _bytes(entry)
    yield held


def _bytes(entry: tuple[torch.dtype, Sequence[int]]) -> int:
    dtype, shape = entry
    return torch.Size(shape).numel() * dtype.itemsize


def write_config(causal_lm: Any, path: Path, dtype: torch.dtype, quantization: dict[str, Any] | None = None) -> None:
    """Write config.json, with ``quantization_config`` when given, and generation_config.json; makes the folder."""
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(causal_lm.config)
    config.dtype, config.architectures = dtype, [type(causal_lm).__name__.removeprefix("FSDP")]
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(path)
    if causal_lm.can_generate():
        causal_lm.generation_config.save_pretrained(path)


def _write_header(file: BinaryIO, entries: dict[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """The start of a safetensors file: the length of the JSON in 8 bytes, the JSON; the data follow without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + _bytes((dtype, shape))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)


def _save_pretrained(
    causal_lm: PreTrainedModel, path: Path, dtype: torch.dtype, stream: Iterator[Any], limit: int
) -> None:
    """For a model whose files hold other tensors than it has: transformers knows which. Whole, in this process."""
    state = dict(zip(stored_tensors(causal_lm)[0], stream, strict=True))
    transformers_logging.disable_progress_bar()
    causal_lm.save_pretrained(path, state_dict=state, max_shard_size=limit)
    write_config(causal_lm, path, dtype)  # once more: transformers writes the dtype in memory
    for file in path.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes its files readable by the owner alone
