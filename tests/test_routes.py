"""The study of routes: hops through text against plain margins, a worked example, and the organism's known causes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context, ContextSpec, Item
from reasoninterp.models.minds import Minds
from reasoninterp.models.read import AnswerPair, margins
from reasoninterp.organisms import make
from reasoninterp.patching.columns import columns
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.patching.routes import (
    Routes,
    WrittenHop,
    changed_columns,
    column_spans,
    named_heads,
    rewritten,
    written_hops,
)
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Trace, encode
from tests.tiny import save_tiny, save_tuned

FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")
LAST = 10_000


def context_of(folder: Path, family: str) -> Context:
    """Two chains of three and two steps, every step changed; each step and the answer is one letter."""
    minds = Minds.load(
        {"base": save_tiny(folder / "base", family), "tuned": save_tuned(folder / "base", folder / "tuned", scale=0.05)}
    )
    tokenizer = minds.tokenizer("base")
    items = []
    for k, (clean, corrupt) in enumerate((("xyz", "jkq"), ("ab", "cd"))):
        one = Trace(f"t{k}", f"go {k}", tuple(clean), "7", FORMAT)
        two = one.with_steps(tuple(corrupt), answer="6")
        made = contrast("propagated", one, two, tokens=(encode(one, tokenizer), encode(two, tokenizer)))
        assert made.aligned
        items.append(Item(one, made))
    return Context(minds, items)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_rows_obey_the_laws(tmp_path: Path, family: str) -> None:
    context = context_of(tmp_path, family)
    study = Routes()
    with context.open("base"):
        found = pd.DataFrame([row for batch in _batches(context, "base") for row in study.measure(context, batch)])
    routes = found[found["table"] == "routes"]
    keys = ["trace", "direction", "from"]
    wide = routes.pivot(index=keys, columns="via", values="value")
    assert len(wide) == 2 * (3 + 2)
    via = wide[["step 2", "last step"]].fillna(0).sum(axis=1)
    np.testing.assert_allclose(wide["total"], wide["direct"] + via + wide["rest"], atol=1e-5)
    assert wide["total"].abs().min() > 1e-4
    last = wide.xs("last step", level="from")
    np.testing.assert_allclose(last["direct"], last["total"], atol=2e-5)
    assert last["rewritten"].isna().all() and last["all but direct"].abs().max() == 0
    early = wide.drop(index="last step", level="from")
    assert early["last step"].abs().min() > 1e-5 and early["rewritten"].notna().all()
    # the chain of two steps has nothing but its last step between the first and the answer
    short = early.xs("t1", level="trace")
    np.testing.assert_allclose(short["last step"], short["all but direct"], atol=2e-5)
    assert short["step 2"].isna().all()


def _batches(context: Context, mind: str) -> list:  # type: ignore[type-arg]
    from reasoninterp.study import Batch

    return [Batch(cell for cell in Routes().cells(context) if cell.group == mind)]


def test_written_hops_are_margins_of_the_next_steps(tmp_path: Path) -> None:
    context = context_of(tmp_path, "qwen3")
    contrasts = [item.contrast for item in context.items if item.contrast is not None]
    with context.open("tuned") as body:
        plan = contrast_plan(context, contrasts)
        spans = column_spans([columns(context.encode(c.clean)) for c in contrasts])
        origins = changed_columns(plan, spans)
        assert sorted(origins) == [1, 2, LAST]  # neither the question nor the answer position is changed
        assert origins[2][1] is None
        hops = {(h.contrast, h.origin, h.target): h for h in written_hops(context, plan, "noising", origins)}
        back = {(h.contrast, h.origin, h.target): h for h in written_hops(context, plan, "denoising", origins)}
        assert set(hops) == {(0, 1, 2), (0, 1, LAST), (0, 2, LAST), (1, 1, LAST)}

        def margin(*steps: str) -> float:
            """How far `q` is preferred to `z` as the third step of trace 0 after these two."""
            tokens = context.encode(replace(contrasts[0].clean, steps=(*steps, "z")))
            other = context.encode(replace(contrasts[0].clean, steps=(*steps, "q")))
            at = tokens.steps[2]
            pair = AnswerPair(tokens.ids[at.start : at.stop], other.ids[at.start : at.stop])
            return float(margins(body, [tokens.ids[: at.start]], [pair]).margin[0])

        first, plain, both = margin("j", "y"), margin("x", "y"), margin("j", "k")
    hop = hops[0, 1, LAST]
    assert abs(first - plain) > 1e-3
    assert hop.value == pytest.approx(first - plain, abs=1e-4)
    assert hop.total == pytest.approx(both - plain, abs=1e-4)
    assert hop.moved == pytest.approx(1 / (1 + np.exp(-first)) - 1 / (1 + np.exp(-plain)), abs=1e-5)
    # towards the clean text after the corrupt chain: with its first step made clean
    assert back[0, 1, LAST].total == pytest.approx(both - plain, abs=1e-4)


def test_rewritten_sums_the_products_over_all_ways() -> None:
    def hop(origin: int, target: int, moved: float) -> WrittenHop:
        return WrittenHop(0, origin, target, 0.0, 0.0, moved)

    hops = [hop(1, 2, 0.5), hop(1, 3, 0.25), hop(2, 3, 0.8)]
    # step 2 is reached with 0.5, step 3 with 0.25 + 0.5 · 0.8 = 0.65
    found = rewritten(hops, {1: 100.0, 2: 2.0, 3: 10.0})
    assert found == pytest.approx({1: 0.5 * 2 + 0.65 * 10, 2: 0.8 * 10})


def test_heads_by_name() -> None:
    assert named_heads("") is None
    assert named_heads("0.1, 2") == {(0, 1), (2, None)}
    with pytest.raises(UserError, match=r"heads 'L0H1': give layer\.head"):
        named_heads("L0H1")


def test_study_makes_tables_and_figures(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa")
    context.run = run = Run.open(tmp_path / "run", {})
    tables = run_study(Routes(), context, run, quiet=True).tables
    for name, x in (("routes", "via"), ("written", "to")):
        table = tables[name]
        assert set(table["mind"]) == {"base", "tuned"}
        assert not table.duplicated(["mind", "direction", "from", x]).any()
        assert table["value"].abs().max() > 1e-3 and (table["n"] > 0).all()
    assert set(Routes().draw(tables)) == {"routes", "written"}
    # only the answer position's heads of layer 0 may read: less comes through, and the total stays
    named = run_study(Routes(to_answer="0"), context, run, quiet=True).tables["routes"]
    keys = ["mind", "direction", "from", "via"]
    both = named.merge(tables["routes"], on=keys, suffixes=("_named", "_free")).set_index("via")
    np.testing.assert_allclose(both.loc["total", "value_named"], both.loc["total", "value_free"], atol=1e-6)
    assert (both.loc["direct", "value_named"] - both.loc["direct", "value_free"]).abs().min() > 1e-4
    with pytest.raises(UserError, match="head 9 of layer 0"):
        run_study(Routes(to_step="0.9"), context, run, quiet=True)


def test_nothing_measured_gives_empty_tables(tmp_path: Path) -> None:
    tables = Routes().summarise(pd.DataFrame(), context_of(tmp_path, "gpt2"))
    assert {name: len(table) for name, table in tables.items()} == {"routes": 0, "written": 0}
    assert Routes().draw(tables) == {}


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that writes its steps and reads them (trained once, kept in the user's cache)."""
    home = tmp_path_factory.mktemp("organisms")
    make(home, only=["base"], progress=False)
    return home


