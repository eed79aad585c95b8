"""The fast sweep against TransformerLens' own, against whole forward passes, and against the laws of patching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import site
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Minds
from reasoninterp.patching import sweep as sweep_module
from reasoninterp.patching.cells import COMPONENTS, Sites, spans_of
from reasoninterp.patching.columns import Column
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.patching.plain import plain_sweep
from reasoninterp.patching.sweep import Setting, sweep, sweep_cells
from reasoninterp.study import Batch
from reasoninterp.traces.contrast import Contrast, contrast
from reasoninterp.traces.trace import Span, TokenTrace
from tests.sweep_oracle import FAMILIES, context_at, contrasts, pairs, patched, prompt_ids, read
from tests.tiny import save_tiny

IN_WINDOWS = tuple(c for c in COMPONENTS if c not in ("pattern", "resid_post"))
KEYS = ["contrast", "direction", "component", "layer", "window", "head", "column", "column_index", "n_tokens"]
ALL_METRICS = ("logit_diff", "logp", "rank", "kl")


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Context]:
    """A tiny base and tuned model of each family, with contrasts of different lengths and kinds of answer."""
    root = tmp_path_factory.mktemp("sweep")
    return {family: context_at(root / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def context(request: pytest.FixtureRequest, contexts: dict[str, Context]) -> Context:
    return contexts[str(request.param)]


@pytest.fixture
def llama(contexts: dict[str, Context]) -> Context:
    return contexts["llama-gqa"]


def mixed_columns(tokens: TokenTrace) -> list[Column]:
    """Columns that overlap, one that is empty, one that is the whole prompt, one across the changed step's edge."""
    stop = tokens.answer.start
    step = tokens.steps[0]
    return [
        Column("whole", 0, Span(0, stop)),
        Column("empty", 1, Span(3, 3)),
        Column("across", 2, Span(1, step.stop)),
        Column("inner", 3, Span(step.start + 1, step.stop + 1)),
        Column("tail", 4, Span(stop - 3, stop)),
    ]


