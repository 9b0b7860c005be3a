"""Collecting ahead: order, how far, what a failure does."""

import threading

import pytest

from fastkd.ahead import Ahead


def test_without_a_lead_a_step_is_collected_when_it_is_asked_for():
    calls = []
    ahead = Ahead(lambda step, sampled: calls.append(step) or step, 0, 9)
    assert ahead.next(1) == 1 and calls == [1]
    assert ahead.next(2) == 2 and calls == [1, 2]


@pytest.mark.parametrize("lead", [1, 2])
def test_the_next_steps_are_begun_and_no_more(lead):
    begun, asked = [], threading.Semaphore(0)

    def collect(step, sampled):
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
    def collect(step, sampled):
        begun.append(step)
        if step == 2 and not fixed:
            raise ZeroDivisionError("two")
        return step

    fixed, begun = False, []
    ahead = Ahead(collect, 2, 9)
    assert ahead.next(1) == 1
    with pytest.raises(ZeroDivisionError, match="two"):
        ahead.next(2)
    ahead.reset()
    assert begun == [1, 2]  # the third would have taken the second one's prompts
    fixed = True
    assert [ahead.next(step) for step in (2, 3)] == [2, 3]
    ahead.close()
    assert ahead.next(4) == 4
    ahead.close()


def test_a_step_is_begun_when_the_one_before_is_sampled():
    begun, scored = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]
    go_on = threading.Event()

    def collect(step, sampled):
        begun[step].set()
        if step == 1:
            assert go_on.wait(10)
        sampled()
        assert scored[step].wait(10)
        return step

    ahead = Ahead(collect, 1, 9)
    found = []
    asking = threading.Thread(target=lambda: found.append(ahead.next(1)))
    asking.start()
    assert begun[1].wait(10) and not begun[2].wait(0.2)  # the engines are busy
    go_on.set()
    assert begun[2].wait(10) and not found  # the teacher still is
    scored[1].set()
    asking.join(10)
    assert found == [1] and not begun[3].is_set()  # that would be two steps ahead
    for one in scored:
        one.set()
    assert ahead.next(2) == 2
    ahead.reset()
    ahead.close()
