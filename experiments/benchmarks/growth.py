"""How the cost of a sweep grows with layers, positions, steps and heads: measured, and as the plan foresees it.

    python experiments/benchmarks/growth.py [--quick] [--seed 0] [--out experiments/figures/growth.png]

1. One quantity is varied at a time, the others stay at a base size.  What is swept: `resid_pre` over layer × step
   (layers, steps), over layer × token (positions), `z` of every head over layer × step (heads); both directions, one
   contrast whose runs part at the half.
2. *Seconds*: CPU seconds of one thread, the least of several rounds.  One forward pass a cell is timed on a sample of
   cells and multiplied by their number.  The line is the plan's floating-point work at the rate that a plain forward pass
   of the base size reaches; where a point lies above it, something else than arithmetic takes the time.
3. *Memory*: bytes of tensors alive at once (`patching.counted`), beside the plan's upper estimate.

The last line printed is one JSON object: the exponent of each growth (slope in logarithms), and how far the plan is off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import pandas as pd
import torch
from fixtures import Size, context_of, save_model

from reasoninterp.figures import INK, MORE_COLOURS, NEUTRAL, figure, housed
from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context
from reasoninterp.patching.budget import SweepPlan, plan_sweep
from reasoninterp.patching.cells import Cells, Sites, cells_of
from reasoninterp.patching.counted import Counted
from reasoninterp.patching.metric import ContrastPlan, contrast_plan
from reasoninterp.patching.plain import patched_margins, span_mask
from reasoninterp.patching.sweep import sweep
from reasoninterp.traces.trace import Span

PARTS_AT, AMPLE = 0.5, 1 << 50
STEPS, TOKENS, HEADS = Sites(), Sites(spans="tokens"), Sites(("z",))


class Base(NamedTuple):
    """The size about which one quantity is varied."""

    n_layers: int
    d_model: int
    n_heads: int
    length: int
    n_steps: int


class Axis(NamedTuple):
    """A quantity that is varied: its field of `Base`, its values, and what is swept."""

    field: str
    values: tuple[int, ...]
    sites: Sites
    swept: str


QUICK = Base(4, 128, 4, 64, 8)
FULL = Base(6, 256, 8, 128, 9)


def axes(base: Base, quick: bool) -> dict[str, Axis]:
    """The four quantities."""
    few = 3 if quick else 4
    shortest = base.length // (2 if quick else 4)
    by_step, by_token, by_head = "resid_pre, layer × step", "resid_pre, layer × token", "z of each head, layer × step"
    return {
        "layers": Axis("n_layers", tuple(2 * 2**k for k in range(few)), STEPS, by_step),
        "positions": Axis("length", tuple(shortest * 2**k for k in range(few)), TOKENS, by_token),
        "steps": Axis("n_steps", tuple(3 * 2**k for k in range(few)), STEPS, by_step),
        "heads": Axis("n_heads", tuple(2 * 2**k for k in range(few)), HEADS, by_head),
    }


def cpu_seconds(run: Callable[[], object], rounds: int) -> float:
    """The least CPU seconds of several rounds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return min(found)


def peak(run: Callable[[], object]) -> int:
    """Bytes of tensors alive at once."""
    with Counted() as counted:
        run()
    return counted.peak


def one_cell(body: Body, plan: ContrastPlan, cells: Cells, at: int) -> torch.Tensor:
    """One cell by one forward pass of the network, denoising; the source's site is taken from a pass of its own."""
    row = cells.table.iloc[at]
    name = site(str(row["component"]), int(row["layer"]))
    source = _SOURCES.get(name)
    if source is None:
        source = _SOURCES[name] = body.cache(plan.ids(0), [name])[name]
    mask = span_mask(plan, 1, [Span(int(cells.start[at]), int(cells.stop[at]))])
    if row["head"] >= 0:
        mask = mask[..., None, None] & (torch.arange(body.n_heads) == int(row["head"]))[:, None]
    return patched_margins(body, plan, "denoising", name, source, mask)


_SOURCES: dict[str, torch.Tensor] = {}


def measure(base: Base, sites: Sites, rounds: int, n_sample: int, seed: int) -> tuple[dict[str, Any], SweepPlan]:
    """One size: seconds and peak bytes of the sweep and of one forward pass a cell; and the plan."""
    size = Size(base.n_layers, base.d_model, base.n_heads, base.length, 1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), size, "gpt2", seed=seed)
        context: Context = context_of(Path(folder), size, PARTS_AT, base.n_steps)
    contrasts = [i.contrast for i in context.items if i.contrast is not None]
    with context.open("base") as body:
        foreseen = plan_sweep(context, contrasts, sites, budget=AMPLE)
        ours = sweep(context, contrasts, sites)  # the first run pays for much that is done once
        plan = contrast_plan(context, contrasts)
        cells = cells_of(body, [context.encode(c.clean) for c in contrasts], sites)
        swept = ours[ours["direction"] == "denoising"].reset_index(drop=True)
        live = np.flatnonzero(swept["value"].to_numpy())
        sample = np.random.default_rng(seed).choice(live, min(n_sample, len(live)), replace=False).tolist()
        _SOURCES.clear()
        plain_margin = float(plan.margins(body, 1)[0])
        gaps = [
            abs(plain_margin - float(one_cell(body, plan, cells, at)[0]) - swept["value"].iloc[at]) for at in sample
        ]
        plain = cpu_seconds(lambda: [one_cell(body, plan, cells, at) for at in sample], rounds) / len(sample)
        _SOURCES.clear()
        row = {
            "ours_seconds": cpu_seconds(lambda: sweep(context, contrasts, sites), rounds),
            "plain_seconds": plain * len(ours),
            "ours_bytes": peak(lambda: sweep(context, contrasts, sites)),
            "plain_bytes": peak(lambda: one_cell(body, plan, cells, sample[0])),
            "foreseen_bytes": foreseen.peak_bytes,
            "ours_flops": foreseen.work.flops,
            "plain_flops": foreseen.work.plain_flops,
            "n_cells": len(ours),
            "n_sampled": len(sample),
            "max_abs_diff": max(gaps),
        }
    return row, foreseen


