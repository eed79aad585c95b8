"""Two minds in one gauge: what a ledger integrates towards and what grafts are taken from.

1. A ledger splits a path between two minds' weights over Units, and a graft takes part of one mind's weights and part of
   another's: both mean something only where the two minds speak of the same heads in the same bases.  `aligned` brings
   the tuned mind into the base's gauge (`severance.gauge.align`): a further mind, function-equal to the tuned one,
   towards which the ledger integrates and onto which everything is grafted.
2. It is made once for a context and kept with its minds.  Another process has another context, which has no such mind
   yet.  So a cell carries its handle (`Asked`), and `each_mind` makes the alignment where it is not there yet and puts
   the minds of a batch in, one after another.  Where nothing was aligned, the handle may be the cell's group as well
   (`group_of`): it is then put in once for all batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import groupby
from typing import NamedTuple

import pandas as pd

from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Handle
from reasoninterp.severance.gauge.align import Alignment
from reasoninterp.severance.gauge.align import align as align_gauges
from reasoninterp.study import Batch

NOT_ALIGNED = "Not aligned: "  # how the note begins that says why two minds may still differ by a gauge
NOT_ASKED = f"{NOT_ALIGNED}the minds' weights were compared as they are."


class Asked(NamedTuple):
    """What a cell asks for: one item, in one mind."""

    handle: Handle
    item: Item


def aligned(context: Context, from_mind: str, to_mind: str, *, align: bool = True) -> Alignment:
    """The tuned mind in the base's gauge, made once for the context; its `mind` is what is compared with the base.

    Args:
        context: minds.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
        align: False leaves `to_mind` as it is, with a note.
    """
    if not align:
        return Alignment(to_mind, (), float("nan"), float("nan"), (NOT_ASKED,))
    key = "alignment", from_mind, to_mind
    minds = context.minds
    if key not in minds.memo:
        found = align_gauges(minds, from_mind, to_mind)  # one that is refused discards a mind, and so changes the memo
        minds.memo[key] = found
    kept: Alignment = minds.memo[key]
    return kept


def why_not_aligned(found: Alignment) -> str:
    """Why two minds may still differ by a gauge; "" where they were aligned, or nothing was to be aligned."""
    return next((n.removeprefix(NOT_ALIGNED).rstrip(".") for n in found.notes if n.startswith(NOT_ALIGNED)), "")


def alignment_table(found: Alignment) -> pd.DataFrame:
    """One row per note: `mind` (what was compared with the base), `distance_before, distance_after`, `note`.

    Distances are Frobenius norms of tuned − base over all parameters; NaN where no alignment was asked for.
    """
    about = {"mind": found.mind, "distance_before": found.distance_before, "distance_after": found.distance_after}
    return pd.DataFrame([{**about, "note": note} for note in found.notes or ("",)])


def group_of(context: Context, handle: Handle) -> Hashable:
    """The group of a cell that is measured in a handle: the handle itself where every process can open it, else ""."""
    return handle if handle.minds() <= set(context.minds.names) else ""


def each_mind(context: Context, batch: Batch, from_mind: str, to_mind: str, *, align: bool) -> Iterator[Batch]:
    """The cells of a batch (whose items are `Asked`) mind by mind, with that mind in.

    The alignment is made where a cell's mind is not here yet, as in another process.
    """
    for handle, cells in groupby(batch, key=lambda cell: cell.item.handle):
        if not handle.minds() <= {*context.minds.names, *context.minds.derived}:
            aligned(context, from_mind, to_mind, align=align)
        with context.open(handle):
            yield Batch(cells)
