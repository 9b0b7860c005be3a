"""Predicted against allocated: shapes against transformers, shards against FSDP, whole steps against the allocator.

Sharded steps run rank 0 alone, with a process group whose collectives do nothing: numbers are garbage, sizes are real.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fastkd import attention, lora, memory_test_roles, parallel
from fastkd._kernels import linear_topk, row_passes, row_stats, row_topk, rows, strided_topk
from fastkd.batch import Prompt, Rollout, pack
from fastkd.config import LoRA
from fastkd.kernels import TopK, vocab_topk
from fastkd.losses import PackedModel
from fastkd.memory_test_meter import peak_bytes
from fastkd.models import packed_hidden
from fastkd.payload import compress
from fastkd.plan import load_rates, loss_kernel, published
from fastkd.plan.activations import Compute, Split, block_saved, ends_saved
from fastkd.plan.assemble import Plan
from fastkd.plan.layout import Mesh, arrange
from fastkd.plan.shapes import find, from_config
from fastkd.plan.split import held
from fastkd.recipe import load_recipe, recipe_from
from fastkd.shared_weights import shares_student
from fastkd.student import Student

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def config_of(name: str) -> dict:
    entries = yaml.safe_load((ROOT / "fastkd" / "plan" / "shapes.yaml").read_text())
    return dict(next(entry["config"] for entry in entries if name in entry["names"]))


def meta_model(config: dict):
    made = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation=attention.NAME)


# ---------------------------------------------------------------- shapes

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 67}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": False},
        {"model_type": "qwen2", "tie_word_embeddings": False},
        {"model_type": "llama", "tie_word_embeddings": False},
        {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": True},
        {"model_type": "mistral", "tie_word_embeddings": False},
        {"model_type": "olmo2", "tie_word_embeddings": False},
        {"model_type": "olmo3", "tie_word_embeddings": False},
        {"model_type": "gemma3_text", "head_dim": 16, "tie_word_embeddings": True},
        {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2,
         "moe_intermediate_size": 20, "tie_word_embeddings": False},
    ],
    ids=lambda more: more["model_type"],
)  # fmt: skip
def test_parameters_of_every_family_are_those_of_transformers(more):
    config = TINY | more
    model = meta_model(config)
    shape = from_config(config, "tiny")
    assert not shape.assumed
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    theirs = sorted(tuple(p.shape) for p in model.base_model.layers[1].parameters())
    assert sorted(one.shape for one in shape.block()) == theirs


def test_adapters_are_those_that_lora_adds():
    config = TINY | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}
    for chosen in (LoRA(enabled=True, dim=4), LoRA(enabled=True, dim=3, target_modules=["*_proj"],
                   exclude_modules=["mlp.*", "v_proj"])):  # fmt: skip
        model = meta_model(config)
        lora.apply(model, chosen)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert held(from_config(config, "tiny"), Mesh(1), chosen).trained == trained


# ---------------------------------------------------------------- kernels


SELECTIONS = [(40, 8), (416, 32), (5001, 32), (24000, 64), (151936, 64), (151936, 512)]


def test_the_kernels_constants():
    chunks = rows.DEFAULT_CHUNK_BYTES
    assert (loss_kernel.CHUNK_BYTES["cpu"], loss_kernel.CHUNK_BYTES["cuda"]) == (chunks["cpu"], chunks["other"])
    assert loss_kernel.KEPT_TEMPORARIES["cpu"] == row_passes.TORCH.kept_temporaries
    assert (loss_kernel._BLOCK_BYTES, loss_kernel._SELECT_BYTES) == (row_stats._BLOCK_BYTES, linear_topk._SELECT_BYTES)
    assert [loss_kernel.leading(n) for n in (1, 15, 16, 151936)] == [
        rows.leading_dimension(n) for n in (1, 15, 16, 151936)
    ]
    assert [loss_kernel.lanes(*one) for one in SELECTIONS] == [row_topk.lanes_for(*one) for one in SELECTIONS]
    for active, columns, kept in itertools.product(
        (0, 5, 300, 1500, 20480), (416, 50000, 151936, 500000), (1, 64, 2048)
    ):
        blocks = strided_topk.arrange(active, columns, kept, 4, chunks["cpu"])
        expected = None if blocks is None else (blocks.rows, blocks.count, blocks.sample)
        assert loss_kernel.strided_rows(active, columns, kept) == expected
    for count in (1, 7, 1000, 20480):
        parts = list(rows.chunks(count, 6000, 1 << 20))
        assert loss_kernel.chunk_rows(count, 6000, 1 << 20) == (parts[0].stop, len(parts))


def test_a_tokens_payload():
    rows_K = TopK(torch.arange(512).repeat(3, 1).int(), torch.randn(3, 512), torch.zeros(3), torch.zeros(3))
    assert compress(rows_K).nbytes == 3 * loss_kernel.payload_bytes(512)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab", "kept", "dtype"),
    [
        (256, 128, 8000, 64, torch.float32),
        (2500, 32, 20000, 128, torch.float32),
        (600, 64, 24000, 64, torch.bfloat16),
        (128, 128, 2501, 32, torch.bfloat16),
    ],
)
def test_the_loss_kernels_buffers(tokens, hidden, vocab, kept, dtype):
    from fastkd.kernels import topk_kl

    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    w = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    teacher = vocab_topk(x.detach(), w.detach(), kept)
    options = {"active": torch.arange(tokens), "labels": torch.zeros(tokens, dtype=torch.long)}
    measured = peak_bytes(lambda: topk_kl(x, w, teacher, token_weights=torch.ones(tokens) / tokens, **options))
    sizes = {"active": tokens, "hidden": hidden, "columns": vocab, "kept": kept, "size": x.element_size(), "cpu": True}
    assert loss_kernel.loss_buffers(tokens=tokens, **sizes).peak == pytest.approx(measured, rel=0.1)
    measured = peak_bytes(lambda: vocab_topk(x.detach(), w.detach(), kept))
    assert loss_kernel.topk_buffers(**sizes) == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("tokens", "vocab", "kept"), [(400, 151936, 512), (1100, 100000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_topk_of_a_large_vocabulary(tokens, vocab, kept, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(tokens, 64, dtype=dtype), torch.randn(vocab, 64, dtype=dtype)
    expected = loss_kernel.topk_buffers(
        active=tokens, hidden=64, columns=vocab, kept=kept, size=x.element_size(), cpu=True
    )
    assert expected == pytest.approx(peak_bytes(lambda: vocab_topk(x, w, kept)), rel=0.2)


def test_a_small_vocabularys_topk_is_mostly_selection():
    torch.manual_seed(0)
    x, w = torch.randn(2000, 96, dtype=torch.bfloat16), torch.randn(416, 96, dtype=torch.bfloat16)
    expected = loss_kernel.topk_buffers(active=2000, hidden=96, columns=416, kept=32, size=2, cpu=True)
    assert expected == pytest.approx(peak_bytes(lambda: vocab_topk(x, w, 32)), rel=0.2)


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2", "olmo2"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_activations_are_what_autograd_saves(kind, mode):
    config = {"model_type": kind, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 503, "tie_word_embeddings": True}  # fmt: skip
    if kind == "qwen3":
        config["head_dim"] = 48
    tokens, saved = 256, []
    for layers in (1, 3):
        torch.manual_seed(0)
        made = AutoConfig.for_model(
            kind, num_hidden_layers=layers, **{k: v for k, v in config.items() if k != "model_type"}
        )
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention.NAME)
        saved.append(_saved_bytes(model, tokens, mode == "autocast"))
    shape = from_config(config | {"num_hidden_layers": 3}, kind)
    compute = Compute(4 if mode == "float32" else 2, mode == "autocast", flash=False)
    block = (saved[1] - saved[0]) / 2
    # Under autocast bfloat16 copies of the weights are saved too: another row of the table.
    copies = 2 * sum(one.numel for one in shape.block() if len(one.shape) > 1) if mode == "autocast" else 0
    assert block_saved(shape, compute, Split()) == pytest.approx((block - copies) / tokens, rel=0.02)
    # Beside the blocks; the head's input, which is counted here, is saved by the head.
    ends = (saved[0] - block) / tokens + compute.stream * shape.hidden
    assert ends_saved(shape, compute, Split()) == pytest.approx(ends, rel=0.2)


def _saved_bytes(model, tokens: int, autocast: bool) -> int:
    """Storage of the distinct tensors that a forward of the trunk saves, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            found[place] = tensor
        return tensor

    batch = pack([Rollout(Prompt(0, "", None, "", tuple(range(100))), 0, tuple(range(tokens - 99)), True, 0)])
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = packed_hidden(model, batch)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


