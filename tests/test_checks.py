"""Fail-fast checks: each mistake gives one error that names its key; a sound recipe gives none."""

import json
from pathlib import Path

import pytest

from fastkd import fits
from fastkd.checks import allocation, check, local_run_problems
from fastkd.config.inherit import merge
from fastkd.errors import RecipeErrors
from fastkd.model_files import find_folder, looks_local
from fastkd.recipe import load_recipe, recipe_from

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).resolve().parent / "recipes"
BASE = {
    "distillation": {"num_prompts_per_step": 8, "val_period": 0},
    "policy": {"model_name": "org/student", "train_global_batch_size": 8},
    "teacher": {"model_name": "org/teacher"},
    "data": {"train": {"data_path": "org/data"}},
}
ISOLATED = {
    "distillation": {
        "resource_isolation": {
            "enabled": True,
            "roles": {name: {"num_nodes": 1} for name in ("training", "generation", "teacher")},
        }
    },
    "policy": {"generation": {"colocated": {"enabled": False}}},
    "cluster": {"num_nodes": 3, "gpus_per_node": 4},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing of the machine leaks in: empty folder, empty model cache, no Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def report(*overrides, tree=None):
    return check(recipe_from(merge(BASE, tree or {}), overrides))


def errors(*overrides, tree=None):
    """{key: message}; no key may have two errors."""
    found = report(*overrides, tree=tree).errors
    assert len({error.key for error in found}) == len(found)
    return {error.key: str(error) for error in found}


def warnings(*overrides, tree=None):
    found = report(*overrides, tree=tree)
    assert found.errors == []
    return "\n".join(found.warnings)


def model(folder, vocab=None, **sizes):
    """A folder that looks like a model: config.json and, with a vocabulary, tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "model.safetensors").touch()
    if vocab is not None:
        content = {"model": {"vocab": vocab}, "added_tokens": [{"content": "<eos>", "id": len(vocab)}]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_a_sound_recipe_has_no_findings():
    found = report()
    assert (found.errors, found.warnings) == ([], [])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = load_recipe(path)
    assert check(loaded).errors == []
    assert loaded.ignored == []


@pytest.mark.parametrize("name", ["nemo_distillation_math.yaml", "fork_topk512_1b7.yaml"])
def test_recipes_of_other_engines_are_sound(name):
    assert check(load_recipe(FIXTURES / name)).errors == []


# --- rules between keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (
            ["policy.train_global_batch_size=3"],
            "policy.train_global_batch_size",
            "Write policy.train_global_batch_size=2",
        ),
        (["policy.train_global_batch_size=16"], "policy.train_global_batch_size", "must be a multiple"),
        (["distillation.max_rollout_turns=2"], "distillation.max_rollout_turns", "single-turn"),
        (["loss_fn.kl_type=jsd", "loss_fn.outside_topk=drop"], "loss_fn.outside_topk", "bucket"),
        (["loss_fn.kl_type=jsd", "loss_fn.zero_outside_topk=true"], "loss_fn.outside_topk", "bucket"),
        (["data.max_input_seq_length=9000"], "data.max_input_seq_length", "8192"),
        (["teacher.max_total_sequence_length=4096"], "teacher.max_total_sequence_length", "8192"),
        (
            ["policy.generation.backend=vllm", "policy.generation.vllm_cfg.max_model_len=4096"],
            "policy.generation.vllm_cfg.max_model_len",
            "8192",
        ),
        (["data.train.env_name=code"], "data.train.env_name", "math"),
        (["data.train.data_path=null"], "data.train.data_path", "names no dataset"),
        (["data.train.data_path=missing/folder/file.jsonl"], "data.train.data_path", "no such file"),
        (["data.train.prompt_file=nowhere.txt"], "data.train.prompt_file", "no such file"),
        (["data.train.system_prompt_file=nowhere.txt"], "data.train.system_prompt_file", "no such file"),
        (["policy.model_name=./nowhere"], "policy.model_name", "no such folder"),
        (["teacher.model_name=/no/such/model"], "teacher.model_name", "no such folder"),
        (["policy.tokenizer.name=./nowhere", "teacher.tokenizer.name=x"], "policy.tokenizer.name", "no such folder"),
    ],
)
def test_mistakes(overrides, key, text):
    found = errors(*overrides)
    assert set(found) == {key}
    assert text in found[key]


def test_jsd_over_the_whole_vocabulary_or_the_kept_ids_is_fine():
    assert errors("loss_fn.kl_type=jsd") == {}
    assert errors("loss_fn.kl_type=jsd", "loss_fn.outside_topk=bucket") == {}


def test_packing_and_dynamic_batching_exclude_each_other():
    both = ["policy.sequence_packing.enabled=true", "policy.dynamic_batching.enabled=true"]
    assert set(errors(*both)) == {"policy.dynamic_batching.enabled", "teacher.dynamic_batching.enabled"}
    assert set(errors(*both, "teacher.dynamic_batching.enabled=false")) == {"policy.dynamic_batching.enabled"}


def test_warnings_do_not_stop_a_run():
    assert "loss_fn.temperature=0.6" in warnings("policy.generation.temperature=0.6")
    assert "temperature" not in warnings("policy.generation.temperature=0.6", "loss_fn.temperature=0.6")
    assert "Nothing will be validated" in warnings("distillation.val_period=5")
    assert "dtensor_cfg.enabled=false" in warnings("policy.dtensor_cfg.enabled=false")
    assert "logger.mlflow_enabled" in warnings("logger.mlflow_enabled=true")
    held_out = ["distillation.val_period=5", "data.train.split_validation_size=100"]
    assert "split_validation_size=100" in warnings(*held_out)
    assert "split_validation_size" not in warnings(*held_out, "distillation.max_val_samples=100")
    assert "val_batch_size=64" in warnings(*held_out, "distillation.max_val_samples=100")
    assert "split_validation_size" not in warnings("distillation.val_period=5", "data.train.split_validation_size=0.1")


# --- devices ----------------------------------------------------------------------------------------------


def test_batches_divide_over_data_parallel_ranks():
    assert errors("cluster.gpus_per_node=8") == {}
    found = errors("cluster.gpus_per_node=16")
    assert set(found) == {"policy.train_global_batch_size", "distillation.num_prompts_per_step"}
    assert "data parallel size 16" in found["policy.train_global_batch_size"]
    assert errors("cluster.gpus_per_node=16", "policy.dtensor_cfg.tensor_parallel_size=2") == {}


def test_data_parallel_size_is_whole():
    found = errors("cluster.gpus_per_node=8", "policy.dtensor_cfg.tensor_parallel_size=3")
    assert set(found) == {"policy.dtensor_cfg.tensor_parallel_size", "teacher.dtensor_cfg.tensor_parallel_size"}
    assert "8 / (3 × 1) must be a whole number" in found["policy.dtensor_cfg.tensor_parallel_size"]


def test_tensor_parallelism_across_nodes_is_a_warning():
    wide = ["cluster.num_nodes=2", "cluster.gpus_per_node=4", "policy.dtensor_cfg.tensor_parallel_size=8"]
    assert "spans nodes of 4 GPUs" in warnings(*wide)


def test_isolated_roles_partition_the_cluster():
    assert errors(tree=ISOLATED) == {}
    roles = "distillation.resource_isolation.roles"
    found = errors(f"{roles}.generation.num_nodes=2", tree=ISOLATED)
    assert set(found) == {"cluster.num_nodes"}
    assert "must exactly partition cluster nodes" in found["cluster.num_nodes"]
    assert "training 1 + generation 2 + teacher 1 = 4" in found["cluster.num_nodes"]

    found = errors("policy.generation.colocated.enabled=true", tree=ISOLATED)
    assert "requires policy.generation.colocated.enabled=false" in found["policy.generation.colocated.enabled"]

    found = errors(f"{roles}.teacher.gpus_per_node=2", tree=ISOLATED)
    assert "enforces node-level role isolation" in found[f"{roles}.teacher.gpus_per_node"]

    found = errors(f"{roles}.teacher.num_nodes=0", "cluster.num_nodes=2", tree=ISOLATED)
    assert set(found) == {f"{roles}.teacher.num_nodes"}


def test_the_runbooks_table_is_sound():
    """(nodes, training, TP, generation, engine TP, teacher, teacher TP) of the five top-512 recipes."""
    for nodes, training, tp, generation, engine, teacher, teacher_tp in [
        (4, 1, 2, 2, 1, 1, 2),
        (7, 4, 8, 2, 1, 1, 2),
        (7, 4, 8, 2, 2, 1, 2),
        (11, 8, 8, 2, 4, 1, 4),
        (7, 2, 4, 4, 1, 1, 2),
    ]:
        roles = {"training": training, "generation": generation, "teacher": teacher}
        tree = merge(ISOLATED, {"policy": {"generation": {"backend": "vllm"}}})
        overrides = [f"distillation.resource_isolation.roles.{name}.num_nodes={n}" for name, n in roles.items()]
        overrides += [
            f"cluster.num_nodes={nodes}",
            f"policy.dtensor_cfg.tensor_parallel_size={tp}",
            f"teacher.dtensor_cfg.tensor_parallel_size={teacher_tp}",
            f"policy.generation.vllm_cfg.tensor_parallel_size={engine}",
        ]
        assert errors(*overrides, tree=tree) == {}


def test_generation_apart_takes_some_devices():
    apart = ["policy.generation.colocated.enabled=false", "cluster.gpus_per_node=8"]
    key = "policy.generation.colocated.resources.gpus_per_node"
    assert set(errors(*apart)) == {key}
    assert set(errors(*apart, f"{key}=8")) == {key}
    assert errors(*apart, f"{key}=4") == {}
    key = "policy.generation.colocated.resources.num_nodes"
    assert set(errors(*apart, "cluster.num_nodes=2")) == {key}
    assert errors(*apart, "cluster.num_nodes=2", f"{key}=1") == {}


def test_engines_divide_the_generation_devices():
    found = errors(
        "policy.generation.backend=vllm", "cluster.gpus_per_node=4", "policy.generation.vllm_cfg.tensor_parallel_size=3"
    )
    assert set(found) == {"policy.generation.vllm_cfg.tensor_parallel_size"}


def test_the_slurm_allocation_has_the_nodes_of_the_recipe(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert errors(tree=ISOLATED) == {}
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert "allocation has 4 nodes" in errors(tree=ISOLATED)["cluster.num_nodes"]
    assert "uses one of them" in warnings()


@pytest.mark.parametrize(
    ("variable", "value", "gpus"),
    [("SLURM_GPUS_ON_NODE", "2", 2), ("SLURM_GPUS_PER_NODE", "a100:2", 2), ("SLURM_GPUS_PER_NODE", "8(x3)", 8)],
)
def test_the_slurm_allocation_has_the_gpus_of_the_recipe(monkeypatch, variable, value, gpus):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv(variable, value)
    if gpus < 4:
        assert f"{gpus} GPUs on each node" in errors(tree=ISOLATED)["cluster.gpus_per_node"]
    else:
        assert "cluster.gpus_per_node=4 of them work" in warnings(tree=ISOLATED)
    assert errors("cluster.simulated=true", tree=ISOLATED) == {}


def test_the_ray_cluster_has_the_nodes_and_devices_of_the_recipe(monkeypatch):
    def cluster(*devices, resource="GPU"):
        nodes = [
            {
                "NodeName": f"n{i}",
                "NodeManagerAddress": f"10.0.0.{i}",
                "NodeID": f"{i}" * 56,
                "Resources": {resource: n},
            }
            for i, n in enumerate(devices)
        ]
        monkeypatch.setattr(allocation, "_alive", lambda address: nodes)

    cluster(4, 4)
    assert errors(tree=ISOLATED) == {}  # RAY_ADDRESS is not set: nobody is asked
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.0:6379")
    assert "the Ray cluster has 2 nodes" in errors(tree=ISOLATED)["cluster.num_nodes"]
    cluster(4, 4, 4)
    assert (errors(tree=ISOLATED), warnings(tree=ISOLATED)) == ({}, "")
    assert set(errors("cluster.exclude_nodes=[n1]", tree=ISOLATED)) == {"cluster.num_nodes"}
    cluster(4, 4, 2)
    assert "2 have so many GPUs; 3 must" in errors(tree=ISOLATED)["cluster.gpus_per_node"]
    cluster(4, 4, 4, 4)
    assert "has 4 nodes that fit" in warnings(tree=ISOLATED)
    cluster(2, 2, 2, resource="fastkd_slot")
    cpu = ["cluster.gpus_per_node=0", "cluster.cpu_slots_per_node=2"]
    assert errors(*cpu, tree=ISOLATED) == {}
    three = [
        cpu[0],
        "cluster.cpu_slots_per_node=3",
        "policy.train_global_batch_size=9",
        "distillation.num_prompts_per_step=9",
    ]
    assert set(errors(*three, tree=ISOLATED)) == {"cluster.cpu_slots_per_node"}


def test_a_ray_address_that_nobody_answers(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "no Ray cluster answers" in errors()["RAY_ADDRESS"]


def test_an_engine_fits_a_node_and_shares_only_a_whole_gpu():
    engine = "policy.generation.vllm_cfg"
    vllm = ["policy.generation.backend=vllm", "cluster.gpus_per_node=4", "cluster.num_nodes=2"]
    wide = [*vllm, f"{engine}.tensor_parallel_size=8"]
    assert "does not fit the 4 GPUs of a node" in errors(*wide)[f"{engine}.tensor_parallel_size"]
    shared = [*vllm, f"{engine}.tensor_parallel_size=2"]
    assert "shares its GPUs" in errors(*shared)[f"{engine}.tensor_parallel_size"]
    assert set(errors(*vllm, f"{engine}.gpu_memory_utilization=0")) == {f"{engine}.gpu_memory_utilization"}


# --- context distillation ---------------------------------------------------------------------------------


def test_context_distillation():
    where = "distillation.context_distillation"
    on = [f"{where}.enabled=true", "teacher.model_name=org/student"]
    assert errors(*on) == {}
    assert "self_frozen" in errors(f"{where}.enabled=true")["teacher.model_name"]
    found = errors(*on, f"{where}.teacher_prefix_template=Solve {{problem}}")
    assert "lacks {trace}" in found[f"{where}.teacher_prefix_template"]
    static = [*on, f"{where}.trace_source=static_dataset"]
    assert set(errors(*static)) == {f"{where}.static_trace.answer_column"}
    assert errors(*static, f"{where}.static_trace.answer_column=solution") == {}
    assert "single-turn" in errors(*on, "distillation.max_rollout_turns=2")["distillation.max_rollout_turns"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mode=self_live", "must be one of self_frozen"),
        ("alignment=absolute", "must be one of response_token_index"),
        ("problem_source=student_prompt", "must be one of original_user_problem"),
        ("frozen_teacher_source=other", "must be one of base_model, ema, live"),
        ("trace_extractor.pattern=(", "is no regular expression"),
        ("ema_decay=1.5", "must be"),
    ],
)
def test_illegal_values_of_context_distillation(override, words):
    with pytest.raises(RecipeErrors, match=words):
        recipe_from(BASE, [f"distillation.context_distillation.{override}"])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{problem} {trace} {}", "a place has no name"),
        ("{problem} {trace!r}", "has a format"),
        ("{problem} {trace} \\boxed{1", "cannot be filled"),
        ("prompts/absent.txt", "names no file"),
        ("{trace}", "lacks {problem}"),
        ("{hint}", "lacks {problem}"),
        ("{problem} {hint}", None),
        ("{problem} {trace} \\boxed{{}}", None),
    ],
)
def test_teacher_prefix_templates(template, words):
    where = "distillation.context_distillation"
    tree = {"distillation": {"context_distillation": {"enabled": True, "teacher_prefix_template": template}}}
    found = errors("teacher.model_name=org/student", tree=tree)
    if words is None:
        assert found == {}
    else:
        assert words in found[f"{where}.teacher_prefix_template"]


def test_the_teachers_own_length():
    on = ["distillation.context_distillation.enabled=true", "teacher.model_name=org/student"]
    short = ["policy.max_total_sequence_length=100", "teacher.max_total_sequence_length=60"]
    assert "teacher.max_total_sequence_length" in errors(*short)  # one prompt for both: it must fit
    assert "leaves no room for a prefix" in warnings(*on, *short, "policy.generation.max_new_tokens=60")
    assert warnings(*on, *short, "policy.generation.max_new_tokens=50") == ""
    assert (
        "at least 2"
        in errors(*on, *short[:1], "teacher.max_total_sequence_length=1")["teacher.max_total_sequence_length"]
    )


def test_an_extractor_by_pattern():
    where = "distillation.context_distillation.trace_extractor"
    on = ["distillation.context_distillation.enabled=true", "teacher.model_name=org/student"]
    assert set(errors(*on, f"{where}.type=regex")) == {f"{where}.pattern"}
    assert set(errors(*on, f"{where}.pattern=a(b)")) == {f"{where}.pattern"}
    assert errors(*on, f"{where}.type=regex", f"{where}.pattern=a(b)") == {}


@pytest.mark.parametrize("source", ["ema", "live"])
def test_a_moving_teacher_lives_with_the_student(source):
    on = {
        "distillation": {"context_distillation": {"enabled": True, "frozen_teacher_source": source}},
        "teacher": {"model_name": "org/student"},
    }
    assert errors(tree=on) == {}
    assert "training devices" in errors(tree=merge(ISOLATED, on))["distillation.resource_isolation.enabled"]
    assert "weights that move" in errors("distillation.val_teacher=true", tree=on)["distillation.val_teacher"]
    assert set(errors("teacher.precision=float32", tree=on)) == {"teacher.precision"}
    split = ["policy.dtensor_cfg.tensor_parallel_size=2", "cluster.gpus_per_node=2"]
    assert errors(*split, tree=on) == {}
    assert set(errors(*split, "teacher.dtensor_cfg.tensor_parallel_size=1", tree=on)) == {
        "teacher.dtensor_cfg.tensor_parallel_size"
    }


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Solve: {}", None),
        ("Box it: \\boxed{{}}\n{}", None),
        ("Solve this.", "has no {}"),
        ("Box it: \\boxed{{}}", "has no {}"),
        ("Solve {problem}", "cannot be filled"),
        ("Solve {} in \\frac{1}{2}", "cannot be filled"),
        ("open { brace", "cannot be filled"),
    ],
)
def test_prompt_files_take_a_problem(tmp_path, text, problem):
    (tmp_path / "prompt.txt").write_text(text)
    found = errors("data.default.prompt_file=prompt.txt")
    assert (set(found) == {"data.train.prompt_file"}) is (problem is not None)
    if problem:
        assert problem in found["data.train.prompt_file"]


def test_every_dataset_of_a_list_is_checked():
    tree = {"data": {"train": [{"data_path": "a/b"}, {"data_path": "./none.jsonl"}], "validation": {}}}
    assert set(errors(tree=tree)) == {"data.train.1.data_path", "data.validation.data_path"}


def test_output_folders_can_be_written(tmp_path):
    (tmp_path / "taken").write_text("a file")
    found = errors("logger.log_dir=taken/run")
    assert set(found) == {"logger.log_dir"}  # the checkpoint folder is below it: one mistake, one message
    assert "is a file" in found["logger.log_dir"]
    elsewhere = "checkpointing.checkpoint_dir=taken/checkpoints"
    assert set(errors(elsewhere)) == {"checkpointing.checkpoint_dir"}
    assert not errors(elsewhere, "checkpointing.enabled=false")


def test_checking_writes_nothing(tmp_path):
    report("logger.log_dir=new/run")
    assert list(tmp_path.iterdir()) == []


def test_names_that_can_only_be_paths():
    assert looks_local("./x") and looks_local("/x/y") and looks_local("~/x") and looks_local("a/b/c")
    assert looks_local("data.jsonl")
    assert not looks_local("gpt2") and not looks_local("Qwen/Qwen3-0.6B")


# --- models -----------------------------------------------------------------------------------------------


def test_k_fits_both_vocabularies(tmp_path):
    small, large = model(tmp_path / "s", vocab_size=50), model(tmp_path / "t", vocab_size=70)
    names = [f"policy.model_name={small}", f"teacher.model_name={large}"]
    assert errors(*names, "distillation.topk_logits_k=50") == {}
    found = errors(*names, "distillation.topk_logits_k=51")
    assert set(found) == {"distillation.topk_logits_k"}
    assert "vocabulary" in found["distillation.topk_logits_k"] and "50" in found["distillation.topk_logits_k"]


def test_k_above_both_vocabularies_is_reported_once(tmp_path):
    name = model(tmp_path / "s", vocab_size=50)
    assert set(errors(f"policy.model_name={name}", f"teacher.model_name={name}")) == {"distillation.topk_logits_k"}


def test_attention_heads_divide(tmp_path):
    name = model(tmp_path / "m", num_attention_heads=8, num_key_value_heads=2, text_config=None)
    both = [f"policy.model_name={name}", f"teacher.model_name={name}", "cluster.gpus_per_node=24"]
    fits = [*both, "policy.train_global_batch_size=24", "distillation.num_prompts_per_step=24"]
    for tensor in (1, 2, 4, 8):
        assert errors(*fits, f"policy.dtensor_cfg.tensor_parallel_size={tensor}") == {}
    found = errors(*fits, "policy.dtensor_cfg.tensor_parallel_size=3", "teacher.dtensor_cfg.tensor_parallel_size=1")
    assert "8 attention heads" in found["policy.dtensor_cfg.tensor_parallel_size"]
    name = model(tmp_path / "n", text_config={"num_attention_heads": 12, "num_key_value_heads": 3})
    found = errors(
        *fits, f"teacher.model_name={name}", "teacher.dtensor_cfg.tensor_parallel_size=2", f"policy.model_name={name}"
    )
    assert "3 key-value heads" in found["teacher.dtensor_cfg.tensor_parallel_size"]


def test_positions_are_a_warning(tmp_path):
    name = model(tmp_path / "m", max_position_embeddings=4096)
    assert "4096 positions" in warnings(f"policy.model_name={name}", f"teacher.model_name={name}")


def test_vocabularies_agree_where_it_matters(tmp_path):
    words = {"a": 0, "b": 1, "c": 2}
    student = model(tmp_path / "s", words, vocab_size=4)
    same = model(tmp_path / "same", words, vocab_size=128)  # padded rows may differ
    other = model(tmp_path / "other", {"a": 0, "c": 1, "b": 2}, vocab_size=4)
    k = "distillation.topk_logits_k=2"
    assert errors(k, f"policy.model_name={student}", f"teacher.model_name={same}") == {}
    found = errors(k, f"policy.model_name={student}", f"teacher.model_name={other}")
    assert set(found) == {"teacher.model_name"}
    assert "2 ids differ, first 1, which is 'c' for the teacher and 'b' for the student" in found["teacher.model_name"]
    more = model(tmp_path / "more", words | {"<eos>": 3, "d": 4}, vocab_size=6)
    found = errors(k, f"policy.model_name={student}", f"teacher.model_name={more}")
    assert "2 ids differ, first 4, which is 'd' for the teacher and None" in found["teacher.model_name"]


def test_padding_rows_are_no_tokens(tmp_path):
    name = model(tmp_path / "s", {"a": 0, "b": 1}, vocab_size=128)
    both = [f"policy.model_name={name}", f"teacher.model_name={name}"]
    assert errors(*both, "distillation.topk_logits_k=3") == {}
    assert "3 tokens" in errors(*both, "distillation.topk_logits_k=4")["distillation.topk_logits_k"]


def test_without_tokenizer_files_sizes_are_compared(tmp_path):
    names = [
        f"policy.model_name={model(tmp_path / 's', vocab_size=100)}",
        f"teacher.model_name={model(tmp_path / 't', vocab_size=128)}",
    ]
    assert "Vocabulary sizes differ" in warnings(*names)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in errors("policy.model_name=./empty")["policy.model_name"]
    broken = model(tmp_path / "broken")
    Path(broken, "config.json").write_text("{")
    assert "cannot be read" in errors("policy.model_name=./broken")["policy.model_name"]
    Path(tmp_path, "file").write_text("x")
    assert "is a file" in errors("policy.model_name=./file")["policy.model_name"]


def test_a_misspelt_folder_is_suggested(tmp_path):
    model(tmp_path / "models" / "teacher")
    assert f"Meant {tmp_path / 'models' / 'teacher'}?" in warnings("teacher.model_name=models/techer")


def test_cached_models_are_found_and_offline_ones_must_be(tmp_path, monkeypatch):
    for revision in ("old", "new"):
        model(tmp_path / "hub" / "models--org--student" / "snapshots" / revision, vocab_size=50)
    (tmp_path / "hub" / "models--org--student" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--student" / "refs" / "main").write_text("old\n")
    folder = find_folder("org/student")
    assert folder is not None and folder.name == "old"
    assert set(errors()) == {"distillation.topk_logits_k"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = errors("distillation.topk_logits_k=8")
    assert set(found) == {"teacher.model_name"}
    assert "HF_HUB_OFFLINE" in found["teacher.model_name"]


def test_files_of_weights(tmp_path):
    name = model(tmp_path / "m", vocab_size=100)
    (tmp_path / "m" / "model.safetensors").unlink()
    both = [f"policy.model_name={name}", f"teacher.model_name={name}"]
    assert "holds no weights" in warnings(*both)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "m" / "model-1.safetensors").touch()
    assert "1 of its files are not there: model-2.safetensors" in errors(*both)["policy.model_name"]
    (tmp_path / "m" / "model-2.safetensors").touch()
    assert (errors(*both), warnings(*both)) == ({}, "")


def test_a_chat_template_is_there(tmp_path):
    name = model(tmp_path / "m", {"a": 0, "b": 1}, vocab_size=100)
    both = [f"policy.model_name={name}", f"teacher.model_name={name}", "distillation.topk_logits_k=2"]
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    keys = {"policy.tokenizer.chat_template", "teacher.tokenizer.chat_template"}
    assert set(errors(*both)) == keys
    assert errors(*both, "policy.tokenizer.chat_template={{ messages }}") == {}
    assert "no such file" in errors(*both, "policy.tokenizer.chat_template=t.jinja")["policy.tokenizer.chat_template"]
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    assert errors(*both) == {}


def test_published_sizes_stand_in_for_a_model_that_is_elsewhere():
    names = ["policy.model_name=Qwen/Qwen3-0.6B", "teacher.model_name=Qwen/Qwen3-32B"]
    assert errors(*names) == {}
    assert "151936 tokens" in errors(*names, "distillation.topk_logits_k=151937")["distillation.topk_logits_k"]
    sharded = [*names, "cluster.gpus_per_node=5", "teacher.dtensor_cfg.tensor_parallel_size=5"]
    batch = ["policy.train_global_batch_size=5", "distillation.num_prompts_per_step=5"]
    assert "64 attention heads" in errors(*sharded, *batch)["teacher.dtensor_cfg.tensor_parallel_size"]


def test_the_intermediate_size_and_the_vocabulary_divide(tmp_path):
    two = ["cluster.gpus_per_node=2", "policy.dtensor_cfg.tensor_parallel_size=2"]
    for number, (sizes, words) in enumerate(
        (({"intermediate_size": 7}, "intermediate size 7"), ({"vocab_size": 1}, "without any of the model's 1"))
    ):
        name = model(tmp_path / str(number), num_attention_heads=4, **sizes)
        found = errors(*two, f"policy.model_name={name}", f"teacher.model_name={name}", "distillation.topk_logits_k=1")
        assert words in found["policy.dtensor_cfg.tensor_parallel_size"]


# --- names and files --------------------------------------------------------------------------------------


def test_names_of_torch_and_of_datasets():
    assert "Did you mean torch.optim.AdamW?" in errors("policy.optimizer.name=AdmaW")["policy.optimizer.name"]
    assert errors("policy.optimizer.name=torch.optim.SGD") == {}
    entries = "policy.scheduler=[{name: torch.optim.lr_scheduler.LinearLR}, {name: ConstLR}, {milestones: [5]}]"
    assert "ConstantLR" in errors(entries)["policy.scheduler.1.name"]
    unknown = ["data.train.data_path=null", "data.train.dataset_name=DeepScalr"]
    assert "Did you mean DeepScaler?" in errors(*unknown)["data.train.dataset_name"]
    assert errors(unknown[0], "data.train.dataset_name=org/some-dataset") == {}


def test_columns_of_a_local_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n{"problem": "1 + 1", "answer": "2", "solution": "two"}\n')
    file = ["data.train.data_path=rows.jsonl", "data.train.input_key=problem", "data.train.output_key=answer"]
    assert errors(*file) == {}
    assert "Write data.train.input_key=problem" in errors(*file, "data.train.input_key=problm")["data.train.input_key"]
    assert set(errors(*file, "data.train.filter_column=domain")) == {"data.train.filter_column"}
    where = "distillation.context_distillation"
    static = [*file, f"{where}.enabled=true", f"{where}.trace_source=static_dataset", "teacher.model_name=org/student"]
    key = f"{where}.static_trace.answer_column"
    assert set(errors(*static, f"{key}=solutions")) == {key}
    assert errors(*static, f"{key}=solution") == {}


def test_checkpoints_that_cannot_be_kept_by_their_metric():
    held_out = ["distillation.val_period=20", "data.train.split_validation_size=512"]
    assert "save_period=10 is no multiple of distillation.val_period=20" in warnings(*held_out)
    assert "multiple" not in warnings(*held_out, "checkpointing.save_period=40")
    assert "multiple" not in warnings(*held_out, "checkpointing.metric_name=null")
    stop = ["checkpointing.enabled=false", "checkpointing.checkpoint_must_save_by='00:01:00:00'"]
    assert set(errors(*stop)) == {"checkpointing.checkpoint_must_save_by"}


def test_wandb_needs_a_key(monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/nowhere"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert "WANDB_API_KEY" in warnings("logger.wandb_enabled=true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_API_KEY" not in warnings("logger.wandb_enabled=true")


def test_memory_that_a_gpu_does_not_have(monkeypatch):
    monkeypatch.setattr(fits, "here", lambda: "")
    names = ["policy.model_name=Qwen/Qwen3-32B", "teacher.model_name=Qwen/Qwen3-32B", "cluster.gpus_per_node=4"]
    (found,) = fits.memory_warnings(recipe_from(BASE, names))
    assert found.startswith("training + generation + teacher: by the plan") and "Turn first: policy" in found
    monkeypatch.setattr(fits, "here", lambda: "b200")
    small = ["policy.model_name=Qwen/Qwen3-0.6B", "teacher.model_name=Qwen/Qwen3-0.6B"]
    assert fits.memory_warnings(recipe_from(BASE, small)) == []
    assert fits.memory_warnings(recipe_from(BASE, [*names[:2], "cluster.gpus_per_node=0"])) == []
    assert fits.memory_warnings(recipe_from(BASE)) == []  # sizes of org/student are not known


# --- one process ------------------------------------------------------------------------------------------


def test_a_recipe_for_a_cluster_says_how_to_run_it_here():
    loaded = load_recipe(FIXTURES / "fork_topk512_1b7.yaml")
    found = local_run_problems(loaded)
    assert {error.key for error in found} >= {
        "policy.generation.backend",
        "distillation.resource_isolation.enabled",
        "cluster.num_nodes",
        "policy.dtensor_cfg.tensor_parallel_size",
        "teacher.dtensor_cfg.tensor_parallel_size",
    }
    overrides = [error.remedy.removeprefix("Add ") for error in found]
    again = load_recipe(FIXTURES / "fork_topk512_1b7.yaml", overrides)
    assert local_run_problems(again) == []
    assert check(again).errors == []


def test_a_local_recipe_has_no_such_problem():
    assert local_run_problems(recipe_from(BASE)) == []
    assert local_run_problems(recipe_from(BASE, ["cluster.gpus_per_node=0"])) == []
    assert [one.key for one in local_run_problems(recipe_from(BASE, ["distillation.max_off_policy_steps=1"]))] == [
        "distillation.max_off_policy_steps"
    ]


# ---------------------------------------------------------------- quantised students


def _sized(folder, **sizes):
    folder.mkdir(exist_ok=True)
    config = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 101}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | sizes))
    (folder / "model.safetensors").touch()
    return [f"policy.model_name={folder}", f"teacher.model_name={folder}", "cluster.gpus_per_node=4"]


def test_a_quantised_student_has_no_adapters_and_a_teacher_of_its_own(tmp_path):
    given = [*_sized(tmp_path / "m"), "policy.quant_cfg=default"]
    assert errors(*given) == {}
    found = errors(*given, "policy.dtensor_cfg.lora_cfg.enabled=true")
    assert "adapters are trained over weights that stay as they are" in found["policy.quant_cfg"]
    shared = ["distillation.context_distillation.enabled=true", "data.train.output_key=solution",
              "distillation.context_distillation.teacher_prefix_template='{problem} {trace}'"]  # fmt: skip
    source = "distillation.context_distillation.frozen_teacher_source"
    assert errors(*given, *shared) == {}
    assert "the student's own model, quantised" in errors(*given, *shared, f"{source}=live")[source]


@pytest.mark.parametrize(
    ("tensor", "more", "words"),
    [
        (1, [], ""),
        (2, [], ""),  # 64 and 96 inputs: parts of 32 and 48
        (4, [], "cuts the 96 inputs of mlp.down_proj"),
        (4, ["policy.quant_exclude_modules=[down_proj]"], ""),  # parts of 16
        (4, ["policy.quant_cfg=null"], ""),
    ],
)
def test_tensor_parallelism_leaves_blocks_of_sixteen_whole(tmp_path, tensor, more, words):
    key = "policy.dtensor_cfg.tensor_parallel_size"
    own = "teacher.dtensor_cfg.tensor_parallel_size=1"
    found = errors(*_sized(tmp_path / "m"), "policy.quant_cfg=default", f"{key}={tensor}", own, *more)
    assert set(found) == ({key} if words else set()) and words in found.get(key, "")
    assert not words or "Use one of 1, 2, or add down_proj" in found[key]


def test_inputs_that_are_no_blocks_are_named(tmp_path):
    found = errors(*_sized(tmp_path / "m", intermediate_size=100), "policy.quant_cfg=default")
    assert "mlp.down_proj has 100 inputs, no multiple of NVFP4's block of 16" in found["policy.quant_cfg"]


def test_a_blend_by_name_is_checked_without_its_file():
    assert "there is no file datablend_openscience_chat.json" in warnings("data.blend.name=openscience_chat")
    assert "no file mine.json" in errors("data.blend.path=mine.json")["data.blend.path"]
