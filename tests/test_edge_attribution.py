"""Edge scores against TransformerLens, against autograd through an explicitly split network, and their laws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from einops import einsum
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.patching.attribution import attribute
from reasoninterp.patching.edge_attribution import edge_attribution
from reasoninterp.patching.edge_graph import Edge, exact_edges, graph, name_of, rank_edges
from reasoninterp.patching.metric import DIRECTIONS, SIDES, ContrastPlan, contrast_plan
from reasoninterp.patching.stream import Receiver, Sender
from reasoninterp.traces.trace import Span
from tests.test_attribution import FAMILIES, ONE_TOKEN, SEVERAL_TOKENS, context_of, plan_of

TL_READERS = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_in": "mlp", "logits": "logits"}
TL_WRITERS = {"embed": "embed", "attn_head_out": "z", "mlp_out": "mlp_out"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edges_equal_transformer_lens(tmp_path: Path, family: str) -> None:
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    context = context_of(tmp_path, family, ONE_TOKEN)
    with context.open("base") as body:
        plan, _ = plan_of(context)
        found = edge_attribution(body, plan, "noising")
        for k, item in enumerate(context.items[:2]):
            one = contrast_plan(context, [item.contrast])
            read, (of, to) = int(one.sides[0].positions[0, 0]), one.sides[0].target.tolist()
            for p in body._bridge.parameters():  # its graph begins at the weights
                p.requires_grad_(True)
            theirs = attribution_patch(
                body._bridge,
                one.ids(1),
                one.ids(0),
                lambda logits, read=read, to=to, of=of: logits[0, read, to] - logits[0, read, of],
                EdgeAttributionConfig(granularity="edge"),
            ).edge_scores
            for p in body._bridge.parameters():
                p.requires_grad_(False)
            expected = torch.zeros_like(found.scores[k])
            for (w, r), value in theirs.items():
                writer = found.writers.index(Sender(TL_WRITERS[w.kind], w.layer or 0, w.head))
                layer = 0 if r.kind == "logits" else r.layer
                reader = found.readers.index(Receiver(TL_READERS[r.kind], layer, r.head))
                assert found.is_edge[writer, reader]
                expected[w.position, writer, reader] = value
            assert len(theirs) == found.n_edges * one.ids(0).shape[1]
            assert expected.abs().max() > 0.1 and (expected.abs() > 1e-3).sum() > 300
            torch.testing.assert_close(found.scores[k], expected, atol=1e-4, rtol=1e-4)


def deltas(body: Body, plan: ContrastPlan, direction: str) -> dict[str, Tensor]:
    """What every writer changes in the stream, and what every reader's input changes by, [row, pos, d_model]."""
    sides = SIDES[direction]
    layers = range(body.n_layers)
    names = [site(c, layer) for c in ("z", "mlp_out", "resid_pre", "resid_mid", "resid_post") for layer in layers]
    source, into = (body.cache(plan.ids(s), names) for s in (sides.source, sides.into))
    change = {name: source[name] - into[name] for name in names}
    w_o = body._bridge.W_O
    out = {"embed": change[site("resid_pre", 0)]}
    for layer in layers:
        heads = einsum(change[site("z", layer)], w_o[layer], "row pos head e, head e d -> head row pos d")
        out |= {f"L{layer}.z.{h}": heads[h] for h in range(body.n_heads)}
        out[f"L{layer}.mlp_out"] = change[site("mlp_out", layer)]
        out[f"into L{layer}.attn"] = change[site("resid_pre", layer)]
        out[f"into L{layer}.mlp"] = change[site("resid_mid", layer)]
    out["into logits"] = change[site("resid_post", body.n_layers - 1)]
    return out


