"""Repair: give Units of a tuned mind their base weights back, in full or in part, and read what comes of it.

    repaired(U, alpha) = tuned, but on the Units U: base + alpha (tuned - base)         alpha 1: tuned; alpha 0: base on U

0. Units are those that the base calls by these names: what is repaired is the tuned mind aligned with the base's gauge
   (`severance.gauge.aligned`), which computes what the tuned mind computes.
1. U is the smallest restoring set (`severance.grafts.smallest`, along the ledger), or any Units that are named.
2. Controls: the whole model, base + alpha (tuned - base) on every weight; as many Units drawn at random; and Units drawn
   at random whose weight change is about as large as that of U (Frobenius norm).
3. Each mind is read on every trace (`scores`): E and the follow rate of the swap (reliance), accuracy with its own chain
   and with the given one, and whether its own chain is the right one.
4. `recommend`: of the alphas that return at least `ENOUGH` of the loss of E, those that cost least accuracy in
   distribution (`TIE` or less apart counts as equal), and of these the one that changes the weights least.

Interpolation of whole models is that of Wortsman et al. 2022 (arXiv:2109.01903); grafting regions of a fine-tuned model
that of Panigrahi et al. 2023 (arXiv:2302.06600).  The units of `weight_change` are those of the weights.
`models.saving` writes a repaired mind as an ordinary directory; `severance.grafts.repair_command` does all of it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.faithfulness.effect import contrast_effects
from reasoninterp.faithfulness.samples import as_reading
from reasoninterp.models.context import Context, Item, gold
from reasoninterp.models.minds import Handle, blend, graft, mind
from reasoninterp.models.units import Unit, units
from reasoninterp.severance.gauge.aligned import aligned
from reasoninterp.severance.grafts.controls import Match, random_sets
from reasoninterp.severance.grafts.moves import Moves, unit_norms
from reasoninterp.severance.grafts.smallest import Smallest, smallest_set
from reasoninterp.severance.grafts.study import level_of
from reasoninterp.severance.location.ledger_entries import as_moved
from reasoninterp.stats import Estimate, mean, proportion

SET, WHOLE, RANDOM, SAME_NORM = "set", "whole model", "random, same size", "random, same norm"
SERIES = (SET, WHOLE, RANDOM, SAME_NORM)
ENOUGH = 0.9  # share of the loss of E that a repair is to return
TIE = 0.01  # losses of accuracy this close are not told apart
RELIANCE = ("E", "swap_follow")
ACCURACY = ("accuracy_own_chain", "accuracy_given_chain", "steps_right_own_chain")
MEASURES = (*RELIANCE, *ACCURACY)


class Candidate(NamedTuple):
    """One repaired mind: its series, the draw (0 where nothing is drawn), alpha, its Units and its weights."""

    series: str
    draw: int
    alpha: float
    units: tuple[str, ...]
    weight_change: float  # Frobenius norm of repaired - tuned, as a share of that of base - tuned
    handle: Handle


def repaired(units: Sequence[Unit], alpha: float = 0.0, *, from_mind: str = "base", to_mind: str = "tuned") -> Handle:
    """`to_mind`, but `from_mind + alpha (to_mind - from_mind)` on the Units; alpha 1 is `to_mind`, bit for bit.

    Raises:
        UserError: alpha outside 0…1.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha:g}: give a share of tuning's change that is kept, from 0 to 1.")
    return graft(to_mind, blend(from_mind, to_mind, alpha), units)


def units_of(context: Context, level: str, names: Sequence[str] = ()) -> tuple[list[Unit], list[Unit]]:
    """All Units of a level, and those of them that are named, in the order of the forward pass.

    Raises:
        UserError: an unknown level, or a name that is no Unit's at this level.
    """
    every = units(context.minds.body, level_of(level))
    known = {u.name for u in every}
    if unknown := [n for n in names if n not in known]:
        raise UserError(
            f"--units {unknown[0]}: not a Unit of the level {level!r}; give one such as {every[len(every) // 2].name}, "
            "or another --level."
        )
    return every, [u for u in every if u.name in set(names)]


