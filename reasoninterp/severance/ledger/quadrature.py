"""Quadrature along the path between two minds: nested nodes, and when more of them are of no use.

1. Nodes by Clenshaw–Curtis on [0, 1]; those for n intervals are among those for 2 n.
2. Doubling ends where the entries sum to the change of the readout (`within`), or where only rounding is left
   (`enough`): in bfloat16 and float16 the readout at the two ends and the gradients between them are rounded, each for
   itself, and no number of nodes makes them agree.
3. What more nodes would mend moves the entries; rounding of the ends does not.  So rounding is said to be left where the
   last doubling moved all finest entries together, Σ |change|, by less than `STILL` of the residual that remains.  That
   bounds the change of their sum: the residual shrank by less than a factor of 1 + `STILL`.

The sum alone is no guide: it crosses the right value by chance, so that a residual may grow on its way to 0 (on a trained
pair in float32 from 0.003 to 0.08 to 0.009 of E, at 4, 8 and 16 intervals).  The entries tell the two apart.  In float32,
where a residual above 0.005 went on to shrink, the doubling before had moved them by at least 0.9 of it (six trained pairs,
three readouts).  In bfloat16, where 65 nodes do not shrink it, a doubling moves them by 0.1 to 0.7 of it for small tuning
steps; for larger ones noise of the nodes themselves moves them by more, and all nodes are used.  With float32 and float64
weights rounding is far below any tolerance and is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from reasoninterp.errors import UserError

FLOOR = 1e-4  # nats: a residual below this is within the tolerance whatever the scale of the readout
STILL = 0.5  # share of the residual by which a doubling must move the entries for another one to be of use
ROUNDED = (torch.bfloat16, torch.float16)


class Means(NamedTuple):
    """What a node gives, averaged over contrasts: entries [unit] and the readout."""

    entries: NDArray[np.float64]
    value: float


def nodes(n: int) -> list[tuple[float, float]]:
    """Clenshaw–Curtis nodes on [0, 1] for `n` intervals (n + 1 nodes) with their weights, which sum to 1.

    Exact for polynomials up to degree n; the nodes for n are among those for 2 n, bit for bit.  Waldvogel 2006 (BIT
    46:195) and Trefethen 2008 (SIAM Review 50:67), who finds it as good as Gauss's rule in practice.
    """
    k = np.arange(n + 1)
    j = np.arange(1, n // 2 + 1)
    b = np.where(2 * j == n, 1.0, 2.0)
    w = 1 - (b / (4 * j**2 - 1) * np.cos(2 * np.outer(k, j) * np.pi / n)).sum(1)
    w *= np.where((k == 0) | (k == n), 0.5, 1.0) / n
    alphas = (1 - np.cos(k * np.pi / n)) / 2
    alphas = np.where(2 * k < n, alphas, np.where(2 * k > n, 1 - alphas[::-1], 0.5))  # symmetric to the last bit
    return [(float(a), float(b)) for a, b in zip(alphas, w, strict=True)]


def check(nodes: int, max_nodes: int, tolerance: float) -> None:
    """Raise a UserError where the numbers of a quadrature are out of range."""
    if nodes < 1 or max_nodes < nodes or tolerance <= 0:
        raise UserError("ledger: --nodes must be at least 1, --max-nodes not less, and --tolerance above 0.")


def within(total: float, e_from: float, e_to: float, tolerance: float) -> bool:
    """Whether the entries sum to the change of the readout closely enough."""
    scale = max(abs(e_from), abs(e_to))
    return abs(total - (e_to - e_from)) <= max(tolerance * scale, FLOOR)


def enough(known: Mapping[float, Means], n: int, tolerance: float, dtype: torch.dtype) -> bool:
    """Whether another doubling is of no use: the entries sum up, or what is left is rounding.

    Args:
        known: by node; those for `n` intervals.
        n: intervals.
        tolerance: for the residual, relative to the larger end.
        dtype: of the weights.
    """
    entries, e_from, e_to = _integral(known, n), known[0.0].value, known[1.0].value
    if within(float(entries.sum()), e_from, e_to, tolerance):
        return True
    if dtype not in ROUNDED or n % 2:
        return False
    moved = float(np.abs(entries - _integral(known, n // 2)).sum())
    return moved < STILL * abs(float(entries.sum()) - (e_to - e_from))


def rounding_of(known: Mapping[float, Means], n: int, dtype: torch.dtype) -> str:
    """The weights' dtype where its rounding keeps the residual up, else "".

    That is where the last doubling shrank the residual by less than a factor of 1 + `STILL`.
    """
    if dtype not in ROUNDED or n % 2:
        return ""
    change = known[1.0].value - known[0.0].value
    now, before = (abs(float(_integral(known, m).sum()) - change) for m in (n, n // 2))
    return str(dtype).removeprefix("torch.") if before < (1 + STILL) * now else ""


def _integral(known: Mapping[float, Means], n: int) -> NDArray[np.float64]:
    parts: list[NDArray[np.float64]] = [w * known[a].entries for a, w in nodes(n)]
    return np.sum(parts, axis=0)
