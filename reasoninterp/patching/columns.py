"""A trace's tokens as the columns of a layer × step map.

The prompt's tokens are partitioned in order: `question` (all before the first step), `step 1` … , `last step` (a step
with what separates it from the next), `answer position` (what stands between the last step and the answer; its last
token is where the answer is read).  The last step has a column of its own, so that traces of different length share
what matters most; a chain of one step has only that.
"""

from __future__ import annotations

from typing import NamedTuple

from reasoninterp.traces.trace import Span, TokenTrace

QUESTION, LAST_STEP, ANSWER = "question", "last step", "answer position"


class Column(NamedTuple):
    """A column of the map: its label, its place among the columns of the longest trace, and its tokens."""

    label: str
    order: int
    span: Span


def columns(tokens: TokenTrace) -> list[Column]:
    """The columns of one trace; their spans partition the prompt."""
    steps, stop = tokens.steps, tokens.answer.start
    if not steps:
        return [Column(QUESTION, 0, Span(0, stop))]
    out = [Column(QUESTION, 0, Span(0, steps[0].start))]
    edges = [s.start for s in steps] + [steps[-1].stop]
    for i in range(len(steps)):
        last = i == len(steps) - 1
        label = LAST_STEP if last else f"step {i + 1}"
        # Far enough right that the last step and the answer follow every numbered step of any trace.
        out.append(Column(label, 10_000 if last else i + 1, Span(edges[i], edges[i + 1])))
    out.append(Column(ANSWER, 10_001, Span(steps[-1].stop, stop)))
    return out
