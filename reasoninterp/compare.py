"""The main job: two minds, one file of traces, every study in order, a verdict, a report.

1. Load the context (traces, contrasts, minds) and open the run's directory.
2. Run the studies of `BEHAVIOUR`.  Where the base turns out not to be interpretable on these traces, the studies of
   `INTERNALS` are left out (unless everything is asked for): nothing they say could be read, and they take the time.
   What stands in the run already is not measured again.
3. Decide the verdict from the tables, repeat its deciding test under a second prompt form if one is asked for, pick an
   example, write all of it to `run.json`, and render the report from the tables alone.

This room stands between the command line and the studies; it holds no measurement of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from reasoninterp.errors import UserError
from reasoninterp.executors import Executor, ProcessExecutor
from reasoninterp.models.context import Context, ContextSpec, Item
from reasoninterp.patching.budget import plan_study
from reasoninterp.running import Result, run_study
from reasoninterp.runs import Run
from reasoninterp.severance.verdict import NOT_INTERPRETABLE, Verdict, decide
from reasoninterp.studies import study_named
from reasoninterp.study import Study

BEHAVIOUR = ("samples", "readings", "regenerated", "cross", "behaviour", "effect")
INTERNALS = ("residual", "heads", "ledger", "grafts", "graft-sets")
PIPELINE = BEHAVIOUR + INTERNALS
PLAN_TRACES = 20


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def open_run(context: Context, spec: ContextSpec, out: str | Path, arguments: dict[str, Any] | None = None) -> Run:
    """The run's directory for a context; refused if it belongs to other weights, traces, seed or ways of reading."""
    identity = {f"weights of {name}": digest for name, digest in context.minds.hashes.items()}
    identity["traces"] = file_digest(spec.traces)
    for name in ("seed", "dtype", "prompt", "contrast", "extractor", "max_new_tokens"):
        identity[name.replace("_", "-")] = str(getattr(spec, name))
    run = Run.open(out, identity, {**spec.to_json(), **(arguments or {})})
    context.run = run
    minds = {
        name: {"source": spec.minds[name], "gap_to_plain_model": gap} for name, gap in context.minds.probe_gap.items()
    }
    about = {
        "n_params": context.minds.n_params,
        "notes": list(context.minds.notes),
        "memory": str(context.minds.plan()),
    }
    run.record(traces=describe_traces(context), minds={**minds, **about})
    return run


def describe_traces(context: Context) -> dict[str, Any]:
    """Counts of traces, steps, contrasts, and refusals by reason."""
    made = [i.contrast for i in context.items if i.contrast is not None]
    return {
        "n": len(context.items),
        "n_steps": sum(len(i.trace.steps) for i in context.items),
        "n_contrasts": len(made),
        "n_aligned": sum(c.aligned for c in made),
        "n_swaps": sum(i.swap is not None for i in context.items),
        "refused": dict(Counter(r.reason for r in context.refused).most_common()),
    }


def in_order(study: Study) -> list[Study]:
    """The studies that a study needs, each after those it needs itself, and then the study.

    Raises:
        UserError: studies that need each other in a circle.
    """
    out: dict[str, Study] = {}

    def visit(one: Study, above: tuple[str, ...]) -> None:
        if one.name in above:
            raise UserError(f"study {one.name}: it needs itself, by way of {' → '.join(above)}.")
        for name in one.needs:
            visit(study_named(name)(), (*above, one.name))
        out.setdefault(one.name, one)

    visit(study, ())
    return list(out.values())


def run_with_needs(
    study: Study, context: Context, run: Run, *, quiet: bool = False, executor: Executor | None = None
) -> Result:
    """Run the studies that a study needs, then the study; what stands in the run is not measured again."""
    *needed, _ = in_order(study)
    for one in needed:
        run_study(one, context, run, quiet=quiet, executor=executor, figures=False)
    return run_study(study, context, run, quiet=quiet, executor=executor)


