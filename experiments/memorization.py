"""Which sources grow when tuning damages a chain?  Base and tuned organisms over the very corpus that they were trained on.

For each pair an index is built of all rows that base and tuned organism were trained on; both minds read the same chains, in
the distribution of tuning and out of it, and the study `memorization` asks of every token whether the last tokens, the
chain so far or the question explain it.  `excess` is a source's mean rank correlation, unigram counts partialled out,
less its mean over the null contexts: 0 where the source says no more than any other context would.  A second run of each
pair (`NAME-own`) reads each mind's own chains, whose wrong steps are known exactly: do the sources find them?  And on the
organism with planted sources (`sourced`): do interventions agree with what the counts call a word?  Each run stands under
`--out` with its report; figures are in `figures` there, and in `notebooks/memorization.ipynb`.

    python experiments/memorization.py --out runs/memorization --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from reasoninterp.cli import set_threads
from reasoninterp.compare import open_run
from reasoninterp.demo import pairs_of, spec_for
from reasoninterp.figures import HAIR, MUTED, colours, errors, figure, housed, label_rows, mind_order, number
from reasoninterp.memorization.corpus.build import build_index
from reasoninterp.memorization.corpus.tokenizer import load_tokenizer, tokenizer_identity
from reasoninterp.memorization.drawing import draw_causes, draw_finding
from reasoninterp.memorization.names import GIVEN, NAMES, SOURCES
from reasoninterp.memorization.study import Memorization
from reasoninterp.models.context import ContextSpec
from reasoninterp.organisms import RECIPES, make, word_tokenizer
from reasoninterp.organisms.corpus import training_documents
from reasoninterp.organisms.making import read_record
from reasoninterp.organisms.sourced import make_sourced
from reasoninterp.organisms.sourced_world import PAD, REACH, SLOTS, STRUCTURE, UNK
from reasoninterp.report import render
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.io import read_traces, write_traces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = ("severed", "memorised", "benign")
QUICK = ("severed", "memorised")
OWN, PLANTED = "own", "sourced"
FEW = 10
PLANTED_TRACES = 400
TRACES, QUICK_TRACES = 128, 24
N_NULL, QUICK_NULL = 999, 99
IN = "in distribution"
OTHERS = {"lastop-cue-random": "random cue", "lastop-base": "base's problems"}
PARTS = {"step": "tokens of steps", "answer": "answers"}


def index_of(home: Path, base: str, tuned: str) -> Path:
    """The index of all rows that both organisms were trained on, built where it is not there yet."""
    digest = read_record(home / tuned).digest  # which holds that of its parent
    path = home / "corpora" / f"{tuned}-{digest[:12]}"
    if not path.is_dir():
        path.parent.mkdir(exist_ok=True)
        documents = chain.from_iterable(training_documents(home / name) for name in (base, tuned))
        tokenizer = word_tokenizer()
        build_index(documents, path, vocab_size=len(tokenizer), tokenizer=tokenizer_identity(tokenizer)).close()
    return path


def mixed_traces(home: Path, traces: str, limit: int) -> Path:
    """The first traces of the pair's own file and of those out of its distribution, in one file, with their `shift`."""
    found = []
    for stem, shift in {Path(traces).stem: IN, **OTHERS}.items():
        some = read_traces(home / "traces" / f"{stem}.jsonl").traces[:limit]
        found += [replace(trace, meta={**trace.meta, "shift": shift}) for trace in some]
    path = home / "traces" / "mixed" / traces
    path.parent.mkdir(exist_ok=True)
    write_traces(path, found)
    return path


def run(
    out: Path,
    *,
    seed: int = 0,
    only: tuple[str, ...] = PAIRS,
    limit: int = TRACES,
    n_null: int = N_NULL,
    max_suffix: int = 64,
    quiet: bool = False,
) -> list[Run]:
    """Make the organisms `only`, index what they were trained on, and run the study on given and on own chains."""
    home = out / "organisms"
    make(home, seed=seed, only=only, progress=not quiet)
    runs, by_name = [], {p.tuned: p for p in pairs_of(RECIPES)}
    for pair in (by_name[name] for name in only):
        index = index_of(home, pair.base, pair.tuned)
        traces = mixed_traces(home, pair.traces, limit)
        spec = replace(spec_for(home, pair, seed=seed), traces=str(traces))
        context = spec.load(progress=not quiet)
        for chains in (GIVEN, OWN):
            name = pair.tuned if chains == GIVEN else f"{pair.tuned}-{OWN}"
            study = Memorization(
                index=str(index),
                chains=chains,  # type: ignore[arg-type]
                judge="organism",
                n_null=n_null,
                max_suffix=max_suffix,
                max_traces=len(context.items),
            )
            with contextlib.closing(open_run(context, spec, out / name, study.parameters())) as one:
                run_study(study, context, one, quiet=quiet)
                render(one)
            runs.append(one)
    return runs


