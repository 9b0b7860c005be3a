"""Mean queue lengths, by a clock that the test moves."""

from fastkd.queue_lengths import QueueLengths
from fastkd.report import role_table


def test_lengths_are_weighted_by_time():
    now = 10.0
    waiting = QueueLengths(lambda: now)
    assert waiting.take() == {}
    waiting.change("teacher", 6)
    now = 13.0
    waiting.change("teacher", -4)
    waiting.change("generation", 8)
    now = 14.0
    assert waiting.take() == {"timing/queue_teacher": (3 * 6 + 2) / 4, "timing/queue_generation": 2.0}
    now = 16.0
    assert waiting.take() == {"timing/queue_teacher": 2.0, "timing/queue_generation": 8.0}  # they still wait
    waiting.change("generation", -8)
    now = 17.0
    assert waiting.take() == {"timing/queue_teacher": 2.0, "timing/queue_generation": 0.0}


def test_the_table_shows_them():
    table = role_table({"timing/step": 2.0, "timing/queue_teacher": 3.25, "timing/queue_generation": 0.0})
    waiting = list(table.columns[-1].cells)
    assert table.columns[-1].header == "waiting" and waiting == ["0.0", "3.2", "-"]
