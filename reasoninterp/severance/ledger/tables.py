"""Tables of a ledger: Units of every level with intervals over traces, the total with its warnings, entries per trace.

Means over traces, with the percentile bootstrap over traces; nats.  `weight_change` is the Frobenius norm of the
Unit's weight difference (a tied embedding counts in full for either use).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.units import LEVELS, Level, Slice, units
from reasoninterp.severance.effects import loss_of
from reasoninterp.severance.ledger.integrate import Entries, Integral, collect, modules_of
from reasoninterp.severance.ledger.pair import Pair
from reasoninterp.severance.ledger.products import LedgerUnit, atoms, home_of, ledger_units, membership
from reasoninterp.severance.ledger.quadrature import FLOOR
from reasoninterp.stats import matrix_intervals

LEDGER_COLUMNS = [
    "unit", "layer", "kind", "head", "circuit", "level", "attribution", "ci_low", "ci_high", "weight_change", "n",
]  # fmt: skip
TABLED: tuple[Level, ...] = (*LEVELS, "module")
BARRIER = 0.05  # nats per token above the worse end, from which the path is said to run through worse models
BULGE = 0.10  # share of the larger |E| by which E must leave the range of the ends to be worth a warning
SETTLED = 0.05  # share of the larger |E| by which a doubling may still move a single entry


def integral_of(rows: pd.DataFrame, body: Body, n: int) -> tuple[Integral, list[str]]:
    """The integral from rows `trace, alpha, effect, entries` (one column an atom), and the traces in their order."""
    names = atoms(body)
    places, modules = tuple(ledger_units(body)), tuple(modules_of(body))
    to_unit = membership([a.unit for a in names], [u.name for u in places]).numpy()
    to_module = membership([a.module for a in names], modules).numpy()
    traces = list(dict.fromkeys(rows["trace"]))
    known = {}
    for alpha, part in rows.groupby("alpha"):
        part = part.set_index("trace").loc[traces]
        by_atom = np.stack([np.asarray(row, dtype=np.float64) for row in part["entries"]])
        known[float(alpha)] = Entries(by_atom @ to_unit, by_atom @ to_module, part["effect"].to_numpy(np.float64))
    return collect(known, n, places, modules, body.dtype), traces


def places_at(body: Body, level: Level) -> list[LedgerUnit]:
    """The places of a level in forward order; a tied embedding is listed once for each use (but as one module)."""
    if level == "module":
        return [LedgerUnit(u.name, u.layer, u.kind, None, None, u.name) for u in units(body, "module")]
    return list({home_of(u, level).name: home_of(u, level) for u in ledger_units(body)}.values())


def weight_changes(body: Body, delta: Mapping[str, Tensor], level: Level) -> dict[str, float]:
    """Frobenius norm of the weight change of each Unit of a level."""
    found = units(body, level)
    squares = {unit.name: 0.0 for unit in found}
    parts: dict[str, list[tuple[str, Slice]]] = {}
    for unit in found:
        for part in unit.parts:
            parts.setdefault(part.param, []).append((unit.name, part))
    for param, mine in parts.items():
        if param in delta:
            change = delta[param]  # formed anew at every call
            for name, part in mine:
                squares[name] += float(part.of(change).double().square().sum())
    out = {name: square**0.5 for name, square in squares.items()}
    if body.tied and level != "module":
        out["unembed"] = out["embed"]
    return out


def unit_table(
    found: Integral, body: Body, delta: Mapping[str, Tensor], level: Level, seed: int, withheld: Sequence[str] = ()
) -> pd.DataFrame:
    """One row per Unit of a level: mean entry, interval, weight change; NaN for modules that are `withheld`."""
    names, by_unit, changes = places_at(body, level), found.at(level), weight_changes(body, delta, level)
    values = np.stack([by_unit[u.name] for u in names], axis=1)
    low, high = matrix_intervals(values, seed=seed)
    table = pd.DataFrame(
        {
            "unit": [u.name for u in names],
            "layer": pd.array([u.layer for u in names], dtype="Int64"),
            "kind": [u.kind for u in names],
            "head": pd.array([u.head for u in names], dtype="Int64"),
            "circuit": [u.circuit or "" for u in names],
            "level": level,
            "attribution": values.mean(0),
            "ci_low": low,
            "ci_high": high,
            "weight_change": [changes[u.name] for u in names],
            "n": len(values),
        }
    )[LEDGER_COLUMNS]
    if level == "module":
        table.loc[table["unit"].isin(withheld), ["attribution", "ci_low", "ci_high", "weight_change"]] = np.nan
    return table


def trace_table(found: Integral, traces: Sequence[str]) -> pd.DataFrame:
    """`trace, unit, attribution, residual` for every block; the residual is the trace's own, of all its blocks, nats."""
    residual = found.values.sum(1) - (found.e_to - found.e_from)
    long = pd.DataFrame(found.at("block")).assign(trace=list(traces), residual=residual)
    table = long.melt(id_vars=["trace", "residual"], var_name="unit", value_name="attribution")
    return table[["trace", "unit", "attribution", "residual"]]


