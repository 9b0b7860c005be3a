"""The command line: exit codes, one paragraph per mistake, nothing written, and no heavy imports for --check."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastkd import run as command
from fastkd.errors import MissingDependency, ModelError, NonFiniteLoss, WorkerError

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).resolve().parent / "recipes"
RECIPE = """\
distillation: {num_prompts_per_step: 8, val_period: 0}
policy: {model_name: org/student, train_global_batch_size: 8}
teacher: {model_name: org/teacher}
data: {train: {data_path: org/data}}
"""


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Names of models that are not cached are taken on trust, as they are where there is a network."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def runner(monkeypatch):
    """Puts a stand-in for the loop in place, so that the command line alone is under test."""

    def install(run):
        module = types.ModuleType("fastkd.runner")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fastkd.runner", module)

    return install


def test_check_imports_nothing_heavy_and_writes_nothing(tmp_path):
    code = (
        "import sys\n"
        "from fastkd.run import main\n"
        f"assert main([{str(ROOT / 'recipes' / 'distillation_math.yaml')!r}, '--check']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'pandas', 'ray', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "128 prompts × 1 = 128 rollouts" in done.stdout
    assert "2 optimizer step(s) of 64" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_process_with_code_2_and_no_traceback(recipe):
    done = subprocess.run(
        [sys.executable, "-m", "fastkd.run", str(recipe), "policy.precision=fp8"],
        cwd=recipe.parent,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: policy.precision='fp8': must be one of bfloat16, float32.")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in recipe.parent.iterdir()] == ["mine.yaml"]


def test_check_summarises(capsys):
    assert command.main([str(FIXTURES / "fork_topk512_1b7.yaml"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "reverse KL; outside the top-k: zero" in out
    assert "train=4, generation=8, teacher=4 GPUs; student TP2 CP1 DP2, teacher TP2 CP1 DP2" in out
    assert "policy.megatron_cfg={…}: sharding" in out
    assert "Warnings:" in out and "loss_fn.temperature=0.6" in out
    assert "policy.generation.backend=transformers" in out


def test_check_and_overrides_mix_in_any_order(recipe, capsys):
    assert command.main(["--check", str(recipe), "distillation.topk_logits_k=7"]) == 0
    assert command.main([str(recipe), "distillation.topk_logits_k=7", "--check", "~loss_fn.kl_type"]) == 0
    assert capsys.readouterr().out.count("top 7 logits per token") == 2


def test_all_mistakes_are_printed(recipe, capsys):
    assert command.main([str(recipe), "loss_fn.kl_type=foward", "policy.optimizer.kwargs.lr=-1", "a.b=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "3 problems:" and len(lines) == 4
    assert all(line.startswith("error: ") for line in lines[1:])


def test_failed_checks_are_mistakes_too(recipe, capsys):
    assert command.main([str(recipe), "policy.train_global_batch_size=3", "--check"]) == 2
    assert "policy.train_global_batch_size=3" in capsys.readouterr().err


def test_a_missing_recipe(tmp_path, capsys):
    assert command.main([str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_cluster_recipe_is_not_started_without_ray(capsys, runner, monkeypatch):
    runner(lambda loaded: pytest.fail("must not start"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    assert command.main([str(FIXTURES / "nemo_distillation_math.yaml")]) == 2
    assert "Add policy.generation.backend=transformers" in capsys.readouterr().err


def test_a_run_gets_the_loaded_recipe(recipe, runner, capsys):
    seen = []
    runner(seen.append)
    assert command.main([str(recipe), "distillation.seed=5", "logger.mlflow_enabled=true"]) == 0
    assert seen[0].recipe.distillation.seed == 5
    assert "warning: logger.mlflow_enabled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "shows_traceback"),
    [
        (ModelError("policy.model_name", "cannot be loaded", "Give another"), 2, False),
        (MissingDependency("wandb", "is not installed", "pip install wandb"), 2, False),
        (KeyboardInterrupt(), 130, False),
        (NonFiniteLoss("loss is nan at step 3"), 1, True),
        (WorkerError("teacher", 0, RuntimeError("out of memory")), 1, True),
        (RuntimeError("a bug"), 1, True),
    ],
)
def test_exit_codes(recipe, runner, capsys, error, code, shows_traceback):
    def fail(loaded):
        raise error

    runner(fail)
    assert command.main([str(recipe)]) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) is shows_traceback
    assert str(error) in err


def test_a_mistake_that_a_worker_meets_is_still_a_mistake(recipe, runner, capsys):
    def fail(loaded):
        cause = ModelError("teacher.model_name", "cannot be loaded", "Give another")
        raise WorkerError("teacher", 0, cause) from cause

    runner(fail)
    assert command.main([str(recipe)]) == 2
    assert capsys.readouterr().err == "error: teacher.model_name: cannot be loaded. Give another.\n"


def test_a_missing_package_is_named_with_its_command(recipe, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastkd.runner", None)
    real = __import__

    def without_torch(name, *args, **kwargs):
        if name == "fastkd.runner":
            raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", without_torch)
    assert command.main([str(recipe)]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_help_shows_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "python -m fastkd.run recipes/arithmetic_cpu.yaml" in out
    assert "130 interrupted" in out


def test_unknown_options_are_mistakes(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["x.yaml", "--chekc"])
    assert stopped.value.code == 2