@contextmanager
def split_readers(body: Body, steps: dict[str, Tensor], push: Callable[[str], Tensor]) -> Iterator[None]:
    """Every reader reads its own input, moved by `steps[reader] · push(its input)`, through torch's own modules.

    `steps[reader]` is [row, pos]; nothing else sees the move.
    """
    leaves = {leaf.name: leaf for leaf in body.leaves()}

    def norm(name: str, x: Tensor) -> Tensor:
        module = leaves[name]._module
        return type(module).forward(module, x)  # without the hooks

    inputs: dict[int, Tensor] = {}

    def moved(reader: str, where: str, x: Tensor) -> Tensor:
        return x + steps[reader][..., None] * push(where)

    def read_attention(layer: int, component: str) -> Callable[..., Tensor]:
        def hook(module: torch.nn.Module, _args: object, out: Tensor) -> Tensor:
            n = body.n_heads if component == "q" else body.n_kv_heads
            by_head = []
            for h in range(n):
                x = norm(f"L{layer}.ln1", moved(f"L{layer}.{component}.{h}", f"L{layer}.attn", inputs[layer]))
                by_head.append(type(module).forward(module, x).unflatten(-1, (n, -1))[..., h, :])
            return torch.stack(by_head, dim=-2).flatten(-2)

        return hook

    def keep(layer: int) -> Callable[..., None]:
        return lambda _module, args, _out: inputs.__setitem__(layer, args[0])

    def read(reader: str, where: str, name: str) -> Callable[..., Tensor]:
        return lambda _module, args, _out: norm(name, moved(reader, where, args[0]))

    with ExitStack() as stack:
        for layer, block in enumerate(body._bridge.blocks):
            stack.callback(block.ln1.register_forward_hook(keep(layer)).remove)
            for c in ("q", "k", "v"):
                module = leaves[f"L{layer}.{c}"]._module
                stack.callback(module.register_forward_hook(read_attention(layer, c)).remove)
            hook = read(f"L{layer}.mlp", f"L{layer}.mlp", f"L{layer}.ln2")
            stack.callback(block.ln2.register_forward_hook(hook).remove)
        stack.callback(body._bridge.ln_final.register_forward_hook(read("logits", "logits", "ln_final")).remove)
        yield


