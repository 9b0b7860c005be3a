"""The shipped recipes: each loads and is sound, is what its name says, and answers to the names it has in runbooks."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.catalogue import catalogue
from fastkd.checks import check
from fastkd.config.shipped import ALIASES, aliases, find_recipe, shipped
from fastkd.errors import RecipeError
from fastkd.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
# name: nodes × GPUs, (training, generation, teacher) devices, student TP CP DP (EP), teacher the same, student, teacher
LAYOUTS = {
    "distillation_math": ((1, 8), (8, 8, 8), (2, 2, 2), (4, 2, 1), "Qwen3-1.7B-Base", "Qwen3-4B"),
    "distill_1n4g": ((1, 4), (4, 4, 4), (1, 1, 4), (2, 1, 2), "Qwen3-0.6B", "Qwen3-4B"),
    "32b_to_1.7b_1n8g": ((1, 8), (8, 8, 8), (1, 1, 8), (4, 1, 2), "Qwen3-1.7B-Base", "Qwen3-32B"),
    "32b_to_1.7b_1n4g": ((1, 4), (4, 4, 4), (1, 1, 4), (4, 1, 1), "Qwen3-1.7B-Base", "Qwen3-32B"),
    "32b_to_4b_2n8g": ((2, 8), (16, 16, 16), (2, 2, 4), (4, 2, 2), "Qwen3-4B-Base", "Qwen3-32B"),
    "32b_to_4b_2n8g_seqpack": ((2, 8), (16, 16, 16), (2, 1, 8), (8, 1, 2), "Qwen3-4B-Base", "Qwen3-32B"),
    "32b_to_4b_2n4g": ((2, 4), (8, 8, 8), (2, 2, 2), (4, 2, 1), "Qwen3-4B-Base", "Qwen3-32B"),
    "14b_to_4b_2n4g": ((2, 4), (8, 8, 8), (2, 2, 2), (4, 2, 1), "Qwen3-4B-Base", "Qwen3-14B"),
    "32b_to_4b_3n4g_isolated": ((3, 4), (4, 4, 4), (2, 1, 2), (4, 1, 1), "Qwen3-4B-Base", "Qwen3-32B"),
    "smoke_isolated_14b_to_4b": ((3, 4), (4, 4, 4), (2, 1, 2), (4, 1, 1), "Qwen3-4B-Base", "Qwen3-14B"),
    "smoke_isolated_8b_to_4b": ((3, 4), (4, 4, 4), (2, 1, 2), (2, 1, 2), "Qwen3-4B-Base", "Qwen3-8B"),
    "smoke_isolated_4b_to_1.7b": ((3, 4), (4, 4, 4), (2, 1, 2), (2, 1, 2), "Qwen3-1.7B-Base", "Qwen3-4B"),
    "olmo2_32b_8gpu": ((5, 4), (8, 8, 4), (1, 1, 8), (4, 1, 1), "OLMo-2-0325-32B", "OLMo-2-0325-32B-Instruct"),
    "olmo2_32b_16gpu": ((7, 4), (16, 8, 4), (1, 1, 16), (4, 1, 1), "OLMo-2-0325-32B", "OLMo-2-0325-32B-Instruct"),
    "qad_cpu": ((1, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1), "student", "student"),
    "qad_qwen3_8b": ((1, 8), (8, 8, 8), (1, 1, 8), (1, 1, 8), "Qwen3-8B", "Qwen3-8B"),
    "qad_qwen3_30b_a3b": ((4, 8), (32, 32, 32), (4, 1, 8, 8), (4, 1, 8, 8), *["Qwen3-30B-A3B-Thinking-2507"] * 2),
    "qad_qwen3_30b_a3b_2n": ((2, 8), (16, 16, 16), (4, 1, 4, 4), (4, 1, 4, 4), *["Qwen3-30B-A3B-Thinking-2507"] * 2),
}  # the context recipes are in test_context_recipes.py
LONG = ("32b_to_4b_2n4g", "32b_to_4b_2n8g", "14b_to_4b_2n4g")
# Names that people type, from their runbooks.
RUNBOOK = {
    "examples/configs/recipes/llm/distill_topk512_qwen3_1b7.yaml": "topk512_qwen3_1b7",
    "examples/configs/recipes/llm/distill_topk512_qwen3_1b7_p64_g4.yaml": "topk512_qwen3_1b7_p64_g4",
    "recipes/distill_topk512_qwen3_14b.yaml": "topk512_qwen3_14b",
    "topk512_qwen3_8b": "topk512_qwen3_8b",
    "topk512_qwen3_4b.v1.yaml": "topk512_qwen3_4b",
    "examples/configs/distillation_math.yaml": "distillation_math",
    "examples/configs/recipes/llm/my-distillation-1n4g.yaml": "distill_1n4g",
    "my-context-self-distillation-1n4g.yaml": "context_self_distill_1n4g",
    "context-self-distill-qwen3-4b-3n4g.v1.yaml": "context_self_distill_4b",
    "distillation-qwen3-32b-to-1.7b-base-1n4g-fsdp2tp1.v1.yaml": "32b_to_1.7b_1n4g",
    "distillation-qwen3-4b-to-1.7b-3n4g-isolated-smoke.v1.yaml": "smoke_isolated_4b_to_1.7b",
    "32b_to_1.7b_1n8g.yaml": "32b_to_1.7b_1n8g",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_recipe_is_sound(name):
    loaded = load_recipe(shipped()[name])
    report = check(loaded)
    assert report.errors == [] and loaded.ignored == []
    # Each says at its top what it is, and, where a runbook has another name for it, which.
    comment = [line for line in loaded.path.read_text().splitlines() if line.startswith("#")]
    assert comment and all(other in "\n".join(comment) for other in ALIASES.get(name, ()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    recipe = load_recipe(shipped()[name]).recipe
    sizes = recipe.role_sizes

    def cut(model, devices):
        tensor, context = model.dtensor_cfg.tensor_parallel_size, model.dtensor_cfg.context_parallel_size
        experts = model.dtensor_cfg.expert_parallel_size
        return tensor, context, devices // (tensor * context), *([experts] if experts > 1 else [])

    assert (
        (recipe.cluster.num_nodes, recipe.cluster.gpus_per_node),
        tuple(sizes),
        cut(recipe.policy, sizes.training),
        cut(recipe.teacher, sizes.teacher),
        recipe.policy.model_name.split("/")[1],
        recipe.teacher.model_name.split("/")[1],
    ) == LAYOUTS[name]
    loop = recipe.distillation
    if name.startswith("qad"):
        assert loop.topk_logits_k == (32 if name == "qad_cpu" else 128)
        assert recipe.loss_fn.kl_type == "forward" and recipe.policy.quant_cfg == "default"
        return
    assert loop.topk_logits_k == 64
    assert recipe.loss_fn.kl_type == ("mixed" if name in ("distillation_math", "distill_1n4g") else "reverse")
    if name in LONG:
        assert recipe.policy.max_total_sequence_length == 20480
    if name.startswith("smoke"):
        assert (loop.num_prompts_per_step, loop.max_num_steps) == (16, 20)


def test_every_recipe_is_listed():
    assert set(LAYOUTS) <= set(shipped())
    assert set(ALIASES) <= set(shipped())


@pytest.mark.parametrize("given", RUNBOOK)
def test_runbook_names(given):
    assert find_recipe(Path(given)) == shipped()[RUNBOOK[given]]
    assert load_recipe(given).path.stem == RUNBOOK[given]


def test_all_aliases_lead_back():
    for name in shipped():
        for other in aliases(name):
            assert find_recipe(Path(f"{other}.v1.yaml")).stem == name


def test_own_files_come_first_and_slips_are_errors(tmp_path):
    mine = tmp_path / "topk512_qwen3_4b.yaml"
    mine.write_text("policy: {model_name: s}\nteacher: {model_name: t}\ndata: {train: {data_path: d}}\n")
    assert load_recipe("topk512_qwen3_4b.yaml").recipe.policy.model_name == "s"
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe("mine/topk512_qwen3_4b.yaml")  # the folder is there, so that is a slip of the user's own
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe("topk512_qwen3_5b")


def test_a_check_needs_no_torch():
    code = "import sys; from fastkd.run import main; code = main(['topk512_qwen3_14b', '--check'])\n"
    code += "heavy = {'torch', 'transformers', 'ray', 'vllm', 'numpy', 'datasets'} & set(sys.modules)\n"
    code += "sys.exit(code or bool(heavy) and str(heavy))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "The recipe is valid" in done.stdout


def test_the_list_is_up_to_date():
    written = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert written == catalogue(), "run: python -m fastkd.catalogue > recipes/README.md"
    assert all(f"`{name}`" in written for name in shipped())
    rows = {line.split("`")[1]: line.count(" EP8 ") for line in written.splitlines() if line.startswith("| `")}
    assert rows["qad_qwen3_30b_a3b"] == 2 and sum(rows.values()) == 2  # student and teacher
