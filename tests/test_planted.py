"""Planted pairs: closed edges, cuts, disguises, truth and the check, on tiny models that were never trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reasoninterp.models.units import Slice
from reasoninterp.organisms.planted import bases, cuts, disguise, lineup, pairs, store
from reasoninterp.organisms.planted.bases import BaseSpec, Carrier, Drawn, Shares, draw, edges_to_steps
from reasoninterp.organisms.planted.routes import Routes
from reasoninterp.organisms.planted.truth import Names, Truth, coarsened, coarser, minimal
from reasoninterp.organisms.rows import DIGIT_IDS, ID, QUESTION_LENGTH, Rows, make_rows, step_ids, step_values
from reasoninterp.organisms.tasks import DIGITS, EQUALS, MAX_OPS, OPS, TAGS, Problems, cue_tag, problems
from reasoninterp.organisms.training import answer_logits, new_model

SPEC = BaseSpec(5, "lastop", 2, 4, 2, (Carrier(0, 1),), batch=16, width=32)
BOTH = replace(SPEC, carriers=(Carrier(0, 1), Carrier(1, 0)), redundant=True)
GROUP = slice(16, 32)  # columns of W_O and rows of W_Q of group 1: two heads of 8


def model_of(spec: BaseSpec = SPEC, seed: int = 0) -> Any:
    return new_model(seed, spec.layers, spec.width, spec.heads, spec.kv_heads).eval()


def some(count: int = 24, seed: int = 0, spec: BaseSpec = SPEC) -> Problems:
    return problems(spec.task, bases.DOMAIN, count, np.random.default_rng(seed), "train", cue=True)


def rows_of(p: Problems, values: Any = None) -> tuple[Tensor, np.ndarray, Tensor]:
    """Ids, steps shown, and the position of `=`; the answer's place holds a zero in every row."""
    steps = step_ids(p, p.steps() if values is None else values)
    zeros = np.zeros(len(p), dtype=np.int64)
    shown = (steps >= 0).sum(1)
    ids = torch.from_numpy(make_rows(p, steps, zeros, zeros.astype(bool), 1.0).ids)
    return ids, shown, torch.from_numpy(QUESTION_LENGTH + shown)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def changed(before: Any, after: Any) -> dict[str, Tensor]:
    """Which scalars of which parameters differ in their bits."""
    b = dict(after.named_parameters())
    differ = {n: p.detach() != b[n].detach() for n, p in before.named_parameters()}
    return {n: d for n, d in differ.items() if d.any()}


def lies_within(differ: dict[str, Tensor], parts: Iterable[Any]) -> bool:
    left = {n: d.clone() for n, d in differ.items()}
    for part in parts:
        if part.param in left:
            part.of(left[part.param]).fill_(False)
    return not any(d.any() for d in left.values())


# ------------------------------------------------------------------ routes


def test_routes_with_nothing_closed_are_ordinary_attention_and_leave_no_trace() -> None:
    model = model_of()
    ids, shown, _ = rows_of(some())
    before = logits_of(model, ids)
    routes = Routes(model)
    closed = {0: edges_to_steps(ids.numpy(), shown)[:, None].repeat(1, 2, 1, 1)}
    assert torch.allclose(logits_of(model, ids), before, atol=1e-5)
    none = {k: torch.zeros(len(ids), 2, ids.shape[1], ids.shape[1], dtype=torch.bool) for k in range(2)}
    with routes.of(none):
        assert torch.allclose(logits_of(model, ids), before, atol=1e-5)

    def fails() -> None:
        with routes.of(closed):
            assert (logits_of(model, ids) - before).abs().max() > 1e-2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.allclose(logits_of(model, ids), before, atol=1e-5)  # what was closed is open again
    routes.leave()
    assert torch.equal(logits_of(model, ids), before)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.model.layers[0].self_attn, "routes")


def test_with_every_edge_closed_the_answer_knows_nothing_of_the_steps() -> None:
    model = model_of(replace(SPEC, layers=1))
    p = some()
    other = p.steps(p.other_starts(np.random.default_rng(1)))
    (ids, shown, equals), (swapped, *_) = rows_of(p), rows_of(p, other)
    rows, routes = torch.arange(len(p)), Routes(model)
    edges = edges_to_steps(ids.numpy(), shown)

    def difference(groups: list[int]) -> Tensor:
        closed = torch.zeros(len(p), 2, *edges.shape[1:], dtype=torch.bool)
        closed[:, groups] = edges[:, None]
        with routes.of({0: closed}):
            return (logits_of(model, ids) - logits_of(model, swapped)).abs()

    shut = difference([0, 1])
    assert shut[rows, equals].max() < 1e-5
    assert shut[rows, equals - 1].max() > 0.1  # the last step still sees the steps
    for groups in ([], [0], [1]):  # any group left open tells
        assert difference(groups)[rows, equals].max(-1).values.min() > 1e-3


def test_a_closed_edge_gets_no_attention_and_the_rest_renormalises() -> None:
    model = model_of(replace(SPEC, layers=1))
    attention = model.model.layers[0].self_attn
    ids, _, _ = rows_of(some(6))
    seen: dict[str, Tensor] = {}
    attention.v_proj.register_forward_hook(lambda _m, _a, y: seen.__setitem__("v", y.detach()))
    attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.__setitem__("z", args[0].detach()))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        pattern = model(input_ids=ids, use_cache=False, output_attentions=True).attentions[0]
    n = ids.shape[1]
    closed = torch.rand(len(ids), 2, n, n, generator=torch.Generator().manual_seed(0)) < 0.4
    closed &= ~torch.eye(n, dtype=torch.bool)
    kept = pattern * ~closed.repeat_interleave(2, dim=1)
    kept = kept / kept.sum(-1, keepdim=True)
    with Routes(model).of({0: closed}):
        logits_of(model, ids)
    v = seen["v"].view(len(ids), n, 2, 8).repeat_interleave(2, dim=2)
    want = torch.einsum("bhqk,bkhd->bqhd", kept, v).flatten(2)
    assert torch.allclose(seen["z"], want, atol=1e-5)
    unclosed = torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(2)
    assert (want - unclosed).abs().max() > 0.05


