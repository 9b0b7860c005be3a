"""Twenty mistakes: each is one paragraph with key, value, rule and remedy, exit code 2, and nothing written.

The three that are not the user's mistake (a long prompt, a damaged checkpoint, NaN) are in test_runner.py.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from fastkd.run import main

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "arithmetic_cpu.yaml"


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path, monkeypatch, arithmetic):
    """A folder with the ingredients of mistakes; the current folder of the test."""
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(70)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "prompt.txt").write_text("Solve this.")
    (tmp_path / "a.yaml").write_text("defaults: b.yaml\n")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\n")
    (tmp_path / "file").touch()
    (tmp_path / "typo.yaml").write_text(f"defaults: {RECIPE}\npolicy:\n  dtensor_cfg:\n    tensor_parallel_sise: 2\n")
    (tmp_path / "broken.yaml").write_text("policy:\n  model_name: x\n bad: [\n")
    # The same teacher with two ids of its tokenizer exchanged.
    other = tmp_path / "other_teacher"
    shutil.copytree(arithmetic / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.chdir(tmp_path)
    return tmp_path


R = str(RECIPE)
CASES = {
    "a misspelt key": (
        ["typo.yaml"],
        "policy.dtensor_cfg.tensor_parallel_sise: unknown key",
        "policy.dtensor_cfg.tensor_parallel_size",
    ),
    "a misspelt override": ([R, "distillation.max_num_step=3"], "distillation.max_num_step", "max_num_steps"),
    "a wrong type": ([R, "distillation.max_num_steps=many"], "distillation.max_num_steps='many'", "number"),
    "a missing recipe": (["nowhere.yaml"], "nowhere.yaml", ""),
    "a circular defaults": (["a.yaml"], "b.yaml", "a.yaml"),
    "broken YAML": (["broken.yaml"], "broken.yaml", "line 3"),
    "a missing model": ([R, "policy.model_name=./no/student"], "policy.model_name='./no/student'", ""),
    "a missing dataset": ([R, "data.train.data_path=./no.jsonl"], "data.train.data_path='./no.jsonl'", ""),
    "an empty dataset": ([R, "data.train.data_path=empty.jsonl"], "data.train", "empty"),
    "a missing column": (
        [R, "data.train.data_path=rows.jsonl", "data.train.input_key=problm"],
        "data.train.input_key='problm'",
        "data.train.input_key=problem",
    ),
    "a prompt_file without {}": ([R, "data.train.prompt_file=prompt.txt"], "prompt.txt", "{}"),
    "K > V": ([R, "distillation.topk_logits_k=5000"], "distillation.topk_logits_k=5000", "vocabulary"),
    "K = 0": ([R, "distillation.topk_logits_k=0"], "distillation.topk_logits_k=0", ""),
    "GBS not divisible": ([R, "policy.train_global_batch_size=48"], "48", "64"),
    "a negative learning rate": ([R, "policy.optimizer.kwargs.lr=-1e-3"], "policy.optimizer.kwargs.lr=-0.001", ""),
    "an unknown kl_type": ([R, "loss_fn.kl_type=revers"], "loss_fn.kl_type='revers'", "reverse"),
    "a mixed weight of 1.5": ([R, "loss_fn.mixed_kl_weight=1.5"], "loss_fn.mixed_kl_weight=1.5", "1"),
    "vocabularies that differ": ([R, "teacher.model_name=other_teacher"], "teacher.", "vocabular"),
    "a folder that cannot be written": ([R, "logger.log_dir=file/run"], "logger.log_dir='file/run'", "written"),
    "an unknown optimizer": ([R, "policy.optimizer.name=torch.optim.AdmW"], "policy.optimizer.name", "Adam"),
    "an unknown scheduler": ([R, "policy.scheduler=[{name: LinearRL}]"], "policy.scheduler.0.name", "LinearLR"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_paragraph_exit_code_two_nothing_written(place, capsys, name):
    arguments, culprit, hint = CASES[name]
    if not any(one.startswith("logger.log_dir") for one in arguments) and arguments[0] == R:
        arguments = [*arguments, "logger.log_dir=run"]
    before = files(place)
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert culprit in told and hint in told
    assert "Traceback" not in told
    paragraph = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(paragraph) == 1, told
    assert paragraph[0].count(". ") >= 1, "key and rule, then a remedy"
    assert files(place) == before


def test_several_problems_are_told_at_once(place, capsys):
    assert main([R, "loss_fn.kl_type=revers", "distillation.topk_logits_k=0", "logger.log_dir=run"]) == 2
    told = capsys.readouterr().err
    assert "loss_fn.kl_type" in told and "distillation.topk_logits_k" in told


def test_a_missing_package_is_named_with_its_pip_command(place, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    assert main([R, "logger.wandb_enabled=true", "logger.log_dir=run"]) == 2
    assert "pip install 'fastkd[wandb]'" in capsys.readouterr().err
    assert not (place / "run").exists()


@pytest.mark.skipif(os.access("/proc/1/root", os.R_OK) and os.geteuid() != 0, reason="needs a folder that stays closed")
def test_a_folder_of_the_system_cannot_be_written(place, capsys):
    assert main([R, "logger.log_dir=/proc/fastkd"]) == 2
    assert "cannot be written" in capsys.readouterr().err
