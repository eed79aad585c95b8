"""How much each token of a context matters for the token that a mind wrote next: by knockout, and by gradient × input.

The target is the token at position t of a row (`alternatives.Place`); log P(target) is read from the logits at t − 1, in a
run over `row[:t]`, which does not hold the target.  (STIM's code reads the logits *at* the target, that is, the
distribution of the token after it.)  Both measures are in nats, one value for each of the t context tokens, positive
where the token makes the target more probable.

*Knockout.*  Attention to token j is cut in all layers and heads (`patching.knockout`), from every later position (`later`,
the default: nothing of j gets past its own position) or from t − 1 alone (`predictor`: what it reads of j itself, not
what reaches it through other tokens).  The saliency is `log P − log P(with the cut)`.  It is NaN, not defined, for the
first token, which stays visible since attention that reads nothing goes there, and for token t − 1, whose own residual
stream makes the prediction whatever is cut.

*Gradient × input.*  `⟨∂ log P / ∂x_j, x_j⟩` with x_j the residual stream before the first layer (the token's embedding;
in networks with learned positions, plus its position's): to first order what log P loses if x_j becomes 0.  Defined for
every token.

`shapley` has a third measure, by sampled coalitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.memorization.alternatives import Place, check_places
from reasoninterp.models.body import Body, site
from reasoninterp.models.read import MarginPlan, margins_from_logits
from reasoninterp.patching.attention_edges import Edge
from reasoninterp.patching.knockout import knockout
from reasoninterp.traces.trace import Span

Queries = Literal["later", "predictor"]
Saliency = Float64[np.ndarray, " pos"]
MAX_ROWS = 32


def knockout_saliency(
    body: Body, places: Sequence[Place], *, queries: Queries = "later", max_rows: int = MAX_ROWS
) -> list[Saliency]:
    """What log P(target) loses when each token of the context can no longer be attended to; one array a place, in order.

    Args:
        body: the mind that is read.
        places: the targets.
        queries: which positions lose sight of the token.
        max_rows: at most so many rows in one forward pass.

    Raises:
        UserError: a place that nothing predicts, unknown queries, or an architecture that takes no cuts.
    """
    if queries not in ("later", "predictor"):
        raise UserError(f"queries: {queries!r} is not one of later, predictor.")
    check_places(places)
    out = [np.full(place.position, np.nan) for place in places]
    for start in range(0, len(places), max_rows):
        chunk = places[start : start + max_rows]
        cut = [(i, key) for i, place in enumerate(chunk) for key in range(1, place.position - 1)]
        if not cut:
            continue
        lasts = [chunk[i].position - 1 for i, _ in cut]
        firsts = [key + 1 if queries == "later" else last for (_, key), last in zip(cut, lasts, strict=True)]
        cells = [
            [Edge(Span(first, last + 1), Span(key, key + 1))]
            for (_, key), first, last in zip(cut, firsts, lasts, strict=True)
        ]
        found = knockout(body, target_plan(chunk), cells, [i for i, _ in cut], max_rows=max_rows)
        for (i, key), loss in zip(cut, (found.base_margin - found.margin).double().tolist(), strict=True):
            out[start + i][key] = loss
    return out


def gradient_saliency(body: Body, places: Sequence[Place], *, max_rows: int = MAX_ROWS) -> list[Saliency]:
    """Gradient × input of log P(target) for each token of the context; one array a place, in order.

    Raises:
        UserError: a place that nothing predicts.
    """
    out: list[Saliency] = []
    for start in range(0, len(places), max_rows):
        chunk = places[start : start + max_rows]
        plan = target_plan(chunk)
        found: list[Tensor] = []

        def watch(stream: Tensor, found: list[Tensor] = found) -> Tensor:
            stream.register_hook(lambda gradient: found.append((stream.detach().double() * gradient.double()).sum(-1)))
            return stream

        logits = body.forward(plan.ids, hooks=[(site("resid_pre", 0), watch)], positions=plan.positions, grad=True)
        margins_from_logits(plan, logits).margin.sum().backward()  # rows do not meet, so the sum keeps them apart
        products = found[0].cpu().numpy()
        out += [row[: place.position].copy() for row, place in zip(products, chunk, strict=True)]
    return out


def target_plan(places: Sequence[Place]) -> MarginPlan:
    """The contexts as rows of a plan whose margin is log P(target): the target is its only answer.

    Raises:
        UserError: a place that nothing predicts.
    """
    check_places(places)
    longest = max((place.position for place in places), default=0)
    ids = torch.tensor([[*place.context, *[0] * (longest - place.position)] for place in places], dtype=torch.long)
    rows = torch.arange(len(places))
    last = torch.tensor([[place.position - 1] for place in places], dtype=torch.long)
    target = torch.tensor([place.target for place in places], dtype=torch.long)
    corrupt_tail = torch.full_like(rows, 2)  # the part that enters a margin with a plus sign
    return MarginPlan(ids, last, rows, torch.zeros_like(rows), target, rows, corrupt_tail, rows, len(places))
