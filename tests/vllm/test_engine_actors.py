"""Two engines in Ray actors, fed by a training group in others: every engine has the weights, whoever is replaced."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="pip install 'fastkd[ray]'")

HERE = Path(__file__).resolve().parent
CHANGE = 0.05


def build_student(seat, recipe, vocab):
    from fastkd.student import Student

    return Student(recipe, seat.device, vocab, seat.mesh(recipe.policy))


def change(worker):
    import torch

    generator = torch.Generator().manual_seed(worker.version)
    from fastkd.weights import local_part

    with torch.no_grad():
        for parameter in worker.parameters:
            part, local = local_part(parameter)
            local.add_(torch.randn(parameter.shape, generator=generator)[part], alpha=CHANGE)
    worker.version += 1


def pid(worker):
    return os.getpid()


@pytest.fixture
def cluster(monkeypatch):
    from fastkd.simulated_cluster import simulated

    paths = [HERE, HERE.parents[1]]
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with simulated(3, 2) as nodes:
        yield nodes


def test_two_engines(cluster, engines, build_folder, build_recipe, prompts, tokenizer):
    sys.modules["test_engine_actors"] = sys.modules[__name__]  # by this name the actors import it
    for function in (build_student, change, pid):
        function.__module__ = "test_engine_actors"
    from fastkd import engine_actors
    from fastkd.placement import Placement
    from fastkd.ray_pools import Options, RayPool
    from fastkd.rollout import Request
    from fastkd.sampling import Sampler
    from fastkd.vllm_generation import VllmGeneration

    engines.close()
    recipe = build_recipe(build_folder("qwen3"), isolated=True)
    vocab, request = len(tokenizer), Request(Sampler(), generations=2)
    with (
        Placement(recipe, cpu_slots=2) as placement,
        RayPool(placement.slots("training"), Options(threads=1), build_student, recipe, vocab) as student,
        RayPool(
            placement.slots("generation"), Options(False, threads=1, at_once=engine_actors.CALLS_AT_ONCE),
            engine_actors.build_engine, recipe, tokenizer.eos_token_id, vocab,
        ) as pool,
    ):  # fmt: skip

        def connect():
            said = student.run_all(engine_actors.connect, recipe, pool.handles, [1, 1], prompts[4].tokens, vocab)
            assert said == ["", ""]

        connect()
        found, why = student.run(engine_actors.push)
        assert not why and found["sync/probe_error"] < 1e-4
        whole = pool.run_all(VllmGeneration.sample, prompts[:8], request)
        assert whole[0] == whole[1], "both engines have the same weights, and a seed gives the same sample"

        # Weights arrive while the engines sample: what is in flight is paused, kept, and goes on with the new ones.
        mixed, version = [], 0
        while not mixed and version < 9:
            calls = [pool.submit_to(rank, VllmGeneration.sample, prompts[:8], request) for rank in range(2)]
            student.run_all(change)
            version += 1
            found, why = student.run(engine_actors.push)
            assert not why and found["sync/probe_error"] < 1e-4 and found["sync/probe_moved"] > 0.05
            sampled = [one for call in calls for one in call.result()]
            assert len(sampled) == 32 and all(one.response for one in sampled)
            mixed = [one for one in sampled if len(one.versions) > 1]
        assert mixed, "no push met a sequence in flight"
        for one in mixed:
            (old, start), (new, switch) = one.versions
            assert (old, start, new) == (version - 1, 0, version) and 0 < switch < len(one.response)
            assert one.weights_version == old

        # An engine dies: the group hears of it and goes on, and a new engine gets the weights.
        os.kill(pool.run_all(pid)[1], signal.SIGKILL)
        student.run_all(change)
        found, why = student.run(engine_actors.push)
        assert f"weights of version {version + 1} did not reach the engines" in why
        pool.restart(1)
        connect()
        found, why = student.run(engine_actors.push)
        assert not why and found["sync/probe_error"] < 1e-4
        again = pool.run_all(VllmGeneration.sample, prompts[:8], request)
        assert again[0] == again[1] and again[0] != whole[0]
        assert {one.weights_version for one in again[1]} == {version + 1}
