"""Cross-model patching: its corners are grafts and ends, its effects add up, equal minds give nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Minds, graft, mind
from reasoninterp.models.units import Unit
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.severance.grafts.crossing import CORNERS, EFFECTS, CrossPatch, crossing
from reasoninterp.severance.grafts.moves import Reader
from tests.test_ledger import items
from tests.test_moves import contrasts_of, planted
from tests.test_smallest import Regrouped, regrouped_pair

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
KEY = ["component", "layer", "head", "column"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Context, dict[str, pd.DataFrame]]]:
    """Every corner in both hosts, of minds in which all weights differ."""
    out = {}
    for family in FAMILIES:
        minds = planted(tmp_path_factory.mktemp(family), family, [], drift=0.06)
        context = Context(minds, items(3))
        parts = ("attn_out", "mlp_out", "resid_post", *(("z",) if family == "llama-gqa" else ()))
        found = {h: crossing(context, contrasts_of(context), host=h, components=parts) for h in ("base", "tuned")}
        out[family] = (context, found)
    return out


def units_below(minds: Minds, layer: int) -> list[Unit]:
    """What a run has done before a layer."""
    found = minds.units("layer")
    return [u for u in found if u.kind == "embedding" or (u.layer is not None and u.layer < layer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_layer_at_all_tokens_is_a_graft(tables: dict[str, Any], family: str) -> None:
    context, found = tables[family]
    read = Reader(context, contrasts_of(context))
    name = {"b": "base", "t": "tuned"}
    for host in ("base", "tuned"):
        table = found[host].query("component == 'resid_post' and column == 'all'")
        for layer, (own, up) in ((k, tuple(c)) for k in (0, 1) for c in CORNERS):
            if context.minds.body.tied and name[up] != host:
                continue  # a graft would move the unembedding along
            handle = graft(host, name[up], units_below(context.minds, layer))
            handle = graft(handle, name[own], [u for u in context.minds.units("layer") if u.layer == layer])
            corner = table.query("layer == @layer").sort_values("contrast")[f"e_{own}{up}"]
            np.testing.assert_allclose(corner, read(handle).effect, atol=3e-3)
        assert table["own"].abs().min() > 1e-3 and table["upstream"].abs().min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hosts_own_corner_is_the_host_and_effects_add_up(tables: dict[str, Any], family: str) -> None:
    context, found = tables[family]
    for host, corner in (("base", "e_bb"), ("tuned", "e_tt")):
        table = found[host]
        effect = Reader(context, contrasts_of(context))(mind(host)).effect
        np.testing.assert_allclose(table[corner], effect[table["contrast"]], atol=1e-4)
        np.testing.assert_allclose(table["own"] + table["upstream"], table["e_tt"] - table["e_bb"], atol=1e-9)
        answer = table[table["column"] == "answer position"]
        assert (answer[["own", "upstream", "interaction"]].abs().max() > 1e-3).all()
    assert set(found["base"]["column"]) == {"question", "step 1", "last step", "answer position", "all"}
    heads = set(found["base"].query("component == 'z'")["head"])
    assert heads == ({0, 1, 2, 3} if family == "llama-gqa" else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_weights_on_the_other_input_are_that_minds_own_activations(
    tables: dict[str, Any], family: str
) -> None:
    """`e_bb` in tuned, by hand: the base's recorded output put into tuned."""
    context, found = tables[family]
    contrasts = contrasts_of(context)
    from reasoninterp.models.body import site
    from reasoninterp.patching.metric import contrast_plan

    plan = contrast_plan(context, contrasts)
    with context.open("base") as body:
        kept = body.cache(plan.both.ids, [site("mlp_out", 1)])[site("mlp_out", 1)]
    with context.open("tuned") as body:
        logits = body.forward(
            plan.both.ids, positions=plan.both.positions, hooks=[(site("mlp_out", 1), lambda _: kept)]
        )
    from reasoninterp.models.read import margins_from_logits

    margin = margins_from_logits(plan.both, logits).margin
    expected = (margin[plan.n :] - margin[: plan.n]).tolist()
    got = found["tuned"].query("component == 'mlp_out' and layer == 1 and column == 'all'").sort_values("contrast")
    assert got["e_bb"].tolist() == pytest.approx(expected, abs=1e-3)
    assert (got["e_bb"] - got["e_tt"]).abs().min() > 1e-3


