"""Edges of attention: what a knockout cuts, and the two ways to cut it.

An `Edge` goes from query positions to key positions of a row, in some layers and heads.  `settle` brings edges to what
is really there and refuses what is not defined; `edge_hooks` writes the dtype's minimum into the pre-softmax scores
(the pattern is 0 there, and the rest of the row renormalises), layer by layer; `edge_mask` does the same as one additive
mask where every layer and head is cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.traces.trace import Span


class Edge(NamedTuple):
    """Attention from query positions to key positions (of the row), in some layers and heads; None means all.

    Spans may reach beyond the row: what is not there is not cut.
    """

    queries: Span
    keys: Span
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


EdgeSet: TypeAlias = Sequence[Edge]
_obedient: WeakSet[Body] = WeakSet()


def settle(
    body: Body, edges: EdgeSet, length: int, *, keep_first: bool = True, name: str = "edges"
) -> tuple[Edge, ...]:
    """The edges as far as causality and the row let them exist, each with at least one query that loses a key.

    Args:
        body: whose layers and heads are meant.
        edges: edges that are cut together.
        length: tokens of the row.
        keep_first: never cut the first token as a key.
        name: how an error calls these edges.

    Raises:
        UserError: a layer, head or position that is not there, or a query left without a key.
    """
    out = []
    for edge in edges:
        for kind, wanted, n in (("layer", edge.layers, body.n_layers), ("head", edge.heads, body.n_heads)):
            bad = [i for i in wanted or () if not 0 <= i < n]
            if bad or wanted == ():
                raise UserError(
                    f"{name}: {kind}s {list(wanted or ())} are not some of the model's {n}, counted from 0."
                )
        if edge.queries.start < 0 or edge.keys.start < 0:
            raise UserError(f"{name}: positions are counted from the row's first token; give spans from 0 up.")
        keys = Span(max(edge.keys.start, int(keep_first)), min(edge.keys.stop, edge.queries.stop, length))
        queries = Span(max(edge.queries.start, keys.start), min(edge.queries.stop, length))
        if keys.start < keys.stop and queries.start < queries.stop:
            out.append(edge._replace(queries=queries, keys=keys))
    # Where a layer sees only the last few tokens, the first one may be out of a query's sight.
    if out and (not keep_first or has_windows(body.config)):
        blind = _blind_query(body, out)
        if blind is not None:
            raise UserError(f"{name}: the query at position {blind} would be left without a key; leave it one to read.")
    return tuple(out)


def _blind_query(body: Body, edges: Sequence[Edge]) -> int | None:
    """The first query that loses all its keys in some layer and head."""
    layers: list[int | None] = [*sorted({i for e in edges for i in e.layers or ()})]
    layers += [None] * any(e.layers is None for e in edges)
    if has_windows(body.config):
        layers = [*range(body.n_layers)]
    heads = sorted({i for e in edges for i in e.heads or ()}) + [None] * any(e.heads is None for e in edges)
    for layer in layers:
        for head in heads:  # None stands for a layer or head that no edge names
            acting = [e for e in edges if layer in (e.layers or (layer,)) and head in (e.heads or (head,))]
            if not acting:
                continue
            start, stop = min(e.queries.start for e in acting), max(e.queries.stop for e in acting)
            cut = torch.zeros(stop - start, stop, dtype=torch.bool)
            for e in acting:
                cut[e.queries.start - start : e.queries.stop - start, _slice(e.keys)] = True
            blind = ~(~cut).tril(start).triu(start + 1 - _sight(body.config, layer, stop)).any(1)
            if blind.any():
                return start + int(blind.int().argmax())
    return None


def edge_hooks(cells: Sequence[EdgeSet], n_layers: int) -> list[tuple[str, Hook]]:
    """Hooks that cut each cell's edges in its row of the batch: one on the scores of every layer that has any."""
    by_layer: dict[int, list[tuple[int, Edge]]] = defaultdict(list)
    for row, edges in enumerate(cells):
        for edge in edges:
            for layer in range(n_layers) if edge.layers is None else edge.layers:
                by_layer[layer].append((row, edge))

    def cut(found: Sequence[tuple[int, Edge]]) -> Hook:
        def f(scores: Tensor) -> Tensor:
            # In place: the scores were made for this forward, and an edge is a small part of them.
            for row, edge in found:
                heads: Any = slice(None) if edge.heads is None else list(edge.heads)
                scores[row, heads, _slice(edge.queries), _slice(edge.keys)] = torch.finfo(scores.dtype).min
            return scores

        return f

    return [(site("attn_scores", layer), cut(found)) for layer, found in sorted(by_layer.items())]


def edge_mask(cells: Sequence[EdgeSet], length: int, dtype: torch.dtype) -> Float[Tensor, "cell 1 pos pos"]:
    """The causal mask with each cell's edges cut, additive; layers and heads of the edges are not looked at."""
    least = torch.finfo(dtype).min
    causal = torch.full((length, length), least, dtype=dtype).triu(1)
    out = causal.repeat(len(cells), 1, 1, 1)
    for row, edges in enumerate(cells):
        for edge in edges:
            out[row, :, _slice(edge.queries), _slice(edge.keys)] = least
    return out


def _slice(span: Span) -> slice:
    return slice(span.start, span.stop)  # unpacking with * would make room for as many values as the span has tokens


def has_windows(config: Any) -> bool:
    """Whether some layer sees less than all earlier tokens, which a mask of ours would undo."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return bool(layers - {"full_attention"} or window or getattr(config, "attention_types", None))


def _sight(config: Any, layer: int | None, length: int) -> int:
    """How many tokens, itself included, a query of this layer sees at most."""
    kinds = getattr(config, "layer_types", None)
    if not has_windows(config) or (kinds and layer is not None and kinds[layer] == "full_attention"):
        return length
    return int(getattr(config, "sliding_window", None) or getattr(config, "window_size", None) or length)


def check_obeys(body: Body) -> None:
    """Refuse an architecture whose scores are only shown, not used: every knockout would read 0."""
    if body in _obedient:
        return
    seen: list[Tensor] = []
    cells = [[Edge(Span(2, 3), Span(1, 2))]]
    watch = [(site("pattern", layer), lambda act: seen.append(act[0, :, 2, 1])) for layer in range(body.n_layers)]
    last = torch.tensor([[2]])
    body.forward(torch.zeros(1, 3, dtype=torch.long), positions=last, hooks=[*edge_hooks(cells, body.n_layers), *watch])
    if any(bool(act.any()) for act in seen):
        raise UserError(
            f"The attention of a {body.config.model_type} model does not take edits of its scores; "
            "use a model with eager attention."
        )
    _obedient.add(body)
