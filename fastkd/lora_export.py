"""What adapters become outside: a PEFT adapter folder, or full weights with the adapters merged in.

Merged: W' = W + s · B A, computed in float32 and rounded once to W's dtype. A sharded W is merged where it lies. Rows
of B are cut as the rows of W, and columns of A as its columns; only A's r rows must be gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastkd.files import write_json
from fastkd.lora import NAMES, adapted_layers, adapters_of, has_adapters, is_adapter


@torch.no_grad()
def merged_weight(layer: Any, scale: float) -> Tensor:
    """W + s · B A of one layer: a DTensor laid out as W, or a plain tensor. All ranks of its mesh call it."""
    weight, A, B = layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()
    if not isinstance(weight, DTensor):
        return _merge(weight, A, B, scale)
    columns = [one if one == Shard(1) else Replicate() for one in A.placements]
    A = A.to(A.device_mesh.device_type).redistribute(placements=columns).to_local()
    local = weight.to_local()
    merged = _merge(local, A.to(local.device), B.to_local(), scale)
    return DTensor.from_local(
        merged, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _merge(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    exact = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(exact), B.to(exact), A.to(exact), alpha=scale).to(weight.dtype)


def merged_state(causal_lm: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the plain model that adapters and base amount to, one at a time.

    Names and order are those of the base's own ``state_dict``; a model without adapters gives just that. Sharded
    weights stay sharded. All ranks must take every entry.
    """
    layers = dict(adapted_layers(causal_lm)) if has_adapters(causal_lm) else {}
    for name, tensor in causal_lm.state_dict().items():
        module, _, own = name.rpartition(".")
        if module in layers and is_adapter(name):
            continue
        merged = module in layers and own == "weight"
        yield name, merged_weight(layers[module], adapters_of(causal_lm).scale) if merged else tensor


def export(causal_lm: Any, path: str | Path, base_name: str) -> None:
    """Write the adapters as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The folder is loaded by ``peft.PeftModel.from_pretrained`` and by vLLM. All ranks call it; the first of the mesh
    writes, the others return without waiting for it.

    Args:
        causal_lm: a model with adapters, sharded or not.
        path: the folder; made when absent.
        base_name: Hugging Face id or folder of the base.
    """
    adapters, path = adapters_of(causal_lm), Path(path)
    state: dict[str, Tensor] = {}
    names: list[str] = []
    writes = True
    for name, layer in adapted_layers(causal_lm):
        names.append(name)
        for own in NAMES:
            state[f"base_model.model.{name}.{own}.weight"] = _whole(getattr(layer, own)).cpu().contiguous()
        if isinstance(layer.lora_A, DTensor):
            writes = not any(layer.lora_A.device_mesh.get_coordinate() or ())
    if not writes:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapters.config.dim,
        "lora_alpha": _plain(adapters.config.alpha),
        "lora_dropout": adapters.config.dropout,
        "target_modules": _targets(causal_lm, names),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    path.mkdir(parents=True, exist_ok=True)
    weights = path / "adapter_model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes its files readable by the owner alone
    write_json(path / "adapter_config.json", config)


def _whole(parameter: Any) -> Tensor:
    tensor: Any = parameter.detach()
    if isinstance(tensor, DTensor):
        on_device: Any = tensor.to(tensor.device_mesh.device_type)  # where offloaded ones can be gathered
        return on_device.full_tensor()
    return tensor


def _targets(causal_lm: Any, names: list[str]) -> list[str]:
    """Short names (``q_proj``) where they choose just these layers, full names otherwise."""
    ends = {name.rpartition(".")[2] for name in names}
    linear = (name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear))
    short = {name for name in linear if name.rpartition(".")[2] in ends} == set(names)
    return sorted(ends) if short else names


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number
