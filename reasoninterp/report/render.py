"""Draw a run's figures and write its report, one HTML page that needs nothing outside itself.

1. Read what tables there are; a section whose table is missing or empty says which study was not run.
2. Draw the figures (`plots`), save them as PNG and SVG, and put the SVG into the page as data.
3. Fill the template; all text is escaped, so what stands in a trace is shown and never run.

A page that was made from the same tables, manifest and code is left as it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from reasoninterp import figures
from reasoninterp.report import content, plots, tokens, weight_plots, words
from reasoninterp.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "report.html"
DIRECTIONS = {
    "denoising": "Denoising: the clean run's state put into the run on the changed chain; how much of the effect that undoes.",
    "noising": "Noising: the changed run's state put into the run on the clean chain; how much of the effect that brings about.",
}


@dataclass(frozen=True)
class Drawn:
    """A figure in the page: its SVG as data, its width in CSS pixels, what it shows, and where its numbers are."""

    name: str
    data: str
    width: int
    alt: str
    caption: str
    table: str


def render(run: Run, siblings: Sequence[Run] = ()) -> Path:
    """Write the run's figures and `report.html`; returns the page's path.

    Args:
        run: the run; only its tables and `run.json` are read.
        siblings: other pairs to stand beside this one; their tuned minds are drawn lighter, with links to their pages.
    """
    target = run.path / NAME
    others = [s for s in siblings if s.path.resolve() != run.path.resolve()]
    key = _key([run, *others])
    if target.exists() and f'content="{key}"' in target.read_text(encoding="utf-8")[:2000]:
        return target
    tables = _tables(run)
    minds = content.minds_of(tables.get("behaviour"), tables.get("effect"), tables.get("gate"))
    minds = minds or content.minds_of(tables.get(tokens.TABLE)) or list(figures.MIND_COLOURS)
    drawn = _draw(run, tables, others)
    page = (
        _environment().get_template("template.html.jinja").render(key=key, **_page(run, tables, minds, drawn, others))
    )
    return run.save_text(NAME, page)


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("reasoninterp.report", "")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _tables(run: Run) -> dict[str, pd.DataFrame]:
    """The tables that are there and not empty."""
    found = {name: run.table(name) for name in (*words.MISSING, *words.EXTRA) if run.has_table(name)}
    return {name: table for name, table in found.items() if len(table)}


def _key(runs: Sequence[Run]) -> str:
    """Hash of all that a page depends on: tables, manifests (without times), and this package's code."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in [*sorted(p for p in here.iterdir() if p.is_file()), Path(figures.__file__)]:
        digest.update(path.read_bytes())
    for run in runs:
        kept = {k: v for k, v in run.manifest.items() if k not in {"timings", "updated", "created"}}
        digest.update(json.dumps([str(run.path), kept], sort_keys=True, default=str).encode())
        for name in (*words.MISSING, *words.EXTRA):
            if run.has_table(name):
                digest.update((run.path / "tables" / f"{name}.parquet").read_bytes())
    return digest.hexdigest()[:32]


def _draw(run: Run, tables: Mapping[str, pd.DataFrame], siblings: Sequence[Run]) -> dict[str, Drawn]:
    """Every figure that the tables allow, by name."""
    out: dict[str, Drawn] = {}

    def add(name: str, table: str, alt: str, caption: str, make: Callable[[], Figure]) -> None:
        out[name] = _embed(run, name, table, alt, caption, make())

    behaviour = tables.get("behaviour")
    if behaviour is not None:
        beside = _beside(siblings)
        more = " Small open circles: the tuned minds of the other pairs." if beside else ""
        add(
            "accuracy_follow",
            "behaviour",
            "Accuracy with the own chain against the follow rate, base and tuned",
            f"The arrow goes from base to tuned; crosses are 95 % intervals; dashed lines are chance.{more}",
            lambda: plots.accuracy_follow(behaviour, beside),
        )
        if plots.step_panels(behaviour):
            add(
                "steps",
                "behaviour",
                "Share of answers that stay or follow, over the step that was changed",
                "Solid: the answer stays the same; dashed: it follows the change. Steps are counted from the first, so later "
                "points stand on the longer chains alone.",
                lambda: plots.step_curves(behaviour),
            )
    for table, make, what in (
        ("residual", plots.residual_maps, "layer × step"),
        ("heads", plots.head_maps, "layer × head"),
    ):
        for direction in _directions(tables.get(table)):
            add(
                f"{table}_{direction}",
                table,
                f"{what} maps of base and tuned, {direction}",
                f"{DIRECTIONS.get(direction, direction + '.')} {_widest(tables[table], direction)}",
                lambda t=table, d=direction, m=make: m(tables[t], d),  # type: ignore[misc]
            )
    _draw_weights(tables, add)
    if "location" in tables and "ranking" in tables:
        from reasoninterp.severance.location.figure import draw

        add(
            "location",
            "ranking",
            "Units by ledger and grafts, the located ones in bold",
            "The most suspected first. Left: what the ledger gives each Unit of the change of E. Right: what the Unit alone "
            "returns or takes away.",
            lambda: draw(tables["ranking"], verdict=str(tables["location"].iloc[0]["verdict"])),
        )
    if "memorization" in tables and tokens.TABLE in tables:
        from reasoninterp.memorization.drawing import draw_sources

        add(
            "memorization",
            "memorization",
            "Share of tokens of which each source is the dominant one, by mind",
            f"All traces (n up to {int(tables['memorization']['n'].max()):,}); intervals are 95 % over traces.",
            lambda: draw_sources(tables["memorization"]),
        )
    return out


