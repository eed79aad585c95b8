"""Who reads which step for the answer, and what tuning made of it: the base beside each organism.

For each pair the studies of `STUDIES` are run on the same traces.  At most fifteen lines say which head carries which
step to the answer in the base (knockout), which steps are direct causes (each step's direct hop, noising, the rest of
the text held, as a share of the largest), and what tuning left of the carrier's attention and of its effect.  Each pair
has a run of its own under `--out`; maps of all organisms beside their base are in `figures` there, and in the notebook
`notebooks/causal_path.ipynb`.

    python experiments/causal_path.py --out runs/causal-path --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from reasoninterp.compare import open_run
from reasoninterp.demo import pairs_of, spec_for
from reasoninterp.figures import MUTED, bars, figure, heatmap, housed, number
from reasoninterp.organisms import RECIPES, make
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.studies import study_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = ("severed", "shortcut", "weakened", "benign", "memorised", "largest-severed")
QUICK = ("severed", "largest-severed")
STUDIES = ("residual", "routes", "step-matrix", "knockout", "attention-map", "who-reads")
TRACES, QUICK_TRACES = 128, 32


def run(
    out: Path,
    *,
    seed: int = 0,
    only: tuple[str, ...] = PAIRS,
    limit: int = TRACES,
    quiet: bool = False,
    figures: bool = True,
) -> list[Run]:
    """Make the organisms `only` and run every study on the first `limit` traces of each beside its base."""
    make(out / "organisms", seed=seed, only=only, progress=not quiet)
    runs = []
    by_name = {p.tuned: p for p in pairs_of(RECIPES)}
    for pair in (by_name[name] for name in only):
        spec = spec_for(out / "organisms", pair, seed=seed, limit=limit)
        context = spec.load(progress=not quiet)
        with contextlib.closing(open_run(context, spec, out / pair.tuned)) as one:
            for study in STUDIES:
                run_study(study_named(study)(max_traces=limit), context, one, quiet=quiet, figures=figures)
        runs.append(one)
    return runs


def families(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that share their base and their traces, by name: these can stand beside each other."""
    out: dict[str, list[Run]] = {}
    for one in runs:
        given = one.manifest["arguments"]
        out.setdefault(f"{Path(given['minds']['base']).name} on {Path(given['traces']).stem}", []).append(one)
    return out


def gather(runs: list[Run], name: str) -> pd.DataFrame:
    """A table of all runs of a family: the base once, every tuned mind by the name of its organism."""
    tables = [one.table(name).replace({"mind": {"tuned": one.path.name}}) for one in runs]
    return pd.concat([t if k == 0 else t[t["mind"] != "base"] for k, t in enumerate(tables)], ignore_index=True)


def carrier(one: Run) -> pd.Series:
    """The head and step whose knockout costs the base's answer most: its row of `who_reads`."""
    table = one.table("who_reads").query("mind == 'base' and measure == 'knockout'")
    return table.loc[table["value"].abs().idxmax()]


def kept(runs: list[Run]) -> pd.DataFrame:
    """Of each base's carrier, the share of every measure that is left in each organism."""
    rows = []
    for one in runs:
        lead, table = carrier(one), one.table("who_reads_change")
        table = table[(table["site"] == lead["site"]) & (table["column"] == lead["column"])]
        rows.append(table.assign(pair=one.path.name, label=f"{one.path.name}: {lead['site']}, {lead['column']}"))
    ends = {"kept": "value", "kept_ci_low": "ci_low", "kept_ci_high": "ci_high"}
    return pd.concat(rows, ignore_index=True).rename(columns=ends)


@housed
def draw(runs: list[Run]) -> dict[str, Figure]:
    """What the carriers keep of attention and of effect, and maps of each family beside its base."""
    table, made = kept(runs), figure(7.6, 1.0 + 0.42 * len(runs))
    for ax, measure in zip(made.subplots(1, 2, sharey=True, sharex=True), ("attention", "knockout"), strict=True):
        title = "attention" if measure == "attention" else "effect (knockout)"
        bars(table[table["measure"] == measure], "label", ax=ax, title=title, xlabel="share of the base's")
        ax.axvline(1, color=MUTED, lw=0.8, ls=(0, (3, 2)))
    out = {"kept": made}
    look = {"x": "column", "xlabel": "", "unit": "change of the margin (nats)"}
    for name, some in families(runs).items():
        exact = gather(some, "who_reads").query("measure == 'knockout'")
        stream = gather(some, "residual").query("direction == 'noising'")
        out[f"heads of {name}"] = heatmap(exact, y="site", ylabel="head whose reading is cut", **look)
        out[f"stream of {name}"] = heatmap(stream, y="layer", ylabel="layer (resid_pre)", **look)
    return out


def summary(runs: list[Run]) -> list[str]:
    """At most fifteen lines: the carrier and the direct causes of each base, then a line for each pair."""
    lines, table = [], kept(runs).set_index(["pair", "measure"])
    for name, some in families(runs).items():
        lead, hops = carrier(some[0]), some[0].table("routes")
        hops = hops.query("mind == 'base' and direction == 'noising' and via == 'direct'")
        hops = hops.sort_values("from_index").set_index("from")["value"]
        causes = ", ".join(f"{step} {round(100 * v / hops.abs().max())} %" for step, v in hops.items())
        lines += [
            f"{name}: {lead['site']} carries most of “{lead['column']}”, {number(lead['value'])} "
            f"[{number(lead['ci_low'])}, {number(lead['ci_high'])}] nats by knockout, corrected p "
            f"{lead['p_corrected']:.1g}, n {lead['n']}; direct causes: {causes}"
        ]
        for one in some:
            exact, look = table.loc[(one.path.name, "knockout")], table.loc[(one.path.name, "attention")]
            left = [round(100 * v) for v in (look["value"], exact["value"], exact["ci_low"], exact["ci_high"])]
            lines.append(
                f"    {one.path.name:<15} keeps {left[0]:>4} % of the attention, {left[1]:>4} % "
                f"[{left[2]}, {left[3]}] of the effect"
            )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/causal-path"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of tuned organisms")
    parser.add_argument("--limit", type=int, help="only the first traces")
    parser.add_argument("--quick", action="store_true", help=f"few traces, only {' and '.join(QUICK)}")
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    few = given.limit or (QUICK_TRACES if given.quick else TRACES)
    wanted = tuple(given.only or (QUICK if given.quick else PAIRS))
    found = run(given.out, seed=given.seed, only=wanted, limit=few, quiet=given.quiet)
    (given.out / "figures").mkdir(exist_ok=True)
    for name, drawn in draw(found).items():
        drawn.savefig(given.out / "figures" / f"{name.replace(' ', '-')}.png", dpi=144)
    print("\n".join(summary(found)))
