"""The smallest sets of Units that restore what tuning cost, and that take it away, with what stands against them.

1. Units of a `level` are put in the order of the ledger: the largest share of the loss first.
2. For either direction, 1-minimal sets are searched along that order (`smallest.families`): the first one, then others
   that are disjoint from it (of which any suffices) or avoid one of its members.
3. Each set's shares of the loss of E and of the follow rate get intervals over traces; beside them stand random sets of
   the same size and of the same weight norm, and the effect of another chain with the same answer (`controls`).
4. Pairs of the leading Units are tested for interaction (`interactions`), and shares are given along the order, one Unit
   more at a time.

Every mind that the search asks for is kept per trace, so a run that was broken off goes on where it stood.  Where the
loss of E is not safely away from zero there is no share to search with: the tables are empty and `smallest_loss` says so.
An interval says how well the *share of a set* is known; that the search would find the same set on other traces is not
covered by it.  Units are moved between the base and the tuned mind in its gauge (`severance.gauge.aligned`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.faithfulness.effect import contrast_effects
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Handle
from reasoninterp.models.units import Unit
from reasoninterp.severance.effects import loss_of
from reasoninterp.severance.gauge.align import Alignment
from reasoninterp.severance.gauge.aligned import Asked, aligned, alignment_table, each_mind
from reasoninterp.severance.grafts.controls import DRAWS, MATCHES, control, same_answer_contrasts
from reasoninterp.severance.grafts.interactions import COLUMNS as INTERACTION_COLUMNS
from reasoninterp.severance.grafts.interactions import interactions
from reasoninterp.severance.grafts.moves import WAYS, Moves, Read, Way
from reasoninterp.severance.grafts.smallest import Families, Share, families, is_one_minimal
from reasoninterp.severance.grafts.smallest_figures import draw_sets
from reasoninterp.severance.grafts.study import leading_units, unit_entries
from reasoninterp.stats import Estimate, mean
from reasoninterp.study import Batch, Cell, Row, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Evaluate = Callable[..., list[list[Row]]]
NO_LOSS = "the loss of E is not safely away from zero: no share of it can be given"
RAISED = "tuning raised E: shares are of what it gained"
CHAINS = ("own", "same answer")  # whose corrupt chain a row was read with
MOST_SIZES = 12
TABLES = ("smallest_sets", "smallest_curve", "interactions", "same_answer", "smallest_loss", "smallest_alignment")


class Found(NamedTuple):
    """The result of the search: by direction the families; and the Moves that know every mind that was read."""

    moves: Moves
    order: tuple[str, ...]
    families: dict[Way, Families]


class SmallestSets(Study):
    """Find the smallest sets of Units that restore the effect, and that take it away, each with its controls.

    Parameters:
        level: `block`, `head`, `circuit` or `layer`.
        threshold: share of the loss of E that a set must return or take away.
        follow: whether it must return or take away as much of the loss of the follow rate too, where that is safe.
        max_sets: most sets in a direction, alternatives included.
        max_evaluations: most minds read in a direction before the search for alternatives ends.
        pairs_of: how many leading Units are tested for interactions, two by two.
        draws: random sets of each kind of control.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
        align: bring the tuned mind into the base's gauge first.
    """

    needs: ClassVar[tuple[str, ...]] = ("effect", "ledger")

    level: str = "block"
    threshold: float = 0.9
    follow: bool = False
    max_sets: int = 4
    max_evaluations: int = 200
    pairs_of: int = 4
    draws: int = DRAWS
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True

    def search(self, context: Context, evaluate: Evaluate) -> None:
        """Ask for every mind that the tables need, one after another."""
        if self.max_sets < 1 or self.draws < 1:
            raise UserError("smallest-sets: --max-sets and --draws must be at least 1.")
        items, same = _items(context, self.from_mind)
        if items:
            self._tables(context, _asking(items, evaluate, CHAINS[0]), _asking(same, evaluate, CHAINS[1]))

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per mind and contrast: `effect` in nats and `follow`."""
        for part in each_mind(context, batch, self.from_mind, self.to_mind, align=self.align):
            found = contrast_effects(context, [asked.item.contrast for asked in part.items])
            for cell, values in zip(part, found, strict=True):
                yield cell.row(effect=values["effect"], follow=values["follow"])

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`smallest_sets`, `smallest_curve`, `interactions`, `same_answer`, `smallest_loss`, `smallest_alignment`."""
        if not len(rows):
            return _empty()
        items, same = _items(context, self.from_mind)
        return self._tables(context, _recalling(items, rows, CHAINS[0]), _recalling(same, rows, CHAINS[1]))

    def draw(self, summary: Mapping[str, pd.DataFrame]) -> Figure | None:
        """Share of E against the size of the set along the order, the smallest sets marked."""
        return draw_sets(summary["smallest_sets"], summary["smallest_curve"]) if len(summary["smallest_sets"]) else None

    def _tables(
        self, context: Context, read: Callable[[Handle], Read], read_same: Callable[[Handle], Read]
    ) -> dict[str, pd.DataFrame]:
        """All tables from two readers; the search runs them to ask, the summary to recall."""
        found = self._find(context, read)
        moves = found.moves
        loss = loss_of(moves.base.effect, moves.tuned.effect, seed=context.seed)
        why = NO_LOSS if not moves.safe() else RAISED if loss.value > 0 else ""
        ends = {"e_base": float(moves.base.effect.mean()), "e_tuned": float(moves.tuned.effect.mean())}
        values = {"loss": loss.value, "ci_low": loss.ci_low, "ci_high": loss.ci_high, "n": loss.n, "note": why}
        values |= {"level": self.level, "threshold": self.threshold}
        tables = _empty() | {"smallest_loss": pd.DataFrame([ends | values])}
        tables["smallest_alignment"] = alignment_table(self._aligned(context))
        if not moves.safe():
            return tables
        tables["smallest_sets"] = self._sets(found)
        tables["smallest_curve"] = _curve(found)
        tables["interactions"] = interactions(moves, _leading(found, self.pairs_of))
        tables["same_answer"] = _same_answer(context, found, read_same)
        return tables

    def _aligned(self, context: Context) -> Alignment:
        return aligned(context, self.from_mind, self.to_mind, align=self.align)

    def _share(self, moves: Moves, way: Way) -> Share:
        return partial(moves.least_share if self.follow else moves.share, way)

    def _sets(self, found: Found) -> pd.DataFrame:
        """One row per set that was found."""
        moves, rows = found.moves, []
        for way, searched in found.families.items():
            earlier: set[str] = set()
            for k, one in enumerate(searched.sets):
                row: dict[str, Any] = {"direction": way, "k": k + 1, "units": "+".join(one.units)}
                row |= {"size": len(one.units), "disjoint": not earlier & set(one.units)}
                row |= _estimate("share", moves.interval(way, one.units))
                row |= _estimate("share_follow", moves.interval(way, one.units, of="follow"))
                row |= {"norm_share": moves.norm(one.units) / moves.norm(moves.names), "evaluations": one.evaluations}
                row["evaluations_all"] = searched.evaluations
                row["one_minimal"] = is_one_minimal(self._share(moves, way), one.units, threshold=self.threshold)
                for match in MATCHES:
                    beside = control(moves, way, one.units, match, draws=self.draws)
                    row |= _estimate(f"control_{match}", beside.share)
                    row |= _estimate(f"control_{match}_follow", beside.share_follow)
                    row |= {f"control_{match}_draws": len(beside.sets), f"control_{match}_ratio": beside.norm_ratio}
                rows.append(row | {"n": len(moves.base.effect), "level": self.level, "threshold": self.threshold})
                earlier |= set(one.units)
        return pd.DataFrame(rows)

    def _find(self, context: Context, read: Callable[[Handle], Read]) -> Found:
        units = ledger_order(context, self.level, self.from_mind, self.to_mind)
        tuned = self._aligned(context).mind
        moves = Moves(context, [], units, from_mind=self.from_mind, to_mind=tuned, read=read)
        order = tuple(name for name in moves.names if name in set(moves.moved))
        searched: dict[Way, Families] = {}
        for way in WAYS if moves.safe() else ():
            searched[way] = families(
                self._share(moves, way),
                order,
                threshold=self.threshold,
                max_sets=self.max_sets,
                max_evaluations=self.max_evaluations,
            )
        return Found(moves, order, searched)


def ledger_order(context: Context, level: str, from_mind: str, to_mind: str) -> list[Unit]:
    """The Units of a level, the one with the largest share of the loss in the ledger first.

    Unlike `grafts.leading_units` this heeds the sign: what moved E against the loss comes last.
    """
    units = leading_units(context, level, from_mind)
    entry = unit_entries(context, units)
    e = context.table("effect")
    value = {
        name: float(e.loc[(e["mind"] == name) & (e["measure"] == "E"), "value"].iloc[0])
        for name in (from_mind, to_mind)
    }
    sign = 1.0 if value[to_mind] >= value[from_mind] else -1.0
    return sorted(units, key=lambda u: -sign * float(np.nan_to_num(entry[u.name])))


def _items(context: Context, reader: str) -> tuple[list[Item], list[Item]]:
    """The items with a contrast, and items whose corrupt chain has the clean answer."""
    items = [i for i in context.items if i.contrast is not None]
    own = [i.contrast for i in items if i.contrast is not None]
    same = {c.clean.id: c for c in same_answer_contrasts(context, own, reader=reader).contrasts}
    return items, [Item(i.trace, same[i.id]) for i in items if i.id in same]


def _asking(items: Sequence[Item], evaluate: Evaluate, chain: str) -> Callable[[Handle], Read]:
    """Reads a mind by asking for one cell per item."""

    def read(handle: Handle) -> Read:
        name = _name(handle)
        cells = [
            Cell(
                key=f"{chain}/{name}/{item.id}/{item.digest[:8]}",
                labels={"chain": chain, "mind": name, "trace": item.id},
                item=Asked(handle, item),
            )
            for item in items
        ]
        rows = [found[0] for found in evaluate(*cells)] if cells else []
        return Read(*(np.array([row[c] for row in rows], dtype=np.float64) for c in ("effect", "follow")))

    return read


def _recalling(items: Sequence[Item], rows: pd.DataFrame, chain: str) -> Callable[[Handle], Read]:
    """Reads a mind from rows that were asked for before."""
    known = {name: part.set_index("trace") for name, part in rows[rows["chain"] == chain].groupby("mind", sort=False)}
    order = [item.id for item in items]

    def read(handle: Handle) -> Read:
        if not order:
            return Read(np.zeros(0), np.zeros(0))
        part = known[_name(handle)].loc[order]
        return Read(part["effect"].to_numpy(dtype=np.float64), part["follow"].to_numpy(dtype=np.float64))

    return read


def _name(handle: Handle) -> str:
    """A name that tells minds apart: the label, with a hash where it does not list every Unit."""
    names = ",".join(u.name for u in handle.units)
    return handle.label if len(handle.units) <= 4 else f"{handle.label}#{sha256(names.encode()).hexdigest()[:12]}"


def _leading(found: Found, n: int) -> list[str]:
    """The members of the first sets, then the order's first, `n` in all."""
    members = [name for searched in found.families.values() for one in searched.sets[:1] for name in one.units]
    return list(dict.fromkeys([*members, *found.order]))[:n]


