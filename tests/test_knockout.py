"""Attention knockout: its laws, brute force in the plain model, worked cases, and the studies that use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.models.read import margins_from_logits
from reasoninterp.patching import attention_edges
from reasoninterp.patching import knockout as knockout_module
from reasoninterp.patching.attention_edges import Edge, edge_hooks, edge_mask, settle
from reasoninterp.patching.knockout import kl_bits, knocked_logits, knockout, reading_plan
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.patching.readers import (
    HeadSet,
    Knockout,
    answer_queries,
    answer_readers,
    every_head,
    every_layer,
)
from reasoninterp.patching.step_matrix import CausalMatrix, StepMatrix, centred, predictors, step_matrices
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Span, Trace, encode
from tests.tiny import save_tiny, save_tuned

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")
TIGHT = Format(after_question="\n", between_steps="", before_answer="", after_answer="\n")
END = 10**6


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each family on disk."""
    root = tmp_path_factory.mktemp("knockout")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def bodies(homes: dict[str, str]) -> dict[str, Body]:
    return {family: Minds.load({"base": home}).body for family, home in homes.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def body(family: str, bodies: dict[str, Body]) -> Body:
    return bodies[family]


def rows_of(lengths: tuple[int, ...] = (12, 9, 12), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 290, (n,), generator=generator).tolist() for n in lengths]


def all_positions(rows: list[list[int]]) -> Any:
    return reading_plan(rows, [range(len(r)) for r in rows])


MIXED = [
    (0, [Edge(Span(6, END), Span(2, 5))]),
    (1, [Edge(Span(5, END), Span(1, 4), layers=(1,))]),
    (0, [Edge(Span(8, 10), Span(0, 3), layers=(0, 2), heads=(3,)), Edge(Span(9, END), Span(4, 6), heads=(0, 2))]),
    (2, []),
    (2, [Edge(Span(11, 12), Span(1, 11), layers=(2,), heads=(1,))]),
    (1, [Edge(Span(0, 3), Span(3, 9))]),  # nothing there to cut: these queries come first
]


# ---------------------------------------------------------------------------------------------- laws


def test_knocking_out_nothing_changes_nothing(body: Body) -> None:
    plan = all_positions(rows_of())
    plain = body.forward(plan.ids)
    logits = knocked_logits(body, plan.ids, plan.positions, [[], []], [0, 2])
    assert torch.equal(logits, plain[[0, 2]])
    nothing = [[], [Edge(Span(0, 4), Span(6, 9))], [Edge(Span(3, END), Span(0, 1))], [Edge(Span(50, 60), Span(1, 3))]]
    found = knockout(body, plan, nothing, [0, 1, 2, 0])
    assert torch.equal(found.kl, torch.zeros_like(found.kl))
    assert knockout(body, plan, [[Edge(Span(6, END), Span(2, 5))]], [0]).kl[0, 6:].min() > 1e-4


def test_a_cut_leaves_earlier_logits_exactly_as_they_were(body: Body) -> None:
    plan = all_positions(rows_of())
    plain = body.forward(plan.ids)
    for edge in (Edge(Span(6, END), Span(2, 5)), Edge(Span(6, END), Span(2, 5), layers=(1,), heads=(0, 3))):
        cut = knocked_logits(body, plan.ids, plan.positions, [[edge]], [0])
        whole = knocked_logits(body, plan.ids, plan.positions, [[edge]] * 3, [0, 1, 2])
        assert torch.equal(whole[:, :6], plain[:, :6])
        assert (cut[0, 6:] - plain[0, 6:]).abs().amax(-1).min() > 1e-3
        # and read through `knockout`, whatever batch the base was computed in
        kl = knockout(body, plan, [[edge]] * 3, [0, 1, 2], max_rows=2).kl
        assert (kl[:, :6] == 0).all() and (kl[0, 6:] > 0).all()


