"""The shipped context recipes say what people who run them expect: nodes, sharding, engines, lengths, templates."""

import pytest

from fastkd import prefix_template
from fastkd.checks import check
from fastkd.recipe import load_recipe

TOPK512 = {
    # name: nodes, (training, generation, teacher) nodes, student TP, DP, engine TP, engines, teacher TP, DP, memory, lr
    "topk512_qwen3_1b7": (4, (1, 2, 1), 2, 2, 1, 8, 2, 2, 0.90, 1e-5),
    "topk512_qwen3_4b": (7, (4, 2, 1), 8, 2, 1, 8, 2, 2, 0.80, 1e-5),
    "topk512_qwen3_8b": (7, (4, 2, 1), 8, 2, 2, 4, 2, 2, 0.60, 4e-6),
    "topk512_qwen3_14b": (11, (8, 2, 1), 8, 4, 4, 2, 4, 1, 0.65, 3e-6),
    "topk512_qwen3_1b7_p64_g4": (7, (2, 4, 1), 4, 2, 1, 16, 2, 2, 0.80, 1e-5),
}
LONG = {
    # name: nodes, (training, generation, teacher) nodes, student TP, DP
    "context_self_distill_1p7b": (3, (1, 1, 1), 2, 2),
    "context_self_distill_4b": (4, (2, 1, 1), 4, 2),
    "context_self_distill_8b": (3, (1, 1, 1), 4, 1),
    "context_self_distill_14b": (3, (1, 1, 1), 4, 1),
}


@pytest.fixture
def load(root, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def one(name):
        loaded = load_recipe(root / "recipes" / f"{name}.yaml")
        assert check(loaded).errors == [] and loaded.ignored == []
        recipe = loaded.recipe
        assert recipe.teacher.model_name == recipe.policy.model_name
        assert recipe.policy.tokenizer.chat_template_kwargs == {"enable_thinking": True}
        template = recipe.distillation.context_distillation.teacher_prefix_template
        assert {"problem", "trace"} <= set(prefix_template.places(prefix_template.read(template, loaded.locate)))
        return recipe

    return one


def roles(recipe):
    config = recipe.distillation.resource_isolation
    nodes = tuple(getattr(config.roles, name).num_nodes for name in ("training", "generation", "teacher"))
    return recipe.cluster.num_nodes, nodes


def shards(model, devices):
    size = model.dtensor_cfg.tensor_parallel_size
    return size, devices // size


@pytest.mark.parametrize("name", TOPK512)
def test_topk512(load, name):
    recipe = load(name)
    sizes, engine = recipe.role_sizes, recipe.policy.generation.vllm_cfg
    found = (
        *roles(recipe),
        *shards(recipe.policy, sizes.training),
        engine.tensor_parallel_size,
        sizes.generation // engine.tensor_parallel_size,
        *shards(recipe.teacher, sizes.teacher),
        engine.gpu_memory_utilization,
        recipe.policy.optimizer.kwargs["lr"],
    )
    assert found == TOPK512[name]
    loop, loss, context = recipe.distillation, recipe.loss_fn, recipe.distillation.context_distillation
    assert (loop.topk_logits_k, loss.kl_type, loss.outside) == (512, "reverse", "zero")
    assert (loop.val_at_start, loop.val_period, loop.max_val_samples) == (True, 50, 128)
    assert recipe.checkpointing.save_period == 50 and recipe.data.train[0].split_validation_size == 128
    assert (context.trace_source, context.static_trace.answer_column) == ("static_dataset", "ground_truth_solution")
    assert recipe.policy.max_total_sequence_length == recipe.teacher.max_total_sequence_length == 20480
    generation = recipe.policy.generation
    assert (generation.backend, generation.max_new_tokens, generation.temperature) == ("vllm", 16384, 0.6)
    many = name.endswith("p64_g4")
    assert (loop.num_prompts_per_step, loop.num_generations_per_prompt) == ((64, 4) if many else (32, 1))
    assert recipe.policy.train_global_batch_size == loop.batch_size
    assert recipe.policy.sequence_packing.enabled == (name.rpartition("_")[2] in ("4b", "8b", "14b"))


@pytest.mark.parametrize("name", LONG)
def test_long_responses(load, name):
    recipe = load(name)
    assert (*roles(recipe), *shards(recipe.policy, recipe.role_sizes.training)) == LONG[name]
    assert recipe.policy.generation.max_new_tokens == 16384
    assert recipe.policy.max_total_sequence_length == recipe.teacher.max_total_sequence_length == 20480
    assert recipe.logger.wandb_enabled
    data = recipe.data.train[0]
    assert (data.dataset_name, data.input_key, data.filter_value) == ("OpenThoughts-114k", "problem", "math")


def test_one_node(load):
    recipe = load("context_self_distill_1n4g")
    assert (recipe.cluster.num_nodes, recipe.cluster.gpus_per_node) == (1, 4)
    assert recipe.policy.model_name == "Qwen/Qwen3-0.6B" and not recipe.distillation.resource_isolation.enabled
