"""Path patching against TransformerLens' own, against plain recomputation, and the laws of paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Minds
from reasoninterp.patching.metric import DIRECTIONS, SIDES, ContrastPlan, contrast_plan
from reasoninterp.patching.paths import (
    Reading,
    direct_paths,
    edge_effects,
    path_effects,
    path_margins,
)
from reasoninterp.patching.plain import patched_margins, span_mask
from reasoninterp.patching.stream import Receiver, Sender, receivers_after
from reasoninterp.traces.trace import Span
from tests.test_patching import items
from tests.tiny import save_tiny

FAMILIES = ("llama-gqa", "qwen3", "gpt2")


@contextmanager
def planned(folder: Path, family: str, n: int = 3) -> Iterator[tuple[Body, ContrastPlan, list[Span]]]:
    """A tiny body, a plan of its contrasts, and the tokens from the first change to the end of each prompt."""
    minds = Minds.load({"base": save_tiny(folder / family, family)})
    context = Context(minds, items(minds.tokenizer("base"), n))
    with context.open("base") as body:
        plan = contrast_plan(context, [i.contrast for i in context.items if i.contrast is not None])
        first = plan.first_difference()
        yield body, plan, [Span(f, len(p)) for f, p in zip(first, plan.prompts[0], strict=True)]


def leaf(body: Body, role: str, layer: int) -> Any:
    return next(found for found in body.leaves() if (found.role, found.layer) == (role, layer))


def written(body: Body, plan: ContrastPlan, layer: int, head: int) -> Tensor:
    """source − into of one head's write: the change of attn_out when that head alone has the source's z (denoising)."""
    name = site("z", layer)
    source = body.cache(plan.ids(0), [name])[name]
    out: list[Tensor] = []

    def put(act: Tensor) -> Tensor:
        new = act.clone()
        new[:, :, head] = source[:, :, head]
        return new

    body.forward(plan.ids(1), hooks=[(name, put), (site("attn_out", layer), lambda act: out.append(act.clone()))])
    return out[0] - body.cache(plan.ids(1), [site("attn_out", layer)])[site("attn_out", layer)]


def recomputed(body: Body, plan: ContrastPlan, name: str, at: str, delta: Tensor) -> Tensor:
    """The activation at a site when the whole stream at `at` has `delta` added: by the network itself."""
    out: list[Tensor] = []
    hooks = [(at, lambda act: act + delta), (name, lambda act: out.append(act.clone()))]
    body.forward(plan.ids(1), hooks=hooks)
    return out[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths_equal_transformer_lens(tmp_path: Path, family: str, component: str) -> None:
    from transformer_lens import patching

    with planned(tmp_path, family, 1) as (body, plan, spans):
        bridge = body._bridge
        read, targets = plan.sides[0].positions[0, 0], plan.sides[0].target
        ours = direct_paths(body, plan, "denoising", Sender("z", 0, 1), component, spans)[..., 0]
        plain = plan.margins(body, 1)
        with torch.no_grad():
            _, clean = bridge.run_with_cache(plan.ids(0))
            _, corrupt = bridge.run_with_cache(plan.ids(1))
            oracle = patching.get_act_patch_direct_path(
                bridge,
                plan.ids(1),
                clean,
                corrupt,
                lambda logits: logits[0, read, targets[1]] - logits[0, read, targets[0]],
                src_layer=0,
                src_head=1,
                component=component,  # type: ignore[arg-type]
                verbose=False,
            )
    assert ours[0].isnan().all()
    assert ours[1:].abs().max() > 1e-3
    torch.testing.assert_close(ours[1:], -(oracle[1:] - plain), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", ["q", "k", "v", "mlp", "logits"])
def test_edges_equal_the_networks_own_recomputation(tmp_path: Path, family: str, component: str) -> None:
    """The receiver's activation is taken from a run whose whole stream is changed; only it is put into a plain run."""
    with planned(tmp_path, family) as (body, plan, spans):
        delta = written(body, plan, 0, 1)
        layer, head = 1, 1
        if component == "logits":
            hooks = [(site("resid_post", 2), lambda act: act + delta)]
        elif component == "mlp":
            new = recomputed(body, plan, site("mlp_out", layer), site("resid_mid", layer), delta)
            hooks = [(site("mlp_out", layer), lambda act: new)]
        else:
            new = recomputed(body, plan, site(component, layer), site("resid_pre", layer), delta)
            hooks = [
                (site(component, layer), lambda act: torch.cat([act[:, :, :head], new[:, :, head:2], act[:, :, 2:]], 2))
            ]
        oracle = -(plan.margins(body, 1, hooks=hooks) - plan.margins(body, 1))
        receiver = Receiver(component, layer, head if component in "qkv" else None)
        sender = Sender("z", 0, 1)
        readings: tuple[Reading, ...] = ("frozen", "running")
        for reading in readings:
            ours = path_effects(body, plan, "denoising", [sender], [receiver], spans, reading=reading)
            torch.testing.assert_close(ours, oracle, atol=3e-5, rtol=1e-4)
        torch.testing.assert_close(
            edge_effects(body, plan, "denoising", [(sender, receiver)], spans)[0], oracle, atol=3e-5, rtol=1e-4
        )
    assert oracle.abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_edges_after_a_sender_together_are_its_plain_patch(tmp_path: Path, family: str, direction: str) -> None:
    with planned(tmp_path, family) as (body, plan, spans):
        sides = SIDES[direction]
        mask = span_mask(plan, sides.into, spans)
        plain = plan.margins(body, sides.into)
        for sender in (Sender("embed"), Sender("z", 0), Sender("attn_out", 0), Sender("mlp_out", 1), Sender("z", 2, 3)):
            name = site("resid_pre", 0) if sender.component == "embed" else site(sender.component, sender.layer)
            source = body.cache(plan.ids(sides.source), [name])[name]
            at = mask
            if sender.component == "z":
                heads = torch.arange(4) == sender.head if sender.head is not None else torch.ones(4, dtype=torch.bool)
                at = mask[:, :, None, None] & heads[None, None, :, None]
            node = patched_margins(body, plan, direction, name, source, at)
            every = receivers_after(body, sender)
            paths = path_margins(body, plan, direction, [sender], every, spans, reading="running")
            assert (node - plain).abs().max() > 1e-3
            torch.testing.assert_close(paths, node, atol=3e-5, rtol=1e-4)
            if len(every) <= 2:  # no receiver reads another: frozen and running are one
                frozen = path_margins(body, plan, direction, [sender], every, spans)
                torch.testing.assert_close(frozen, node, atol=3e-5, rtol=1e-4)


