"""Calculator annotations and what a changed result does to the rest of a chain."""

from __future__ import annotations

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from reasoninterp.traces import propagate as reasons
from reasoninterp.traces.calculator import agreement, evaluate, find_annotations, find_equations, holds
from reasoninterp.traces.propagate import CannotPropagate, propagate
from reasoninterp.traces.quantities import (
    candidate_values,
    decimals,
    given_values,
    occurrences,
    word_values,
    write_like,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"


def test_expressions_against_pythons_own_arithmetic() -> None:
    draw, seen = random.Random(0), 0
    for _ in range(500):
        text = str(draw.randint(1, 99))
        for _ in range(draw.randint(1, 4)):
            text = f"({text})" if draw.random() < 0.2 else text
            text += draw.choice("+-*/") + draw.choice([str(draw.randint(1, 99)), f"{draw.randint(0, 9)}.5", ".25"])
        value = evaluate(text)
        assert value is not None and float(value) == pytest.approx(eval(text))
        seen += 1
    assert seen == 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,200 * 2", Fraction(2400)), ("3 x 4", Fraction(12)), ("6 ÷ 4", Fraction(3, 2)), ("50%", Fraction(1, 2)),
        ("10% * 20", Fraction(2)), ("2^3", Fraction(8)), ("007+1", Fraction(8)), ("0.1+0.2", Fraction(3, 10)),
        ("7//2", Fraction(3)), ("(5 + 3", Fraction(8)), ("-4+1", Fraction(-3)), ("1/0", None), ("9**9**9", None),
        ("__import__('os')", None), ("a+1", None), ("", None), ("1+" * 300 + "1", None), ("True+1", None),
    ],
)  # fmt: skip
def test_expressions_by_hand(text: str, value: Fraction | None) -> None:
    assert evaluate(text) == value


def test_agreement() -> None:
    pairs = {("1/4", "0.25"): "exact", ("10/3", "3.33"): "rounded", ("1000+1", "1005"): "near", ("2+2", "5"): "wrong"}
    for (left, right), wanted in pairs.items():
        assert agreement(left, right) == wanted
    assert agreement("2+2", "") == "unreadable" and agreement("7/2", "4") == "wrong"


def test_annotations_and_equations_say_where_they_stand() -> None:
    text = "So 3 * 4 = $<<3*4=12>>12.00 and 12-2=10, not 2x+2x = 100"
    (a,) = find_annotations(text)
    assert (text[slice(*a.left)], text[slice(*a.right)]) == ("3*4", "12")
    assert a.copy is not None and text[slice(*a.copy)] == "12.00"
    assert [text[slice(*e.chars)] for e in find_equations(text)] == ["3 * 4 = $<<3*4=12>>12.00", "12-2=10"]
    assert all(holds(text, e) for e in find_equations(text))
    (b,) = find_annotations("<<5=5>>five")
    assert b.copy is None


def test_numbers_in_prose() -> None:
    text = "On the 2nd of 12 days at 3:00 he ate 1,250.5 of 3x2 (x4) nuts, $.5 each."
    found = [(o.text, o.glued) for o in occurrences(text)]
    assert found == [
        ("2", True), ("12", False), ("3", True), ("00", True), ("1,250.5", False), ("3", False), ("2", False),
        ("4", True), (".5", False),
    ]  # fmt: skip
    assert word_values("Twenty-five cats and three dogs") == {25, 3}
    assert {7, 12, 3, 2} <= given_values("three dozen a week") and 60 not in given_values("three dozen a week")
    assert Fraction(3, 10) in given_values("30% of it") and Fraction(3, 10) not in given_values("30 of it")


def test_a_new_value_is_written_as_the_old_one_was() -> None:
    cases = [
        ("1,250", 3000, "3,000"), ("1,250", 300, "300"), ("7.00", 8, "8.00"), (".5", Fraction(1, 4), None),
        (".50", Fraction(1, 4), ".25"), ("0.5", 2, "2.0"), ("7", Fraction(1, 2), None), ("7", -1, None),
    ]  # fmt: skip
    for old, value, wanted in cases:
        assert write_like(old, Fraction(value)) == wanted, old


def test_candidates_have_as_many_digits_and_are_seeded() -> None:
    for text in ("7", "42", "1,250", "0.25", "31.5"):
        old = Fraction(text.replace(",", ""))
        values = list(candidate_values(old, text, "s"))
        assert (
            values == list(candidate_values(old, text, "s")) and old not in values and len(set(values)) == len(values)
        )
        written = [write_like(text, v) for v in values]
        assert len(values) >= 8 and all(w is not None and len(w) == len(text) for w in written)
    assert list(candidate_values(Fraction(0), "0", "s")) == []
    assert all(v.denominator == 1 for v in candidate_values(Fraction(51), "51.0", "s"))


STEPS = ("She has 16 - 3 = <<16-3=13>>13 eggs.", "They fetch 13 * 2 = $<<13*2=26>>26, so 26 in all.")