def barrier_of(alphas: NDArray[np.float64], cross_entropy: NDArray[np.float64]) -> tuple[float, float]:
    """Largest excess of the cross-entropy along the path over the straight line between its ends, and where.

    Frankle et al. 2020 (arXiv:1912.05671), Entezari et al. 2022 (arXiv:2110.06296).  At least 0, since the ends are
    nodes; nats per token.
    """
    excess = cross_entropy - ((1 - alphas) * cross_entropy[0] + alphas * cross_entropy[-1])
    worst = int(np.argmax(excess))
    return float(excess[worst]), float(alphas[worst])


def warnings_of(found: Integral, tolerance: float, what: str = "E") -> list[str]:
    """What is to be known of a ledger: its residual, entries that have not settled, a path through other minds.

    Args:
        found: the integral.
        tolerance: for the residual.
        what: the readout's name.
    """
    out = []
    ends = float(found.e_from.mean()), float(found.e_to.mean())
    scale = max(map(abs, ends))
    if found.residual > tolerance and found.residual * scale > FLOOR:
        mend = (
            f"it is the rounding of {found.rounding} weights, which more nodes do not shrink; float32 does"
            if found.rounding
            else "use more nodes"
        )
        out.append(f"the ledger's residual is {found.residual:.1%}, above the tolerance of {tolerance:.1%}: {mend}")
    if found.settled > SETTLED and found.settled * scale > FLOOR:
        out.append(
            f"entries have not settled: the last doubling of nodes moved one by {found.settled:.1%} of the larger |{what}|,"
            " so entries of opposite sign may cancel in the sum; begin with more nodes"
        )
    low, high = float(found.along.min()), float(found.along.max())
    beyond = f"both ends ({ends[0]:.2f}, {ends[1]:.2f})"
    if low < min(ends) - max(BULGE * scale, FLOOR):
        out.append(f"between the two minds {what} falls to {low:.2f}, below {beyond}")
    if high > max(ends) + max(BULGE * scale, FLOOR):
        out.append(f"between the two minds {what} rises to {high:.2f}, above {beyond}")
    return out


def total_row(
    found: Integral, cross_entropy: NDArray[np.float64] | None, tolerance: float, seed: int, pair: Pair
) -> dict[str, Any]:
    """Both ends, the loss with its interval, the residual, the nodes, the loss barrier, warnings and the convention.

    Args:
        found: the integral.
        cross_entropy: at its nodes, mean over traces of the nats per token of gold chain and answer; None: not read.
        tolerance: for the residual.
        seed: of the bootstrap.
        pair: the two minds.
    """
    loss = loss_of(found.e_from, found.e_to, seed=seed)
    e_base, e_tuned = float(found.e_from.mean()), float(found.e_to.mean())
    total = float(found.values.sum(1).mean())
    row: dict[str, Any] = {
        "e_base": e_base,
        "e_tuned": e_tuned,
        "loss": e_tuned - e_base,
        "loss_ci_low": loss.ci_low,
        "loss_ci_high": loss.ci_high,
        "total": total,
        "residual": total - (e_tuned - e_base),
        "residual_relative": found.residual,
        "settled": found.settled,
        "rounding": found.rounding,
        "n_nodes": found.n_nodes,
        "n": len(found.values),
    }
    warnings = warnings_of(found, tolerance)
    if cross_entropy is not None:
        barrier, alpha = barrier_of(found.alphas, cross_entropy)
        worst, ends = float(cross_entropy.max()), (float(cross_entropy[0]), float(cross_entropy[-1]))
        row |= {"barrier": barrier, "barrier_alpha": alpha, "ce_base": ends[0], "ce_tuned": ends[1], "ce_worst": worst}
        if worst > max(ends) + BARRIER:
            warnings.append(
                f"the path runs through worse models than either end: cross-entropy {worst:.2f} nats per token "
                f"(ends {ends[0]:.2f} and {ends[1]:.2f}, barrier {barrier:.2f})"
            )
    return row | {"warning": "; ".join([*warnings, *pair.warnings]), "convention": pair.convention}


def level_named(text: str) -> Level:
    """A level of Units by its name.

    Raises:
        UserError: another word.
    """
    if text not in TABLED:
        raise UserError(f"--level {text}: not one of {', '.join(TABLED)}.")
    return text  # type: ignore[return-value]
