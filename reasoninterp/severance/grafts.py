"""Grafts: the same Unit of weights moved between two minds, both ways, and the answer read again.

    restore_c = (E(tuned ← base_c) − E(tuned)) / (E(base) − E(tuned))     what giving the Unit back returns
    cut_c     = (E(base) − E(base ← tuned_c)) / (E(base) − E(tuned))      what the tuned Unit alone takes away

1. Units that lead the ledger (at `level`) are grafted, at most `top` of them.
2. Each graft is one more mind; every contrast is read with it.
3. Both directions, since severance may be redundant (restoring one place suffices, cutting one does nothing) or
   distributed (the other way round).  Shares are given only where E(base) − E(tuned) is safely away from zero
   (`severance.effects`); the raw effects always.

4. `graft-sets` moves the Units that lead the ledger together, the first one, the first two, …, and beside each set as
   many drawn at random from the other Units (from all, where there are too few): what tuning did may be spread over Units of which none alone does much.

`follow` is the share of contrasts in which the corrupt answer is preferred to the clean one after the corrupt chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from reasoninterp.faithfulness.effect import contrast_effects
from reasoninterp.models.context import Context
from reasoninterp.models.minds import graft
from reasoninterp.models.units import Level, Unit, units
from reasoninterp.severance.effects import is_safe
from reasoninterp.stats import Estimate, derive_seed, mean, proportion, ratio
from reasoninterp.study import Batch, Cell, Row, Study


class Grafts(Study):
    """Move single Units of weight between the two minds, both ways, and read the answers again.

    Parameters:
        level: `block`, `head`, `circuit` or `layer`.
        top: how many of the Units that lead the ledger are grafted.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
    """

    needs: ClassVar[tuple[str, ...]] = ("effect", "ledger")

    level: str = "block"
    top: int = 24
    from_mind: str = "base"
    to_mind: str = "tuned"

    def cells(self, context: Context) -> Iterator[Cell]:
        """Every Unit × direction × item with a contrast."""
        for unit in leading_units(context, self.level, self.from_mind)[: self.top]:
            labels = {"unit": unit.name, "layer": unit.layer, "kind": unit.kind}
            yield from graft_cells(context, [unit], labels, self.from_mind, self.to_mind)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per Unit, direction and contrast: the effect of the chain in the grafted mind."""
        return measure_grafts(context, batch)

    def summarise(self, rows: pd.DataFrame, context: Context) -> pd.DataFrame:
        """`grafts`: one row per Unit with shares, their intervals, and the raw effects."""
        return share_table(rows, context, ["unit", "layer", "kind"], self.from_mind, self.to_mind)


class GraftSets(Study):
    """Move the Units that lead the ledger together, one more at a time, beside random sets of the same size.

    Parameters:
        level: `block`, `head`, `circuit` or `layer`.
        largest: size of the largest set.
        from_mind: the mind with the path.
        to_mind: the mind in which it may be cut.
    """

    needs: ClassVar[tuple[str, ...]] = ("effect", "ledger")

    level: str = "block"
    largest: int = 5
    from_mind: str = "base"
    to_mind: str = "tuned"

    def cells(self, context: Context) -> Iterator[Cell]:
        """Every set × direction × item with a contrast."""
        found = leading_units(context, self.level, self.from_mind)
        draw = np.random.default_rng(derive_seed(context.seed, "graft-sets"))
        for size in range(1, min(self.largest, len(found) - 1) + 1):
            rest = found[size:] if len(found) >= 2 * size else found
            random = [rest[k] for k in sorted(draw.choice(len(rest), size, replace=False))]
            for chosen, units_ in (("ledger", found[:size]), ("random", random)):
                labels = {"chosen": chosen, "size": size, "units": "+".join(u.name for u in units_)}
                yield from graft_cells(context, units_, labels, self.from_mind, self.to_mind)

    def measure(self, context: Context, batch: Batch) -> Iterable[Row]:
        """One row per set, direction and contrast: the effect of the chain in the grafted mind."""
        return measure_grafts(context, batch)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`graft_sets`: one row per set with shares, their intervals, and the raw effects."""
        return {"graft_sets": share_table(rows, context, ["chosen", "size", "units"], self.from_mind, self.to_mind)}


def leading_units(context: Context, level: str, base: str) -> list[Unit]:
    """The Units of a level in the order of the ledger's absolute entries."""
    ledger = context.table("ledger")
    with context.open(base) as body:
        found: list[Unit] = units(body, _level(level))
    entry = dict(zip(ledger["unit"], ledger["attribution"], strict=True))
    if "unembed" in entry and not any(u.name == "unembed" for u in found):
        entry["embed"] += entry.pop("unembed")  # tied: the ledger lists two uses of the Unit that a graft moves
    size = {name: abs(value) for name, value in entry.items()}
    return sorted(found, key=lambda u: -_entry(u, size))