def test_a_change_is_carried_through_by_hand() -> None:
    out = propagate(STEPS, "26", 0, 15, "16 eggs, 3 eaten, $2 each?")
    assert out.steps == ("She has 16 - 3 = <<16-3=15>>15 eggs.", "They fetch 15 * 2 = $<<15*2=30>>30, so 30 in all.")
    assert (out.answer, out.changed, out.value) == ("30", (0, 1), 15)
    last = propagate(STEPS, "$26.", 1, 28, "16 eggs, 3 eaten, $2 each?")
    assert (last.answer, last.changed) == ("$28.", (1,)) and last.steps[0] == STEPS[0]


def test_forward_mentions_commas_decimals_and_plain_equations_follow() -> None:
    steps = (
        "He needs 770 because 1100 x .7 = <<1100*.7=770>>770",
        "So 770 + 480 = 1,250 is left",
        "Half is 1,250/2 = $<<1250/2=625.00>>625.00",
    )
    out = propagate(steps, "625", 0, 1770, "1100 things, 70% and 480 more; half of it?")
    assert out.steps == (
        "He needs 1770 because 1100 x .7 = <<1100*.7=1770>>1770",
        "So 1770 + 480 = 2,250 is left",
        "Half is 2,250/2 = $<<2250/2=1125.00>>1125.00",
    )
    assert out.answer == "1125"


def test_a_rounded_result_stays_rounded() -> None:
    steps = ("There are 2*5=<<2*5=10>>10.", "Each gets 10/3=<<10/3=3.33>>3.33")
    assert propagate(steps, "3.33", 0, 11, "2 by 5 for 3").steps[1] == "Each gets 11/3=<<11/3=3.67>>3.67"


REFUSED = {
    reasons.NO_CALCULATION: (("He sleeps.", "1+1=<<1+1=2>>2"), "2", 0, 3, "q"),
    reasons.ANSWER_NOT_A_RESULT: (STEPS, "27", 0, 15, "16 3 2"),
    reasons.DOES_NOT_REACH: (("a 5+4=<<5+4=9>>9", "b 6+7=<<6+7=13>>13"), "13", 0, 8, "5 4 6 7"),
    reasons.AMBIGUOUS: (STEPS, "26", 0, 15, "16 eggs, 3 eaten, 13 days, $2 each?"),
    reasons.UNKNOWN: ((STEPS[0], "Now 41 + 13 = <<41+13=54>>54"), "54", 0, 15, "16 eggs, 3 eaten?"),
    reasons.DOES_NOT_HOLD: ((STEPS[0], "13 * 2 = <<13*2=27>>27"), "27", 0, 15, "16 3 2"),
    reasons.NOT_WRITABLE: ((STEPS[0], "(13+1)/2 = <<(13+1)/2=7>>7"), "7", 0, 14, "16 3 1 2"),
    reasons.NOT_POSITIVE: ((STEPS[0], "13 - 5 = <<13-5=8>>8"), "8", 0, 4, "16 3 5"),
    reasons.WORD: ((STEPS[0], "Thirteen times 2 is <<13*2=26>>26"), "26", 0, 15, "16 3 2"),
    reasons.GLUED: ((STEPS[0], "The 13th; 13*2 = <<13*2=26>>26"), "26", 0, 15, "16 3 2"),
    reasons.UNCHANGED: ((STEPS[0], "13*0+5 = <<13*0+5=5>>5"), "5", 0, 15, "16 3 0 5"),
    reasons.INCONSISTENT: (
        ("6 * 6 = <<6*6=36>>36", "36 / 3 = 4 * 3 = <<36/3=12>>12"), "12", 0, 39, "6 sixes in 3 parts of 4"
    ),
    reasons.NOT_A_CALCULATION: (("He has <<9=9>>9", "9*2=<<9*2=18>>18"), "18", 0, 8, "two"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_carried_through_is_refused_by_name(reason: str) -> None:
    steps, answer, at, value, question = REFUSED[reason]
    with pytest.raises(CannotPropagate) as caught:
        propagate(steps, answer, at, value, question)
    assert str(caught.value) == reason


def test_a_percentage_of_a_changed_number_is_refused() -> None:
    steps = ("The share is 1/4 = <<1/4=.25>>.25, that is 25%", "80*.25=<<80*.25=20>>20")
    with pytest.raises(CannotPropagate, match=reasons.GLUED):
        propagate(steps, "20", 0, Fraction(1, 2), "1 of 4, of 80; 25 is a number")


def test_every_annotation_of_the_data_set_agrees_with_itself() -> None:
    if not DATA.exists():
        pytest.skip("the data folder is not here")
    for name, count in {"test": 4282, "train": 23716}.items():
        text = "\n".join(json.loads(line)["answer"] for line in (DATA / f"{name}.jsonl").read_text().splitlines())
        found = find_annotations(text)
        assert len(found) == count == len(re.findall(r"<<.*?>>", text))
        assert {agreement(a.left_text, a.right_text) for a in found} == {"exact"}
        assert {decimals(a.right_text) for a in found} >= {0, 1, 2}