def _beside(siblings: Sequence[Run]) -> dict[str, pd.DataFrame]:
    """The other pairs' behaviour by name, made unique by the run's directory where two have the same."""
    names = [content.display_name(s) for s in siblings]
    return {
        name if names.count(name) == 1 else s.path.resolve().name: s.table("behaviour")
        for name, s in zip(names, siblings, strict=True)
        if s.has_table("behaviour")
    }


def _draw_weights(tables: Mapping[str, pd.DataFrame], add: Callable[..., None]) -> None:
    """The ledger, its circuits and the grafts."""
    ledger, grafts = tables.get("ledger"), tables.get("grafts")
    total = tables["ledger_total"].iloc[0].to_dict() if "ledger_total" in tables else {}
    order = None
    if ledger is not None:
        ranked = weight_plots.blocks(ledger)
        order = list(ranked["unit"].astype(str))
        cut = (
            f"The {weight_plots.TOP_UNITS} largest of {len(ranked)} blocks; the others as one bar. "
            if len(ranked) > weight_plots.TOP_UNITS + 1
            else ""
        )
        add(
            "ledger",
            "ledger",
            "Signed bars: the change of E split over blocks of weights, with the residual",
            f"{cut}The bars add up to the dashed line but for the hatched residual. Right: how far the same weights moved.",
            lambda: weight_plots.ledger(ledger, total),
        )
        if len(weight_plots.circuits(ledger)):
            add(
                "ledger_circuits",
                "ledger",
                "The leading entries of the ledger by circuit",
                f"The {min(weight_plots.TOP_CIRCUITS, len(weight_plots.circuits(ledger)))} largest entries by circuit.",
                lambda: weight_plots.ledger_circuits(ledger, total),
            )
    if grafts is not None:
        add(
            "grafts",
            "grafts",
            "Restored and cut effect of each graft",
            "Blocks in the ledger's order. Dashed lines: nothing and all of the loss; base (blue) and tuned (vermilion).",
            lambda: weight_plots.grafts(grafts, order, follow=_follow_rates(tables)),
        )
    if "graft_sets" in tables:
        add(
            "graft_sets",
            "graft_sets",
            "Restored and cut effect of sets of blocks, against random sets of equal size",
            "Sets grown along the ledger (filled) against random sets of as many blocks (open).",
            lambda: weight_plots.graft_sets(tables["graft_sets"]),
        )


