"""Mend it: what reliance comes back when the smallest set is given back, and what accuracy it costs.

For each organism whose path was cut, the study `repair` finds the smallest set of Units that returns 90 % of E, keeps a
share alpha of tuning's change on it, and reads follow rate and accuracy on the organism's own traces, on traces with the
cue drawn at random (the rival removed) and on the base's; beside it, interpolation of the whole model and random sets.
Each pair has a run of its own under `--out`; one line for each series and organism says which alpha to take.  The figure
is `figures/repair.png` there, and is shown in `notebooks/repair.ipynb`.

    python experiments/repair.py --out runs/repair --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from reasoninterp.compare import open_run
from reasoninterp.demo import pairs_of, spec_for
from reasoninterp.organisms import RECIPES, make
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.severance.grafts.repair import MEASURES, SET
from reasoninterp.severance.grafts.repair_study import HERE, Repair, draw_repair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = ("severed", "mismatched", "memorised")
QUICK = ("severed", "memorised")
OTHERS = ("lastop-cue-random", "lastop-base")
ALPHAS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
QUICK_ALPHAS = (0.0, 0.25, 0.5)
TITLES = {HERE: "in distribution", "lastop-cue-random": "out: random cue", "lastop-base": "out: base's problems"}
TRACES, QUICK_TRACES = 128, 24


def run(
    out: Path,
    *,
    seed: int = 0,
    only: tuple[str, ...] = PAIRS,
    limit: int = TRACES,
    level: str = "block",
    alphas: tuple[float, ...] = ALPHAS,
    draws: int = 5,
    quiet: bool = False,
) -> list[Run]:
    """Make the organisms `only` and run the study on the first `limit` traces of each file."""
    make(out / "organisms", seed=seed, only=only, progress=not quiet)
    runs, by_name = [], {p.tuned: p for p in pairs_of(RECIPES)}
    others = tuple(str(out / "organisms" / "traces" / f"{name}.jsonl") for name in OTHERS)
    for pair in (by_name[name] for name in only):
        spec = spec_for(out / "organisms", pair, seed=seed, limit=limit)
        context = spec.load(progress=not quiet)
        with contextlib.closing(open_run(context, spec, out / pair.tuned)) as one:
            study = Repair(level=level, alphas=alphas, draws=draws, others=others)
            run_study(study, context, one, quiet=quiet, figures=False)
        runs.append(one)
    return runs


def table_of(runs: list[Run]) -> pd.DataFrame:
    """What to take in each series of each organism: value and change of every measure, a row a file of traces."""
    rows = []
    for one in runs:
        table = one.table("repair").set_index(["traces", "series", "alpha", "measure"])
        ends = [("tuned", 1.0, True), ("base", 0.0, True)]
        chosen = [(r.series, r.alpha, r.reached) for r in one.table("repair_choice").itertuples()]
        for series, alpha, reached in [*ends, *chosen]:
            for file in dict.fromkeys(table.index.get_level_values("traces")):
                found = {m: table.loc[(file, series, alpha, m)] for m in MEASURES}
                row = {"pair": one.path.name, "series": series, "alpha": alpha, "reached": reached, "traces": file}
                row |= {"units": found["E"]["units"], "weight_change": found["E"]["weight_change"]}
                row |= {"restored": found["E"]["restored"], **{m: found[m]["value"] for m in MEASURES}}
                rows.append(row | {"cost": found["accuracy_own_chain"]["change"], "n": int(found["swap_follow"]["n"])})
    return pd.DataFrame(rows)


def draw(runs: list[Run]) -> Figure:
    """Accuracy against reliance: a row of panels for each organism, a panel for each file of traces."""
    return draw_repair({one.path.name: one.table("repair") for one in runs}, TITLES)


def summary(runs: list[Run]) -> list[str]:
    """For each organism a line for its set, then one for each series: what comes back and what it costs where."""
    lines, whole = [], table_of(runs)
    gauge = {one.path.name: one.table("repair_alignment")["note"] for one in runs}
    for name, part in whole.groupby("pair", sort=False):
        units = part[part["series"] == SET]["units"].iloc[0]
        notes = " ".join(gauge[name])
        lines.append(f"{name}: the smallest restoring set is {units} (n = {part['n'].iloc[0]}).  {notes}")
        for (series, alpha), rows in part.groupby(["series", "alpha"], sort=False):
            here = rows[rows["traces"] == HERE].iloc[0]
            back = "" if series in ("tuned", "base") else f"returns {100 * here['restored']:3.0f} % of E, "
            reads = "; ".join(
                f"{'here' if r.traces == HERE else r.traces.removeprefix('lastop-')}: follow {100 * r.swap_follow:3.0f} %, "
                f"accuracy {100 * r.accuracy_own_chain:3.0f} %"
                for r in rows.itertuples()
            )
            short = "" if here["reached"] else " (too little)"
            lines.append(f"    {series:<17} alpha {alpha:<5g} {back}{reads}{short}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/repair"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of tuned organisms")
    parser.add_argument("--limit", type=int, help="only the first traces")
    parser.add_argument("--level", default="block", help="of the Units: fine, circuit, head, block or layer")
    parser.add_argument("--quick", action="store_true", help=f"few traces, only {' and '.join(QUICK)}")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    few = given.limit or (QUICK_TRACES if given.quick else TRACES)
    wanted = tuple(given.only or (QUICK if given.quick else PAIRS))
    grid, times = (QUICK_ALPHAS, 2) if given.quick else (ALPHAS, 5)
    found = run(
        given.out,
        seed=given.seed,
        only=wanted,
        limit=few,
        level=given.level,
        alphas=grid,
        draws=times,
        quiet=given.quiet,
    )
    (given.out / "figures").mkdir(exist_ok=True)
    draw(found).savefig(given.out / "figures" / "repair.png", dpi=144)
    table_of(found).to_csv(given.out / "repair.csv", index=False)
    print("\n".join(summary(found)))
