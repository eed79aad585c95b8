"""The answer of each mind after a chain that was left whole, cut short, filled, changed or swapped.

For every trace and mind, all on the chain that the trace gives (so that both minds read the same ids):

1. `clean`: the whole chain. `right` says whether the answer is the trace's.
2. `truncated`, step k: the first k steps only, k = 0 … n-1 (k = 0 is *no chain*).
3. `filler`: every step replaced by filler of the same number of tokens.
4. `forced`, step i: step i replaced by its corrupt version, all other steps held.
5. `swap`: a whole other, self-consistent chain under this question (see `models.context.Item.swap`).

`same` compares with the answer after the clean chain; `follows` with the answer that the changed chain implies (known
for the swap, and for the last step where it states the answer or is all that was changed).  Where no answer could be read, `status` is `missing` and `same` is undefined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from reasoninterp.models.context import Context, Item, Reading, gold
from reasoninterp.study import Batch, Row, Study
from reasoninterp.traces.contrast import states_answer
from reasoninterp.traces.edits import filler, replace_step, truncate
from reasoninterp.traces.trace import Trace


class Variant(NamedTuple):
    """A changed trace: the test it belongs to, the step (or None), and the answer the change implies (or None)."""

    test: str
    step: int | None
    trace: Trace
    implied: str | None


def corruptible(item: Item) -> list[int]:
    """Steps of which the item has a corrupt version; a step of another problem's chain is none of this one's."""
    if item.contrast is None or item.contrast.kind == "swap":
        return []
    return [i for i in item.contrast.changed if i < min(len(item.trace.steps), len(item.contrast.corrupt.steps))]


def variants(item: Item, tokenizer: Any) -> Iterator[Variant]:
    """Everything that is read for one trace; the first is the clean chain."""
    trace = item.trace
    yield Variant("clean", None, trace, trace.answer)
    for k in range(len(trace.steps)):
        yield Variant("truncated", k, truncate(trace, k).trace, None)
    text = str(trace.meta.get("filler", " ..."))
    yield Variant("filler", None, filler(trace, tokenizer, text=text).trace, None)
    if item.contrast is not None:
        last, corrupt = len(trace.steps) - 1, item.contrast.corrupt
        # With the other steps held, the last one alone implies an answer only where it states it or alone was changed.
        known = item.contrast.changed == (last,) or states_answer(corrupt.steps[-1], corrupt.answer)
        for i in corruptible(item):
            wrong = replace_step(trace, i, item.contrast.corrupt.steps[i]).trace
            yield Variant("forced", i, wrong, item.contrast.corrupt.answer if i == last and known else None)
    if item.swap is not None:
        yield Variant("swap", None, trace.with_steps(item.swap.corrupt.steps), item.swap.corrupt.answer)


class Readings(Study):
    """What each mind answers when the chain is whole, cut short, filled, changed or swapped."""

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell and variant."""
        asked = [(cell, v) for cell in batch for v in variants(cell.item, context.tokenizer)]
        answers = context.read([v.trace for _, v in asked])
        clean: Reading | None = None
        for (cell, v), answer in zip(asked, answers, strict=True):
            if v.test == "clean":
                clean = answer
            yield cell.row(test=v.test, step=v.step, **compare(answer, clean, v.implied, gold(cell.item.trace)))


def compare(answer: Reading, before: Reading | None, implied: str | None, right: str) -> dict[str, Any]:
    """What a reading says beside the one before the change, the answer the change implies and the right one."""
    known = before is not None and before.value is not None and answer.value is not None
    return {
        "answer": answer.value,
        "status": answer.status,
        "right": float(answer.says(right)),
        "same": float(answer.says(before.value)) if known and before and before.value is not None else None,
        "follows": None if implied is None else float(answer.says(implied)),
    }
