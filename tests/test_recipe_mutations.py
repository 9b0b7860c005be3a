"""Every shipped recipe, broken in more than thirty ways: each mistake is found, with the right key, all at once."""

import pytest

from fastkd.checks import load_and_check
from fastkd.config.shipped import shipped
from fastkd.errors import RecipeErrors
from fastkd.recipe import load_recipe

CONTEXT = "distillation.context_distillation"
ROLES = "distillation.resource_isolation.roles"
ENGINE = "policy.generation.vllm_cfg"

# Wrong by themselves: one override each, and the key that must be named.
ALONE = {
    "loss_fn.kl_type=foward": "loss_fn.kl_type",
    "loss_fn.mixed_kl_weight=1.5": "loss_fn.mixed_kl_weight",
    "policy.dtensor_cfg.activation_checkpoint=true": "policy.dtensor_cfg.activation_checkpoint",
    "distillation.topk_logits_k=0": "distillation.topk_logits_k",
    "distillation.max_num_steps=many": "distillation.max_num_steps",
    "policy.generation.temperature=-1": "policy.generation.temperature",
    "policy.generation.top_p=0": "policy.generation.top_p",
    "policy.precision=fp16": "policy.precision",
    "policy.optimizer.kwargs.lr=-1": "policy.optimizer.kwargs.lr",
    "policy.scheduler=[{name: LinearLR}, {name: ConstantLR}]": "policy.scheduler",
    "logger.wandb_enabled=3": "logger.wandb_enabled",
    "checkpointing.metric_name=accuracy": "checkpointing.metric_name",
    "checkpointing.checkpoint_must_save_by=1h": "checkpointing.checkpoint_must_save_by",
    f"{CONTEXT}.mode=self_live": f"{CONTEXT}.mode",
    f"{CONTEXT}.alignment=absolute": f"{CONTEXT}.alignment",
    f"{CONTEXT}.problem_source=student_prompt": f"{CONTEXT}.problem_source",
    f"{CONTEXT}.trace_extractor.missing_trace_policy=ignore": f"{CONTEXT}.trace_extractor.missing_trace_policy",
    f"{ENGINE}.gpu_memory_utilization=1.5": f"{ENGINE}.gpu_memory_utilization",
    "cluster.gpus_per_node=-1": "cluster.gpus_per_node",
    "four words no key": "override 'four words no key'",
}


