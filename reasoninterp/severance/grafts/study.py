"""Grafts: the same Unit of weights moved between two minds, both ways, and the answer read again.

    restore_c = (E(tuned ← base_c) − E(tuned)) / (E(base) − E(tuned))     what giving the Unit back returns
    cut_c     = (E(base) − E(base ← tuned_c)) / (E(base) − E(tuned))      what the tuned Unit alone takes away

1. Units that lead the ledger (at `level`) are grafted, at most `top` of them.
2. Each graft is one more mind; every contrast is read with it.
3. Both directions, since severance may be redundant (restoring one place suffices, cutting one does nothing) or
   distributed (the other way round).  Shares are given only where E(base) − E(tuned) is safely away from zero
   (`severance.effects`); the raw effects always.

4. Both are in one gauge: Units are moved between the base and the tuned mind aligned with it, which computes what the
   tuned mind computes (`severance.gauge.aligned`).

5. `graft-sets` moves the Units that lead the ledger together, the first one, the first two, …: what tuning did may be
   spread over Units of which none alone does much.  Beside each set stand random sets of the other Units that tuning
   changed (of all Units, where too few are left), of as many Units and of about the same weight norm, several draws
   each (`severance.grafts.controls`).

`follow` is the share of contrasts in which the corrupt answer is preferred to the clean one after the corrupt chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.errors import UserError
from reasoninterp.faithfulness.effect import contrast_effects
from reasoninterp.models.context import Context
from reasoninterp.models.minds import graft
from reasoninterp.models.units import Level, Unit, units
from reasoninterp.severance.effects import is_safe
from reasoninterp.severance.gauge.aligned import Asked, aligned, alignment_table, each_mind
from reasoninterp.severance.grafts.controls import DRAWS, Match, random_sets, share_over_draws
from reasoninterp.severance.grafts.moves import NOT_SAFE, unit_norms
from reasoninterp.severance.location.ledger_entries import as_moved
from reasoninterp.stats import Estimate, derive_seed, mean, proportion, ratio
from reasoninterp.study import Batch, Cell, Row, Study

MATCHED: dict[str, Match] = {"random": "size", "same norm": "norm"}


class Grafts(Study):
    """Move single Units of weight between the two minds, both ways, and read the answers again.

    Parameters:
        level: `block`, `head`, `circuit` or `layer`.
        top: how many of the Units that lead the ledger are grafted.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
    """

    needs: ClassVar[tuple[str, ...]] = ("effect", "ledger")

    level: str = "block"
    top: int = 24
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True

    def cells(self, context: Context) -> Iterator[Cell]:
        """Every Unit × direction × item with a contrast."""
        tuned = aligned(context, self.from_mind, self.to_mind, align=self.align).mind
        for unit in leading_units(context, self.level, self.from_mind)[: self.top]:
            labels = {"unit": unit.name, "layer": unit.layer, "kind": unit.kind}
            yield from graft_cells(context, [unit], labels, self.from_mind, tuned)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per Unit, direction and contrast: the effect of the chain in the grafted mind."""
        for part in each_mind(context, batch, self.from_mind, self.to_mind, align=self.align):
            yield from measure_grafts(context, part)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`grafts`: one row per Unit with shares, their intervals, and the raw effects; `grafts_alignment`: notes."""
        found = aligned(context, self.from_mind, self.to_mind, align=self.align)
        table = share_table(rows, context, ["unit", "layer", "kind"], self.from_mind, self.to_mind)
        return {"grafts": table, "grafts_alignment": alignment_table(found)}


class GraftSets(Study):
    """Move the Units that lead the ledger together, one more at a time, beside random sets of the same size.

    Parameters:
        level: `block`, `head`, `circuit` or `layer`.
        largest: size of the largest set.
        draws: random sets of each kind beside each set.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
    """

    needs: ClassVar[tuple[str, ...]] = ("effect", "ledger")

    level: str = "block"
    largest: int = 5
    draws: int = DRAWS
    from_mind: str = "base"
    to_mind: str = "tuned"
    align: bool = True

    def cells(self, context: Context) -> Iterator[Cell]:
        """Every set × direction × item with a contrast."""
        found = leading_units(context, self.level, self.from_mind)
        named = {u.name: u for u in found}
        tuned = aligned(context, self.from_mind, self.to_mind, align=self.align).mind
        norms, _ = unit_norms(context, found, self.from_mind, tuned)
        for size in range(1, min(self.largest, len(found) - 1) + 1):
            ledger = tuple(named)[:size]
            sets = [("ledger", 0, ledger)]
            for chosen, match in MATCHED.items():
                drawn = random_sets(norms, ledger, match=match, draws=self.draws, seed=context.seed)
                if match == "size" and not drawn:
                    drawn = _of_all(tuple(named), size, self.draws, context.seed)
                sets += [(chosen, k, names) for k, names in enumerate(drawn)]
            for chosen, k, names in sets:
                labels = {"chosen": chosen, "size": size, "draw": k, "units": "+".join(names)}
                labels["norm_ratio"] = _norm(norms, names) / (_norm(norms, ledger) or np.nan)
                yield from graft_cells(context, [named[n] for n in names], labels, self.from_mind, tuned)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per set, direction and contrast: the effect of the chain in the grafted mind."""
        for part in each_mind(context, batch, self.from_mind, self.to_mind, align=self.align):
            yield from measure_grafts(context, part)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`graft_sets`: one row per set with shares, their intervals, and the raw effects.

        Rows whose `chosen` is `random` are means over draws, with intervals over draws and traces.  `graft_sets_norm`
        has the same columns for the draws of the same norm; `norm_ratio` is the weight change of a set over that of the
        ledger's set, as norms.  `graft_sets_alignment` has the notes of the alignment.
        """
        if len(rows):
            groups = rows.groupby(["chosen", "size"])
            n_sets, ratio_ = groups["units"].transform("nunique"), groups["norm_ratio"].transform("mean")
            names = rows["units"].where(n_sets == 1, n_sets.astype(str) + " random sets")
            rows = rows.assign(units=names, norm_ratio=ratio_)
        by = ["chosen", "size", "units", "norm_ratio"]
        table = share_table(rows, context, by, self.from_mind, self.to_mind)
        at_norm = table["chosen"] == "same norm"
        tables = {"graft_sets": table[~at_norm], "graft_sets_norm": table[at_norm]}
        notes = alignment_table(aligned(context, self.from_mind, self.to_mind, align=self.align))
        return {n: part.reset_index(drop=True) for n, part in tables.items()} | {"graft_sets_alignment": notes}


def _norm(norms: Mapping[str, float], names: Sequence[str]) -> float:
    return float(np.sqrt(sum(norms[name] ** 2 for name in names)))


def _of_all(names: tuple[str, ...], size: int, draws: int, seed: int) -> list[tuple[str, ...]]:
    """Random sets of all Units, where too few that changed are left beside the set."""
    rng = np.random.default_rng(derive_seed(seed, "graft-sets", size))
    drawn = [tuple(names[k] for k in sorted(rng.choice(len(names), size, replace=False))) for _ in range(draws)]
    return list(dict.fromkeys(drawn))


def leading_units(context: Context, level: str, base: str) -> list[Unit]:
    """The Units of a level in the order of the ledger's absolute entries.

    Raises:
        UserError: an unknown level.
    """
    with context.open(base) as body:
        found = units(body, level_of(level))
    entry = unit_entries(context, found)
    return sorted(found, key=lambda u: -np.nan_to_num(abs(entry[u.name])))


def unit_entries(context: Context, found: Sequence[Unit]) -> dict[str, float]:
    """The ledger's entry of each Unit, in nats: effect gained by tuning is positive.

    NaN for a Unit that the ledger's table does not list.
    """
    ledger = context.table("ledger")
    names = [u.name for u in found]
    listed = {name: np.array([value], dtype=np.float64) for name, value in ledger[["unit", "attribution"]].to_numpy()}
    entry = as_moved(listed, names)
    return {name: float(entry[name][0]) if name in entry else float("nan") for name in names}


def level_of(text: str) -> Level:
    """A level of Units from its name.

    Raises:
        UserError: no such level.
    """
    if text not in get_args(Level):
        raise UserError(f"--level {text}: not one of {', '.join(get_args(Level))}.")
    return cast(Level, text)


def graft_cells(
    context: Context, moved: Sequence[Unit], labels: dict[str, Any], base: str, tuned: str
) -> Iterator[Cell]:
    """Both directions × every item with a contrast, for some Units moved together."""
    name = "+".join(u.name for u in moved)
    for direction, onto, source in (("restore", tuned, base), ("cut", base, tuned)):
        handle = graft(onto, source, moved)
        for item in context.items:
            if item.contrast is not None:
                yield Cell(
                    key=f"{direction}/{name}/{'/'.join(map(str, labels.values()))}/{item.id}/{item.digest[:8]}",
                    labels={**labels, "direction": direction, "trace": item.id},
                    item=Asked(handle, item),
                )


def measure_grafts(context: Context, batch: Batch) -> Iterator[Row]:
    """Effect of the chain and preference after the corrupt chain, for the graft that is in."""
    for cell, values in zip(batch, contrast_effects(context, [a.item.contrast for a in batch.items]), strict=True):
        yield cell.row(effect=values["effect"], follow=float(values["m_corrupt"] > 0))


def share_table(rows: pd.DataFrame, context: Context, by: list[str], base: str, tuned: str) -> pd.DataFrame:
    """One row per graft: shares of the loss with intervals (NaN where the loss is not safe), and the raw effects."""
    if not len(rows):
        return pd.DataFrame(columns=[*by, "restore", "cut", "e_restored", "e_cut", "e_base", "e_tuned", "n", "safe"])
    effects = context.table("effect.rows")
    wide = effects[effects["form"] == "whole"].pivot(index="trace", columns="mind", values="effect")
    e_base, e_tuned = wide[base], wide[tuned]
    safe = is_safe(e_base, e_tuned, seed=context.seed)
    ends = {"e_base": float(e_base.mean()), "e_tuned": float(e_tuned.mean()), "n": len(wide), "safe": safe}
    lost, out = (e_base - e_tuned).to_numpy(), []
    for key, part in rows.groupby(by, sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        for direction, name in (("restore", "restored"), ("cut", "cut")):
            effect, follow = (_by_draw(part, direction, column, wide.index) for column in ("effect", "follow"))
            gained = effect - e_tuned.to_numpy() if direction == "restore" else e_base.to_numpy() - effect
            found = {
                direction: _share(gained, lost, context.seed) if safe else NOT_SAFE,
                f"e_{name}": _share(effect, None, context.seed),
                f"follow_{name}": proportion(follow[0]) if len(follow) == 1 else _share(follow, None, context.seed),
            }
            for column, value in found.items():
                row |= {column: value.value, f"{column}_ci_low": value.ci_low, f"{column}_ci_high": value.ci_high}
        out.append(row | ends)
    table = pd.DataFrame(out)
    if "layer" in table:
        table["layer"] = pd.array([None if pd.isna(v) else int(v) for v in table["layer"]], dtype="Int64")
    return table


def _by_draw(part: pd.DataFrame, direction: str, column: str, traces: pd.Index) -> NDArray[np.float64]:
    """A column of one graft's rows as [draw, trace]; one draw where the graft is not one of several."""
    rows = part[part["direction"] == direction]
    rows = rows if "draw" in rows else rows.assign(draw=0)
    wide = rows.pivot(index="draw", columns="trace", values=column)[traces]
    found: NDArray[np.float64] = wide.to_numpy(dtype=np.float64)
    return found


def _share(gained: NDArray[np.float64], lost: NDArray[np.float64] | None, seed: int) -> Estimate:
    """Mean of [draw, trace] over the mean of [trace], or by itself; over one draw or several."""
    if len(gained) > 1:
        return share_over_draws(gained, lost, seed=seed)
    return mean(gained[0], seed=seed) if lost is None else ratio(gained[0], lost, seed=seed)
