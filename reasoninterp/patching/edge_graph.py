"""The graph of edges: who writes the residual stream, who reads it, and the edges that lead.

Writers are the senders and readers the receivers of `patching.stream`, one by one: the embedding, each head's `z`, each
MLP; each head's `q`, each KV head's `k` and `v`, each MLP, the logits.  An edge joins a writer with a reader that comes
after it.  `rank_edges` lists the edges with the largest attributed scores and, in the same call, confirms them with any
exact measure; `exact_edges` is the one of `patching.paths`, a forward pass an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.patching.agreement import Spans
from reasoninterp.patching.metric import ContrastPlan
from reasoninterp.patching.stream import Receiver, Sender
from reasoninterp.stats import matrix_intervals


class Edge(NamedTuple):
    """A writer, a reader after it, and the place (token or span) at which the one reads the other."""

    place: int
    writer: Sender
    reader: Receiver


ExactEdges = Callable[[Sequence[Edge]], Float[Tensor, "edge contrast"]]


@dataclass(frozen=True)
class EdgeScores:
    """Scores of all edges, in nats.

    Attributes:
        direction: `denoising` or `noising`.
        steps: nodes of the integrated gradient; 0 for the gradient at the patched run.
        scores: `place` is the token, or the span where spans were given; 0 where the writer comes after the reader
            and where a contrast has no such place.
        present: whether a contrast has the place.
        writers, readers: what the last two axes are, in the order of the forward pass.
        is_edge: whether the writer comes before the reader.
    """

    direction: str
    steps: int
    scores: Float[Tensor, "contrast place writer reader"]
    present: Bool[Tensor, "contrast place"]
    writers: tuple[Sender, ...]
    readers: tuple[Receiver, ...]
    is_edge: Bool[Tensor, "writer reader"]

    @property
    def n_edges(self) -> int:
        """Edges at one place."""
        return int(self.is_edge.sum())


def graph(body: Body) -> tuple[tuple[Sender, ...], tuple[Receiver, ...]]:
    """Writers and readers of a body, each in the order of the forward pass."""
    writers, readers = [Sender("embed")], []
    for layer in range(body.n_layers):
        readers += [Receiver("q", layer, h) for h in range(body.n_heads)]
        readers += [Receiver(c, layer, h) for c in ("k", "v") for h in range(body.n_kv_heads)]
        readers.append(Receiver("mlp", layer))
        writers += [Sender("z", layer, h) for h in range(body.n_heads)]
        writers.append(Sender("mlp_out", layer))
    return tuple(writers), (*readers, Receiver("logits"))


def edge_mask(writers: Sequence[Sender], readers: Sequence[Receiver], n_layers: int) -> Bool[Tensor, "writer reader"]:
    """Whether each writer comes before each reader in the forward pass."""
    wrote = torch.tensor([w.stage for w in writers])
    read = torch.tensor([r.stage(n_layers) for r in readers])
    return wrote[:, None] <= read[None, :]


def name_of(node: Sender | Receiver) -> str:
    """`embed`, `L0.z.3`, `L2.mlp`, `logits`."""
    if node.component in ("embed", "logits"):
        return node.component
    return f"L{node.layer}.{node.component}" + ("" if node.head is None else f".{node.head}")


def rank_edges(edges: EdgeScores, k: int, *, exact: ExactEdges | None = None, seed: int = 0) -> pd.DataFrame:
    """The `k` edges whose mean score over contrasts is largest in size, the largest first.

    Columns: `place`, `writer`, `reader` (names), `value` (mean over the contrasts that have the place, nats),
    `ci_low`, `ci_high` (bootstrap over contrasts), `n`; with `exact` also `exact`, `exact_ci_low`, `exact_ci_high` over
    the same contrasts.

    Raises:
        UserError: `k` is negative.
    """
    if k < 0:
        raise UserError(f"k: {k} edges cannot be listed; give 0 or more.")
    count = edges.present.sum(0)
    means = edges.scores.sum(0) / count.clamp(min=1)[:, None, None]
    sizes = means.abs().masked_fill(~edges.is_edge, -1.0).masked_fill((count == 0)[:, None, None], -1.0).flatten()
    top = sizes.topk(min(k, len(sizes)))
    index = [int(i) for i, size in zip(top.indices, top.values, strict=True) if size >= 0]
    places = [np.unravel_index(i, tuple(means.shape)) for i in index]
    chosen = [Edge(int(p), edges.writers[w], edges.readers[r]) for p, w, r in places]
    confirmed = exact(chosen) if exact is not None and chosen else None
    rows = []
    for n, (edge, (p, w, r)) in enumerate(zip(chosen, places, strict=True)):
        here = edges.present[:, int(p)]
        value = _interval(edges.scores[here, int(p), int(w), int(r)], seed)
        row = {"place": edge.place, "writer": name_of(edge.writer), "reader": name_of(edge.reader)}
        row |= {"value": value[0], "ci_low": value[1], "ci_high": value[2], "n": int(here.sum())}
        if confirmed is not None:
            found = _interval(confirmed[n][here], seed)
            row |= {"exact": found[0], "exact_ci_low": found[1], "exact_ci_high": found[2]}
        rows.append(row)
    columns = ["place", "writer", "reader", "value", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=columns + ["exact", "exact_ci_low", "exact_ci_high"] * (exact is not None))


def exact_edges(body: Body, plan: ContrastPlan, direction: str, spans: Spans) -> ExactEdges:
    """Exact effects of edges at the places of `spans` (see `patching.paths.edge_effects`); 0 where there is none."""
    from reasoninterp.patching.paths import edge_effects

    def values(edges: Sequence[Edge]) -> Float[Tensor, "edge contrast"]:
        out = torch.zeros(len(edges), plan.n)
        for place in dict.fromkeys(edge.place for edge in edges):
            # Edges of one writer share its Δ where they follow one another.
            at = sorted(
                (n for n, edge in enumerate(edges) if edge.place == place), key=lambda n: name_of(edges[n].writer)
            )
            wanted = [(edges[n].writer, edges[n].reader) for n in at]
            out[at] = edge_effects(body, plan, direction, wanted, [row[place] for row in spans])
        return out

    return values


def _interval(values: Float[Tensor, " contrast"], seed: int) -> tuple[float, float, float]:
    """Mean with its bootstrap interval."""
    x = values.double().numpy()[:, None]
    low, high = matrix_intervals(x, seed=seed)
    return float(x.mean()), float(low[0]), float(high[0])
