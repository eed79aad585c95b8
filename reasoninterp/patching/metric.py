"""Clean and corrupt rows of contrasts as one batch, and their effect.

For each contrast the margin `m = log P(corrupt answer) − log P(clean answer)` is read after its clean chain (side 0)
and after its corrupt chain (side 1); `effect = m(side 1) − m(side 0)`, in nats.  Rows are padded on the right; answers
of several tokens take two rows on each side (see `models.read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.models.body import Body, Hook
from reasoninterp.models.context import Context
from reasoninterp.models.read import AnswerPair, MarginPlan, margins_from_logits, plan_margins
from reasoninterp.traces.contrast import Contrast

CLEAN, CORRUPT = 0, 1
Direction = Literal["denoising", "noising"]
DIRECTIONS: tuple[Direction, Direction] = ("denoising", "noising")


class Sides(NamedTuple):
    """The run that is patched and the run that it is patched from, with the sign that makes an effect positive."""

    into: int
    source: int
    sign: float


SIDES = {
    "denoising": Sides(into=CORRUPT, source=CLEAN, sign=-1.0),
    "noising": Sides(into=CLEAN, source=CORRUPT, sign=1.0),
}


@dataclass(frozen=True)
class ContrastPlan:
    """The rows of some contrasts: each side by itself, and both in one batch (clean rows first)."""

    n: int
    sides: tuple[MarginPlan, MarginPlan]
    both: MarginPlan
    prompts: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]

    def ids(self, side: int) -> Int[Tensor, "row pos"]:
        """Token ids of one side."""
        return self.sides[side].ids

    def owners(self, side: int) -> list[int]:
        """The contrast that each row of one side belongs to."""
        found: list[int] = self.sides[side].item_of_row.tolist()
        return found

    @property
    def owner(self) -> list[int]:
        """The contrast that each row of the common batch belongs to."""
        return [item % self.n for item in self.both.item_of_row.tolist()]

    def margins(
        self, body: Body, side: int, hooks: Sequence[tuple[str, Hook]] = (), grad: bool = False
    ) -> Float[Tensor, " contrast"]:
        """Margins of one side, with hooks that see exactly `ids(side)`; on the CPU."""
        plan = self.sides[side]
        logits = body.forward(plan.ids, positions=plan.positions, hooks=hooks, grad=grad)
        return margins_from_logits(plan, logits).margin.cpu()

    def effects(self, body: Body, grad: bool = False) -> Float[Tensor, " contrast"]:
        """`m(corrupt chain) − m(clean chain)` of every contrast, from one forward pass over both sides."""
        logits = body.forward(self.both.ids, positions=self.both.positions, grad=grad)
        margin = margins_from_logits(self.both, logits).margin
        return margin[self.n :] - margin[: self.n]

    def first_difference(self) -> list[int]:
        """For each contrast, the first position at which its two prompts differ."""
        return [
            next((k for k, (a, b) in enumerate(zip(clean, corrupt, strict=False)) if a != b), len(clean))
            for clean, corrupt in zip(*self.prompts, strict=True)
        ]


def contrast_plan(context: Context, contrasts: Sequence[Contrast]) -> ContrastPlan:
    """The rows of some contrasts, in their order."""
    prompts: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    pairs: tuple[list[AnswerPair], list[AnswerPair]] = ([], [])
    for contrast in contrasts:
        for side, trace in enumerate((contrast.clean, contrast.corrupt)):
            a = context.encode(replace(trace, answer=contrast.clean.answer))
            b = context.encode(replace(trace, answer=contrast.corrupt.answer))
            prompts[side].append(a.prompt_ids)
            pairs[side].append(AnswerPair(a.answer_ids, b.answer_ids))
    end = context.end_id
    sides = (plan_margins(prompts[0], pairs[0], end), plan_margins(prompts[1], pairs[1], end))
    both = plan_margins(prompts[0] + prompts[1], pairs[0] + pairs[1], end)
    return ContrastPlan(len(contrasts), sides, both, (tuple(prompts[0]), tuple(prompts[1])))