def compare(
    spec: ContextSpec,
    out: str | Path,
    *,
    quiet: bool = False,
    second_prompt: str | None = None,
    workers: int = 1,
    everything: bool = False,
    siblings: Sequence[Run] = (),
    arguments: dict[str, Any] | None = None,
) -> Run:
    """Compare a base and a tuned mind and write the report.

    Args:
        spec: the minds (named `base` and `tuned`), the traces and how they are read.
        out: the run's directory; the same call takes an unfinished run up again.
        quiet: no progress bars.
        workers: processes that measure, each with a body of its own.
        second_prompt: repeat the deciding test under this prompt form (`fewshot` or `chat`).
        everything: run the studies of the internals also where the base is not interpretable.
        siblings: other pairs to show beside this one in the report.
        arguments: further arguments to record.

    Returns:
        The run, closed.

    Raises:
        UserError: anything wrong with the input.
    """
    from reasoninterp.report import render

    began = time.perf_counter()
    if second_prompt == spec.prompt:
        raise UserError(f"--second-prompt {second_prompt}: the same as --prompt; give another form.")
    context = spec.load(progress=not quiet)
    # Loaded before anything is measured: a prompt form that cannot be had is told at once.
    second = dataclasses.replace(spec, prompt=second_prompt) if second_prompt else None
    other = second.load(minds=context.minds) if second else None
    run = open_run(context, spec, out, arguments)
    executor = workers_of(spec, workers)
    with contextlib.closing(run):
        for name in BEHAVIOUR:
            run_study(study_named(name)(), context, run, quiet=quiet, executor=executor, figures=False)
        verdict = decide(verdict_tables(run))
        if everything or verdict.word != NOT_INTERPRETABLE:
            for name in INTERNALS:
                run_study(study_named(name)(), context, run, quiet=quiet, executor=executor, figures=False)
            verdict = decide(verdict_tables(run))
        else:
            note = (
                "Maps, ledger and grafts were not run, since nothing they say could be read (--everything runs them)."
            )
            verdict = dataclasses.replace(verdict, caveats=(*verdict.caveats, note))
        verdict = _repeat(verdict, second, other, run, quiet)
        run.record(verdict=verdict.to_json(), example=example(context, run))
        run.record(timings={"compare": {"seconds": round(time.perf_counter() - began, 2)}})
        render(run, siblings=siblings)
    return run


def workers_of(spec: ContextSpec, workers: int) -> Executor | None:
    """Several processes that each load the context by themselves, or None for this process."""
    return ProcessExecutor(workers, spec.load) if workers > 1 else None


def verdict_tables(run: Run) -> dict[str, pd.DataFrame]:
    """The tables that a verdict reads."""
    names = ("behaviour", "gate", "readings", "effect", "ledger", "ledger_total", "grafts", "graft_sets")
    return {name: run.table(name) for name in names if run.has_table(name)}


def _repeat(verdict: Verdict, again: ContextSpec | None, other: Context | None, run: Run, quiet: bool) -> Verdict:
    """Add what the deciding test says under a second prompt form, or that it was not repeated."""
    if again is None or other is None:
        note = "The verdict was not repeated under a second prompt form (--second-prompt)."
        return dataclasses.replace(verdict, caveats=(*verdict.caveats, note))
    inner = open_run(other, again, run.path / "second-prompt")
    with contextlib.closing(inner):
        for name in BEHAVIOUR:
            run_study(study_named(name)(), other, inner, quiet=quiet, figures=False)
        second = decide(verdict_tables(inner))
        run.save_table("second_prompt", inner.table("behaviour").assign(prompt=again.prompt))
    agrees = "the same word" if second.word == verdict.word else f"another word, '{second.word}'"
    note = f"Under a second prompt form ({again.prompt}) the deciding test gives {agrees}: {second.sentences[0]}"
    return dataclasses.replace(verdict, caveats=(*verdict.caveats, note))


def example(context: Context, run: Run) -> dict[str, Any]:
    """A trace to look at: one whose swap the minds read differently, if there is one."""
    readings = run.table("readings")
    swap = readings[readings["test"] == "swap"].assign(follows=lambda d: pd.to_numeric(d["follows"]))
    wide = swap.pivot(index="trace", columns="mind", values="follows")
    differs = wide.index[wide.nunique(axis=1) > 1] if len(wide) else []
    by_id = {i.id: i for i in context.items}
    item: Item = by_id[differs[0]] if len(differs) else context.items[0]
    contrast = item.swap or item.contrast
    here = readings[readings["trace"] == item.id]
    samples = run.table("samples")
    return {
        "id": item.id,
        "question": item.trace.question,
        "steps": list(item.trace.steps),
        "answer": item.trace.answer,
        "corrupt_steps": list(contrast.corrupt.steps) if contrast else [],
        "corrupt_answer": contrast.corrupt.answer if contrast else None,
        "readings": [
            {"mind": r["mind"], "chain": "clean" if r["test"] == "clean" else "swapped", "answer": _text(r["answer"])}
            for r in here[here["test"].isin(["clean", "swap"])].to_dict("records")
        ],
        "samples": [
            {"mind": r["mind"], "steps": list(r["steps"]), "answer": _text(r["answer"])}
            for r in samples[samples["trace"] == item.id].to_dict("records")
        ],
    }