def smallest_restoring(
    context: Context,
    level: str = "block",
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
    threshold: float = ENOUGH,
    align: bool = True,
) -> Smallest:
    """The smallest set of Units that returns `threshold` of the loss of E, searched along the ledger.

    Raises:
        UserError: no contrasts, an E that is not safely lower in `to_mind`, or no set that returns enough.
    """
    from reasoninterp.severance.ledger.integrate import integrate

    every, _ = units_of(context, level)
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    if not contrasts:
        raise UserError("--traces: no contrast can be made from them, so no set can be searched; name the Units.")
    tuned = aligned(context, from_mind, to_mind, align=align).mind
    moves = Moves(context, contrasts, every, from_mind=from_mind, to_mind=tuned)
    e_base, e_tuned = float(moves.base.effect.mean()), float(moves.tuned.effect.mean())
    if not moves.safe() or e_tuned > e_base:
        how = "no lower than" if e_tuned >= e_base else "not safely below"
        raise UserError(
            f"{to_mind}: its E of {e_tuned:.2f} nats is {how} the {e_base:.2f} of {from_mind} (n = {len(contrasts)}), so "
            "no loss is there to be returned; give the mind with the path as the base, or name the Units."
        )
    integral = integrate(context, contrasts, from_mind=from_mind, to_mind=tuned)
    entry = as_moved(integral.at(level), moves.names)
    order = sorted(moves.moved, key=lambda name: entry[name].mean() if name in entry else 0.0)  # what lost most first
    found = smallest_set(partial(moves.share, "restore"), order, threshold=threshold)
    if not found.reached:
        raise UserError(
            f"--level {level}: no set of its Units returns {100 * threshold:.0f} % of the loss of E; name the Units."
        )
    return found


# ------------------------------------------------------------------------------------------------ repairs and controls


def candidates(
    context: Context,
    chosen: Sequence[Unit],
    every: Sequence[Unit],
    ends: tuple[str, str] = ("base", "tuned"),
    *,
    onto: str | None = None,
    alphas: Sequence[float],
    draws: int,
) -> list[Candidate]:
    """The repairs of `chosen` and the controls, at every alpha below 1; then both minds as they are.

    Where too few other Units changed there are fewer random sets, or none (`controls.random_sets`).

    Args:
        context: minds and seed.
        chosen: the Units that are given back.
        every: the Units of the level, from which controls are drawn.
        ends: names of the mind with the path and of the mind that is repaired; the series of the last two candidates
            are the second and the first of these.
        onto: what is repaired in its place: the mind `ends[1]` in the gauge of `ends[0]`; None for `ends[1]` itself.
        alphas: shares of tuning's change that are kept.
        draws: random sets of either kind.

    Raises:
        UserError: both minds have the same weights.
    """
    from_mind, to_mind = ends[0], onto or ends[1]
    change, _ = unit_norms(context, every, from_mind, to_mind)
    total = _norm(change, change)
    if total == 0:
        raise UserError(f"{ends[1]}: it has the weights of {from_mind}, so there is nothing to repair.")
    names = [u.name for u in chosen]
    sets: list[tuple[str, int, tuple[str, ...]]] = [(SET, 0, tuple(names))]
    matches: tuple[tuple[str, Match], ...] = ((RANDOM, "size"), (SAME_NORM, "norm"))
    for series, match in matches:
        drawn = random_sets(change, names, match=match, draws=draws, seed=context.seed)
        sets += [(series, k, one) for k, one in enumerate(drawn)]
    by_name = {u.name: u for u in every}
    out = []
    for alpha in (a for a in alphas if a != 1):
        for series, draw, these in sets:
            handle = repaired([by_name[n] for n in these], alpha, from_mind=from_mind, to_mind=to_mind)
            moved = (1 - alpha) * _norm(change, these) / total
            out.append(Candidate(series, draw, alpha, these, moved, handle))
        if alpha != 0:  # at 0 it is the base itself, which is read below
            out.append(Candidate(WHOLE, 0, alpha, (), 1 - alpha, blend(from_mind, to_mind, alpha)))
    as_they_are = [(ends[1], 1.0, 0.0), (from_mind, 0.0, 1.0)]
    return out + [Candidate(name, 0, alpha, (), moved, mind(name)) for name, alpha, moved in as_they_are]


