"""Loading: inheritance, overrides, interpolation, fallback, errors that name the key, and the round trip."""

import textwrap
from pathlib import Path

import pytest

from fastkd.config.base import items_of, section_of
from fastkd.config.inherit import merge
from fastkd.config.names import keys, scalars
from fastkd.errors import RecipeError, RecipeErrors
from fastkd.recipe import load_recipe, recipe_from, resolve_path

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).resolve().parent / "recipes"
MINIMAL = {
    "policy": {"model_name": "org/student"},
    "teacher": {"model_name": "org/teacher"},
    "data": {"train": {"data_path": "org/data"}},
}


def minimal(*overrides):
    return recipe_from(MINIMAL, overrides).recipe


def problems(*overrides, tree=MINIMAL):
    """{key: message} of everything wrong."""
    with pytest.raises(RecipeErrors) as caught:
        recipe_from(tree, overrides)
    return {error.key: str(error) for error in caught.value.errors}


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return to


# --- defaults and derived values --------------------------------------------------------------------------


def test_a_minimal_recipe_gets_every_default():
    recipe = minimal()
    assert recipe.distillation.batch_size == 128
    assert recipe.policy.optimizer.kwargs == {"lr": 2e-5}
    assert recipe.policy.tokenizer.name == "org/student"
    assert recipe.teacher.tokenizer.name == "org/teacher"
    assert recipe.data.max_input_seq_length == recipe.policy.generation.max_new_tokens == 8192
    assert recipe.logger.log_dir == "runs/recipe"
    assert recipe.checkpointing.checkpoint_dir == "runs/recipe/checkpoints"
    assert not recipe.validation_enabled


def test_derived_defaults_follow_what_they_name():
    recipe = minimal("policy.max_total_sequence_length=512", "logger.log_dir=out", "cluster.gpus_per_node=4")
    assert recipe.data.max_input_seq_length == 512
    assert recipe.policy.generation.max_new_tokens == 512
    assert recipe.policy.generation.vllm_cfg.max_model_len == 512
    assert recipe.teacher.sequence_packing.logprob_mb_tokens == 512
    assert recipe.checkpointing.checkpoint_dir == "out/checkpoints"
    assert recipe.distillation.resource_isolation.roles.teacher.gpus_per_node == 4


def test_log_dir_is_named_after_the_file(write):
    path = write("nice name.yaml", "policy: {model_name: a}\nteacher: {model_name: b}\ndata: {train: {data_path: c}}\n")
    assert load_recipe(path).recipe.logger.log_dir == "runs/nice name"


def test_sampling_at_validation_falls_back_to_training():
    generation = minimal("policy.generation.temperature=0.6", "policy.generation.top_k=20").policy.generation
    assert generation.sampling() == generation.sampling(validation=True) == (0.6, 1.0, 20)
    greedy = minimal("policy.generation.val_temperature=0", "policy.generation.val_top_p=0.9").policy.generation
    assert greedy.sampling(validation=True) == (0.0, 0.9, 0)
    assert greedy.sampling() == (1.0, 1.0, 0)


def test_token_budget_of_micro_batches():
    assert minimal().policy.train_mb_tokens is None
    packed = minimal("policy.sequence_packing.enabled=true", "policy.sequence_packing.train_mb_tokens=100")
    assert (packed.policy.train_mb_tokens, packed.policy.logprob_mb_tokens) == (100, 8192)
    assert packed.teacher.logprob_mb_tokens == 8192
    assert minimal("policy.dynamic_batching.enabled=true").teacher.train_mb_tokens == 8192


def test_scheduler_entries():
    entries = "[{name: LinearLR, kwargs: {total_iters: 5}}, {name: ConstantLR}, {milestones: [5]}]"
    policy = minimal(f"policy.scheduler={entries}").policy
    assert [one.name for one in policy.schedulers] == ["LinearLR", "ConstantLR"]
    assert policy.milestones == [5]
    assert [one.name for one in minimal("policy.scheduler={name: ConstantLR}").policy.schedulers] == ["ConstantLR"]
    assert minimal("policy.scheduler=null").policy.scheduler == []


