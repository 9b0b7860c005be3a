"""Loading: from safetensors files into a model on the meta device, sharded or not; no process holds a checkpoint whole.

Every rank maps the files and reads its own slices: it needs its shard and one slice more, and nothing is sent. One
process without a mesh runs the same program, with whole tensors for slices.

Two traps, both silent. ``to_empty`` leaves garbage in the buffers that no file stores (rotary frequencies, Gemma 3's
embedding scale): the model initialises them again. And tied weights are stored once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastkd import expert_names
from fastkd.log import logger
from fastkd.lora import is_adapter
from fastkd.quantization import is_scale
from fastkd.safetensors_files import SafetensorsFiles


def stored_as_is(causal_lm: PreTrainedModel) -> bool:
    """Whether the model's files hold its parameters under its own names, with or without the base model's prefix, or
    expert by expert (``fastkd.expert_names``).

    Else transformers computes them while it loads: quantised weights, other merged tensors.
    """
    quantized = getattr(causal_lm.config, "quantization_config", None) is not None
    return not quantized and expert_names.understood(causal_lm)


def stored_tensors(causal_lm: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """What files hold of a model: parameters and persistent buffers by name, tied ones once; other names of those.

    Adapters and scales of quantisers are left out. The order is that of ``state_dict``.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, tensor in causal_lm.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            others.setdefault(kept, []).append(name)
        elif not is_adapter(name) and not is_scale(name):
            tensors[name] = tensor
    return tensors, others


def local_part(tensor: Tensor) -> tuple[tuple[slice, ...], Tensor]:
    """Which part of a tensor this rank holds, one slice per dimension, and that part."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape), tensor
    (chunk,) = tensor.__create_chunk_list__()  # how torch.distributed.checkpoint asks
    local = tensor.to_local()
    assert chunk.sizes == local.shape, f"{chunk.sizes} is not {local.shape}"
    return tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)), local


@torch.no_grad()
def load(causal_lm: PreTrainedModel, key: str, name: str, device: torch.device, *, offload: bool = False) -> None:
    """Give a model on the meta device its memory and fill it from safetensors files, in place.

    Values are cast to the parameters' dtype. All ranks call it, after ``parallel.shard``. Adapters get memory, but no
    values (``lora.initialise``).

    Args:
        causal_lm: its parameters are meta tensors, plain or DTensors.
        key: the recipe key named in errors.
        name: a folder, or a Hugging Face id.
        device: of this process.
        offload: the parameters live in host memory; only the buffers are on ``device``.

    Raises:
        ModelError: a file or tensor is missing, unreadable, or of another shape.
    """
    files = SafetensorsFiles(key, name)
    if not stored_as_is(causal_lm):
        raise files.error(
            f"files of {type(causal_lm).__name__} hold other tensors than the model has (quantised weights, or experts "
            "of another layout): they cannot be read shard by shard",
            "Use one device, or a dense model in bfloat16 or float32",
        )
    _materialise(causal_lm, torch.device("cpu") if offload else device)
    _restore_buffers(causal_lm, device)
    tensors, others = stored_tensors(causal_lm)
    pieces = expert_names.pieces(causal_lm)
    prefix = f"{causal_lm.base_model_prefix}."
    fill: dict[Path, list[tuple[str, str]]] = {}
    compare: dict[Path, list[tuple[str, str]]] = {}
    used: set[str] = set()
    for ours in tensors:
        names = [ours, *others.get(ours, ())]
        names += [one.removeprefix(prefix) for one in names]  # saved from the base model
        stored = [one for one in dict.fromkeys(names) if one in files.paths]
        if not stored and ours in pieces:
            used |= _fill_experts(files, causal_lm, ours, tensors[ours], pieces[ours], prefix)
            continue
        if not stored:
            raise _missing(files, causal_lm, ours)
        fill.setdefault(files.paths[stored[0]], []).append((stored[0], ours))
        for theirs in stored[1:]:
            compare.setdefault(files.paths[theirs], []).append((theirs, ours))
    for path, pairs in fill.items():
        with files.open(path) as file:
            for theirs, ours in pairs:
                part, local = local_part(tensors[ours])
                local.copy_(files.read(file, theirs, tensors[ours].shape, part))
    for path, pairs in compare.items():
        with files.open(path) as file:
            for theirs, ours in pairs:
                part, local = local_part(tensors[ours])
                if not torch.equal(local, files.read(file, theirs, tensors[ours].shape, part).to(local)):
                    raise files.error(
                        f"config.json ties {theirs!r} to {ours!r}, but {path} stores other values for it",
                        "Set tie_word_embeddings to false in config.json if the values are meant to differ",
                    )
    used |= {theirs for pairs in (*fill.values(), *compare.values()) for theirs, _ in pairs}
    unused = [one for one in files.paths if one not in used and not one.endswith("rotary_emb.inv_freq")]
    if unused and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.warning(f"{name}: {len(unused)} stored tensors are not in {type(causal_lm).__name__}, as {unused[0]!r}")


def _fill_experts(
    files: SafetensorsFiles, causal_lm: Any, ours: str, tensor: Tensor, pieces: expert_names.Pieces, prefix: str
) -> set[str]:
    """Fill this rank's part of a fused tensor from the pieces in the files; the names of all pieces there."""
    names = {one: one if one in files.paths else one.removeprefix(prefix) for one in pieces.names(tensor.shape[0])}
    lacking = next((one for one, theirs in names.items() if theirs not in files.paths), None)
    if lacking is not None:
        raise _missing(files, causal_lm, ours, lacking)
    part, local = local_part(tensor)
    wanted: dict[Path, list[Any]] = {}
    for one, inside, place in pieces.overlaps(tensor.shape, part):
        wanted.setdefault(files.paths[names[one]], []).append((names[one], inside, place))
    for path, entries in wanted.items():
        with files.open(path) as file:
            for theirs, inside, place in entries:
                local[place] = files.read(file, theirs, pieces.shape(tensor.shape), inside).to(local)
    return set(names.values())


