"""Maps of attention against brute force, finite differences and worked examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reasoninterp.attention.gradient import gradient_maps
from reasoninterp.attention.grid import SpanGrid, span_grid
from reasoninterp.attention.maps import KINDS, attention_maps, norm_factor, output_weights, plain_map, value_maps
from reasoninterp.attention.rollout import roll, rollout_maps
from reasoninterp.attention.sinks import DELIMITER, FIRST, SinkRule, kinds_of_rows, received, sink_mask, without
from reasoninterp.attention.study import AttentionMap, prepare
from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Span, Trace
from tests.tiny import save_tiny, save_tuned

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")
# Two rows of 11 and 7 tokens, each partitioned; the second has a span less, and its padding is in no span.
PARTITION = [[Span(0, 3), Span(3, 4), Span(4, 8), Span(8, 11)], [Span(0, 2), Span(2, 5), Span(5, 7)]]


def ids_of(body: Body) -> torch.Tensor:
    ids = torch.randint(5, body.n_vocab_shared, (2, 11), generator=torch.Generator().manual_seed(3))
    ids[1, 7:] = 0
    return ids


def tiny_body(folder: Path, family: str, dtype: str = "float32") -> Body:
    save_tiny(folder / "base", family)
    return Minds.load({"base": str(folder / "base")}, dtype=dtype).body


def items(answers: tuple[str, str, str] = ("7", "8", "6"), n: int = 3) -> list[Item]:
    """Traces of 2 or 3 steps with contrasts; the last has none."""
    out = []
    for k in range(n):
        clean = Trace(f"t{k}", f"go {k}", tuple(f"now {'xyz'[j]}" for j in range(2 + k % 2)), answers[k % 2], FORMAT)
        steps = [*clean.steps[: k % 2], "now a", *clean.steps[k % 2 + 1 :]]
        out.append(Item(clean, contrast("propagated", clean, clean.with_steps(steps, answer=answers[2]))))
    return [*out, Item(Trace("bare", "go 5", ("now x", "now z"), "9", FORMAT))]


def context_of(folder: Path, family: str, dtype: str = "float32", **kwargs: object) -> Context:
    save_tiny(folder / "base", family, n_layers=3)
    save_tuned(folder / "base", folder / "tuned", scale=0.05)
    minds = Minds.load({"base": str(folder / "base"), "tuned": str(folder / "tuned")}, dtype=dtype)
    return Context(minds, items(**kwargs))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ plain and value-weighted


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_attention_sums_to_one_over_a_partition(tmp_path: Path, family: str) -> None:
    body = tiny_body(tmp_path, family)
    plain = attention_maps(body, ids_of(body), span_grid(PARTITION), kinds=["plain"]).kept["plain"]
    assert plain.shape == (3, 2, body.n_heads, 4, 4)
    torch.testing.assert_close(plain[:, 0].nansum(-1), torch.ones(3, body.n_heads, 4))
    torch.testing.assert_close(plain[:, 1, :, :3].nansum(-1), torch.ones(3, body.n_heads, 3))
    above = torch.ones(4, 4).triu(1).bool()
    assert plain[:, 0][..., above].isnan().all() and not plain[:, 0][..., ~above].isnan().any()
    assert plain[:, 1, :, 3].isnan().all() and plain[:, 1, :, :, 3].isnan().all()  # the span that row 1 lacks


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2"])
def test_maps_equal_brute_force(tmp_path: Path, family: str) -> None:
    body = tiny_body(tmp_path, family, "float64")
    ids, layer = ids_of(body), 1
    # reading spans that are not the spans read: one token, and one that overlaps its source
    reads = [[Span(10, 11), Span(2, 6)], [Span(6, 7), Span(1, 4)]]
    found = attention_maps(body, ids, span_grid(PARTITION, reads, [11, 7]), layers=[layer]).kept
    cache = body.cache(ids, [site("pattern", layer), site("v", layer)])
    pattern, v = cache[site("pattern", layer)], cache[site("v", layer)]
    per_group = body.n_heads // body.n_kv_heads
    for row, spans in enumerate(PARTITION):
        for head in range(body.n_heads):
            w = output_weights(body, layer)[head]
            for d, to in enumerate(reads[row]):
                norms = torch.full((len(to), len(spans)), torch.nan, dtype=torch.float64)
                for s, source in enumerate(spans):
                    alpha = pattern[row, head, to.start : to.stop, source.start : source.stop]
                    pairs = [(q, k) for q in range(*to) for k in range(*source) if k <= q]
                    at = (0, row, head, d, s)
                    if not pairs:
                        assert all(found[kind][at].isnan() for kind in KINDS)
                        continue
                    vectors = alpha[..., None] * (v[row, source.start : source.stop, head // per_group] @ w)
                    norms[:, s] = vectors.sum(1).norm(dim=-1)
                    torch.testing.assert_close(found["plain"][at], alpha.sum(1).mean())
                    torch.testing.assert_close(found["plain_per_key"][at], alpha.sum() / len(pairs))
                    torch.testing.assert_close(found["value_weighted"][at], norms[:, s].mean())
                    assert norms[:, s].mean() > 1e-4
                shares = (norms / norms.nansum(1, keepdim=True)).mean(0)
                torch.testing.assert_close(found["value_share"][0, row, head, d, : len(spans)], shares, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_writes_what_the_values_say(tmp_path: Path, family: str) -> None:
    # the value-weighted vectors of all keys sum to the head's output: z W_O
    body = tiny_body(tmp_path, family, "float64")
    ids = ids_of(body)[:1]
    grid = span_grid([[Span(0, 11)]], [[Span(10, 11)]])
    found = attention_maps(body, ids, grid, kinds=["value_weighted"]).kept["value_weighted"]
    for layer in range(body.n_layers):
        z = body.cache(ids, [site("z", layer)])[site("z", layer)][0, 10]
        whole = torch.einsum("hd,hdm->hm", z, output_weights(body, layer)).norm(dim=-1)
        torch.testing.assert_close(found[layer, 0, :, 0, 0], whole)


def test_attention_without_effect_is_seen_by_the_weighted_map_alone(tmp_path: Path) -> None:
    body = tiny_body(tmp_path, "llama-gqa")
    ids, grid = ids_of(body), span_grid(PARTITION)
    before = attention_maps(body, ids, grid, layers=[0]).kept
    weight = body._bridge.blocks[0].attn.o.original_component.weight
    with torch.no_grad():
        weight[:, body.d_head : 2 * body.d_head] = 0  # head 1 writes nothing
    after = attention_maps(body, ids, grid, layers=[0]).kept
    torch.testing.assert_close(after["plain"], before["plain"], equal_nan=True)
    assert after["value_weighted"][0, :, 1].nan_to_num().abs().max() == 0
    assert before["value_weighted"][0, :, 1].nan_to_num().max() > 1e-3
    torch.testing.assert_close(after["value_weighted"][0, :, 0], before["value_weighted"][0, :, 0], equal_nan=True)


def test_output_weights_are_those_of_the_mind_that_is_in(tmp_path: Path) -> None:
    context = context_of(tmp_path, "gpt2")
    with context.open("base") as body:
        base = output_weights(body, 1).clone()
    with context.open("tuned") as body:
        tuned = output_weights(body, 1).clone()
    assert base.shape == tuned.shape == (4, 8, 32)
    assert (base - tuned).abs().max() > 0.01


def test_padding_and_company_change_nothing(tmp_path: Path) -> None:
    body = tiny_body(tmp_path, "qwen3")
    ids = ids_of(body)
    both = attention_maps(body, ids, span_grid(PARTITION)).kept
    alone = attention_maps(body, ids[1:, :7], span_grid(PARTITION[1:])).kept
    for kind in KINDS:
        torch.testing.assert_close(both[kind][:, 1:, :, :3, :3], alone[kind], equal_nan=True)


def test_norm_factor_keeps_norms_of_vectors_that_nearly_vanish() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 4, 16, generator=generator)
    w[0, 3] = w[0, 2] + 1e-5 * w[0, 3]  # u below is carried by a direction of size 1e-5
    u = torch.tensor([0.0, 0.0, 1.0, -1.0])
    exact = (u.double() @ w[0].double()).norm()
    assert 1e-6 < exact < 1e-3
    torch.testing.assert_close((norm_factor(w)[0] @ u).norm().double(), exact, rtol=0.1, atol=0)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    body = tiny_body(tmp_path, "llama-gqa")
    ids, grid = ids_of(body), span_grid(PARTITION)
    with pytest.raises(UserError, match="layers"):
        attention_maps(body, ids, grid, layers=[3])
    with pytest.raises(UserError, match="kinds"):
        attention_maps(body, ids, grid, kinds=["weighted"])
    with pytest.raises(UserError, match="token_kinds"):
        attention_maps(body, ids, grid, sinks=SinkRule())
    with pytest.raises(UserError, match="lengths"):
        span_grid(PARTITION, lengths=[11, 6])
    with pytest.raises(UserError, match="residual"):
        rollout_maps(body, ids, grid, residual=2.0)


# ---------------------------------------------------------------------------------------------- gradient × attention


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answers", [("7", "8", "6"), ("71", "82", "96")])
def test_gradient_maps_equal_finite_differences(tmp_path: Path, family: str, answers: tuple[str, str, str]) -> None:
    context = context_of(tmp_path, family, "float64", answers=answers)
    live = [item for item in context.items if item.contrast]
    with context.open("base") as body:
        plan = contrast_plan(context, [item.contrast for item in live])
        made = prepare(context, [item.trace for item in live])
        answer = [len(table) - 1 for table in made.destinations]
        found = gradient_maps(body, plan, made.grid, answer=answer)
        plan_of_rows = plan.sides[0]
        assert found.isnan().sum() > 0 and found.nan_to_num().abs().max() > 1e-3
        sizes = []
        for layer, k, head, s in [(0, 0, 1, 1), (1, 1, 0, 2), (2, 2, 3, 0), (1, 2, 2, 1)]:
            d = answer[k]
            ids = plan.ids(0)
            block = torch.zeros(ids.shape[0], 1, ids.shape[1], ids.shape[1], dtype=torch.float64)
            start, source = made.destinations[k][d].span.start, made.columns[k][s].span
            for row, owner in enumerate(plan.owners(0)):
                if owner == k:  # the answer is read from the end of the prompt to the row's last position that is read
                    block[row, 0, start : int(plan_of_rows.positions[row].max()) + 1, source.start : source.stop] = 1
            only = torch.zeros(1, body.n_heads, 1, 1, dtype=torch.float64)
            only[0, head] = 1

            def margin(by: float, layer: int = layer, at: torch.Tensor = block * only) -> torch.Tensor:
                return plan.margins(body, 0, hooks=[(site("pattern", layer), lambda p: p * (1 + by * at))])

            # margins are float32, so steps are wide and of fourth order
            h = 0.1
            slope = (8 * (margin(h) - margin(-h)) - (margin(2 * h) - margin(-2 * h))) / (12 * h)
            torch.testing.assert_close(found[layer, k, head, d, s].double(), slope[k].double(), atol=1e-4, rtol=1e-3)
            sizes.append(slope[k].abs())
            assert (slope[torch.arange(plan.n) != k]).abs().max() == 0  # another contrast's margin does not move
    assert torch.stack(sizes).min() > 5e-4 and torch.stack(sizes).max() > 0.02


def test_gradient_of_the_last_layer_reaches_only_what_is_read(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa")
    live = [item for item in context.items if item.contrast]
    with context.open("base") as body:
        plan = contrast_plan(context, [item.contrast for item in live])
        made = prepare(context, [item.trace for item in live])
        found = gradient_maps(body, plan, made.grid).nan_to_num()
    for k, table in enumerate(made.destinations):
        answer = len(table) - 1
        assert found[-1, k, :, :answer].abs().max() == 0 < found[-1, k, :, answer].abs().max()
        assert found[0, k, :, :answer].abs().max() > 0
    with pytest.raises(UserError, match="grid"):
        gradient_maps(body, plan, made.grid.take([0]))


# ------------------------------------------------------------------------------------------------------------ rollout


def test_rollout_by_hand() -> None:
    # two tokens, two layers; heads average to [[1, 0], [.5, .5]] and [[1, 0], [.8, .2]]
    first = torch.tensor([[[[1.0, 0.0], [0.2, 0.8]], [[1.0, 0.0], [0.8, 0.2]]]])
    second = torch.tensor([[[[1.0, 0.0], [0.8, 0.2]], [[1.0, 0.0], [0.8, 0.2]]]])
    one, two = roll([first, second], torch.eye(2)[None])
    # mixed with the identity: [.25, .75], then .4 [1, 0] + .6 [.25, .75]
    torch.testing.assert_close(one[0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    torch.testing.assert_close(two[0], torch.tensor([[1.0, 0.0], [0.55, 0.45]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_equals_the_product_of_whole_matrices(tmp_path: Path, family: str) -> None:
    body = tiny_body(tmp_path, family)
    ids = ids_of(body)
    reads = [[Span(10, 11), Span(4, 8)], [Span(6, 7), Span(2, 5)]]
    found = rollout_maps(body, ids, span_grid(PARTITION, reads))
    torch.testing.assert_close(found.nansum(-1), torch.ones(3, 2, 2))
    cache = body.cache(ids, [site("pattern", layer) for layer in range(3)])
    product = torch.eye(11)
    for layer in range(3):
        product = (0.5 * cache[site("pattern", layer)][0].mean(0) + 0.5 * torch.eye(11)) @ product
        for d, to in enumerate(reads[0]):
            for s, source in enumerate(PARTITION[0][: 4 - d]):
                block = product[to.start : to.stop, source.start : source.stop]
                torch.testing.assert_close(found[layer, 0, d, s], block.sum(1).mean())
    assert found[2, 0, 1, 3].isnan()
    kinds = torch.zeros(2, 11, dtype=torch.long)
    kinds[:, 0] = FIRST
    without_first = rollout_maps(body, ids, span_grid(PARTITION, reads), sinks=SinkRule(share=0.01), token_kinds=kinds)
    torch.testing.assert_close(without_first.nansum(-1), torch.ones(3, 2, 2))
    assert (without_first[:, :, 0, 0] < found[:, :, 0, 0]).all()


# -------------------------------------------------------------------------------------------------------------- sinks


def sink_pattern() -> torch.Tensor:
    """[1, 2, 8, 8]: head 0 puts 0.7 on the first token and 0.2 on token 3; head 1 puts 0.6 on token 3."""
    pattern = torch.zeros(1, 2, 8, 8)
    for q in range(8):
        pattern[0, 0, q, 0] += 0.7
        pattern[0, 0, q, min(3, q)] += 0.2
        pattern[0, 0, q, q] += 0.1
        pattern[0, 1, q, min(3, q)] += 0.6
        pattern[0, 1, q, q] += 0.4
    return pattern


def test_sinks_by_hand() -> None:
    pattern, lengths, rule = sink_pattern(), torch.tensor([8]), SinkRule()
    got = received(pattern, lengths, rule.min_queries)
    torch.testing.assert_close(got[0, 0, :4], torch.tensor([0.7, 0.0, 0.0, 0.2]))
    torch.testing.assert_close(got[0, 1, 3], torch.tensor(0.6))
    assert got[0, :, 4:].isnan().all() and not got[0, :, :4].isnan().any()  # 4 to 7 have fewer than 4 tokens behind
    kinds = torch.tensor([[FIRST, 0, 0, DELIMITER, 0, 0, 0, 0]])
    assert sink_mask(got, kinds, rule).nonzero().tolist() == [[0, 0, 0], [0, 1, 3]]
    kinds[0, 3] = 0  # content: heavy, but no sink
    assert sink_mask(got, kinds, rule).nonzero().tolist() == [[0, 0, 0]]
    # padding neither reads nor is read
    padded = torch.nn.functional.pad(pattern, (0, 3, 0, 3), value=0.5)
    torch.testing.assert_close(received(padded, lengths, 4)[..., :8], got, equal_nan=True)
    assert received(padded, lengths, 4)[..., 8:].isnan().all()


def test_maps_without_sinks_lose_the_sink_alone() -> None:
    pattern = sink_pattern()
    grid = span_grid([[Span(0, 1), Span(1, 4), Span(4, 8)]])
    mask = torch.zeros(1, 2, 8, dtype=torch.bool)
    mask[0, 0, 0] = True
    plain, rest = plain_map(pattern, grid), plain_map(without(pattern, mask), grid)
    assert rest[0, 0, :, 0].abs().max() == 0
    torch.testing.assert_close(rest[0, 0, :, 1:], plain[0, 0, :, 1:], equal_nan=True)
    torch.testing.assert_close(rest[0, 1], plain[0, 1], equal_nan=True)
    scaled = plain_map(without(pattern, mask, renormalise=True), grid)
    torch.testing.assert_close(scaled[0, :, 1:].nansum(-1), torch.ones(2, 2))
    assert scaled[0, 0, 0, 0].isnan()  # the first token has nothing else to read
    assert scaled[0, 1, 0, 0] == 1
    v = torch.ones(1, 8, 1, 2)
    weighted, shares = value_maps(without(pattern, mask), v, torch.eye(2).expand(2, 2, 2), grid)
    torch.testing.assert_close(weighted, plain_map(without(pattern, mask), grid) * 2**0.5, equal_nan=True)
    torch.testing.assert_close(shares[0, :, 1:].nansum(-1), torch.ones(2, 2))
    # a destination with some queries of which something is left is the mean over those
    mixed = span_grid([[Span(0, 4), Span(4, 8)]])
    torch.testing.assert_close(
        plain_map(without(pattern, mask, renormalise=True), mixed)[0, 0, 0, 0], torch.tensor(1.0)
    )


def test_kinds_of_tokens(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa")
    tokens = context.encode(Trace("a", "Tom, go", ("3 + 4 = 7.", "now x"), "7", FORMAT))
    kinds = kinds_of_rows([tokens.ids, tokens.ids[:3]], context.tokenizer, SinkRule())
    texts = [context.tokenizer.decode([t]) for t in tokens.ids]
    delimiters = {t for t, kind in zip(texts, kinds[0].tolist(), strict=True) if kind == DELIMITER}
    assert {",", ".", "\n"} <= delimiters and not any(c.isalnum() or c in "+=" for t in delimiters for c in t)
    assert kinds[0, 0] == kinds[1, 0] == FIRST
    assert (kinds[1, 3:] == 0).all()
    with pytest.raises(UserError, match="share"):
        SinkRule(share=0.0)


# -------------------------------------------------------------------------------------------------------------- study


def test_the_study_makes_whole_tables_and_a_figure(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa")
    run = Run.open(tmp_path / "run", {})
    context.run = run
    tables = run_study(AttentionMap(sink_share=0.2), context, run, quiet=True).tables
    maps = tables["attention_map"]
    assert set(maps["mind"]) == {"base", "tuned"} and set(maps["kind"]) == {
        "plain", "value_weighted", "value_share", "gradient"
    }  # fmt: skip
    answer = maps[(maps["destination"] == "answer position") & (maps["sinks"] == "kept")]
    common = answer[(answer["source"] != "step 2") & (answer["kind"] == "plain")]  # step 2 is not in every trace
    assert (common["n"] == 4).all() and (common["ci_low"] < common["ci_high"]).all()
    assert (answer[answer["kind"] == "gradient"]["n"].max()) == 3  # one trace has no contrast
    # the maps of the study are those of the function
    with context.open("tuned") as body:
        made = prepare(context, [item.trace for item in context.items])
        direct = attention_maps(body, made.ids, made.grid, kinds=["plain"]).kept["plain"]
    place = (common["mind"] == "tuned") & (common["layer"] == 1) & (common["head"] == 2)
    ours = common[place & (common["source"] == "question")]["value"].item()
    by_trace = [direct[1, k, 2, len(made.destinations[k]) - 1, 0] for k in range(4)]
    assert ours == pytest.approx(float(torch.stack(by_trace).mean()), rel=1e-5)
    gradients = maps[maps["kind"] == "gradient"]
    assert gradients["value"].abs().max() > 1e-3 and (gradients["value"] < 0).any() and (gradients["value"] > 0).any()
    assert gradients["p"].between(0, 1).all() and (gradients["p_bh"] >= gradients["p"] - 1e-12).all()
    assert maps[maps["kind"] == "plain"]["p"].isna().all()
    kept, excluded = (maps[(maps["kind"] == "plain") & (maps["sinks"] == s)] for s in ("kept", "excluded"))
    place_columns = ["mind", "layer", "head", "destination", "source"]
    both = kept.merge(excluded, on=place_columns)
    assert len(both) == len(kept) == len(excluded)
    assert (both["value_y"] <= both["value_x"] + 1e-9).all() and (both["value_y"] < both["value_x"] - 1e-3).any()
    assert len(tables["attention_sinks"]) and (tables["attention_sinks"]["received"] > 0.2).all()
    rollout = tables["attention_rollout"]
    assert rollout["value"].between(0, 1).all() and set(rollout["source"]) >= {"question", "last step"}
    assert any(path.name.startswith("attention_map") for path in (run.path / "figures").iterdir())


def test_grid_cells_are_causal() -> None:
    grid: SpanGrid = span_grid([[Span(0, 2), Span(2, 2), Span(2, 5)]])
    assert grid.visible[0].tolist() == [[True, False, False], [False, False, False], [True, False, True]]
