"""Competitors on pairs in which a single known Unit was changed, against plain models, and their laws."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.models.units import Level, unit_named, units
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.severance.scoring.activations import cka_distance, cosine_distance, prompts_of
from reasoninterp.severance.scoring.competitors import COMPETITORS, Ranking, rank, rank_levels
from reasoninterp.severance.scoring.scores import leaders
from reasoninterp.traces.contrast import Contrast, contrast
from reasoninterp.traces.trace import Format, Trace
from tests.tiny import save_tiny

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\nanswer ", after_answer="\n")
LEVELS: tuple[Level, ...] = ("circuit", "head", "block", "layer")
BY_OUTPUT = [n for n in COMPETITORS if n not in ("weight_norm", "weight_norm_relative", "random")]
Change = Callable[[dict[str, torch.Tensor]], Any]
Bases = Callable[[str], Minds]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Minds with a base of a family; loaded once, and each test derives its tuned mind from it."""

    @cache
    def load(family: str) -> Minds:
        folder = tmp_path_factory.mktemp("bases") / family
        return Minds.load({"base": save_tiny(folder, family, n_layers=3)})

    return load


def contrasts(n: int = 5) -> list[Contrast]:
    """Aligned contrasts of single-token answers, whose chains differ in length from contrast to contrast."""
    out = []
    for k in range(n):
        steps = [(f"now {j}", f"now {j + 1}", "so it is")[: 2 + k % 2] for j in (1 + k % 3, 2 + k % 3)]
        clean = Trace(f"t{k}", f"start with {k}", steps[0], str(1 + k % 3), FORMAT)
        out.append(contrast("propagated", clean, clean.with_steps(steps[1], answer="5" if k % 2 else "4")))
    return out


def pair(minds: Minds, change: Change, rows: int | None = None) -> tuple[Context, str]:
    """A context, and the name of a mind derived from `base`, whose parameters `change` has moved in place."""
    weights = minds.weights("base")
    change(weights)
    name = f"tuned-{len(minds.derived)}"
    minds.derive(name, "base", weights)
    return Context(minds, [Item(c.clean, c) for c in contrasts()], rows=rows), name


def planted(minds: Minds, name: str) -> tuple[Context, str]:
    """A pair in which all weights of one Unit, and no others, were moved."""

    def change(params: dict[str, torch.Tensor]) -> None:
        draw = torch.Generator().manual_seed(5)
        for part in unit_named(minds.body, name).parts:
            view = part.of(params[part.param])
            view.add_(0.5 * torch.randn(view.shape, generator=draw))

    return pair(minds, change)


def head_name(family: str, layer: int) -> str:
    return f"L{layer}.H1" if family == "gpt2" else f"L{layer}.G1"


def both_chains() -> list[Trace]:
    return [t for c in contrasts() for t in (c.clean, c.corrupt)]


def effect(context: Context, mind: str) -> float:
    with context.open(mind) as body:
        return float(contrast_plan(context, contrasts()).effects(body).double().mean())


def plain(minds: Minds, mind: str) -> Any:
    """The Hugging Face model of a mind, never hooked."""
    path = minds.sources["base"].path
    model = AutoModelForCausalLM.from_pretrained(str(path), attn_implementation="eager").eval()
    missing = model.load_state_dict(minds.weights(mind), strict=False)
    assert not missing.unexpected_keys
    return model


