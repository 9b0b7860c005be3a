"""A run on texts that exist, on a Ray cluster: two groups give what one process gives, and there are no engines."""

import json

import pytest

from fastkd import offpolicy
from fastkd.config.blend import Blend
from fastkd.offpolicy_roles import TextRoles
from fastkd.recipe import load_recipe

SHORT = [
    "distillation.num_prompts_per_step=8",
    "policy.train_global_batch_size=8",
    "distillation.max_num_steps=2",
    "distillation.val_period=2",
    "distillation.max_val_samples=8",
    "checkpointing.save_period=2",
    "checkpointing.metric_name=null",
]
SHARED = [
    "distillation.resource_isolation.enabled=false",
    "policy.generation.colocated.enabled=true",
    "cluster.num_nodes=1",
]


def test_a_blend_on_pools_gives_what_one_process_gives(cluster, root, arithmetic, tmp_path, monkeypatch):
    lines = (arithmetic / "train.jsonl").read_text().splitlines()
    for name, kept in (("plus", lines[:40]), ("minus", lines[40:60]), ("held_out", lines[60:70])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
    path = tmp_path / "blend.json"
    path.write_text(json.dumps({"train": [0.7, "plus.jsonl", 0.3, "minus.jsonl"], "valid": [1, "held_out.jsonl"]}))
    keys = {"input_key": "problem", "output_key": "solution", "variant": "chat", "train_on": "response"}
    given = [f"data.blend.{key}={value}" for key, value in {"path": path, **keys}.items()]
    pools = []
    close = TextRoles.close
    monkeypatch.setattr(TextRoles, "close", lambda self, **how: (pools.append(set(self.pools)), close(self, **how))[1])

    def run(recipe, folder, *overrides):
        loaded = load_recipe(root / "recipes" / recipe, [*SHORT, *given, f"logger.log_dir={folder}", *overrides])
        assert isinstance(loaded.recipe.data.blend, Blend) and loaded.recipe.data.blend.enabled
        offpolicy.run(loaded, loaded.recipe.data.blend)
        found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in one.items() if not k.startswith(("timing/", "memory/"))} for one in found]

    alone = run("arithmetic_cpu.yaml", tmp_path / "alone")
    assert pools == []
    found = run("arithmetic_ray_cpu.yaml", tmp_path / "pools", *SHARED)
    # Scored one step ahead, on three nodes: texts do not age, so it is the same training.
    ahead = run("arithmetic_ray_cpu.yaml", tmp_path / "ahead", "distillation.max_off_policy_steps=1")
    assert pools == [{"training", "teacher"}] * 2
    assert [one["step"] for one in alone] == [0, 1, 2]
    for other in (found, ahead):
        for ours, theirs in zip(other, alone, strict=True):
            assert ours == {name: pytest.approx(value, rel=1e-5) for name, value in theirs.items()}
    assert (tmp_path / "pools" / "export" / "model.safetensors").exists()
