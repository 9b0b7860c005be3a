"""A quantised student's export, served with vLLM's own NVFP4 arithmetic (its emulation, on a CPU), is the student.

The engine's weights are those of training bit for bit. Log-probabilities are not: the inputs of every layer are
quantised too, and a bfloat16 rounding moves some of them over the edge between two codes, which lie a sixth of a value
and more apart. How much that makes is measured on our model alone, in bfloat16 against float32. The engine may be
off by twice as much; one wrong scale of one layer is more.
"""

from __future__ import annotations

import json

import pytest
import torch

from fastkd import quantization
from fastkd._kernels import nvfp4
from fastkd.batch import Prompt, Rollout
from fastkd.recipe import recipe_from
from fastkd.student import Student
from fastkd.sync_probe import trainer_logprobs
from fastkd.teacher import Teacher

CPU = torch.device("cpu")
BOUND = 2.0
"""Largest mean difference to the engine, in mean differences between bfloat16 and float32."""


@pytest.fixture(scope="module")
def texts(arithmetic, tokenizer):
    """40 worked solutions as (prompt, response)."""
    rows = [json.loads(line) for line in (arithmetic / "validation.jsonl").read_text().splitlines()[:40]]
    messages = [[{"role": "user", "content": row["problem"]}] for row in rows]
    prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    solutions = tokenizer([row["solution"] for row in rows], add_special_tokens=False).input_ids
    return list(zip(map(tuple, prompts), map(tuple, solutions), strict=True))


@pytest.fixture(scope="module")
def recipe(arithmetic):
    def build(precision: str):
        model = {"model_name": str(arithmetic / "student"), "max_total_sequence_length": 128}
        policy = {
            **model,
            "precision": precision,
            "train_global_batch_size": 24,
            "sequence_packing": {"enabled": True, "train_mb_tokens": 1024},
            "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 1e-4}},
            "quant_cfg": "default",
        }
        loop = {"topk_logits_k": 64, "num_prompts_per_step": 24}
        tree = {"distillation": loop, "loss_fn": {"kl_type": "forward"}, "policy": policy, "teacher": model}
        return recipe_from(tree | {"data": {"train": {"data_path": "unused.jsonl"}}}).recipe

    return build


@pytest.fixture(scope="module")
def student(recipe, texts):
    """Calibrated, and trained for four steps on the first texts, as quantisation-aware distillation does."""
    config = recipe("bfloat16")
    rollouts = [Rollout(Prompt(i, "", None, "", p), 0, r, True, 0) for i, (p, r) in enumerate(texts[:24])]
    made = Student(config, CPU, None)
    made.calibrate(rollouts)
    targets = Teacher(config, CPU, None).score(rollouts)
    for _ in range(4):
        made.train(rollouts, targets)
    return made


@pytest.fixture(scope="module")
def exact(student, recipe):
    """The same student in float32: its weights as bfloat16 sees them, its scales, and no rounding after that."""
    made = Student(recipe("float32"), CPU, None)
    state = student.causal_lm.state_dict()
    rounded = {name: value if quantization.is_scale(name) else value.bfloat16() for name, value in state.items()}
    made.causal_lm.load_state_dict(rounded)
    quantization.resume(made.causal_lm)
    return made


@pytest.fixture(scope="module")
def served(engines, build_recipe, student, tokenizer, tmp_path_factory):
    """A vLLM engine on the export, with the kernel registered that docs/qad.md names."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from fastkd.vllm_generation import VllmGeneration

    folder = tmp_path_factory.mktemp("quantised") / "export"
    student.export(folder)
    engines.close()
    linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    config = build_recipe(folder, "bfloat16")
    engine = VllmGeneration.from_recipe(config, tokenizer.eos_token_id, None)
    yield engine
    engine.close()


def gap(left, right) -> float:
    """Mean |Δ log p| over the tokens, in nat."""
    pairs = [(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def multiplied(layer: torch.nn.Module) -> torch.Tensor:
    """The weight that the emulation multiplies with, in float32, from what one layer of the engine holds."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    codes, scales, whole = layer.weight, layer.weight_scale, layer.weight_global_scale
    return dequantize_to_dtype(codes.data, scales.data, whole, torch.float32, nvfp4.BLOCK, swizzle=False)


def quantized_layers(worker) -> dict[str, torch.nn.Module]:
    modules = worker.model_runner.model.named_modules()
    return {name: module for name, module in modules if hasattr(module, "input_global_scale_inv")}


def test_the_engine_has_the_weights_that_were_trained(served, student):
    (layers,) = served.engine.collective_rpc(quantized_layers)
    ours = dict(quantization.quantized_layers(student.causal_lm))
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        members = [ours.pop(f"{parent}.{member}") for member in fused.get(own, (own,))]
        folded = [nvfp4.fake_quantize(one.weight.detach().bfloat16().float(), one.weight_scale_2) for one in members]
        assert torch.equal(multiplied(layer), torch.cat(folded)), name
        torch.testing.assert_close(1 / layer.input_global_scale_inv, members[0].input_scale, rtol=1e-6, atol=0)
    assert not ours, "the engine runs these in full precision"


def test_the_engine_computes_what_was_trained(served, student, exact, texts):
    held_out = [prompt + response for prompt, response in texts[24:]]
    ours, unrounded = ([trainer_logprobs(one, tokens) for tokens in held_out] for one in (student, exact))

    def difference() -> float:
        return gap([served.logprobs(tokens) for tokens in held_out], ours)

    rounding, between = gap(ours, unrounded), difference()
    print(f"{between:.3f} nat to the engine, {rounding:.3f} between our bfloat16 and float32")
    assert between < BOUND * rounding
    # And with one wrong scale it does not.
    (layers,) = served.engine.collective_rpc(quantized_layers)
    for name, scale, factor in (
        ("model.layers.1.self_attn.o_proj", "weight_global_scale", 2),
        ("model.layers.1.mlp.down_proj", "weight_scale", 0.5),
        ("model.layers.0.mlp.gate_up_proj", "input_global_scale_inv", 64),  # inputs are clipped
    ):
        held = getattr(layers[name], scale)
        right = held.data
        held.data = (right.float() * factor).to(right.dtype)
        damaged = difference()
        held.data = right
        print(f"{damaged:.3f} nat with {name}.{scale} times {factor}")
        assert damaged > BOUND * rounding, f"{name}.{scale}"
    assert difference() == between
