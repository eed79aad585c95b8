"""Exact patching of the residual stream, cell by cell: this kit beside others, and beside what cannot be avoided.

    python experiments/benchmarks/sweep.py [--quick] [--family gpt2|llama] [--device cpu] [--seed 0] [--out DIRECTORY]

1. Random networks of three sizes and aligned contrasts whose runs part at 0, a quarter, a half or nine tenths of the
   prompt (`fixtures`).  Cells are `resid_pre` at every layer × every token, or every step (and the question);
   denoising, logit difference at the last position, one value an example.  Where all tokens would take too long, one
   random token of each of so many equal stretches of the prompt stands for them (`n_spans` < positions): then every
   number, the floor's too, is of these.
2. In one process and on the same weights: `sweep` of this kit does the whole job, from contrasts to its table.  The
   others (`kits`) take one forward pass a cell wherever it lies, so they are timed on a random sample of `n_timed`
   cells, and their `seconds` are extrapolated: clean run + seconds a cell × cells.  Rounds are interleaved, and the
   least of each counts.  Seconds are the process's CPU time on one thread (on CUDA, wall time between synchronisations).
3. `speedup`: seconds of the fastest other kit over this kit's.  Cells before the place where the runs part are 0 for
   everyone, and only this kit knows it; `speedup_live` charges the others for no such cell.
4. `floor_ratio`: seconds that the floor's operations (`floor`) take at the rate of Hugging Face's plain forward pass
   (sdpa, logits at the last position) on the same batch, over this kit's seconds.  1 is that pass's own efficiency, not
   a bound: its GPT-2 computes the activation in several passes over memory, Llama does not.  `tight_ratio`: the same
   with the tighter count.
5. `max_abs_diff`: largest difference of any value from any other kit's, on the sampled cells (all but one of which
   have an effect), beside the largest value, `largest`.

With `--out`, the table as `sweep.csv` and `sweep.parquet`, and the figure `sweep.png`.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import pandas as pd
import torch
from fixtures import FAMILIES, Size, context_of, parting, save_model
from floor import Cell, costs, forward_flops, has_effect, sweep_flops
from kits import HuggingFaceHooks, Job, Kit, kits_of, versions
from torch import Tensor

from reasoninterp.figures import INK, MIND_COLOURS, MORE_COLOURS, figure, housed
from reasoninterp.models.context import Context
from reasoninterp.patching.cells import Sites
from reasoninterp.patching.columns import Column, columns
from reasoninterp.patching.sweep import sweep
from reasoninterp.traces.trace import Span, TokenTrace

SMALL, MIDDLE, LARGE = Size(4, 128, 4, 128, 64), Size(6, 256, 8, 256, 8), Size(12, 768, 12, 512, 2)
TOKENS, STEPS = "tokens", "steps"
MARKERS = "osD^vPX"


class Case(NamedTuple):
    """One row of the table.  `n_spans`: of how many equal stretches one token each is swept; None: every token."""

    size: Size
    spans: str
    parts_at: float
    n_spans: int | None = None
    rounds: int = 3
    n_timed: int = 6
    family: str = "gpt2"


QUICK = [
    Case(size, spans, at, n if spans == TOKENS else None, rounds=rounds, n_timed=2)
    for size, n, rounds in ((SMALL, 32, 2), (MIDDLE, 32, 1))
    for spans, at in ((TOKENS, 0.5), (STEPS, 0.9))
]
FULL = [Case(SMALL, spans, at) for spans in (TOKENS, STEPS) for at in (0, 0.25, 0.5, 0.9)]
FULL += [Case(MIDDLE, TOKENS, at, n, 2) for at, n in ((0, 64), (0.25, 64), (0.5, None), (0.9, None))]
FULL += [Case(MIDDLE, STEPS, at, None, 2) for at in (0, 0.25, 0.5, 0.9)]
FULL += [Case(LARGE, TOKENS, at, n, k, 3) for at, n, k in ((0, 8, 1), (0.25, 12, 1), (0.5, 24, 2), (0.9, 128, 2))]
FULL += [Case(LARGE, STEPS, at, None, k, 3) for at, k in ((0, 1), (0.25, 1), (0.5, 2), (0.9, 2))]


def spans_of(case: Case, tokens: TokenTrace, seed: int) -> list[Span]:
    """The spans that are patched in every contrast of a case."""
    if case.spans == STEPS:
        return [c.span for c in columns(tokens) if len(c.span)]
    length, n = case.size.length, case.n_spans or case.size.length
    rng = random.Random(f"{seed} {case}")
    places = [rng.randrange(k * length // n, (k + 1) * length // n) for k in range(n)]
    return [Span(p, p + 1) for p in places]


class Clock:
    """Seconds of a call: the process's CPU time, or on CUDA the wall time until the device is done."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def now(self) -> float:
        """The clock's reading."""
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and what the call returned."""
        began = self.now()
        found = run()
        return self.now() - began, found


def job_of(context: Context, network: Any, bridge: Any) -> Job:
    """The job of a context's contrasts, for the other kits."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    answers = []
    for item in context.items:
        assert item.contrast is not None
        encoded = [context.encode(trace) for trace in (item.contrast.clean, item.contrast.corrupt)]
        for side, trace in zip(sides, encoded, strict=True):
            side.append(trace.prompt_ids)
        answers.append([trace.answer_ids[0] for trace in encoded])
        assert answers[-1][0] != answers[-1][1]
    device = network.device
    clean, corrupt = (torch.tensor(side, device=device) for side in sides)
    return Job(network, bridge, clean, corrupt, torch.tensor(answers, device=device))


