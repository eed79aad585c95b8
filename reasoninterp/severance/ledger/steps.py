"""Ledgers of single steps: where tuning changed what one step by itself does to the answer.

1. Step i's contrast is `forced`: the clean chain with step i alone in its corrupt version, all other steps held; the
   corrupt answer is the one that the whole corrupt chain implies, so all steps are read on one scale.  It is made from
   the trace's propagated contrast; steps that do not change there have none.
2. Steps are grouped as `last` and `earlier` and by their place (`step 0`, …); `chain` is the whole-chain ledger beside
   them.  Each group refines its nodes for itself and sums to its own change of effect.
3. What is left out is counted in `ledger_steps_refused`, with the reason.

Effects of single steps do not add up to the chain's: where the last step restates what the earlier ones say, each
alone may do nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from reasoninterp.models.context import Context, Item, unaskable
from reasoninterp.severance.effects import loss_of
from reasoninterp.severance.ledger.integrate import difference_of
from reasoninterp.severance.ledger.pair import Pair
from reasoninterp.severance.ledger.quadrature import check
from reasoninterp.severance.ledger.study import Evaluate, NodeStudy
from reasoninterp.severance.ledger.tables import integral_of, level_named, unit_table, warnings_of
from reasoninterp.traces.contrast import Contrast, contrast

WHOLE = "chain"


def forced_step(whole: Contrast, step: int) -> Contrast:
    """The contrast in which one step alone is in its corrupt version; its answers are the whole contrast's."""
    steps = list(whole.clean.steps)
    steps[step] = whole.corrupt.steps[step]
    corrupt = whole.clean.with_steps(steps, answer=whole.corrupt.answer, id=f"{whole.clean.id}/step{step}")
    return contrast("forced", whole.clean, corrupt)


def step_contrasts(context: Context, items: Sequence[Item]) -> tuple[dict[int, list[Item]], Counter[str]]:
    """Forced contrasts by the place of their step, as items of the same traces; and why others have none."""
    out: dict[int, list[Item]] = {}
    refused: Counter[str] = Counter()
    for item in items:
        whole = item.contrast
        if whole is None:
            refused["the trace has no contrast"] += 1
            continue
        if len(whole.clean.steps) != len(whole.corrupt.steps):
            refused["the corrupt chain has another number of steps"] += 1
            continue
        for step in range(len(whole.clean.steps)):
            if step not in whole.changed:
                refused["the step is the same in both chains"] += 1
                continue
            made = forced_step(whole, step)
            reason = unaskable(made, context.tokenizer, context.end_id)
            if reason:
                refused[reason] += 1
                continue
            out.setdefault(step, []).append(Item(item.trace, made))
    return dict(sorted(out.items())), refused


class LedgerSteps(NodeStudy):
    """Where tuning changed what single steps do: a ledger for the last, the earlier and each step, beside the chain's.

    Parameters:
        level: `fine`, `circuit`, `head`, `block` or `layer`.
        nodes: intervals between nodes to begin with (nodes + 1 gradients), for each step.
        max_nodes: where doubling ends.
        tolerance: largest residual, relative to the larger |E|, with which it is content.
        from_mind: the mind where the path begins.
        to_mind: the mind where it ends.
        align: bring the tuned mind into the base's gauge first (`severance.gauge.aligned`).
        checkpoint: keep the activations of one block at a time (slower, the same entries).
    """

    level: str = "block"

    def search(self, context: Context, evaluate: Evaluate) -> None:
        """The whole chain, then each step."""
        check(self.nodes, self.max_nodes, self.tolerance)
        level_named(self.level)
        for step, items in self._groups(context).items():
            self.refine(context, evaluate, partial(self.ask, context, items, readout="reliance", step=step))

    def _groups(self, context: Context) -> dict[str, list[Item]]:
        """Items by `chain` or by the step's place."""
        whole = [i for i in context.items if i.contrast is not None]
        steps, _ = step_contrasts(context, context.items)
        groups = {WHOLE: whole, **{f"step {k}": items for k, items in steps.items()}}
        return {name: items for name, items in groups.items() if items}

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """`ledger_steps` (step × Unit), `ledger_steps_total` (a row a step), `ledger_steps_refused` and
        `ledger_steps_alignment` (notes)."""
        pair = self.pair(context)
        _, refused = step_contrasts(context, context.items)
        left_out = pd.DataFrame(sorted(refused.items()), columns=["reason", "n"])
        about = {"ledger_steps_refused": left_out, "ledger_steps_alignment": pair.table()}
        if not len(rows):
            empty = pd.DataFrame(columns=["step", "unit", "attribution", "ci_low", "ci_high", "n"])
            return {"ledger_steps": empty, "ledger_steps_total": pd.DataFrame(), **about}
        n_steps = {i.id: len(i.trace.steps) for i in context.items}
        tables, totals = [], []
        for name, part in grouped(rows, n_steps):
            table, total = self._one(context, part, pair)
            tables.append(table.assign(step=name))
            totals.append({"step": name, **total})
        return {
            "ledger_steps": pd.concat(tables, ignore_index=True),
            "ledger_steps_total": pd.DataFrame(totals),
            **about,
        }

    def _one(self, context: Context, part: pd.DataFrame, pair: Pair) -> tuple[pd.DataFrame, dict[str, Any]]:
        delta = difference_of(context, self.from_mind, pair.end)
        with context.open(self.from_mind) as body:
            found, _ = integral_of(part, body, part["alpha"].nunique() - 1)
            table = unit_table(found, body, delta, level_named(self.level), context.seed, pair.withheld)
        loss = loss_of(found.e_from, found.e_to, seed=context.seed)
        return table, {
            "e_base": float(found.e_from.mean()),
            "e_tuned": float(found.e_to.mean()),
            "loss": loss.value,
            "loss_ci_low": loss.ci_low,
            "loss_ci_high": loss.ci_high,
            "residual_relative": found.residual,
            "settled": found.settled,
            "rounding": found.rounding,
            "n_nodes": found.n_nodes,
            "within_tolerance": found.residual <= self.tolerance,
            "n": len(found.values),
            "warning": "; ".join([*warnings_of(found, self.tolerance), *pair.warnings]),
            "convention": pair.convention,
        }


def grouped(rows: pd.DataFrame, n_steps: dict[str, int]) -> list[tuple[str, pd.DataFrame]]:
    """Rows of the chain, of the last step, of the earlier ones (averaged within a trace and node) and of each step."""
    chain, single = rows[rows["step"] == WHOLE], rows[rows["step"] != WHOLE]
    place = single["step"].str.removeprefix("step ").astype(int)
    is_last = place == single["trace"].map(n_steps) - 1
    out = [(WHOLE, chain)]
    out += [(name, averaged(single[mask])) for name, mask in (("last", is_last), ("earlier", ~is_last))]
    out += [(str(name), part) for name, part in single.groupby("step", sort=False)]
    return [(name, part) for name, part in out if len(part)]


def averaged(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per trace and node, on nodes that all steps have: a trace's steps averaged, so that it counts once."""
    if not len(rows):
        return rows
    shared = set.intersection(*(set(part["alpha"]) for _, part in rows.groupby("step")))
    kept = rows[rows["alpha"].isin(shared)]
    out = []
    for (trace, alpha), part in kept.groupby(["trace", "alpha"], sort=False):
        entries = [sum(column) / len(part) for column in zip(*part["entries"], strict=True)]
        out.append({"trace": trace, "alpha": alpha, "effect": part["effect"].mean(), "entries": entries})
    return pd.DataFrame(out)
