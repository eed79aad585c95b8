"""Where patched-in activations come from.

`other run`    the other chain of the contrast (clean into corrupt is denoising, corrupt into clean noising);
`other mind`   the same chain under other weights (cross-model patching, after Prakash et al. 2024, arXiv:2402.14811);
`zero`         zeros;
`mean`         the mean over traces of all tokens of the same column (step, question, …);
`same answer`  another trace whose answer is the one that the other run implies: a control, in which the effect should
               survive if it is the answer that is carried;
`random`       another trace with a third answer: a control, in which it should not.

A source gives values at (row, position); the last two read another row, shifted so that the column's tokens meet, and
a mean is read at its column's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.models.body import Body, site
from reasoninterp.patching.store import Store

SourceName = Literal["other_run", "zero", "mean", "same_answer", "random"]


@dataclass
class Stored:
    """Activations of a store.

    `aligned` says that row and position mean the same there as in the run that is patched, so that places where the
    two are equal can be skipped.  `pattern` is set for one layer at a time: [row, head, query, key].
    """

    store: Store
    aligned: bool = True
    pattern: dict[int, Tensor] = field(default_factory=dict)

    def values(self, component: str, layer: int, rows: Tensor, positions: Tensor) -> Tensor:
        """Activations at rows and positions."""
        if component == "pattern":
            return self.pattern[layer][rows, :, positions]
        return self.store.at(component, layer)[rows, positions]


@dataclass
class Constant:
    """The same value at every token: zero, or with a `table` [column, ...] the mean of a column, which is given as row."""

    shape: Callable[[str], tuple[int, ...]]
    like: Tensor
    table: dict[tuple[str, int], Tensor] | None = None
    aligned: bool = False

    def values(self, component: str, layer: int, rows: Tensor, positions: Tensor) -> Tensor:
        """The value for each row, whatever the position."""
        if self.table is None:
            return torch.zeros(len(rows), *self.shape(component), dtype=self.like.dtype, device=self.like.device)
        return self.table[component, layer][rows]


def shapes(body: Body) -> Callable[[str], tuple[int, ...]]:
    """The shape of one token's activation at a component."""

    def shape(component: str) -> tuple[int, ...]:
        if component in ("z", "q"):
            return (body.n_heads, body.d_head)
        if component in ("k", "v"):
            return (body.n_kv_heads, body.d_head)
        return (body.d_model,)

    return shape


def pattern_of(body: Body, ids: Tensor, layer: int, max_rows: int = 8) -> Tensor:
    """Attention patterns of one layer, [row, head, query, key], by the network's own forward."""
    name = site("pattern", layer)
    parts = [body.cache(ids[at : at + max_rows], [name])[name] for at in range(0, len(ids), max_rows)]
    return torch.cat(parts)


def differing(into: Tensor, source: Tensor, per_head: bool) -> NDArray[np.bool_]:
    """Where two activations differ at all: [row, pos], or [row, pos, head]."""
    different = into != source
    if per_head:
        return different.any(-1).cpu().numpy()
    return different.flatten(2).any(-1).cpu().numpy()
