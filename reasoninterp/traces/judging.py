"""Which characters of a chain are right and which are wrong, and how that becomes a word on tokens.

1. A judge takes a trace and returns `Judged` pieces of its text; what it does not return, nobody judged.
2. `arithmetic` judges the results of written calculations (`calculator`), `<<a=b>>` and plain equations: wrong where they
   are neither equal to what stands before them, nor that rounded.  Known exactly, and blind to a right calculation of
   the wrong thing.
3. A token is wrong where any of its characters is in a wrong piece, right where some are in a right one and none in a
   wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from reasoninterp.traces.calculator import agreement, find_annotations, find_equations, holds
from reasoninterp.traces.trace import Span, Trace


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
            verdict = agreement(one.left_text, one.right_text)
            if verdict != "unreadable":
                wrong = verdict not in ("exact", "rounded")
                out.append(Judged(one.right.shift(by), wrong))
                if one.copy:  # the number behind the annotation repeats what is in it
                    out.append(Judged(one.copy.shift(by), wrong))
        for equation in [] if annotated else find_equations(step.text):
            out.append(Judged(equation.sides[-1].shift(by), not holds(step.text, equation)))
    return out


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