def ours(context: Context, spans: Sequence[Span]) -> pd.DataFrame:
    """This kit's sweep of every layer."""
    named = [Column(f"span {k}", k, span) for k, span in enumerate(spans)]
    contrasts = [item.contrast for item in context.items if item.contrast is not None]
    return sweep(context, contrasts, Sites(("resid_pre",), spans=lambda _: named), directions=("denoising",))


def values_of(table: pd.DataFrame, n_layers: int, n_spans: int) -> np.ndarray:
    """[layer, span, example] from this kit's table."""
    ordered = table.sort_values(["layer", "column_index", "contrast"])
    return ordered["value"].to_numpy().reshape(n_layers, n_spans, -1)


class Timings(NamedTuple):
    """Least seconds: of this kit's job, of a plain forward pass, and of the other kits once and for each cell."""

    ours: float
    forward: float
    once: dict[str, float]
    each: dict[str, float]


def sample_cells(cells: Sequence[Cell], parts: int, n: int, rng: random.Random) -> list[Cell]:
    """`n` random cells: all but one with an effect, and one without where there is any."""
    live = [c for c in cells if has_effect(c, parts)]
    dead = [c for c in cells if not has_effect(c, parts)]
    return rng.sample(live, min(len(live), n - bool(dead))) + dead[: bool(dead)]


def measure(case: Case, context: Context, job: Job, kits: Sequence[Kit], clock: Clock, seed: int) -> dict[str, Any]:
    """One row of the table."""
    size, parts = case.size, parting(case.size, case.parts_at)
    first = context.items[0].contrast
    assert first is not None
    spans = spans_of(case, context.encode(first.clean), seed)
    cells = [Cell(layer, span) for layer in range(size.n_layers) for span in spans]
    timed = sample_cells(cells, parts, case.n_timed, random.Random(seed))
    plain = HuggingFaceHooks(job)
    ours(context, [Span(size.length - 1, size.length)])  # the first pass pays for much that is done once
    plain.forward(job.corrupt)
    once = {kit.name: clock.time(kit.prepare)[0] for kit in kits}
    for kit in kits:
        kit.run(timed[:1])
    mine: list[float] = []
    forward: list[float] = []
    each: dict[str, list[float]] = {kit.name: [] for kit in kits}
    margins: dict[str, Tensor] = {}
    for _ in range(case.rounds):
        seconds, table = clock.time(partial(ours, context, spans))
        mine.append(seconds)
        for kit in kits:
            forward.append(clock.time(partial(plain.forward, job.corrupt))[0])
            seconds, margins[kit.name] = clock.time(partial(kit.run, timed))
            each[kit.name].append(seconds / len(timed))
    timings = Timings(min(mine), min(forward), once, {name: min(x) for name, x in each.items()})
    values = values_of(table, size.n_layers, len(spans))
    unmoved = [not has_effect(c, parts) for c in cells]
    if np.abs(values.reshape(len(cells), -1)[unmoved]).max(initial=0.0) > 0:
        raise RuntimeError(f"{case}: a cell before the runs part has an effect")
    at = [cells.index(c) for c in timed]
    compared = compare(values.reshape(len(cells), -1)[at], plain.forward(job.corrupt).cpu(), margins)
    return row_of(case, len(spans), cells, timings, compared)


