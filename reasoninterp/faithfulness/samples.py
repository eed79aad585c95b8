"""Chains of each mind's own, and what every mind answers after reading them.

1. `samples`: each mind writes a chain and an answer for every question, greedily; `status` says whether an answer
   came, and accuracy counts what did not come as not right, beside its own share.
2. `cross`: every mind reads the chain that every mind wrote, up to the place of the answer, and answers (2×2 for a
   pair).  A mind whose answers are right on the other's chain but not on its own writes worse than it reads.
3. `regenerated`, step i: the steps before i are kept, step i is corrupted, the mind writes the rest itself and
   answers.  This is the total cause of step i through later steps, where `forced` is its direct cause.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from reasoninterp.faithfulness.readings import compare, corruptible
from reasoninterp.models.context import Context, Item, Reading, find_answer, gold
from reasoninterp.models.sample import Sampled
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.trace import Trace


def as_reading(sample: Sampled, trace: Trace, how: str) -> Reading:
    """The answer at the end of a sampled chain, found as it is found behind a given chain."""
    if sample.status != "ok":
        return Reading(sample.answer_text, None, "missing")
    return find_answer(sample.answer_text, trace, how)


class Samples(Study):
    """A chain and an answer of each mind's own, for every question."""

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell: the chain, the answer and how the sampling ended."""
        found = context.sample([cell.item.trace.with_steps(()) for cell in batch])
        for cell, sample in zip(batch, found, strict=True):
            trace = cell.item.trace
            answer = as_reading(sample, trace, context.extractor)
            yield cell.row(
                steps=list(sample.steps),
                answer=answer.value,
                status="no answer found" if sample.status == "ok" and answer.value is None else sample.status,
                right=float(answer.says(gold(trace))),
                steps_right=float(tuple(sample.steps) == trace.steps),
                n_tokens=sample.n_tokens,
            )


class Cross(Study):
    """Each mind reads its own and the other's chain: who writes well, and who reads what is written."""

    needs: ClassVar[tuple[str, ...]] = ("samples",)

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item × writer; the chain is part of the key."""
        chains = {(row.mind, row.trace): list(row.steps) for row in context.table("samples").itertuples()}
        for cell in context.cells():
            for writer in context.minds.names:
                steps = tuple(chains[writer, cell.item.id])
                written = Item(cell.item.trace.with_steps(steps))
                labels = {**cell.labels, "writer": writer}
                key = f"{cell.key}/{writer}/{written.digest[:8]}"
                yield Cell(key=key, group=cell.group, labels=labels, item=written)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell: the answer after the writer's chain."""
        for cell, answer in zip(batch, context.read([i.trace for i in batch.items]), strict=True):
            yield cell.row(answer=answer.value, status=answer.status, right=float(answer.says(gold(cell.item.trace))))


class Regenerated(Study):
    """Corrupt one step, let the mind write on, read the answer: the step's total effect."""

    def cells(self, context: Context) -> Iterable[Cell]:
        """Every mind × item with steps of which there is a corrupt version."""
        return [cell for cell in context.contrast_cells() if corruptible(cell.item)]

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per cell and changed step, and one (`step` None) for the chain regenerated from its start."""
        asked: list[tuple[Cell, int | None, Trace]] = []
        for cell in batch:
            trace, contrast = cell.item.trace, cell.item.contrast
            asked.append((cell, None, trace.with_steps(())))
            for i in corruptible(cell.item):
                asked.append((cell, i, trace.with_steps([*trace.steps[:i], contrast.corrupt.steps[i]])))
        before: Reading | None = None
        for (cell, step, _), sample in zip(asked, context.sample([t for *_, t in asked]), strict=True):
            answer = as_reading(sample, cell.item.trace, context.extractor)
            if step is None:
                before = answer
            # Carried on consistently from the first changed step, the corrupt chain's own answer is what follows.
            contrast = cell.item.contrast
            implied = contrast.corrupt.answer if step is not None and step == contrast.changed[0] else None
            yield cell.row(step=step, **compare(answer, before, implied, gold(cell.item.trace)))
