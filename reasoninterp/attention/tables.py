"""Tables and the figure of the study `attention-map`: from its rows to means over traces with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.patching.columns import ANSWER, QUESTION
from reasoninterp.stats import corrected, estimate, matrix_intervals, sign_flip_pvalues

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP_KINDS = ("plain", "value_weighted", "value_share")
GRADIENT = "gradient"
SHOWN_HEADS = 40
_SPANS = ["mind", "destination", "destination_index", "source", "source_index"]
_PLACE = ["mind", "layer", "head", *_SPANS[1:]]
MAP_COLUMNS = [*_PLACE, "kind", "sinks", "value", "ci_low", "ci_high", "n", "p", "p_bh"]
ROLLOUT_COLUMNS = [*_SPANS, "value", "ci_low", "ci_high", "n"]
SINK_COLUMNS = ["mind", "layer", "head", "kind", "token", "received", "traces", "n"]


def summarise_maps(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Maps averaged over traces, in long form, with intervals and p-values of the gradients.

    Args:
        rows: the rows whose `what` is `map`: a column for each kind, those without sinks ending in `_x`.
        seed: of the resampling.
    """
    if not len(rows):
        return pd.DataFrame(columns=MAP_COLUMNS)
    out = []
    values = [(f"{kind}{end}", kind, sinks) for kind in MAP_KINDS for end, sinks in (("", "kept"), ("_x", "excluded"))]
    values.append((GRADIENT, GRADIENT, "kept"))
    for key, part in rows.groupby(_SPANS, sort=False):
        for column, kind, sinks in values:
            wide = part.pivot(index="trace", columns=["layer", "head"], values=column).astype(float)
            x = wide.to_numpy()
            x = x[~np.isnan(x).all(axis=1)]
            if not len(x):
                continue
            low, high = _intervals(x, seed)
            p = sign_flip_pvalues(x, seed=seed) if kind == GRADIENT else np.full(x.shape[1], np.nan)
            n = (~np.isnan(x)).sum(0)
            table = pd.DataFrame({"layer": wide.columns.get_level_values(0), "head": wide.columns.get_level_values(1)})
            table = table.assign(**dict(zip(_SPANS, key, strict=True)), kind=kind, sinks=sinks)
            mean = np.nansum(x, axis=0) / np.where(n, n, np.nan)
            out.append(table.assign(value=mean, ci_low=low, ci_high=high, n=n, p=p, p_bh=corrected(p)))
    found = pd.concat(out, ignore_index=True)[MAP_COLUMNS]
    found[["layer", "head"]] = found[["layer", "head"]].astype(int)
    return _ranked(found)


def summarise_rollout(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rollout averaged over traces, with intervals, from the rows whose `what` is `rollout`."""
    if not len(rows):
        return pd.DataFrame(columns=ROLLOUT_COLUMNS)
    return _ranked(estimate(rows, by=_SPANS, value="plain", kind="mean", seed=seed)[ROLLOUT_COLUMNS])


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    """The spans' places as 0, 1, 2 …, one numbering for destinations and sources."""
    orders = sorted({*table["destination_index"], *table["source_index"]})
    rank = {order: k for k, order in enumerate(orders)}
    return table.assign(**{c: table[c].map(rank) for c in ("destination_index", "source_index")})


def summarise_sinks(rows: pd.DataFrame) -> pd.DataFrame:
    """Heavy tokens per mind, layer, head, kind and text: mean share received and in how many of the traces."""
    found = rows[rows["what"] == "sink"] if len(rows) else rows
    if not len(found):
        return pd.DataFrame(columns=SINK_COLUMNS)
    n = rows.groupby("mind")["trace"].nunique()
    by = ["mind", "layer", "head", "kind", "token"]
    table = found.groupby(by, sort=False).agg(received=("plain", "mean"), traces=("trace", "nunique")).reset_index()
    table["n"] = table["mind"].map(n)
    table[["layer", "head"]] = table[["layer", "head"]].astype(int)
    order = {"traces": False, "received": False}
    return table.sort_values(["mind", *order], ascending=[True, *order.values()], ignore_index=True)[SINK_COLUMNS]


def answer_heatmap(table: pd.DataFrame, *, most: int = SHOWN_HEADS) -> Figure:
    """Heads × columns of the answer position's attention, sinks kept: plain, and shares of what is carried.

    Where there are more than `most` heads, those are shown that carry most from the steps in any mind.
    """
    from reasoninterp.figures import heatmap

    part = table[(table["destination"] == ANSWER) & (table["sinks"] == "kept")]
    part = part[part["kind"].isin(["plain", "value_share"])].copy()
    steps = part[~part["source"].isin([QUESTION, ANSWER]) & (part["kind"] == "value_share")]
    carried = steps.groupby(["mind", "layer", "head"])["value"].sum().groupby(["layer", "head"]).max()
    shown = set(carried.sort_values(ascending=False).index[:most])
    part = part[[place in shown for place in zip(part["layer"], part["head"], strict=True)]]
    part["reader"] = [f"L{layer}H{head}" for layer, head in zip(part["layer"], part["head"], strict=True)]
    part["reader_index"] = part["layer"] * (part["head"].max() + 1) + part["head"]
    words = {"plain": "plain", "value_share": "value-weighted"}
    part["panel"] = [f"{mind}: {words[kind]}" for mind, kind in zip(part["mind"], part["kind"], strict=True)]
    minds = list(dict.fromkeys(part["mind"]))
    part["order"] = [minds.index(m) for m in part["mind"]]
    part = part.sort_values(["order", "kind"], kind="stable").round({"value": 2})  # no cell has room for more digits
    hidden = len(carried) - len(shown)
    note = f"head ({hidden} that carry less are not shown)" if hidden > 0 else "head"
    return heatmap(
        part,
        "source",
        "reader",
        panel="panel",
        limit=1.0,
        xlabel="read by the answer position",
        ylabel=note,
        unit="share of the head's attention (plain) or of the norm it writes",
    )


def _intervals(x: NDArray, seed: int) -> tuple[NDArray, NDArray]:
    """Bootstrap intervals of the columns' means; columns that miss a value in some trace by themselves."""
    low, high = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    whole = ~np.isnan(x).any(0)
    low[whole], high[whole] = matrix_intervals(x[:, whole], seed=seed)
    for k in np.flatnonzero(~whole):
        values = x[~np.isnan(x[:, k])][:, [k]]
        (low[k],), (high[k],) = matrix_intervals(values, seed=seed)
    return low, high
