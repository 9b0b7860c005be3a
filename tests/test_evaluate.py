"""The evaluation command: figures by hand, a real model, and going on after a cut."""

import json
import sys
from dataclasses import replace
from itertools import combinations

import pytest

from fastkd import evaluate
from fastkd.answers import GREEDY, SAMPLED, Sample, Samples, pass_at, summarise
from fastkd.errors import UserError
from fastkd.evaluate import main


def sample(mode, index, generation, correct, tokens=10, finished=True):
    return Sample(mode, index, generation, correct, tokens, finished, "p", "1", "r")


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(k):
    n, right = 4, [0, 1, 3]
    for c in right:
        draws = list(combinations([1] * c + [0] * (n - c), k))
        assert pass_at(k, [c], n) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))
    assert pass_at(k, right, n) == pytest.approx(sum(pass_at(k, [c], n) for c in right) / 3)


def test_figures():
    samples = [sample(GREEDY, i, 0, i == 0) for i in range(2)]
    samples += [sample(SAMPLED, 0, g, g < 3, 20, g > 0) for g in range(4)] + [
        sample(SAMPLED, 1, g, False) for g in range(4)
    ]
    found = summarise(samples, 4)
    assert found[GREEDY]["accuracy"] == 0.5 and found[GREEDY]["standard_error"] == pytest.approx(0.5)
    sampled = found[SAMPLED]
    assert sampled["accuracy"] == 3 / 8 and sampled["mean_tokens"] == 15 and sampled["truncated"] == 1 / 8
    assert sampled["pass_at"] == {"1": pytest.approx(3 / 8), "2": pytest.approx(0.5), "4": pytest.approx(0.5)}
    assert list(summarise(samples[:2], 0)) == [GREEDY]


def test_samples_on_disk(tmp_path):
    folder, each = tmp_path / "runs" / "one", {GREEDY: 1, SAMPLED: 2}
    empty = Samples(folder, {"seed": 1}, each)
    assert not folder.exists()  # a mistake that is found now leaves nothing
    # Ends of lines to Unicode, not to JSON; and an end within a character.
    odd = replace(sample(GREEDY, 0, 0, True), response="a\u2028b\x85c\u2029")
    empty.add([odd])
    empty.add([sample(SAMPLED, 0, g, False) for g in range(2)])
    line = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)[-1]
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(line.replace(b'"index": 0', b'"index": 1') + "{é".encode()[:-1])
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        Samples(folder, {"seed": 2}, each)
    again = Samples(folder, {"seed": 1}, each)
    assert again.all == empty.all and again.all[0] == odd and again.done(SAMPLED) == {0}
    assert Samples(folder, {"seed": 1}, each).all == again.all
    # Settings of a folder without an answer bind nobody.
    (folder / "samples.jsonl").write_text("")
    assert Samples(folder, {"seed": 2}, each).all == []


@pytest.fixture
def command(arithmetic, tmp_path, capsys):
    def run(*more, limit="6"):
        out = tmp_path / "out"
        code = main(
            [
                str(arithmetic / "teacher"),
                f"--recipe={arithmetic.parent / 'arithmetic_cpu.yaml'}",
                "--samples=2",
                f"--limit={limit}",
                f"--out={out}",
                *more,
            ]
        )
        return code, out, capsys.readouterr()

    return run


def test_a_trained_model(command):
    code, out, told = command()
    assert code == 0 and "greedy" in told.out and "avg@2" in told.out and "pass@2" in told.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["greedy"]["accuracy"] == 1.0 and summary["greedy"]["problems"] == 6
    assert summary["sampled"]["accuracy"] > 0.5
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6 + 12 and all(str(row["reference"]) in row["response"] for row in rows if row["correct"])


def test_the_same_command_goes_on(command, monkeypatch):
    _, out, _ = command()
    whole = (out / "samples.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    # Cut off in the middle of a problem, and of a line.
    (out / "samples.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    grade, graded = evaluate.grade, []
    monkeypatch.setattr(evaluate, "grade", lambda rollouts, tok: graded.extend(rollouts) or grade(rollouts, tok))
    code, _, _ = command()
    assert code == 0
    assert sorted((out / "samples.jsonl").read_text().splitlines()) == sorted(whole.splitlines())
    assert len(graded) == 10  # five of the six problems that are sampled twice, and no greedy one
    monkeypatch.setattr(evaluate, "_engine", lambda *_: pytest.fail("everything is there"))
    assert command()[0] == 0


def test_other_settings_need_another_folder(command):
    assert command()[0] == 0
    for change, named in (("policy.generation.temperature=0.5", "sampler"), ("--backend=vllm", "backend")):
        code, _, told = command(change)
        assert code == 2 and named in told.err and "--out" in told.err


def test_vllm_that_is_not_there(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, out, told = command("--backend=vllm")
    assert code == 2 and "policy.generation.backend='vllm'" in told.err and "pip install" in told.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model"], "--data"),
        (["model", "--data=AIME2024", "--no-greedy"], "--samples"),
        (["./nowhere", "--data=AIME2024"], "no such folder"),
        (["model", "--data=AIME2024", "--samples=-1"], "--samples=-1"),
        (["model", "--data=AIME2024", "--limit=0"], "--limit=0"),
        (["model", "--data=AIME2024", "--backend=vllm", "policy.generation.temperature=3"], "from 0 to 2"),
        (["model", "--data=AIME2024", "data.max_input_seq_length=9", "policy.max_total_sequence_length=8"], "must fit"),
        (["model", "--data=AIME2024", "policy.generation.temperatur=1"], "Did you mean policy.generation.temperature?"),
    ],
)
def test_mistakes(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
