"""Export of a quantised model: a Hugging Face folder with packed NVFP4 weights, in ModelOpt's format.

Of a quantised layer the files hold, under its name,

    weight           [outputs, inputs / 2] uint8: two codes per byte, the even input in the low half
    weight_scale     [outputs, inputs / 16] float8_e4m3fn: s of every block
    weight_scale_2   float32 scalar: g of the weight
    input_scale      float32 scalar: g of the input; not for weights alone

and of everything else what a plain export holds. ``hf_quant_config.json`` and ``quantization_config`` in config.json
say so, and name what is not quantised. vLLM, SGLang and TensorRT-LLM read it. Experts are written one by one.

The global scales are those of training, so the codes are those that the student was trained with: read back, they give
the values that its layers multiplied with, bit for bit (``dequantized``).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastkd import expert_names
from fastkd._kernels import nvfp4
from fastkd.errors import ModelError, UserError
from fastkd.files import write_json
from fastkd.quantization import INPUT_SCALE, WEIGHT_SCALE, quantized_tensors, quantizers_of
from fastkd.quantization_choice import excluded
from fastkd.safetensors_files import SafetensorsFiles
from fastkd.weights import stored_as_is, stored_tensors
from fastkd.weights_export import Entries, file_entries, gathered, in_files, together, write_config, write_files

BLOCK_SCALE = "weight_scale"


@torch.no_grad()
def export(causal_lm: Any, path: Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write configuration and safetensors files.

    All ranks call it; the first one writes, and all return when everything is on disk. There is one whole tensor at a
    time, and on one rank.

    Args:
        causal_lm: a model with quantisers, calibrated; sharded or not.
        path: a folder, made if missing. Give a temporary one and rename it: a crash leaves half an export.
        max_shard_bytes: tensors that take more are split over several files with an index.

    Raises:
        CheckpointError: on all ranks, when the first one could not write.
        UserError: checkpoints of this model hold other tensors than it has.
        RuntimeError: the model is not calibrated.
    """
    shared = quantizers_of(causal_lm)
    if not shared.on:
        raise RuntimeError("the model is not calibrated: its inputs have no scales to export")
    if not stored_as_is(causal_lm):
        raise UserError(
            "export",
            f"checkpoints of {type(causal_lm).__name__} hold other tensors than the model has",
            "Use a dense model, or one whose experts are stored one by one",
        )
    layers = quantized_tensors(causal_lm)
    tensors, _ = stored_tensors(causal_lm)
    stream = gathered(causal_lm, tensors, shared.dtype, folded=False)
    held = _holders(causal_lm, tensors, layers)
    plain = file_entries(causal_lm, tensors, shared.dtype)

    def write() -> None:
        path.mkdir(parents=True, exist_ok=True)
        names = excluded(causal_lm, {name.rpartition(".")[0] for name in layers})
        write_config(causal_lm, path, shared.dtype, _config(names, shared.config.activations))
        write_json(path / "hf_quant_config.json", _quant_config(names, shared.config.activations))
        parameters = sum(tensor.numel() for tensor in tensors.values())
        expanded = _expand(plain, held, in_files(causal_lm, tensors, stream))
        write_files(path, _entries(plain, held), expanded, max_shard_bytes, parameters)

    together(path, stream, write)


def _holders(causal_lm: Any, tensors: dict[str, Tensor], layers: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By name, the quantised tensors of the files: what holds the scales, and which expert's of them."""
    found: dict[str, tuple[Any, Any]] = {name: (layer, ...) for name, layer in layers.items()}
    for name, pieces in expert_names.pieces(causal_lm).items():
        if name in layers:
            for expert in range(tensors[name].shape[0]):
                found |= dict.fromkeys(pieces.of(expert), (layers[name], expert))
    return found


def _entries(plain: Entries, held: dict[str, tuple[Any, Any]]) -> Entries:
    """What the files hold, in the order of ``_expand``, given what they would hold without quantisation."""
    entries: dict[str, tuple[torch.dtype, Any]] = {}
    for name, (dtype, shape) in plain.items():
        if name not in held:
            entries[name] = (dtype, shape)
            continue
        rows, inputs = shape
        parent = name.removesuffix("weight")
        entries[name] = (torch.uint8, (rows, inputs // 2))
        entries[parent + BLOCK_SCALE] = (torch.float8_e4m3fn, (rows, inputs // nvfp4.BLOCK))
        for scale in _scales(held[name][0]):
            entries[parent + scale] = (torch.float32, ())
    return entries


def _expand(plain: Entries, held: dict[str, tuple[Any, Any]], stream: Iterator[Any]) -> Iterator[Tensor]:
    """Whole tensors, with codes and scales in the place of quantised weights."""
    for name, whole in zip(plain, stream, strict=True):
        if name not in held:
            yield whole
            continue
        layer, expert = held[name]
        scale = layer.weight_scale_2[expert]
        yield from nvfp4.quantize(whole, scale.to(whole.device))
        yield scale
        if _scales(layer)[1:]:
            yield layer.input_scale


def _scales(layer: Any) -> list[str]:
    return [name for name in (WEIGHT_SCALE, INPUT_SCALE) if getattr(layer, name, None) is not None]


def _quant_config(exclude: list[str], activations: bool) -> dict[str, Any]:
    return {
        "producer": _producer(),
        "quantization": {
            "quant_algo": _algorithm(activations),
            "kv_cache_quant_algo": None,
            "group_size": nvfp4.BLOCK,
            "exclude_modules": exclude,
        },
    }


def _config(exclude: list[str], activations: bool) -> dict[str, Any]:
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": nvfp4.BLOCK}
    group = {"weights": four_bits, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": {"input_activations": four_bits, **group} if activations else group},
        "ignore": exclude,
        "quant_algo": _algorithm(activations),
        "producer": _producer(),
        "quant_method": "modelopt",
    }


def _algorithm(activations: bool) -> str:
    return "NVFP4" if activations else "W4A16_NVFP4"


def _producer() -> dict[str, Any]:
    try:
        return {"name": "fastkd", "version": version("fastkd")}
    except PackageNotFoundError:
        return {"name": "fastkd", "version": None}


# ---------------------------------------------------------------- reading


def dequantized(path: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the plain model that an export amounts to: packed weights as values, scales left out.

    Args:
        path: a folder that :func:`export` or ModelOpt wrote.
        dtype: of the values.

    Raises:
        ModelError: a file or a scale is missing or unreadable.
    """
    files = SafetensorsFiles("export", str(path))
    scales = (BLOCK_SCALE, WEIGHT_SCALE, INPUT_SCALE)
    for name in files.paths:
        parent, _, own = name.rpartition(".")
        if own in scales:
            continue
        tensor = _read(files, name)
        if own == "weight" and tensor.dtype == torch.uint8:
            block, whole = (_read(files, f"{parent}.{scale}") for scale in scales[:2])
            tensor = nvfp4.dequantize(tensor, block, whole, dtype)
        yield name, tensor


def _read(files: SafetensorsFiles, name: str) -> Tensor:
    if name not in files.paths:
        raise ModelError("export", f"it lacks the tensor {name!r}", "Export the model again", value=files.name)
    with safe_open(files.paths[name], "pt") as file:
        return file.get_tensor(name)
