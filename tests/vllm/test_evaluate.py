"""The evaluation command on a vLLM engine: the answers of transformers, and going on after a cut."""

from __future__ import annotations

import json

import pytest

from fastkd import answers, evaluate

PROBLEMS = 12


@pytest.fixture
def one_engine(engines):
    """Every command gets the same engine: starting one is most of a test's time."""
    from fastkd.vllm_generation import VllmGeneration

    engines.close()
    start, kept, closed = VllmGeneration.from_recipe, [], []

    class Kept:
        @staticmethod
        def from_recipe(*arguments, **more):
            if not kept:
                kept.append(start(*arguments, **more))
                kept[0].end, kept[0].close = kept[0].close, lambda: closed.append(True)
            return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.vllm_generation.VllmGeneration", Kept)
        yield closed
    for engine in kept:
        engine.end()


@pytest.fixture
def command(arithmetic, tmp_path, capsys):
    def run(name, *more):
        model, recipe = arithmetic / "student", arithmetic.parent / "arithmetic_cpu.yaml"
        out = tmp_path / name
        code = evaluate.main([str(model), f"--recipe={recipe}", f"--limit={PROBLEMS}", f"--out={out}", *more])
        return code, out, capsys.readouterr()

    return run


def rows(out):
    return {
        (row["mode"], row["index"], row["generation"]): row
        for row in map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    }


def test_greedy_answers_are_those_of_transformers_and_a_cut_run_goes_on(one_engine, command, monkeypatch):
    # Cut off when 5 problems are answered greedily: what is finished is kept, and the engine is closed.
    add, added = answers.Samples.add, []

    def cut(store, samples):
        if len(added) == 5:
            raise KeyboardInterrupt
        added.extend(samples)
        add(store, samples)

    monkeypatch.setattr(answers.Samples, "add", cut)
    with pytest.raises(KeyboardInterrupt):
        command("vllm", "--backend=vllm", "--samples=4")
    assert one_engine == [True]
    monkeypatch.setattr(answers.Samples, "add", add)
    code, out, told = command("vllm", "--backend=vllm", "--samples=4")
    assert code == 0 and one_engine == [True, True]
    assert all(name in told.out for name in ("greedy", "avg@4", "pass@2", "pass@4"))
    theirs = rows(out)
    assert len(theirs) == PROBLEMS * 5 and len(list((out / "samples.jsonl").open())) == PROBLEMS * 5

    code, out, _ = command("transformers")
    mine = rows(out)
    assert code == 0 and len(mine) == PROBLEMS and any(row["correct"] for row in mine.values())
    assert {key: row for key, row in theirs.items() if key[0] == "greedy"} == mine
    ours, vllms = (json.loads((out.parent / name / "summary.json").read_text()) for name in ("transformers", "vllm"))
    assert vllms["greedy"] == ours["greedy"]

    # Samples differ within a problem, some are right, and do not depend on what ran beside them.
    sampled = {key: row for key, row in theirs.items() if key[0] == "sampled"}
    assert len({(key[1], row["response"]) for key, row in sampled.items()}) > 2 * PROBLEMS
    right = sum(row["correct"] for row in sampled.values())
    assert right and vllms["sampled"]["accuracy"] == right / (4 * PROBLEMS)
    assert all(str(row["reference"]) in row["response"] for row in sampled.values() if row["correct"])
    code, out, _ = command("again", "--backend=vllm", "--samples=4", "--no-greedy")
    assert code == 0 and rows(out) == sampled


def test_an_engine_that_does_not_start_is_a_clear_error(engines, command):
    code, out, told = command("none", "--backend=vllm", "policy.max_total_sequence_length=20000")
    assert code == 2 and told.err.startswith("error: --backend='vllm': vLLM starts no engine")
    assert "max_position_embeddings=512" in told.err and len(told.err.splitlines()) == 1
    assert not out.exists()