def _follow_rates(tables: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """Follow rates on the contrasts that the grafts were read on (the effect table's)."""
    rates = {}
    for mind in figures.MIND_COLOURS:
        row = plots.pick(tables["effect"], mind=mind, measure="follow") if "effect" in tables else None
        if row is not None:
            rates[mind] = float(row["value"])
    return rates


def _directions(table: pd.DataFrame | None) -> list[str]:
    return [] if table is None else sorted(dict.fromkeys(table["direction"]), key=lambda d: d not in DIRECTIONS)


def _widest(table: pd.DataFrame, direction: str) -> str:
    rows = table[table["direction"] == direction]
    half = ((rows["ci_high"] - rows["ci_low"]) / 2).max()
    across = "column" if "column" in rows else "head"
    printed = rows["layer"].nunique() * rows[across].nunique() <= figures.PRINTED_CELLS
    grey = " Grey italics: the interval holds zero." if printed else ""
    return f"The widest 95 % interval of a cell is ±{figures.number(half, 2)} nats.{grey}" if pd.notna(half) else ""


def _embed(run: Run, name: str, table: str, alt: str, caption: str, figure: Figure) -> Drawn:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not again for each format
    with figures.style():  # also settles the names inside the SVG, so that the same numbers give the same page
        paths = run.save_figure(name, figure)
    svg = next(p for p in paths if p.suffix == ".svg").read_bytes()
    points = re.search(rb'<svg[^>]*?width="([\d.]+)pt"', svg)
    width = round(float(points[1]) * 4 / 3) if points else 900
    return Drawn(name, base64.b64encode(svg).decode(), width, alt, caption.strip(), table)


def _page(
    run: Run,
    tables: Mapping[str, pd.DataFrame],
    minds: Sequence[str],
    drawn: Mapping[str, Drawn],
    siblings: Sequence[Run],
) -> dict[str, Any]:
    """Everything that the template prints."""
    manifest = run.manifest
    located = content.located(run, tables)
    by_token = tokens.view(tables)
    verdict = manifest.get("verdict") or {}
    if not verdict and located:  # a run of `locate` alone
        verdict = {"word": located["word"], "sentences": located["sentences"][:1]}
    word = str(verdict.get("word") or "no verdict")
    behaviour, grafts = tables.get("behaviour"), tables.get("grafts")
    gate = tables.get("gate")
    total = tables["ledger_total"].iloc[0].to_dict() if "ledger_total" in tables else None
    rows: dict[str, pd.DataFrame] = {}
    if behaviour is not None:
        rows["behaviour"] = behaviour
    if "ledger" in tables:
        rows["ledger"] = weight_plots.blocks(tables["ledger"])
    if "ranking" in tables:
        rows["ranking"] = tables["ranking"]
    if grafts is not None:
        rows["grafts"] = weight_plots.graft_rows(
            grafts, list(rows["ledger"]["unit"]) if "ledger" in rows else None, top=len(grafts)
        )
    return {
        "title": f"{content.name_of(run, 'tuned')} against {content.name_of(run, 'base')}",
        "names": {m: content.name_of(run, m) for m in minds},
        "minds": list(minds),
        "colours": figures.colours([*minds, *(by_token["minds"] if by_token else ())]),
        "word": word,
        "tone": words.TONES.get(word, "none"),
        "sentences": [str(s) for s in verdict.get("sentences") or []],
        "caveats": [str(c) for c in verdict.get("caveats") or []],
        "evidence": content.evidence_lines(verdict.get("evidence") or []),
        "located": located,
        "tokens": by_token,
        "tiles": content.tiles(tables, minds),
        "groups": content.behaviour_groups(behaviour, tables.get("effect"), minds, tables.get("differences")),
        "squares": content.crossed(behaviour, minds),
        "gate": []
        if gate is None
        else [{**g, "tone": words.GATE_TONES.get(str(g["label"]), "none")} for g in gate.to_dict("records")],
        "drawn": drawn,
        "maps": {t: [d for n, d in drawn.items() if n.startswith(f"{t}_")] for t in ("residual", "heads")},
        "base_label": _label(gate, minds[0]),
        "paired": "differences" in tables,
        "grouped": "ledger" in tables and bool(tables["ledger"]["unit"].astype(str).str.contains(r"\.G\d+\.").any()),
        "findings": content.findings(tables),
        "total": total,
        "nats": lambda v: content.fixed(float(v), "nats"),
        "residual_text": weight_plots.residual_text(total) if total else "",
        "warning": str(total.get("warning") or "") if total else "",
        "shares": grafts is None or weight_plots.shares_defined(grafts),
        "undefined_shares": 0 if grafts is None else int(grafts[["restore", "cut"]].isna().any(axis=1).sum()),
        "missing": {name: what for name, what in words.MISSING.items() if name not in tables},
        "full": {name: content.full_table(frame) for name, frame in rows.items()},
        "example": content.example(manifest.get("example")),
        "limits": words.LIMITS,
        "conventions": content.conventions(behaviour),
        "traces": manifest.get("traces") or {},
        "provenance": {
            k: content.flat(manifest.get(k)) for k in ("arguments", "identity", "versions", "hardware", "timings")
        },
        "command": content.command(run),
        "updated": manifest.get("updated", ""),
        "siblings": [content.sibling_row(s, _href(run, s)) for s in siblings],
    }


def _label(gate: pd.DataFrame | None, mind: str) -> str:
    found = [] if gate is None else gate.loc[gate["mind"] == mind, "label"].tolist()
    return str(found[0]) if found else ""


def _href(run: Run, other: Run) -> str:
    return Path(os.path.relpath(other.path.resolve() / NAME, run.path.resolve())).as_posix()
