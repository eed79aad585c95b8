"""The command `locate`: where fine-tuning cut the steps off from the answer, in at most fifteen lines."""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from reasoninterp.errors import UserError

LEVELS = ("block", "head", "circuit", "fine", "layer")


def add_to(group: click.Group, options: Callable[[Any], Any], make_spec: Callable[[dict[str, Any]], Any]) -> None:
    """Add the command to a group.

    Args:
        group: the commands.
        options: the decorator that adds the options of everything that reads traces with two minds.
        make_spec: makes a `ContextSpec` from them.
    """

    @group.command("locate")
    @options
    @click.option("--without-rival", help="JSON Lines file of traces in which the rival (cue, question) is removed.")
    @click.option("--level", type=click.Choice(LEVELS), default="block", show_default=True, help="Of the Units.")
    @click.option(
        "--threshold",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.9,
        show_default=True,
        help="Share of the loss that a set has to return, or take away.",
    )
    @click.option(
        "--most-contrasts", type=click.IntRange(1), default=128, show_default=True, help="At most so many traces."
    )
    @click.option("--no-align", is_flag=True, help="Do not align the tuned model's gauge with the base's first.")
    @click.option("--everything", is_flag=True, help="Ledger, grafts and sets also where the verdict is 'intact'.")
    def locate(out: str | None, without_rival: str | None, **given: Any) -> None:
        """Was the path from the steps to the answer cut, in which weights, and how?"""
        spec = make_spec(given)
        if without_rival is not None and not Path(without_rival).is_file():
            raise UserError(f"--without-rival {without_rival}: no such file; give a JSON Lines file of traces.")
        for line in run_locate(spec, out, without_rival, given):
            click.echo(line)

    # One search, in which each step waits for the one before: there is nothing for a second process to do.
    locate.params = [p for p in locate.params if p.name != "workers"]


def run_locate(spec: Any, out: str | None, without_rival: str | None, given: dict[str, Any]) -> list[str]:
    """Locate, write the run's directory if one is asked for, and say what was found.

    Args:
        spec: a `ContextSpec` of the minds `base` and `tuned`.
        out: the directory, or None.
        without_rival: file of traces without the rival, or None.
        given: the command's other options.
    """
    from reasoninterp.compare import file_digest, open_run
    from reasoninterp.severance.location.locate import locate

    context = spec.load(progress=not given["quiet"])
    run = None
    if out is not None:  # before anything is measured: a directory that cannot be had is told at once
        named = {k: given[k] for k in ("level", "threshold", "most_contrasts", "no_align", "everything")}
        named["without_rival"] = without_rival
        digest = {"without rival": file_digest(without_rival)} if without_rival else {}
        run = open_run(context, spec, out, {"locate": {**named, **digest}})
    with contextlib.closing(run) if run is not None else contextlib.nullcontext():
        free = None
        if without_rival is not None:
            free = replace(spec, traces=without_rival).load(minds=context.minds).items
        found = locate(
            context,
            rival_free=free,
            level=given["level"],
            threshold=given["threshold"],
            most_contrasts=given["most_contrasts"],
            align=not given["no_align"],
            everything=given["everything"],
        )
        if run is not None:
            from reasoninterp.report import render

            save(run, found)
            render(run)
    return lines_of(found, out)


def save(run: Any, found: Any) -> None:
    """Write a location into a run's directory: tables, figure and `location.json`; of an earlier one nothing is left."""
    from reasoninterp.severance.location.figure import draw
    from reasoninterp.severance.location.location import TABLES

    (run.path / "location.json").unlink(missing_ok=True)
    for name in TABLES:
        run.drop_table(name)
    for figure in (run.path / "figures").glob("location.*"):
        figure.unlink()
    for name, table in found.tables().items():
        run.save_table(name, table)
    if len(found.ranking):
        run.save_figure(
            "location", draw(found.ranking, verdict=found.verdict, seed=run.manifest["identity"].get("seed"))
        )
    run.save_text("location.json", json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    run.record(location={"verdict": found.verdict, "sentences": list(found.sentences), "located": list(found.located)})


def lines_of(found: Any, out: str | None = None) -> list[str]:
    """A location in at most fifteen lines: the verdict, its sentences, the leading Units and what it took."""
    confidence = found.confidence
    sure = (
        f"confidence {confidence.value:.2f} ({confidence.basis})"
        if confidence.value == confidence.value
        else confidence.basis
    )
    score = f"{found.severance_score:.2f}" if found.severance_score == found.severance_score else "not known"
    lines = [f"{found.verdict.upper():<14} severance score {score}   {sure}"]
    lines += [f"  {sentence}" for sentence in found.sentences]
    if len(found.ranking):
        lines.append(f"  {'Unit':<12}{'ledger (nats)':>14}{'restore':>9}{'cut':>7}")
        for row in found.ranking.head(3).to_dict("records"):
            mark = "  located" if row["in_restoring"] or row["in_cutting"] else ""
            lines.append(f"  {row['unit']:<12}{row['ledger']:>+14.2f}{row['restore']:>9.2f}{row['cut']:>7.2f}{mark}")
    cost = found.costs
    if found.notes:
        lines.append(textwrap.shorten(f"  note: {'; '.join(found.notes)}", 400, placeholder=" …"))
    lines.append(
        f"  {cost.forward_passes} forward, {cost.backward_passes} forward and backward passes, {cost.seconds:.1f} s"
        + (f"; tables, figure and report.html in {out}" if out else "")
    )
    return lines[:15]