# ------------------------------------------------------------------------------------------------ one Unit was changed


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_norm_names_the_unit_that_was_changed_and_only_it(bases: Bases, family: str) -> None:
    unit = f"{head_name(family, 1)}.OV"
    context, tuned = planted(bases(family), unit)
    home = {"circuit": unit, "head": head_name(family, 1), "block": "L1.attn", "layer": "L1"}
    models = plain(context.minds, "base"), plain(context.minds, tuned)
    a, b = (torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in models)
    change = float((b - a).norm())
    for name in ("weight_norm", "weight_norm_relative"):
        rankings = rank_levels(name, context, contrasts(), LEVELS, to_mind=tuned)
        for level, found in rankings.items():
            assert leaders(found.scores) == (home[level],)
            assert [u for u, v in found.scores.items() if v != 0 and not isnan(v)] == [home[level]]
            assert found[2:] == (0, 0, 0)
        if name == "weight_norm":
            assert rankings["layer"].scores["L1"] == pytest.approx(change, rel=1e-5)
            assert rankings["head"].severity == pytest.approx(change / float(a.norm()), rel=1e-5)
        else:
            assert rankings["head"].severity == rankings["block"].scores["L1.attn"]
            own = [
                p.detach().norm()
                for n, p in models[0].named_parameters()
                if ".1." in n and "attn." in n and "norm" not in n
            ]
            assert rankings["block"].scores["L1.attn"] == pytest.approx(
                change / float(torch.stack(own).norm()), rel=1e-5
            )


@pytest.mark.parametrize(("family", "place"), [("llama-gqa", "head"), ("gpt2", "head"), ("qwen3", "mlp")])
def test_nothing_upstream_of_the_changed_unit_is_suspected(bases: Bases, family: str, place: str) -> None:
    name = head_name(family, 1) if place == "head" else "L1.mlp"
    context, tuned = planted(bases(family), name)
    upstream = ["embed", "L0"] + ([f"{name[:-1]}0"] if place == "head" else ["L1.H", "L1.G"])
    for method in ("activation_cosine", "activation_cka", "logit_lens_kl", "cross_patch"):
        scores = rank(method, context, contrasts(), "head", to_mind=tuned).scores
        assert abs(scores[name]) > 1e-4, method
        for other, value in scores.items():
            # A lens sees a layer's attention as a whole.
            if other.startswith(tuple(upstream)) and not (method == "logit_lens_kl" and other.startswith(name[:-1])):
                assert isnan(value) or value == pytest.approx(0, abs=1e-6), (method, other)
    for method in ("activation_cosine", "activation_cka"):
        blocks = rank(method, context, contrasts(), "block", to_mind=tuned).scores
        first = leaders(blocks)
        assert len(first) == 1 and first[0] in ("L1.attn", "L1.mlp", "L2.attn", "L2.mlp")
        assert blocks["L1.attn" if place == "head" else "L1.mlp"] > 0.01


@pytest.mark.parametrize(
    ("family", "place"),
    [("llama-gqa", "head"), ("qwen3", "head"), ("gpt2", "head"), ("gpt2", "attn"), ("qwen3", "mlp"), ("gpt2", "layer")],
)
def test_exchanging_the_output_of_the_only_changed_unit_exchanges_the_minds(
    bases: Bases, family: str, place: str
) -> None:
    name = {"head": head_name(family, 1), "layer": "L1"}.get(place, f"L1.{place}")
    context, tuned = planted(bases(family), name)
    e_base = effect(context, "base")
    lost = e_base - effect(context, tuned)
    assert abs(lost) > 0.01
    # Both directions: what is upstream is the same in either mind, and what is downstream has the same weights.
    level: Level = {"head": "head", "layer": "layer"}.get(place, "block")  # type: ignore[assignment]
    found = rank_levels("cross_patch", context, contrasts(), [level, "circuit"], to_mind=tuned)
    assert found[level].scores[name] == pytest.approx(lost, abs=1e-4)
    assert found[level].severity == pytest.approx(lost / e_base, abs=1e-4)
    assert all(isnan(v) or abs(v) < 1e-4 for u, v in found[level].scores.items() if u.startswith(("embed", "L0")))
    if place == "head":
        circuits = found["circuit"].scores
        assert circuits[f"{name}.QK"] == circuits[f"{name}.OV"] == found[level].scores[name]