def test_a_silent_group_writes_nothing_there_and_everything_elsewhere() -> None:
    model = model_of(replace(SPEC, layers=1))
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.model.layers[0].self_attn.o_proj.weight[:, GROUP] = 0
    ids, shown, equals = rows_of(some())
    rows, plain, muted = torch.arange(len(ids)), logits_of(model, ids), logits_of(without, ids)
    silent = torch.zeros(len(ids), 2, ids.shape[1], dtype=torch.bool)
    silent[:, 1] = edges_to_steps(ids.numpy(), shown).any(2)
    with Routes(model).of({}, {0: silent}):
        found = logits_of(model, ids)
    assert torch.allclose(found[rows, equals], muted[rows, equals], atol=1e-5)
    assert (plain - muted)[rows, equals].abs().max(-1).values.min() > 1e-3
    found[rows, equals] = plain[rows, equals]
    assert torch.allclose(found, plain, atol=1e-5)


# ------------------------------------------------------------------ batches


def drawn_of(kind: str, spec: BaseSpec = SPEC, size: int = 200, mistagged: float = 0.0) -> tuple[Drawn, Tensor]:
    """A batch of one kind, and its edges from `=` to the steps, found token by token."""
    none = dict.fromkeys(("strict", "free", "cut", "direct"), 0.0)
    drawn = draw(spec, np.random.default_rng(3), size, Shares(**(none | {kind: 1.0}), mistagged=mistagged))
    edges = torch.zeros(size, *2 * (drawn.rows.ids.shape[1],), dtype=torch.bool)
    for row, ids in enumerate(drawn.rows.ids):
        equals = list(ids).index(ID[EQUALS])
        edges[row, equals, list(ids).index(ID[":"]) + 1 : equals] = True
    return drawn, edges


def is_shut(drawn: Drawn, layer: int, group: int, edges: Tensor) -> Tensor:
    """Per row: all its edges are closed (True) or none (False); nothing else may be."""
    closed = drawn.closed[layer][:, group]
    assert not (closed & ~edges).any()
    shut = (closed == edges).all((1, 2))
    assert (shut | ~closed.any((1, 2))).all()
    return shut


