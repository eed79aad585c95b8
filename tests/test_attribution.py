"""Gradient attribution against finite differences of patching, its laws, and the honesty of its agreement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.patching.agreement import (
    HEADED,
    PatchCell,
    agreement,
    cell_mask,
    cells_of,
    compare,
    exactly,
    live_cells,
    sample_cells,
    summary_row,
    top_of_map,
)
from reasoninterp.patching.attribution import COMPONENTS, attribute, span_sums
from reasoninterp.patching.attribution_map import Attribution
from reasoninterp.patching.columns import columns
from reasoninterp.patching.metric import DIRECTIONS, SIDES, ContrastPlan, contrast_plan
from reasoninterp.patching.plain import patched_margins, span_mask
from reasoninterp.patching.residual import Residual
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Span, Trace, encode
from tests.tiny import save_tiny, save_tuned

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")


def items(tokenizer: object, answers: Sequence[tuple[str, str]]) -> list[Item]:
    """Aligned contrasts of different length, one for each pair of answers."""
    out = []
    for k, (answer, other) in enumerate(answers):
        steps = [f"now {'xyz'[j]}" for j in range(2 + k % 2)]
        clean = Trace(f"t{k}", f"go {k}", tuple(steps), answer, FORMAT)
        place = k % 2
        for value in "abcdefghijklmnopqrstuvw":  # whichever letters this tokenizer gives as many tokens
            changed = [*steps[:place], f"now {value}", *steps[place + 1 :]]
            corrupt = clean.with_steps(changed, answer=other)
            made = contrast("propagated", clean, corrupt, tokens=(encode(clean, tokenizer), encode(corrupt, tokenizer)))
            if made.aligned:
                out.append(Item(clean, made))
                break
    assert len(out) == len(answers)
    return out


ONE_TOKEN = (("7", "6"), ("8", "6"), ("7", "8"))
SEVERAL_TOKENS = (("7", "6"), ("78", "86"), ("7xz", "7qy"))


def context_of(
    folder: Path, family: str, answers: Sequence[tuple[str, str]] = ONE_TOKEN, *, tuned: bool = False
) -> Context:
    save_tiny(folder / "base", family, n_layers=3)
    sources = {"base": str(folder / "base")}
    if tuned:
        sources["tuned"] = save_tuned(folder / "base", folder / "tuned", scale=0.05)
    minds = Minds.load(sources)
    return Context(minds, items(minds.tokenizer("base"), answers))


def plan_of(context: Context) -> tuple[ContrastPlan, list[list[Span | None]]]:
    contrasts = [i.contrast for i in context.items]
    rows: list[list[Span | None]] = [[c.span for c in columns(context.encode(c.clean))] for c in contrasts]
    widest = max(map(len, rows))
    return contrast_plan(context, contrasts), [row + [None] * (widest - len(row)) for row in rows]


def slope_of_patch(body: Body, plan: ContrastPlan, direction: str, cell: PatchCell, eps: float = 5e-3) -> float:
    """Central difference of the margin when a cell is moved a little towards the other run."""
    sides = SIDES[direction]
    name = site(cell.component, cell.layer)
    source = body.cache(plan.ids(sides.source), [name])[name]
    mask = cell_mask(plan, sides.into, source, {cell.contrast: cell})
    found = []
    for step in (eps, -eps):
        hook = (name, lambda act, step=step: torch.where(mask, act + step * (source - act), act))
        found.append(float(plan.margins(body, sides.into, hooks=[hook])[cell.contrast]))
    return sides.sign * (found[0] - found[1]) / (2 * eps)


@pytest.mark.parametrize(
    ("family", "answers"), [("llama-gqa", ONE_TOKEN), ("qwen3", SEVERAL_TOKENS), ("gpt2", SEVERAL_TOKENS)]
)
def test_values_are_derivatives_of_patching(tmp_path: Path, family: str, answers: Sequence[tuple[str, str]]) -> None:
    context = context_of(tmp_path, family, answers)
    with context.open("base") as body:
        plan, spans = plan_of(context)
        assert len(plan.owners(0)) == (3 if answers is ONE_TOKEN else 5)
        for direction in DIRECTIONS if family == "qwen3" else DIRECTIONS[:1]:
            found = attribute(body, plan, direction, COMPONENTS)
            values = {c: span_sums(x, spans) for c, x in found.values.items()}
            sizes = dict.fromkeys(COMPONENTS, 0.0)
            for k in range(plan.n):
                live, _ = live_cells(plan, values, spans, k)
                for cell in sample_cells(live, len(COMPONENTS), seed=k):
                    got = float(values[cell.component][k, cell.layer, max(cell.head, 0), cell.column])
                    assert got == pytest.approx(slope_of_patch(body, plan, direction, cell), abs=2e-3, rel=5e-3), cell
                    sizes[cell.component] = max(sizes[cell.component], abs(got))
            assert min(sizes.values()) > 0.01, sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_integrated_gradient_sums_to_the_effect_and_has_no_direction(tmp_path: Path, family: str) -> None:
    context = context_of(tmp_path, family, SEVERAL_TOKENS)
    with context.open("base") as body:
        plan, _ = plan_of(context)
        effect = plan.margins(body, 1) - plan.margins(body, 0)
        assert effect.abs().max() > 0.5
        found = {d: attribute(body, plan, d, ("resid_pre", "z"), steps=32).values for d in DIRECTIONS}
        plain = attribute(body, plan, "denoising", ("resid_pre",)).values["resid_pre"]
    for values in found.values():
        torch.testing.assert_close(values["resid_pre"][:, 0].sum((1, 2)), effect, atol=2e-3, rtol=1e-3)
    for component in ("resid_pre", "z"):
        torch.testing.assert_close(found["denoising"][component], found["noising"][component], atol=1e-4, rtol=1e-4)
    assert (plain[:, 0].sum((1, 2)) - effect).abs().max() > 0.05  # which the gradient at one end does not


def test_contrasts_do_not_meet(tmp_path: Path) -> None:
    """Padding, batching and the layers that are asked for change nothing."""
    context = context_of(tmp_path, "llama-gqa", SEVERAL_TOKENS)
    with context.open("base") as body:
        plan, _ = plan_of(context)
        whole = attribute(body, plan, "noising", COMPONENTS, steps=2)
        assert whole.values["k"].shape[2] == body.n_kv_heads == 2 and whole.values["q"].shape[2] == 4
        assert len({len(p) for p in plan.prompts[0]}) > 1
        for k, item in enumerate(context.items):
            one = contrast_plan(context, [item.contrast])
            alone = attribute(body, one, "noising", COMPONENTS, layers=(2, 1), steps=2)
            for component, values in alone.values.items():
                n = values.shape[-1]
                together = whole.values[component][k : k + 1, [2, 1]]
                torch.testing.assert_close(values, together[..., :n], atol=1e-5, rtol=1e-4)
                assert (together[..., n:] == 0).all()


def test_span_sums_by_hand() -> None:
    values = torch.arange(8.0).reshape(2, 1, 1, 4)
    found = span_sums(values, [[Span(0, 2), Span(1, 4)], [None, Span(3, 4)]])
    assert found[0, 0, 0].tolist() == [1.0, 6.0]
    assert torch.isnan(found[1, 0, 0, 0])
    assert found[1, 0, 0, 1] == 7.0


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_exact_values_are_those_of_plain_patching_and_dead_cells_are_zero(tmp_path: Path, family: str) -> None:
    context = context_of(tmp_path, family, SEVERAL_TOKENS)
    with context.open("base") as body:
        plan, spans = plan_of(context)
        firsts = [Span(f, f + 1) for f in plan.first_difference()]
        spans = [[*row, first] for row, first in zip(spans, firsts, strict=True)]
        for direction in DIRECTIONS[family == "gpt2" :][:1]:
            found = attribute(body, plan, direction, COMPONENTS)
            values = {c: span_sums(x, spans) for c, x in found.values.items()}
            live, dead = [], []
            for k in range(plan.n):
                mine, n_dead = live_cells(plan, values, spans, k)
                every = [
                    PatchCell(k, c, layer, head, column, span)
                    for c, grid in values.items()
                    for layer in range(3)
                    for head in (range(grid.shape[2]) if c in HEADED else [-1])
                    for column, span in enumerate(spans[k])
                    if span is not None
                ]
                rest = [cell for cell in every if cell not in set(mine)]
                assert len(rest) == n_dead > 0
                assert any(cell.span == firsts[k] for cell in mine)
                live += sample_cells(mine, 4, seed=k)
                dead += sample_cells(rest, 10, seed=k)
            exact = exactly(body, plan, direction)
            assert max(abs(x) for x in exact(dead)) < 2e-6
            assert all(values[c.component][c.contrast, c.layer, max(c.head, 0), c.column].abs() < 1e-6 for c in dead)
            together = exact(live)
            assert max(abs(x) for x in together) > 0.05
            sides = SIDES[direction]
            plain = plan.margins(body, sides.into)
            for cell, value in zip(live, together, strict=True):
                name = site(cell.component, cell.layer)
                source = body.cache(plan.ids(sides.source), [name])[name]
                where = [cell.span if k == cell.contrast else None for k in range(plan.n)]
                mask = span_mask(plan, sides.into, where)
                if cell.component == "pattern":
                    mask = mask[:, None, :, None] & (torch.arange(4) == cell.head)[None, :, None, None]
                elif cell.head >= 0:
                    mask = mask[:, :, None, None] & (torch.arange(source.shape[2]) == cell.head)[None, None, :, None]
                patched = patched_margins(body, plan, direction, name, source, mask)
                one = sides.sign * (patched - plain)
                assert one[cell.contrast] == pytest.approx(value, abs=1e-5)
                one[cell.contrast] = 0
                assert one.abs().max() < 1e-5


def test_agreement_by_hand() -> None:
    exact = [1.0, 2.0, -3.0, 4.0]
    groups = ["a", "a", "b", "b"]
    fit = compare(groups, [2 * x + 1 for x in exact], exact)
    assert fit.rank_correlation.value == pytest.approx(1.0)
    assert fit.line == pytest.approx((2.0, 1.0))
    assert fit.slope.value == pytest.approx(2 + sum(exact) / sum(x * x for x in exact))
    assert (fit.n_groups, fit.largest, fit.worst) == (2, 4.0, 3)
    assert compare(groups, [1.0, 8.0, -27.0, 64.0], exact).rank_correlation.value == pytest.approx(1.0)
    assert compare(groups, [-x for x in exact], exact).rank_correlation.value == pytest.approx(-1.0)
    assert np.isnan(compare(groups, exact, [0.0] * 4).slope.value)
    tied_x, tied_y = [0.0, 1.0, 1.0, 2.0, 5.0, 5.0], [3.0, 3.0, 1.0, 4.0, 0.0, 9.0]
    oracle = scipy.stats.spearmanr(tied_x, tied_y).statistic
    assert compare(list(range(6)), tied_y, tied_x).rank_correlation.value == pytest.approx(oracle)
    assert compare([], [], []).n_groups == 0


def test_agreement_intervals_resample_contrasts_not_cells() -> None:
    """Cells of one contrast copied many times say no more than one of them."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=12), rng.normal(size=12)
    once = compare(list(range(12)), x + noise, x)
    often = compare(np.repeat(range(12), 20).tolist(), np.repeat(x + noise, 20), np.repeat(x, 20))
    cells = compare(list(range(240)), np.repeat(x + noise, 20), np.repeat(x, 20))
    assert once.slope[1:3] == pytest.approx(often.slope[1:3])
    assert cells.slope.ci_high - cells.slope.ci_low < 0.5 * (once.slope.ci_high - once.slope.ci_low)


