"""Generation that is held back: paused, asleep, or asked for in short calls; nothing in flight is lost."""

from __future__ import annotations

import threading

import pytest
import torch

from fastkd.rollout import Request
from fastkd.sampling import Sampler
from fastkd.student import Student
from fastkd.verified_sync import VerifiedSync
from fastkd.weight_sync import GLOO, Engines

REQUEST = Request(Sampler(), generations=2)


@pytest.fixture(scope="module")
def recipe(build_folder, build_recipe):
    return build_recipe(build_folder("qwen3"))


@pytest.fixture(scope="module")
def sync(engines, recipe, prompts, tokenizer):
    student = Student(recipe, torch.device("cpu"), len(tokenizer))
    made = VerifiedSync(recipe, student, Engines.local([engines()]), GLOO, prompts[4].tokens, len(tokenizer))
    made.push()
    return made


@pytest.fixture
def engine(sync, engines):
    made = engines()
    made.stop_token_ids = list(range(0, 400, 12))  # responses of very different lengths
    return made


def waits(function) -> tuple[threading.Thread, list]:
    """Call in a thread; it must not return within a moment in which it otherwise would have."""
    found: list = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(0.7)
    assert not found and thread.is_alive()
    return thread, found


def test_submit_and_collect_give_what_sample_does(engine, prompts):
    whole = engine.sample(prompts, REQUEST)
    first = engine.submit(prompts[:4], REQUEST)
    second = engine.submit(prompts[4:], REQUEST)
    tickets, found, calls = [*first, *second], {}, 0
    while len(found) < len(tickets):
        some = dict(engine.collect())
        assert some and not some.keys() & found.keys()
        found |= some
        calls += 1
    assert [found[ticket] for ticket in tickets] == whole
    assert calls > 5, "each call returns as soon as something is finished"
    assert engine.collect() == []


def test_collect_returns_in_time_and_cancel_takes_back(engine, prompts):
    tickets = engine.submit(prompts[:8], REQUEST)
    assert engine.collect(0.0) == []
    engine.cancel(list(tickets)[1:])
    ((ticket, rollout),) = engine.collect()
    assert ticket == tickets[0] and rollout.prompt == prompts[0]
    assert engine.collect() == [] and not engine.engine.has_unfinished_requests() and not engine._flying


def test_a_pause_keeps_what_is_in_flight(engine, prompts):
    whole = engine.sample(prompts[:8], REQUEST)
    engine.submit(prompts[:8], REQUEST)
    found = engine.collect()
    engine.pause()
    assert engine.collect(0.2) == []
    thread, late = waits(engine.collect)
    engine.resume()
    thread.join(60)
    found += late[0]
    while some := engine.collect():
        found += some
    assert [rollout for _, rollout in sorted(found, key=lambda pair: pair[0])] == whole


def test_sleep_with_weights(engine, prompts):
    whole = engine.sample(prompts[:8], REQUEST)
    engine.submit(prompts[:8], REQUEST)
    found = engine.collect()
    engine.sleep(keep_weights=True)
    assert engine.engine.is_sleeping() and engine.collect(0.2) == []
    with pytest.raises(RuntimeError, match="asleep: wake it, or give it weights"):
        engine.sample(prompts, REQUEST)
    engine.wake()
    while some := engine.collect():
        found += some
    # Keys and values were dropped and computed anew.
    assert [rollout.response for _, rollout in sorted(found, key=lambda pair: pair[0])] == [x.response for x in whole]


def test_sleep_without_weights_ends_with_a_sync(engine, sync, prompts):
    whole = engine.sample(prompts[:8], REQUEST)
    engine.submit(prompts[:8], REQUEST)
    engine.sleep()
    with torch.no_grad():
        for parameter in sync.student.parameters:
            parameter.mul_(1.0)
    found = sync.push()
    assert found["sync/probe_error"] < 1e-4 and not engine.engine.is_sleeping()
    rollouts = []
    while some := engine.collect():
        rollouts += some
    assert [rollout.response for _, rollout in sorted(rollouts, key=lambda pair: pair[0])] == [
        x.response for x in whole
    ]
    engine.sleep()
    engine.wake()
    with pytest.raises(RuntimeError, match="dropped while it slept: this engine needs a whole weight update"):
        engine.sample(prompts[:1], REQUEST)
    sync.push()
    assert engine.sample(prompts[:8], REQUEST) == whole
