"""How a location and a ranking of a planted pair are scored, and the tables of `severbench.py`.

A pair is scored at the grain at which it was planted and at every coarser level, each by itself: Units of a level are a
partition, and truth coarsens with them.  A method that only ranks is told |S| for its overlap (ties: the expectation);
`locate` and the graft search are not, theirs is the overlap of the sets that they name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reasoninterp.figures import MORE_COLOURS, NEUTRAL, bars, figure, housed
from reasoninterp.organisms.planted.truth import Truth
from reasoninterp.severance.location.location import LocatedSet
from reasoninterp.severance.scoring import scores
from reasoninterp.severance.scoring.intervals import clustered, clustered_share, intraclass

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("top1", "recall", "jaccard", "unit_auroc", "average_precision", "layer_error")
WORDS = {"severed": "severed", "overridden": "overridden", "damaged": "undecided"}  # every other label: intact


def score_ranking(ranking: Mapping[str, float], truth: Truth, n_layers: int) -> dict[str, float]:
    """Scores of a ranking; one that named nothing is wrong, not missing."""
    if not ranking:
        worst = {"top1": 0.0, "recall": 0.0, "jaccard": 0.0, "unit_auroc": 0.5, "average_precision": 0.0}
        return worst | {"layer_error": float(n_layers)}
    families = (truth.restoring, truth.cutting)
    lead = scores.leaders(ranking)
    return {
        "top1": scores.top1(ranking, truth.restoring + truth.cutting),
        "recall": float(np.mean([scores.recall_at(ranking, family) for family in families])),
        "jaccard": float(np.mean([scores.jaccard_at(ranking, family) for family in families])),
        "unit_auroc": scores.nearest(scores.auroc, ranking, truth.restoring),
        "average_precision": scores.nearest(scores.average_precision, ranking, truth.restoring),
        "layer_error": scores.layer_error(lead, truth.restoring, n_layers),
    }


def score_sets(restoring: LocatedSet | None, cutting: LocatedSet | None, truth: Truth) -> dict[str, float]:
    """Overlap of the sets that a method names with the nearest of either family; 0 where it names none."""
    overlaps = [
        scores.jaccard(located.units, family) if located is not None and located.reached else 0.0
        for located, family in ((restoring, truth.restoring), (cutting, truth.cutting))
    ]
    return {"jaccard": float(np.mean(overlaps)), "jaccard_restoring": overlaps[0], "jaccard_cutting": overlaps[1]}


# ------------------------------------------------------------------ tables


def table(rows: pd.DataFrame, *, seed: int = 0, icc: float = 0.0) -> pd.DataFrame:
    """One row a method: scores over severed pairs and the AUROC of severed against controls, clustered by base.

    `top1_worst` is the lower bound if every base counted only once.
    """
    out = []
    for method in dict.fromkeys(rows["method"]):
        part = rows[rows["method"] == method]
        cut = part[part["label"] == "severed"]
        row: dict[str, Any] = {"method": method, "pairs": len(cut), "controls": len(part) - len(cut)}
        for name in SHOWN:
            if name == "top1":
                share = clustered_share(cut[name], list(cut["base"]), icc_floor=icc, seed=seed)
                e, row["top1_worst"] = share.estimate, share.worst.ci_low
            else:
                e = clustered(cut[name].to_numpy(float), list(cut["base"]), seed=seed)
            row |= {name: e.value, f"{name}_ci_low": e.ci_low, f"{name}_ci_high": e.ci_high}
        if part["severity"].notna().any() and 0 < len(cut) < len(part):
            both = np.column_stack([part["severity"].fillna(-np.inf), part["label"] == "severed"]).astype(float)
            a = clustered(both, list(part["base"]), _auroc, seed=seed)
            row |= {"auroc": a.value, "auroc_ci_low": a.ci_low, "auroc_ci_high": a.ci_high}
        for name in ("forward", "backward", "seconds"):
            row[name] = part[name].mean() if name in part else np.nan
        out.append(row)
    return pd.DataFrame(out)


def _auroc(both: Any) -> float:
    return scores.severed_auroc(both[:, 0], both[:, 1])


def icc_floor(rows: pd.DataFrame, methods: Sequence[str]) -> float:
    """The largest intraclass correlation of top-1 among these methods; 0 where none of them misses now and then."""
    found = [0.0]
    for method in methods:
        cut = rows[(rows["method"] == method) & (rows["label"] == "severed")]
        if len(cut) and cut["base"].nunique() > 1:
            found.append(intraclass(cut["top1"], list(cut["base"])))
    return float(np.nanmax(found))


def by_level(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean scores of severed pairs by method and level, with the number of pairs."""
    cut = rows[rows["label"] == "severed"]
    found = cut.groupby(["level", "method"], sort=False)[list(SHOWN)].mean()
    found["pairs"] = cut.groupby(["level", "method"], sort=False).size()
    return found.reset_index()