def test_role_sizes():
    assert minimal("cluster.gpus_per_node=0").role_sizes == (1, 1, 1)
    assert minimal("cluster.gpus_per_node=8", "cluster.num_nodes=2").role_sizes == (16, 16, 16)
    apart = ("cluster.gpus_per_node=8", "policy.generation.colocated.enabled=false")
    assert minimal(*apart, "policy.generation.colocated.resources.gpus_per_node=2").role_sizes == (6, 2, 6)
    assert load_recipe(FIXTURES / "fork_topk512_1b7.yaml").recipe.role_sizes == (4, 8, 4)


# --- files and inheritance --------------------------------------------------------------------------------


def test_parents_merge_left_to_right_then_the_child(write):
    write("sub/a.yaml", "distillation: {seed: 1, topk_logits_k: 8, val_period: 5}\nloss_fn: {kl_type: forward}\n")
    write(
        "b.yaml",
        """
        distillation: {seed: 2, topk_logits_k: 9}
        policy: {model_name: s, generation: {stop_strings: [x, y]}}
        teacher: {model_name: t}
        data: {train: {data_path: d}}
        """,
    )
    child = write(
        "c.yaml",
        """
        defaults: [sub/a.yaml, b.yaml]
        distillation: {seed: 3}
        policy: {generation: {stop_strings: [z]}}
        """,
    )
    loaded = load_recipe(child)
    loop = loaded.recipe.distillation
    assert (loop.seed, loop.topk_logits_k, loop.val_period) == (3, 9, 5)
    assert loaded.recipe.loss_fn.kl_type == "forward"
    assert loaded.recipe.policy.generation.stop_strings == ["z"]
    assert [folder.name for folder in loaded.folders] == [child.parent.name, "sub"]


def test_grandparents_are_relative_to_the_file_that_names_them(write):
    write("base/far/root.yaml", "policy: {model_name: s}\nteacher: {model_name: t}\ndata: {train: {data_path: d}}\n")
    write("base/mid.yaml", "defaults: far/root.yaml\n")
    assert load_recipe(write("leaf.yaml", "defaults: base/mid.yaml\n")).recipe.policy.model_name == "s"


def test_override_marker_replaces_a_parents_section(write):
    write("p.yaml", "loss_fn: {kl_type: reverse, zero_outside_topk: true}\n")
    tree = "policy: {model_name: s}\nteacher: {model_name: t}\ndata: {train: {data_path: d}}\n"
    child = write("c.yaml", "defaults: p.yaml\nloss_fn: {_override_: true, kl_type: forward}\n" + tree)
    loss = load_recipe(child).recipe.loss_fn
    assert (loss.kl_type, loss.zero_outside_topk) == ("forward", False)


def test_circular_defaults_name_the_chain(write):
    write("a.yaml", "defaults: b.yaml\n")
    write("b.yaml", "defaults: c.yaml\n")
    path = write("c.yaml", "defaults: a.yaml\n")
    with pytest.raises(RecipeError, match=r"c\.yaml -> .*a\.yaml -> .*b\.yaml -> .*c\.yaml"):
        load_recipe(path)


def test_a_diamond_of_parents_is_no_circle(write):
    write("root.yaml", "policy: {model_name: s}\nteacher: {model_name: t}\ndata: {train: {data_path: d}}\n")
    write("l.yaml", "defaults: root.yaml\ndistillation: {seed: 7}\n")
    write("r.yaml", "defaults: root.yaml\ndistillation: {topk_logits_k: 7}\n")
    loop = load_recipe(write("leaf.yaml", "defaults: [l.yaml, r.yaml]\n")).recipe.distillation
    assert (loop.seed, loop.topk_logits_k) == (7, 7)