def run(base: Base, quick: bool, seed: int) -> pd.DataFrame:
    """All sizes of all axes: one row each."""
    rounds, n_sample = (1, 6) if quick else (2, 12)
    rows, known = [], {}
    for name, axis in axes(base, quick).items():
        for value in axis.values:
            at = base._replace(**{axis.field: value})
            if (at, axis.sites) not in known:
                known[at, axis.sites], _ = measure(at, axis.sites, rounds, n_sample, seed)
            rows.append({"axis": name, "value": value, "swept": axis.swept, **known[at, axis.sites]})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return pd.DataFrame(rows)


def with_foreseen_seconds(table: pd.DataFrame, base: Base, quick: bool) -> pd.DataFrame:
    """Seconds that the plan's work takes at the rate of the plain forward passes nearest the base size."""
    field = axes(base, quick)["layers"].values
    near = min(field, key=lambda v: abs(v - base.n_layers))
    at = table[(table["axis"] == "layers") & (table["value"] == near)].iloc[0]
    rate = at["plain_flops"] / at["plain_seconds"]
    return table.assign(rate=rate, ours_foreseen=table["ours_flops"] / rate, plain_foreseen=table["plain_flops"] / rate)


@housed
def draw(table: pd.DataFrame, base: Base) -> Any:
    """Seconds above, memory below; a column for each quantity."""
    from matplotlib.ticker import NullLocator

    fig = figure(11.0, 5.0)
    names = list(dict.fromkeys(table["axis"]))
    panels = fig.subplots(2, len(names), sharey="row", sharex="col")
    look = {"this sweep": ("ours", MORE_COLOURS[0], "o"), "one forward pass a cell": ("plain", NEUTRAL, "s")}
    for column, name in enumerate(names):
        rows = table[table["axis"] == name].sort_values("value")
        above, below = panels[:, column]
        for label, (key, colour, marker) in look.items():
            above.plot(rows["value"], rows[f"{key}_seconds"], ls="", marker=marker, color=colour, label=label)
            above.plot(rows["value"], rows[f"{key}_foreseen"], color=colour, lw=1.2)
            below.plot(rows["value"], rows[f"{key}_bytes"] / 2**20, ls="", marker=marker, color=colour)
        below.plot(rows["value"], rows["foreseen_bytes"] / 2**20, color=look["this sweep"][1], lw=1.2)
        above.set_title(f"{name}\n", fontsize=9.5)
        above.text(0, 1.03, rows["swept"].iloc[0], transform=above.transAxes, fontsize=8, color=INK)
        below.set_xlabel(name)
        for ax in (above, below):
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(rows["value"].tolist(), [str(v) for v in rows["value"]])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.grid(True, axis="y")
    panels[0, 0].set_ylabel("CPU seconds, one thread")
    panels[1, 0].set_ylabel("tensors alive, MiB")
    panels[0, 0].legend(loc="upper left", fontsize=7.5)
    fig.supxlabel(
        f"Others fixed at {base.n_layers} layers × {base.d_model}, {base.length} positions, {base.n_steps} steps, "
        f"{base.n_heads} heads; runs part at the half. Points: measured. Lines: the plan.",
        fontsize=8.5,
    )
    return fig


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Slope of log y on log x."""
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 2)


def main() -> int:
    """Measure, draw, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "figures" / "growth.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = QUICK if options.quick else FULL
    table = with_foreseen_seconds(run(base, options.quick, options.seed), base, options.quick)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(table, base).savefig(options.out, dpi=110)
    memory = table["foreseen_bytes"] / table["ours_bytes"]
    seconds = table["ours_seconds"] / table["ours_foreseen"]
    grows = {
        name: {
            key: exponent(rows["value"], rows[key])
            for key in ("ours_seconds", "plain_seconds", "ours_bytes", "plain_bytes")
        }
        for name, rows in table.groupby("axis", sort=False)
    }
    print(
        json.dumps(
            {
                "base": base._asdict(),
                "parts_at": PARTS_AT,
                "exponents": grows,
                "speedup": {
                    name: [round(float(v), 1) for v in rows["plain_seconds"] / rows["ours_seconds"]]
                    for name, rows in table.groupby("axis", sort=False)
                },
                "foreseen_over_counted_bytes": [round(float(memory.min()), 3), round(float(memory.max()), 3)],
                "measured_over_foreseen_seconds": [round(float(seconds.min()), 2), round(float(seconds.max()), 2)],
                "gflop_per_second": round(float(table["rate"].iloc[0]) / 1e9, 1),
                "max_abs_diff": float(table["max_abs_diff"].max()),
                "n": len(table),
                "seed": options.seed,
                "unit": "CPU seconds, one thread, least of the rounds; bytes of tensors alive at once",
                "figure": options.out.name,
            },
            ensure_ascii=False,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
