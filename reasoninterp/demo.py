"""The demonstration: pairs of organisms whose truth is known, compared by the main job.

`severed` (its steps no longer drive its answer) is the run itself; `benign` and `shortcut` are controls in which no
damage is to be found, shown beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reasoninterp.compare import compare
from reasoninterp.models.context import ContextSpec
from reasoninterp.runs import Run

CONTROLS = ("benign", "shortcut")


class Pair(NamedTuple):
    """A tuned organism, the one it was tuned from, and the file of traces that shows the difference."""

    base: str
    tuned: str
    traces: str


def pairs_of(recipes: Mapping[str, Any]) -> list[Pair]:
    """Every organism that has a parent, with the traces on which it is measured."""
    return [Pair(r.parent, name, trace_file(r)) for name, r in recipes.items() if r.parent is not None]


def trace_file(recipe: Any) -> str:
    """The traces on which an organism shows what it is: its fixed problems, or its task's held-out ones."""
    return "memorised.jsonl" if recipe.mixture.fixed else f"{recipe.task}-id.jsonl"


def spec_for(home: Path, pair: Pair, *, seed: int = 0, limit: int | None = None) -> ContextSpec:
    """The comparison of a pair whose organisms were made in `home`."""
    return ContextSpec(
        minds={"base": str(home / pair.base), "tuned": str(home / pair.tuned)},
        traces=str(home / "traces" / pair.traces),
        seed=seed,
        limit=limit,
        max_new_tokens=96 if pair.traces.startswith("chat") else 16,
    )


def run_demo(out: Path, *, seed: int = 0, limit: int | None = None, quiet: bool = False) -> list[Run]:
    """Make the organisms and compare base with severed, benign and shortcut.

    Returns:
        The runs, `severed` (whose report shows the others beside it) first.
    """
    from reasoninterp.organisms import RECIPES, make

    home = out.parent / "organisms"
    make(home, seed=seed, only=["base", "severed", *CONTROLS], progress=not quiet)
    by_name = {p.tuned: p for p in pairs_of(RECIPES)}

    def run(name: str, folder: Path, siblings: list[Run]) -> Run:
        return compare(spec_for(home, by_name[name], seed=seed, limit=limit), folder, quiet=quiet, siblings=siblings)

    controls = [run(name, out.parent / f"{out.name}-{name}", []) for name in CONTROLS]
    return [run("severed", out, controls), *controls]
