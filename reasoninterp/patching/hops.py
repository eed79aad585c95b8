"""Hops: how the change of one step's tokens reaches the answer through attention, from position to position, exactly.

A trace's prompt is cut into columns (`columns`): question, steps, and the answer position, where the answer is read
together with whatever follows.  Into a run the text of one column, the *origin*, is put from the other chain:

1. Tokens know of each other only through the keys and values of attention.  A hop t → s lets the queries of column s
   see the changed keys and values of column t; all other keys and values before s are the unchanged run's.  Changed
   keys change scores and so the softmax's normaliser: the network computes that, a hop only decides what it reads.
2. Columns are gone through in order.  Column s, with the hops that reach it, runs freely, and its own keys and values,
   now changed, are kept for the hops that leave it.  At last the margin is read at the answer position.
3. `total` is all hops, which is the run on the changed text; `direct` the hop origin → answer alone; `via j` the hops
   origin → j → answer alone; `indirect` all hops but the direct one.  These are exact interventions and need not add
   up: `rest = total − direct − Σ via j` goes by more than one column, or is not additive.

This is edge patching (Goldowsky-Dill et al. 2023, arXiv:2304.05969) between groups of positions instead of heads.  A
hop may be restricted to named layers and heads (query heads, also where several share keys and values): the row is
then run in copies that see different keys, and after each layer every head's output is taken from the copy that is
right for it, so that all copies carry one residual stream.

Values are `sign · (margin − plain margin)` in nats, from 0 to the effect of the change (`residual.SIDES`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.read import margins_from_logits
from reasoninterp.patching.metric import SIDES, ContrastPlan
from reasoninterp.patching.paths import Spans, run_margins
from reasoninterp.patching.plain import span_mask
from reasoninterp.patching.stream import check_aligned

Heads = frozenset[tuple[int, int | None]]
"""(layer, query head) pairs; None for the head is every head of the layer."""


class Hop(NamedTuple):
    """Queries of column `target` see the changed keys and values of column `source`, in these heads (None: in all)."""

    source: int
    target: int
    heads: Heads | None = None


@dataclass(frozen=True)
class RouteEffects:
    """Effects of one column's changed text, each [contrast] in nats; NaN where a contrast lacks a column of the route.

    Attributes:
        origin: the column whose text is changed.
        total, direct, indirect: see the module.
        via: by column between the origin and the answer.
    """

    origin: int
    total: Float[Tensor, " contrast"]
    direct: Float[Tensor, " contrast"]
    indirect: Float[Tensor, " contrast"]
    via: Mapping[int, Float[Tensor, " contrast"]]

    @property
    def rest(self) -> Float[Tensor, " contrast"]:
        """`total − direct − Σ via`: longer routes, and what is not additive."""
        out = self.total - self.direct
        for values in self.via.values():
            out = out - values.nan_to_num()
        return out


class Flow:
    """The columns of some contrasts in one direction, between which hops carry a change.

    Args:
        body: the mind that is read.
        plan: aligned contrasts.
        direction: `denoising` or `noising`.
        spans: by column (its order among columns), the column's tokens in each contrast, None where it has none.  The
            last column is where the answer is read; all contrasts must have it.

    Raises:
        UserError: contrasts not aligned, or one without a token in the last column.
    """

    def __init__(self, body: Body, plan: ContrastPlan, direction: str, spans: Mapping[int, Spans]) -> None:
        check_aligned(plan)
        self.body, self.plan, self.sides = body, plan, SIDES[direction]
        self.answer = max(spans)
        for k, span in enumerate(spans[self.answer]):
            if span is None or not len(span):
                raise UserError(
                    f"contrast {k} has no token between its last step and the answer; give a format that does."
                )
        self._spans = spans
        self._masks = {c: span_mask(plan, self.sides.into, spans[c]).to(body.device) for c in sorted(spans)}
        self._keys = [site(part, layer) for layer in range(body.n_layers) for part in ("k", "v")]
        self._plain = body.cache(plan.ids(self.sides.into), self._keys)
        self._margins = run_margins(body, plan, self.sides.into)
        embed = site("resid_pre", 0)
        self._text = body.cache(plan.ids(self.sides.source), [embed])[embed]
        self._origin: int | None = None
        self._changed: dict[str, Tensor] = {}
        self._total = self._margins

    def total(self, origin: int) -> Float[Tensor, " contrast"]:
        """Effect of the origin's text from the other chain, all else of the text held."""
        if origin != self._origin:
            mask = self._mask(origin)
            embed = (site("resid_pre", 0), lambda act: torch.where(mask[..., None], self._text, act))
            self._changed = {}

            def keep(name: str) -> Hook:
                def f(act: Tensor) -> None:
                    self._changed[name] = torch.where(mask[..., None, None], act, self._plain[name])

                return f

            hooks: list[tuple[str, Hook]] = [embed, *((name, keep(name)) for name in self._keys)]
            self._total = run_margins(self.body, self.plan, self.sides.into, hooks)
            self._origin = origin
        return self._effect(self._total)

    def effect(self, origin: int, hops: Sequence[Hop]) -> Float[Tensor, " contrast"]:
        """Effect of the origin's changed text by these hops alone.

        Raises:
            UserError: a hop that does not lead from a column to a later one, or names no head of the model.
        """
        for hop in hops:
            self._check(hop)
        if all(hop.target != self.answer for hop in hops):
            return torch.zeros(self.plan.n)  # nothing that the answer position reads is changed
        self.total(origin)
        changed = dict(self._changed)
        margins = self._margins
        for target in sorted({hop.target for hop in hops}):
            margins = self._run(target, [hop for hop in hops if hop.target == target], changed)
        return self._effect(margins)

    def routes(self, origin: int, to_step: Heads | None = None, to_answer: Heads | None = None) -> RouteEffects:
        """Total, direct, indirect and via each later column.

        Args:
            origin: the column whose text is changed.
            to_step: heads by which columns before the answer read; by default all.
            to_answer: heads by which the answer position reads; by default all.
        """
        between = [c for c in self._masks if origin < c < self.answer]
        direct = Hop(origin, self.answer, to_answer)
        steps = [Hop(a, b, to_step) for a in (origin, *between) for b in between if a < b]
        reads = {c: Hop(c, self.answer, to_answer) for c in between}
        via = {c: self.effect(origin, [Hop(origin, c, to_step), reads[c]]) for c in between}
        here = self._has(origin)
        nan = torch.tensor(torch.nan)
        return RouteEffects(
            origin=origin,
            total=torch.where(here, self.total(origin), nan),
            direct=torch.where(here, self.effect(origin, [direct]), nan),
            indirect=torch.where(here, self.effect(origin, [*steps, *reads.values()]), nan),
            via={c: torch.where(here & self._has(c), values, nan) for c, values in via.items()},
        )

    def _run(self, target: int, hops: Sequence[Hop], changed: dict[str, Tensor]) -> Float[Tensor, " contrast"]:
        """Run one column with its hops; its changed keys and values go into `changed`, its margins are returned."""
        mask = self._mask(target)
        before = (mask.cumsum(1) == 0) & mask.any(1, keepdim=True)
        seen = [self._seen(layer, hops) for layer in range(self.body.n_layers)]
        copies = max(len(sets) for sets, _ in seen)
        hooks: list[tuple[str, Hook]] = []
        for layer, (sets, pick) in enumerate(seen):
            hops_of_copy = [self._any(sets[min(c, len(sets) - 1)]) for c in range(copies)]
            for part in ("k", "v"):
                hooks.append(self._reading(site(part, layer), before, hops_of_copy, mask, changed))
            if len(sets) > 1:
                hooks.append((site("z", layer), _mixing(copies, pick)))
        side = self.plan.sides[self.sides.into]
        if copies == 1:
            return run_margins(self.body, self.plan, self.sides.into, hooks)
        logits = self.body.forward(side.ids.repeat(copies, 1), positions=side.positions.repeat(copies, 1), hooks=hooks)
        return margins_from_logits(side, logits[: len(side.ids)]).margin.cpu()

    def _reading(
        self, name: str, before: Tensor, hops_of_copy: Sequence[Tensor], mask: Tensor, changed: dict[str, Tensor]
    ) -> tuple[str, Hook]:
        """Keys or values before the column: changed ones where a hop reads them, else those of the unchanged run."""

        def read(act: Tensor) -> Tensor:
            rows = act.chunk(len(hops_of_copy))
            new = [
                torch.where(
                    by_hop[..., None, None], changed[name], self._plain[name].where(before[..., None, None], row)
                )
                for by_hop, row in zip(hops_of_copy, rows, strict=True)
            ]
            changed[name] = torch.where(mask[..., None, None], rows[0], changed[name])
            return torch.cat(new)

        return name, read

    def _seen(self, layer: int, hops: Sequence[Hop]) -> tuple[list[frozenset[int]], list[int]]:
        """The sets of columns whose change is seen in a layer, and which of them each head sees."""
        of_head = [
            frozenset(h.source for h in hops if h.heads is None or {(layer, None), (layer, head)} & h.heads)
            for head in range(self.body.n_heads)
        ]
        sets = list(dict.fromkeys(of_head))
        return sets, [sets.index(s) for s in of_head]

    def _any(self, sources: frozenset[int]) -> Bool[Tensor, "row pos"]:
        out = torch.zeros_like(self._mask(self.answer))
        for source in sources:
            out = out | self._mask(source)
        return out

    def _mask(self, column: int) -> Bool[Tensor, "row pos"]:
        if column not in self._masks:
            raise UserError(f"column {column}: not one of {', '.join(map(str, self._masks))}.")
        return self._masks[column]

    def _has(self, column: int) -> Bool[Tensor, " contrast"]:
        return torch.tensor([span is not None for span in self._spans[column]])

    def _effect(self, margins: Float[Tensor, " contrast"]) -> Float[Tensor, " contrast"]:
        return self.sides.sign * (margins - self._margins)

    def _check(self, hop: Hop) -> None:
        self._mask(hop.source)
        self._mask(hop.target)
        if hop.source >= hop.target:
            raise UserError(f"hop {hop.source} → {hop.target}: tokens are read by later ones only.")
        for layer, head in hop.heads or ():
            if not (0 <= layer < self.body.n_layers and (head is None or 0 <= head < self.body.n_heads)):
                raise UserError(
                    f"head {head} of layer {layer}: the model has layers 0 to {self.body.n_layers - 1} "
                    f"with heads 0 to {self.body.n_heads - 1}."
                )


def _mixing(copies: int, pick: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Every head's output from its copy of the rows, in all copies."""

    def mix(act: Tensor) -> Tensor:
        rows = act.chunk(copies)
        one = torch.stack([rows[copy][:, :, head] for head, copy in enumerate(pick)], dim=2)
        return torch.cat([one] * copies)

    return mix
