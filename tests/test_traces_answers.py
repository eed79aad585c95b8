"""Answers: found, missing, and compared."""

from __future__ import annotations

import pytest

from reasoninterp.errors import UserError
from reasoninterp.traces.answers import as_number, extract, normalise, same_answer
from reasoninterp.traces.calculator import find_equations
from reasoninterp.traces.quantities import occurrences
from reasoninterp.traces.segment import split_chain

FOUND = [
    ("hash", "So.\n#### 1,234\nQ: next\n#### 9", "1,234"),
    ("hash", "#### $-3.5 ", "$-3.5"),
    ("hash", "###18", None),
    ("hash", "####   \n18", None),
    ("boxed", r"\boxed{3} then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
    ("boxed", r"first \boxed{3}, then cut off \boxed{4", "3"),
    ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    ("boxed", r"\fboxed{ x } \boxed{}", "x"),
    ("boxed", "none", None),
    ("letter", "The answer is (C). A man went home.", "C"),
    ("letter", "Answer: b is wrong\nAnswer: **D**", "D"),
    ("letter", "I choose (B), not (A)", "A"),
    ("letter", "C", "C"),
    ("letter", "A man went home.", None),
    ("letter", "The answer is Apple.", None),
    ("last-number", "3 cups, so $1,250.50.", "$1,250.50"),
    ("last-number", "it is -7", "-7"),
    ("last-number", "x2 and 3/4", "3/4"),
    ("last-number", "none", None),
    (r"regex:=> (\w+)", "=> yes => no", "yes"),
    (r"regex:=> (\w+)", "-> yes", None),
    ("exact", "  the whole \n", "the whole"),
    ("exact", " \n ", None),
]


@pytest.mark.parametrize(("how", "text", "value"), FOUND)
def test_extractors(how: str, text: str, value: str | None) -> None:
    found = extract(text, how)
    assert found.value == value
    assert found.status == ("missing" if value is None else "ok")
    if found.chars is not None:
        assert text[found.chars.start : found.chars.stop] == value


def test_what_is_the_same_answer() -> None:
    same = [
        ("1,000", "1000"), ("$18", "18.00"), ("18.", "18"), (".5", "1/2"), (r"\frac{1}{2}", "0.5"), ("50%", "50"),
        ("-3", "\u22123"), ("  True ", "true"), (r"\text{yes}", "Yes."), ("$7$", "7"), ("-$4", "-4"),
    ]  # fmt: skip
    other = [("1,000", "100"), ("18", "-18"), ("18", "18 apples"), ("A", "B"), ("1.5", "15"), ("", "0"), ("1/0", "0")]
    for a, b in same:
        assert same_answer(a, b), (a, b)
    for a, b in other:
        assert not same_answer(a, b), (a, b)
    assert normalise("1,000.50") == "2001/2" and as_number("a1") is None


def test_a_mind_that_loops_does_not_break_anything() -> None:
    for text in ("9" * 20000, "1+" * 5000, "( " * 5000, "1,234" * 3000, " " * 20000, "1 = " * 4000, "\\boxed{" * 3000):
        found = extract(text, "last-number").value or text
        assert same_answer(found, found)
        cut = split_chain(text, "lines", "boxed")
        assert cut.status in ("missing", "no steps")
        assert find_equations(text) == [] and all(o.value < 10**5 for o in occurrences(text))


def test_bad_extractors_are_named() -> None:
    for how, message in {
        "hsah": "unknown answer extractor 'hsah'",
        "regex:(": "not a regular expression",
        "regex:a": "0 groups",
        "regex:(a)(b)": "2 groups",
    }.items():
        with pytest.raises(UserError, match=message):
            extract("text", how)