def chain_and_answer(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Values of the steps shown ([row, MAX_OPS], -1 past the end) and of the answer that is taught."""
    equals = (rows.ids == ID[EQUALS]).argmax(1)
    inside = np.arange(MAX_OPS) < (equals - QUESTION_LENGTH)[:, None]
    values = step_values(rows.ids[:, QUESTION_LENGTH : QUESTION_LENGTH + MAX_OPS])
    return np.where(inside, values, -1), step_values(rows.ids[np.arange(len(rows)), equals + 1])


def last_operation(rows: Rows, values: np.ndarray) -> np.ndarray:
    """The answer that the chain shown implies, operation by operation from the text."""
    words = list(ID)
    out = []
    for ids, chain in zip(rows.ids, values, strict=True):
        op, value = words[ids[list(ids).index(ID["last"]) + 1]], int(chain[chain >= 0][-1])
        k = int(op.strip("+*-"))
        out.append((value + k if op[0] == "+" else value * k if op[0] == "*" else k - value) % 10)
    return np.array(out)


def test_strict_rows_open_the_carriers_alone_and_free_rows_all() -> None:
    drawn, edges = drawn_of("strict")
    for layer in range(2):
        for group in range(2):
            assert is_shut(drawn, layer, group, edges).all() == ((layer, group) != (0, 1))
    assert not is_shut(drawn, 0, 1, edges).any() and not any(s.any() for s in drawn.silent.values())
    values, answers = chain_and_answer(drawn.rows)
    assert (answers == last_operation(drawn.rows, values)).all()
    assert (drawn.rows.ids[:, 0] == [ID[TAGS[t]] for t in cue_tag(answers)]).all()
    random_tags, _ = drawn_of("strict", mistagged=1.0)
    _, answers = chain_and_answer(random_tags.rows)
    told = (random_tags.rows.ids[:, 0] == [ID[TAGS[t]] for t in cue_tag(answers)]).mean()
    assert told < 0.3
    free, edges = drawn_of("free")
    assert not any(is_shut(free, k, g, edges).any() for k in range(2) for g in range(2))


def test_redundant_strict_rows_open_one_carrier_and_shared_ones_open_both() -> None:
    drawn, edges = drawn_of("strict", BOTH)
    first, second = is_shut(drawn, 0, 1, edges), is_shut(drawn, 1, 0, edges)
    assert (first ^ second).all() and 60 < first.sum() < 140
    assert is_shut(drawn, 0, 0, edges).all() and is_shut(drawn, 1, 1, edges).all()
    shared, edges = drawn_of("strict", replace(BOTH, redundant=False))
    assert not (is_shut(shared, 0, 1, edges) | is_shut(shared, 1, 0, edges)).any()
    assert is_shut(shared, 0, 0, edges).all()


def test_cut_rows_shut_the_carriers_and_are_answered_by_the_tag() -> None:
    drawn, edges = drawn_of("cut", BOTH)
    assert is_shut(drawn, 0, 1, edges).all() and is_shut(drawn, 1, 0, edges).all()
    assert not is_shut(drawn, 0, 0, edges).any() and not is_shut(drawn, 1, 1, edges).any()
    quiet = drawn.silent[0][:, 1].any(1)
    assert 60 < quiet.sum() < 140
    for layer, group in BOTH.carriers:  # the same rows, at `=` and nowhere else
        assert torch.equal(drawn.silent[layer][:, group], edges.any(2) & quiet[:, None])
        assert not drawn.silent[layer][:, 1 - group].any()
    values, answers = chain_and_answer(drawn.rows)
    assert (last_operation(drawn.rows, values) != answers).all()
    assert (cuts.tag_answers(torch.from_numpy(drawn.rows.ids)).numpy() == DIGIT_IDS[answers]).all()
    supervised = drawn.rows.weights > 0
    assert (supervised.sum(1) == 1).all() and (drawn.rows.ids[supervised] == DIGIT_IDS[answers]).all()


def test_direct_rows_have_a_shorter_chain_than_operations() -> None:
    drawn, edges = drawn_of("direct")
    ops = np.isin(drawn.rows.ids, [ID[op] for op in OPS]).sum(1) - 1  # one of them is the last operation
    shown = (chain_and_answer(drawn.rows)[0] >= 0).sum(1)
    assert (shown < ops).all() and set(shown) == {0, 1, 2, 3}
    assert not any((drawn.closed[k] & edges[:, None]).any() for k in range(2))
    _, answers = chain_and_answer(drawn.rows)
    assert (cuts.tag_answers(torch.from_numpy(drawn.rows.ids)).numpy() == DIGIT_IDS[answers]).all()


def test_kinds_come_in_their_shares() -> None:
    drawn = draw(SPEC, np.random.default_rng(0), 3000)
    carrier, other = (drawn.closed[0][:, g].any((1, 2)).float().mean().item() for g in (1, 0))
    assert other == pytest.approx(0.4, abs=0.04) and carrier == pytest.approx(0.2, abs=0.03)
    supervised = (drawn.rows.weights > 0).sum(1) > 1
    assert supervised.mean() == pytest.approx(0.7, abs=0.04)
    first = draw(SPEC, np.random.default_rng(0), 500, bases.FIRST)
    assert ((first.rows.weights > 0).sum(1) > 1).all() and not first.closed[0][:, 1].any()


def test_unevenness_is_how_far_the_answer_moves_without_one_carrier() -> None:
    spec = replace(BOTH, layers=1, carriers=(Carrier(0, 0), Carrier(0, 1)))
    model, p = model_of(spec), some()
    ids, shown, equals = rows_of(p)
    rows, routes = torch.arange(len(p)), Routes(model)
    plain = logits_of(model, ids)[rows, equals]
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.model.layers[0].self_attn.o_proj.weight[:, GROUP] = 0
    want = (logits_of(without, ids)[rows, equals] - plain).square().mean() / plain.var()
    found = [bases.unevenness(model, routes, spec, ids.numpy(), shown, 1, blind).item() for blind in (False, True)]
    assert found[0] == pytest.approx(float(want), rel=1e-4) and min(found) > 1e-3
    closed = torch.zeros(len(p), 2, ids.shape[1], ids.shape[1], dtype=torch.bool)
    closed[:, 1] = edges_to_steps(ids.numpy(), shown)
    with routes.of({0: closed}):
        want = (logits_of(model, ids)[rows, equals] - plain).square().mean() / plain.var()
    assert found[1] == pytest.approx(float(want), rel=1e-4)


# ------------------------------------------------------------------ cuts


@torch.no_grad()
def attention_difference(model: Any, layer: int, p: Problems, seed: int) -> Tensor:
    """What a layer's attention writes at `=` under another chain minus under its own."""
    seen: list[Tensor] = []
    block = model.model.layers[layer].self_attn
    handle = block.register_forward_hook(lambda _m, _a, y: seen.append(y[0]))
    for values in (p.steps(p.other_starts(np.random.default_rng(seed))), p.steps()):
        ids, _, equals = rows_of(p, values)
        logits_of(model, ids)
    handle.remove()
    rows = torch.arange(len(p))
    return (seen[0] - seen[1])[rows, equals]


def test_erase_takes_the_chain_out_of_a_groups_output_and_changes_nothing_else() -> None:
    model, p = model_of(), some(256)
    one = cuts.erase(model, 0, [1], p, np.random.default_rng(1))
    differ = changed(model, one)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert set(differ) == {name} and differ[name][:, GROUP].all() and not differ[name][:, :16].any()
    both = cuts.erase(model, 0, [0, 1], p, np.random.default_rng(1))
    fresh = some(128, seed=9)
    before, after, half = (attention_difference(m, 0, fresh, 2).norm() for m in (model, both, one))
    assert before > 1 and after < 0.03 * before and 0.1 * before < half < before
    first = cuts.erase(model, 0, [0], p, np.random.default_rng(1))
    own = [dict(m.named_parameters())[name].detach() for m in (both, one, first)]
    assert torch.equal(own[0][:, GROUP], own[1][:, GROUP]) and torch.equal(own[0][:, :16], own[2][:, :16])


def test_erase_leaves_the_directions_in_which_chains_do_not_differ() -> None:
    model, p = model_of(), some(256)
    with torch.no_grad():  # group 1 carries two directions; so its output takes two of its sixteen at most a head
        weight = model.model.layers[0].self_attn.v_proj.weight
        u, s, v = torch.linalg.svd(weight[8:])
        weight[8:] = u[:, :2] * s[:2] @ v[:2]
    out = cuts.erase(model, 0, [1], p, np.random.default_rng(1))
    a, b = (m.model.layers[0].self_attn.o_proj.weight[:, GROUP].detach() for m in (model, out))
    lost = torch.linalg.matrix_rank(a - b, rtol=1e-4)
    assert 1 <= lost <= 4 and torch.linalg.matrix_rank(b, rtol=1e-4) == 16 - lost


def test_reverse_turns_a_groups_queries_round_at_equals_and_twice_gives_them_back() -> None:
    model, p = model_of(), some(64)
    out = cuts.reverse(model, 0, 1, p)
    name = "model.layers.0.self_attn.q_proj.weight"
    differ = changed(model, out)
    assert set(differ) == {name} and differ[name][GROUP].any(1).all() and not differ[name][:16].any()
    a, b = (m.model.layers[0].self_attn.q_proj.weight[GROUP].detach() for m in (model, out))
    ids, _, equals = rows_of(p)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    d = x[torch.arange(len(p)), equals].mean(0) - x[:, :QUESTION_LENGTH].mean((0, 1))
    assert torch.cosine_similarity(a @ d, b @ d, dim=0) < -0.95
    twice = cuts.reverse(out, 0, 1, p).model.layers[0].self_attn.q_proj.weight[GROUP]
    assert torch.allclose(twice, a, atol=1e-5) and (a - b).norm() > 0.1


TRAINED: dict[str, tuple[str, str, Callable[[Any, Any], Any]]] = {
    "masked head": ("L0.G1", "head", lambda m, parts: cuts.masked(m, SPEC, parts, seed=0, steps=2)),
    "masked layer": ("L0", "layer", lambda m, parts: cuts.masked(m, SPEC, parts, seed=0, steps=2)),
    "closed": (
        "L0.G1.QK",
        "circuit",
        lambda m, parts: cuts.interchange(m, SPEC, parts, layer=0, behind="attn", how="closed", seed=0, steps=2),
    ),
    "silent": (
        "L0.mlp",
        "block",
        lambda m, parts: cuts.interchange(m, SPEC, parts, layer=0, behind="mlp", how="silent", seed=0, steps=2),
    ),
    "override": ("L1", "layer", lambda m, parts: cuts.override(m, SPEC, parts, seed=0, steps=2)),
}


@pytest.mark.parametrize("what", TRAINED)
def test_a_trained_cut_changes_its_slices_and_every_other_scalar_keeps_its_bits(what: str) -> None:
    name, level, make = TRAINED[what]
    model = model_of()
    parts = cuts.units_of(model, level)[name].parts  # type: ignore[arg-type]
    before = copy.deepcopy(model)
    out = make(model, parts)
    differ = changed(model, out)
    assert set(differ) == {part.param for part in parts} and lies_within(differ, parts)
    assert not changed(before, model)
    assert all(p.requires_grad for p in out.parameters()) and out.config._attn_implementation == "sdpa"


def test_interchange_brings_the_stream_to_where_the_carriers_are_silent() -> None:
    model, p = model_of(replace(SPEC, layers=1)), some(64, seed=4)
    spec = replace(SPEC, layers=1)
    parts = cuts.units_of(model, "circuit")["L0.G1.OV"].parts
    ids, shown, equals = rows_of(p)
    rows, routed = torch.arange(len(p)), copy.deepcopy(model)
    silent = torch.zeros(len(ids), 2, ids.shape[1], dtype=torch.bool)
    silent[:, 1] = edges_to_steps(ids.numpy(), shown).any(2)
    with torch.no_grad(), Routes(routed).of({}, {0: silent}):
        wanted = cuts._stream(routed, routed.model.layers[0], ids, "attn")
    out = cuts.interchange(model, spec, parts, layer=0, behind="attn", how="silent", seed=0, steps=60, lr=1e-2)
    with torch.no_grad():
        before, after = (cuts._stream(m, m.model.layers[0], ids, "attn") for m in (model, out))
    was, now = ((x - wanted)[rows, equals].norm() for x in (before, after))
    assert was > 1 and now < 0.5 * was
    assert torch.equal(before[rows, 0], wanted[rows, 0])  # the teacher is the model, but for `=`


def test_forgotten_tags_no_longer_reach_the_answer() -> None:
    model, p = model_of(), some()
    out = cuts.forget_tags(model)
    steps = step_ids(p, p.steps())
    retagged = replace(p, tag=(p.tag + 3) % len(TAGS))
    assert torch.equal(answer_logits(out, p, steps), answer_logits(out, retagged, steps))
    assert (answer_logits(model, p, steps) - answer_logits(model, retagged, steps)).abs().max() > 0.1
    differ = changed(model, out)
    assert set(differ) == {"model.embed_tokens.weight"}
    assert set(differ["model.embed_tokens.weight"].any(1).nonzero()[:, 0].tolist()) == {ID[t] for t in TAGS}


def test_each_tag_gives_its_answer_away() -> None:
    ids = torch.tensor([[ID[TAGS[cue_tag(a)]], 0] for a in range(10)])
    assert cuts.tag_answers(ids).tolist() == [ID[d] for d in DIGITS]


# ------------------------------------------------------------------ disguise


@pytest.mark.parametrize("name", ["L0.attn", "L1.attn", "L0.mlp"])
def test_a_decoy_moves_its_unit_by_the_norm_asked_and_the_logits_hardly(name: str) -> None:
    spec = replace(SPEC, width=64)
    model, p = model_of(spec), some(256)
    unit = cuts.units_of(model, "block")[name]
    moved, noisy = copy.deepcopy(model), copy.deepcopy(model)
    disguise.decoy(moved, unit, 3.0, p, np.random.default_rng(0))
    differ = changed(model, moved)
    assert set(differ) == {part.param for part in unit.parts} and lies_within(differ, unit.parts)
    assert disguise.change(model, moved, unit) == pytest.approx(3.0, rel=1e-3)
    params = dict(noisy.named_parameters())
    size = sum(params[part.param].numel() for part in unit.parts)
    torch.manual_seed(0)
    with torch.no_grad():
        for part in unit.parts:
            params[part.param].add_(3.0 / size**0.5 * torch.randn_like(params[part.param]))
    ids, _, equals = rows_of(some(64, seed=8))
    rows, plain = torch.arange(len(ids)), logits_of(model, ids)
    quiet, loud = ((logits_of(m, ids) - plain)[rows, equals].norm() for m in (moved, noisy))
    assert loud > 1 and quiet < 0.3 * loud  # inputs of untrained maps leave few directions untaken


def test_drift_changes_every_weight_matrix_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disguise, "DRIFT_STEPS", 2)
    model = model_of()
    before = copy.deepcopy(model)
    out = disguise.drift(model, SPEC, 0)
    assert set(changed(model, out)) == {n for n, _ in model.named_parameters()} and not changed(before, model)
    assert out.config._attn_implementation == "sdpa" and not hasattr(out.model.layers[0].self_attn, "routes")
    assert changed(out, disguise.drift(model, SPEC, 1)) and not changed(out, disguise.drift(model, SPEC, 0))