def _text(value: Any) -> str | None:
    """A cell of text; a table holds NaN where there was none."""
    return None if pd.isna(value) else str(value)


def plan(spec: ContextSpec, *, quiet: bool = False) -> list[str]:
    """Do twenty traces in a directory that is thrown away; say refusals, memory and the time to come, line by line."""
    whole = spec.load(progress=not quiet)
    about = describe_traces(whole)
    few = dataclasses.replace(spec, limit=min(PLAN_TRACES, len(whole.items))).load(minds=whole.minds)
    lines = [
        f"traces       {about['n']} with {about['n_steps']} steps; {about['n_contrasts']} contrasts "
        f"({about['n_aligned']} aligned), {about['n_swaps']} swaps",
        *(f"refused      {count} × {reason}" for reason, count in about["refused"].items()),
        f"memory       {whole.minds.plan()}; {whole.rows} rows in a forward pass",
        *(f"sweep        {line}" for name in INTERNALS for line in sweep_lines(whole, study_named(name)())),
    ]
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(few, spec, Path(folder) / "plan")
        with contextlib.closing(run):
            for name in PIPELINE if about["n_contrasts"] else BEHAVIOUR:
                study = study_named(name)()
                result = run_study(study, few, run, quiet=quiet, figures=False)
                scale = len(whole.items) / max(1, len(few.items))
                total += result.seconds * scale
                lines.append(f"time         {name:<12} about {result.seconds * scale:7.1f} s")
    lines.append(f"time         in all       about {total:7.1f} s, measured on {len(few.items)} traces")
    return lines


def sweep_lines(context: Context, study: Study) -> list[str]:
    """What a study that sweeps will take, line by line; none for others."""
    found = plan_study(context, study)
    return [] if found is None else [f"{study.name:<12} {line}" for line in found.describe()]


def summary(runs: Sequence[Run], report: Path) -> list[str]:
    """At most fifteen lines on one or several pairs."""
    lines = []
    for run in runs:
        tables = verdict_tables(run)
        b, verdict = tables["behaviour"], run.manifest["verdict"]

        def value(mind: str, test: str, b: pd.DataFrame = b) -> str:
            row = b[(b["mind"] == mind) & (b["test"] == test)]
            return f"{100 * row['value'].iloc[0]:.0f}" if len(row) else "—"

        lines.append(
            f"{run.path.name:<12} {verdict['word']:<22} accuracy {value('base', 'accuracy_own_chain'):>3} → "
            f"{value('tuned', 'accuracy_own_chain'):>3} %   follow rate {value('base', 'swap_follow'):>3} → "
            f"{value('tuned', 'swap_follow'):>3} %"
        )
        if "ledger_total" in tables and len(tables["ledger_total"]) and run is runs[0]:
            t = tables["ledger_total"].iloc[0]
            blocks = tables["ledger"][tables["ledger"]["level"] == "block"].sort_values("attribution")
            lines.append(
                f"             E {t['e_base']:.1f} → {t['e_tuned']:.1f} nats; residual of the ledger {t['residual_relative']:.2%}"
            )
            grafts = tables["grafts"].set_index("unit") if "grafts" in tables else pd.DataFrame()
            for unit, entry in list(zip(blocks["unit"], blocks["attribution"], strict=True))[:3]:
                g = grafts.loc[unit] if unit in grafts.index else None
                proof = f"  restore {_share(g['restore'])}  cut {_share(g['cut'])}" if g is not None else ""
                lines.append(f"             {unit:<10} {entry:+6.1f} nats{proof}")
            if "graft_sets" in tables and len(tables["graft_sets"]):
                lines.append(f"             {_sets_line(tables['graft_sets'])}")
    return [*lines[:14], f"report       {report}"]


def _sets_line(sets: pd.DataFrame) -> str:
    """What the three leading Units return together, beside as many at random."""
    size = min(3, int(sets["size"].max()))
    by = sets[sets["size"] == size].set_index("chosen")
    led, drawn = by.loc["ledger"], by.loc["random"]
    return (
        f"these {size} together: restore {_share(led['restore'])}  cut {_share(led['cut'])}   "
        f"({size} at random: {_share(drawn['restore'])}  {_share(drawn['cut'])})"
    )


def _share(value: float) -> str:
    """A share of the loss; a dash where the loss may stand in no denominator."""
    return "—" if pd.isna(value) else f"{value:.2f}"