def _norm(change: Mapping[str, float], names: Sequence[str] | Mapping[str, float]) -> float:
    return float(np.sqrt(sum(change[n] ** 2 for n in names)))


# ------------------------------------------------------------------------------------------------------ what they do


def scores(context: Context, items: Sequence[Item]) -> Iterator[dict[str, float]]:
    """For each item, for the mind that is in: `E` (nats), and as 0 or 1 `swap_follow` and the three of `ACCURACY`.

    NaN where the item has no contrast or no swap.  `swap_follow`: the answer read after the other chain is the one that
    this chain implies.  `steps_right_own_chain`: the chain that the mind writes is the trace's own, word for word.
    """
    with_contrast = [i for i in items if i.contrast is not None]
    found = contrast_effects(context, [i.contrast for i in with_contrast if i.contrast is not None])
    effect = {id(i): values["effect"] for i, values in zip(with_contrast, found, strict=True)}
    swapped = [i for i in items if i.swap is not None]
    asked = [i.trace.with_steps(i.swap.corrupt.steps) for i in swapped if i.swap is not None]
    read = context.read([*(i.trace for i in items), *asked])
    follow = {
        id(i): float(answer.says(i.swap.corrupt.answer))
        for i, answer in zip(swapped, read[len(items) :], strict=True)
        if i.swap is not None
    }
    own = context.sample([i.trace.with_steps(()) for i in items])
    for item, given, sample in zip(items, read[: len(items)], own, strict=True):
        right = gold(item.trace)
        yield {
            "E": effect.get(id(item), np.nan),
            "swap_follow": follow.get(id(item), np.nan),
            "accuracy_own_chain": float(as_reading(sample, item.trace, context.extractor).says(right)),
            "accuracy_given_chain": float(given.says(right)),
            "steps_right_own_chain": float(tuple(sample.steps) == item.trace.steps),
        }


def recommend(table: pd.DataFrame, *, enough: float = ENOUGH, tie: float = TIE) -> pd.DataFrame:
    """For each series the alpha to take (see the module's step 4), judged in distribution.

    Args:
        table: `repair` of the study, or its part in distribution: `series, alpha, weight_change, measure, value, change,
            restored`.
        enough: share of the loss of E that is to be returned.
        tie: losses of accuracy that differ by no more are taken as equal.

    Returns:
        One row a series: `series, alpha, reached, restored, accuracy_change, weight_change`.  Where no alpha returns
        enough, `reached` is false and the row is the one that returns most (NaN where shares mean nothing).
    """
    keys = ["series", "alpha", "weight_change"]
    part = table[table["series"].isin(SERIES)]
    e = part[part["measure"] == "E"].set_index(keys)["restored"]
    cost = part[part["measure"] == "accuracy_own_chain"].set_index(keys)["change"]
    found = pd.DataFrame({"restored": e, "accuracy_change": cost}).reset_index()
    out = []
    for series in (s for s in SERIES if s in set(found["series"])):
        rows = found[found["series"] == series]
        able = rows[rows["restored"] >= enough]
        if len(able):
            best = able[able["accuracy_change"] >= able["accuracy_change"].max() - tie - 1e-12]
            row = best.sort_values("weight_change").iloc[0]
        else:
            row = rows.sort_values("restored", ascending=False).iloc[0]
        out.append({**row[[*keys, "restored", "accuracy_change"]].to_dict(), "reached": bool(len(able))})
    columns = ["series", "alpha", "reached", "restored", "accuracy_change", "weight_change"]
    return pd.DataFrame(out, columns=columns)


def estimate_of(values: pd.Series, seed: int) -> Estimate:
    """A share with its Wilson interval where every value is 0 or 1, else a mean with its bootstrap interval."""
    known = values.dropna()
    return proportion(known) if known.isin([0.0, 1.0]).all() and values.name != "E" else mean(known, seed=seed)