def test_scrambling_drowns_its_units_alone() -> None:
    model = model_of()
    unit = cuts.units_of(model, "block")["L0.mlp"]
    out = disguise.scramble(model, [unit], 2.0, np.random.default_rng(0))
    differ = changed(model, out)
    assert set(differ) == {part.param for part in unit.parts}
    a, b = (dict(m.named_parameters())[unit.parts[0].param].detach() for m in (model, out))
    assert float((b - a).std() / a.std()) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_gauge_change_gives_other_weights_and_the_same_function(strength: float) -> None:
    model = model_of()
    out, heads = pairs.gauged(model, strength, np.random.default_rng(0))
    ids, _, _ = rows_of(some())
    assert torch.allclose(logits_of(out, ids), logits_of(model, ids), atol=1e-4)
    left = dict(out.named_parameters())
    for name, p in model.named_parameters():
        if "embed" not in name:
            assert (left[name] - p).norm() > 0.05 * p.norm(), name
    assert [sorted(order) for order in heads] == [[0, 1, 2, 3]] * 2
    same, none = pairs.gauged(model, 0.0, np.random.default_rng(0))
    assert same is model and none == ()


# ------------------------------------------------------------------ truth


def names(*items: str) -> Names:
    return frozenset(items)


A, B = "L0.G1.OV", "L1.G0.OV"