def test_the_corners_of_the_last_layer_are_the_ends_where_only_layers_differ(tmp_path: Path) -> None:
    context = Context(planted(tmp_path, "llama-gqa", ["L0", "L1"]), items(3))
    table = crossing(context, contrasts_of(context), host="base", components=("resid_post",), layers=(1,))
    at_all = table.query("column == 'all'").sort_values("contrast")
    read = Reader(context, contrasts_of(context))
    np.testing.assert_allclose(at_all["e_bb"], read(mind("base")).effect, atol=1e-3)
    np.testing.assert_allclose(at_all["e_tt"], read(mind("tuned")).effect, atol=1e-3)
    assert (at_all["e_tt"] - at_all["e_bb"]).abs().min() > 0.05


def test_a_change_in_one_block_is_its_own_there_and_upstream_above(tmp_path: Path) -> None:
    """Only the first layer's MLP differs: below it nothing, at it own, above it upstream, exactly."""
    context = Context(planted(tmp_path, "qwen3", ["L0.mlp"]), items(3))
    table = crossing(context, contrasts_of(context), host="tuned")
    by = table.groupby(["component", "layer"])[list(EFFECTS)].agg(lambda x: x.abs().max())
    assert (by.loc[("attn_out", 0)] == 0).all()
    assert by.loc[("mlp_out", 0), "own"] > 0.05 and (by.loc[("mlp_out", 0), ["upstream", "interaction"]] < 1e-4).all()
    for component in ("attn_out", "mlp_out"):
        assert by.loc[(component, 1), "upstream"] > 0.01
        assert (by.loc[(component, 1), ["own", "interaction"]] < 1e-4).all()


def test_equal_minds_give_zeros_and_the_study_has_its_tables(tmp_path: Path) -> None:
    minds = planted(tmp_path, "gpt2", [])
    context = Context(minds, items(2))
    assert torch.equal(
        torch.tensor(crossing(context, contrasts_of(context))[list(EFFECTS)].abs().max().tolist()), torch.zeros(3)
    )
    run = Run.open(tmp_path / "run", {})
    context.run = run
    table = run_study(CrossPatch(components="attn_out,z"), context, run, quiet=True).tables["cross_patch"]
    assert len(table) == 2 * 3 * (1 + 4) * 2 * 5  # hosts × effects × (attn_out and heads) × layers × columns
    assert not table.duplicated(["host", "effect", *KEY]).any()
    assert (table["value"] == 0).all() and (table["n"] == 2).all()


def test_batches_do_not_matter(tables: dict[str, Any]) -> None:
    context, found = tables["llama-gqa"]
    small = Context(context.minds, items(3), rows=2)
    table = crossing(small, contrasts_of(small), host="tuned", components=("attn_out",), layers=(1,))
    expected = found["tuned"].query("component == 'attn_out' and layer == 1")
    both = table.merge(expected, on=["contrast", *KEY], suffixes=("", "_x"))
    assert len(both) == len(table) == len(expected) > 0
    np.testing.assert_allclose(both["interaction"], both["interaction_x"], atol=1e-3)


def test_what_is_not_there_is_refused(tables: dict[str, Any]) -> None:
    context, _ = tables["gpt2"]
    for wrong, word in (({"components": ["pattern"]}, "pattern"), ({"host": "other"}, "host"), ({"layers": [7]}, "7")):
        with pytest.raises(UserError, match=word):
            crossing(context, contrasts_of(context), **wrong)


@pytest.fixture(scope="module")
def regrouped(tmp_path_factory: pytest.TempPathFactory) -> Regrouped:
    return regrouped_pair(tmp_path_factory.mktemp("regrouped"))


def test_heads_in_another_order_are_crossed_with_the_bases_own(regrouped: Regrouped, tmp_path: Path) -> None:
    tables = {}
    for name, align in (("tuned", True), ("regrouped", True), ("raw", False)):
        context = regrouped.spec("tuned" if name == "tuned" else "regrouped").load()
        run = context.run = Run.open(tmp_path / name, {})
        study = CrossPatch(components="z", max_traces=4, align=align)
        found = run_study(study, context, run, quiet=True, figures=False).tables
        tables[name] = found["cross_patch"].set_index(["host", "layer", "head", "column", "effect"]).sort_index()
        notes = " ".join(found["cross_patch_alignment"]["note"])
        assert ("is head 0 of base" in notes) == (name == "regrouped")
    assert tables["tuned"]["value"].abs().max() > 0.3
    np.testing.assert_allclose(tables["regrouped"]["value"], tables["tuned"]["value"], atol=5e-3)
    assert (tables["raw"]["value"] - tables["tuned"]["value"]).abs().max() > 0.3
