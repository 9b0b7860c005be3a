"""Plans: tables known from elsewhere, figures by hand, every shipped recipe, knobs, splits and the command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastkd import run as command
from fastkd.errors import ModelError, RecipeErrors, UserError
from fastkd.plan import Plan, load_rates, plan_of, published
from fastkd.plan.changes import changed
from fastkd.plan.chart import COLORS
from fastkd.plan.guide import StateTable
from fastkd.plan.knobs import knobs
from fastkd.plan.layout import Mesh
from fastkd.plan.memory import ROWS
from fastkd.plan.shapes import find, from_config
from fastkd.plan.split import adapters, held
from fastkd.plan.splits import better_splits
from fastkd.recipe import load_recipe, recipe_from

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("qad_qwen3_8b", "qad_qwen3_30b_a3b", "qad_qwen3_30b_a3b_2n")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GIB = 1 << 30


def shipped(name: str, *overrides: str, device: str = "") -> Plan:
    loaded = load_recipe(ROOT / "recipes" / f"{name}.yaml", list(overrides))
    return plan_of(loaded, load_rates(device, cpu=not loaded.recipe.cluster.gpus_per_node))


def small(*overrides: str, **policy) -> Plan:
    """A student of 0.6B on one node of 4 GPUs, all roles together."""
    tree = {
        "distillation": {"num_prompts_per_step": 8, "val_period": 0},
        "policy": {"model_name": "Qwen/Qwen3-0.6B", "train_global_batch_size": 8, **policy},
        "teacher": {"model_name": "Qwen/Qwen3-4B"},
        "data": {"train": {"data_path": "org/data"}},
        "cluster": {"gpus_per_node": 4},
    }
    return plan_of(recipe_from(tree, list(overrides)), load_rates())


# ---------------------------------------------------------------- the 32B guide's tables

# Prints as 95. With exactly 95 one of the six percentages (67 / 95) would round the other way; between 95.05 and 95.10
# all six come out as printed.
GUIDE_GB = 95.07


@pytest.mark.parametrize(
    ("parameters", "ranks", "activations", "lines"),
    [
        (
            7e9,
            2,
            (15, 25),
            """\
Parameters (sharded):     ~7 GB
Gradients (sharded):      ~7 GB
Optimizer states:        ~28 GB
Activations (estimated): ~15-25 GB
TOTAL:                   ~57-67 GB / 95 GB (60-70% utilization)""",
        ),
        (
            32e9,
            16,
            (20, 30),
            """\
Parameters (sharded):     ~4 GB
Gradients (sharded):      ~4 GB
Optimizer states:        ~16 GB
Activations (estimated): ~20-30 GB
TOTAL:                   ~44-54 GB / 95 GB (46-57% utilization)""",
        ),
        (
            32e9,
            8,
            (20, 30),
            """\