def _missing(files: SafetensorsFiles, causal_lm: Any, ours: str, theirs: str | None = None) -> Exception:
    paths = sorted({str(path) for path in files.paths.values()})
    where = paths[0] if len(paths) == 1 else f"{len(paths)} files beside {paths[0]}"
    rule = f"{where} lack the tensor {theirs or ours!r} of {type(causal_lm).__name__}"
    if causal_lm.get_output_embeddings().weight is causal_lm.get_parameter(ours):
        return files.error(rule, "Set tie_word_embeddings to true in config.json if the head is the embedding")
    return files.error(f"{rule}; they hold {len(files.paths)} tensors, as {min(files.paths, default='')!r}")


def _materialise(causal_lm: Any, device: torch.device) -> None:
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    tied = head.weight is embedding.weight
    causal_lm.to_empty(device=device)
    if tied and head.weight is not embedding.weight:  # to_empty keeps DTensors tied, plain tensors not
        head.weight = embedding.weight


def _restore_buffers(causal_lm: Any, device: torch.device) -> None:
    """Compute the buffers that are not stored, as from_pretrained does: by the model's own initialisation."""
    for path, module in causal_lm.named_modules():
        names = [name for name, _ in module.named_buffers(recurse=False) if name in module._non_persistent_buffers_set]
        if not names:
            continue
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # transformers leaves tensors with this mark alone
        for name in names:
            buffer = torch.empty_like(getattr(module, name), device=device)
            setattr(module, name, buffer.fill_(torch.nan if buffer.is_floating_point() else -1))
        causal_lm._init_weights(module)
        for name in names:
            buffer = getattr(module, name)
            if (buffer.isnan() if buffer.is_floating_point() else buffer == -1).all():
                raise RuntimeError(f"{type(causal_lm).__name__} does not initialise its buffer {path}.{name}")
