"""Where a sweep's activations come from: zero, means, other traces, another mind; each against whole forward passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.patching import sweep as sweep_module
from reasoninterp.patching.cells import COMPONENTS, Sites, spans_of
from reasoninterp.patching.columns import Column
from reasoninterp.patching.sweep import sweep
from reasoninterp.traces.contrast import Contrast, contrast
from reasoninterp.traces.trace import Span, TokenTrace
from tests.sweep_oracle import (
    FAMILIES,
    Put,
    activations,
    compare,
    context_at,
    contrasts,
    pairs,
    prompt_ids,
    read,
    values_of,
)

PUT = tuple(c for c in COMPONENTS if c != "pattern")
# Traces of which several share an answer, some the lengths of all columns, some only of a few.
SHARED = (
    ("go 0", 2, 0, "7", "6"),
    ("go 1", 2, 1, "6", "7"),
    ("go 2", 2, 0, "8", "6"),
    ("go 5 y y", 2, 1, "7", "8"),
    ("go 9", 3, 1, "6", "8"),
    ("go 4", 2, 1, "8", "7"),
)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Context]:
    """A tiny base and tuned model of each family, with contrasts of different lengths and kinds of answer."""
    root = tmp_path_factory.mktemp("sources")
    return {family: context_at(root / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def context(request: pytest.FixtureRequest, contexts: dict[str, Context]) -> Context:
    return contexts[str(request.param)]


@pytest.fixture
def shared(contexts: dict[str, Context]) -> Context:
    minds = contexts["llama-gqa"].minds
    return Context(minds, contrasts(minds.tokenizer("base"), SHARED))


def span_of(context: Context, pair: Contrast, row: dict[str, Any], spans: Any) -> Span:
    """The span of a row's column."""
    return next(c.span for c in spans_of(context.encode(pair.clean), spans) if c.order == row["column_index"])


def sample(table: pd.DataFrame, n: int) -> list[dict[str, Any]]:
    """`n` rows of each component that do something."""
    live = table[table["value"].abs() > 1e-6]
    parts = [t.sample(min(n, len(t)), random_state=1) for _, t in live.groupby("component", sort=False)]
    assert len(parts) == table["component"].nunique()
    return pd.concat(parts).to_dict("records")  # type: ignore[return-value]


def near(row: dict[str, Any], want: dict[str, Any], names: tuple[str, ...] = ("value", "effect")) -> None:
    for name in names:
        assert row[name] == pytest.approx(want[name], abs=5e-5, rel=2e-4), (name, row)


def swept_or_refused(word: str, *args: Any, **options: Any) -> pd.DataFrame | None:
    """The table, or None where one sentence that names `word` refuses it."""
    try:
        return sweep(*args, **options)
    except UserError as error:
        text = str(error)
    assert word in text and text.endswith(".")
    return None


# -------------------------------------------------------------------------------------------- zero and mean


@pytest.mark.parametrize("window", [1, 2])
def test_zero_equals_hooks_that_write_zeros(context: Context, window: int) -> None:
    given = pairs(context)
    components = PUT if window == 1 else tuple(c for c in PUT if c != "resid_post")
    metrics = ("logit_diff", "logp", "rank", "kl")
    with context.open("base"):
        table = sweep(context, given, Sites(components, layers=(0, 1), window=window), source="zero", metrics=metrics)
        assert set(table["source"]) == {"zero"} and set(table["direction"]) == {"denoising", "noising"}
        for row in sample(table, 2):
            pair = given[row["contrast"]]
            span = span_of(context, pair, row, "columns")
            puts = []
            for layer in range(row["layer"], row["layer"] + window):
                like = values_of(context, pair, 0, row["component"], layer, *span)
                puts.append(Put(row["component"], layer, row["head"], *span, torch.zeros_like(like)))
            want = compare(context, pair, 0 if row["direction"] == "noising" else 1, puts)
            near(row, want, ("value", "effect", "logp_clean", "logp_corrupt", "rank_clean", "rank_corrupt", "kl"))