def some(table: pd.DataFrame, n: int, seed: int = 0) -> pd.DataFrame:
    """A sample of rows, `n` of each component: cells that matter and (one in four) cells that do not."""
    parts = []
    for _, mine in table.groupby("component", sort=False):
        live, dead = mine[mine["value"].abs() > 1e-5], mine[mine["value"].abs() <= 1e-5]
        assert len(live) >= n
        parts.append(live.sample(min(n, len(live)), random_state=seed))
        parts.append(dead.sample(min(max(1, n // 4), len(dead)), random_state=seed))
    return pd.concat(parts)


def check(context: Context, table: pd.DataFrame, spans: Any, names: tuple[str, ...] = ("value", "effect"), **kw: Any):
    """Every row of a table (a sweep's, of `pairs(context)`) against whole forward passes."""
    given = pairs(context)
    assert table["value"].abs().max() > 1e-2
    for row in table.to_dict("records"):
        pair = given[row["contrast"]]
        columns = {c.order: c.span for c in spans_of(context.encode(pair.clean), spans)}
        span = columns[row["column_index"]]
        assert row["n_tokens"] == len(span)
        want = patched(context, pair, row["direction"], row, *span, **kw)
        for name in names:
            assert row[name] == pytest.approx(want[name], abs=5e-5, rel=2e-4), (name, row)


# -------------------------------------------------------------------------------------------- TransformerLens


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_every_site_equals_transformer_lens(context: Context, direction: str) -> None:
    from transformer_lens import patching

    given = pairs(context)[0]  # answers of one token: one row, a difference of two logits
    sites = Sites(COMPONENTS, spans="tokens")
    into, source = (1, 0) if direction == "denoising" else (0, 1)
    ids = [torch.tensor([prompt_ids(context, given, side)]) for side in (into, source)]
    clean, corrupt = (context.encode(t).answer_ids[0] for t in (given.clean, given.corrupt))
    sign = 1.0 if direction == "noising" else -1.0
    with context.open("base") as body:
        ours = some(
            sweep(context, [given], sites, directions=("denoising",) if direction == "denoising" else ("noising",)), 4
        )
        plain = body.forward(ids[0])[0, -1]
        plain_margin = float(plain[corrupt] - plain[clean])
        for component, cells in ours.groupby("component", sort=False):
            names = [site(str(component), layer) for layer in range(body.n_layers)]
            extra = [site("resid_mid", n) for n in range(body.n_layers)] if component == "resid_mid" else []
            with torch.no_grad():
                _, cache = body._bridge.run_with_cache(ids[1], names_filter=names + extra)
            index = cells[["layer", "column_index", "head"]].reset_index(drop=True)
            margins = lambda logits: logits[0, -1, corrupt] - logits[0, -1, clean]  # noqa: E731
            if component == "resid_mid":
                oracle = torch.tensor(
                    [_tl_resid_mid(body, ids[0], cache, margins, *i) for i in index.to_numpy().tolist()]
                )
            else:
                with torch.no_grad():
                    oracle = patching.generic_activation_patch(
                        body._bridge, ids[0], cache, margins, _setter(str(component)), str(component), index_df=index
                    )
            want = sign * (torch.as_tensor(oracle).flatten().numpy() - plain_margin)
            assert np.abs(want).max() > 1e-4
            np.testing.assert_allclose(cells["value"], want, atol=2e-5, rtol=2e-4, err_msg=str(component))


def _setter(component: str) -> Callable[[Tensor, Any, Any], Tensor]:
    def put(act: Tensor, index: Any, cache: Tensor) -> Tensor:
        _, pos, head = index
        new = act.clone()
        if component == "pattern":
            new[:, head, pos] = cache[:, head, pos]
        elif component in ("z", "q", "k", "v"):
            new[:, pos, head] = cache[:, pos, head]
        else:
            new[:, pos] = cache[:, pos]
        return new

    return put


def _tl_resid_mid(body: Any, ids: Tensor, cache: Any, metric: Any, layer: int, pos: int, _head: int) -> float:
    """In the bridge `hook_resid_mid` is the input of the norm alone; a second hook mends the residual stream."""
    given, own = cache[site("resid_mid", layer)][0, pos], []

    def first(act: Tensor, hook: Any) -> Tensor:
        own.append(act[0, pos].clone())
        new = act.clone()
        new[0, pos] = given
        return new

    def second(act: Tensor, hook: Any) -> Tensor:
        new = act.clone()
        new[0, pos] += given - own[0]
        return new

    hooks = [(site("resid_mid", layer), first), (site("resid_post", layer), second)]
    with torch.no_grad():
        return float(metric(body._bridge.run_with_hooks(ids, fwd_hooks=hooks)))


# -------------------------------------------------------------------------------------------- whole passes


@pytest.mark.parametrize("spans", ["columns", "chain", "question", "answer", mixed_columns])
def test_spans_of_mixed_contrasts_equal_whole_passes(context: Context, spans: Any) -> None:
    with context.open("base"):
        table = sweep(context, pairs(context), Sites(COMPONENTS, spans=spans))
        assert set(table["contrast"]) == set(range(len(pairs(context))))
        # nothing differs before the first changed step: such cells are 0, and there is nothing to compare
        if spans == "question":
            assert (table["value"].abs() < 1e-5).all() and (table["effect"].abs() > 1e-3).all()
        else:
            check(context, some(table, 2), spans)


def test_the_plain_sweep_is_equal_in_every_cell(context: Context) -> None:
    sites = Sites(("resid_mid", "mlp_out", "k", "pattern"), layers=(1,), heads=(1,))
    with context.open("base"):
        fast = sweep(context, pairs(context), sites)
        setting = Setting(
            context,
            pairs(context),
            contrast_plan(context, pairs(context)),
            [context.encode(c.clean) for c in pairs(context)],
            (),
            ("logit_diff",),
            4096,
        )
        slow = plain_sweep(setting, sites, ("denoising", "noising"), "other_run")
    both = fast.merge(slow, on=KEYS, suffixes=("", "_slow"), validate="one_to_one")
    assert len(both) == len(fast) == len(slow)
    np.testing.assert_allclose(both["value"], both["value_slow"], atol=3e-5)
    np.testing.assert_allclose(both["effect"], both["effect_slow"], atol=3e-5)
    assert (fast["value"].abs() > 1e-3).mean() > 0.2


@pytest.mark.parametrize("window", [2, 3])
def test_windows_equal_simultaneous_hooks(context: Context, window: int) -> None:
    spans = mixed_columns
    with context.open("base"):
        for heads in ("all", "each") if window == 2 else ("all",):
            table = sweep(context, pairs(context), Sites(IN_WINDOWS, heads=heads, window=window, spans=spans))
            assert set(table["layer"]) == set(range(4 - window)) and set(table["window"]) == {window}
            check(context, some(table, 2), spans)
        single = sweep(context, pairs(context), Sites(IN_WINDOWS, layers=tuple(range(4 - window)), spans=spans))
    table = table.merge(single, on=[k for k in KEYS if k != "window"])
    assert (table["value_x"] - table["value_y"]).abs().max() > 1e-2  # a window is not its first layer


def test_all_heads_together_equal_whole_passes(context: Context) -> None:
    components = ("z", "q", "k", "v", "pattern")
    with context.open("base"):
        table = sweep(context, pairs(context), Sites(components, heads="all"))
        assert set(table["head"]) == {-1}
        check(context, some(table, 3), "columns")


def test_all_heads_differ_where_any_does(tmp_path: Path) -> None:
    """Head 0 of layer 1 carries nothing, so that its values are equal in every run; the other head's are not."""
    from transformers import AutoModelForCausalLM

    home = save_tiny(tmp_path, "llama-gqa")
    model = AutoModelForCausalLM.from_pretrained(home)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:8] = 0.0
    model.save_pretrained(home)
    minds = Minds.load({"base": home})
    context = Context(minds, contrasts(minds.tokenizer("base")))
    with context.open("base"):
        each = sweep(context, pairs(context), Sites(("v", "z"), layers=(1,)), directions=["noising"])
        both = sweep(context, pairs(context), Sites(("v", "z"), layers=(1,), heads="all"), directions=["noising"])
        check(context, some(both, 5), "columns")
    dead = ((each["component"] == "v") & (each["head"] == 0)) | ((each["component"] == "z") & (each["head"] < 2))
    assert (each.loc[dead, "value"] == 0).all() and each.loc[~dead, "value"].abs().max() > 1e-2


def test_heads_and_layers_choose_among_the_same_cells(context: Context) -> None:
    with context.open("base") as body:
        each = sweep(context, pairs(context), Sites(("z", "v", "pattern")))
        n_heads = {"z": body.n_heads, "v": body.n_kv_heads, "pattern": body.n_heads}
        assert {c: set(t["head"]) for c, t in each.groupby("component")} == {
            c: set(range(n)) for c, n in n_heads.items()
        }
        few = sweep(context, pairs(context), Sites(("z", "v", "pattern"), layers=(2, 0), heads=(1, 0)))
    merged = few.merge(each, on=KEYS, validate="one_to_one")
    assert len(merged) == len(few) == len(each[each["layer"].isin([0, 2]) & each["head"].isin([0, 1])])
    np.testing.assert_allclose(merged["value_x"], merged["value_y"], atol=3e-5)
    assert merged["value_x"].abs().max() > 1e-2


def test_size_of_chunks_order_and_splitting_change_nothing(context: Context) -> None:
    sites, given = Sites(("resid_pre", "z", "k", "pattern"), layers=(1,), heads=(1,)), pairs(context)
    options: dict[str, Any] = {"metrics": ALL_METRICS}
    with context.open("base"):
        whole = sweep(context, given, sites, max_tokens=10**6, **options)
        small = sweep(context, given, sites, max_tokens=16, **options)
        order = [3, 0, 4, 2, 1]
        turned = sweep(context, [given[k] for k in order], sites, max_tokens=300, **options)
        alone = pd.concat([sweep(context, [c], sites, **options).assign(contrast=k) for k, c in enumerate(given)])
    turned = turned.assign(contrast=[order[k] for k in turned["contrast"]])
    numbers = ["value", "effect", "logp_clean", "logp_corrupt", "rank_clean", "rank_corrupt", "kl"]
    assert (whole["value"].abs() > 1e-3).mean() > 0.2
    for other in (small, turned, alone):
        both = whole.merge(other, on=KEYS, suffixes=("", "_other"), validate="one_to_one")
        assert len(both) == len(whole) == len(other)
        for name in numbers:
            np.testing.assert_allclose(both[name], both[f"{name}_other"], atol=5e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_other_networks(tmp_path: Path, family: str) -> None:
    context = context_at(tmp_path, family)
    with context.open("tuned"):
        for spans in ("columns", mixed_columns):
            check(context, some(sweep(context, pairs(context), Sites(COMPONENTS, spans=spans)), 2), spans)
        table = sweep(context, pairs(context), Sites(IN_WINDOWS, window=2))
        check(context, some(table, 2), "columns")


@pytest.mark.parametrize("family", ["llama-gqa"])
def test_bfloat16_is_as_near_as_its_whole_passes(tmp_path: Path, family: str) -> None:
    home = save_tiny(tmp_path / "m", family, dtype=torch.bfloat16)
    sites = Sites(("resid_pre", "attn_out", "mlp_out", "v", "pattern"), layers=(1,), heads=(1,))
    found = {}
    for dtype in ("float32", "bfloat16"):
        minds = Minds.load({"base": home}, dtype=dtype)
        context = Context(minds, contrasts(minds.tokenizer("base")))
        with context.open("base") as body:
            assert str(body.dtype) == f"torch.{dtype}"
            found[dtype] = sweep(context, pairs(context), sites)
            if dtype == "bfloat16":  # the plain sweep rounds as often
                plan, tokens = contrast_plan(context, pairs(context)), [context.encode(c.clean) for c in pairs(context)]
                setting = Setting(context, pairs(context), plan, tokens, (), ("logit_diff",), 4096)
                slow = plain_sweep(setting, sites, ("denoising", "noising"), "other_run")
    exact, fast = found["float32"], found["bfloat16"]
    both = fast.merge(exact, on=KEYS).merge(slow, on=KEYS, suffixes=("", "_slow"))
    ours = (both["value_x"] - both["value_y"]).abs()
    theirs = (both["value"] - both["value_y"]).abs()
    assert both["value_y"].abs().max() > 0.5
    assert ours.mean() < 1.5 * theirs.mean() + 1e-3 and ours.max() < 2 * theirs.max() + 1e-2


# -------------------------------------------------------------------------------------------- metrics, hooks


def test_metrics_equal_those_by_hand(context: Context) -> None:
    sites = Sites(("resid_pre", "z", "mlp_out", "pattern", "v"))
    with context.open("base"):
        table = sweep(context, pairs(context), sites, metrics=ALL_METRICS)
        assert table["kl"].max() > 0.1 and (table["kl"] >= 0).all()
        assert table[["rank_clean", "rank_corrupt"]].max().min() > 5
        names = ("value", "effect", "logp_clean", "logp_corrupt", "rank_clean", "rank_corrupt", "kl")
        check(context, some(table, 3), "columns", names)
        nats = (table["logp_corrupt"] - table["logp_clean"]) * np.log(2)
        sign = np.where(table["direction"] == "noising", 1.0, -1.0)
        np.testing.assert_allclose(sign * nats, table["value"], atol=1e-4)


def ablate(layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Head 1's z is zero, at every position."""

    def f(z: Tensor) -> Tensor:
        new = z.clone()
        new[:, :, 1] = 0.0
        return new

    return site("z", layer), f


def shifted(component: str, layer: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A constant is added at every position."""
    return site(component, layer), lambda act: act + torch.linspace(-0.5, 0.5, act.shape[-1], dtype=act.dtype)


@pytest.mark.parametrize("kind", ["ablate", "shift"])
def test_hooks_act_in_every_run(context: Context, kind: str) -> None:
    if kind == "ablate":
        hooks = [ablate(0), ablate(1)]
    else:
        hooks = [shifted("resid_mid", 0), shifted("mlp_out", 1), shifted("resid_pre", 2), shifted("q", 2)]
    sites = Sites(tuple(c for c in COMPONENTS if c != "pattern"), layers=(0, 2) if kind == "shift" else (1,))
    with context.open("base"):
        table = sweep(context, pairs(context), sites, hooks=hooks)
        free = sweep(context, pairs(context), sites)
        assert (table["effect"] - free["effect"]).abs().min() > 1e-4
        live = table["value"] != 0
        assert (table["value"] - free["value"])[live].abs().mean() > 1e-3
        check(context, some(table[table["head"] != 1], 1), "columns", hooks=hooks)
        windows = sweep(context, pairs(context), Sites(("mlp_out", "v"), window=2), hooks=hooks)
        check(context, some(windows, 1), "columns", hooks=hooks)


def test_what_a_hook_ablates_cannot_be_patched_back(llama: Context) -> None:
    with llama.open("base"):
        table = sweep(llama, pairs(llama), Sites(("z",), layers=(1,)), hooks=[ablate(1)])
    assert table[table["head"] == 1]["value"].abs().max() < 1e-5
    assert table[table["head"] == 0]["value"].abs().max() > 1e-2


@pytest.mark.parametrize("component", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_a_hook_at_the_patched_site_acts_once(llama: Context, component: str) -> None:
    """Patching everything gives the other run, hooks and all; a hook that shifts its site shifts it once."""
    hooks = [shifted(component, 1)]
    span = Sites((component,), layers=(1,), spans=whole_prompt)
    with llama.open("base"):
        table = sweep(llama, pairs(llama)[:1], span, hooks=hooks)
        for row in table.to_dict("records"):
            stop = row["n_tokens"]
            want = patched(llama, pairs(llama)[0], row["direction"], row, 0, stop, hooks)
            assert row["value"] == pytest.approx(want["value"], abs=5e-5)
            assert abs(row["value"]) > 1e-3
            if component.startswith("resid"):
                assert row["value"] == pytest.approx(row["effect"], abs=2e-5)


@pytest.mark.parametrize(
    "name", ["blocks.7.hook_resid_pre", "hook_embed", "block.1.hook_resid_pre", site("pattern", 1)]
)
def test_hooks_that_cannot_act_are_never_left_out_in_silence(llama: Context, name: str) -> None:
    with llama.open("base"):
        before = sweep(llama, pairs(llama)[:1], "resid_pre")["effect"]
        try:
            after = sweep(llama, pairs(llama)[:1], "resid_pre", hooks=[(name, lambda act: act * 0.0)])["effect"]
        except (UserError, KeyError, RuntimeError):
            return
    assert (before - after).abs().min() > 1e-3


# -------------------------------------------------------------------------------------------- laws


def whole_prompt(tokens: TokenTrace) -> list[Column]:
    return [Column("all", 0, Span(0, tokens.answer.start))]


def test_patching_everything_gives_the_other_run(context: Context) -> None:
    components = ("resid_pre", "resid_mid", "resid_post")
    with context.open("base"):
        table = sweep(context, pairs(context), Sites(components, spans=whole_prompt), metrics=ALL_METRICS)
        # Above the embeddings, tokens of an answer have seen the prompt of their own run already.
        at_once = table["contrast"].isin([0, 4]) | ((table["layer"] == 0) & (table["component"] == "resid_pre"))
        assert (table[~at_once]["value"] - table[~at_once]["effect"]).abs().max() > 1e-2
        table = table[at_once]
        assert set(table["contrast"]) == set(range(5)) and table["effect"].abs().min() > 1e-3
        np.testing.assert_allclose(table["value"], table["effect"], atol=1.5e-5)
        for row in table[table["direction"] == "denoising"].to_dict("records"):
            pair = pairs(context)[row["contrast"]]
            clean, corrupt = read(context, pair, 0), read(context, pair, 1)
            assert row["logp_clean"] == pytest.approx(clean["logp_clean"] - corrupt["logp_clean"], abs=5e-5)
            assert row["rank_corrupt"] == clean["rank_corrupt"]


def test_a_run_patched_into_itself_is_as_it_was(context: Context) -> None:
    with context.open("base"):
        table = sweep(context, pairs(context), Sites(COMPONENTS), source="base")
        assert set(table["direction"]) == {"cross_mind"}
        assert (table.loc[table["component"] != "pattern", "value"] == 0).all()
        assert table["value"].abs().max() < 3e-5


def test_every_metric_of_spans_that_begin_before_the_change(context: Context) -> None:
    """Up to such a span's end the patched run is the other run; the answer may be read there, and behind it."""
    names = ("value", "effect", "logp_clean", "logp_corrupt", "rank_clean", "rank_corrupt", "kl")
    with context.open("base"):
        for spans in (whole_prompt, mixed_columns):
            sites = Sites(("resid_pre", "resid_post"), layers=(0, 1), spans=spans)
            table = sweep(context, pairs(context), sites, metrics=ALL_METRICS, directions=["noising"])
            rows = table[table["column"].isin(["all", "across"])]
            assert len(rows) == 4 * len(pairs(context))
            check(context, rows, spans, names)


def test_a_window_of_all_layers_of_every_column_adds_nothing_beyond_its_first(llama: Context) -> None:
    with llama.open("base"):
        one = sweep(llama, pairs(llama), Sites(("resid_pre",), layers=(0,), spans=whole_prompt))
        three = sweep(llama, pairs(llama), Sites(("resid_pre",), window=3, spans=whole_prompt))
    single = one["contrast"].isin([0, 4])
    np.testing.assert_allclose(one["value"][single], three["value"][single], atol=1e-5)
    np.testing.assert_allclose(one["value"], one["effect"], atol=1.5e-5)


def test_equal_activations_are_zero_and_are_not_run(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[np.ndarray] = []
    real = sweep_module.lanes_of

    def watched(*args: Any, **kwargs: Any) -> Any:
        work = real(*args, **kwargs)
        ran.append(work.cell)
        assert (work.lanes.start < work.lanes.stop).all() and len(np.unique(work.edits.lane)) == len(work.lanes)
        return work

    monkeypatch.setattr(sweep_module, "lanes_of", watched)
    components = tuple(c for c in COMPONENTS if c != "pattern")
    with context.open("base"):
        table = sweep(context, pairs(context), Sites(components, spans="tokens"), directions=["noising"])
        plan = contrast_plan(context, pairs(context))
    first = np.array(plan.first_difference())[table["contrast"]]
    changed = np.zeros(len(table), dtype=bool)
    changed[np.concatenate(ran)] = True
    before = table["column_index"] < first
    assert before.any() and not changed[before].any()
    assert (table.loc[before, "value"] == 0).all()
    # at layer 0 q, k, v and resid_pre know their own token only: unchanged tokens behind the change are equal, too
    own = (table["layer"] == 0) & table["component"].isin(["resid_pre", "q", "k", "v"])
    pairs_of = [(prompt_ids(context, c, 0), prompt_ids(context, c, 1)) for c in pairs(context)]
    same = np.array(
        [pairs_of[k][0][p] == pairs_of[k][1][p] for k, p in zip(table["contrast"], table["column_index"], strict=True)]
    )
    assert not changed[own & same].any()
    assert (table.loc[own & same, "value"] == 0).all()
    # What differs is run; a whole stream's cell may also be the other run, which is known.
    idle = ((own & ~same) | (~own & ~before)) & ~changed
    assert table.loc[idle, "component"].isin(["resid_pre", "resid_post"]).all()
    np.testing.assert_allclose(table.loc[idle, "value"], table.loc[idle, "effect"], atol=1.5e-5)
    # a lane for each row that the contrast takes
    n_rows, n_lanes = np.bincount(plan.owners(0)), np.bincount(np.concatenate(ran), minlength=len(table))
    np.testing.assert_array_equal(n_lanes[changed], n_rows[table["contrast"].to_numpy()[changed]])


def test_signs(llama: Context) -> None:
    """Denoising and noising of everything both give the effect; a part's value is what the metrics say it is."""
    with llama.open("base"):
        table = sweep(llama, pairs(llama), Sites(("resid_post",), layers=(2,), spans="answer"))
        for row in table.to_dict("records"):
            pair = pairs(llama)[row["contrast"]]
            effect = read(llama, pair, 1)["m"] - read(llama, pair, 0)["m"]
            assert row["effect"] == pytest.approx(effect, abs=2e-5)
            if len(llama.encode(pair.clean).answer_ids) == 1:  # the last position is all that is read
                assert row["value"] == pytest.approx(effect, abs=2e-5)


def test_rows_for_a_study_carry_its_labels(llama: Context) -> None:
    cells = list(llama.contrast_cells(aligned=True))[:3]
    with llama.open("base"):
        found = pd.DataFrame(list(sweep_cells(llama, Batch(cells), "z", directions=["noising"])))
        table = sweep(llama, [c.item.contrast for c in cells], "z", directions=["noising"])
    np.testing.assert_array_equal(found["value"], table["value"])
    assert "contrast" not in found and set(found["mind"]) == {cells[0].labels["mind"]}
    assert found["trace"].tolist() == [cells[k].labels["trace"] for k in table["contrast"]]


# -------------------------------------------------------------------------------------------- what a user gets wrong


def outside(tokens: TokenTrace) -> list[Column]:
    return [Column("far", 0, Span(0, tokens.answer.start + 1))]


@pytest.mark.parametrize(
    ("sites", "options", "words"),
    [
        (Sites(("foo",)), {}, "components"),
        (Sites(()), {}, "components"),
        (Sites(), {"directions": ()}, "directions"),
        (Sites(layers=(3,)), {}, "layers"),
        (Sites(layers=(-1,)), {}, "layers"),
        (Sites(window=0), {}, "window"),
        (Sites(window=4), {}, "window"),
        (Sites(("resid_post",), window=2), {}, "window"),
        (Sites(("pattern",), window=2), {}, "window"),
        (Sites(("z",), heads="every"), {}, "heads"),
        (Sites(("z",), heads=(4,)), {}, "heads"),
        (Sites(("v",), heads=(2,)), {}, "heads"),
        (Sites(spans="words"), {}, "spans"),
        (Sites(spans=outside), {}, "spans"),
        (Sites(), {"source": "nobody"}, "source"),
        (Sites(("pattern",)), {"source": "zero"}, "pattern"),
        (Sites(("pattern",)), {"source": "random"}, "pattern"),
        (Sites(), {"metrics": ("accuracy",)}, "metrics"),
        (Sites(("pattern",)), {"hooks": [ablate(0)]}, "pattern"),
    ],
)
def test_one_sentence_for_what_a_user_can_get_wrong(llama: Context, sites: Sites, options: Any, words: str) -> None:
    with llama.open("base"), pytest.raises(UserError) as found:
        sweep(llama, pairs(llama)[:2], sites, **options)
    text = str(found.value)
    assert words in text and text.endswith(".") and "\n" not in text


def unaligned(context: Context) -> Contrast:
    clean = pairs(context)[0].clean
    corrupt = clean.with_steps([*clean.steps, "now then a b c"], answer="6")
    made = contrast("swap", clean, corrupt, tokens=(context.encode(clean), context.encode(corrupt)))
    assert not made.aligned
    return made


def test_contrasts_that_are_not_aligned_are_refused(llama: Context) -> None:
    with llama.open("base"), pytest.raises(UserError, match="aligned"):
        sweep(llama, [pairs(llama)[0], unaligned(llama)])


def test_prompts_longer_than_the_network_s_positions_are_one_sentence(contexts: dict[str, Context]) -> None:
    context = contexts["gpt2"]
    short = pairs(context)[0]
    clean, corrupt = (replace(t, question="x " * 1100) for t in (short.clean, short.corrupt))
    made = contrast("propagated", clean, corrupt, tokens=(context.encode(clean), context.encode(corrupt)))
    assert made.aligned and len(context.encode(clean).ids) > 1024
    with context.open("base"), pytest.raises(UserError, match="positions"):
        sweep(context, [made], "resid_pre")


def test_items_are_what_they_should_be(llama: Context) -> None:
    """The contrasts cover one row and two, common beginnings, and different lengths."""
    with llama.open("base"):
        plan = contrast_plan(llama, pairs(llama))
    assert np.bincount(plan.owners(0)).tolist() == [1, 2, 1, 2, 1]
    assert len({len(p) for p in plan.prompts[0]}) > 2