def test_missing_files_say_who_asked_and_what_is_near(write):
    child = write("child.yaml", "defaults: parrent.yaml\n")
    write("parent.yaml", "loss_fn: {}\n")
    with pytest.raises(RecipeError, match=r"no such file \(named by defaults of .*child\.yaml\).*parent\.yaml"):
        load_recipe(child)
    with pytest.raises(RecipeError, match=r"no such file.*child\.yaml"):
        load_recipe(child.with_name("chidl.yaml"))
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(child.parent)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("policy:\n  model_name: a\n bad: indent\n", 3),
        ("policy: {model_name: a\nteacher: b\n", 2),
        ("loss_fn:\n  kl_type: forward\n  kl_type: reverse\n", 3),
        ("loss_fn: *nowhere\n", 1),
    ],
)
def test_yaml_errors_give_file_and_line(write, text, line):
    with pytest.raises(RecipeError, match=rf"broken\.yaml line {line}, column \d+: not valid YAML"):
        load_recipe(write("broken.yaml", text))


@pytest.mark.parametrize("text", ["- a\n- b\n", "3\n", "\x00\x01"])
def test_a_recipe_is_a_mapping(write, text):
    with pytest.raises(RecipeError, match=r"list\.yaml"):
        load_recipe(write("list.yaml", text))


def test_an_empty_file_lacks_the_required_keys(write):
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(write("empty.yaml", ""))
    assert [error.key for error in caught.value.errors] == ["policy.model_name", "teacher.model_name", "data.train"]


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00binary\x80")
    with pytest.raises(RecipeError, match=r"x\.yaml"):
        load_recipe(tmp_path / "x.yaml")


def test_numbers_without_a_point_are_numbers(write):
    path = write(
        "lr.yaml",
        """
        policy: {model_name: s, optimizer: {kwargs: {lr: 1e-5}}}
        teacher: {model_name: t}
        data: {train: {data_path: d}}
        """,
    )
    assert load_recipe(path).recipe.policy.optimizer.kwargs["lr"] == 1e-5


# --- overrides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_setting_a_key(sign):
    assert minimal(f"{sign}distillation.topk_logits_k=7").distillation.topk_logits_k == 7


def test_values():
    recipe = minimal(
        "policy.optimizer.kwargs.lr=1e-6",
        "policy.generation.stop_strings=[a, 'b c']",
        "policy.tokenizer.chat_template_kwargs={enable_thinking: true}",
        "policy.generation.vllm_kwargs={a:1,b:{c:x}}",
        "distillation.max_val_samples=null",
        "logger.wandb_enabled=False",
        "logger.wandb.name=123",
        "policy.model_name='quoted/name'",
        "teacher.model_name=a:b {c}",
        "data.train.filter_value=3",
    )
    assert recipe.policy.optimizer.kwargs["lr"] == 1e-6
    assert recipe.policy.generation.stop_strings == ["a", "b c"]
    assert recipe.policy.tokenizer.chat_template_kwargs == {"enable_thinking": True}
    assert recipe.policy.generation.vllm_kwargs == {"a": 1, "b": {"c": "x"}}
    assert recipe.distillation.max_val_samples is None
    assert recipe.logger.wandb.name == "123"
    assert recipe.policy.model_name == "quoted/name"
    assert recipe.teacher.model_name == "a:b {c}"
    assert recipe.data.train[0].filter_value == 3


def test_a_template_with_braces_needs_no_quotes():
    text = "{problem} and: {trace}"
    context = minimal(f"distillation.context_distillation.teacher_prefix_template={text}").distillation
    assert context.context_distillation.teacher_prefix_template == text


def test_mappings_merge_and_lists_replace():
    tree = MINIMAL | {"policy": {"model_name": "s", "optimizer": {"kwargs": {"lr": 1e-3, "eps": 1e-7}}}}
    kwargs = recipe_from(tree, ["policy.optimizer.kwargs={lr: 1e-4}"]).recipe.policy.optimizer.kwargs
    assert kwargs == {"lr": 1e-4, "eps": 1e-7}
    tree = MINIMAL | {"data": {"train": [{"data_path": "a"}, {"data_path": "b"}]}}
    train = recipe_from(tree, ["data.train.1.split=test"]).recipe.data.train
    assert [(one.data_path, one.split) for one in train] == [("a", None), ("b", "test")]
    train = recipe_from(tree, ["data.train=[{data_path: c}]"]).recipe.data.train
    assert [one.data_path for one in train] == ["c"]