def test_frozen_receivers_do_not_see_each_other(tmp_path: Path) -> None:
    """Wang et al.: both receivers' values are those of single paths, put in together."""
    with planned(tmp_path, "llama-gqa") as (body, plan, spans):
        delta = written(body, plan, 0, 2)
        new = {layer: recomputed(body, plan, site("v", layer), site("resid_pre", layer), delta) for layer in (1,)}
        pre = body.cache(plan.ids(1), [site("resid_pre", 2)])[site("resid_pre", 2)]
        new[2] = recomputed_at(body, plan, 2, pre + delta)
        hooks = [(site("v", layer), lambda act, layer=layer: new[layer]) for layer in (1, 2)]
        oracle = plan.margins(body, 1, hooks=hooks)
        both = [Receiver("v", 1), Receiver("v", 2)]
        frozen = path_margins(body, plan, "denoising", [Sender("z", 0, 2)], both, spans)
        running = path_margins(body, plan, "denoising", [Sender("z", 0, 2)], both, spans, reading="running")
    torch.testing.assert_close(frozen, oracle, atol=3e-5, rtol=1e-4)
    assert (frozen - running).abs().max() > 1e-3


def recomputed_at(body: Body, plan: ContrastPlan, layer: int, stream: Tensor) -> Tensor:
    out: list[Tensor] = []
    hooks = [(site("resid_pre", layer), lambda act: stream), (site("v", layer), lambda act: out.append(act.clone()))]
    body.forward(plan.ids(1), hooks=hooks)
    return out[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_through_a_named_head(tmp_path: Path, family: str) -> None:
    """z of L0H1 → keys of KV head 0 in layer 1 → what its query heads write → logits, hop by hop by hand."""
    with planned(tmp_path, family) as (body, plan, spans):
        delta = written(body, plan, 0, 1)
        keys = recomputed(body, plan, site("k", 1), site("resid_pre", 1), delta)
        z: list[Tensor] = []
        name = site("z", 1)
        hooks = [
            (site("k", 1), lambda act: torch.cat([keys[:, :, :1], act[:, :, 1:]], 2)),
            (name, lambda act: z.append(act.clone())),
        ]
        body.forward(plan.ids(1), hooks=hooks)
        plain_z = body.cache(plan.ids(1), [name])[name]
        assert (z[0] - plain_z)[:, :, body.n_heads // body.n_kv_heads :].abs().max() == 0
        out: list[Tensor] = []
        attn = site("attn_out", 1)
        body.forward(plan.ids(1), hooks=[(name, lambda act: z[0]), (attn, lambda act: out.append(act.clone()))])
        second = out[0] - body.cache(plan.ids(1), [attn])[attn]
        oracle = plan.margins(body, 1, hooks=[(site("resid_post", 2), lambda act: act + second)])
        ours = path_margins(
            body, plan, "denoising", [Sender("z", 0, 1)], [Receiver("logits")], spans, through=[[Receiver("k", 1, 0)]]
        )
        assert (ours - plan.margins(body, 1)).abs().max() > 1e-3
    torch.testing.assert_close(ours, oracle, atol=3e-5, rtol=1e-4)


def test_recomputed_mlps_equal_a_run_with_frozen_heads(tmp_path: Path) -> None:
    """Wang et al.'s own procedure: the sender's z from the other run, all other heads frozen, MLPs free."""
    with planned(tmp_path, "gpt2") as (body, plan, spans):
        names = [site("z", layer) for layer in range(3)]
        source, into = body.cache(plan.ids(0), names), body.cache(plan.ids(1), names)
        put = into[names[0]].clone()
        put[:, :, 1] = source[names[0]][:, :, 1]
        out: list[Tensor] = []
        hooks = [
            (names[0], lambda act: put),
            (names[1], lambda act: into[names[1]]),
            (site("q", 2), lambda act: out.append(act.clone())),
        ]
        body.forward(plan.ids(1), hooks=hooks)
        oracle = plan.margins(body, 1, hooks=[(site("q", 2), lambda act: out[0])])
        sender, receiver = [Sender("z", 0, 1)], [Receiver("q", 2)]
        ours = path_margins(body, plan, "denoising", sender, receiver, spans, mlps="recomputed")
        assert (ours - path_margins(body, plan, "denoising", sender, receiver, spans)).abs().max() > 1e-3
    torch.testing.assert_close(ours, oracle, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_sent_changes_nothing(tmp_path: Path, direction: str) -> None:
    with planned(tmp_path, "qwen3") as (body, plan, spans):
        sender, every = Sender("attn_out", 0), receivers_after(body, Sender("attn_out", 0))
        assert path_effects(body, plan, direction, [sender], every, [None] * 3).abs().max() == 0
        # tokens before the first change, and receivers that may read only those
        before = [Span(0, s.start) for s in spans]
        assert path_effects(body, plan, direction, [sender], every, before).abs().max() < 1e-5
        assert path_effects(body, plan, direction, [sender], every, spans, at=before).abs().max() == 0
        # one trace's span is one trace's effect
        one = path_effects(body, plan, direction, [sender], every, [spans[0], None, None])
        assert one[0].abs() > 1e-3 and one[1:].abs().max() == 0


def test_receivers_get_only_the_senders_before_them(tmp_path: Path) -> None:
    with planned(tmp_path, "llama-gqa") as (body, plan, spans):

        def margins(senders: list[Sender], receivers: list[Receiver]) -> Tensor:
            return path_margins(body, plan, "noising", senders, receivers, spans)

        first, second = Sender("z", 0, 1), Sender("mlp_out", 1)
        between, after = Receiver("v", 1), Receiver("v", 2)
        alone = margins([first], [between])
        torch.testing.assert_close(margins([first, second], [between]), alone, atol=0, rtol=0)
        assert (margins([first, second], [after]) - margins([first], [after])).abs().max() > 1e-3
        assert (alone - plan.margins(body, 0)).abs().max() > 1e-3


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with planned(tmp_path, "llama-gqa") as (body, plan, spans):
        good = Sender("z", 0, 1)
        for sender, receiver, words in (
            (Sender("z", 0, 4), Receiver("q", 1, 0), "sender head 4: z has heads 0 to 3"),
            (good, Receiver("k", 1, 2), "receiver head 2: k has heads 0 to 1"),
            (good, Receiver("mlp", 1, 0), "mlp has no heads"),
            (good, Receiver("q", 3), "layers are 0 to 2"),
            (good, Receiver("v", 0), "comes before what it reads"),
            (Sender("pattern", 0), Receiver("q", 1), "not one of embed"),
        ):
            with pytest.raises(UserError, match=words):
                path_effects(body, plan, "noising", [sender], [receiver], spans)
        with pytest.raises(UserError, match="nothing comes after"):
            path_effects(body, plan, "noising", [good], [Receiver("logits")], spans, through=[[Receiver("logits")]])
        with pytest.raises(UserError, match="name at least one sender"):
            path_effects(body, plan, "noising", [], [Receiver("logits")], spans)
        with pytest.raises(UserError, match="name at least one receiver"):
            path_effects(body, plan, "noising", [good], [], spans)
