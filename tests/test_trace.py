"""Where a trace begins and ends, and what the teacher's template makes of it."""

import pytest

from fastkd import prefix_template, trace
from fastkd.config import TraceExtractor

THINK, LAST = TraceExtractor(), TraceExtractor(selection="last")


def regex(pattern, **changes):
    return TraceExtractor(type="regex", pattern=pattern, **changes)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("a <think> b </think> c", "b", "b"),
        ("<think>1</think> then <think>2</think>", "1", "2"),
        ("<think>line\nbreak</think>", "line\nbreak", "line\nbreak"),
        ("no tags at all", None, None),
        ("", None, None),
        ("<think>never closed", None, None),
        ("closed</think> but never opened", None, None),
        ("<think>1</think> <think>2 is cut off", "1", "1"),
        ("<think>a<think>b</think>c</think>d", "a<think>b", "a<think>b"),
        ("<think></think>rest", None, None),
        ("<think> \n\t </think>rest", None, None),
        ("<think> </think><think>2</think>", None, "2"),
        ("<Think>case counts</Think>", None, None),
    ],
)
def test_think_tags(text, first, last):
    assert trace.extract(text, THINK) == first
    assert trace.extract(text, LAST) == last


def test_long_texts_take_time_in_proportion():
    inside = "word " * 10_000
    assert trace.extract(f"<think>{inside}</think>x", THINK) == inside.strip()
    assert trace.extract("<think>" * 7_000, LAST) is None
    # A million opening tags: anything quadratic would not come back before the test's time is up.
    assert trace.extract("<think>" * 1_000_000 + "x</think>", THINK) == "<think>" * 999_999 + "x"


@pytest.mark.parametrize(
    ("extractor", "expected"),
    [
        (regex(r"Proof:(.*?)QED"), "a\nb"),
        (regex(r"Proof:(.*?)QED", selection="last"), "c"),
        (regex(r"(?P<mark>Proof):(?P<trace>.*?)QED"), "a\nb"),
        (regex(r"Proof:.*?QED"), "Proof: a\nb QED"),
        (regex(r"Lemma(.*)"), None),
        (regex(r"Proof(x)?"), None),  # a group that took no part is an empty span
    ],
)
def test_regular_expressions(extractor, expected):
    assert trace.extract("Proof: a\nb QED and Proof: c QED", extractor) == expected


@pytest.mark.parametrize(
    ("cell", "extractor", "expected"),
    [
        ("12+5=17 \\boxed{17}", THINK, "12+5=17 \\boxed{17}"),
        ("<think>12+5</think>17", THINK, "12+5"),
        ("<think>cut off", THINK, None),
        ("  ", THINK, None),
        (None, THINK, None),
        ("17 because 12+5", regex("because(.*)"), "12+5"),
        ("17", regex("because(.*)"), None),
    ],
)
def test_a_cell_of_a_dataset(cell, extractor, expected):
    assert trace.static(cell, extractor) == expected


# --- the template -------------------------------------------------------------------------------------------


def test_places_are_filled_and_doubled_braces_stay():
    template = "{problem} Box it: \\boxed{{}}. Hint {my hint}; {problem}\n{trace}"
    assert prefix_template.places(template) == ("problem", "my hint", "trace")
    texts = {"problem": "{trace} {0}", "trace": "t{{}}", "my hint": "h"}
    assert prefix_template.fill(template, texts) == "{trace} {0} Box it: \\boxed{}. Hint h; {trace} {0}\nt{{}}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{}", "no name"),
        ("{0}", "no name"),
        ("{problem!r}", "format"),
        ("{problem:>9}", "format"),
        ("{problem", "expected '}'"),
    ],
)
def test_templates_that_cannot_be_filled(template, words):
    with pytest.raises(ValueError, match=words):
        prefix_template.places(template)


def test_a_template_reaches_into_nothing():
    with pytest.raises(KeyError):
        prefix_template.fill("{problem.__class__}", {"problem": "p"})


def test_a_file_in_place_of_a_template(tmp_path):
    (tmp_path / "prefix.txt").write_text("{problem}\n{trace}\n")
    assert prefix_template.read("prefix.txt", lambda name: str(tmp_path / name)) == "{problem}\n{trace}"
    assert prefix_template.read("{problem} {trace}", lambda name: name) == "{problem} {trace}"
    with pytest.raises(OSError, match="absent"):
        prefix_template.read("absent.txt", lambda name: str(tmp_path / name))