def test_known_routes_of_the_first_task(organism: Path, tmp_path: Path) -> None:
    """Only the last step is a direct cause; earlier steps act through those that are written after them."""
    spec = ContextSpec({"base": str(organism / "base")}, str(organism / "traces" / "lastop-base.jsonl"), limit=32)
    context = spec.load(run := Run.open(tmp_path / "run", {}))
    tables = run_study(Routes(), context, run, quiet=True).tables
    for direction in ("denoising", "noising"):
        routes = tables["routes"].query(f"direction == '{direction}'").set_index(["from", "via"])
        assert routes.loc[("last step", "direct"), "share"] == pytest.approx(1, abs=0.02)
        assert routes.loc[("last step", "total"), "normalised"] > 0.95
        assert routes.loc[("last step", "total"), "value"] > 10
        for step in ("step 1", "step 2", "step 3"):
            held = routes.loc[step].drop("rewritten")["normalised"]
            assert held.abs().max() < 0.05, step
            assert routes.loc[(step, "rewritten"), "normalised"] > 0.85, step
        written = tables["written"].query(f"direction == '{direction}'").set_index(["from", "to"])
        assert written.loc[("step 1", "step 2"), "share"] > 0.95
        assert written.loc[("step 2", "step 3"), "share"] > 0.95
        assert abs(written.loc[("step 1", "step 3"), "share"]) < 0.1
        assert abs(written.loc[("step 1", "answer"), "share"]) < 0.05
