"""Patching against TransformerLens' own sweep, and the laws of patching."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from reasoninterp.models.body import site
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.patching.columns import columns
from reasoninterp.patching.heads import Heads
from reasoninterp.patching.metric import DIRECTIONS, SIDES, contrast_plan
from reasoninterp.patching.plain import patched_margins, span_mask
from reasoninterp.patching.residual import Residual
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Span, Trace, encode
from tests.tiny import save_tiny, save_tuned

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")


def items(tokenizer: object, n: int = 3) -> list[Item]:
    """Aligned contrasts with answers of one token."""
    out = []
    for k in range(n):
        clean = Trace(f"t{k}", f"go {k}", tuple(f"now {'xyz'[j]}" for j in range(2 + k % 2)), str(7 + k % 2), FORMAT)
        place = k % 2
        for value in "abcdefghijklmnopqrstuvw":  # whichever letters this tokenizer gives as many tokens
            steps = [*clean.steps[:place], f"now {value}", *clean.steps[place + 1 :]]
            corrupt = clean.with_steps(steps, answer="6")
            made = contrast("propagated", clean, corrupt, tokens=(encode(clean, tokenizer), encode(corrupt, tokenizer)))
            if made.aligned:
                out.append(Item(clean, made))
                break
    assert len(out) == n
    return out


def context_of(folder: Path, family: str) -> Context:
    save_tiny(folder / "base", family, n_layers=3)
    save_tuned(folder / "base", folder / "tuned", scale=0.05)
    minds = Minds.load({"base": str(folder / "base"), "tuned": str(folder / "tuned")})
    return Context(minds, items(minds.tokenizer("base")))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "v"])
def test_patched_cells_equal_transformer_lens(tmp_path: Path, family: str, component: str) -> None:
    from transformer_lens import patching

    context = context_of(tmp_path, family)
    item = context.items[0]
    with context.open("base") as body:
        plan = contrast_plan(context, [item.contrast])
        bridge = body._bridge
        clean, corrupt = plan.ids(0), plan.ids(1)
        read, targets = plan.sides[0].positions[0, 0], plan.sides[0].target

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return logits[0, read, targets[1]] - logits[0, read, targets[0]]

        generator = torch.Generator().manual_seed(0)
        cells = [
            (int(torch.randint(3, (), generator=generator)), p)
            for p in range(plan.first_difference()[0], clean.shape[1])
        ]
        names = [site(component, layer) for layer in range(3)]
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean, names_filter=names)
            oracle = patching.generic_activation_patch(
                bridge,
                corrupt,
                cache,
                metric,
                lambda act, index, source: _put(act, source, index[1]),
                component,
                index_df=pd.DataFrame(cells, columns=["layer", "pos"]),
            )
        cached = body.cache(plan.ids(0), names)
        ours = [
            patched_margins(
                body, plan, "denoising", names[layer], cached[names[layer]], span_mask(plan, 1, [Span(p, p + 1)])
            )
            for layer, p in cells
        ]
    ours_values = torch.cat(ours)
    assert (ours_values - plan_margin(context, item, 1)).abs().max() > 1e-3
    torch.testing.assert_close(ours_values, torch.as_tensor(oracle).flatten().float(), atol=2e-5, rtol=1e-4)


def _put(act: torch.Tensor, source: torch.Tensor, position: int) -> torch.Tensor:
    new = act.clone()
    new[:, position] = source[:, position]
    return new


def plan_margin(context: Context, item: Item, side: int) -> float:
    with context.open("base") as body:
        return float(contrast_plan(context, [item.contrast]).margins(body, side)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_laws(tmp_path: Path, family: str, direction: str) -> None:
    context = context_of(tmp_path, family)
    with context.open("base") as body:
        plan = contrast_plan(context, [i.contrast for i in context.items])
        sides = SIDES[direction]
        plain, other = plan.margins(body, sides.into), plan.margins(body, sides.source)
        assert (plain - other).abs().min() > 1e-3
        everywhere = torch.ones(plan.ids(sides.into).shape, dtype=torch.bool)
        for layer in range(body.n_layers):
            name = site("resid_pre", layer)
            own = body.cache(plan.ids(sides.into), [name])[name]
            theirs = body.cache(plan.ids(sides.source), [name])[name]
            # a run into itself changes nothing; everything gives the other run; nothing changes nothing
            torch.testing.assert_close(
                patched_margins(body, plan, direction, name, own, everywhere), plain, atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                patched_margins(body, plan, direction, name, theirs, everywhere), other, atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                patched_margins(body, plan, direction, name, theirs, ~everywhere), plain, atol=1e-5, rtol=0
            )


def test_an_edit_leaves_earlier_logits_exactly_as_they_were(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa")
    with context.open("base") as body:
        ids = contrast_plan(context, [context.items[0].contrast]).ids(0)
        before = body.forward(ids)
        name, at = site("resid_pre", 1), ids.shape[1] - 4

        def hook(act: torch.Tensor) -> torch.Tensor:
            return torch.cat([act[:, :at], act[:, at:] + 1.0], dim=1)

        after = body.forward(ids, hooks=[(name, hook)])
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.allclose(before[:, at:], after[:, at:])


def test_columns_partition_the_prompt(tmp_path: Path) -> None:
    context = context_of(tmp_path, "qwen3")
    for item in context.items:
        tokens = context.encode(item.trace)
        found = columns(tokens)
        covered = [p for c in found for p in range(*c.span)]
        assert covered == list(range(tokens.answer.start))
        assert found[0].label == "question"
        assert [c.label for c in found][-2:] == ["last step", "answer position"]


def test_maps_are_whole_and_zero_before_the_change(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa")
    run = Run.open(tmp_path / "run", {})
    context.run = run
    table = run_study(Residual(), context, run, quiet=True).tables["residual"]
    assert set(table["mind"]) == {"base", "tuned"}
    assert (table[table["column"] == "question"]["value"] == 0).all()
    assert table[table["column"] != "question"]["value"].abs().max() > 0.01
    heads = run_study(Heads(), context, run, quiet=True).tables["heads"]
    assert len(heads) == 2 * 2 * 3 * context.minds.body.n_heads
    assert heads["value"].abs().max() > 1e-3
