"""Tiny models and data for the tests: real Qwen3 architectures, random or the shipped arithmetic ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two threads gain little on models this small, and two that spin for a busy core are twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = ROOT / "recipes" / "arithmetic"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def arithmetic() -> Path:
    return ARITHMETIC


@pytest.fixture(scope="session")
def on_simulated_gpus():
    """on_simulated_gpus(argument…, VARIABLE=value…): ``python argument…`` to its end; what it printed.

    Needs a torch without CUDA and a compiler (``tests/simulated_gpu`` says what is simulated).
    """
    here = ROOT / "tests" / "simulated_gpu"
    sys.path.insert(0, str(here))
    import simulated_gpu

    sys.path.remove(str(here))
    if reason := simulated_gpu.why_not():
        pytest.skip(f"no simulated GPU: {reason}")
    simulated_gpu.build()

    def run(*command: object, **variables: str) -> str:
        paths = [str(here), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        # Options of the outer run are not meant for the inner one.
        outer = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "TRITON_INTERPRET")}
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=outer | ours | variables,
            capture_output=True,
            text=True,
            timeout=900,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-12_000:]
        return output

    return run


@pytest.fixture
def tiny_qwen3():
    """Builds a random Qwen3 with our attention: tiny_qwen3(tied=True, layers=2, …)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from fastkd import attention

    def build(tied: bool = True, seed: int = 0, dtype=torch.float32, **changes):
        settings = dict(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
        torch.manual_seed(seed)
        config = Qwen3Config(**{**settings, **changes})
        model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention.NAME).to(dtype)
        if dtype == torch.float64:
            # transformers' norms compute in float32 whatever the model's dtype; a float64 test needs float64 norms.
            for module in list(model.modules()):
                for name, child in module.named_children():
                    if type(child).__name__ == "Qwen3RMSNorm":
                        norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=dtype)
                        setattr(module, name, norm)
        return model

    return build


@pytest.fixture
def turns_taken(monkeypatch):
    """Roles in the order in which they took the memory of shared devices; a role that goes on is there once."""
    from fastkd.turns import Turns

    taken: list[str] = []
    take = Turns.take

    def watch(self, role):
        if taken[-1:] != [role]:
            taken.append(role)
        take(self, role)
        assert self.holding == {role}

    monkeypatch.setattr(Turns, "take", watch)
    return taken


@pytest.fixture
def rollouts():
    """Random rollouts over a vocabulary of 101: rollouts(8, seed=0)."""
    import random

    from fastkd.batch import Prompt, Rollout

    def build(count: int, seed: int = 0, longest: int = 12) -> list[Rollout]:
        rng = random.Random(seed)
        made = []
        for index in range(count):
            prompt = tuple(rng.randrange(101) for _ in range(rng.randint(1, longest)))
            response = tuple(rng.randrange(101) for _ in range(rng.randint(1, longest)))
            made.append(Rollout(Prompt(index, "", None, "", prompt), 0, response, True, 0))
        return made

    return build
