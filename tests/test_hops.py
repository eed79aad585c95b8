"""Hops between columns against a plain network on doubled tokens, whose attention mask says who reads whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Minds
from reasoninterp.patching.columns import columns
from reasoninterp.patching.hops import Flow, Heads, Hop
from reasoninterp.patching.metric import DIRECTIONS, SIDES, ContrastPlan, contrast_plan
from reasoninterp.patching.paths import path_effects
from reasoninterp.patching.plain import patched_margins, span_mask
from reasoninterp.patching.routes import column_spans
from reasoninterp.patching.stream import Sender, receivers_after
from reasoninterp.traces.trace import Span
from tests.test_patching import items
from tests.tiny import save_tiny

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
LAST, ANSWER = 10_000, 10_001


class Setting(NamedTuple):
    folder: str
    body: Body
    plan: ContrastPlan
    spans: dict[int, list[Span | None]]


@contextmanager
def setting(folder: Path, family: str, n: int = 3) -> Iterator[Setting]:
    """A tiny body and the columns of its contrasts: step 1 changed (traces 0 and 2, of two steps), step 2 of three."""
    saved = save_tiny(folder / family, family)
    context = Context(Minds.load({"base": saved}), [])
    context.items = items(context.tokenizer, n)
    with context.open("base") as body:
        contrasts = [i.contrast for i in context.items if i.contrast is not None]
        tables = [{c.order: c.span for c in columns(context.encode(c.clean))} for c in contrasts]
        orders = sorted({order for table in tables for order in table})
        spans: dict[int, list[Span | None]] = {o: [table.get(o) for table in tables] for o in orders}
        yield Setting(saved, body, contrast_plan(context, contrasts), spans)


def doubled(
    here: Setting, direction: str, contrast: int, origin: int, hops: Sequence[Hop], head_sees: Heads | None = None
) -> float:
    """The margin by a plain Hugging Face network: every column's tokens stand there twice, unchanged and changed.

    A changed token sees the changed copies of the columns from which a hop leads (in the heads of `head_sees`, if
    given, in every layer) and the unchanged copies of all others.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(here.folder, attn_implementation="eager")
    sides, plan = SIDES[direction], here.plan
    into, source = plan.prompts[sides.into][contrast], plan.prompts[sides.source][contrast]
    n = len(into)
    column = torch.zeros(n, dtype=torch.long)
    for order, found in here.spans.items():
        span = found[contrast]
        if span is not None:
            column[span.start : span.stop] = order
    text = torch.where(column == origin, torch.tensor(source), torch.tensor(into))
    ids = torch.cat([torch.tensor(into), text])[None]
    position = torch.arange(n).repeat(2)[None]
    causal = torch.ones(n, n).tril().bool()
    heads = [None] if head_sees is None else range(model.config.num_attention_heads)
    masks = []
    for head in heads:
        led = {(h.source, h.target) for h in hops if h.heads is None or (0, head) in (head_sees or ())}
        by_hop = torch.tensor([[(int(k), int(q)) in led or k == q for k in column] for q in column])
        top = torch.cat([causal, torch.zeros(n, n).bool()], 1)
        masks.append(torch.cat([top, torch.cat([causal & ~by_hop, causal & by_hop], 1)]))
    mask = torch.where(torch.stack(masks)[None], 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False).logits[0, -1]
    side = plan.sides[0]
    clean, corrupt = (int(side.target[(side.item == contrast) & (side.part == part)]) for part in (1, 2))
    return float(logits[corrupt] - logits[clean])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_hops_equal_the_doubled_network(tmp_path: Path, family: str, direction: str) -> None:
    with setting(tmp_path, family) as here:
        flow = Flow(here.body, here.plan, direction, here.spans)
        sides = SIDES[direction]
        plain = here.plan.margins(here.body, sides.into)
        every = [Hop(a, b) for a, b in combinations(sorted(here.spans), 2) if a > 0]
        sets = [[Hop(1, ANSWER)], [Hop(1, LAST), Hop(LAST, ANSWER)], [h for h in every if h != Hop(1, ANSWER)], every]
        for hops in sets:
            ours = flow.effect(1, hops)[0]
            oracle = sides.sign * (doubled(here, direction, 0, 1, hops) - plain[0])
            assert abs(oracle) > 1e-3
            torch.testing.assert_close(ours, oracle, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hops_of_one_query_head_equal_the_doubled_network(tmp_path: Path, family: str) -> None:
    """Also where a query head shares its keys and values with another that does not take part."""
    with setting(tmp_path, family, 1) as here:
        flow = Flow(here.body, here.plan, "noising", here.spans)
        one: Heads = frozenset((layer, 1) for layer in range(3))
        plain = here.plan.margins(here.body, 0)
        for hops in (
            [Hop(1, ANSWER, one)],
            [Hop(1, LAST, one), Hop(LAST, ANSWER)],
            [Hop(1, LAST), Hop(LAST, ANSWER, one)],
        ):
            oracle = doubled(here, "noising", 0, 1, hops, one) - plain[0]
            assert abs(oracle) > 1e-4
            torch.testing.assert_close(flow.effect(1, hops)[0], oracle, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_laws(tmp_path: Path, family: str, direction: str) -> None:
    with setting(tmp_path, family) as here:
        body, plan = here.body, here.plan
        sides = SIDES[direction]
        flow = Flow(body, plan, direction, here.spans)
        # all hops are the run on the text with this column changed
        embed = site("resid_pre", 0)
        source = body.cache(plan.ids(sides.source), [embed])[embed]
        changed = patched_margins(body, plan, direction, embed, source, span_mask(plan, sides.into, here.spans[1]))
        whole = sides.sign * (changed - plan.margins(body, sides.into))
        every = [Hop(a, b) for a, b in combinations(sorted(here.spans), 2) if a > 0]
        torch.testing.assert_close(flow.total(1), whole, atol=0, rtol=0)
        torch.testing.assert_close(flow.effect(1, every), whole, atol=2e-5, rtol=1e-4)
        assert whole[0].abs() > 1e-3
        # no hops, and hops that do not lead from the origin to the answer, change nothing
        for hops in ([], [Hop(1, LAST)], [Hop(LAST, ANSWER)]):
            assert flow.effect(1, hops).abs().max() < 1e-5
        # naming every head is naming none; naming no head is no hop; one layer at a time is something in between
        heads: Heads = frozenset((layer, head) for layer in range(3) for head in range(4))
        layers: Heads = frozenset((layer, None) for layer in range(3))
        free = flow.effect(1, [Hop(1, ANSWER)])
        for named in (heads, layers):
            torch.testing.assert_close(flow.effect(1, [Hop(1, ANSWER, named)]), free, atol=0, rtol=0)
        assert flow.effect(1, [Hop(1, ANSWER, frozenset())]).abs().max() < 1e-5
        one = flow.effect(1, [Hop(1, ANSWER, frozenset({(1, None)}))])
        split = flow.effect(1, [Hop(1, ANSWER, frozenset({(1, 0), (1, 1), (1, 2), (1, 3)}))])
        assert (one - free)[0].abs() > 1e-4 and one[0].abs() > 1e-4
        torch.testing.assert_close(one, split, atol=0, rtol=0)


def test_routes_of_two_step_and_three_step_chains(tmp_path: Path) -> None:
    with setting(tmp_path, "llama-gqa") as here:
        flow = Flow(here.body, here.plan, "noising", here.spans)
        first, second = flow.routes(1), flow.routes(2)
        # as if the last step began where the changed second one does: nothing is between it and the answer
        spans = {c: list(found) for c, found in here.spans.items()}
        step, last = spans[2][1], spans[LAST][1]
        assert step is not None and last is not None
        spans[2][1], spans[LAST][1] = None, Span(step.start, last.stop)
        merged = Flow(here.body, here.plan, "noising", spans).routes(LAST)
    assert merged.via == {}
    assert merged.total[1].abs() > 1e-3
    torch.testing.assert_close(merged.direct, merged.total, atol=2e-5, rtol=1e-4)
    assert merged.indirect.abs().max() == 0 and merged.rest.abs().max() < 2e-5
    # where a single step stands between origin and answer, going by it is everything indirect
    assert set(first.via) == {2, LAST} and set(second.via) == {LAST}
    assert first.via[2].isnan().tolist() == [True, False, True]
    for found, k in ((first, 0), (second, 1)):
        assert found.indirect[k].abs() > 1e-3
        torch.testing.assert_close(found.via[LAST][k], found.indirect[k], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.rest[k], found.total[k] - found.direct[k] - found.via[LAST][k])
    assert second.total.isnan().tolist() == [True, False, True]
    assert second.total[1] != 0 and first.total[1] == 0  # the first step of trace 1 is not changed


def test_answers_of_several_tokens(tmp_path: Path) -> None:
    """Each answer then has a row of its own, with tokens behind the prompt; both rows are patched alike."""
    context = Context(Minds.load({"base": save_tiny(tmp_path / "base", "llama-gqa")}), [])
    pairs = [i.contrast for i in items(context.tokenizer) if i.contrast is not None]
    contrasts = [
        replace(c, clean=replace(c.clean, answer="zebra"), corrupt=replace(c.corrupt, answer="quoll")) for c in pairs
    ]
    with context.open("base") as body:
        context.items = items(context.tokenizer)
        plan = contrast_plan(context, contrasts)
        assert len(plan.ids(0)) == 2 * len(contrasts)
        spans = column_spans([columns(context.encode(c.clean)) for c in contrasts])
        flow = Flow(body, plan, "denoising", spans)
        every = [
            Hop(a, b, frozenset({(0, None), (1, 2), (2, None)})) for a, b in combinations(sorted(spans), 2) if a > 0
        ]
        assert flow.total(1)[0].abs() > 1e-3
        torch.testing.assert_close(
            flow.effect(1, [h._replace(heads=None) for h in every]), flow.total(1), atol=3e-5, rtol=1e-4
        )
        assert (flow.effect(1, every) - flow.total(1))[0].abs() > 1e-4
        senders = [Sender("embed")]
        paths = path_effects(
            body, plan, "denoising", senders, receivers_after(body, senders[0]), spans[1], reading="running"
        )
        torch.testing.assert_close(paths, flow.total(1), atol=3e-5, rtol=1e-4)


def test_a_planted_relay_is_found(tmp_path: Path) -> None:
    """Attention is masked by hand so that the answer position cannot see step 1: all goes by the last step."""
    with setting(tmp_path, "llama-gqa", 1) as here:
        flow = Flow(here.body, here.plan, "noising", here.spans)
        answer, step = here.spans[ANSWER][0], here.spans[1][0]
        assert answer is not None and step is not None

        def blind(act: Tensor) -> Tensor:
            new = act.clone()
            new[:, :, answer.start :, step.start : step.stop] = torch.finfo(act.dtype).min
            return new

        with here.body.hooks([(site("attn_scores", layer), blind) for layer in range(3)]):
            relay = Flow(here.body, here.plan, "noising", here.spans).routes(1)
        free = flow.routes(1)
    assert relay.direct.abs().max() < 1e-6
    assert relay.total.abs().min() > 1e-3
    torch.testing.assert_close(relay.via[LAST], relay.total, atol=2e-5, rtol=1e-4)
    assert free.direct.abs().min() > 1e-3


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with setting(tmp_path, "llama-gqa") as here:
        flow = Flow(here.body, here.plan, "noising", here.spans)
        for hop, words in (
            (Hop(LAST, 1), "tokens are read by later ones only"),
            (Hop(1, 5), "column 5: not one of 0, 1, 2, 10000, 10001"),
            (Hop(1, ANSWER, frozenset({(0, 4)})), "head 4 of layer 0"),
        ):
            with pytest.raises(UserError, match=words):
                flow.effect(1, [hop])
        with pytest.raises(UserError, match="no token between its last step and the answer"):
            Flow(here.body, here.plan, "noising", {**here.spans, ANSWER: [None] * 3})
