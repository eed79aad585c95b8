"""The pair that a ledger is of: one mind, and the other in the gauge of the first.

1. Weights that compute the same function may differ by a gauge (heads in another order or basis, neurons in another
   order or scale, gains).  The straight path to such weights runs through minds that are neither end, and its entries,
   in attention above all, are those of the gauge.  So the path ends in the tuned mind as aligned with the base
   (`severance.gauge.aligned`), which computes what the tuned mind computes.
2. `convention` says of which pair a ledger is.  Where an alignment was not asked for or could not be made, `warnings`
   says that entries then depend on the gauge.
3. An adapter changes the modules that it is put on.  In another gauge a module's change is no longer the adapter's, so
   of the modules that an alignment changed, no entry of level `module` is given (`withheld`), with a warning.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from reasoninterp.models.context import Context
from reasoninterp.severance.gauge.align import Alignment
from reasoninterp.severance.gauge.aligned import aligned, alignment_table, why_not_aligned


class Pair(NamedTuple):
    """Two minds as a ledger takes them.

    Attributes:
        from_mind: where the path begins.
        to_mind: the other mind, by the name that it was loaded under.
        alignment: of `to_mind` with `from_mind`.
        withheld: modules without an entry of their own, since the alignment changed what an adapter did to them.
    """

    from_mind: str
    to_mind: str
    alignment: Alignment
    withheld: tuple[str, ...]

    @property
    def end(self) -> str:
        """The mind in which the path ends: `to_mind`, aligned where that gained anything."""
        return self.alignment.mind

    @property
    def convention(self) -> str:
        """One sentence: of which pair the ledger is."""
        way = f"from {self.from_mind} to {self.to_mind}"
        if self.end != self.to_mind:
            return f"{way}, whose weights were first aligned with those of {self.from_mind} (the same function)."
        if why_not_aligned(self.alignment):
            return f"{way}, which were not aligned: entries depend on the gauge of their weights."
        return f"{way}; no change of gauge was found to be aligned between their weights."

    @property
    def warnings(self) -> list[str]:
        """What is to be known of the gauge; empty where the two minds are in one."""
        out = []
        if why := why_not_aligned(self.alignment):
            out.append(
                f"{self.from_mind} and {self.to_mind} were not aligned ({why}): where their weights differ by a change of "
                "gauge, entries, those of attention above all, depend on it"
            )
        if self.withheld:
            out.append(
                f"{len(self.withheld)} modules have no entry of level module, since the alignment changed what an "
                "adapter did to them; --no-align gives the entries of the adapter's own changes"
            )
        return out

    def table(self) -> pd.DataFrame:
        """Notes and distances of the alignment (`severance.gauge.aligned.alignment_table`)."""
        return alignment_table(self.alignment)


def pair_of(context: Context, from_mind: str, to_mind: str, *, align: bool = True) -> Pair:
    """The pair that a ledger from one mind to another is of.

    Args:
        context: minds.
        from_mind: where the path begins.
        to_mind: where it ends.
        align: align `to_mind` with `from_mind` first.
    """
    found, minds = aligned(context, from_mind, to_mind, align=align), context.minds
    withheld: tuple[str, ...] = ()
    if found.mind != to_mind and "adapter" in {minds.sources[name].kind for name in (from_mind, to_mind)}:
        withheld = tuple(dict.fromkeys(p.rpartition(".")[0] for p in minds.difference(to_mind, found.mind)))
    return Pair(from_mind, to_mind, found, withheld)