def compare(values: np.ndarray, corrupt: Tensor, margins: dict[str, Tensor]) -> dict[str, Any]:
    """Values of some cells [cell, example] against the other kits'."""
    worst = {
        f"diff_{n}": float(np.abs(values - (corrupt - m.cpu()).double().numpy()).max()) for n, m in margins.items()
    }
    moved = np.abs(values).max(1)
    if (moved[:-1] == 0).any():  # the last may be one that has no effect
        raise RuntimeError("a cell that is compared should have an effect, and has none: nothing would be compared")
    return {**worst, "max_abs_diff": max(worst.values()), "largest": float(moved.max()), "n_compared": values.size}


def row_of(case: Case, n_spans: int, cells: Sequence[Cell], t: Timings, compared: dict[str, Any]) -> dict[str, Any]:
    """Ratios of what was measured."""
    size, parts = case.size, parting(case.size, case.parts_at)
    c = costs(size, case.family)
    live = sum(has_effect(cell, parts) for cell in cells)
    rate = size.batch * forward_flops(c, size.n_layers, size.length) / t.forward
    job = {name: t.once[name] + t.each[name] * len(cells) for name in t.each}
    job_live = {name: t.once[name] + t.each[name] * live for name in t.each}
    fastest = min(job, key=lambda name: job[name])
    floors = [size.batch * sweep_flops(c, size, cells, parts, tight=tight) / rate for tight in (False, True)]
    return {
        "size": size.label, "batch": size.batch, "family": case.family, "spans": case.spans, "parts_at": case.parts_at,
        "n_spans": n_spans, "n_cells": len(cells), "n_live": live, "n_timed": case.n_timed, "rounds": case.rounds,
        "seconds_ours": t.ours, **{f"seconds_{name}": s for name, s in job.items()},
        **{f"per_cell_{name}": s for name, s in t.each.items()}, "seconds_forward": t.forward, "gflops": rate / 1e9,
        "fastest": fastest, "speedup": job[fastest] / t.ours, "speedup_live": min(job_live.values()) / t.ours,
        "floor_ratio": floors[0] / t.ours, "tight_ratio": floors[1] / t.ours, **compared,
    }  # fmt: skip