@pytest.mark.parametrize("spans", ["columns", "tokens"])
def test_mean_equals_means_by_hand(context: Context, spans: str) -> None:
    given, components = pairs(context), PUT if spans == "columns" else ("resid_mid", "k")
    with context.open("base"):
        table = sweep(context, given[:3], Sites(components, spans=spans), source="mean")
        for row in sample(table, 1):
            pair = given[row["contrast"]]
            span = span_of(context, pair, row, spans)
            source = 0 if row["direction"] == "denoising" else 1
            one = mean_of(context, row, source, spans)
            value = one.expand(len(span), *one.shape)
            want = compare(context, pair, 1 - source, [Put(row["component"], row["layer"], row["head"], *span, value)])
            near(row, want)


def mean_of(context: Context, row: dict[str, Any], source: int, spans: Any) -> Tensor:
    """Mean over all contrasts' chains of one side of the tokens of the row's column."""
    found = []
    for other in pairs(context):
        columns = {c.order: c.span for c in spans_of(context.encode(other.clean), spans)}
        if row["column_index"] in columns:
            span = columns[row["column_index"]]
            found.append(values_of(context, other, source, row["component"], row["layer"], *span))
    return torch.cat(found).mean(0)


def overlapping(tokens: TokenTrace) -> list[Column]:
    return [Column("a", 0, Span(0, 4)), Column("b", 1, Span(2, 6))]


def test_means_of_overlapping_columns_are_each_column_s_own(contexts: dict[str, Context]) -> None:
    context = contexts["llama-gqa"]
    with context.open("base"):
        sites = Sites(("resid_pre",), layers=(1,), spans=overlapping)
        table = sweep(context, pairs(context)[:1], sites, source="mean", directions=["noising"])
        for row in table.to_dict("records"):
            span = Span(0, 4) if row["column"] == "a" else Span(2, 6)
            value = mean_of(context, row, 1, overlapping).expand(4, -1)
            near(row, compare(context, pairs(context)[0], 0, [Put("resid_pre", 1, -1, *span, value)]))


def test_means_do_not_depend_on_the_batch(context: Context) -> None:
    given = pairs(context)
    rows = context.rows
    with context.open("base"):
        whole = sweep(context, given, Sites(("resid_pre", "z")), source="mean")
        context.rows = 2
        try:
            alone = sweep(context, given[2:3], Sites(("resid_pre", "z")), source="mean", max_tokens=30)
        finally:
            context.rows = rows
    mine = whole[whole["contrast"] == 2].reset_index(drop=True)
    np.testing.assert_allclose(alone["value"], mine["value"], atol=3e-5)


def test_a_mean_without_traces_is_one_sentence(contexts: dict[str, Context]) -> None:
    """No contrast of the context, or none with the column that is asked for."""
    context = contexts["llama-gqa"]
    none = Context(context.minds, [replace(i, contrast=None) for i in context.items])
    few = Context(context.minds, context.items[:1])
    for small in (none, few):
        with small.open("base"):
            table = swept_or_refused("mean", small, pairs(context), Sites(("resid_pre",)), source="mean")
            assert table is None or table["value"].isna().any()


# -------------------------------------------------------------------------------------------- other traces