# ------------------------------------------------------------------------------------------------------------ the laws


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_identical_minds_leave_nothing_to_suspect(bases: Bases, family: str) -> None:
    context, tuned = pair(bases(family), lambda params: None)
    for name in COMPETITORS[:-1]:
        for level, found in rank_levels(name, context, contrasts(2), LEVELS, to_mind=tuned).items():
            assert found.severity == pytest.approx(0, abs=1e-6), name
            assert all(isnan(v) or v == pytest.approx(0, abs=1e-6) for v in found.scores.values()), name
            assert list(found.scores) == [u.name for u in units(context.minds.body, level)]
            assert sum(not isnan(v) for v in found.scores.values()) >= 3, name


def test_a_change_of_basis_of_the_values_moves_weights_and_no_output(bases: Bases) -> None:
    draw = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q @ torch.diag(torch.linspace(0.5, 2, 8))

    def change(params: dict[str, torch.Tensor]) -> None:
        v, o = params["model.layers.1.self_attn.v_proj.weight"], params["model.layers.1.self_attn.o_proj.weight"]
        v[8:16] = turn @ v[8:16]
        for head in (2, 3):
            mine = slice(8 * head, 8 * head + 8)
            o[:, mine] = o[:, mine] @ turn.inverse()

    context, tuned = pair(bases("llama-gqa"), change)
    assert leaders(rank("weight_norm", context, contrasts(), "circuit", to_mind=tuned).scores) == ("L1.G1.OV",)
    for name in BY_OUTPUT:
        found = rank(name, context, contrasts(), "head", to_mind=tuned)
        assert all(isnan(v) or abs(v) < 1e-4 for v in found.scores.values()), name
        assert abs(found.severity) < 1e-4, name


def test_levels_together_are_levels_alone_whatever_the_batch(bases: Bases) -> None:
    context, tuned = planted(bases("llama-gqa"), "L1.attn")
    small = Context(context.minds, context.items, rows=4)
    for name in COMPETITORS:
        together = rank_levels(name, context, contrasts(3), ["layer", "head"], to_mind=tuned)
        for level in ("layer", "head") if name == "cross_patch" else ("head",):
            alone, found = rank(name, small, contrasts(3), level, to_mind=tuned), together[level]
            assert alone.scores == pytest.approx(found.scores, abs=1e-5, nan_ok=True), (name, level)
            assert alone.severity == pytest.approx(found.severity, abs=1e-5)
            assert alone[2:] == found[2:], name
            if name == "cross_patch":  # once as they are, then each output both ways
                assert alone.forward_passes == 2 + 2 * {"layer": 3 + 1, "head": 3 * 3 + 1}[level]


def test_units_finer_than_an_output_share_its_score(bases: Bases) -> None:
    context, tuned = planted(bases("gpt2"), "L1.mlp")
    found = rank_levels("activation_cosine", context, contrasts(), ["fine", "block", "head"], to_mind=tuned)
    fine, blocks, heads = (found[level].scores for level in ("fine", "block", "head"))
    assert fine["L1.mlp.N0"] == fine["L1.mlp.N7"] == blocks["L1.mlp"] > 0.01
    assert fine["L2.H3.QK"] == fine["L2.H3.OV"] == heads["L2.H3"] > 0
    assert isnan(fine["L1.mlp.b_out"]) and isnan(heads["L1.attn.b_O"]) and isnan(blocks["L1.norms"])


def test_random_depends_on_its_seed_alone(bases: Bases) -> None:
    context, tuned = pair(bases("llama-gqa"), lambda params: None)
    a, b, other = (rank("random", context, contrasts(), "circuit", to_mind=tuned, seed=s) for s in (1, 1, 2))
    assert a == b != other
    tops = [leaders(rank("random", context, contrasts(), "block", seed=s).scores)[0] for s in range(200)]
    share = [tops.count(u.name) / 200 for u in units(context.minds.body, "block")]
    assert max(share) < 3 / len(share) and min(share) > 0