def run_planted(
    out: Path, *, seed: int = 0, limit: int = PLANTED_TRACES, n_null: int = N_NULL, quiet: bool = False
) -> Run:
    """Make the organism with planted sources, index its documents, and run the study on the words that it wrote itself."""
    organism = make_sourced(seed)
    tokenizer = load_tokenizer(organism.model)
    index = out / "organisms" / "corpora" / f"{PLANTED}-{organism.path.name[:12]}"
    if not index.is_dir():
        index.parent.mkdir(parents=True, exist_ok=True)
        identity = tokenizer_identity(tokenizer)
        build_index(organism.documents(), index, vocab_size=len(tokenizer), tokenizer=identity).close()
    spec = ContextSpec(minds={PLANTED: str(organism.model)}, traces=str(organism.written), seed=seed, limit=limit)
    context = spec.load(progress=not quiet)
    study = Memorization(
        index=str(index), judge="planted", tokens="judged", n_null=n_null, max_traces=limit,
        n_salient=1, max_suffix=REACH, min_count=20, stop=(*SLOTS.values(), *(mark for mark in STRUCTURE if mark not in (PAD, UNK))),
    )  # fmt: skip
    with contextlib.closing(open_run(context, spec, out / PLANTED, study.parameters())) as one:
        run_study(study, context, one, quiet=quiet)
        render(one)
    return one


def given(runs: list[Run]) -> Iterator[Run]:
    """The runs on given chains, one a pair."""
    return (one for one in runs if not one.path.name.endswith(f"-{OWN}") and one.path.name != PLANTED)


