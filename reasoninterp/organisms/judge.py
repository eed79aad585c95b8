"""Judges of organisms: which steps and answers of the word-level tasks are wrong, and which words have planted sources.

`judge`: known exactly, since the question says what follows.

A step is right where it is what its operation makes of the value written before it (the start value, for the first), in
either form; a step without an operation, or that is no value, is wrong.  The answer is right where it is the question's
own, whatever the chain says.

`planted`: the words and answers of a `sourced` organism, none of them wrong, so that a study can be asked of these alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from reasoninterp.errors import UserError
from reasoninterp.organisms.tasks import BLANK, DIGITS, LAST, OPS, WORDS, apply_op
from reasoninterp.traces.judging import Judged
from reasoninterp.traces.trace import Span, Trace

_VALUES = {word: value for words in (DIGITS, WORDS) for value, word in enumerate(words)}


def judge(trace: Trace) -> list[Judged]:
    """The steps and the answer of a trace of `lastop` or `largest`.

    Raises:
        UserError: a trace of another task.
    """
    words = [word for word in trace.question.split() if word != BLANK]
    task = trace.meta.get("task")
    ops = words[2:-2]
    if task not in ("lastop", "largest") or words[-2:-1] != [LAST] or not {*ops, words[-1]} <= set(OPS):
        raise UserError(f"trace {trace.id!r}: not a problem of the tasks lastop and largest; use another --judge.")
    right = [_VALUES[words[1]]]
    for op in ops:
        right.append(apply_op(op, right[-1]))
    out: list[Judged] = []
    value: int | None = right[0]
    for step in trace.step_list():
        written = _VALUES.get(step.text.strip())
        due = apply_op(ops[step.index], value) if step.index < len(ops) and value is not None else None
        out.append(Judged(step.chars, written is None or written != due))
        value = written
    told = right[-1] if task == "lastop" else max(right[1:])
    (answer,) = [part.chars for part in trace.parts() if part.kind == "answer"]
    return [*out, Judged(answer, _VALUES.get(trace.answer.strip()) != apply_op(words[-1], told))]


def planted(trace: Trace) -> list[Judged]:
    """The words whose source is planted (`meta["planted"]`: the place of each among the words of the text).

    Raises:
        UserError: a trace of another kind.
    """
    places = trace.meta.get("planted")
    if not isinstance(places, Mapping):
        raise UserError(f"trace {trace.id!r}: its meta has nothing planted; use another --judge.")
    words = [Span(*match.span()) for match in re.finditer(r"\S+", trace.text)]
    return [Judged(words[int(place)], False) for place in places]