def test_later_overrides_win_and_interpolations_survive():
    recipe = minimal("distillation.seed=1", "distillation.seed=2", "logger.log_dir=out/${distillation.seed}")
    assert recipe.logger.log_dir == "out/2"


def test_reset_to_the_default():
    tree = MINIMAL | {"distillation": {"seed": 9}, "logger": {"log_dir": "x"}}
    recipe = recipe_from(tree, ["~distillation.seed", "~logger", "~loss_fn.kl_type"]).recipe
    assert (recipe.distillation.seed, recipe.logger.log_dir, recipe.loss_fn.kl_type) == (42, "runs/recipe", "mixed")


def test_reset_of_a_teacher_key_is_the_students_value():
    tree = MINIMAL | {"teacher": {"model_name": "t", "precision": "float32"}}
    recipe = recipe_from(tree, ["~teacher.precision", "policy.max_total_sequence_length=64"]).recipe
    assert (recipe.teacher.precision, recipe.teacher.max_total_sequence_length) == ("bfloat16", 64)


@pytest.mark.parametrize(
    ("override", "key", "text"),
    [
        ("nonsense", "override 'nonsense'", "form key=value"),
        ("--lr=3", "override '--lr=3'", "form key=value"),
        ("a..b=3", "override 'a..b=3'", "form key=value"),
        ("policy.modelname=x", "policy.modelname", "Did you mean policy.model_name?"),
        ("~policy.modelname", "policy.modelname", "Did you mean policy.model_name?"),
        ("data.train.0.seed=1", "data.train.0", "data.train"),
        ("policy.model_name.x=1", "policy.model_name.x", "holds no keys"),
        ("policy.optimizer.kwargs=[1", "policy.optimizer.kwargs", "cannot be read"),
    ],
)
def test_bad_overrides(override, key, text):
    assert text in problems(override)[key]


def test_list_indices_are_checked():
    tree = MINIMAL | {"data": {"train": [{"data_path": "a"}]}}
    assert "has 1 entries" in problems("data.train.3.seed=1", tree=tree)["data.train.3"]
    assert "data.train.0.seed" in problems("data.train.seed=1", tree=tree)["data.train.seed"]


# --- interpolation ----------------------------------------------------------------------------------------


def test_resolvers():
    recipe = minimal(
        "policy.max_total_sequence_length=${mul:2,${div:512,2}}",
        "distillation.num_prompts_per_step=${add:${distillation.seed},22}",
        "policy.train_global_batch_size=${max:3,64}",
        "loss_fn.temperature=${div:3,2}",
    )
    assert recipe.policy.max_total_sequence_length == 512
    assert recipe.distillation.num_prompts_per_step == 64
    assert recipe.policy.train_global_batch_size == 64
    assert recipe.loss_fn.temperature == 1.5


def test_unresolvable_interpolations_are_all_reported():
    found = problems(
        "logger.log_dir=${nowhere.x}", "distillation.seed=${distillation.seed}", "loss_fn.temperature=${div:1,0}"
    )
    assert set(found) == {"logger.log_dir", "distillation.seed", "loss_fn.temperature"}
    assert "nowhere.x" in found["logger.log_dir"]
    assert all("cannot be resolved" in message for message in found.values())


def test_ignored_keys_may_interpolate_what_does_not_exist():
    tree = merge(MINIMAL, {"policy": {"megatron_cfg": {"lr": "${policy.megatron_cfg.nowhere}"}}})
    assert [key.name for key in recipe_from(tree).ignored] == ["policy.megatron_cfg"]


def test_mandatory_marker_counts_as_absent():
    assert "is required" in problems("teacher.model_name=???")["teacher.model_name"]


def test_an_interpolated_section_is_checked_too():
    tree = MINIMAL | {"spare": 1, "teacher": {"model_name": "t", "dtensor_cfg": "${policy.dtensor_cfg}"}}
    found = problems("policy.dtensor_cfg.tensor_parallel_sise=2", tree=tree)
    assert "policy.dtensor_cfg.tensor_parallel_sise" in found and "spare" in found