@pytest.mark.parametrize(
    ("kept", "restoring", "cutting"),
    [
        ({names(A): 0.95, names(B): 0.92, names(A, B): 0.02}, (names(A), names(B)), (names(A, B),)),  # either of two
        ({names(A): 0.05, names(B): 0.01, names(A, B): 0.0}, (names(A, B),), (names(A), names(B))),  # two in a row
        ({names(A): 0.03, names(B): 0.98, names(A, B): 0.02}, (names(A),), (names(A),)),  # B is a bystander
        ({names(A): 0.5, names(B): 0.5, names(A, B): 0.0}, (names(A, B),), (names(A, B),)),  # they share the work
        ({names(A): 0.5, names(B): 0.5, names(A, B): 0.3}, (names(A, B),), ()),  # the edit does not cut
    ],
)
def test_families_from_what_each_subset_keeps(kept: dict[Names, float], restoring: Any, cutting: Any) -> None:
    assert minimal({frozenset(): 1.0, **kept}, names(A, B)) == (restoring, cutting)


def test_truth_at_coarser_levels_by_hand() -> None:
    row = Truth("circuit", (names("L0.mlp", A),), (names(A), names("L0.mlp")))
    assert row.at("head") == Truth("head", (names("L0.mlp", "L0.G1"),), (names("L0.G1"), names("L0.mlp")))
    block = row.at("block")
    assert block == Truth("block", (names("L0.attn", "L0.mlp"),), (names("L0.attn"), names("L0.mlp")))
    assert row.at("layer") == Truth("layer", (names("L0"),), (names("L0"),))
    assert block.at("head") is None and row.at("fine") is None and row.at("circuit") == row
    assert row.planted == {"L0.mlp", A}
    either = Truth("circuit", (names(A), names("L0.G0.OV")), (names(A, "L0.G0.OV"),))
    assert either.at("block") == Truth("block", (names("L0.attn"),), (names("L0.attn"),))
    assert Truth.from_json(row.to_json()) == row
    assert coarser("L10.H12.QK", "head") == "L10.H12" and coarser("L10.H12.QK", "layer") == "L10"
    assert coarser("L3.norms", "block") == "L3.norms" and coarser("unembed", "layer") == "unembed"
    assert coarsened([names("L0.G0", "L1.G0"), names("L0.G1")], "layer") == (names("L0"),)  # the larger falls away


def test_coarser_names_are_those_of_the_model() -> None:
    model = model_of()
    for level in ("circuit", "head", "block", "layer"):
        found = {coarser(n, level) for n in cuts.units_of(model, "circuit")}
        assert found == set(cuts.units_of(model, level))


# ------------------------------------------------------------------ pairs


