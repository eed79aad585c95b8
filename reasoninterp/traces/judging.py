"""Which characters of a chain are right and which are wrong, and how that becomes a word on tokens.

1. A judge takes a trace and returns `Judged` pieces of its text; what it does not return, nobody judged.
2. `arithmetic` judges the results of written calculations (`calculator`), `<<a=b>>` and, in steps without these, plain
   equations: wrong where they are neither equal to what stands before them, nor that rounded, nor that up to one part
   in a million (a calculator's floating point).  Known exactly, and blind to a right calculation of the wrong thing.
   Plain equations with a per cent sign, with brackets that do not close, or that continue a formula are not judged:
   they are pieces of algebra more often than errors.
3. A token is wrong where any of its characters is in a wrong piece, right where some are in a right one and none in a
   wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from reasoninterp.traces.calculator import Equation, agreement, evaluate, find_annotations, find_equations, side_text
from reasoninterp.traces.trace import Span, Trace

FLOATING = Fraction(1, 10**6)


class Judged(NamedTuple):
    """Characters of a trace's joined text, and whether they are wrong."""

    chars: Span
    wrong: bool


Judge: TypeAlias = Callable[[Trace], Iterable[Judged]]


def arithmetic(trace: Trace) -> list[Judged]:
    """The results of the calculations written in the steps."""
    out = []
    for step in trace.step_list():
        by = step.chars.start
        annotated = find_annotations(step.text)
        for one in annotated:
            wrong = is_wrong(one.left_text, one.right_text)
            if wrong is not None:
                out.append(Judged(one.right.shift(by), wrong))
                if one.copy:  # the number behind the annotation repeats what is in it
                    out.append(Judged(one.copy.shift(by), wrong))
        for equation in [] if annotated else find_equations(step.text):
            if _stands_alone(step.text, equation):
                *sides, result = (side_text(step.text, side) for side in equation.sides)
                verdicts = [is_wrong(side, result) for side in sides]
                if None not in verdicts:
                    out.append(Judged(equation.sides[-1].shift(by), any(verdicts)))
    return out


def is_wrong(left: str, right: str) -> bool | None:
    """Whether a result is not what an expression comes to (step 2); None where they cannot be read."""
    found = agreement(left, right)
    if found == "near":
        a, b = evaluate(left), evaluate(right)
        assert a is not None and b is not None
        return abs(a - b) > abs(a) * FLOATING
    return None if found == "unreadable" else found == "wrong"


def _stands_alone(text: str, equation: Equation) -> bool:
    """Whether an equation is no piece of a longer formula."""
    inside = text[equation.chars.start : equation.chars.stop]
    before = text[: equation.chars.start].rstrip()[-1:]
    continues = before in tuple("+-*/×÷^=()%") or (inside.startswith("-") and before.isalnum())
    continues = continues or re.search(r"\dx(?! ?[\d($])", inside) is not None  # 5x - 5: a letter, not a product
    return "%" not in inside and inside.count("(") == inside.count(")") and not continues


def wrong_tokens(judged: Iterable[Judged], chars: Sequence[Span]) -> list[bool | None]:
    """Whether each token is wrong; None where nobody judged it.

    Args:
        judged: pieces of the text.
        chars: the characters of each token (`traces.trace.token_chars`).
    """
    out: list[bool | None] = [None] * len(chars)
    for (start, stop), wrong in judged:
        for i, token in enumerate(chars):
            if max(token.start, start) < min(token.stop, stop):
                out[i] = bool(out[i]) or wrong
    return out