def test_agreement_takes_any_exact_measure_and_confirms_the_top(tmp_path: Path) -> None:
    context = context_of(tmp_path, "qwen3")
    with context.open("base") as body:
        plan, spans = plan_of(context)
        found = attribute(body, plan, "noising", ("resid_pre", "z", "k"))
        values = {c: span_sums(x, spans) for c, x in found.values.items()}
        asked: list[PatchCell] = []

        def half(cells: Sequence[PatchCell]) -> list[float]:
            asked.extend(cells)
            return [0.5 * float(values[c.component][c.contrast, c.layer, max(c.head, 0), c.column]) for c in cells]

        linear = agreement(plan, values, spans, half, per_contrast=9, confirm=3, seed=4)
        real = agreement(plan, values, spans, exactly(body, plan, "noising"), per_contrast=9, confirm=3, seed=4)
        exact_top = [np.mean(exactly(body, plan, "noising")(cells_of(spans, *key))) for key in top_of_map(values, 3)]
    assert linear.n == 27 and len(asked) == 27 + int(linear.confirmed["n"].sum())
    assert linear.slope.value == pytest.approx(2.0) and linear.rank_correlation.value == pytest.approx(1.0)
    assert linear.row()["worst_attributed"] == pytest.approx(2 * float(linear.row()["worst_exact"]))
    assert linear.table["component"].value_counts().tolist() == [9, 9, 9]
    pd.testing.assert_frame_equal(linear.table.drop(columns="exact"), real.table.drop(columns="exact"))
    assert real.confirmed["attributed"].abs().is_monotonic_decreasing
    means = max(float(v.nanmean(0).abs().max()) for v in values.values())
    assert real.confirmed["attributed"].abs().iloc[0] == pytest.approx(means)
    assert real.confirmed["exact"].tolist() == pytest.approx(exact_top, abs=1e-5)
    assert 0 < real.rank_correlation.value < 1 and real.rank_correlation.ci_low < real.rank_correlation.ci_high
    fit = summary_row(real.table, seed=4)
    assert fit["slope"] == real.slope.value and fit["n"] == 27