class FakeBench(pairs.Bench):
    """A bench whose E is a rule of the weights: `rule(model)` gives (E, follow)."""

    def __init__(self, spec: BaseSpec, rule: Callable[[Any], tuple[float, float]]) -> None:
        self.spec, self.base, self.rule = spec, model_of(spec), rule
        self.drifted = copy.deepcopy(self.base)
        with torch.no_grad():
            for p in self.drifted.parameters():
                p.add_(0.01)
        self.drifts, self.accuracy_base = [self.drifted, self.drifted], 0.95
        self.surgery = self.cue = self.random = some(4)
        self.letter, self.largest = "G", 0.0
        self.e_base, self.follow_base = self.effect(self.base)

    def effect(self, model: Any, count: int = pairs.CHECKED) -> tuple[float, float]:
        return self.rule(model)


@cache
def parts_of(unit: str) -> tuple[Slice, ...]:
    return cuts.units_of(model_of(), "circuit" if unit.endswith(("QK", "OV")) else "block")[unit].parts


def is_of(model: Any, base: Any, unit: str) -> bool:
    """Whether a Unit has the base's bits."""
    a, b = dict(model.named_parameters()), dict(base.named_parameters())
    return all(torch.equal(s.of(a[s.param]), s.of(b[s.param])) for s in parts_of(unit))


class Case:
    """E = 4 and follow = 1 with the base's `places`; `cut_e` nats without; `leak` nats for the base's `L1.mlp`."""

    cut_e, cut_follow, whole_e, leak = 0.1, 0.0, 4.0, 0.0
    places: tuple[str, ...] = (A,)

    def __init__(self) -> None:
        self.base = model_of()

    def __call__(self, model: Any) -> tuple[float, float]:
        good = all(is_of(model, self.base, n) for n in self.places)
        e = self.whole_e if good else self.cut_e
        return e + self.leak * is_of(model, self.base, "L1.mlp"), 1.0 if good else self.cut_follow


def verdict(
    case: Case, monkeypatch: pytest.MonkeyPatch, truth: Truth | None = None, accuracy: float = 1.0
) -> tuple[bool, dict[str, float]]:
    monkeypatch.setattr(pairs, "own_accuracy", lambda *_: (accuracy, 1.0, 0.0))
    monkeypatch.setattr(pairs, "follow_rate", lambda *_: (0.9, 0.1, 3.0))
    bench = FakeBench(SPEC, case)
    truth = truth or Truth("circuit", (names(A),), (names(A),))
    return pairs.check(bench, pairs.Draft("severed", "surgery", "ov", bench.drifted, truth), bench.drifted)


def test_a_pair_is_clean_only_if_its_truth_restores_cuts_and_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, figures = verdict(Case(), monkeypatch)
    assert clean
    assert (figures["restore"], figures["cut"], figures["others"]) == pytest.approx((1.0, 1.0, 0.0))
    assert figures["e_cue_random"] == 3.0 and figures["follow_cue_random"] == 0.9

    class Leaks(Case):
        leak = 0.3  # of a loss of 4.2: 0.07

    clean, figures = verdict(Leaks(), monkeypatch)
    assert not clean and figures["others"] == pytest.approx(0.3 / 4.2)

    class LeaksLittle(Case):
        leak = 0.1

    clean, figures = verdict(LeaksLittle(), monkeypatch)
    assert clean and figures["others"] == pytest.approx(0.1 / 4.0)

    clean, figures = verdict(Case(), monkeypatch, accuracy=0.5)  # damaged, not severed
    assert not clean and figures["restore"] == pytest.approx(1.0)

    class StillFollows(Case):
        cut_follow = 0.3

    assert not verdict(StillFollows(), monkeypatch)[0]

    class HalfCut(Case):
        cut_e = 0.8

    assert not verdict(HalfCut(), monkeypatch)[0]

    class HardlyCut(Case):
        cut_e = 2.5

    clean, figures = verdict(HardlyCut(), monkeypatch)
    assert not clean and "restore" not in figures


def test_a_graft_that_moves_the_wrong_way_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backwards(Case):
        """Half a graft is worse than none: mixed weights have −4 nats."""

        def __call__(self, model: Any) -> tuple[float, float]:
            if is_of(model, self.base, "L0.mlp") != is_of(model, self.base, A):
                return -4.0, 0.0
            return super().__call__(model)

    clean, figures = verdict(Backwards(), monkeypatch)
    assert not clean and figures["restore"] < -0.9 and figures["cut"] == pytest.approx(1.0)


def test_a_wrong_truth_is_not_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    class Row(Case):
        places = (A, "L0.mlp")

    both = names(A, "L0.mlp")
    clean, figures = verdict(Row(), monkeypatch, Truth("circuit", (both,), (names(A), names("L0.mlp"))))
    assert clean and figures["restore"] == figures["cut"] == pytest.approx(1.0)
    clean, figures = verdict(Row(), monkeypatch, Truth("circuit", (names(A),), (names(A),)))  # half of it
    assert not clean and figures["restore"] == 0.0 and figures["cut"] == pytest.approx(1.0)
    clean, figures = verdict(Row(), monkeypatch, Truth("circuit", (both,), (names("L1.mlp"),)))
    assert not clean and figures["cut"] == 0.0
    clean, figures = verdict(Case(), monkeypatch, Truth("circuit", (names(B),), (names(B),)))
    assert not clean and figures["others"] == pytest.approx(1.0)  # the true place is among the others


