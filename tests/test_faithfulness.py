"""Behaviour tables and the gate from readings written by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from reasoninterp.faithfulness.behaviour import Behaviour
from reasoninterp.faithfulness.readings import variants
from reasoninterp.models.context import Context, Item, Reading, find_answer, gold, unaskable
from reasoninterp.runs import Run
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Trace
from tests.tiny import tiny_tokenizer

FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")
TRACE = Trace("t", "q", ("a 1", "b 2", "c 3"), "3", FORMAT)
N = 40


class FakeContext(Context):
    """What `Behaviour.summarise` asks of a context."""

    def __init__(self, run: Run, chance: float = 0.1) -> None:
        self.run, self.seed, self._chance = run, 0, chance
        self.minds = SimpleNamespace(names=("base", "tuned"))
        self.items = [object()] * N

    def table(self, name: str) -> pd.DataFrame:
        return self.run.table(name)

    def chance(self) -> float:
        return self._chance


def write(run: Run, same: dict[str, list[float]], own: dict[str, float], none: dict[str, float]) -> None:
    """Tables in which every trace of a mind reads the same; `same[mind][k]` after k steps."""
    samples, readings, cross = [], [], []
    for mind in ("base", "tuned"):
        for k in range(N):
            at = {"mind": mind, "trace": f"t{k}"}
            right = float(k < own[mind] * N)
            samples.append(at | {"right": right, "steps_right": right, "status": "ok"})
            readings.append(
                at | {"test": "clean", "step": None, "right": 1.0, "same": 1.0, "follows": 1.0, "status": "ok"}
            )
            for step, value in enumerate(same[mind]):
                one = {"test": "truncated", "step": step, "right": float(k < none[mind] * N), "same": value}
                readings.append(at | one | {"follows": None, "status": "ok"})
            readings.append(
                at | {"test": "filler", "step": None, "right": 0.0, "same": 0.0, "follows": None, "status": "ok"}
            )
            for step, value in ((0, 1.0), (len(same[mind]) - 1, 0.0)):
                forced = {"test": "forced", "step": step, "right": value, "same": value}
                readings.append(at | forced | {"follows": 1.0 if step else None, "status": "ok"})
            # a quarter follow, a quarter stay, a quarter say a third thing, a quarter say nothing
            swap = {
                "follows": float(k % 4 == 0),
                "right": float(k % 4 == 1),
                "status": "missing" if k % 4 == 3 else "ok",
            }
            readings.append(at | swap | {"test": "swap", "step": None, "same": None})
            for writer in ("base", "tuned"):
                cross.append(at | {"writer": writer, "right": float(writer == "base")})
    for name, rows in (("samples", samples), ("readings", readings), ("cross", cross)):
        run.save_table(name, pd.DataFrame(rows))


def tables(path: Path, **values: Any) -> dict[str, pd.DataFrame]:
    run = Run.open(path / "run", {})
    chance = values.pop("chance", 0.1)
    write(run, **values)
    return Behaviour().summarise(pd.DataFrame(), FakeContext(run, chance))  # type: ignore[return-value]


def number(table: pd.DataFrame, mind: str, test: str) -> float:
    return float(table[(table["mind"] == mind) & (table["test"] == test)]["value"].iloc[0])


def test_a_constant_curve_has_the_area_it_must_have(tmp_path: Path) -> None:
    same = {"base": [0.0, 0.0, 0.0], "tuned": [1.0, 1.0, 1.0]}
    found = tables(tmp_path, same=same, own={"base": 0.8, "tuned": 1.0}, none={"base": 0.1, "tuned": 1.0})["behaviour"]
    assert number(found, "base", "truncated_aoc") == 1.0
    assert number(found, "tuned", "truncated_aoc") == 0.0
    assert "endpoint" in found[found["test"] == "truncated_aoc"]["convention"].iloc[0]


def test_an_area_by_hand_and_the_four_ways_a_swap_can_end(tmp_path: Path) -> None:
    same = {"base": [0.0, 0.0, 1.0], "tuned": [0.0, 1.0, 1.0]}
    out = tables(tmp_path, same=same, own={"base": 0.8, "tuned": 0.8}, none={"base": 0.1, "tuned": 0.1})
    found = out["behaviour"]
    assert number(found, "base", "truncated_aoc") == pytest.approx(2 / 3)
    assert number(found, "tuned", "truncated_aoc") == pytest.approx(1 / 3)
    ends = [number(found, "base", f"swap_{end}") for end in ("follow", "stay", "other", "unreadable")]
    assert ends == [0.25] * 4
    assert number(found, "base", "forced_same_last") == 0.0
    assert number(found, "base", "forced_same_earlier") == 1.0
    assert number(found, "base", "reads_base") == 1.0
    assert number(found, "tuned", "reads_tuned") == 0.0
    areas = out["differences"].set_index("test").loc["truncated_aoc"]
    assert areas["value"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("own", "none", "chance", "label"),
    [
        (0.8, 0.1, 0.1, "interpretable"),
        (0.8, 0.8, 0.1, "chain not needed"),
        (0.1, 0.1, 0.1, "at floor"),
        (0.5, 0.5, 0.5, "at floor"),
    ],
)
def test_gate(tmp_path: Path, own: float, none: float, chance: float, label: str) -> None:
    same = {"base": [0.0], "tuned": [0.0]}
    gate = tables(
        tmp_path, same=same, own={"base": own, "tuned": own}, none={"base": none, "tuned": none}, chance=chance
    )["gate"]
    assert list(gate["label"]) == [label, label]


def test_variants_of_a_trace() -> None:
    corrupt = TRACE.with_steps(("a 1", "b 7", "c 8"), answer="8")
    item = Item(TRACE, contrast("propagated", TRACE, corrupt), None)
    found = list(variants(item, tiny_tokenizer()))
    assert [(v.test, v.step) for v in found] == [
        ("clean", None), ("truncated", 0), ("truncated", 1), ("truncated", 2), ("filler", None), ("forced", 1), ("forced", 2),
    ]  # fmt: skip
    last = found[-1]
    assert last.trace.steps == ("a 1", "b 2", "c 8")
    assert last.implied == "8"
    assert found[-2].implied is None  # an earlier wrong step, the later ones held, implies no answer
    other = contrast("swap", TRACE, TRACE.with_steps(("x 4", "y 5", "z 6"), answer="6"))
    swapped = list(variants(Item(TRACE, item.contrast, other), tiny_tokenizer()))[-1]
    assert (swapped.test, swapped.trace.steps, swapped.implied) == ("swap", other.corrupt.steps, "6")


@pytest.mark.parametrize(
    ("text", "answer", "meta", "value"),
    [
        (" 18 apples", "7", {}, "18"),
        (" \\frac{1}{2} of it", "7", {}, "\\frac{1}{2}"),
        ("−5", "7", {}, "−5"),
        ("3 / 4", "7", {}, "3 / 4"),
        (".5", "7", {}, ".5"),
        ("A person says the answer is C", "B", {"options": ["A)1", "B)2", "C)3"]}, "C"),
        ("(C) 15", "B", {}, "C"),
        ("$1,234.50.", "7", {}, "$1,234.50"),
        ("about seven", "7", {}, None),
        (" (B) because", "C", {"options": ["A)1", "B)2"]}, "B"),
        ("True\nmore", "False", {}, "True"),
        ("", "False", {}, None),
    ],
)
def test_answers_are_found_by_the_form_of_the_traces_own(
    text: str, answer: str, meta: dict[str, Any], value: str | None
) -> None:
    found = find_answer(text, Trace("t", "q", ("s",), answer, FORMAT, meta))
    assert found.value == value
    assert found.status == ("missing" if value is None else "ok")


def test_numbers_are_compared_by_value_and_a_missing_answer_is_none() -> None:
    assert Reading(" 18.0", "18.0", "ok").says("18")
    assert not Reading("", None, "missing").says("18")
    assert gold(Trace("t", "q", (), "3", FORMAT, {"gold": "4"})) == "4"


def test_a_contrast_whose_answer_changes_the_tokens_before_it_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    merged = TRACE.with_steps(("a 1", "b 2", "c 9"), answer="1")  # this tokenizer has a token " 1", but none " 7"
    clean = TRACE.with_steps(TRACE.steps, answer="7")
    assert unaskable(contrast("propagated", clean, merged), tokenizer, 3) == "the answer changes the tokens before it"
    assert (
        unaskable(contrast("propagated", clean, clean.with_steps(("a 1", "b 2", "c 9"), answer="6")), tokenizer, 3)
        is None
    )
