"""Turns with the memory of shared devices: who gives, who takes, and a student that computes the same afterwards."""

from types import SimpleNamespace

import pytest
import torch

from fastkd import turns
from fastkd.turns import Turns


@pytest.fixture
def watched():
    said: list[str] = []
    roles = ("training", "generation", "teacher")
    return Turns(
        {role: (lambda r=role: said.append(f"-{r}"), lambda r=role: said.append(f"+{r}")) for role in roles}
    ), said


def test_one_role_at_a_time(watched):
    found, said = watched
    found.take("generation")
    assert said == ["-teacher", "-training"] and found.holding == {"generation"}
    found.take("generation")
    found.take("teacher")
    assert said[2:] == ["-generation", "+teacher"]
    found.take("training")
    found.holds("generation")  # weights woke it
    found.take("generation")
    assert said[4:] == ["-teacher", "+training", "-training"]


def test_a_role_that_cannot_give_is_not_asked_again_before_it_holds_something(watched):
    found, _ = watched

    def lost():
        raise ConnectionError

    found.calls["teacher"] = (lost, lost)
    with pytest.raises(ConnectionError):
        found.take("training")
    assert found.holding == {"training"}
    found.holds("teacher")  # its successor
    with pytest.raises(ConnectionError):
        found.take("generation")


def test_parameters_stay_the_same_objects_and_the_step_count_its_number():
    """There is one device here: float64 stands for the move, so that something changes (tests/test_gpu.py moves)."""
    model = torch.nn.Linear(3, 2)
    worker = SimpleNamespace(causal_lm=model, optimizer=torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    worker.optimizer.step()
    before = list(model.parameters())
    turns._move(worker, torch.float64)  # type: ignore[arg-type]
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    for parameter, state in worker.optimizer.state.items():
        assert parameter.dtype == state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float64
        assert state["step"].dtype == torch.float32


def test_nothing_is_taken_that_was_not_given():
    model = torch.nn.Linear(3, 2)
    worker = SimpleNamespace(causal_lm=model, device=torch.device("cpu"))
    turns.take_memory(worker)
    turns.give_memory(worker)
    assert model.fastkd_home == torch.device("cpu")
    turns.take_memory(worker)
    assert model.weight.device.type == "cpu"
