"""Edits: a trace in, a trace with another chain out, and a record of what was changed.

An edit changes the steps and nothing else (question, answer and format stay), so that what a mind then answers can be
compared with what it answered before.  `changed` names the steps of the *edited* trace that differ from the step at the
same place in the original; a place that only the original had is in `removed`.

Truncation and filler are after Lanham et al. 2023 (early answering, filler tokens); dropping, shuffling and swapping
are the usual controls for relevance and order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Trace, encode


@dataclass(frozen=True)
class EditedTrace:
    """A trace after an edit.

    Attributes:
        trace: the edited trace.
        edit: name and arguments, such as `truncate(2)`.
        changed: places in the edited chain whose step differs from the original's step at that place.
        removed: places in the original chain that the edited one no longer has.
    """

    trace: Trace
    edit: str
    changed: tuple[int, ...]
    removed: tuple[int, ...]


def edited(original: Trace, steps: Sequence[str], edit: str) -> EditedTrace:
    """The record of replacing the chain of `original` by `steps`."""
    changed = tuple(i for i, s in enumerate(steps) if i >= len(original.steps) or s != original.steps[i])
    return EditedTrace(original.with_steps(steps), edit, changed, tuple(range(len(steps), len(original.steps))))


def truncate(trace: Trace, k: int) -> EditedTrace:
    """The first `k` steps (0 to all).

    Raises:
        UserError: `k` is outside 0…number of steps.
    """
    if not 0 <= k <= len(trace.steps):
        raise UserError(f"truncate: k={k} is outside 0…{len(trace.steps)}, the steps of trace {trace.id!r}.")
    return edited(trace, trace.steps[:k], f"truncate({k})")


def filler(trace: Trace, tokenizer: Any = None, *, text: str = " ...", start: int = 0) -> EditedTrace:
    """Replace the steps from `start` on by filler.

    Without a tokenizer each of these steps becomes `text` once (blanks at its start left out).  With one, each becomes
    as many repetitions of `text` as bring the whole trace nearest to its old number of tokens (at least one).

    Raises:
        UserError: `start` is no step, or the filler is blank.
    """
    if not text.strip():
        raise UserError("filler: the filler text is blank; give a visible one such as '...'.")
    _check_index(trace, start, "filler")
    steps = list(trace.steps)
    if tokenizer is None:
        steps[start:] = [text.strip()] * (len(steps) - start)
        return edited(trace, steps, f"filler({text!r}, start={start})")
    wanted = len(encode(trace, tokenizer).ids)
    spans = encode(trace, tokenizer).steps
    one = max(1, len(tokenizer(text * 9, add_special_tokens=False)["input_ids"]) // 9)
    for i in range(start, len(steps)):
        steps[i] = (text * max(1, round(len(spans[i]) / one))).strip()
    times = max(1, round(len(spans[-1]) / one))
    best = min(
        (max(1, times + d) for d in range(-8, 9)),
        key=lambda n: abs(len(encode(trace.with_steps([*steps[:-1], (text * n).strip()]), tokenizer).ids) - wanted),
    )
    steps[-1] = (text * best).strip()
    return edited(trace, steps, f"filler({text!r}, start={start}, token-matched)")


def drop(trace: Trace, i: int) -> EditedTrace:
    """All steps but step `i`.

    Raises:
        UserError: there is no step `i`.
    """
    _check_index(trace, i, "drop")
    return edited(trace, [*trace.steps[:i], *trace.steps[i + 1 :]], f"drop({i})")


def shuffle(trace: Trace, seed: int) -> EditedTrace:
    """The steps in another order, drawn from the orders that differ from the original where there is one."""
    order = list(range(len(trace.steps)))
    if len(set(trace.steps)) > 1:
        draw = random.Random(f"{seed}:{trace.id}")
        while tuple(trace.steps[j] for j in order) == trace.steps:
            draw.shuffle(order)
    return edited(trace, [trace.steps[j] for j in order], f"shuffle(seed={seed}, order={order})")


def replace_step(trace: Trace, i: int, text: str) -> EditedTrace:
    """Step `i` replaced by `text`.

    Raises:
        UserError: there is no step `i`, or the text is blank.
    """
    _check_index(trace, i, "replace_step")
    if not text.strip():
        raise UserError(f"replace_step: the new text of step {i} is blank; use drop to leave a step out.")
    return edited(trace, [*trace.steps[:i], text, *trace.steps[i + 1 :]], f"replace_step({i})")


def swap(trace: Trace, other: Trace) -> EditedTrace:
    """The whole chain of `other` under this question.

    Raises:
        UserError: the two traces join their steps differently.
    """
    if trace.format.between_steps != other.format.between_steps:
        raise UserError(f"swap: traces {trace.id!r} and {other.id!r} join their steps differently; use one format.")
    return edited(trace, other.steps, f"swap({other.id!r})")


def _check_index(trace: Trace, i: int, edit: str) -> None:
    if not 0 <= i < len(trace.steps):
        raise UserError(f"{edit}: there is no step {i} in trace {trace.id!r}, which has {len(trace.steps)} steps.")
