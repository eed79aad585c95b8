"""Floating-point operations that exact patching of the residual stream needs, counted from the architecture.

One multiply and add are two operations; norms, activations and softmax are not counted.  Attention is causal: the
query at position p meets p + 1 keys, and each such pair costs a product with the key and one with the value in every
head.  A token of a block costs its keys and values (`keys_values`) and all the rest (`other`): queries, W_O, MLP.

`sweep_flops` is the *floor*: of one contrast,

1. the clean run whole, since any of its activations may be patched in;
2. the corrupt run from where the two part (before, it is the clean run);
3. for each cell that has an effect, the layers from the patched one up, from the first changed token to the one that
   is read; in the last layer keys and values of those tokens, and everything else of the one that is read only;
4. the unembedding at the token that is read, once a run.

`tight` counts less, for it also spares what a sweep could know but which no step above takes for known: (a) both runs
need the last block's attention and MLP at the token that is read only, and the clean run there no other keys; (b) in
the patched layer, tokens behind the span have the corrupt run's queries, keys and values; (c) where a span begins at
or before the place at which the runs part, the patched run is the clean run up to the span's end, so its own tokens
begin there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fixtures import N_VOCABULARY, Size, kv_heads, mlp_width

from reasoninterp.traces.trace import Span


class Cell(NamedTuple):
    """`resid_pre` of a layer, at the tokens of a span."""

    layer: int
    span: Span


class Costs(NamedTuple):
    """Operations of one layer, per token and per attended pair of tokens, and of the unembedding of one token."""

    keys_values: int
    query: int
    other: int
    pair: int
    unembedding: int

    @property
    def token(self) -> int:
        """All linear maps of one token."""
        return self.keys_values + self.query + self.other


def costs(size: Size, family: str) -> Costs:
    """The costs of a network of `fixtures.save_model`."""
    d = size.d_model
    kv = d // size.n_heads * kv_heads(size, family)
    mlp = (2 if family == "gpt2" else 3) * d * mlp_width(size, family)
    return Costs(
        keys_values=2 * 2 * d * kv,
        query=2 * d * d,
        other=2 * (d * d + mlp),
        pair=4 * d,
        unembedding=2 * N_VOCABULARY * d,
    )


def pairs(start: int, stop: int) -> int:
    """Causal pairs (query, key) of the queries at positions `start .. stop`."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def has_effect(cell: Cell, parts: int) -> bool:
    """Whether the runs differ anywhere in the cell: at layer 0 only at the token where they part."""
    return cell.span.stop > parts and (cell.layer > 0 or cell.span.start <= parts)


def forward_flops(c: Costs, n_layers: int, length: int, start: int = 0, n_pairs: int | None = None) -> int:
    """A run's blocks from token `start` on, and its unembedding at one token."""
    n_pairs = pairs(start, length) if n_pairs is None else n_pairs
    return n_layers * ((length - start) * c.token + n_pairs * c.pair) + c.unembedding


def reading_flops(c: Costs, length: int, start: int) -> int:
    """The last block of a run that is read at its last token, from token `start` on, and the unembedding."""
    return (length - start) * c.keys_values + c.query + c.other + length * c.pair + c.unembedding


def cell_flops(c: Costs, size: Size, cell: Cell, parts: int) -> int:
    """One cell with an effect: point 3 and 4."""
    start = max(cell.span.start, parts)
    whole = (size.n_layers - 1 - cell.layer) * ((size.length - start) * c.token + pairs(start, size.length) * c.pair)
    return whole + reading_flops(c, size.length, start)


def tight_cell_flops(c: Costs, size: Size, cell: Cell, parts: int) -> int:
    """One cell with an effect, with (b) and (c)."""
    n, length = size.n_layers, size.length
    if cell.span.start <= parts:  # (c); the patched layer's keys and values behind the span are the corrupt run's
        start = known_from = cell.span.stop
        if start >= length:
            return 0  # the patched run is the clean run
    else:
        start, known_from = cell.span.start, cell.span.stop
    spared = length - known_from
    above = n - 1 - cell.layer
    whole = above * ((length - start) * c.token + pairs(start, length) * c.pair)
    if above:
        return whole + reading_flops(c, length, start) - spared * (c.keys_values + c.query)
    return reading_flops(c, length, start) - spared * c.keys_values - (c.query if spared else 0)


def sweep_flops(c: Costs, size: Size, cells: Iterable[Cell], parts: int, *, tight: bool = False) -> int:
    """The floor of one contrast whose runs part at token `parts`."""
    n, length = size.n_layers, size.length
    live = [cell for cell in cells if has_effect(cell, parts)]
    if not tight:
        runs = forward_flops(c, n, length) + forward_flops(c, n, length, parts)
        return runs + sum(cell_flops(c, size, cell, parts) for cell in live)
    below = (length * c.token + pairs(0, length) * c.pair, (length - parts) * c.token + pairs(parts, length) * c.pair)
    runs = (n - 1) * sum(below) + reading_flops(c, length, 0) + reading_flops(c, length, parts)
    return runs + sum(tight_cell_flops(c, size, cell, parts) for cell in live)