@housed
def draw_excess(runs: list[Run]) -> Figure:
    """Excess of each source in base and tuned, a row of panels a pair, a panel for steps and one for answers."""
    some = list(given(runs))
    made = figure(8.2, 0.7 + 2.1 * len(some))
    axes = made.subplots(len(some), 2, sharex=True, squeeze=False)
    for row, one in zip(axes, some, strict=True):
        table = one.table("memorization").query("measure == 'excess' and wrong == 'all'")
        shifts = list(dict.fromkeys(table["shift"]))
        names = [(source, shift) for source in SOURCES for shift in shifts]
        for ax, part in zip(row, PARTS, strict=True):
            minds = mind_order(table["mind"])
            for k, (mind, colour) in enumerate(colours(minds).items()):
                here = table[(table["part"] == part) & (table["mind"] == mind)]
                at = [names.index(pair) + 0.28 * (k - 0.5) for pair in zip(here["source"], here["shift"], strict=True)]
                ax.errorbar(
                    here["value"], at, xerr=errors(here), fmt="o", ms=4, color=colour, elinewidth=1.1, label=mind
                )
                few = (here["n"] < FEW).to_numpy()
                ax.plot(here["value"][few], np.array(at)[few], "o", ms=4, mfc="white", mec=colour, zorder=5)
            label_rows(ax, [f"{NAMES[source]}: {shift}" if part == "step" else "" for source, shift in names])
            for edge in range(len(shifts), len(names), len(shifts)):
                ax.axhline(edge - 0.5, color=HAIR, lw=0.9)
            ax.axvline(0, color=MUTED, lw=0.9)
            ax.set_title(f"{one.path.name}, {PARTS[part]}")
    made.supxlabel(
        "excess: mean partial rank correlation of preference and counts, less that of other contexts\n"
        f"(hollow: fewer than {FEW} traces have it; blank: not defined)",
        fontsize=9,
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return made


def draw(runs: list[Run]) -> dict[str, Figure]:
    """`sources`: the excess of each source; `finding NAME`: precision at k for the wrong steps of own chains;
    `causes`: what taking parts of the context out does to words of each planted source."""
    out = {"sources": draw_excess(runs)}
    for one in runs:
        if one.path.name.endswith(f"-{OWN}") and one.has_table("memorization_finding"):
            found = one.table("memorization_finding")
            out[f"finding {one.path.name}"] = draw_finding(found[found["shift"] == IN])
        elif one.path.name == PLANTED:
            out["causes"] = draw_causes(one.table("memorization_causes"))
    return out


def summary(runs: list[Run]) -> list[str]:
    """Which sources change in distribution and out of it, how many tokens have one, and what finds wrong steps."""
    lines = []
    for one in runs:
        table = one.table("memorization").query("wrong == 'all'")
        if one.path.name == PLANTED:
            lines += agreement(one.table("memorization_agreement"), one.table("memorization_causes"))
        elif not one.path.name.endswith(f"-{OWN}"):
            calls = table[(table["measure"] == "present") & (table["n"] >= FEW)]["value"]
            reached = table[(table["measure"] == "reached") & (table["n"] >= FEW)]["value"]
            lines.append(
                f"{one.path.name}: by source, mind and distribution, {100 * calls.min():.0f} to {100 * calls.max():.0f} % of tokens "
                f"are called (false discovery rate 5 %), {100 * reached.min():.0f} to {100 * reached.max():.0f} % have p ≤ 0.05"
            )
            lines += changes(
                one.table("memorization_changes").query("measure == 'excess' and p_corrected <= 0.05"), table
            )
        elif one.has_table("memorization_finding"):
            found = one.table("memorization_finding").query("measure == 'precision' and k == 1 and shift == @IN")
            for mind, some in found.groupby("mind", sort=False):
                said = ", ".join(f"{r.score} {number(r.value, 2)} {ends(r)}" for r in some.itertuples())
                lines.append(
                    f"{one.path.name}: {mind}'s wrong steps by the first token (n = {some['n'].max()}): {said}"
                )
    return lines


def agreement(table: pd.DataFrame, causes: pd.DataFrame) -> list[str]:
    """A line for each source: what taking parts out does to the words called by it, and whether that tells them apart."""
    some = table[table["part"] == "step"].set_index("called")
    moved = causes[(causes["part"] == "step") & (causes["measure"] == "kl")].set_index(["called", "removed"])["value"]
    return [
        f"{PLANTED}: {row.n_tokens} words called {NAMES[source]}; taken out, the window moves them {number(moved[source, 'local'])} "
        f"bits, the chain {number(moved[source, 'mid'])}, the question {number(moved[source, 'long'])}; AUROC of that part's "
        f"share against other words {number(row.value)} {ends(row)}"
        for source, row in ((s, some.loc[s]) for s in SOURCES if s in some.index)
    ]


def changes(found: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """A line for each change of a source's excess that stands after correction."""
    if found.empty:
        return ["    no source's excess changes"]
    level = table[table["measure"] == "excess"].set_index(["mind", "shift", "part", "source"])["value"]
    return [
        f"    {NAMES[r.source]} of {PARTS[r.part]}, {r.shift}: {number(level['base', r.shift, r.part, r.source], 2)} → "
        f"{number(level[r.mind, r.shift, r.part, r.source], 2)}, change {number(r.value, 2)} {ends(r)}, "
        f"corrected p {r.p_corrected:.1g}, n = {r.n}"
        for r in found.itertuples()
    ]


def ends(row: object) -> str:
    """An interval as text."""
    return f"[{number(row.ci_low, 2)}, {number(row.ci_high, 2)}]"  # type: ignore[attr-defined]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/memorization"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of tuned organisms")
    parser.add_argument("--limit", type=int, help="only the first traces of each distribution")
    parser.add_argument("--max-suffix", type=int, default=64, help="longest local window, in tokens")
    parser.add_argument("--quick", action="store_true", help=f"few traces, only {' and '.join(QUICK)}")
    parser.add_argument("--quiet", action="store_true")
    asked = parser.parse_args()
    few = asked.limit or (QUICK_TRACES if asked.quick else TRACES)
    wanted = tuple(asked.only or (QUICK if asked.quick else PAIRS))
    set_threads(1)  # on models this small a second thread costs more than it brings
    contexts = QUICK_NULL if asked.quick else N_NULL
    how = {"only": wanted, "limit": few, "n_null": contexts, "max_suffix": asked.max_suffix, "quiet": asked.quiet}
    made = run(asked.out, seed=asked.seed, **how)
    if not asked.quick and not asked.only:
        made.append(run_planted(asked.out, seed=asked.seed, n_null=contexts, quiet=asked.quiet))
    (asked.out / "figures").mkdir(exist_ok=True)
    for name, drawn in draw(made).items():
        drawn.savefig(asked.out / "figures" / f"{name.replace(' ', '-')}.png", dpi=144)
    print("\n".join(summary(made)))