def words(rows: pd.DataFrame) -> pd.DataFrame:
    """How often each label got each word, at the grain."""
    ours = rows[(rows["method"] == "locate") & rows["at_grain"]]
    found = ours.groupby(["label", "word"]).size().rename("pairs").reset_index()
    found["right"] = [WORDS.get(label, "intact") == word for label, word in zip(found.label, found.word, strict=True)]
    return found


@housed
def draw(found: pd.DataFrame, title: str, ours: Sequence[str]) -> Figure:
    """Bars with intervals, a method a row, ours first: top-1, overlap of sets, and severed against controls."""
    kinds = {**dict.fromkeys(ours, "ours"), **{m: m for m in found["method"] if m not in ours}}
    order = sorted(range(len(found)), key=lambda k: (kinds[found["method"][k]] != "ours", -found["top1"][k]))
    rows = found.iloc[order].reset_index(drop=True)
    made = figure(10.5, 1.2 + 0.26 * len(rows))
    fill = [MORE_COLOURS[0] if kinds[m] == "ours" else NEUTRAL for m in rows["method"]]
    n = f"{int(rows['pairs'][0])} severed pairs, {int(rows['controls'][0])} controls; green is this kit"
    panels = {
        "top1": "top-1: the first Unit is a true one",
        "jaccard": "Jaccard: overlap of the sets",
        "auroc": "AUROC: severed or not",
    }
    for ax, (name, about) in zip(made.subplots(1, 3, sharey=True), panels.items(), strict=True):
        columns = {name: "value", f"{name}_ci_low": "ci_low", f"{name}_ci_high": "ci_high"}
        known = rows.rename(columns=columns)[["method", "value", "ci_low", "ci_high"]]
        bars(known, "method", ax=ax, xlabel=about, colour=fill)
        ax.set_xlim(0, 1.02)
    made.suptitle(f"{title}: {n}; 95 % intervals, clustered by base")
    return made


def describe(found: pd.DataFrame, title: str) -> str:
    """The table as text."""
    head = f"{'method':<32}{'top-1':>20}{'Jaccard':>20}{'Unit AUROC':>11}{'AP':>6}{'severed AUROC':>20}{'s':>7}"
    lines = [title, head]
    for r in found.to_dict("records"):
        top1, jaccard, auroc = (_interval(r, name) for name in ("top1", "jaccard", "auroc"))
        seconds = "—" if pd.isna(r["seconds"]) else f"{r['seconds']:.2f}"
        lines.append(
            f"{r['method']:<32}{top1:>20}{jaccard:>20}{r['unit_auroc']:>11.2f}{r['average_precision']:>6.2f}"
            f"{auroc:>20}{seconds:>7}"
        )
    return "\n".join(lines)


def _interval(row: dict[str, Any], name: str) -> str:
    value = row.get(name, np.nan)
    return "—" if pd.isna(value) else f"{value:.2f} [{row[f'{name}_ci_low']:.2f}, {row[f'{name}_ci_high']:.2f}]"


def failures(rows: pd.DataFrame) -> str:
    """Severed pairs in which `locate` is not wholly right, and controls that it calls severed, by what they are."""
    ours = rows[(rows["method"] == "locate") & rows["at_grain"]]
    missed = ours[(ours["label"] == "severed") & ((ours["top1"] < 1) | (ours["jaccard"] < 1))]
    alarms = ours[(ours["label"] != "severed") & (ours["word"] == "severed")]
    lines = [f"{len(missed)} severed pairs are not located exactly; {len(alarms)} controls are called severed."]
    for r in pd.concat([missed, alarms]).to_dict("records"):
        lines.append(
            f"  {r['pair']:<52} gauge {r['gauge']:.1f} clean {r['clean']!s:<5} {r['word']:<12} "
            f"top-1 {r['top1']:.2f} Jaccard {r['jaccard']:.2f}"
        )
    return "\n".join(lines)