def test_wrong_arguments_are_named(bases: Bases) -> None:
    context, tuned = pair(bases("llama-gqa"), lambda params: None)
    with pytest.raises(UserError, match="activation_cosine"):
        rank("cosine", context, contrasts(), "block", to_mind=tuned)
    with pytest.raises(UserError, match="contrasts"):
        rank("cross_patch", context, [], "block", to_mind=tuned)
    with pytest.raises(UserError, match="'nobody' is not loaded"):
        rank("cross_patch", context, contrasts(), "block", to_mind="nobody")


# ------------------------------------------------------------------------------------------------- against plain models


@pytest.mark.parametrize("family", FAMILIES)
def test_logit_lens_increases_sum_to_the_divergence_of_the_answers(bases: Bases, family: str) -> None:
    context, tuned = planted(bases(family), "L1")
    found = rank_levels("logit_lens_kl", context, contrasts(), ["block", "layer"], to_mind=tuned)
    expected, models = [], (plain(context.minds, "base"), plain(context.minds, tuned))
    for trace in both_chains():
        ids = torch.tensor([context.encode(trace).prompt_ids])
        with torch.no_grad():
            p, q = (m(ids).logits[0, -1].double().log_softmax(-1) for m in models)
        expected.append(float((p.exp() * (p - q)).sum()))
    assert np.mean(expected) > 0.01
    for ranking in found.values():
        assert ranking.severity == pytest.approx(np.mean(expected), rel=1e-3)
        told = [v for u, v in ranking.scores.items() if not isnan(v) and u != "pos_embed"]  # which shares embed's
        assert sum(told) == pytest.approx(ranking.severity, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mass_is_that_of_the_plain_models(bases: Bases, family: str) -> None:
    context, tuned = planted(bases(family), f"{head_name(family, 1)}.QK")
    found = rank_levels("attention_mass", context, contrasts(), ["head", "block"], to_mind=tuned)
    mass = []
    for mind in ("base", tuned):
        model, rows = plain(context.minds, mind), []
        for trace in both_chains():
            tokens = context.encode(trace)
            with torch.no_grad():
                maps = model(torch.tensor([tokens.prompt_ids]), output_attentions=True).attentions
            inside = [k for s in tokens.steps for k in range(s.start, s.stop)]
            rows.append(torch.stack([m[0, :, -1, inside].double().sum(-1) for m in maps]))
        mass.append(torch.stack(rows).mean(0))
    lost = mass[0] - mass[1]  # [layer, head]
    mine = [1] if family == "gpt2" else [2, 3]
    assert abs(float(lost[1, mine].sum())) > 1e-3
    assert found["head"].scores[head_name(family, 1)] == pytest.approx(float(lost[1, mine].sum()), abs=1e-5)
    assert found["block"].scores["L2.attn"] == pytest.approx(float(lost[2].sum()), abs=1e-5)
    assert found["block"].severity == pytest.approx(float(lost.sum() / mass[0].sum()), abs=1e-5)
    assert isnan(found["block"].scores["L1.mlp"]) and isnan(found["block"].scores["embed"])


def test_attributions_scale_with_the_unembedding(bases: Bases) -> None:
    # The margin of single tokens is linear in the unembedding: A(tuned) is s A(base), and the score |1 − s| |A(base)|.
    def scaled(s: float) -> dict[Level, Ranking]:
        context, tuned = pair(bases("llama-gqa"), lambda params: params["lm_head.weight"].mul_(s))
        return rank_levels("attribution_difference", context, contrasts(), ["block", "head"], to_mind=tuned)

    none, twice, four = scaled(0.0), scaled(2.0), scaled(4.0)
    for level in ("block", "head"):
        scores = {u: v for u, v in none[level].scores.items() if not isnan(v)}
        assert len(scores) == {"block": 7, "head": 10}[level] and min(scores.values()) > 1e-5
        assert {u: twice[level].scores[u] for u in scores} == pytest.approx(scores, rel=1e-3, abs=1e-5)
        assert {u: four[level].scores[u] / 3 for u in scores} == pytest.approx(scores, rel=1e-3, abs=1e-5)
    assert [f["block"].severity for f in (none, twice, four)] == pytest.approx([1, 1, 3], rel=1e-3)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_attribution_of_the_only_group_that_writes_is_that_of_the_attention(bases: Bases, family: str) -> None:
    minds = bases(family)
    width = minds.body.n_heads // minds.body.n_kv_heads * minds.body.d_head

    def silence(params: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            params[f"model.layers.{layer}.self_attn.o_proj.weight"][:, :width] = 0

    def blind(params: dict[str, torch.Tensor]) -> None:
        silence(params)
        params["lm_head.weight"].zero_()  # all attributions of this mind are 0, so that the score is |A| of the other

    _, half = pair(minds, silence)
    context, blinded = pair(minds, blind)
    found = rank_levels(
        "attribution_difference", context, contrasts(), ["block", "head"], from_mind=half, to_mind=blinded
    )
    for layer in range(3):
        both = found["head"].scores[f"L{layer}.G0"], found["head"].scores[f"L{layer}.G1"]
        assert both == pytest.approx((0, found["block"].scores[f"L{layer}.attn"]), rel=1e-4, abs=1e-6)
        assert both[1] > 1e-4


def test_attribution_leaves_contrasts_of_unequal_length_out_and_counts(bases: Bases) -> None:
    context, tuned = planted(bases("llama-gqa"), "L1.attn")
    odd = contrasts(1)[0]
    longer = contrast("propagated", odd.clean, odd.clean.with_steps(("now 2", "and then now 3"), answer="4"))
    some = rank("attribution_difference", context, [longer, *contrasts()], "block", to_mind=tuned)
    every = rank("attribution_difference", context, contrasts(), "block", to_mind=tuned)
    assert some.n == every.n == 5 and some.scores == pytest.approx(every.scores, nan_ok=True)
    none = rank("attribution_difference", context, [longer], "block", to_mind=tuned)
    assert none.n == 0 and isnan(none.severity) and all(isnan(v) for v in none.scores.values())


# ---------------------------------------------------------------------------------------------------------- distances


def test_distances_by_hand_and_by_another_formula(bases: Bases) -> None:
    context, _ = pair(bases("llama-gqa"), lambda params: None)
    points = prompts_of(context, contrasts())
    n = len(points.row)
    assert points.weight.sum() == pytest.approx(10) and points.last.sum() == 10  # two prompts a contrast
    assert points.weight[points.last].sum() == pytest.approx(5)  # half of the weight is the answer position's
    a, b = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(0))
    cosines = 1 - torch.nn.functional.cosine_similarity(a, b)
    assert cosine_distance(points, a, b) == pytest.approx(float((cosines * points.weight).sum() / 10), abs=1e-5)
    assert cosine_distance(points, a, 3 * a) == pytest.approx(0, abs=1e-9)
    assert cosine_distance(points, a, -a) == pytest.approx(2)
    zero = torch.zeros_like(a)
    assert (cosine_distance(points, zero, zero), cosine_distance(points, zero, b)) == (0, 1)

    def by_gram_matrices(x: torch.Tensor, y: torch.Tensor) -> float:
        k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
        return 1 - float((k * m).sum() / (k.norm() * m.norm()))

    expected = (
        by_gram_matrices(a[points.last], b[points.last]) + by_gram_matrices(a[~points.last], b[~points.last])
    ) / 2
    assert cka_distance(points, a, b) == pytest.approx(expected, abs=1e-5) and expected > 0.1
    rotated = 2 * a @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q + 1
    assert cka_distance(points, a, rotated) == pytest.approx(0, abs=1e-5)
    assert (cka_distance(points, zero, zero), cka_distance(points, a, zero)) == (0, 1)
