"""The typed tree: documented, self-consistent, strict; the table of ignored keys; the generated reference."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from fastkd.config import LossFn, Optimizer, Recipe
from fastkd.config.base import default_tree, section_of
from fastkd.config.ignored import IGNORED, ignored_names, reason_ignored
from fastkd.config.names import classify, find, keys, nearest, scalars
from fastkd.config.reference import reference

ROOT = Path(__file__).resolve().parents[1]


def test_every_key_is_documented():
    assert [key.name for key in keys() if not key.field.description] == []


def test_reference_is_up_to_date():
    shipped = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert shipped == reference(), "run: python -m fastkd.config.reference > docs/recipes.md"


def test_reference_names_every_key_of_the_student_and_every_ignored_pattern():
    text = reference()
    for key in keys():
        if key.owner is not Recipe:
            assert f"`{key.name.rpartition('.')[2]}`" in text
    for pattern in IGNORED:
        assert pattern.replace("|", "\\|") in text


def test_no_key_is_both_valid_and_ignored():
    valid = {key.name for key in keys()}
    assert valid.isdisjoint(ignored_names())


def test_ignored_patterns_cover_both_models_but_no_typos():
    assert reason_ignored("policy.megatron_cfg") == reason_ignored("teacher.megatron_cfg") is not None
    assert reason_ignored("policy.megatron_cgf") is None
    assert reason_ignored("policy.optimizer") is None  # ignored for the teacher only
    assert reason_ignored("teacher.optimizer")


def test_default_tree_holds_exactly_the_keys_that_are_not_required():
    tree = default_tree(Recipe)
    assert tree["distillation"]["topk_logits_k"] == 64
    assert "model_name" not in tree["policy"] and tree["data"]["train"] == []
    assert tree["policy"]["generation"]["max_new_tokens"] == "${..max_total_sequence_length}"


def test_sections_refuse_unknown_keys_and_changes():
    with pytest.raises(ValidationError):
        LossFn.model_validate({"kl_typ": "forward"})
    with pytest.raises(ValidationError):
        LossFn().kl_type = "forward"


@pytest.mark.parametrize(
    ("section", "bad"),
    [
        (LossFn, {"mixed_kl_weight": True}),
        (LossFn, {"mixed_kl_weight": "0.5"}),
        (LossFn, {"temperature": 0}),
        (LossFn, {"temperature": float("nan")}),
        (LossFn, {"jsd_beta": 1.0}),
        (Optimizer, {"kwargs": {"lr": -1e-5}}),
        (Optimizer, {"kwargs": {"lr": "1e-5"}}),
        (Optimizer, {"kwargs": {"lr": float("inf")}}),
        (Optimizer, {"kwargs": {}}),
        (Optimizer, {"kwargs": {"lr": 1e-5, "weight_decay": -0.1}}),
        (Optimizer, {"kwargs": {"lr": 1e-5, "betas": [0.9, 1.0]}}),
    ],
)
def test_values_are_strict(section, bad):
    with pytest.raises(ValidationError):
        section.model_validate(bad)


def test_outside_follows_the_short_form_unless_set():
    assert LossFn().outside == "renormalize"
    assert LossFn(zero_outside_topk=True).outside == "zero"
    assert LossFn(zero_outside_topk=True, outside_topk="bucket").outside == "bucket"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("policy.dtensor_cfg.tensor_parallel_sise", "policy.dtensor_cfg.tensor_parallel_size"),
        ("policy.tensor_parallel_size", "policy.dtensor_cfg.tensor_parallel_size"),
        ("teacher.tensor_parallel_size", "teacher.dtensor_cfg.tensor_parallel_size"),
        ("distilation", "distillation"),
        ("distillation.kl_type", "loss_fn.kl_type"),
        ("data.train.1.imput_key", "data.train.1.input_key"),
        ("policy.megatron_cgf", "policy.megatron_cfg"),
        ("logger.wandb_enable", "logger.wandb_enabled"),
        ("zzz.qqq", None),
    ],
)
def test_nearest_name(wrong, right):
    assert nearest(wrong) == right


def test_every_misspelt_key_is_recognised():
    """Dropping any one letter of any key's last part leads back to that key (or to another key of that spelling)."""
    for key in keys():
        head, _, leaf = key.name.rpartition(".")
        wrong = f"{head}.{leaf[:2]}{leaf[3:]}".lstrip(".")
        if len(leaf) >= 5 and find(wrong.split(".")) is None:
            assert nearest(wrong) == key.name, wrong


def test_classify_enters_lists_and_leaves_free_mappings_alone():
    tree = {
        "policy": {"optimizer": {"kwargs": {"anything": 1}}, "megatron_cfg": {"x": 1}, "nope": 2},
        "data": {"train": [{"split": "a"}, {"splitt": "b"}]},
        3: 4,
    }
    ignored, unknown = classify(tree)
    assert [key.name for key in ignored] == ["policy.megatron_cfg"]
    assert unknown == ["policy.nope", "data.train.1.splitt", "3"]


def test_scalars_of_a_field():
    def of(name):
        field = find(name.split("."))
        assert field is not None
        return scalars(field.annotation)

    assert of("policy.model_name") == {str}
    assert of("loss_fn.kl_type") == {str}
    assert of("loss_fn.outside_topk") == {str, type(None)}
    assert of("distillation.max_val_samples") == {int, type(None)}
    assert of("policy.optimizer.kwargs") == {object}


def test_every_section_of_the_tree_is_reachable_by_name():
    for key in keys():
        if section_of(key.field.annotation) is not None:
            assert find(key.name.split(".")) is key.field