def measure_all(cases: Sequence[Case], device: str, seed: int) -> pd.DataFrame:
    """The whole table; one network a size."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    clock, rows = Clock(device), []
    for size in dict.fromkeys(case.size for case in cases):
        mine = [case for case in cases if case.size == size]
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), size, mine[0].family, seed)
            network = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
            network = network.eval().to(device)
            for case in mine:
                context = context_of(Path(folder), size, case.parts_at, seed=seed, device=device)
                with context.open("base") as body:
                    job = job_of(context, network, body._bridge)
                    rows.append(measure(case, context, job, kits_of(job), clock, seed))
                print(shown(rows[-1]), flush=True)
    return pd.DataFrame(rows)


def shown(row: dict[str, Any]) -> str:
    """A row on one line."""
    where = f"{row['size']} x {row['batch']} {row['family']}, {row['spans']}, parting at {row['parts_at']:g}"
    others = ", ".join(
        f"{k[8:]} {v:.1f}" for k, v in row.items() if k.startswith("seconds_") and k != "seconds_forward"
    )
    return (
        f"{where}: {row['n_cells']} cells ({row['n_live']} with an effect); s: {others}; "
        f"{row['speedup']:.1f} times {row['fastest']} ({row['speedup_live']:.1f} on cells with an effect); "
        f"floor {row['floor_ratio']:.2f} (tight {row['tight_ratio']:.2f}) at {row['gflops']:.0f} GFLOP/s; "
        f"largest difference {row['max_abs_diff']:.1e} of {row['largest']:.1e}"
    )


def headline(table: pd.DataFrame, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON object; a single number is that of the least favourable size."""

    def by_size(spans: str, at: float, column: str) -> dict[str, float]:
        mine = table[(table["spans"] == spans) & (table["parts_at"] == at)]
        return {str(k): round(float(v), 1) for k, v in zip(mine["size"], mine[column], strict=True)}

    where = table["size"] + ", " + table["spans"] + ", " + table["parts_at"].map("{:g}".format)
    out: dict[str, Any] = {}
    for name, spans, at in (("speedup_tokens", TOKENS, 0.5), ("speedup_steps", STEPS, 0.9)):
        found = by_size(spans, at, "speedup")
        out[name] = min(found.values())
        out[f"{name}_by_size"] = found
        out[f"{name}_live_by_size"] = by_size(spans, at, "speedup_live")
    return out | {
        "floor_ratio": round(float(table["floor_ratio"].min()), 3),
        "floor_ratio_by_row": dict(zip(where, table["floor_ratio"].round(3).tolist(), strict=True)),
        "tight_ratio_by_row": dict(zip(where, table["tight_ratio"].round(3).tolist(), strict=True)),
        "max_abs_diff": float(table["max_abs_diff"].max()),
        "least_largest_effect": float(table["largest"].min()),
        "n": int(table["n_compared"].sum()),
        "sizes": list(dict.fromkeys(table["size"])),
        "family": options.family,
        "device": options.device,
        "seed": options.seed,
        "unit": "CPU seconds, one thread, least of interleaved rounds" if options.device == "cpu" else "seconds",
        "versions": versions(),
    }


@housed
def draw(table: pd.DataFrame) -> Any:
    """Seconds by kit, and the share of the floor's rate that is reached: one panel of each for tokens and for steps."""
    names = [c.removeprefix("seconds_") for c in table if c.startswith("seconds_") and c != "seconds_forward"]
    fig = figure(11.0, 6.4)
    axes = fig.subplots(2, 2, sharey="row", sharex="col", gridspec_kw={"height_ratios": [3, 2]})
    for (above, below), spans in zip(axes.T, (TOKENS, STEPS), strict=True):
        mine = table[table["spans"] == spans]
        places = np.arange(len(mine))
        for name, marker, colour in zip(names, MARKERS, (MIND_COLOURS["base"], *MORE_COLOURS), strict=False):
            label = "this kit" if name == "ours" else name.replace("_", " ")
            kwargs = {"ms": 6, "color": colour} if name == "ours" else {"ms": 5, "mec": colour, "mfc": "none"}
            above.plot(places, mine[f"seconds_{name}"], marker, ls="none", label=label, **kwargs)
        above.set(yscale="log", title=f"{spans}: seconds for the whole job")
        above.grid(axis="y")
        below.bar(places, mine["floor_ratio"], 0.6, color=MIND_COLOURS["base"])
        below.axhline(0.7, color=INK, lw=0.8, ls="--")
        top = max(1.1, 1.05 * float(table["floor_ratio"].max()))
        below.set(title=f"{spans}: share of the floor's rate (target, dashed: 0.7)", ylim=(0, top), xticks=places)
        labels = [f"{s.split(',')[0]}, {p:g}" for s, p in zip(mine["size"], mine["parts_at"], strict=True)]
        below.set_xticklabels(labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
        below.set_xlabel("layers × width, and the share of the prompt at which the runs part")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), ncols=len(names), loc="outside upper right", fontsize=8)
    return fig


def main() -> int:
    """Measure, print each row, write the table and the figure, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two sizes, tokens parting at the half and steps at nine tenths; under a minute",
    )
    parser.add_argument("--family", choices=FAMILIES, default="gpt2")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (wall time)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIRECTORY", help="write the table and the figure there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case._replace(family=options.family) for case in (QUICK if options.quick else FULL)]
    table = measure_all(cases, options.device, options.seed)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out / "sweep.csv", index=False)
        table.to_parquet(options.out / "sweep.parquet", index=False)
        draw(table).savefig(options.out / "sweep.png", dpi=150)
    print(json.dumps(headline(table, options), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