def groups(recipe, folder):
    """(overrides, environment, keys that must be named) of mistakes that need one another's keys to be right."""
    loop, policy, cluster = recipe.distillation, recipe.policy, recipe.cluster
    sizes, isolated = recipe.role_sizes, loop.resource_isolation.enabled
    sharding = policy.dtensor_cfg
    ranks = sizes.training // (sharding.tensor_parallel_size * sharding.context_parallel_size)
    longest = policy.max_total_sequence_length
    (folder / "file").write_text("")

    yield ALONE, {}, set(ALONE.values())
    several = {
        "distillation.max_rollout_turns=2": "distillation.max_rollout_turns",
        f"data.max_input_seq_length={longest + 1}": "data.max_input_seq_length",
        "loss_fn.kl_type=jsd": "loss_fn.outside_topk",
        "loss_fn.outside_topk=drop": "loss_fn.outside_topk",
        "data.train.data_path=./none.jsonl": "data.train.data_path",
        "data.train.prompt_file=nowhere.txt": "data.train.prompt_file",
        "data.train.system_prompt_file=nowhere.txt": "data.train.system_prompt_file",
        "data.train.env_name=code": "data.train.env_name",
        "policy.optimizer.name=torch.optim.AdamV": "policy.optimizer.name",
        "policy.scheduler={name: LinearLRR}": "policy.scheduler.0.name",
        "distillation.topk_logits_k=200000": "distillation.topk_logits_k",
        "teacher.tokenizer.chat_template=nowhere.jinja": "teacher.tokenizer.chat_template",
        "policy.dynamic_batching.enabled=true": "policy.dynamic_batching.enabled",
        "policy.sequence_packing.enabled=true": "policy.dynamic_batching.enabled",
        "teacher.dynamic_batching.enabled=true": "teacher.dynamic_batching.enabled",
        "teacher.sequence_packing.enabled=true": "teacher.dynamic_batching.enabled",
        f"policy.train_global_batch_size={loop.batch_size * 2}": "policy.train_global_batch_size",
        "policy.generation.backend=vllm": f"{ENGINE}.max_model_len",
        f"{ENGINE}.max_model_len=16": f"{ENGINE}.max_model_len",
        "checkpointing.enabled=false": "checkpointing.checkpoint_must_save_by",
        "checkpointing.checkpoint_must_save_by='00:01:00:00'": "checkpointing.checkpoint_must_save_by",
        "logger.log_dir=file/run": "logger.log_dir",
    }
    if loop.context_distillation.enabled:
        several |= {
            f"{CONTEXT}.teacher_prefix_template={{problem}} alone": f"{CONTEXT}.teacher_prefix_template",
            f"{CONTEXT}.trace_extractor.type=regex": f"{CONTEXT}.trace_extractor.pattern",
            f"{CONTEXT}.trace_source=static_dataset": f"{CONTEXT}.static_trace.answer_column",
            f"{CONTEXT}.static_trace.answer_column=null": f"{CONTEXT}.static_trace.answer_column",
        }
        yield ["teacher.model_name=Qwen/Qwen3-32B"], {}, {"teacher.model_name"}
    else:
        short = "teacher.max_total_sequence_length"
        if recipe.policy.model_name != recipe.teacher.model_name:
            several[f"{CONTEXT}.enabled=true"] = "teacher.model_name"
        yield [f"{short}={longest - 1}"], {}, {short}
    yield several, {}, set(several.values())

    missing = {
        "policy.model_name=./nowhere": "policy.model_name",
        "teacher.model_name=/no/such/model": "teacher.model_name",
        "policy.tokenizer.name=./nowhere": "policy.tokenizer.name",
        "data.train.data_path=null": "data.train.dataset_name",
        "data.train.dataset_name=OpenThougts-114k": "data.train.dataset_name",
    }
    absent = {"teacher.model_name"} if loop.context_distillation.enabled else set()
    yield missing, {}, {"policy.model_name", "teacher.model_name", "data.train.dataset_name"} | absent

    three = [f"{model}.dtensor_cfg.tensor_parallel_size=3" for model in ("policy", "teacher")]
    yield three, {}, {f"{model}.dtensor_cfg.tensor_parallel_size" for model in ("policy", "teacher")}
    if ranks > 1:
        keys = {"policy.train_global_batch_size", "distillation.num_prompts_per_step"}
        odd = [f"policy.train_global_batch_size={ranks + 1}", f"distillation.num_prompts_per_step={ranks + 1}"]
        yield [*odd, "distillation.num_generations_per_prompt=1"], {}, keys
    if policy.generation.backend == "vllm":
        keys = {f"{ENGINE}.tensor_parallel_size", f"{ENGINE}.gpu_memory_utilization"}
        yield [f"{ENGINE}.tensor_parallel_size=3", f"{ENGINE}.gpu_memory_utilization=0"], {}, keys

    if isolated:
        keys = {
            f"cluster.num_nodes={cluster.num_nodes + 1}": "cluster.num_nodes",
            f"{ROLES}.teacher.gpus_per_node={cluster.gpus_per_node + 1}": f"{ROLES}.teacher.gpus_per_node",
            "policy.generation.colocated.enabled=true": "policy.generation.colocated.enabled",
        }
        yield keys, {}, set(keys.values())
        less = f"{ROLES}.teacher.num_nodes"
        yield [f"{less}=0", f"cluster.num_nodes={cluster.num_nodes - 1}"], {}, {less}
    else:
        apart = "num_nodes" if cluster.num_nodes > 1 else "gpus_per_node"
        key = f"policy.generation.colocated.resources.{apart}"
        yield ["policy.generation.colocated.enabled=false"], {}, {key}

    slurm = {"SLURM_JOB_NUM_NODES": str(cluster.num_nodes + 1)}
    here = set() if cluster.num_nodes == 1 else {"cluster.num_nodes"}
    if cluster.gpus_per_node:
        slurm["SLURM_GPUS_ON_NODE"] = str(cluster.gpus_per_node - 1)
        here.add("cluster.gpus_per_node")
    yield ["cluster.simulated=false"], slurm | {"RAY_ADDRESS": "127.0.0.1:1"}, here | {"RAY_ADDRESS"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_each_mistake_names_its_key(name, tmp_path, monkeypatch):
    path = shipped()[name]
    recipe = load_recipe(path).recipe
    found_in_all = 0
    for overrides, environment, expected in groups(recipe, tmp_path):
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            with pytest.raises(RecipeErrors) as caught:
                load_and_check(path, list(overrides))
        found = {error.key for error in caught.value.errors}
        assert found == expected, f"{sorted(found ^ expected)}\n{caught.value}"
        assert all(error.rule and error.remedy for error in caught.value.errors)
        found_in_all += len(expected)
    assert found_in_all >= 30


def test_what_a_mistake_would_mislead_stays_silent(tmp_path):
    """A rule that reads a key at fault says nothing about the default in its place; the others still speak."""

    def keys(*overrides):
        with pytest.raises(RecipeErrors) as caught:
            load_and_check(shipped()["topk512_qwen3_14b"], overrides)
        return {error.key for error in caught.value.errors}

    assert keys("cluster.num_nodes=many") == {"cluster.num_nodes"}
    assert keys("cluster.num_node=11", "~cluster.num_nodes") == {"cluster.num_node"}
    assert keys("policy.max_total_sequence_length=long") == {"policy.max_total_sequence_length"}
    assert keys("data.default.split_validation_size=many", "distillation.max_rollout_turns=2") == {
        "data.default.split_validation_size",
        "distillation.max_rollout_turns",
    }
    assert keys("~policy.model_name", "distillation.max_rollout_turns=3") >= {
        "policy.model_name",
        "distillation.max_rollout_turns",
    }