@pytest.mark.parametrize("source", ["same_answer", "random"])
def test_other_traces_are_what_they_should_be_and_equal_a_gather_by_hand(
    shared: Context, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    real = sweep_module.partners

    def watched(*args: Any) -> Any:
        chosen.append(real(*args))
        return chosen[-1]

    monkeypatch.setattr(sweep_module, "partners", watched)
    given = pairs(shared)
    by_ids = {shared.encode(i.trace).prompt_ids: i.trace for i in shared.items}
    with shared.open("base"):
        for direction in ("denoising", "noising"):
            chosen.clear()
            table = sweep(shared, given, Sites(PUT), directions=[direction], source=source)
            traces = []
            for k, pair in enumerate(given):
                ids, n = chosen[0].ids[k].tolist(), int(chosen[0].lengths[k])
                trace = by_ids.get(tuple(ids[:n]))
                traces.append(trace)
                answers = (pair.clean.answer, pair.corrupt.answer)
                implied = answers[0 if direction == "denoising" else 1]
                able = [
                    t.trace.answer == implied if source == "same_answer" else t.trace.answer not in answers
                    for t in shared.items
                    if t.trace.id != pair.clean.id
                ]
                assert (trace is not None) == any(able)
                if trace is not None:
                    assert trace.id != pair.clean.id
                    assert trace.answer == implied if source == "same_answer" else trace.answer not in answers
            assert sum(t is not None for t in traces) >= 4
            for k, row in enumerate(table.to_dict("records")):
                fits = place(shared, given[row["contrast"]], traces[row["contrast"]], row) is not None
                assert np.isnan(row["value"]) == (not fits), (k, row)
            assert table["value"].isna().any() and table["value"].notna().mean() > 0.3
            for row in sample(table[table["value"].notna()], 2):
                check_gathered(shared, given[row["contrast"]], traces[row["contrast"]], row)


def place(context: Context, pair: Contrast, trace: Any, row: dict[str, Any]) -> Span | None:
    """The column in the other trace, if it has as many tokens there."""
    if trace is None:
        return None
    mine = span_of(context, pair, row, "columns")
    columns = {c.order: c.span for c in spans_of(context.encode(trace), "columns")}
    theirs = columns.get(row["column_index"])
    return theirs if theirs is not None and len(theirs) == len(mine) > 0 else None


def check_gathered(context: Context, pair: Contrast, trace: Any, row: dict[str, Any]) -> None:
    theirs = place(context, pair, trace, row)
    assert theirs is not None
    ids = context.encode(trace).prompt_ids
    value = activations(context.body, ids, row["component"], row["layer"])[theirs.start : theirs.stop]
    span = span_of(context, pair, row, "columns")
    into = 1 if row["direction"] == "denoising" else 0
    near(row, compare(context, pair, into, [Put(row["component"], row["layer"], row["head"], *span, value)]))


def test_the_same_partner_for_every_mind_and_batch(shared: Context) -> None:
    tables = {}
    for mind in ("base", "tuned"):
        with shared.open(mind):
            tables[mind] = sweep(shared, pairs(shared), Sites(("resid_pre",)), source="random")
            alone = sweep(shared, pairs(shared)[3:4], Sites(("resid_pre",)), source="random")
            mine = tables[mind][tables[mind]["contrast"] == 3]
            np.testing.assert_allclose(alone["value"], mine["value"], atol=3e-5)
    np.testing.assert_array_equal(tables["base"]["value"].isna(), tables["tuned"]["value"].isna())


def test_no_partner_is_nan_never_zero(contexts: dict[str, Context]) -> None:
    lonely = Context(contexts["gpt2"].minds, contexts["gpt2"].items[:1])
    with lonely.open("base"):
        for source in ("random", "same_answer"):
            table = sweep(lonely, pairs(lonely), Sites(("resid_pre", "v")), source=source, metrics=("logp", "rank"))
            for name in ("value", "logp_clean", "logp_corrupt", "rank_clean", "rank_corrupt"):
                assert table[name].isna().all()
            assert table["effect"].notna().all()


# -------------------------------------------------------------------------------------------- another mind


def test_another_mind_equals_whole_passes_with_its_activations(context: Context) -> None:
    mind, other = ("base", "tuned") if context.minds.body.is_gqa else ("tuned", "base")
    given = pairs(context)
    with context.open(mind):
        table = sweep(context, given, Sites(COMPONENTS), source=other)
        assert set(table["direction"]) == {"cross_mind"} and set(table["source"]) == {other}
        assert context.body.label == mind
        for row in sample(table, 2):
            near(row, crossed(context, given[row["contrast"]], row, other, "columns"))


def crossed(context: Context, pair: Contrast, row: dict[str, Any], other: str, spans: Any) -> dict[str, Any]:
    """The change of `m(corrupt) − m(clean)` when both chains get the other mind's activations."""
    plain, changed = [], []
    for side, trace in enumerate((pair.clean, pair.corrupt)):
        columns = {c.order: c.span for c in spans_of(context.encode(trace), spans)}
        span = columns[row["column_index"]]
        puts = []
        for layer in range(row["layer"], row["layer"] + row["window"]):
            with context.open(other):
                value = values_of(context, pair, side, row["component"], layer, *span)
            puts.append(Put(row["component"], layer, row["head"], *span, value))
        plain.append(read(context, pair, side)["m"])
        changed.append(read(context, pair, side, puts)["m"])
    return {"value": (changed[1] - changed[0]) - (plain[1] - plain[0]), "effect": plain[1] - plain[0]}


def test_all_of_another_mind_s_last_residual_stream_is_its_answer(contexts: dict[str, Context]) -> None:
    """All of the other's last `resid_post`, read by this one's unembedding: the norm and unembedding are shared here."""
    context = contexts["llama-gqa"]
    given = pairs(context)
    sites = Sites(("resid_pre",), layers=(0,), spans=lambda t: [Column("all", 0, Span(0, t.answer.start))])
    with context.open("base"):
        assert sweep(context, given, sites, source="tuned")["value"].abs().max() > 1e-3  # embeddings were tuned
        window = sweep(context, given, Sites(("attn_out", "mlp_out"), window=2), source="tuned")
        for row in sample(window, 4):
            near(row, crossed(context, given[row["contrast"]], row, "tuned", "columns"))


def test_weights_are_back_after_a_sweep_across_minds(context: Context) -> None:
    ids = torch.tensor([prompt_ids(context, pairs(context)[0], 0)])
    with context.open("base") as body:
        before = body.forward(ids)
        sweep(context, pairs(context)[:2], Sites(("z", "pattern")), source="tuned")
        assert torch.equal(body.forward(ids), before)
        with context.open("tuned"):
            assert not torch.allclose(body.forward(ids), before)


def test_metrics_are_given_or_refused_across_minds(contexts: dict[str, Context]) -> None:
    context = contexts["llama-gqa"]
    with context.open("base"):
        options: dict[str, Any] = {"source": "tuned", "metrics": ("logp", "kl")}
        table = swept_or_refused("metrics", context, pairs(context)[:2], "resid_pre", **options)
        for name in ("logp_clean", "logp_corrupt", "kl"):
            assert table is None or any(str(c).startswith(name) for c in table.columns)


# -------------------------------------------------------------------------------------------- chains that do not align


@pytest.mark.parametrize("source", ["tuned", "zero", "mean", "same_answer", "random"])
def test_chains_of_different_lengths_are_refused_or_each_patched_at_its_own_span(
    contexts: dict[str, Context], source: str
) -> None:
    context = contexts["llama-gqa"]
    clean = pairs(context)[0].clean
    corrupt = clean.with_steps([*clean.steps, "now a", "now b"], answer="6")
    pair = contrast("swap", clean, corrupt, tokens=(context.encode(clean), context.encode(corrupt)))
    assert not pair.aligned
    with context.open("base"):
        sites = Sites(("resid_pre",), layers=(1,), spans="answer")
        table = swept_or_refused("aligned", context, [pair], sites, source=source)
        if table is None:
            return
        for row in table.to_dict("records"):
            if source == "tuned":
                near(row, crossed(context, pair, row, "tuned", "answer"))
                continue
            into = 1 if row["direction"] == "denoising" else 0
            n = len(prompt_ids(context, pair, into))
            if source == "zero":
                near(row, compare(context, pair, into, [Put("resid_pre", 1, -1, n - 1, n, torch.zeros(1, 32))]))
            else:  # the last token is always one token, and patching it changes something
                assert np.isnan(row["value"]) or abs(row["value"]) > 1e-4