def test_what_a_user_can_get_wrong(tmp_path: Path) -> None:
    context = context_of(tmp_path, "gpt2")
    with context.open("base") as body:
        plan, _ = plan_of(context)
        with pytest.raises(UserError, match="resid_post"):
            attribute(body, plan, "denoising", ("resid",))
        with pytest.raises(UserError, match="noising"):
            attribute(body, plan, "both")
        with pytest.raises(UserError, match="steps"):
            attribute(body, plan, "denoising", steps=-1)
        shorter = tuple(p[:-1] if k == 1 else p for k, p in enumerate(plan.prompts[1]))
        with pytest.raises(UserError, match="contrast 1"):
            attribute(body, ContrastPlan(plan.n, plan.sides, plan.both, (plan.prompts[0], shorter)), "denoising")


def test_the_study_confirms_with_the_residual_study_and_does_not_depend_on_batches(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa", SEVERAL_TOKENS, tuned=True)
    study = Attribution(components=("resid_pre", "z"), steps=0, sample=4, confirm=5)
    tables = []
    for rows in (8, 2):
        context.rows = rows
        run = context.run = Run.open(tmp_path / f"run{rows}", {})
        tables.append(run_study(study, context, run, quiet=True, figures=rows == 8).tables)
        if rows == 8:
            exact = run_study(Residual(), context, run, quiet=True, figures=False).tables["residual"]
    for name, table in tables[0].items():
        pd.testing.assert_frame_equal(table, tables[1][name], atol=1e-5, rtol=1e-3)
    table, agreements = tables[0]["attribution"], tables[0]["attribution_agreement"]
    assert set(table["mind"]) == {"base", "tuned"} and set(table["direction"]) == set(DIRECTIONS)
    assert (table["method"] == "attribution patching").all()
    confirmed = table[table["exact"].notna()]
    assert len(confirmed) == 2 * 2 * 5
    both = confirmed[confirmed["component"] == "resid_pre"].merge(
        exact, on=["mind", "direction", "layer", "column"], suffixes=("", "_residual")
    )
    assert len(both) > 4 and both["exact"].abs().min() > 0.01
    np.testing.assert_allclose(both["exact"], both["value_residual"], atol=2e-5)
    assert (agreements[agreements["component"] == "all"]["n"] == 12).all()
    sampled = tables[0]["attribution_cells"]
    assert sampled["exact"].abs().max() > 0.05
    base = sampled[sampled["mind"] == "base"].reset_index(drop=True)
    tuned = sampled[sampled["mind"] == "tuned"].reset_index(drop=True)
    places = ["trace", "direction", "component", "layer", "head", "column"]
    pd.testing.assert_frame_equal(base[places], tuned[places])  # minds are compared on the same cells


def test_the_study_with_integrated_gradients_has_one_map_for_both_directions(tmp_path: Path) -> None:
    context = context_of(tmp_path, "gpt2")
    run = context.run = Run.open(tmp_path / "run", {})
    study = Attribution(components=("resid_pre",), steps=16, sample=2, confirm=0)
    tables = run_study(study, context, run, quiet=True, figures=False).tables
    table = tables["attribution"]
    assert (table["method"] == "integrated gradients, 16 nodes").all() and table["exact"].isna().all()
    wide = table.pivot(index=["layer", "column"], columns="direction", values="value")
    np.testing.assert_allclose(wide["denoising"], wide["noising"])
    sums = table[(table["layer"] == 0) & (table["direction"] == "noising")]
    with context.open("base") as body:
        plan, _ = plan_of(context)
        effect = float((plan.margins(body, 1) - plan.margins(body, 0)).mean())
    assert (sums["value"] * sums["n"]).sum() / plan.n == pytest.approx(effect, abs=2e-3)