Parameters (sharded):     ~8 GB
Gradients (sharded):      ~8 GB
Optimizer states:        ~32 GB
Activations (estimated): ~20-30 GB
TOTAL:                   ~68-78 GB / 95 GB (72-82% utilization)""",
        ),
    ],
)
def test_the_guides_memory_tables(parameters, ranks, activations, lines):
    table = StateTable(parameters, ranks, activations_gb=activations, device_gb=GUIDE_GB)
    assert table.lines() == lines.splitlines()


def test_the_guides_training_state_and_least_ranks():
    seven, thirty_two = StateTable(7e9, 1, activations_gb=(15, 25)), StateTable(32e9, 1, activations_gb=(20, 30))
    assert (seven.state_gb, thirty_two.state_gb) == (84, 384)
    assert (seven.least_ranks(), thirty_two.least_ranks()) == (2, 8)
    assert thirty_two.least_ranks(0.6) == 16  # the recommended headroom
    assert StateTable(32e9, 1, scheme="fp32").state_gb == 16 * 32  # float32 masters: what fastkd allocates


def test_the_guides_32b_recipe_counts_16_bytes_on_16_learners():
    plan = shipped("olmo2_32b_16gpu", device="gh200")
    memory = plan.memory["training"]
    assert memory.state == pytest.approx(16 * 32_234_279_936 / 16, rel=1e-6)
    assert memory.facts["bytes per parameter"] == 16


# ---------------------------------------------------------------- shapes


def test_published_parameter_counts():
    entries = yaml.safe_load((ROOT / "fastkd" / "plan" / "shapes.yaml").read_text())
    assert {name for entry in entries for name in entry["names"]} == set(published())
    for entry in entries:
        assert from_config(entry["config"], entry["names"][0]).parameters == entry["parameters"], entry["names"][0]


def test_shapes_by_name_by_cache_path_and_from_a_folder(tmp_path):
    known = published()["Qwen/Qwen3-8B"]
    assert find("policy.model_name", "/elsewhere/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd60") == known
    assert find("policy.model_name", "/elsewhere/models/Qwen3-8B") == known
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "vocab_size": 11, "model_type": "qwen2", "tie_word_embeddings": True})
    )  # fmt: skip
    # By hand: 4 · 8·8 + 3 · 8 biases + 3 · 8·16 + 2 · 8 norms a block; 11 · 8 embedding; 8 final norm.
    assert find("policy.model_name", str(tmp_path)).parameters == 2 * (256 + 24 + 384 + 16) + 88 + 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen/Qwen3-7B", r"policy.model_name='Qwen/Qwen3-7B': its sizes are not known.*Did you mean Qwen/Qwen3-\d"),
        ("org/nothing-like-it", "no config.json of it on this machine.*weights are not needed.*Qwen/Qwen3-32B"),
    ],
)
def test_an_unknown_model_is_a_clear_error(name, words):
    with pytest.raises(ModelError, match=words):
        find("policy.model_name", name)


def test_a_config_without_sizes_is_a_clear_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 768, "vocab_size": 5}')
    with pytest.raises(ModelError, match="no usable num_attention_heads"):
        find("teacher.model_name", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        find("teacher.model_name", str(tmp_path))


# ---------------------------------------------------------------- figures by hand


def test_memory_of_topk512_14b_by_hand():
    plan = shipped("topk512_qwen3_14b")
    student, engine, teacher = (plan.memory[role] for role in ("training", "generation", "teacher"))
    # Training: TP8 × DP4 over 32 GPUs. Norms are not split by TP: 40 blocks · (2 · 5120 + 2 · 128) + 5120.
    norms = 40 * (2 * 5120 + 2 * 128) + 5120
    local = (14_768_307_200 - norms) / 32 + norms / 4
    assert student.rows["master weights"] == student.rows["gradients"] == pytest.approx(4 * local, rel=1e-6)
    assert student.rows["optimizer"] == pytest.approx(8 * local, rel=1e-6)
    assert student.rows.get("parameters") is None
    # Engines: TP4, 65 % of 39.4 GiB; a cached token takes 2 · 40 layers · 8 heads · 128 · 2 bytes over 4 GPUs.
    assert engine.facts["bytes of a cached token"] == 2 * 40 * 8 * 128 * 2 / 4
    weights = 2 * ((14_768_307_200 - norms) / 4 + norms)
    cache = 0.65 * 39.4 * GIB - weights - 2 * GIB
    assert engine.facts["longest sequences held"] == pytest.approx(cache / 40960 / 20480, rel=1e-3)
    # Teacher: TP4 × DP1, bfloat16; rows of 32 rollouts of 16,384 tokens at 8 · 512 + 8 bytes, but for the last
    # micro-batch's, which are results of the top-k.
    assert teacher.rows["parameters"] == pytest.approx(weights, rel=1e-3)
    assert teacher.rows["teacher rows"] == (32 * 16384 - 20480) * (8 * 512 + 8)
    assert teacher.facts["payload per token"] == 2064
    assert teacher.facts["logits never made"] == 20480 * (151936 / 4) * 4


def test_time_of_distillation_math_by_hand():
    plan = shipped("distillation_math", "policy.dtensor_cfg.activation_checkpointing=false", device="h100")
    time, layout = plan.time["training"], plan.layout
    assert (layout.lengths.prompt, layout.lengths.response) == (256, (8192 - 256) / 2)
    tokens, D, L = 256 + 3968 - 1, 2048, 28
    block = 2 * D * 2048 + 2 * D * 1024 + 3 * D * 6144  # q and o, k and v, MLP
    trunk = 3 * L * (2 * block + 2 * 16 * 128 * tokens)
    head = 3 * 2 * 151936 * D * 3968
    assert time.flops == pytest.approx(128 * (trunk * tokens + head) / 8, rel=1e-9)
    assert time.parts["compute"] == pytest.approx(time.flops / (0.40 * 989e12), rel=1e-9)
    # Tensor parallelism 2: four all-reduces per block of 2 · (2 − 1) / 2 · tokens · D · 2 bytes.
    on_a_rank = 128 / 2 * tokens / 2
    assert time.moved["tensor parallel"] == pytest.approx(4 * L * 1 * on_a_rank * D * 2, rel=1e-9)
    # Decoding: 16 rollouts on each of 8 engines, as many steps as the longest response has tokens.
    assert plan.time["generation"].facts["decoding steps"] == 7936
    assert plan.time["generation"].facts["sequences running"] == pytest.approx(16 * 3968 / 7936)


def test_time_adds_up_in_sequence_and_overlaps_between_pools():
    plan = shipped("topk512_qwen3_8b")
    seconds = {role: one.seconds for role, one in plan.time.items()}
    assert plan.serial_seconds == pytest.approx(sum(seconds.values()) + plan.sync[0])
    assert plan.overlapped_seconds == pytest.approx(max(seconds.values()) + plan.sync[0])
    assert plan.step_seconds == plan.serial_seconds
    assert shipped("topk512_qwen3_8b", "distillation.max_off_policy_steps=1").step_seconds == plan.overlapped_seconds
    assert plan.bound == max(seconds, key=lambda role: seconds[role])
    assert plan.tokens_per_second == pytest.approx(32 * (256 + 8192) / plan.serial_seconds)
    hours = (1000 * plan.serial_seconds + 21 * plan.validation_seconds) / 3600  # at the start and every 50 steps
    assert plan.device_hours == pytest.approx(28 * hours)
    # On shared devices nothing overlaps.
    shared = shipped("distillation_math")
    assert shared.overlapped_seconds == shared.serial_seconds


def test_what_splits_a_model_splits_its_memory():
    whole = shipped("topk512_qwen3_14b").memory["training"]
    recomputed = whole.facts["activations recomputed"]
    assert recomputed < whole.facts["activations kept"] / 5
    kept = shipped("topk512_qwen3_14b", "policy.dtensor_cfg.activation_checkpointing=false").memory["training"]
    assert kept.total - whole.total > 0.9 * (whole.facts["activations kept"] - recomputed)
    halves = shipped("topk512_qwen3_14b", "policy.dtensor_cfg.context_parallel_size=2").memory["training"]
    assert halves.facts["tokens of a micro-batch"] == 10240
    offloaded = shipped("topk512_qwen3_14b", "policy.dtensor_cfg.cpu_offload=true").memory["training"]
    assert offloaded.host == whole.state and offloaded.state == 0
    experts = published()["Qwen/Qwen3-30B-A3B"]
    assert experts.parameters == 30_532_122_624
    # 3.3 billion are active: of each block 8 of 128 experts.
    assert 48 * experts.active_block_parameters == pytest.approx(2.72e9, rel=0.01)


def test_lora_trains_adapters_over_a_frozen_base_that_the_teacher_shares():
    settings = {"enabled": True, "dim": 16, "target_modules": ["q_proj", "self_attn.v_proj"]}
    plan = small("teacher.model_name=Qwen/Qwen3-0.6B", dtensor_cfg={"lora_cfg": settings})
    lora = plan.layout.recipe.policy.dtensor_cfg.lora_cfg
    shape = plan.layout.student
    names = [one.name for one in adapters(shape, lora)]
    assert [name.split(".")[1] for name in names] == ["q_proj", "q_proj", "v_proj", "v_proj"]
    count = 28 * 16 * ((1024 + 2048) + (1024 + 1024))
    assert held(shape, Mesh(1), lora).trained == count
    memory = plan.memory["training"]
    assert memory.rows["master weights"] == 4 * count / 4
    assert memory.rows["parameters"] == pytest.approx(2 * 596_049_920 / 4, rel=1e-6)
    assert plan.layout.teacher_shares_weights and plan.memory["teacher"].rows.get("parameters") is None


def test_a_teacher_in_vllm_by_hand():
    plan = shipped("topk512_qwen3_14b", "teacher.backend=vllm", device="h100")
    own, layout = shipped("topk512_qwen3_14b", device="h100"), plan.layout
    memory, time = plan.memory["teacher"], plan.time["teacher"]
    assert str(layout.form("teacher")) == "1 engine TP4" and layout.devices("teacher") == 4
    # The share of an engine: weights of a rank, vLLM's reserve, and keys and values of what is left.
    assert set(memory.rows) == {"parameters", "engine", "KV cache", "prompt logits"}
    assert memory.rows["parameters"] == plan.memory["generation"].rows["parameters"]  # Qwen3-14B, TP4, too
    assert sum(memory.rows[name] for name in ("parameters", "engine", "KV cache")) == pytest.approx(0.65 * 79.1 * GIB)
    assert memory.facts["bytes of a cached token"] == 2 * 40 * 8 * 128 * 2 / 4
    assert memory.rows["prompt logits"] == 2 * 4 * 1024 * 151936
    assert memory.host == 32 * 16384 * (8 * 512 + 8) / 4
    # Time: 32 texts, a response before which the problem and a trace as long stand; the head for all tokens and in
    # float32; K + 1 numbers of each.
    length, D = 256 + 8192 + 8192 - 1, 5120
    tokens = 32 * length
    block = 2 * D * 40 * 128 + 2 * D * 8 * 128 + 3 * D * 17408
    trunk = tokens * 40 * (2 * block + 2 * 40 * 128 * length) / 4
    head = tokens * 2 * 151936 * D / 4
    assert time.flops == pytest.approx(trunk + head, rel=1e-9)
    assert time.parts["prefill"] == pytest.approx(trunk / (0.45 * 989e12) + head / (0.45 * 67e12), rel=1e-9)
    reduced = 2 * 40 * 2 * 3 / 4 * tokens * D * 2 + 3 / 4 * tokens * 151936 * 4
    assert time.parts["tensor parallel"] == pytest.approx(reduced / (0.75 * 450e9), rel=1e-9)
    assert time.parts["log-probabilities"] == pytest.approx(tokens * 513 * 0.8e-6)
    assert time.moved["payload"] == own.time["teacher"].moved["payload"]
    for role in ("training", "generation"):
        assert plan.memory[role] == own.memory[role] and plan.time[role] == own.time[role]
    # Two engines share the sequences.
    halves = shipped("topk512_qwen3_14b", "teacher.backend=vllm", "teacher.dtensor_cfg.tensor_parallel_size=2")
    assert str(halves.layout.form("teacher")) == "2 engines TP2"
    assert halves.time["teacher"].parts["log-probabilities"] == time.parts["log-probabilities"] / 2


def test_a_teacher_in_vllm_that_does_not_fit_says_what_to_turn(capsys):
    path, keys = str(ROOT / "recipes" / "topk512_qwen3_14b.yaml"), "policy.generation.vllm_cfg."
    narrow = ["teacher.backend=vllm", "teacher.dtensor_cfg.tensor_parallel_size=1"]
    assert command.main([path, "--plan", "--sweep", *narrow]) == 0
    out = capsys.readouterr().out
    assert "4 engines TP1" in out and "Qwen/Qwen3-14B (in vLLM)" in out and "fits         no: teacher" in out
    assert "An engine of teacher needs" in out and f"1. {keys}gpu_memory_utilization=" in out
    plan = shipped("topk512_qwen3_14b", *narrow)
    assert plan.short("teacher") and not plan.short("generation")
    found = knobs(plan, "teacher")
    assert found[0].key == f"{keys}gpu_memory_utilization" and found[0].value == 0.85 and found[0].fits
    assert shipped("topk512_qwen3_14b", *narrow, found[0].override).fits
    larger = shipped("topk512_qwen3_14b", *narrow, "teacher.model_name=Qwen/Qwen3-32B")
    last = knobs(larger, "teacher")[-1]
    assert last.override == "teacher.dtensor_cfg.tensor_parallel_size=4" and last.fits
    best = better_splits(plan)[0]
    again = shipped("topk512_qwen3_14b", *narrow, *best.overrides)
    assert again.fits and not again.short("teacher") and again.layout.teacher_engines is not None
    # Beside generation's engines on the same device, each takes its share.
    plan = small(
        "teacher.backend=vllm",
        "policy.generation.vllm_cfg.gpu_memory_utilization=0.6",
        generation={"backend": "vllm"},
        dtensor_cfg={"activation_checkpointing": True},
    )
    assert plan.tight and plan.used(plan.layout.pools[0]) > 1.2 * plan.capacity
    share = knobs(plan, plan.tight[0])
    shown = [one for one in share if one.key.endswith("gpu_memory_utilization")]
    assert len(shown) == 1 and shown[0].value < 0.5 and shown[0].fits


def test_experts_on_several_gpus_wait_for_their_rows_by_hand():
    """Qwen3-30B-A3B, TP4 DP8 EP8 on nodes of 8: 48 blocks send 8 rows of 2048 bfloat16 numbers for every token."""
    plan = shipped("qad_qwen3_30b_a3b", device="h100")
    layout = plan.layout
    assert str(layout.train) == str(layout.score) == "TP4 DP8 EP8"
    tokens = 256 / 8 * (256 + 1920 - 1) / 4  # of a rank, which sends its quarter of a tensor-parallel group's
    one = 48 * tokens * 8 * 2048 * 2 * 7 / 8
    # There and back; once more where blocks are recomputed; and the gradients there and back.
    for role, times in (("training", 6), ("teacher", 2)):
        time = plan.time[role]
        assert time.moved["expert parallel"] == pytest.approx(times * one, rel=1e-9)
        assert time.parts["expert parallel"] == pytest.approx(times * one / (0.75 * 450e9), rel=1e-9)
    kept = shipped("qad_qwen3_30b_a3b", "policy.dtensor_cfg.activation_checkpointing=false", device="h100")
    assert kept.time["training"].moved["expert parallel"] == pytest.approx(4 * one, rel=1e-9)
    # EP16 is two nodes: 7 of 15 parts go over links, and 8 over the network at the same time.
    keys = [f"{role}.dtensor_cfg.expert_parallel_size" for role in ("policy", "teacher")]
    wide = shipped("qad_qwen3_30b_a3b", *(f"{key}=16" for key in keys), device="h100")
    sent = 6 * one * (15 / 16) / (7 / 8)
    assert wide.time["training"].parts["expert parallel"] == pytest.approx(sent * 8 / 15 / (0.7 * 50e9), rel=1e-9)
    alone = shipped("qad_qwen3_30b_a3b", *(f"{key}=1" for key in keys), device="h100")
    assert alone.time["training"].moved["expert parallel"] == alone.time["training"].parts["expert parallel"] == 0
    # FSDP gathers a rank's experts over the 4 ranks that hold the same, and everything else over 8.
    own = 128 // 8 * 3 * 2048 * 768
    rest = 2048 * (4096 + 2 * 512 + 4096) // 4 + 128 * 2048 + 2 * 2048 + 2 * 128
    ends = 2 * 151936 * 2048 // 4
    gathered = 2 * 2 * (48 * (own * 3 / 4 + rest * 7 / 8) + ends * 7 / 8) + 2 * 2048 * 7 / 8
    reduced = 4 * (48 * (own * 3 / 4 + rest * 7 / 8) + (ends + 2048) * 7 / 8)
    time = plan.time["training"]
    assert time.moved["sharding"] == pytest.approx(time.facts["micro-batches"] * (gathered + reduced), rel=1e-9)


# ---------------------------------------------------------------- every recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans(path, capsys):
    """Offline (the tests set HF_HUB_OFFLINE) and without weights."""
    assert command.main([str(path), "--plan", "--json", "--sweep"]) == 0
    tree = json.loads(capsys.readouterr().out)
    devices = tree["device"]["count"]
    for name, role in tree["roles"].items():
        memory, time = role["memory"], role["time"]
        if name == "generation" and path.stem in TEXTS:
            assert memory["bytes"] == time["seconds"] == 0  # nothing is sampled
            continue
        assert memory["bytes"] == pytest.approx(sum(memory["rows"].values()))
        assert memory["bytes"] == max(memory["moments"].values())
        assert time["seconds"] == pytest.approx(sum(time["parts"].values()))
        assert memory["bytes"] > 0 and time["seconds"] > 0
        assert all(value >= 0 and math.isfinite(value) for value in [*memory["rows"].values(), *time["parts"].values()])
        assert 1 <= role["devices"] <= devices
    assert tree["fits"] is all(role["fits"] for role in tree["roles"].values())
    assert ("knobs" in tree) is not tree["fits"]
    step = tree["step"]
    assert step["overlapped_seconds"] <= step["serial_seconds"]
    assert tree["run"]["device_hours"] == pytest.approx(devices * tree["run"]["seconds"] / 3600)
    assert all(one["step_seconds"] < step["seconds"] for one in tree["splits"] if tree["fits"])


@pytest.mark.parametrize(
    ("name", "fitting", "not_fitting"),
    [
        ("topk512_qwen3_14b", "a100-40", ""),
        ("32b_to_1.7b_1n4g", "a100-80", "a100-40"),  # "4 GPUs of 80 GB or more"
        ("olmo2_32b_16gpu", "a100-80", "a100-40"),  # "80 GB or more"
        ("olmo2_32b_8gpu", "gh200", "h100"),  # "94 GB or more"
    ],
)
def test_recipes_fit_on_the_devices_that_they_name(name, fitting, not_fitting):
    assert shipped(name, device=fitting).fits
    assert not not_fitting or not shipped(name, device=not_fitting).fits


def test_what_only_a_plan_knows_offline_is_an_error_too():
    loaded = load_recipe(ROOT / "recipes" / "topk512_qwen3_4b.yaml", ["policy.dtensor_cfg.tensor_parallel_size=5",
                         "distillation.topk_logits_k=200000"])  # fmt: skip
    with pytest.raises(RecipeErrors) as found:
        plan_of(loaded, load_rates())
    assert [one.key for one in found.value.errors] == [
        "policy.dtensor_cfg.tensor_parallel_size",
        "distillation.topk_logits_k",
    ]
    assert "1, 2, 4, 8, 16, 32" in str(found.value)


# ---------------------------------------------------------------- knobs and splits


def test_knobs_come_in_the_runbooks_order_and_their_figures_hold():
    plan = shipped("32b_to_1.7b_1n4g", device="a100-40")
    assert plan.tight
    found = knobs(plan, plan.tight[0])
    assert [one.key.rsplit(".", 1)[1] for one in found] == [
        "generation_batch_size",
        "gpu_memory_utilization",
        "val_batch_size",
    ]
    turned = [one for one in found if one.value is not None]
    again = shipped("32b_to_1.7b_1n4g", *(one.override for one in turned), device="a100-40")
    assert again.fits and again.used(again.layout.pools[0]) == turned[-1].total < plan.used(plan.layout.pools[0])


def test_knobs_of_the_embedded_backend_cut_batches():
    plan = small("policy.generation_batch_size=512", "distillation.num_prompts_per_step=512", generation={})
    assert not plan.fits
    first = knobs(plan, "generation")[0]
    assert first.key == "policy.generation_batch_size" and 1 <= first.value < 512 and first.fits


def test_knobs_of_training_spread_it_out():
    plan = shipped("olmo2_32b_8gpu", "policy.dtensor_cfg.activation_checkpointing=false", device="h100")
    found = knobs(plan, "training")
    assert len(found) >= 3 and found[-1].fits
    again = shipped("olmo2_32b_8gpu", *(one.override for one in found[:3]), device="h100")
    assert again.memory["training"].total == found[2].total
    assert [one.key.rsplit(".", 1)[1] for one in found][:2] == ["activation_checkpointing", "fused"]
    assert [one.total for one in found] == sorted((one.total for one in found), reverse=True)


def test_an_engine_that_cannot_hold_one_sequence_does_not_fit():
    plan = shipped("topk512_qwen3_14b", "policy.generation.vllm_cfg.tensor_parallel_size=1")
    assert plan.short("generation") and plan.tight == ["generation"]
    found = knobs(plan, "generation")
    assert found[1].key.endswith("gpu_memory_utilization") and 0.65 < found[1].value < 0.95 and found[1].fits
    # Where one GPU cannot do it, more have to.
    larger = ("policy.model_name=Qwen/Qwen3-32B", "teacher.model_name=Qwen/Qwen3-32B")
    plan = shipped("topk512_qwen3_14b", "policy.generation.vllm_cfg.tensor_parallel_size=1", *larger)
    last = knobs(plan, "generation")[-1]
    assert last.override == "policy.generation.vllm_cfg.tensor_parallel_size=4" and last.fits


def test_the_sweep_proposes_legal_faster_splits_of_the_same_nodes():
    plan = shipped("topk512_qwen3_4b")
    found = better_splits(plan)
    assert found and [one.plan.step_seconds for one in found] == sorted(one.plan.step_seconds for one in found)
    for one in found:
        # The overrides, through the loader and the checks, give the same plan.
        again = shipped("topk512_qwen3_4b", *one.overrides)
        assert again.fits and again.layout.all_devices == 28
        assert again.step_seconds == pytest.approx(one.plan.step_seconds)
        assert again.step_seconds < 0.99 * plan.step_seconds
    assert sum(found[0].plan.layout.devices(role) for role in ("training", "generation", "teacher")) == 28
    # Nothing that is tried is faster than the best.
    key = "distillation.resource_isolation.roles"
    other = changed(found[0].plan, {f"{key}.training.num_nodes": 1, f"{key}.generation.num_nodes": 5,
                                    f"{key}.teacher.num_nodes": 1})  # fmt: skip
    assert other.step_seconds >= found[0].plan.step_seconds


# ---------------------------------------------------------------- rates


def test_own_rates_go_over_the_table(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("devices: {mi300x: {label: MI300X, memory_gib: 191.5, bfloat16: 1307, float32: 163, memory: 5300, "
                    "link: 448, network: 50, host: 55}}\nreached: {training: 0.5}\n")  # fmt: skip
    rates = load_rates("mi300x", path)
    assert rates.device.memory == 191.5 * GIB and rates.speed("training") == 1307e12 * 0.5
    assert rates.reached["scoring"] == load_rates().reached["scoring"]
    faster = plan_of(load_recipe(ROOT / "recipes" / "topk512_qwen3_4b.yaml"), rates)
    assert faster.time["training"].seconds < shipped("topk512_qwen3_4b").time["training"].seconds


@pytest.mark.parametrize(
    ("device", "text", "words"),
    [
        ("h1000", "", "--device='h1000': is not in the table.*Did you mean h100"),
        ("cpu", "", "the recipe asks for GPUs"),
        ("", "[1]", "holds no mapping"),
        ("", "reached: {trainin: 1}", "reached.trainin.*Did you mean training"),
        ("", "reached: {training: -1}", "number above 0"),
        ("", "reached: {training: fast}", "number above 0"),
        ("", "reached: 3", "must have a mapping"),
        ("x", "devices: {x: {label: X}}", "devices.x: lacks memory_gib"),
        ("", "a: [", "cannot be read"),
    ],
)
def test_wrong_rates_are_clear_errors(tmp_path, device, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_rates(device, path if text else None)


# ---------------------------------------------------------------- the command line


def test_a_plan_imports_nothing_heavy_and_writes_nothing(tmp_path):
    code = (
        "import sys\n"
        "from fastkd.run import main\n"
        f"assert main([{str(ROOT / 'recipes' / 'topk512_qwen3_4b.yaml')!r}, '--plan', '--sweep']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'datasets', 'ray', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "28 × A100 40 GB" in out and "TP8 DP2" in out and "8 engines TP1" in out
    assert "bound by     generation" in out and "fits         yes" in out
    assert "Other splits" in out and "policy.generation.vllm_cfg.tensor_parallel_size=" in out
    assert max(map(len, out.splitlines())) <= 120
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_does_not_fit_says_what_to_turn(capsys):
    assert command.main([str(ROOT / "recipes" / "olmo2_32b_8gpu.yaml"), "--plan", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "too large" in out and "fits         no: training" in out and "Turn for training, in this order:" in out


def test_a_plan_is_for_this_machines_gpu_where_there_is_one(monkeypatch, capsys):
    path = str(ROOT / "recipes" / "topk512_qwen3_4b.yaml")
    for here, words in (("h200", "H200 SXM"), ("", "A100 40 GB")):
        monkeypatch.setattr("fastkd.plan.command.here", lambda here=here: here)
        assert command.main([path, "--plan"]) == 0
        out = capsys.readouterr().out
        assert f"28 × {words}" in out and ("h200: this machine's" if here else "a100-40: the default") in out
    monkeypatch.setattr("fastkd.plan.command.here", lambda: "h200")
    assert command.main([path, "--plan", "--device", "b200"]) == 0
    out = capsys.readouterr().out
    assert "28 × B200" in out and "this machine's" not in out
    # A recipe for the CPU is not for the GPU that happens to be here.
    assert command.main([str(ROOT / "recipes" / "arithmetic_cpu.yaml"), "--plan"]) == 0
    assert "× CPU" in capsys.readouterr().out


def test_quantised_weights_are_kept_whole_unless_blocks_are_recomputed():
    """Qwen3-8B, DP8: 36 blocks of 192,937,984 weights in bfloat16 on every GPU; with recompute one block's."""
    block = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 12288
    off = "policy.dtensor_cfg.activation_checkpointing=false"
    kept, plain = shipped("qad_qwen3_8b", off), shipped("qad_qwen3_8b", off, "policy.quant_cfg=null")
    moments = kept.memory["training"].moments
    assert moments["loss"]["quantised weights"] == 36 * 2 * block
    assert shipped("qad_qwen3_8b").memory["training"].moments["backward"]["quantised weights"] == 2 * block
    assert kept.memory["training"].total > plain.memory["training"].total + 36 * 2 * block
    excluded = 'policy.quant_exclude_modules=[down_proj,"*.self_attn.*"]'
    part = shipped("qad_qwen3_8b", off, excluded).memory["training"].moments["loss"]["quantised weights"]
    assert part == 36 * 2 * 2 * 4096 * 12288
    # Of a mixture of experts a rank has its own: 16 of 128, and a quarter of the attention.
    moe = shipped("qad_qwen3_30b_a3b").memory["training"].moments["backward"]["quantised weights"]
    assert moe == 2 * (16 * 3 * 2048 * 768 + 2048 * (4096 + 2 * 512 + 4096) // 4)


def test_texts_that_exist_need_no_engines_and_no_sync():
    plan = shipped("qad_qwen3_8b")
    assert plan.memory["generation"].total == plan.time["generation"].seconds == plan.sync[0] == 0
    assert plan.serial_seconds == plan.time["training"].seconds + plan.time["teacher"].seconds


def test_the_chart(tmp_path, capsys):
    assert set(COLORS) == set(ROWS)
    path = tmp_path / "plan.png"
    assert command.main([str(ROOT / "recipes" / "distillation_math.yaml"), "--plan", "--chart", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [one.name for one in tmp_path.iterdir()] == ["plan.png"]
    assert command.main([str(ROOT / "recipes" / "distillation_math.yaml"), "--plan", "--chart", "plan.jpg"]) == 2
    assert "--chart='plan.jpg'" in capsys.readouterr().err


def test_what_is_not_on_this_machine_does_not_hinder_a_plan(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")  # planned inside another allocation
    absent = "/p/hub/models--Qwen--Qwen3-4B/snapshots/0123456789abcdef"
    changes = [f"policy.model_name={absent}", f"teacher.model_name={absent}", "data.train.data_path=/p/data.jsonl"]
    path = str(ROOT / "recipes" / "topk512_qwen3_4b.yaml")
    assert command.main([path, "--check", *changes]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert command.main([path, "--plan", *changes]) == 0
    assert "Qwen/Qwen3-4B" in capsys.readouterr().out
    # Every real mistake is told, and nothing else.
    assert command.main([path, "--plan", *changes, "policy.train_global_batch_size=3", "loss_fn.kl_type=fwd"]) == 2
    told = capsys.readouterr().err
    assert "policy.train_global_batch_size=3" in told and "loss_fn.kl_type='fwd'" in told and "no such" not in told


def test_mistakes_of_the_command_line(capsys):
    path = str(ROOT / "recipes" / "topk512_qwen3_4b.yaml")
    with pytest.raises(SystemExit) as stopped:
        command.main([path, "--sweep"])
    assert stopped.value.code == 2 and "go with --plan" in capsys.readouterr().err
    assert command.main([path, "--plan", "--device", "v100"]) == 2
    assert "--device='v100'" in capsys.readouterr().err
    assert command.main([path, "--plan", "policy.model_name=Qwen/Qwen3-5B", "teacher.model_name=Qwen/Qwen3-5B"]) == 2
    assert "its sizes are not known" in capsys.readouterr().err
    assert command.main([path, "--plan", "cluster.num_nodes=6"]) == 2
    assert "must exactly partition cluster nodes" in capsys.readouterr().err
