"""Where is the path cut? Locates the loss between each organism and its base, and says how ledger, grafts and sets agree.

Prints, for each pair: verdict, restoring set, cutting set, mechanism, and whether the Units that lead the ledger and the
single grafts are members of the sets.  Both minds are read a second time on traces without the rival (cue drawn at
random, or questions that nobody memorised).  Each pair has a run of its own under `--out`, `figures/severance.png`
stands beside them; `notebooks/severance.ipynb` shows both from the saved tables.

    python experiments/severance.py --out runs/severance --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from reasoninterp.cli import set_threads
from reasoninterp.cli_locate import LEVELS, save
from reasoninterp.compare import open_run
from reasoninterp.demo import pairs_of, spec_for
from reasoninterp.figures import MUTED, bars, figure, housed
from reasoninterp.models.units import Level
from reasoninterp.organisms import RECIPES, make
from reasoninterp.runs import Run
from reasoninterp.severance.location.locate import locate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = ("severed", "mismatched", "memorised", "weakened", "benign", "shortcut")
QUICK = ("severed", "benign")
TRACES, QUICK_TRACES = 128, 64
COLUMNS = ["pair", "verdict", "severance_score", "restoring", "cutting", "mechanism", "agreement", "seconds"]


def without_rival(home: Path, traces: str) -> str:
    """The traces in which the rival is removed: the cue at random, or questions that were not memorised."""
    return str(home / "traces" / ("lastop-base.jsonl" if traces == "memorised.jsonl" else "lastop-cue-random.jsonl"))


def run(
    out: Path,
    *,
    seed: int = 0,
    only: tuple[str, ...] = PAIRS,
    limit: int = TRACES,
    level: Level = "block",
    quiet: bool = False,
) -> list[Run]:
    """Make the organisms `only`, locate the loss of each on the first `limit` traces, and write a run for each."""
    home = out / "organisms"
    make(home, seed=seed, only=only, progress=not quiet)
    by_name = {p.tuned: p for p in pairs_of(RECIPES)}
    runs = []
    for pair in (by_name[name] for name in only):
        spec = spec_for(home, pair, seed=seed, limit=limit)
        context = spec.load(progress=not quiet)
        free = replace(spec, traces=without_rival(home, pair.traces)).load(minds=context.minds)
        with contextlib.closing(open_run(context, spec, out / pair.tuned, {"level": level})) as one:
            save(one, locate(context, rival_free=free.items, level=level, most_contrasts=limit))
        runs.append(one)
    return runs


def table(runs: list[Run]) -> pd.DataFrame:
    """One row a pair: the location, and how ledger, grafts and sets agree."""
    rows = []
    for one in runs:
        row = one.table("location").iloc[0].to_dict()
        rows.append({**row, "pair": one.path.name, "agreement": agreement(one)})
    return pd.DataFrame(rows)[COLUMNS]


def agreement(one: Run) -> str:
    """Which of the Units that lead the ledger and the single grafts lie in which set; "" where nothing was located."""
    if not one.has_table("ranking") or not one.has_table("sets"):
        return ""
    ranking = one.table("ranking").set_index("unit")
    led, grafted = ranking["rank_ledger"].idxmax(), ranking["rank_grafts"].idxmax()

    def where(unit: str) -> str:
        inside = [name for name in ("restoring", "cutting") if ranking.loc[unit, f"in_{name}"]]
        return {2: "in both sets", 1: f"in the {inside[0]} set" if inside else "", 0: "in neither set"}[len(inside)]

    if led == grafted:
        return f"ledger and grafts lead with {led}, {where(led)}"
    return f"ledger leads with {led}, {where(led)}; grafts with {grafted}, {where(grafted)}"


@housed
def draw(runs: list[Run]) -> Figure:
    """Each located pair's ledger, in forward order, its located Units marked by a dot."""
    some = [one for one in runs if one.has_table("ranking")]
    made = figure(3.0 * max(1, len(some)), 3.6)
    if not some:
        return made
    every = pd.concat([one.table("ranking") for one in some])
    first = every["unit"].map(lambda name: -1 if "embed" in name and name != "unembed" else 0)
    order = list(dict.fromkeys(every.assign(first=first).sort_values(["first", "layer", "unit"])["unit"]))
    axes = made.subplots(1, len(some), sharex=True, sharey=True, squeeze=False)[0]
    ends = {"ledger": "value", "ledger_ci_low": "ci_low", "ledger_ci_high": "ci_high"}
    edge = float(every["ledger_ci_low"].min()) * 1.08
    for ax, one in zip(axes, some, strict=True):
        ranking = one.table("ranking").set_index("unit").reindex(order).reset_index()
        verdict = one.table("location")["verdict"].iloc[0]
        bars(
            ranking[["unit", *ends]].rename(columns=ends), "unit", ax=ax, signed=True,
            title=f"{one.path.name} (verdict: {verdict})", xlabel="effect gained or lost (nats)",
        )  # fmt: skip
        for column, face, x in (("in_restoring", MUTED, edge), ("in_cutting", "white", 1.06 * edge)):
            at = [k for k, inside in enumerate(ranking[column]) if inside is True]
            ax.plot([x] * len(at), at, "o", color=MUTED, mfc=face, ms=4)
    counts, seeds = every["n"].unique(), {one.manifest["identity"].get("seed") for one in some}
    made.text(
        0.01, -0.02,
        "● in the restoring set   ○ in the cutting set   |   lines: 95 % intervals over "
        f"{' or '.join(f'{n:.0f}' for n in counts)} traces; seed {', '.join(map(str, seeds))}",
        color=MUTED, fontsize=8.5, va="top",
    )  # fmt: skip
    return made


def summary(runs: list[Run]) -> list[str]:
    """Two lines a pair."""
    lines = []
    for row in table(runs).to_dict("records"):
        score = f"{row['verdict']:<16} score {row['severance_score']:.2f}  {row['seconds']:5.1f} s"
        if not row["restoring"] and not row["cutting"]:
            lines.append(f"{row['pair']:<11} {score}")
            continue
        lines.append(
            f"{row['pair']:<11} {score}  restore {row['restoring']}  cut {row['cutting']}  ({row['mechanism']})"
        )
        lines.append(f"{'':<11} {row['agreement']}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/severance"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of tuned organisms")
    parser.add_argument("--limit", type=int, help="only the first traces")
    parser.add_argument("--level", default="block", choices=LEVELS)
    parser.add_argument("--quick", action="store_true", help=f"few traces, only {' and '.join(QUICK)}")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    few = given.limit or (QUICK_TRACES if given.quick else TRACES)
    wanted = tuple(given.only or (QUICK if given.quick else PAIRS))
    set_threads(1)  # on models this small a second thread costs more than it brings
    found = run(given.out, seed=given.seed, only=wanted, limit=few, level=given.level, quiet=given.quiet)
    (given.out / "figures").mkdir(exist_ok=True)
    draw(found).savefig(given.out / "figures" / "severance.png", dpi=144, bbox_inches="tight")
    print("\n".join(summary(found)))