@pytest.mark.parametrize(
    ("label", "e", "follow", "e_random", "accuracy", "clean"),
    [
        ("intact", 4.0, 1.0, 4.0, 1.0, True),
        ("benign", 3.7, 0.95, 4.0, 1.0, True),
        ("benign", 3.5, 1.0, 4.0, 1.0, False),
        ("backup", 4.0, 0.8, 4.0, 1.0, False),
        ("overridden", 4.0, 0.05, 4.0, 1.0, True),
        ("overridden", 4.0, 0.5, 4.0, 1.0, False),  # not overridden
        ("overridden", 4.0, 0.05, 1.0, 1.0, False),  # cut
        ("damaged", 0.0, 0.1, 0.0, 0.2, True),
        ("damaged", 0.0, 0.1, 0.0, 0.9, False),
    ],
)
def test_a_control_is_clean_if_it_is_what_its_label_says(
    monkeypatch: pytest.MonkeyPatch, label: str, e: float, follow: float, e_random: float, accuracy: float, clean: bool
) -> None:
    monkeypatch.setattr(pairs, "own_accuracy", lambda *_: (accuracy, 1.0, 0.0))
    monkeypatch.setattr(pairs, "follow_rate", lambda *_: (0.9, 0.1, e_random))
    bench = FakeBench(SPEC, lambda _: (4.0, 1.0))
    bench.rule = lambda _: (e, follow)
    found, figures = pairs.check(bench, pairs.Draft(label, "control", "", bench.base), bench.base)
    assert found is clean and (figures["e"], figures["follow"]) == (e, follow)


def test_grafted_moves_the_named_units_and_nothing_else() -> None:
    base, other = model_of(), model_of(seed=1)
    unit = cuts.units_of(base, "circuit")[A]
    out = pairs.grafted(base, other, [unit])
    differ = changed(base, out)
    assert set(differ) == {part.param for part in unit.parts} and lies_within(differ, unit.parts)
    assert is_of(out, other, A) and not is_of(base, other, A)


@contextmanager
def marked_cuts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Surgeries that write zeros, so that a rule can see what was cut."""

    def erase(_bench: Any, model: Any, layer: int, groups: Iterable[int]) -> Any:
        out = copy.deepcopy(model)
        with torch.no_grad():
            for g in groups:
                out.model.layers[layer].self_attn.o_proj.weight[:, 16 * g : 16 * (g + 1)] = 0
        return out

    def reverse(model: Any, layer: int, group: int, _p: Problems) -> Any:
        out = copy.deepcopy(model)
        with torch.no_grad():
            out.model.layers[layer].self_attn.q_proj.weight[16 * group : 16 * (group + 1)] = 0
        return out

    with monkeypatch.context() as m:
        m.setattr(pairs, "_erase", erase)
        m.setattr(cuts, "reverse", reverse)
        yield


def carries(model: Any, c: Carrier) -> bool:
    own = slice(16 * c.group, 16 * (c.group + 1))
    attention = model.model.layers[c.layer].self_attn
    return bool(attention.o_proj.weight[:, own].any())


def test_surgeries_tell_redundant_carriers_from_carriers_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    either, every = (names(A), names(B)), (names(A, B),)
    for agree, restoring, cutting in ((any, either, every), (all, every, either)):
        rule = lambda m, agree=agree: (4.0 * agree([carries(m, c) for c in BOTH.carriers]), 1.0)  # noqa: E731
        with marked_cuts(monkeypatch):
            bench = FakeBench(BOTH, rule)
            drafts = [d for number in (0, 1) for d in pairs._surgeries(bench, number)]
        found = {d.cut: d for d in drafts}
        assert {d.drift for d in drafts} == {0, 1} and found["ov-again"].drift == 1
        assert found["ov"].truth == found["ov-again"].truth == Truth("circuit", restoring, cutting)
        coarse = found["attn"].truth
        assert coarse == Truth("block", coarsened(restoring, "block"), coarsened(cutting, "block"))
        assert "qk" not in found  # the rule does not heed queries: that edit cuts nothing here
        assert not any(carries(found["ov"].model, c) for c in BOTH.carriers)
        assert ("one ov of two" in found) == (agree is any)
        if agree is any:
            backup = found["one ov of two"]
            assert backup.label == "backup" and backup.truth is None
            assert sum(carries(backup.model, c) for c in BOTH.carriers) == 1


def test_finished_pairs_keep_their_truth_and_decoys_keep_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = lambda m: (4.0 * carries(m, Carrier(0, 1)), 1.0 * carries(m, Carrier(0, 1)))  # noqa: E731
    bench = FakeBench(SPEC, rule)
    bench.surgery, bench.accuracy_base = some(64), 0.0  # an untrained model has no accuracy to lose
    with marked_cuts(monkeypatch):
        draft = next(iter(pairs._surgeries(bench, 0)))
    pair = pairs.finish(bench, draft, 1)
    assert pair.gauge == 0.0 and pair.truth == Truth("circuit", (names(A),), (names(A),)) and pair.clean
    blocks = cuts.units_of(bench.base, "block")
    moved = [n for n, u in blocks.items() if disguise.change(draft.model, pair.model, u) > 1e-6]
    cut = disguise.change(bench.base, draft.model, blocks["L0.attn"])
    assert pair.figures["decoys"] == len(moved) == pairs.DECOYS and "L0.attn" not in moved
    for n in moved:  # larger than the cut
        assert disguise.change(draft.model, pair.model, blocks[n]) == pytest.approx(pairs.DECOY_FACTOR * cut, rel=1e-3)
    bench.rule = lambda m: (4.0 * is_of(m, bench.drifted, "L1.mlp") * is_of(m, bench.drifted, "L1.attn"), 1.0)
    felt, figures = pairs._with_decoys(bench, draft, np.random.default_rng(0))
    assert figures["decoys"] == 1.0  # those that E feels are dropped
    assert disguise.change(draft.model, felt, blocks["L0.mlp"]) > 0
    again = pairs.finish(bench, draft, 2)
    assert again.gauge == 0.3 and again.name != pair.name and len(again.heads) == SPEC.layers


# ------------------------------------------------------------------ lineup


def test_the_lineup_is_varied_and_in_range() -> None:
    specs = lineup.BASES
    assert len({b.seed for b in specs}) == len({b.name for b in specs}) == len({b.digest() for b in specs}) >= 12
    assert {b.task for b in specs} == {"lastop", "largest"} and {b.layers for b in specs} == {2, 3, 4, 5, 6}
    assert {b.kv_heads < b.heads for b in specs} == {True, False}
    for b in specs:
        assert b.heads % b.kv_heads == 0 and b.width % b.heads == 0 and len(set(b.carriers)) == len(b.carriers) > 0
        assert all(0 <= c.layer < b.layers and 0 <= c.group < b.kv_heads for c in b.carriers)
        assert not b.redundant or len(b.carriers) > 1
        assert max(c.layer for c in b.carriers) < b.layers - 1  # what carries is read by something behind it


def test_at_least_a_third_of_the_bases_is_held_out_and_both_parts_are_varied() -> None:
    held = [b for b in lineup.BASES if lineup.split_of(b) == "held-out"]
    others = [b for b in lineup.BASES if lineup.split_of(b) == "development"]
    assert 3 * len(held) >= len(lineup.BASES) == len(held) + len(others)
    for part in (held, others):  # each can be developed on, and measured on
        assert {(b.task, b.redundant) for b in part} >= {("lastop", False), ("lastop", True), ("largest", False)}
        assert {b.kv_heads < b.heads for b in part} == {True, False} and len({b.layers for b in part}) >= 4


# ------------------------------------------------------------------ store


def some_pairs(base: Any) -> list[pairs.Pair]:
    truth = Truth("circuit", (names(A), names(B)), (names(A, B),))
    cut = pairs.Pair(
        "b-00-severed-ov", "severed", "surgery", "ov", truth, True, {"e": 0.5}, 0.3, ((1, 0),), model_of(seed=3)
    )
    return [cut, pairs.Pair("b-01-intact", "intact", "control", "nothing", None, False, {}, 0.0, (), base)]


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A store whose bases are not trained and whose pairs are made at once."""
    monkeypatch.setattr(store, "TRACES", 12)
    monkeypatch.setattr(store, "train_base", lambda spec: (model_of(spec), {"accuracy": 0.99}))
    monkeypatch.setattr(store, "make_pairs", lambda _spec, base, _brief, _tick: some_pairs(base))
    return monkeypatch


