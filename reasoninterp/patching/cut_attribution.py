"""Each head's part in what cutting a column of the trace from the answer's attention does, by integrated gradients.

1. A cut takes every head's attention from the answer's queries to the column's keys: the pattern α becomes α′, the
   softmax of the scores without these keys (as in `knockout`, the rest renormalises).
2. All heads go there at once along a line, `α + t (α′ − α)` for t from 0 to 1, each layer seeing what the layers below
   it make of theirs.  A head's part is `∫₀¹ ∂m/∂t_head dt` of the margin `m` (nats), by Gauss–Legendre nodes: one
   backward pass a node gives all layers and heads.
3. The parts sum to the exact change of the margin when all heads are cut together (Sundararajan et al. 2017,
   arXiv:1703.01365: completeness), up to the quadrature.

Knocking out one head at a time answers another question: where two heads stand in for each other, each knockout alone
shows nothing, and here they share what both carry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.read import MarginPlan, margins_from_logits
from reasoninterp.patching.attention_edges import check_obeys
from reasoninterp.traces.trace import Span

NODES = 8


def cut_attribution(
    body: Body, plan: MarginPlan, queries: Sequence[Span], keys: Sequence[Span | None], *, nodes: int = NODES
) -> Float[Tensor, "item layer head"]:
    """Parts of all heads in the change of each item's margin, nats, on the CPU; NaN where an item has no column.

    Args:
        body: the mind that is read.
        plan: rows and answers: `contrast_plan(...).sides[side]`.
        queries: the positions that lose the column, for each item (`readers.answer_queries`).
        keys: the column, for each item; keys from the first query on, and the row's first token, are not cut.
        nodes: of the quadrature.

    Raises:
        UserError: no nodes, or an architecture whose attention scores are not what it uses.
    """
    if nodes < 1:
        raise UserError(f"nodes: {nodes} nodes measure nothing; give at least one.")
    check_obeys(body)
    cut = _cut_mask(plan, queries, keys).to(body.device)
    owner = plan.item_of_row.to(body.device)
    total = torch.zeros(plan.n_items, body.n_layers, body.n_heads)
    x, w = np.polynomial.legendre.leggauss(nodes)
    for node, weight in zip((x + 1) / 2, w / 2, strict=True):
        gates = [
            torch.full((plan.n_items, body.n_heads), float(node), device=body.device) for _ in range(body.n_layers)
        ]
        hooks = [pair for k, g in enumerate(gates) for pair in _towards_cut(k, g.requires_grad_(), owner, cut)]
        logits = body.forward(plan.ids, positions=plan.positions, hooks=hooks, grad=True)
        margins_from_logits(plan, logits).margin.sum().backward()  # type: ignore[no-untyped-call]
        total += float(weight) * torch.stack([_gradient(g) for g in gates], dim=1)
    absent = torch.tensor([span is None for span in keys])
    return total.masked_fill(absent[:, None, None], torch.nan)


def _towards_cut(
    layer: int, gate: Float[Tensor, "item head"], owner: Tensor, cut: Bool[Tensor, "row 1 pos pos"]
) -> list[tuple[str, Hook]]:
    """Hooks that put a layer's pattern on the line between what it is (gate 0) and what is left of it (gate 1)."""
    seen: list[Tensor] = []

    def keep(scores: Tensor) -> None:
        seen.append(scores)

    def mix(pattern: Tensor) -> Tensor:
        scores = seen.pop()
        left = scores.masked_fill(cut, torch.finfo(scores.dtype).min).float().softmax(-1).to(pattern.dtype)
        share = gate[owner][..., None, None].to(pattern.dtype)
        return torch.lerp(pattern, left, share)

    return [(site("attn_scores", layer), keep), (site("pattern", layer), mix)]


def _cut_mask(plan: MarginPlan, queries: Sequence[Span], keys: Sequence[Span | None]) -> Bool[Tensor, "row 1 pos pos"]:
    """Which edges are cut in each row; the first token stays visible."""
    out = torch.zeros(len(plan.ids), 1, plan.ids.shape[1], plan.ids.shape[1], dtype=torch.bool)
    for row, item in enumerate(plan.item_of_row.tolist()):
        span, asks = keys[item], queries[item]
        if span is not None:
            out[row, 0, asks.start : asks.stop, max(1, span.start) : max(1, min(span.stop, asks.start))] = True
    return out


def _gradient(gate: Tensor) -> Tensor:
    """The gate's gradient on the CPU; 0 where no path leads from it to what is read."""
    return torch.zeros(gate.shape) if gate.grad is None else gate.grad.float().cpu()