def test_everything_but_the_first_token_gives_the_value_of_the_first_token(body: Body) -> None:
    rows = rows_of()
    plan = all_positions(rows)
    names = [site("v", layer) for layer in range(body.n_layers)]
    # The first token sees only itself, so no cut changes it: its values are those of the plain run.
    values = body.cache(plan.ids, names)

    def only_first(layer: int) -> Any:
        first = values[names[layer]][:, :1].repeat_interleave(body.n_heads // body.n_kv_heads, dim=2)
        return lambda z: first.expand_as(z).contiguous()

    hooks = [(site("z", layer), only_first(layer)) for layer in range(body.n_layers)]
    expected = body.forward(plan.ids, hooks=hooks)
    everything = settle(body, [Edge(Span(0, END), Span(0, END))], 12)
    found = knocked_logits(body, plan.ids, plan.positions, [everything] * 3, [0, 1, 2])
    for row, ids in enumerate(rows):
        torch.testing.assert_close(found[row, : len(ids)], expected[row, : len(ids)], atol=2e-5, rtol=1e-5)
    assert (found[0, 1:] - body.forward(plan.ids)[0, 1:]).abs().amax(-1).min() > 0.05
    assert torch.isfinite(knockout(body, plan, [[Edge(Span(0, END), Span(0, END))]], [0]).kl).all()


def test_hooks_and_mask_agree_bit_for_bit(body: Body) -> None:
    plan = all_positions(rows_of())
    cells = [settle(body, edges, 12) for edges in ([Edge(Span(6, 12), Span(2, 5))], [Edge(Span(2, 12), Span(1, 3))])]
    hooked = body.forward(plan.ids[[0, 2]], hooks=edge_hooks(cells, body.n_layers))
    masked = body.forward(plan.ids[[0, 2]], attention_mask=edge_mask(cells, 12, body.dtype))
    assert torch.equal(hooked, masked)
    assert torch.equal(knocked_logits(body, plan.ids, plan.positions, cells, [0, 2]), masked)


def test_different_cells_in_one_batch_equal_one_at_a_time(body: Body) -> None:
    plan = all_positions(rows_of())
    items, cells = [item for item, _ in MIXED], [edges for _, edges in MIXED]
    together = knockout(body, plan, cells, items)
    assert (together.kl[[0, 1, 2, 4]].amax(1) > 1e-3).all()
    assert (together.kl[[3, 5]] == 0).all()
    for max_rows in (1, 2):
        chunked = knockout(body, plan, cells, items, max_rows=max_rows)
        torch.testing.assert_close(chunked.kl, together.kl, atol=1e-5, rtol=1e-4)
    for k, (item, edges) in enumerate(MIXED):
        alone = all_positions([rows_of()[item]])  # without padding, too
        single = knockout(body, alone, [edges], [0])
        torch.testing.assert_close(together.kl[k, : single.kl.shape[1]], single.kl[0], atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- oracles


def by_brute_force(home: str, ids: Tensor, edges: list[Edge]) -> Tensor:
    """Logits of the plain Hugging Face model, with attention computed here and the edges cut one pair at a time."""
    import transformers as hf

    def attend(
        layer: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        n_heads, length = query.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (key, value))
        out = torch.zeros_like(query)
        for head in range(n_heads):
            for q in range(length):
                cut = {
                    k
                    for e in edges
                    if (e.layers is None or layer.layer_idx in e.layers) and (e.heads is None or head in e.heads)
                    if e.queries.start <= q < e.queries.stop
                    for k in range(max(1, e.keys.start), e.keys.stop)
                }
                window = getattr(layer, "sliding_window", None) or length
                seen = [k for k in range(max(0, q + 1 - window), q + 1) if k not in cut]
                scores = query[0, head, q] @ key[0, head, seen].T * (scaling or query.shape[-1] ** -0.5)
                out[0, head, q] = scores.softmax(-1) @ value[0, head, seen]
        return out.transpose(1, 2).contiguous(), None

    hf.AttentionInterface.register("by_hand", attend)
    model = hf.AutoModelForCausalLM.from_pretrained(home, attn_implementation="by_hand").eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return found


def test_equals_brute_force_in_the_plain_model(family: str, homes: dict[str, str], body: Body) -> None:
    rows = rows_of()
    plan = all_positions(rows)
    found = knockout(body, plan, [e for _, e in MIXED], [i for i, _ in MIXED])
    for k, (item, edges) in enumerate(MIXED):
        ids = torch.tensor([rows[item]])
        limited = [e._replace(keys=Span(e.keys.start, min(e.keys.stop, len(rows[item])))) for e in edges]
        plain, cut = by_brute_force(homes[family], ids, []), by_brute_force(homes[family], ids, limited)
        torch.testing.assert_close(body.forward(ids)[0], plain, atol=3e-5, rtol=1e-4)
        logits = knocked_logits(body, ids, torch.arange(len(ids[0]))[None], [settle(body, edges, len(ids[0]))], [0])
        torch.testing.assert_close(logits[0], cut, atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(found.kl[k, : len(ids[0])], kl_bits(plain, cut), atol=1e-5, rtol=1e-3)


def test_a_sliding_window_is_kept(homes: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = str(tmp_path / "windowed")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    AutoModelForCausalLM.from_pretrained(
        homes["qwen3"], use_sliding_window=True, sliding_window=4, layer_types=kinds
    ).save_pretrained(home)
    AutoTokenizer.from_pretrained(homes["qwen3"]).save_pretrained(home)
    body = Minds.load({"base": home}).body
    ids, at = torch.tensor(rows_of()[:1]), torch.arange(12)[None]
    plain = by_brute_force(home, ids, [])
    torch.testing.assert_close(body.forward(ids)[0], plain, atol=3e-5, rtol=1e-4)
    assert (plain - by_brute_force(homes["qwen3"], ids, [])).abs().max() > 0.01  # the window matters
    edge = Edge(Span(6, 12), Span(2, 5))
    cut = by_brute_force(home, ids, [edge])
    torch.testing.assert_close(knocked_logits(body, ids, at, [[edge]], [0])[0], cut, atol=3e-5, rtol=1e-4)
    assert (cut - plain).abs().max() > 0.01
    # position 9 sees 6 … 9 in the first layer, so the first token is no help there; the second layer sees it
    with pytest.raises(UserError, match="position 9"):
        settle(body, [Edge(Span(9, 10), Span(6, 10))], 12)
    assert settle(body, [Edge(Span(9, 10), Span(6, 10), layers=(1,))], 12)
    assert settle(body, [Edge(Span(9, 10), Span(6, 9))], 12)


def test_kl_is_that_of_torch_in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = 8 * torch.randn(2, 5, 400, generator=generator)
    expected = torch.nn.functional.kl_div(
        after.double().log_softmax(-1), before.double().log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(kl_bits(before, after), expected.sum(-1) / np.log(2), atol=1e-12, rtol=1e-12)
    assert torch.equal(kl_bits(before, before), torch.zeros(5, dtype=torch.float64))
    monkeypatch.setattr(knockout_module, "KL_BLOCK", 900)  # two positions at once
    torch.testing.assert_close(kl_bits(before, after), expected.sum(-1) / np.log(2), atol=1e-12, rtol=1e-12)
    # by hand: (1/2, 1/2) against (1/4, 3/4) is (1 + log2(2/3)) / 2 bits, and the other way round another number
    even, odd = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(kl_bits(even, odd)) == pytest.approx((1 + np.log2(2 / 3)) / 2, abs=1e-7)
    assert float(kl_bits(odd, even)) == pytest.approx(0.25 * -1 + 0.75 * np.log2(1.5), abs=1e-7)


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_query_keeps_a_key(body: Body) -> None:
    everything = [Edge(Span(4, 8), Span(0, 8))]
    assert settle(body, everything, 12) == (Edge(Span(4, 8), Span(1, 8)),)
    with pytest.raises(UserError, match=r"cells\[1\]: the query at position 4 .* without a key"):
        knockout(body, all_positions(rows_of()), [[], everything], [0, 0], keep_first=False)
    # the query at position 5 still sees itself; together with another edge it does not, and only in one head
    most = Edge(Span(5, 6), Span(0, 5))
    assert settle(body, [most], 12, keep_first=False) == (most,)
    for rest in (Edge(Span(2, 7), Span(5, 6), heads=(3,)), Edge(Span(5, 6), Span(5, 6), layers=(1,), heads=(0,))):
        with pytest.raises(UserError, match="position 5"):
            settle(body, [most, rest], 12, keep_first=False)
    apart = [most._replace(layers=(0,)), Edge(Span(5, 6), Span(5, 6), layers=(1,))]
    assert len(settle(body, apart, 12, keep_first=False)) == 2
    # the first token as a key can be cut where the caller says so
    first = knockout(body, all_positions(rows_of()), [[Edge(Span(5, END), Span(0, 1))]], [0], keep_first=False)
    assert first.kl[0, 5:].min() > 0


def test_what_is_not_there_is_refused(body: Body) -> None:
    span = Span(1, 2)
    for edge, message in (
        (Edge(span, span, layers=(3,)), "layers \\[3\\] are not some of the model's 3"),
        (Edge(span, span, heads=(-1,)), "heads \\[-1\\]"),
        (Edge(span, span, heads=()), "heads \\[\\]"),
        (Edge(Span(-2, 2), span), "positions are counted"),
    ):
        with pytest.raises(UserError, match=message):
            settle(body, [edge], 12)
    plan = all_positions(rows_of())
    with pytest.raises(UserError, match="item_of_cell has 1 entries for 2 cells"):
        knockout(body, plan, [[], []], [0])
    with pytest.raises(UserError, match=r"reads\[0\]"):
        reading_plan([[5, 6]], [[2]])


def test_scores_that_are_only_shown_are_refused(homes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Minds.load({"base": homes["llama-gqa"]}).body
    deaf = [(site("attn_scores", layer), lambda scores: None) for layer in range(3)]
    monkeypatch.setattr(attention_edges, "edge_hooks", lambda cells, n_layers: deaf)
    with pytest.raises(UserError, match="does not take edits of its scores"):
        knockout(fresh, all_positions(rows_of()), [[Edge(Span(5, END), Span(1, 3), layers=(0,))]], [0])


# ---------------------------------------------------------------------------------------------- margins, readers


def items(tokenizer: object, answers: tuple[str, str], n: int = 3) -> list[Item]:
    """Contrasts with chains of two and three steps; the last item has none."""
    out = []
    for k in range(n):
        clean = Trace(f"t{k}", f"go {k}", tuple(f"now {'xyz'[j]} {j}" for j in range(2 + k % 2)), answers[0], FORMAT)
        corrupt = clean.with_steps([*clean.steps[:1], "now w 44", *clean.steps[2:]], answer=answers[1])
        made = contrast("propagated", clean, corrupt, tokens=(encode(clean, tokenizer), encode(corrupt, tokenizer)))
        out.append(Item(clean, made))
    return [*out, Item(replace(out[0].trace, id="plain", question="no other chain"))]


def context_of(folder: Path, family: str, answers: tuple[str, str] = ("7", "6"), n_layers: int = 2) -> Context:
    save_tiny(folder / "base", family, n_layers=n_layers)
    save_tuned(folder / "base", folder / "tuned", scale=0.05)
    minds = Minds.load({"base": str(folder / "base"), "tuned": str(folder / "tuned")})
    return Context(minds, items(minds.tokenizer("base"), answers))


@pytest.mark.parametrize("answers", [("7", "6"), ("tom xq", "tom buys 4")])
def test_margins_of_a_contrast_plan(tmp_path: Path, family: str, answers: tuple[str, str]) -> None:
    context = context_of(tmp_path, family, answers)
    with context.open("base") as body:
        plan = contrast_plan(context, [i.contrast for i in context.items[:3]])
        side = plan.sides[0]
        tokens = [context.encode(i.trace) for i in context.items[:3]]
        edges = [[Edge(answer_queries(t), t.steps[-1], layers=(0, 1))] for t in tokens]
        cells, items_ = [*edges, [], *edges], [0, 1, 2, 1, 0, 1, 2]
        found = knockout(body, side, cells, items_, max_rows=3)
        rows = side.item_of_row.tolist()
        assert (len(rows) > 3) == (len(answers[0]) > 1)
        hooks = edge_hooks([edges[i] for i in rows], body.n_layers)
        expected = margins_from_logits(side, body.forward(side.ids, positions=side.positions, hooks=hooks)).margin
        plain = plan.margins(body, 0)
        torch.testing.assert_close(found.margin[[0, 1, 2]], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.margin[[4, 5, 6]], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.base_margin, plain[items_], atol=1e-5, rtol=1e-4)
        assert found.margin[3] == found.base_margin[3]
        assert (expected - plain).abs().min() > 1e-3
        # the first read is the prompt's last token
        prompts = reading_plan([t.prompt_ids for t in tokens], [[t.answer.start - 1] for t in tokens])
        alone = knockout(body, prompts, edges, [0, 1, 2])
        torch.testing.assert_close(found.kl[:3, 0], alone.kl[:, 0], atol=1e-6, rtol=1e-3)
        assert alone.kl.min() > 1e-4 and alone.margin.isnan().all()


def test_a_planted_reader_is_named(body: Body) -> None:
    """Where only one head's value projection is not zero, only that head (and its layer) can read anything."""
    rows = rows_of((10, 10))
    plan = reading_plan(rows, [[9], [9]])
    hooks = [
        (site("z", layer), lambda z, layer=layer: z * torch.eye(4)[2][:, None] if layer == 1 else z * 0)
        for layer in range(3)
    ]
    sets = [*every_layer(body), *every_head(body), HeadSet(), *every_layer(body, 2)]
    with body.hooks(hooks):
        found = answer_readers(body, plan, [Span(8, END), Span(8, END)], [Span(3, 6), None], sets)
    hit = (found.kl[0] > 1e-5).tolist()
    named = [s for s, yes in zip(sets, hit, strict=True) if yes]
    assert named == [HeadSet((1,)), HeadSet((1,), (2,)), HeadSet(), HeadSet((0, 1)), HeadSet((1, 2))]
    assert len({round(float(found.kl[0, sets.index(s)]), 9) for s in named}) == 1
    assert found.kl[1].isnan().all() and found.margin_change.isnan().all()


# ---------------------------------------------------------------------------------------------- the step matrix


@pytest.mark.parametrize("form", [FORMAT, TIGHT])
def test_step_matrix_by_its_definition(family: str, body: Body, homes: dict[str, str], form: Format) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(homes[family])
    texts = [("a 1 b", "so 22 c", "now x", "9 y"), ("z z z", "k 3")]
    tokens = [encode(Trace(str(k), "go on", steps, "7", form), tokenizer) for k, steps in enumerate(texts)]
    found = step_matrices(body, tokens, max_rows=3)
    for t, matrix in zip(tokens, found, strict=True):
        n, ids = len(t.steps), torch.tensor([t.prompt_ids])
        plain = body.forward(ids)[0]
        assert matrix.kl.shape == (n, n + 1)
        for i, j in np.ndindex(n, n + 1):
            if j <= i:
                assert np.isnan(matrix.kl[i, j]) and np.isnan(matrix.log2_kl[i, j]) and matrix.n_tokens[i, j] == 0
                continue
            span = t.steps[i]

            def hook(scores: Tensor, span: Span = span) -> Tensor:
                new = scores.clone()
                new[:, :, span.stop :, max(1, span.start) : span.stop] = torch.finfo(scores.dtype).min
                return new

            cut = body.forward(ids, hooks=[(site("attn_scores", layer), hook) for layer in range(3)])[0]
            # the token at position p is predicted at p − 1; a predictor inside the cut step is no later query
            words = [t.answer.start] if j == n else list(range(*t.steps[j]))
            read = [float(kl_bits(plain[p - 1], cut[p - 1])) for p in words if p - 1 >= span.stop]
            assert matrix.n_tokens[i, j] == len(read) == len(predictors(t, i, j))
            if read:
                assert min(read) > 0
                assert matrix.kl[i, j] == pytest.approx(np.mean(read), rel=1e-3, abs=1e-6)
                assert matrix.log2_kl[i, j] == pytest.approx(np.mean(np.log2(np.array(read) + 1e-9)), abs=0.02)
            else:
                assert np.isnan(matrix.kl[i, j])
    tight = form is TIGHT
    first = found[0].n_tokens[0, 1]
    assert first == len(tokens[0].steps[1]) - tight  # without a separator, one predictor lies in the cut step
    assert np.isnan(found[1].kl[1, 2]) == tight  # and the answer is read inside the last step


def test_centring_for_plots() -> None:
    grid = np.array([[np.nan, 1.0, 4.0], [np.nan, np.nan, 2.0], [np.nan, 5.0, 0.0]])
    assert np.nanmean(centred(grid, "row"), axis=1) == pytest.approx([0, 0, 0])
    assert centred(grid, "row")[0, 1:] == pytest.approx([-1.5, 1.5])
    assert np.nanmean(centred(grid, "column")[:, 1:], axis=0) == pytest.approx([0, 0])
    both = centred(grid, "both")
    assert np.nanmean(both, axis=1) == pytest.approx([0, 0, 0], abs=1e-9)
    assert np.nanmean(both[:, 1:], axis=0) == pytest.approx([0, 0], abs=1e-9)
    assert np.array_equal(np.isnan(both), np.isnan(grid))


# ---------------------------------------------------------------------------------------------- the studies


def test_the_knockout_study(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa")
    run = Run.open(tmp_path / "run", {})
    context.run = run
    result = run_study(Knockout(), context, run, quiet=True)
    table = result.tables["knockout"]
    kl, change = (table[table["measure"] == m] for m in ("kl", "margin_change"))
    assert set(table["mind"]) == {"base", "tuned"}
    assert len(kl) == len(change) == 2 * (2 + 8) * 4  # question, two numbered steps, last step
    assert kl["p"].isna().all() and change["p_corrected"].between(0, 1).all()
    assert (kl["value"] >= 0).all() and kl["value"].max() > 1e-3 and change["value"].abs().max() > 1e-3
    last = table[(table["column"] == "last step") & (table["scope"] == "layer")]
    assert set(last[last["measure"] == "kl"]["n"]) == {4}
    assert set(last[last["measure"] == "margin_change"]["n"]) == {3}  # one trace has no contrast
    with context.open("tuned") as body:
        tokens = context.encode(context.items[1].trace)
        # the column holds the step with what separates it from the next; the answer is asked for behind the last step
        keys = Span(tokens.steps[0].start, tokens.steps[1].start)
        assert tokens.steps[-1].stop < tokens.answer.start - 1

        def hook(scores: Tensor) -> Tensor:
            new = scores.clone()
            new[:, 2, tokens.steps[-1].stop :, keys.start : keys.stop] = torch.finfo(scores.dtype).min
            return new

        plan = contrast_plan(context, [context.items[1].contrast])
        change = plan.margins(body, 0, hooks=[(site("attn_scores", 0), hook)]) - plan.margins(body, 0)
        at, ids = torch.tensor([[tokens.answer.start - 1]]), torch.tensor([tokens.prompt_ids])
        cut = body.forward(ids, positions=at, hooks=[(site("attn_scores", 0), hook)])
        kl = kl_bits(body.forward(ids, positions=at), cut)
    rows = result.rows.query("mind == 'tuned' and trace == 't1' and layer == 0 and head == 2 and column == 'step 1'")
    assert rows["kl"].tolist() == pytest.approx([float(kl)], rel=1e-3)
    assert rows["margin_change"].tolist() == pytest.approx([float(change)], abs=2e-6)
    assert float(kl) > 1e-4 and abs(float(change)) > 1e-3
    figures = Knockout().draw(table)
    assert set(figures) == {"knockout", "knockout-heads"}
    few = run_study(Knockout(heads=False, max_traces=1), context, Run.open(tmp_path / "few", {}), quiet=True)
    assert set(few.tables["knockout"]["head"]) == {-1} and few.measured == 2


def test_the_step_matrix_study(tmp_path: Path) -> None:
    context = context_of(tmp_path, "qwen3")
    run = Run.open(tmp_path / "run", {})
    context.run = run
    result = run_study(StepMatrix(), context, run, quiet=True)
    table = result.tables["step-matrix"]
    grid = table[table["mind"] == "base"].pivot(index="step", columns="later", values="value")
    counts = table[table["mind"] == "base"].pivot(index="step", columns="later", values="n")
    assert list(dict.fromkeys(table["later"])) == ["step 1", "step 2", "step 3", "answer"]
    assert grid.loc["step 2", ["step 1", "step 2"]].isna().all() and (counts.loc["step 2", ["step 1"]] == 0).all()
    assert counts.loc["step 1"].tolist() == [4, 0, 4, 1]  # answer, steps 1 to 3: one chain of four has a third step
    assert (grid.loc["step 1", ["step 2", "step 3", "answer"]] > 1e-4).all()
    with context.open("base") as body:
        matrices = step_matrices(body, [context.encode(i.trace) for i in context.items])
    assert all(isinstance(m, CausalMatrix) for m in matrices)
    assert grid.loc["step 1", "step 2"] == pytest.approx(np.mean([m.kl[0, 1] for m in matrices]), rel=1e-3)
    assert StepMatrix().draw(table) is not None
    logged = StepMatrix(log=True)
    summary = logged.summarise(result.rows, context)
    assert (summary["measure"] == "log2_kl").all() and logged.draw(summary) is not None
    assert StepMatrix().draw(pd.DataFrame(columns=table.columns)) is None
