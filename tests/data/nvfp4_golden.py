"""Makes ``nvfp4_golden.safetensors``: what nvidia-modelopt 0.47.0 makes of some tensors and of a small model.

    pip install nvidia-modelopt==0.47.0 requests      (beside torch and transformers; no GPU needed)
    python tests/data/nvfp4_golden.py

Keys ``tensor/CASE/…``: input, global_scale, packed, scales and dequantized of ``NVFP4QTensor``.
Keys ``model/…``: the weights of a Qwen3 with one block; ``export/PRESET/…``: the checkpoint that ``mtq.quantize`` and
``export_hf_checkpoint`` write of it, without the tensors that are the model's own. What every export says of itself in
JSON is in the file's metadata.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
MODEL = dict(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    architectures=["Qwen3ForCausalLM"],
)  # fmt: skip
PRESETS = {
    "default": "NVFP4_DEFAULT_CFG",
    "weight_only": "W4A16_NVFP4_CFG",
    "mlp_only": "NVFP4_MLP_ONLY_CFG",
}


def inputs() -> dict[str, torch.Tensor]:
    """Tensors that reach every branch of the format, by name."""
    make = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 64, generator=make)
    by_block = noise * torch.logspace(-9, 0, 4).repeat_interleave(16)  # blocks whose scale underflows E4M3
    ties = torch.arange(-32, 32) * 0.25  # every midpoint of E2M1, and values beyond 6
    steps = torch.cat((torch.arange(1, 17) / 8192, 2.0 ** torch.arange(-8, 8)))
    scales = (steps[:, None] * torch.linspace(1, 2, 17)).flatten()  # midpoints of E4M3, subnormal ones too
    return {
        "random": noise,
        "random_bf16": noise.bfloat16(),
        "random_small": noise * 0.02,
        "random_small_bf16": (noise * 0.02).bfloat16(),
        "random_fp16": noise.half(),
        "tiny": noise * 1e-30,
        "denormal": noise * 1e-37,
        "huge": noise * 1e37,
        "huge_bf16": (noise * 1e37).bfloat16(),
        "uneven_blocks": by_block,
        "uneven_blocks_bf16": by_block.bfloat16(),
        "constant": torch.full((2, 32), 0.3),
        "constant_negative": torch.full((2, 32), -7.0),
        "zero_block": torch.cat((noise[:2, :16], torch.zeros(2, 16), noise[:2, 16:32]), 1),
        "one_value": torch.nn.functional.one_hot(torch.arange(32) % 16, 16).float(),
        "ties": ties.repeat(2, 1),
        "scales": (scales[:, None] * torch.tensor([6.0] * 8 + [-0.0, 0.1, -0.1, 1, -2, 3, 4, 5])).flatten()[None],
    }


# Tensors whose global scale is not their own amax: made of this one instead.
AMAX = {"ties": 6.0 * 448.0, "scales": 6.0 * 448.0, "random_fp16": 0.5, "constant_negative": 1e-3}


def tensors() -> dict[str, torch.Tensor]:
    """What modelopt's tensor class makes of them."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    made = {}
    for name, x in inputs().items():
        scale = (torch.tensor(AMAX[name]) if name in AMAX else x.abs().amax().float()) / (6.0 * 448.0)
        quantized, scales, _ = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=scale)
        dequantized = quantized.dequantize(x.dtype, scale=scales, double_scale=scale, block_sizes={-1: 16})
        parts = {
            "input": x, "global_scale": scale, "packed": quantized._quantized_data, "scales": scales,
            "dequantized": dequantized,
        }  # fmt: skip
        made |= {f"tensor/{name}/{part}": value.contiguous() for part, value in parts.items()}
    return made


def same(value: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether a tensor was left as it is."""
    return other is not None and value.dtype == other.dtype and torch.equal(value, other)


def exports() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A model, its exports by preset, and their JSON files."""
    import modelopt
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    plain = Qwen3ForCausalLM(Qwen3Config(**MODEL)).eval()
    made = {f"model/{name}": value.clone() for name, value in plain.state_dict().items()}
    texts = {"modelopt": modelopt.__version__}
    tokens = torch.arange(MODEL["vocab_size"]).flip(0)[None]
    for preset, name in PRESETS.items():
        model = Qwen3ForCausalLM(Qwen3Config(**MODEL)).eval()
        model.load_state_dict(plain.state_dict())
        model = mtq.quantize(model, getattr(mtq, name), lambda one: one(tokens))
        with tempfile.TemporaryDirectory() as folder:
            with torch.inference_mode():
                export_hf_checkpoint(model, export_dir=folder)
            state = load_file(Path(folder) / "model.safetensors")
            changed = {one: value for one, value in state.items() if not same(value, made.get(f"model/{one}"))}
            made |= {f"export/{preset}/{one}": value for one, value in changed.items()}
            quantization = json.loads((Path(folder) / "hf_quant_config.json").read_text())
            config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        texts |= {f"{preset}/hf_quant_config": json.dumps(quantization), f"{preset}/config": json.dumps(config)}
    return made, texts


if __name__ == "__main__":
    model, texts = exports()
    save_file(tensors() | model, HERE / "nvfp4_golden.safetensors", metadata=texts)
    (HERE / "nvfp4_golden.safetensors").chmod(0o644)
