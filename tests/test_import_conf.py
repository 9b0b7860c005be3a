"""Shell configurations of the QAD scripts: what is read, what becomes of each variable, and what is never written."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastkd import import_conf
from fastkd.conf import models, schedule, variables
from fastkd.conf.convert import convert
from fastkd.conf.secrets import Secrets, is_secret
from fastkd.conf.shell import parse
from fastkd.config import Recipe
from fastkd.config.names import classify
from fastkd.errors import DataError

DENSE = """\
#!/bin/bash
export STUDENT_MODEL="Qwen3-8B"     # both are the same model
export TEACHER_MODEL=Qwen3-8B
MODELS=${MODELS_ROOT:-/data/models}
export STUDENT_CKPT="$MODELS/Qwen3-8B-NVFP4-TP8-MLM" TEACHER_CKPT="${MODELS}/Qwen3-8B-TP8-MLM"
export TEACHER_MODEL_CONFIG=''
export LR=2e-6 DATASET_NAME="openscience"
export TP_SIZE=8 PP_SIZE=1 EP_SIZE=1 MBS=16 NUM_GPUS=8 MASTER_PORT=29500
export QAD_CHECKPOINT_ROOT=/data/checkpoints MLM_DIR=/src/Megatron-LM
"""
SPARSE = """\
export STUDENT_MODEL=Qwen3-30B-A3B TEACHER_MODEL=Qwen3-30B-A3B
export STUDENT_CKPT=/m/Qwen3-30B-A3B-Thinking-2507-NVFP4-TP4-MLM
export TEACHER_CKPT=/m/Qwen3-30B-A3B-Thinking-2507-TP4-MLM
export DATASET_NAME=combined_v2_cot_chat
export TP_SIZE=4 EP_SIZE=8 MBS=1 NUM_GPUS=8
"""


@pytest.fixture
def conf(tmp_path):
    def write(text, name="x.conf"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def row(converted, variable):
    found = [one for one in converted.rows if one.variable == variable]
    assert found, f"no row for {variable}"
    return found[-1]


# --- the shell ----------------------------------------------------------------------------------------------------


def values(text, **environment):
    return {name: one.value for name, one in parse(text, environment).variables.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1", "1"),
        ("export A=1 B=2 # note", "1"),
        ("A='a $B b'", "a $B b"),
        ("B=x; A=\"<$B>\"'$B'$B", "<x>$Bx"),
        ("A=a#b", "a#b"),
        ("A=one\\\ntwo", "onetwo"),
        ("A=x\nA+=y", "xy"),
        ("A=(1 '2 3'\n  4 # note\n)\nA+=(5)", "1 2 3 4 5"),
        ("A=${B:-x}", "x"),
        ("B=\nA=${B:-x}", "x"),
        ("B=\nA=${B-x}", ""),
        ("A=${B:-${C:-deep}}", "deep"),
        (': "${A:=x}"', "x"),
        ("B=1\nA=${B:+yes}", "yes"),
        ("A=${B:+yes}", ""),
        ("A=${B:?must be set}", ""),
        ('A="two\nlines"', "two\nlines"),
        ("readonly A=1", "1"),
        ("declare -x A=1", "1"),
        ("A=1; A=2", "2"),
        ('A="say \\"hi\\" \\$B"', 'say "hi" $B'),
        ("A=${E}", "env"),
        ("A=$", "$"),
    ],
)
def test_assignments_are_read_as_bash_reads_them(text, expected, tmp_path):
    assert values(text, E="env")["A"] == expected
    script = tmp_path / "x.sh"
    script.write_text(f'{text}\nprintf %s "${{A[*]}}"')
    # For ${B:?…} bash stops; fastkd goes on and reports what is missing by name.
    if ":?" not in text:
        done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env={"E": "env"}, check=True)
        assert done.stdout == ("1 2 3 4 5" if "5" in text else expected)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=30))
def test_whatever_is_quoted_comes_back(text):
    assert values(f"A={shlex.quote(text)}; B=1") == {"A": text, "B": "1"}


@given(st.text("A=${}()'\"\\:-;&|# \n`ifx", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse(text)
    except DataError as error:
        assert "never closed" in str(error)
    else:
        assert all(isinstance(one.value, str) for one in found.variables.values())


@pytest.mark.parametrize(
    "text",
    [
        "if true; then\n  A=1\nfi",
        "if [ x ]; then A=1; else if y; then A=2; fi; A=3; fi",
        "f() {\n A=1\n}",
        "for A in 1 2; do A=1; done",
        "case $X in\n a) A=1 ;;\nesac",
        "true && A=1",
        "[ -n x ] || export A=1",
        "A=1 bash x.sh",
        "source other.conf",
        "echo A=1",
    ],
)
def test_nothing_is_run_and_nothing_guessed(text, tmp_path):
    found = parse(f"{text}\nB=2")
    assert {name: one.value for name, one in found.variables.items()} == {"B": "2"}


def test_what_only_a_shell_can_work_out_is_no_value():
    found = parse("A=$(date)\nB=`date`\nC=$((1 + 1))\nD=x$A\nE=${F%.*}\nG=1")
    assert {name for name, one in found.variables.items() if one.computed} == {"A", "B", "C", "D", "E"}
    assert found.variables["G"].value == "1" and found.variables["G"].line == 6


def test_an_open_quote_names_file_and_line(conf):
    path = conf('A=1\nB="x\n')
    with pytest.raises(DataError, match=r"x\.conf:2: \" is never closed"):
        convert(path)


# --- recipes ------------------------------------------------------------------------------------------------------


def test_a_dense_configuration(conf):
    done = convert(conf(DENSE), take_hugging_face=True)
    assert not done.errors
    recipe = done.recipe
    assert recipe["policy"]["model_name"] == recipe["teacher"]["model_name"] == "Qwen/Qwen3-8B"
    assert recipe["policy"]["dtensor_cfg"] == {
        "tensor_parallel_size": 8,
        "sequence_parallel": True,
        "activation_checkpointing": True,
    }
    assert recipe["policy"]["train_micro_batch_size"] == 16
    assert recipe["policy"]["optimizer"]["kwargs"] == {"lr": 2e-6, "weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert recipe["policy"]["quant_cfg"] == "default"
    assert recipe["distillation"]["num_prompts_per_step"] == recipe["policy"]["train_global_batch_size"] == 256
    assert recipe["distillation"]["max_num_steps"] == 299_800 // 256
    assert recipe["data"]["blend"] == {"name": "openscience", "train_samples": 299_800, "overlong": "split"}
    assert recipe["cluster"] == {"gpus_per_node": 8, "num_nodes": 1}
    assert recipe["logger"]["log_dir"] == (
        "/data/checkpoints/Qwen3-8B-NVFP4-TP8-MLM-Teacher-Qwen3-8B-TP8-MLM-Data-openscience-lr2e-6"
    )
    assert recipe["logger"]["log_params_norm"] is True


def test_experts_need_their_nodes_and_the_right_model(conf):
    done = convert(conf(SPARSE), take_hugging_face=True)
    assert not done.errors
    # STUDENT_MODEL is only the architecture; the checkpoint's name says which of its models it is.
    assert done.recipe["policy"]["model_name"] == "Qwen/Qwen3-30B-A3B-Thinking-2507"
    assert done.recipe["policy"]["dtensor_cfg"]["expert_parallel_size"] == 8
    assert done.recipe["cluster"] == {"gpus_per_node": 8, "num_nodes": 4}
    assert done.recipe["data"]["blend"]["train_samples"] == 1_024_000
    assert done.recipe["logger"]["log_params_norm"] is False
    smaller = convert(conf(SPARSE), {"EP_SIZE": "4"}, take_hugging_face=True)
    assert smaller.recipe["cluster"]["num_nodes"] == 2


def test_every_key_is_one_that_a_recipe_has(conf):
    keys: set[str] = set()
    for text in (DENSE, SPARSE):
        _, unknown = classify(convert(conf(text), take_hugging_face=True).recipe)
        assert set(unknown) <= keys
    assert "dtensor_cfg" in Recipe.model_fields["policy"].annotation.model_fields  # pyright: ignore


def test_every_variable_of_the_runbook_has_its_row(conf):
    names = [*variables.MAPPED, *variables.IGNORED, "HF_TOKEN", "NCCL_DEBUG", "FOO"]
    settled = {
        "STUDENT_CKPT": "a/b",
        "TEACHER_CKPT": "a/b",
        "TEACHER_MODEL_CONFIG": "/nowhere.yaml",
        "STUDENT_CONFIG_FILE": "/nowhere.sh",
        "KD_CFG_PATH": "/nowhere.yaml",
        "DATASET_NAME": "openscience",
        "LR_DECAY_STYLE": "cosine",
        "QUANT_CFG": "nvfp4",
        "TRAIN_SAMPLES": "25600",
        "MAX_SEQ": "8192",
    }
    text = "".join(f"export {name}={settled.get(name, 1)}\n" for name in names)
    done = convert(conf(text))
    shown = {one.variable for one in done.rows}
    assert set(names) <= shown
    assert {one.variable for one in done.errors} == {"KD_CFG_PATH", "DISTILL_CONFIG_PATH"}


def test_megatron_checkpoints_name_the_model_to_use(conf):
    done = convert(conf(DENSE))
    assert {one.variable for one in done.errors} == {"STUDENT_CKPT", "TEACHER_CKPT"}
    assert "give STUDENT_CKPT=Qwen/Qwen3-8B, or --hf" in row(done, "STUDENT_CKPT").text
    given = convert(conf(DENSE), {"STUDENT_CKPT": "Qwen/Qwen3-8B", "TEACHER_CKPT": "Qwen/Qwen3-8B"})
    assert not given.errors and given.recipe["policy"]["model_name"] == "Qwen/Qwen3-8B"


def test_a_folder_under_models_root_is_preferred(conf, tmp_path):
    (tmp_path / "Qwen3-8B").mkdir()
    (tmp_path / "Qwen3-8B" / "config.json").write_text("{}")
    done = convert(conf(DENSE), environment={"MODELS_ROOT": str(tmp_path)}, take_hugging_face=True)
    assert done.recipe["policy"]["model_name"] == str(tmp_path / "Qwen3-8B")


@pytest.mark.parametrize(
    ("overrides", "variable", "message"),
    [
        ({"PP_SIZE": "2"}, "PP_SIZE", r"no pipeline stages.*TP_SIZE=16"),
        ({"TP_SIZE": ""}, "TP_SIZE", "is required"),
        ({"MBS": "four"}, "MBS", "must be a whole number"),
        ({"TP_SIZE": "3"}, "TP_SIZE", "must divide the 32 heads"),
        ({"TP_SIZE": "7"}, "TP_SIZE", "must divide"),
        ({"EP_SIZE": "4"}, "EP_SIZE", "has no experts"),
        ({"LR": "fast"}, "LR", "must be a number"),
        ({"LR": "nan"}, "LR", "must be a number"),
        ({"LR": "0"}, "LR", "above 0"),
        ({"MIN_LR": "1"}, "MIN_LR", "at most LR"),
        ({"LR_DECAY_STYLE": "wsd"}, "LR_DECAY_STYLE", "cosine, linear, constant"),
        ({"DATASET_NAME": "opensciense"}, "DATASET_NAME", "Did you mean openscience"),
        ({"DATASET_NAME": "mine", "BLEND_PATH": "/b.json"}, "TRAIN_SAMPLES", "is required with a blend of your own"),
        ({"TRAIN_SAMPLES": "100"}, "TRAIN_SAMPLES", "fewer than one batch of 256"),
        ({"ITERATIONS_TO_SKIP": "-3"}, "ITERATIONS_TO_SKIP", "at least 1"),
        ({"KD_CFG_PATH": "/nowhere.yaml"}, "KD_CFG_PATH", "no such file"),
        ({"QUANT_CFG": "int4_awq"}, "QUANT_CFG", "must be one of nvfp4_default_cfg"),
        ({"TP_SZIE": "4"}, "TP_SZIE", "did you mean"),
    ],
)
def test_errors_say_what_to_do(conf, overrides, variable, message):
    text = DENSE.replace("TP_SIZE=8", "") if "TP_SZIE" in overrides else DENSE
    done = convert(conf(text), overrides, take_hugging_face=True)
    assert re.search(message, row(done, variable).text) and row(done, variable) in done.errors


def test_shape_mismatches_are_named(conf, tmp_path):
    config = tmp_path / "teacher.yaml"
    config.write_text("num_query_groups: 8\nkv_channels: 128\nnum_layers: 48\n")
    done = convert(conf(SPARSE), {"TEACHER_MODEL_CONFIG": str(config)}, take_hugging_face=True)
    assert "num_query_groups is 8, and Qwen/Qwen3-30B-A3B-Thinking-2507 has 4 key/value heads (GQA)" in (
        done.errors[0].text
    )
    config.write_text("num_query_groups: 4\nkv_channels: 128\n")
    assert not convert(conf(SPARSE), {"TEACHER_MODEL_CONFIG": str(config)}, take_hugging_face=True).errors
    script = tmp_path / "Qwen3-30B-A3B.sh"
    script.write_text('MODEL_ARGS=" --num-layers 48 --num-query-groups 2 \\\n --bf16 "\n')
    done = convert(conf(SPARSE), {"STUDENT_CONFIG_FILE": str(script)}, take_hugging_face=True)
    assert [one.variable for one in done.errors] == ["STUDENT_CONFIG_FILE"] and "is 2" in done.errors[0].text
    script.write_text('MODEL_ARGS="--num-query-groups 4 --seq-length 8192"\n')
    for overrides, length in (({}, 8192), ({"MAX_SEQ": "512"}, 512)):
        overrides |= {"STUDENT_CONFIG_FILE": str(script)}
        done = convert(conf(SPARSE), overrides, take_hugging_face=True)
        assert done.recipe["policy"]["max_total_sequence_length"] == length


def test_shapes_come_from_config_json_where_there_is_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 6, "num_key_value_heads": 3}))
    assert models.shape_of(str(tmp_path)).kv_heads == 3
    assert models.shape_of("Qwen/Qwen3-8B-Base").kv_heads == 8 and models.shape_of("x/unknown") is None


def test_quantised_weights_are_no_start(conf, tmp_path):
    folder = tmp_path / "Qwen3-8B-NVFP4"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text("{}")
    done = convert(conf(DENSE), {"STUDENT_CKPT": str(folder)}, take_hugging_face=True)
    assert "quantised already" in done.errors[0].text and "STUDENT_CKPT=Qwen/Qwen3-8B" in done.errors[0].text


def test_a_custom_distillation_file(conf, tmp_path):
    config = tmp_path / "kd.yaml"
    config.write_text("logit_kl_temperature: 2.0\nskip_lm_loss: true\nkd_loss_scale: 1.0\n")
    done = convert(conf(DENSE), {"KD_CFG_PATH": str(config)}, take_hugging_face=True)
    assert done.recipe["loss_fn"]["temperature"] == 2.0 and "kd_loss_scale" in row(done, "KD_CFG_PATH").text
    config.write_text("skip_lm_loss: false\nintermediate_layer_pairs: [[a, b]]\n")
    done = convert(conf(DENSE), {"KD_CFG_PATH": str(config)}, take_hugging_face=True)
    assert len(done.errors) == 2


def test_skipped_steps_are_those_that_megatron_skips(conf):
    done = convert(conf(DENSE), {"ITERATIONS_TO_SKIP": "100 205,7"}, take_hugging_face=True)
    assert done.recipe["data"]["blend"]["iterations_to_skip"] == [100, 205, 7]


# --- the schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_the_schedule_follows_megatrons(style):
    import math

    import torch

    from fastkd.optim import build_scheduler
    from fastkd.recipe import recipe_from

    lr, low, steps, warm, decay = 1e-5, 1e-7, 200, 10, 180
    entries = schedule.schedulers(style, lr, low, steps=steps, warmup=warm, decay=decay)
    model = {"model_name": "a/b"}
    recipe = recipe_from(
        {"policy": model | {"scheduler": entries}, "teacher": model, "data": {"train": {"data_path": "x"}}}
    ).recipe
    policy = recipe.policy
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_scheduler(policy, optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    def megatron(step):  # step t of Megatron trains with what t updates of the schedule give
        if step <= warm:
            return lr * step / warm
        if style == "constant":
            return lr
        if step > decay:
            return low
        share = (step - warm) / (decay - warm)
        factor = (1 + math.cos(math.pi * share)) / 2 if style == "cosine" else 1 - share
        return low + (lr - low) * factor

    # The first step trains with lr / warm instead of 0; behind the warm-up both agree.
    expected = [max(megatron(step), 0) for step in range(steps)]
    assert seen[:warm] == pytest.approx([lr * (step + 1) / warm for step in range(warm)])
    assert seen[warm:] == pytest.approx(expected[warm:], rel=1e-6, abs=1e-12)


# --- secrets ------------------------------------------------------------------------------------------------------


def test_secrets_are_never_written(conf, tmp_path, capsys):
    token = "hf_0123456789abcdef"
    text = DENSE + f"export HF_TOKEN={token}\nexport WANDB_API_KEY=0123456789\nlogin --token {token}\n"
    text += f'NOTE="mine is {token}"\n'
    target = tmp_path / "x.yaml"
    assert import_conf.main([str(conf(text)), "--hf", "-o", str(target)]) == 0
    said = capsys.readouterr()
    everything = said.out + said.err + target.read_text()
    assert token not in everything and "0123456789" not in everything and "HF_TOKEN" in said.out


def test_a_secret_inside_a_path_is_refused(conf, tmp_path, capsys):
    text = DENSE + "export WANDB_API_KEY=0123456789\nexport BLEND_PATH=/data/$WANDB_API_KEY/b.json\n"
    target = tmp_path / "x.yaml"
    assert import_conf.main([str(conf(text)), "--hf", "-o", str(target)]) == 2
    said = capsys.readouterr()
    assert "would hold a secret" in said.out and "0123456789" not in said.out + said.err
    assert not target.exists()


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET", "DB_PASSWORD"])
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["TOKENIZER_MODEL", "KEY_MODEL", "AUTHOR", "MAX_TOKENS"])
def test_names_that_are_none(name):
    assert not is_secret(name)


def test_credentials_in_an_address_are_hidden():
    assert Secrets({}).hide("https://me:hunter22@host/x") == "https://***@host/x"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_a_recipe_and_never_over_another(conf, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = conf(DENSE, "dense.conf")
    assert import_conf.main([str(path), "--hf", "LR=1e-5"]) == 0
    written = yaml.safe_load((tmp_path / "dense.yaml").read_text())
    assert float(written["policy"]["optimizer"]["kwargs"]["lr"]) == 1e-5
    assert import_conf.main([str(path), "--hf"]) == 2
    assert "--force" in capsys.readouterr().err
    assert import_conf.main([str(path), "--hf", "--force"]) == 0
    assert not list(tmp_path.glob(".*.tmp"))
    assert "-lr2e-6" in (tmp_path / "dense.yaml").read_text()


def test_the_command_writes_nothing_with_an_error(conf, tmp_path, capsys):
    target = tmp_path / "x.yaml"
    assert import_conf.main([str(conf(DENSE)), "-o", str(target)]) == 2
    assert not target.exists() and "nothing was written" in capsys.readouterr().err
    assert import_conf.main([str(tmp_path / "none.conf")]) == 2
    assert import_conf.main([str(conf(DENSE)), "oops"]) == 2


def test_the_import_is_quick_because_it_loads_no_torch(conf):
    code = "import sys, fastkd.import_conf; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
