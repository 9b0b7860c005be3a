"""Export: a model, sharded or not, as a Hugging Face folder that transformers and vLLM load.

Every tensor in turn is cast, sent to the first rank part by part, and appended to its file there: there is one whole
tensor at a time, and on one rank. Adapters are merged into their layers. The header of a safetensors file needs only
names and shapes, which are known before. (The library's own writer wants all tensors of a file in memory.)
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as transformers_logging

from fastkd.errors import CheckpointError, reason
from fastkd.files import write_json
from fastkd.lora_export import merged_state
from fastkd.safetensors_files import DTYPES
from fastkd.weights import local_part, stored_as_is, stored_tensors

_NAMES = DTYPES | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
"""Of dtypes in safetensors headers."""


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
    stream = _gathered(causal_lm, tensors, dtype)
    failure: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            if stored_as_is(causal_lm):
                _write(causal_lm, path, dtype, tensors, stream, max_shard_bytes)
            else:
                _save_pretrained(causal_lm, path, dtype, stream, max_shard_bytes)
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


def _gathered(causal_lm: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor | None]:
    """The whole tensors in the order of ``tensors``, on the first rank; None on the others. The ranks advance together.

    Not ``full_tensor``: that makes every rank hold the whole tensor several times.
    """
    parts: list[Any] = [{name: local_part(tensor)[0] for name, tensor in tensors.items()}]
    if dist.is_initialized():
        mine, parts = parts[0], [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    for name, tensor in merged_state(causal_lm):
        if name not in tensors:
            continue  # another name of a tied one
        local = local_part(tensor)[1]
        local = local.to(dtype) if tensor.is_floating_point() else local
        if isinstance(tensor, DTensor):
            yield _gather(local, tensor.shape, [one[name] for one in parts])
        else:
            yield local


def _gather(local: Tensor, shape: Sequence[int], parts: list[tuple[slice, ...]]) -> Tensor | None:
    """One tensor, put together from the ranks' parts in host memory of the first rank; copies are sent once."""
    rank = dist.get_rank()
    whole = torch.empty(shape, dtype=local.dtype) if rank == 0 else None
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
            whole[part] = piece.cpu()
        del piece  # before the next one arrives
    return whole


def _write(
    causal_lm: Any,
    path: Path,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
    stream: Iterator[Tensor | None],
    limit: int,
) -> None:
    def stored_dtype(tensor: Tensor) -> torch.dtype:
        return dtype if tensor.is_floating_point() else tensor.dtype

    path.mkdir(parents=True, exist_ok=True)
    _write_config(causal_lm, path, dtype)
    if causal_lm.can_generate():
        causal_lm.generation_config.save_pretrained(path)
    split: StateDictSplit = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * stored_dtype(tensor).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    for name, inside in split.filename_to_tensors.items():
        with (path / name).open("wb") as file:
            _write_header(file, {one: (stored_dtype(tensors[one]), tensors[one].shape) for one in inside})
            for _ in inside:
                whole: Any = next(stream)
                file.write(whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del whole  # before the next one is gathered
            file.flush()
            os.fsync(file.fileno())
    if split.is_sharded:
        counts = {"total_parameters": sum(tensor.numel() for tensor in tensors.values())}
        write_json(path / SAFE_WEIGHTS_INDEX_NAME, {
            "metadata": counts | split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))
        })  # fmt: skip


def _write_config(causal_lm: Any, path: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(causal_lm.config)
    config.dtype, config.architectures = dtype, [type(causal_lm).__name__.removeprefix("FSDP")]
    config.save_pretrained(path)


def _write_header(file: BinaryIO, entries: dict[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """The start of a safetensors file: the length of the JSON in 8 bytes, the JSON; the data follow without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
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
    _write_config(causal_lm, path, dtype)  # once more: transformers writes the dtype in memory
    for file in path.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes its files readable by the owner alone
