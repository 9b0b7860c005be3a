"""Collecting ahead: order, how far, what a failure does."""

import threading

import pytest

from fastkd.ahead import Ahead


def test_without_a_lead_a_step_is_collected_when_it_is_asked_for():
    calls = []
    ahead = Ahead(lambda step: calls.append(step) or step, 0, 9)
    assert ahead.next(1) == 1 and calls == [1]
    assert ahead.next(2) == 2 and calls == [1, 2]


@pytest.mark.parametrize("lead", [1, 2])
def test_the_next_steps_are_begun_and_no_more(lead):
    begun, asked = [], threading.Semaphore(0)

    def collect(step):
        begun.append(step)
        asked.release()
        return step

    ahead = Ahead(collect, lead, 4)
    for step in range(1, 5):
        assert ahead.next(step) == step
        expected = min(step + lead, 4)
        while len(begun) < expected:
            assert asked.acquire(timeout=10)
        assert begun == list(range(1, expected + 1))
    ahead.close()


def test_a_failure_comes_out_where_its_step_is_asked_for_and_a_reset_begins_anew():
    def collect(step):
        if step == 2 and not fixed:
            raise ZeroDivisionError("two")
        return step

    fixed = False
    ahead = Ahead(collect, 1, 9)
    assert ahead.next(1) == 1
    with pytest.raises(ZeroDivisionError, match="two"):
        ahead.next(2)
    ahead.reset()
    fixed = True
    assert [ahead.next(step) for step in (2, 3)] == [2, 3]
    ahead.close()
