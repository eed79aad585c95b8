"""Repair: give Units of a tuned mind their base weights back, in full or in part, and read what comes of it.

    repaired(U, alpha) = tuned, but on the Units U: base + alpha (tuned - base)         alpha 1: tuned; alpha 0: base on U

1. U is the smallest restoring set (`severance.grafts.smallest`, along the ledger), or any Units that are named.
2. Controls: the whole model, base + alpha (tuned - base) on every weight; as many Units drawn at random; and Units drawn
   at random whose weight change is about as large as that of U (Frobenius norm).
3. Each mind is read on every trace (`scores`): E and the follow rate of the swap (reliance), accuracy with its own chain
   and with the given one, and whether its own chain is the right one.
4. `recommend`: of the alphas that return at least `ENOUGH` of the loss of E, those that cost least accuracy in
   distribution (`TIE` or less apart counts as equal), and of these the one that changes the weights least.

Interpolation of whole models is that of Wortsman et al. 2022 (arXiv:2109.01903); grafting regions of a fine-tuned model
that of Panigrahi et al. 2023 (arXiv:2302.06600).  The units of `weight_change` are those of the weights.
`models.saving` writes a repaired mind as an ordinary directory (`repair_command` is `reasoninterp repair`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.faithfulness.effect import contrast_effects
from reasoninterp.faithfulness.samples import as_reading
from reasoninterp.models.context import Context, ContextSpec, Item, gold
from reasoninterp.models.minds import Handle, Minds, blend, graft, mind
from reasoninterp.models.saving import check_free, save_mind
from reasoninterp.models.units import Level, Unit, unit_named, units
from reasoninterp.severance.grafts.controls import Match, random_sets
from reasoninterp.severance.grafts.moves import Moves
from reasoninterp.severance.grafts.smallest import Smallest, smallest_set
from reasoninterp.stats import Estimate, mean, paired, proportion

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


def weight_changes(minds: Minds, units: Sequence[Unit], from_mind: str, to_mind: str) -> dict[str, float]:
    """Frobenius norm of `to_mind - from_mind` on each Unit, by name."""
    squares = dict.fromkeys((u.name for u in units), 0.0)
    for param, delta in minds.delta(from_mind, to_mind):
        for unit in units:
            for part in unit.parts:
                if part.param == param:
                    squares[unit.name] += float(part.of(delta).double().square().sum())
    return {name: float(np.sqrt(square)) for name, square in squares.items()}


def units_of(context: Context, level: str, names: Sequence[str] = ()) -> tuple[list[Unit], list[Unit]]:
    """All Units of a level, and those of them that are named, in the order of the forward pass.

    Raises:
        UserError: an unknown level, or a name that is no Unit's at this level.
    """
    if level not in get_args(Level):
        raise UserError(f"--level {level}: not one of {', '.join(get_args(Level))}.")
    every = units(context.minds.body, cast(Level, level))
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
) -> Smallest:
    """The smallest set of Units that returns `threshold` of the loss of E, searched along the ledger.

    Raises:
        UserError: no contrasts, a loss of E that is not safely away from zero, or no set that returns enough.
    """
    from reasoninterp.severance.ledger.integrate import integrate

    every, _ = units_of(context, level)
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    if not contrasts:
        raise UserError("--traces: no contrast can be made from them, so no set can be searched; name the --units.")
    moves = Moves(context, contrasts, every, from_mind=from_mind, to_mind=to_mind)
    if not moves.safe():
        raise UserError(
            f"{to_mind}: its loss of E is not safely away from zero, so there is no set to restore; name the --units."
        )
    integral = integrate(context, contrasts, from_mind=from_mind, to_mind=to_mind)
    entry = {name: float(np.mean(v)) for name, v in integral.at(cast(Level, level)).items()}
    # The ledger lists a tied embedding twice, the graft moves it once; what is in no entry comes last.
    lost = np.sign(moves.tuned.effect.mean() - moves.base.effect.mean())
    order = sorted(moves.moved, key=lambda name: -lost * entry.get(name, 0.0))
    found = smallest_set(partial(moves.share, "restore"), order, threshold=threshold)
    if not found.reached:
        raise UserError(
            f"--level {level}: no set of its Units returns {threshold:.0%} of the loss of E; name the --units yourself."
        )
    return found


# ------------------------------------------------------------------------------------------------ repairs and controls


def candidates(
    context: Context,
    chosen: Sequence[Unit],
    every: Sequence[Unit],
    ends: tuple[str, str] = ("base", "tuned"),
    *,
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
        alphas: shares of tuning's change that are kept.
        draws: random sets of either kind.

    Raises:
        UserError: both minds have the same weights.
    """
    from_mind, to_mind = ends
    change = weight_changes(context.minds, every, from_mind, to_mind)
    total = _norm(change, change)
    if total == 0:
        raise UserError(f"{to_mind}: it has the weights of {from_mind}, so there is nothing to repair.")
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
    as_they_are = [(to_mind, 1.0, 0.0), (from_mind, 0.0, 1.0)]
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


def repair_command(
    spec: ContextSpec,
    units: Sequence[str],
    alpha: float,
    out: str | Path,
    *,
    level: str = "block",
    from_mind: str = "base",
    to_mind: str = "tuned",
) -> list[str]:
    """Repair, save and measure: `reasoninterp repair`.

    Args:
        spec: minds and traces.
        units: names of Units of any level; none: the smallest restoring set of `level` is searched.
        alpha: share of tuning's change that is kept on them.
        out: a directory that is not there yet, or is empty.
        level: where the smallest set is searched.
        from_mind: the mind with the path.
        to_mind: the mind that is repaired.

    Returns:
        Lines to print: what was given back, what the minds then do, where the repaired one lies.
    """
    check_free(out)
    context = spec.load()
    names = tuple(units) or smallest_restoring(context, level, from_mind=from_mind, to_mind=to_mind).units
    chosen = [unit_named(context.minds.body, name) for name in names]
    handle = repaired(chosen, alpha, from_mind=from_mind, to_mind=to_mind)
    found = {}
    for label, one in ((from_mind, mind(from_mind)), (to_mind, mind(to_mind)), ("repaired", handle)):
        with context.open(one):
            found[label] = pd.DataFrame(list(scores(context, context.items)))
    lines = [
        f"{', '.join(names)}: {from_mind} weights given back, {alpha:.0%} of tuning's change kept there; "
        f"n = {len(context.items)} traces, intervals 95 % over traces."
    ]
    for measure in MEASURES:
        each = ", ".join(f"{label} {_text(estimate_of(t[measure], context.seed))}" for label, t in found.items())
        change = paired(found["repaired"][measure], found[to_mind][measure], seed=context.seed)
        lines.append(f"{measure}: {each}; repaired - {to_mind} {_text(change)}")
    save_mind(context.minds, handle, out, like=to_mind)
    return [*lines, f"Saved as {out}, an ordinary Hugging Face directory."]


def estimate_of(values: pd.Series, seed: int) -> Estimate:
    """A share with its Wilson interval where every value is 0 or 1, else a mean with its bootstrap interval."""
    known = values.dropna()
    return proportion(known) if known.isin([0.0, 1.0]).all() and values.name != "E" else mean(known, seed=seed)


def _text(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.ci_low:.2f}, {e.ci_high:.2f}]"
