"""Sharded loading and export, on one, two and four processes (weights_worker.py).

One launch per number of ranks runs every case: importing takes longer than the cases. What four ranks export is loaded
by two and by one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

WORKER = Path(__file__).with_name("weights_worker.py")


def write_large(folder: Path):
    """A random checkpoint of 1 GB, one file per block, so that this process never holds more than one file."""
    config = Qwen3Config(
        vocab_size=32_003, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.float32)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    files: dict[str, str] = {}
    for name in model.state_dict():
        block = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        files[name] = f"model-{block}.safetensors"
    make = torch.Generator().manual_seed(0)
    for file in sorted(set(files.values())):
        inside = [name for name in files if files[name] == file]
        save_file({name: torch.randn(model.state_dict()[name].shape, generator=make) for name in inside}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, launch):
    """The shared folder after the launch of four ranks, with what they wrote, and their words."""
    folder = tmp_path_factory.mktemp("weights")
    write_large(folder / "large")
    words = launch(WORKER, 4, folder)
    for heavy in ("large", "large_export"):
        for file in (folder / heavy).glob("*.safetensors"):
            file.unlink()
    return folder, words


def test_four_ranks_load_and_export_with_little_memory(four_ranks):
    _, words = four_ranks
    figures = [line for line in words.splitlines() if "of the shard" in line]
    print(*figures, sep="\n")
    assert figures


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_numbers_of_ranks_load_what_four_wrote(four_ranks, ranks, launch):
    folder, _ = four_ranks
    launch(WORKER, ranks, folder)