def _curve(found: Found) -> pd.DataFrame:
    """Shares of the order's first Units, by their number; of a long order some numbers only."""
    rows = []
    for way, searched in found.families.items():
        last = max((found.order.index(name) + 1 for one in searched.sets[:1] for name in one.units), default=1)
        top = min(len(found.order), max(last + 2, 6))
        sizes = range(1, top + 1) if top <= MOST_SIZES else sorted({round(x) for x in np.geomspace(1, top, MOST_SIZES)})
        for size in sizes:
            names = found.order[:size]
            row = {"direction": way, "size": size, "added": names[-1], "n": len(found.moves.base.effect)}
            row |= _estimate("share", found.moves.interval(way, names))
            rows.append(row | _estimate("share_follow", found.moves.interval(way, names, of="follow")))
    return pd.DataFrame(rows)


def _same_answer(context: Context, found: Found, read: Callable[[Handle], Read]) -> pd.DataFrame:
    """E where the corrupt chain has the clean answer, in both minds and with each first set moved; near 0 is right."""
    items, same = _items(context, found.moves.from_mind)
    place = {item.id: k for k, item in enumerate(items)}
    kept = [place[item.id] for item in same]
    moves, rows = found.moves, []
    asked: list[tuple[str, str, Way, tuple[str, ...]]] = [("base", "", "cut", ()), ("tuned", "", "restore", ())]
    for way, searched in found.families.items():
        asked += [("restored" if way == "restore" else "cut", way, way, one.units) for one in searched.sets[:1]]
    for which, direction, way, names in asked:
        value = mean(read(moves.handle(way, names)).effect, seed=context.seed)
        own = moves.read(way, names).effect[kept]
        row = {"mind": which, "direction": direction, "units": "+".join(names), **_estimate("value", value)}
        row |= {"e_own": float(own.mean()) if len(own) else float("nan")}
        rows.append(row | {"n": value.n, "refused": len(items) - len(same)})
    return pd.DataFrame(rows).rename(columns={"value_ci_low": "ci_low", "value_ci_high": "ci_high"})


def _estimate(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_ci_low": found.ci_low, f"{name}_ci_high": found.ci_high}


def _empty() -> dict[str, pd.DataFrame]:
    return {name: pd.DataFrame() for name in TABLES} | {"interactions": pd.DataFrame(columns=INTERACTION_COLUMNS)}