# --- fallback ---------------------------------------------------------------------------------------------


def test_the_teacher_falls_back_to_the_student_after_overrides():
    tree = MINIMAL | {"teacher": {"model_name": "t", "dtensor_cfg": {"tensor_parallel_size": 4}}}
    recipe = recipe_from(
        tree,
        [
            "policy.dtensor_cfg.context_parallel_size=2",
            "policy.dtensor_cfg.tensor_parallel_size=2",
            "policy.precision=float32",
            "policy.tokenizer.chat_template_kwargs={enable_thinking: false}",
        ],
    ).recipe
    sharding = recipe.teacher.dtensor_cfg
    assert (sharding.tensor_parallel_size, sharding.context_parallel_size) == (4, 2)
    assert recipe.teacher.precision == "float32"
    assert recipe.teacher.tokenizer.chat_template_kwargs == {"enable_thinking": False}
    assert recipe.teacher.tokenizer.name == "t"


def test_relative_interpolations_follow_the_teacher():
    tree = MINIMAL | {"policy": {"model_name": "s", "tokenizer": {"name": "${..model_name}"}}}
    assert recipe_from(tree).recipe.teacher.tokenizer.name == "org/teacher"


def test_the_teachers_name_never_falls_back():
    assert "teacher.model_name" in problems("~teacher.model_name")
    assert "teacher.model_name" in problems("~teacher")


def test_datasets_fall_back_to_data_default():
    tree = MINIMAL | {
        "data": {
            "default": {"input_key": "q", "prompt_file": "p.txt", "split": "x"},
            "train": {"data_path": "a", "prompt_file": None},
            "validation": [{"data_path": "b", "split": "y"}, {"data_path": "c"}],
        }
    }
    data = recipe_from(tree, ["data.default.output_key=a"]).recipe.data
    assert (data.train[0].input_key, data.train[0].output_key, data.train[0].prompt_file) == ("q", "a", None)
    assert [(one.split, one.prompt_file) for one in data.validation] == [("y", "p.txt"), ("x", "p.txt")]


def test_null_sections_count_as_absent():
    tree = MINIMAL | {"teacher": {"model_name": "t", "sequence_packing": None}, "loss_fn": None}
    recipe = recipe_from(tree, ["policy.sequence_packing.enabled=true"]).recipe
    assert recipe.teacher.sequence_packing.enabled and recipe.loss_fn.kl_type == "mixed"


def test_a_wrong_value_that_fell_back_is_reported_once():
    assert set(problems("policy.precision=fp16")) == {"policy.precision"}
    assert set(problems("policy.max_total_sequence_length=0")) == {"policy.max_total_sequence_length"}


# --- error messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "rule", "remedy"),
    [
        ("loss_fn.kl_type=foward", "loss_fn.kl_type", "must be one of forward, reverse, mixed, jsd", "forward?"),
        ("distillation.topk_logits_k=0", "distillation.topk_logits_k", "must be above 0", "Default: 64"),
        ("distillation.max_num_steps=many", "distillation.max_num_steps", "must be a whole number", "1000"),
        ("distillation.max_num_steps=1.5", "distillation.max_num_steps", "must be a whole number", "1000"),
        ("loss_fn.mixed_kl_weight=1.5", "loss_fn.mixed_kl_weight", "must be at most 1", "0.5"),
        ("policy.optimizer.kwargs.lr=-1e-5", "policy.optimizer.kwargs.lr", "must be a number above 0", "1e-6"),
        ("policy.generation.temperature=-1", "policy.generation.temperature", "must be at least 0", "1.0"),
        ("policy.generation.top_p=0", "policy.generation.top_p", "must be above 0", "1.0"),
        ("policy.generation.stop_strings=x", "policy.generation.stop_strings", "must be a list", "[a, b]"),
        ("logger.wandb_enabled=3", "logger.wandb_enabled", "must be true or false", "false"),
        ("data.train.split_validation_size=x", "data.train.split_validation_size", "must be a", "0"),
        ("checkpointing.metric_name=accuracy", "checkpointing.metric_name", "right form", "`val:`"),
        ("checkpointing.checkpoint_must_save_by=1h", "checkpointing.checkpoint_must_save_by", "form", "DD:HH:MM:SS"),
        ("policy.scheduler={name: A, milestones: [1]}", "policy.scheduler.0", "either name", "Split"),
        ("policy.scheduler=[{name: A},{name: B}]", "policy.scheduler", "need 1 milestones", "Add an entry"),
        ("policy=3", "policy", "must be a mapping", "below it"),
    ],
)
def test_each_problem_gives_key_rule_and_remedy(override, key, rule, remedy):
    found = problems(override)
    assert rule in found[key] and remedy in found[key]
    assert "pydantic" not in found[key] and "\n" not in found[key]