def by_autograd(body: Body, plan: ContrastPlan, direction: str, push: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """For every reader, the derivative of the margin as its input alone is moved along `push`, [row, pos]."""
    sides = SIDES[direction]
    steps = {name_of(r): torch.zeros(plan.ids(0).shape, requires_grad=True) for r in graph(body)[1]}
    with split_readers(body, steps, push):
        total = plan.margins(body, sides.into, grad=True).sum()
    found = torch.autograd.grad(total, list(steps.values()))
    return {name: sides.sign * g for name, g in zip(steps, found, strict=True)}


@pytest.mark.parametrize(
    ("family", "direction"), [("llama-gqa", "noising"), ("qwen3", "denoising"), ("gpt2", "noising")]
)
def test_edges_equal_autograd_through_split_readers(tmp_path: Path, family: str, direction: str) -> None:
    context = context_of(tmp_path, family, ONE_TOKEN)
    with context.open("base") as body:
        plan, _ = plan_of(context)
        found = edge_attribution(body, plan, direction)
        change = deltas(body, plan, direction)
        seen = dict.fromkeys(("q", "k", "v", "mlp", "logits"), 0.0)
        for w, writer in enumerate(found.writers):
            oracle = by_autograd(body, plan, direction, lambda _, writer=writer: change[name_of(writer)])
            for r, reader in enumerate(found.readers):
                if not found.is_edge[w, r]:
                    assert (found.scores[:, :, w, r] == 0).all()
                    continue
                expected = oracle[name_of(reader)]
                torch.testing.assert_close(found.scores[:, :, w, r], expected, atol=1e-4, rtol=1e-3)
                seen[reader.component] = max(seen[reader.component], float(expected.abs().max()))
        assert min(seen.values()) > 0.02, seen
        # over its writers, a reader's edges sum to the attribution of its whole input
        whole = by_autograd(body, plan, direction, lambda where: change[f"into {where}"])
        for r, reader in enumerate(found.readers):
            torch.testing.assert_close(found.scores[..., r].sum(-1), whole[name_of(reader)], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_writers_edges_sum_to_its_own_attribution(tmp_path: Path, family: str, steps: int) -> None:
    context = context_of(tmp_path, family, SEVERAL_TOKENS)
    with context.open("base") as body:
        plan, _ = plan_of(context)
        for direction in DIRECTIONS:
            nodes = attribute(body, plan, direction, ("resid_pre", "z", "mlp_out", "resid_post"), steps=steps).values
            found = edge_attribution(body, plan, direction, steps=steps)
            assert found.scores.abs().max() > 0.1
            for w, writer in enumerate(found.writers):
                own = nodes["resid_pre" if writer.component == "embed" else writer.component]
                expected = own[:, writer.layer, writer.head or 0]
                torch.testing.assert_close(found.scores[:, :, w].sum(-1), expected, atol=1e-4, rtol=1e-4)
            last = nodes["resid_post"][:, -1, 0]
            torch.testing.assert_close(found.scores[..., -1].sum(-1), last, atol=1e-4, rtol=1e-4)


def test_contrasts_do_not_meet_and_spans_are_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, "qwen3", SEVERAL_TOKENS)
    with context.open("base") as body:
        plan, spans = plan_of(context)
        whole = edge_attribution(body, plan, "denoising")
        monkeypatch.setattr("reasoninterp.patching.edge_attribution._FLOATS_AT_ONCE", {"cpu": 1})  # tokens by eights
        small = edge_attribution(body, plan, "denoising")
        torch.testing.assert_close(small.scores, whole.scores, atol=1e-6, rtol=1e-4)
        for k, item in enumerate(context.items):
            alone = edge_attribution(body, contrast_plan(context, [item.contrast]), "denoising")
            n = alone.scores.shape[1]
            torch.testing.assert_close(alone.scores[0], whole.scores[k, :n], atol=1e-5, rtol=1e-4)
            assert (whole.scores[k, n:] == 0).all()
            assert whole.present[k].sum() == len(plan.prompts[0][k])
        overlapping = [[*row, Span(0, 12)] for row in spans]
        summed = edge_attribution(body, plan, "denoising", spans=overlapping)
    assert summed.scores.shape[1] == len(overlapping[0])
    for k, row in enumerate(overlapping):
        for place, span in enumerate(row):
            assert summed.present[k, place] == (span is not None)
            expected = whole.scores[k, slice(*span)].sum(0) if span else torch.zeros_like(whole.scores[k, 0])
            torch.testing.assert_close(summed.scores[k, place], expected, atol=1e-5, rtol=1e-4)


def test_the_leading_edges_are_confirmed(tmp_path: Path) -> None:
    context = context_of(tmp_path, "llama-gqa", ONE_TOKEN)
    with context.open("base") as body:
        plan, spans = plan_of(context)
        scores = edge_attribution(body, plan, "noising", spans=spans)
        table = rank_edges(scores, 12, exact=exact_edges(body, plan, "noising", spans), seed=1)
        assert len(table) == 12 and table["value"].abs().is_monotonic_decreasing
        means = scores.scores.sum(0) / scores.present.sum(0)[:, None, None]
        assert abs(table["value"].iloc[0]) == pytest.approx(float(means.abs().max()))
        for _, row in table.iloc[:3].iterrows():
            writer = next(w for w in scores.writers if name_of(w) == row["writer"])
            reader = next(r for r in scores.readers if name_of(r) == row["reader"])
            one = exact_edges(body, plan, "noising", spans)([Edge(int(row["place"]), writer, reader)])[0]
            here = scores.present[:, int(row["place"])]
            assert row["exact"] == pytest.approx(float(one[here].mean()), abs=1e-5)
            assert row["n"] == int(here.sum())
    assert table["exact"].abs().max() > 0.05
    # a first-order estimate: it orders edges as exact patching does, mostly
    assert table[["value", "exact"]].corr(method="spearman").iloc[0, 1] > 0.5
    assert list(rank_edges(scores, 0).columns) == ["place", "writer", "reader", "value", "ci_low", "ci_high", "n"]
    with pytest.raises(UserError, match="k: -1"):
        rank_edges(scores, -1)


def test_nothing_is_left_on_the_model(tmp_path: Path) -> None:
    """No flag is set, no hook stays, and the margins are bit for bit what they were."""
    context = context_of(tmp_path, "gpt2", ONE_TOKEN)
    with context.open("base") as body:
        plan, _ = plan_of(context)
        before = plan.margins(body, 0)
        edge_attribution(body, plan, "noising", steps=2)
        cfg = body._bridge.cfg
        assert not (cfg.use_attn_result or cfg.use_split_qkv_input or cfg.use_hook_mlp_in)
        assert torch.equal(plan.margins(body, 0), before)
        assert all(p.grad is None for p in body._bridge.parameters())
        with pytest.raises(UserError, match="direction"):
            edge_attribution(body, plan, "both")