def _entry(unit: Unit, size: dict[str, float]) -> float:
    """A Unit's entry; for a layer or a head, which the ledger does not list, the sum of what it holds."""
    if unit.name in size:
        return size[unit.name]
    return sum(v for name, v in size.items() if name.startswith(f"{unit.name}."))


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
                    group=handle,
                    labels={**labels, "direction": direction, "trace": item.id},
                    item=item,
                )


def measure_grafts(context: Context, batch: Batch) -> Iterator[Row]:
    """Effect of the chain and preference after the corrupt chain, for the graft that is in."""
    for cell, values in zip(batch, contrast_effects(context, [i.contrast for i in batch.items]), strict=True):
        yield cell.row(effect=values["effect"], follow=float(values["m_corrupt"] > 0))


def share_table(rows: pd.DataFrame, context: Context, by: list[str], base: str, tuned: str) -> pd.DataFrame:
    """One row per graft: shares of the loss with intervals (NaN where the loss is not safe), and the raw effects."""
    if not len(rows):
        return pd.DataFrame(columns=[*by, "restore", "cut", "e_restored", "e_cut", "e_base", "e_tuned", "n", "safe"])
    effects = context.table("effect.rows")
    wide = effects[effects["form"] == "whole"].pivot(index="trace", columns="mind", values="effect")
    e_base, e_tuned = wide[base], wide[tuned]
    safe = is_safe(e_base, e_tuned, seed=context.seed)
    lost, out, nothing = e_base - e_tuned, [], Estimate(np.nan, np.nan, np.nan, 0, "")
    for key, part in rows.groupby(by, sort=False, dropna=False):
        sides = {d: p.set_index("trace").loc[wide.index] for d, p in part.groupby("direction")}
        gained = {"restore": sides["restore"]["effect"] - e_tuned, "cut": e_base - sides["cut"]["effect"]}
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        for direction, name in (("restore", "restored"), ("cut", "cut")):
            share = ratio(gained[direction], lost, seed=context.seed) if safe else nothing
            row |= {direction: share.value, f"{direction}_ci_low": share.ci_low, f"{direction}_ci_high": share.ci_high}
            e = mean(sides[direction]["effect"], seed=context.seed)
            row |= {f"e_{name}": e.value, f"e_{name}_ci_low": e.ci_low, f"e_{name}_ci_high": e.ci_high}
            f = proportion(sides[direction]["follow"])
            row |= {f"follow_{name}": f.value, f"follow_{name}_ci_low": f.ci_low, f"follow_{name}_ci_high": f.ci_high}
        out.append(
            row | {"e_base": float(e_base.mean()), "e_tuned": float(e_tuned.mean()), "n": len(wide), "safe": safe}
        )
    table = pd.DataFrame(out)
    if "layer" in table:
        table["layer"] = pd.array([None if pd.isna(v) else int(v) for v in table["layer"]], dtype="Int64")
    return table


def _level(text: str) -> Level:
    from typing import get_args

    from reasoninterp.errors import UserError

    if text not in get_args(Level):
        raise UserError(f"--level {text}: not one of {', '.join(get_args(Level))}.")
    return text  # type: ignore[return-value]
