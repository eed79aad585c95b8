"""The cells of a sweep: contrast × site × span, and the lanes that they take.

1. `Sites` says which components, layers, heads and spans; `cells_of` makes the table of all cells.
2. `lanes_of` narrows each span to the tokens at which source and run differ at all (equal activations change
   nothing: such cells are exactly 0 and are not run) and makes one lane for every row of the cell's contrast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.patching.columns import ANSWER, Column, columns
from reasoninterp.patching.lanes import Ints, Lanes
from reasoninterp.patching.sources import differing
from reasoninterp.patching.staircase import ENTERS_ABOVE, Edits
from reasoninterp.patching.store import SiteKey, Store
from reasoninterp.traces.trace import Span, TokenTrace

COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")
PER_HEAD = ("z", "q", "k", "v", "pattern")
SpanRule = str | Callable[[TokenTrace], Sequence[Column]]


@dataclass(frozen=True)
class Sites:
    """Which activations a sweep patches.

    Attributes:
        components: among `COMPONENTS`.
        layers: which layers; None for all.  With a window, the first layer of each.
        heads: patch each head by itself (`each`), all together (`all`), or these.
        window: so many layers at once, from each layer on.
        spans: `columns` (question, every step, last step, answer position: see `columns`), `tokens`, `chain`,
            `question`, `answer` (the token where the answer is read), or a function from a trace's tokens to columns.
    """

    components: tuple[str, ...] = ("resid_pre",)
    layers: tuple[int, ...] | None = None
    heads: str | tuple[int, ...] = "each"
    window: int = 1
    spans: SpanRule = "columns"

    def check(self, body: Body) -> None:
        """Raise a UserError for what the body does not have."""
        if isinstance(self.components, str) or not self.components or not set(self.components) <= set(COMPONENTS):
            raise UserError(f"components={self.components!r}: give a tuple of some of {', '.join(COMPONENTS)}.")
        if self.window < 1 or self.window > body.n_layers:
            raise UserError(f"window={self.window}: give a number of layers from 1 to {body.n_layers}.")
        if self.window > 1 and {"pattern", "resid_post"} & set(self.components):
            raise UserError(f"window={self.window}: pattern and resid_post are patched one layer at a time.")
        if wrong := [n for n in self.layers or () if not 0 <= n < body.n_layers]:
            raise UserError(f"layers={wrong}: the network has layers 0 to {body.n_layers - 1}.")
        if not self.first_layers(body):
            raise UserError(
                f"layers={self.layers}: no window of {self.window} layers begins there; give others, or None."
            )
        for component in self.components:
            self.heads_of(component, body)

    def first_layers(self, body: Body) -> list[int]:
        """The first layer of every window."""
        layers = range(body.n_layers) if self.layers is None else self.layers
        return [n for n in layers if n + self.window <= body.n_layers]

    def heads_of(self, component: str, body: Body) -> list[int]:
        """Heads to patch one by one; [-1] for all together."""
        if component not in PER_HEAD or self.heads == "all":
            return [-1]
        n = body.n_kv_heads if component in ("k", "v") else body.n_heads
        if isinstance(self.heads, str):
            if self.heads != "each":
                raise UserError(f"heads={self.heads!r}: give 'each', 'all' or numbers of heads.")
            return list(range(n))
        if not self.heads:
            raise UserError("heads=(): give 'each', 'all' or numbers of heads.")
        if wrong := [h for h in self.heads if not 0 <= h < n]:
            raise UserError(f"heads={wrong}: {component} has heads 0 to {n - 1}.")
        return list(self.heads)

    def keys(self, body: Body) -> set[SiteKey]:
        """Every (component, layer) that is patched."""
        return {(c, n + k) for c in self.components for n in self.first_layers(body) for k in range(self.window)}


def spans_of(tokens: TokenTrace, rule: SpanRule) -> list[Column]:
    """The spans of one trace, each within the prompt.

    Raises:
        UserError: an unknown rule, or a span outside the prompt.
    """
    stop = tokens.answer.start
    if callable(rule):
        found = list(rule(tokens))
        if wrong := [c for c in found if not 0 <= c.span.start <= c.span.stop <= stop]:
            raise UserError(f"spans: {wrong[0].label!r} is not within the {stop} tokens before the answer.")
        return found
    if rule == "columns":
        return columns(tokens)
    if rule == "tokens":
        return [Column(f"token {p}", p, Span(p, p + 1)) for p in range(stop)]
    if rule == "chain":
        return [Column("chain", 0, tokens.chain)]
    if rule == "question":
        return [columns(tokens)[0]]
    if rule == "answer":
        return [Column(ANSWER, 0, Span(stop - 1, stop))]
    raise UserError(f"spans={rule!r}: give columns, tokens, chain, question, answer or a function of a trace's tokens.")


class Cells(NamedTuple):
    """The table of cells, and for each its span."""

    table: pd.DataFrame
    start: Ints
    stop: Ints


def cells_of(body: Body, tokens: Sequence[TokenTrace], sites: Sites) -> Cells:
    """All cells: every contrast × span × component × layer × head."""
    sites.check(body)
    places = [(c, n, h) for c in sites.components for n in sites.first_layers(body) for h in sites.heads_of(c, body)]
    spans = [(k, c) for k, t in enumerate(tokens) for c in spans_of(t, sites.spans)]
    n_places, n_spans = len(places), len(spans)
    component, layer, head = (np.array(x) for x in zip(*places, strict=True)) if places else (np.zeros(0),) * 3
    table = pd.DataFrame(
        {
            "contrast": np.repeat([k for k, _ in spans], n_places).astype(np.int64),
            "component": np.tile(component, n_spans),
            "layer": np.tile(layer, n_spans).astype(np.int64),
            "head": np.tile(head, n_spans).astype(np.int64),
            "column": np.repeat(np.array([c.label for _, c in spans], dtype=object), n_places),
            "column_index": np.repeat([c.order for _, c in spans], n_places).astype(np.int64),
        }
    )
    start = np.repeat([c.span.start for _, c in spans], n_places).astype(np.int64)
    stop = np.repeat([c.span.stop for _, c in spans], n_places).astype(np.int64)
    return Cells(table, start, stop)


class Different:
    """For each site, from which token to which a span's activations differ between run and source."""

    def __init__(self, into: Store, source: Store | None) -> None:
        self._into, self._source = into, source
        self._known: dict[SiteKey, tuple[Ints, Ints]] = {}

    def narrow(self, component: str, layer: int, rows: Ints, heads: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
        """The tokens of each span, from the first that differs to behind the last; start ≥ stop where none does."""
        if self._source is None or component == "pattern" or not len(rows):
            return start, stop
        if (component, layer) not in self._known:
            self._known[component, layer] = self._edges(component, layer)
        following, last = self._known[component, layer]
        axis = np.where(heads < 0, following.shape[2] - 1, heads)
        width = following.shape[1]
        first = following[rows, np.minimum(start, width - 1), axis]
        behind = last[rows, np.clip(stop - 1, 0, width - 1), axis] + 1
        return np.maximum(first, start), np.minimum(behind, stop)

    def _edges(self, component: str, layer: int) -> tuple[Ints, Ints]:
        """[row, pos, head]: the next differing token from here on, and the last one up to here; all heads come last."""
        assert self._source is not None
        a, b = self._into.at(component, layer), self._source.at(component, layer)
        per_head = component in PER_HEAD
        found = differing(a, b, per_head)
        found = found[..., None] if not per_head else np.concatenate([found, found.any(-1, keepdims=True)], axis=-1)
        width = found.shape[1]
        at = np.arange(width)[None, :, None]
        last = np.maximum.accumulate(np.where(found, at, -1), axis=1)
        following = np.minimum.accumulate(np.where(found, at, width)[:, ::-1], axis=1)[:, ::-1]
        return following, last


class Work(NamedTuple):
    """What has to be run: lanes, their edits, and the cell that each lane belongs to."""

    lanes: Lanes
    edits: Edits
    cell: Ints


def lanes_of(
    cells: Cells,
    chosen: Ints,
    rows_of: Sequence[Sequence[int]],
    stops: Ints,
    different: Different,
    window: int,
    *,
    enters: bool = True,
    source_row: Ints | None = None,
    shift: Ints | None = None,
) -> Work:
    """The lanes of some cells.

    Args:
        cells: all cells.
        chosen: which of them.
        rows_of: for each contrast, its rows.
        stops: for each row, the token behind the last that is read.
        different: narrows spans.
        window: layers patched at once.
        enters: whether a patch may come in above its own layer (not while other hooks act).
        source_row, shift: per cell, where the source is read; by default at the same row and position.
    """
    table = cells.table
    contrast = table["contrast"].to_numpy()[chosen]
    n_rows = np.array([len(rows_of[k]) for k in contrast], dtype=np.int64)
    cell = np.repeat(chosen, n_rows)
    row = np.array([r for k in contrast for r in rows_of[k]], dtype=np.int64)
    component = table["component"].to_numpy()[cell]
    layer, head = table["layer"].to_numpy()[cell], table["head"].to_numpy()[cell]
    by_site = pd.DataFrame({"component": component, "layer": layer}).groupby(["component", "layer"]).indices
    parts = []
    for k in range(window):
        start, stop = cells.start[cell].copy(), np.minimum(cells.stop[cell], stops[row])
        for (name, n), mine in by_site.items():
            start[mine], stop[mine] = different.narrow(
                str(name), int(n) + k, row[mine], head[mine], start[mine], stop[mine]
            )
        live = start < stop
        parts.append((np.nonzero(live)[0], layer[live] + k, start[live], stop[live]))
    at = np.concatenate([p[0] for p in parts])
    edit_layer, start, stop = (np.concatenate([p[i] for p in parts]) for i in (1, 2, 3))
    used, lane = np.unique(at, return_inverse=True)
    first = np.full(len(used), np.iinfo(np.int64).max)
    np.minimum.at(first, lane, start)
    lowest = np.full(len(used), np.iinfo(np.int64).max)
    np.minimum.at(lowest, lane, edit_layer)
    names = component[at]
    can_enter = np.isin(names, (*ENTERS_ABOVE, "resid_pre") if enters else ("resid_pre", "resid_post"))
    entering = can_enter & (edit_layer == lowest[lane])
    above = (entering & np.isin(names, ENTERS_ABOVE)).astype(np.int64)
    join = np.full(len(used), np.iinfo(np.int64).max)
    np.minimum.at(join, lane, edit_layer + above)
    own_row = row[used]
    edits = Edits(
        lane=lane,
        component=names,
        layer=edit_layer,
        head=head[at],
        start=start,
        stop=stop,
        source_row=row[at] if source_row is None else source_row[cell[at]],
        shift=np.zeros(len(at), dtype=np.int64) if shift is None else shift[cell[at]],
        enters=entering,
    )
    return Work(Lanes(own_row, first, stops[own_row], join), edits, cell[used])
