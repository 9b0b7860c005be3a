"""What is too old is left out of training, and only that."""

from fastkd.batch import Prompt, Rollout
from fastkd.context_distillation import Readings
from fastkd.roles import Scored


def rollout(version, response=(5, 6)):
    return Rollout(Prompt(0, "p", "a", "p", (1, 2)), 0, response, True, version)


def test_stale_rollouts_are_dropped_and_counted():
    rollouts = [rollout(3), rollout(1), rollout(0, ()), rollout(2)]
    batch = Scored(rollouts, Readings(rollouts, rollouts, {}), ["a", "b", None, "d"])
    figures = batch.drop_stale(version=3, limit=1)
    assert figures == {"rollout/staleness_mean": 1.0, "rollout/staleness_max": 2.0, "rollout/dropped_stale": 1.0}
    assert [bool(one.response) for one in batch.readings.student] == [True, False, False, True]


def test_fresh_rollouts_are_left_alone():
    rollouts, rows = [rollout(3), rollout(2)], ["a", "b"]
    readings = Readings(rollouts, rollouts, {})
    batch = Scored(rollouts, readings, rows)
    assert batch.drop_stale(version=3, limit=1)["rollout/dropped_stale"] == 0
    assert batch.readings is readings and batch.rows is rows