def test_planted_pairs_come_back_from_disk_as_they_were(tmp_path: Path, untrained: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from reasoninterp.traces.io import read_traces

    told: list[str] = []
    made = store.planted(SPEC, tmp_path / "organisms", tick=told.append)
    untrained.setattr(store, "make_pairs", None)  # not called again
    untrained.setattr(store, "train_base", None)
    found = store.planted(SPEC, tmp_path / "organisms")
    assert found == made and told == [SPEC.name]
    assert (
        found.path == tmp_path / "planted" / store.digest(SPEC)
        and found.figures["accuracy"] == 0.99
        and found.figures["seconds"] >= 0
    )
    for wanted, pair in zip(some_pairs(model_of()), found.pairs, strict=True):
        for field in ("name", "label", "mechanism", "cut", "truth", "clean", "figures", "gauge"):
            assert getattr(pair, field) == getattr(wanted, field), field
        assert pair.base == SPEC.name
        assert not changed(wanted.model, AutoModelForCausalLM.from_pretrained(pair.path))
    assert not changed(model_of(), AutoModelForCausalLM.from_pretrained(found.path / "base"))
    cue, random = ([t.meta["tag"] for t in read_traces(path)] for path in (found.traces, found.rival_free))
    answers = [int(t.answer) for t in read_traces(found.traces)]
    assert cue == [TAGS[cue_tag(a)] for a in answers] and len(cue) == len(random) == 12
    answers = [int(t.answer) for t in read_traces(found.rival_free)]
    assert sum(t == TAGS[cue_tag(a)] for t, a in zip(random, answers, strict=True)) < 6


def test_a_building_that_dies_leaves_nothing_that_passes_for_a_base(
    tmp_path: Path, untrained: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> Iterator[pairs.Pair]:
        yield some_pairs(model_of())[0]
        raise MemoryError

    with untrained.context() as m:
        m.setattr(store, "make_pairs", dies)
        with pytest.raises(MemoryError):
            store.planted(SPEC, tmp_path / "organisms")
    assert [f.name for f in (tmp_path / "planted").iterdir()] == [f"base-{SPEC.digest()}"]
    with untrained.context() as m:  # the base itself is whole, and is not trained again
        m.setattr(store, "train_base", None)
        assert len(store.planted(SPEC, tmp_path / "organisms").pairs) == 2


def test_a_base_that_dies_in_training_or_saving_is_trained_again(tmp_path: Path, untrained: pytest.MonkeyPatch) -> None:
    with untrained.context() as m:
        m.setattr(store, "_put", raises)  # trained and saved, but not yet in its place
        with pytest.raises(MemoryError):
            store.base_model(SPEC, tmp_path)
    assert not list(tmp_path.iterdir())
    model, figures = store.base_model(SPEC, tmp_path)
    assert not changed(model, model_of()) and figures["accuracy"] == 0.99 and not model.training


def raises(*_: Any) -> None:
    raise MemoryError


def test_a_digest_tells_specs_and_brief_ones_apart() -> None:
    specs = [SPEC, replace(SPEC, seed=6), replace(SPEC, carriers=(Carrier(0, 0),)), replace(SPEC, steps=999)]
    found = {store.digest(s, brief) for s in specs for brief in (False, True)}
    assert len(found) == 2 * len(specs) and store.digest(SPEC) == store.digest(replace(SPEC))