# ---------------------------------------------------------------- shards


@contextmanager
def ranks(world: int):
    """Rank 0 of a group whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "world", "tp", "cp"),
    [
        ("Qwen/Qwen3-14B", 32, 8, 1),  # topk512_qwen3_14b trains so
        ("Qwen/Qwen3-4B", 16, 8, 1),
        ("Qwen/Qwen3-1.7B", 24, 2, 4),  # uneven shards
        ("Qwen/Qwen3-8B", 16, 16, 1),  # more ranks than key/value heads
        ("allenai/OLMo-2-0325-32B", 16, 4, 2),
        ("meta-llama/Llama-3.2-1B", 6, 2, 1),
    ],
)
def test_a_ranks_share_of_published_models(name, world, tp, cp):
    config = config_of(name)
    shape = published()[name]
    with ranks(world):
        model = meta_model(config | {"num_hidden_layers": 2})
        root = PackedModel(model)
        parallel.shard(root, model, parallel.build_mesh(tp, cp, None, "cpu"), param_dtype=torch.bfloat16)
        local = {id(p): p.to_local().numel() for p in root.parameters()}
        blocks = sum(p.to_local().numel() for p in model.base_model.layers.parameters()) // 2
    own = held(shape, Mesh(world, tp, cp, world // (tp * cp)))
    assert own.need("block").trained == blocks
    assert own.trained == sum(local.values()) + (shape.layers - 2) * blocks


# ---------------------------------------------------------------- whole steps


def write_model(folder: Path, *, tied: bool, vocab: int, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 128, 1),
        head_dim=64,
        tie_word_embeddings=tied,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def recipe_of(folder: Path, tokens: int, kept: int, nodes: int = 1, **policy):
    return recipe_from(
        {
            "distillation": {"num_prompts_per_step": 2 * nodes, "topk_logits_k": kept, "val_period": 0},
            "loss_fn": {"kl_type": "reverse", "outside_topk": "bucket"},
            "policy": {
                "model_name": str(folder),
                "train_global_batch_size": 2 * nodes,
                "max_total_sequence_length": tokens,
                "sequence_packing": {"enabled": True},
                **policy,
            },
            "teacher": {"model_name": str(folder)},
            "data": {"train": {"data_path": "org/data"}},
            "cluster": {"gpus_per_node": 0, "num_nodes": nodes},
        }
    )


def compare(folder: Path, loaded) -> None:
    """One worst-case step: what is held to the byte, the peak within 10 %, the rest as ``--memory-test`` judges it."""
    recipe = loaded.recipe
    degrees = recipe.policy.dtensor_cfg
    mesh = None
    if recipe.cluster.num_nodes > 1:
        mesh = parallel.build_mesh(degrees.tensor_parallel_size, degrees.context_parallel_size, None, "cpu")
    shape = find("policy.model_name", str(folder))
    lines = memory_test_roles.training(
        Student(recipe, CPU, None, mesh), arrange(recipe, load_rates(cpu=True), shape, shape)
    )
    for one in lines:
        assert one.holds, one
        assert one.item not in memory_test_roles.HELD or one.planned == one.measured, one
    assert lines[-1].item == "peak of a step" and abs(lines[-1].difference) < 0.1


@pytest.mark.parametrize(
    ("tied", "vocab", "policy"),
    [
        (True, 6000, {"precision": "float32"}),
        (False, 6000, {"precision": "bfloat16"}),
        (True, 6000, {"precision": "bfloat16", "dtensor_cfg": {"activation_checkpointing": True}}),
        (False, 500, {"precision": "float32"}),  # no head to speak of: the peak is in the blocks' backward
        (True, 500, {"precision": "bfloat16"}),
        (False, 500, {"precision": "float32", "quant_cfg": "default"}),
        (False, 500, {"precision": "bfloat16", "quant_cfg": "mlp_only"}),
        (False, 500, {"quant_cfg": "weight_only", "dtensor_cfg": {"activation_checkpointing": True}}),
    ],
)
def test_a_step_on_one_device(tmp_path, tied, vocab, policy):
    write_model(tmp_path, tied=tied, vocab=vocab, hidden=128, layers=3)
    compare(tmp_path, recipe_of(tmp_path, 256, 32, **policy))


@pytest.mark.parametrize(
    ("tied", "vocab", "tp", "cp", "world", "more"),
    [
        (True, 5001, 1, 1, 4, {}),
        (False, 5001, 2, 1, 4, {"activation_checkpointing": True, "sequence_parallel": True}),
        (True, 5001, 4, 1, 4, {}),
        (False, 500, 2, 1, 4, {}),
        (True, 500, 2, 1, 2, {"activation_checkpointing": True}),
        (False, 5001, 1, 2, 4, {}),
    ],
)
def test_a_step_of_one_rank(tmp_path, tied, vocab, tp, cp, world, more):
    write_model(tmp_path, tied=tied, vocab=vocab, hidden=256, layers=2)
    sharding = {"tensor_parallel_size": tp, "context_parallel_size": cp, **more}
    with ranks(world):
        loaded = recipe_of(tmp_path, 256, 32, nodes=world, precision="bfloat16", dtensor_cfg=sharding)
        compare(tmp_path, loaded)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_quantised_step_of_one_rank(tmp_path, recompute):
    """Every rank keeps the NVFP4 values of whole layers, which FSDP does not shard: here most of the peak."""
    write_model(tmp_path, tied=False, vocab=500, hidden=256, layers=4)
    sharding = {"tensor_parallel_size": 2, "activation_checkpointing": recompute}
    found = {}
    with ranks(4):
        for preset in (None, "default"):
            loaded = recipe_of(tmp_path, 128, 32, nodes=4, precision="bfloat16", dtensor_cfg=sharding, quant_cfg=preset)
            compare(tmp_path, loaded)
            shape = find("policy.model_name", str(tmp_path))
            found[preset] = Plan(arrange(loaded.recipe, load_rates(cpu=True), shape, shape)).memory["training"].moments
    # q, k, v, o and the MLP of a block, cut by TP 2, in bfloat16.
    block = 2 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 768) // 2
    emulated = 12.5 * 256 * 768 // 2 if recompute else 0  # of the largest weight, on a CPU
    assert found["default"]["backward"]["quantised weights"] == block * (1 if recompute else 4) + emulated
    assert found["default"]["loss"]["quantised weights"] == (0 if recompute else 4 * block)
    assert not found[None]["loss"]["quantised weights"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_a_hundred_million_parameters(tmp_path, precision, recompute):
    write_model(tmp_path, tied=False, vocab=50000, hidden=768, layers=6)
    loaded = recipe_of(
        tmp_path, 512, 64, precision=precision, dtensor_cfg={"activation_checkpointing": recompute}
    )  # fmt: skip
    assert find("policy.model_name", str(tmp_path)).parameters > 1e8
    compare(tmp_path, loaded)


# ---------------------------------------------------------------- rules that exist twice: a plan imports no torch


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_who_shares_the_students_weights(path):
    recipe = load_recipe(path).recipe
    shape = published()["Qwen/Qwen3-0.6B"]
    rates = load_rates(cpu=not recipe.cluster.gpus_per_node)
    assert arrange(recipe, rates, shape, shape).teacher_shares_weights == shares_student(recipe)