def test_all_problems_come_at_once():
    found = problems(
        "loss_fn.kl_type=foward",
        "policy.dtensor_cfg.tensor_parallel_sise=2",
        "distillation.topk_logits_k=0",
        "nonsense",
        "logger.log_dir=${nope}",
    )
    assert set(found) == {
        "loss_fn.kl_type",
        "policy.dtensor_cfg.tensor_parallel_sise",
        "distillation.topk_logits_k",
        "override 'nonsense'",
        "logger.log_dir",
    }
    key = "policy.dtensor_cfg.tensor_parallel_sise"
    assert found[key].startswith(f"{key}: unknown key. Did you mean policy.dtensor_cfg.tensor_parallel_size?")


def test_every_key_refuses_a_value_of_another_kind():
    """A mapping is no scalar and a scalar is no mapping: the errors name every key of the tree, all at once."""
    tree: dict = {}
    leaves = [
        key for key in keys() if section_of(key.field.annotation) is None and items_of(key.field.annotation) is None
    ]
    for key in leaves:
        node = tree
        *parents, leaf = key.name.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        takes = scalars(key.field.annotation)
        node[leaf] = 7 if object in takes and int not in takes else {"x": [1]}
    found = problems(tree=tree)
    assert [key.name for key in leaves if key.name not in found] == []


@pytest.mark.parametrize("name", ["distillation", "policy.dtensor_cfg", "data.train", "data", "policy.scheduler"])
def test_a_section_is_a_mapping(name):
    tree = merge(MINIMAL, {name: 7} if "." not in name else {name.split(".")[0]: {name.split(".")[1]: 7}})
    assert any(key == name or key.startswith(f"{name}.") for key in problems(tree=tree))


# --- NeMo RL recipes, shipped recipes, round trip ---------------------------------------------------------


def test_a_nemo_rl_recipe_loads_unchanged():
    loaded = load_recipe(FIXTURES / "nemo_distillation_math.yaml")
    recipe = loaded.recipe
    assert recipe.policy.dynamic_batching.train_mb_tokens == 8192
    assert recipe.policy.optimizer.kwargs["betas"] == [0.9, 0.999]
    assert (recipe.teacher.dtensor_cfg.tensor_parallel_size, recipe.policy.dtensor_cfg.tensor_parallel_size) == (4, 2)
    assert recipe.teacher.tokenizer.name == "Qwen/Qwen3-4B"
    assert recipe.checkpointing.checkpoint_dir == "checkpoints/distillation-Qwen/Qwen3-1.7B-Base"
    names = {key.name for key in loaded.ignored}
    assert {"policy.megatron_cfg", "teacher.optimizer", "cluster.segment_size", "data.num_workers"} <= names
    assert all(key.reason for key in loaded.ignored)
    assert "megatron_cfg" not in loaded.resolved["policy"]


def test_a_fork_recipe_loads_unchanged():
    recipe = load_recipe(FIXTURES / "fork_topk512_1b7.yaml").recipe
    assert (recipe.distillation.topk_logits_k, recipe.loss_fn.outside) == (512, "zero")
    assert recipe.teacher.model_name == recipe.policy.model_name == "Qwen/Qwen3-1.7B"
    assert recipe.distillation.resource_isolation.roles.generation.num_nodes == 2
    assert recipe.distillation.context_distillation.static_trace.answer_column == "ground_truth_solution"
    assert recipe.policy.generation.temperature == 0.6
    assert recipe.data.validation == [] and recipe.validation_enabled


def test_the_runbooks_overrides_apply():
    overrides = [
        "distillation.max_num_steps=5",
        "logger.wandb_enabled=False",
        "cluster.num_nodes=2",
        "cluster.gpus_per_node=4",
        "teacher.model_name=/p/hub/models--Qwen--Qwen3-8B/snapshots/b968",
        "checkpointing.checkpoint_dir='results/distill_2nodes'",
        "logger.wandb.name='distill-2nodes'",
        'loss_fn.kl_type="mixed"',
    ]
    recipe = load_recipe(FIXTURES / "nemo_distillation_math.yaml", overrides).recipe
    assert recipe.teacher.model_name == recipe.teacher.tokenizer.name == overrides[4].partition("=")[2]
    assert recipe.checkpointing.checkpoint_dir == "results/distill_2nodes"
    assert (recipe.loss_fn.kl_type, recipe.logger.wandb.name) == ("mixed", "distill-2nodes")


ALL = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted(FIXTURES.glob("*.yaml"))]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_the_resolved_recipe_loads_back_equal(path, tmp_path):
    loaded = load_recipe(path)
    loaded.dump(tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again.recipe == loaded.recipe
    assert again.ignored == []
    assert [one.name for one in tmp_path.iterdir()] == ["saved.yaml"]


@pytest.mark.parametrize("name", ["1e-5", "null", "true", "on", "12:30:45", "a: b", "- x", "#c", "'q'", "é ∑", " s "])
def test_awkward_text_survives_the_round_trip(name, tmp_path):
    tree = MINIMAL | {
        "logger": {"wandb": {"name": name}},
        "policy": {"model_name": "s", "generation": {"stop_strings": [name]}},
    }
    loaded = recipe_from(tree)
    loaded.dump(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").recipe == loaded.recipe
    assert loaded.recipe.logger.wandb.name == name


def test_an_escaped_interpolation_stays_text(tmp_path):
    loaded = recipe_from(MINIMAL | {"logger": {"wandb": {"name": "\\${not.a.key}"}}})
    assert loaded.recipe.logger.wandb.name == "${not.a.key}"
    loaded.dump(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").recipe == loaded.recipe


def test_inputs_are_not_changed():
    tree = {"policy": {"model_name": "s"}, "teacher": {"model_name": "t"}, "data": {"train": {"data_path": "d"}}}
    recipe_from(tree, ["policy.precision=float32", "data.train.seed=1"])
    assert tree == {
        "policy": {"model_name": "s"},
        "teacher": {"model_name": "t"},
        "data": {"train": {"data_path": "d"}},
    }


# --- paths ------------------------------------------------------------------------------------------------


def test_paths_are_looked_up_here_then_beside_the_recipe(tmp_path, monkeypatch):
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    for folder in (here / "both", recipes / "both", recipes / "model"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert resolve_path("both", recipes) == str(here / "both")
    assert resolve_path("model", recipes) == str(recipes / "model")
    assert resolve_path("Qwen/Qwen3-4B", recipes) == "Qwen/Qwen3-4B"
    assert resolve_path(str(recipes / "model")) == str(recipes / "model")


def test_a_parents_folder_is_searched_too(write, tmp_path, monkeypatch):
    write("parents/prompts/p.txt", "{}")
    tree = (
        "policy: {model_name: s}\nteacher: {model_name: t}\ndata: {train: {data_path: d, prompt_file: prompts/p.txt}}\n"
    )
    write("parents/root.yaml", tree)
    loaded = load_recipe(write("child.yaml", "defaults: parents/root.yaml\n"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert loaded.locate("prompts/p.txt") == str(tmp_path / "parents" / "prompts" / "p.txt")
