"""The hooked body: sites, edits, gathered positions, padding, gradients, and leaves linear in their weights."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.models.minds import Minds, blend
from tests import tiny

STREAM = ("resid_pre", "resid_mid", "resid_post")
COMPONENTS = (*STREAM, "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "attn_scores")


def some_ids(seed: int, rows: int = 2, length: int = 9) -> Tensor:
    """Random token ids."""
    return torch.randint(2, 290, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def minds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Minds]:
    """Per family, two minds."""
    root = tmp_path_factory.mktemp("body")
    out = {}
    for family in tiny.FAMILIES:
        base = tiny.save_tiny(root / family, family)
        out[family] = Minds.load({"base": base, "tuned": tiny.save_tuned(base, root / f"{family}-t")})
    return out


@pytest.fixture(params=tiny.FAMILIES)
def body(request: pytest.FixtureRequest, minds: dict[str, Minds]) -> Body:
    """The body of each family, at its base."""
    return minds[request.param].body


def test_shapes_of_sites(body: Body) -> None:
    names = [site(c, 1) for c in COMPONENTS]
    found = body.cache(some_ids(0), names)
    rows, length, heads, kv, width = 2, 9, body.n_heads, body.n_kv_heads, body.d_head
    for name in names:
        if "hook_resid" in name or name.endswith("_out"):
            assert found[name].shape == (rows, length, body.d_model)
    assert found[site("z", 1)].shape == found[site("q", 1)].shape == (rows, length, heads, width)
    assert found[site("k", 1)].shape == found[site("v", 1)].shape == (rows, length, kv, width)
    assert found[site("pattern", 1)].shape == found[site("attn_scores", 1)].shape == (rows, heads, length, length)
    assert torch.allclose(found[site("pattern", 1)].sum(-1), torch.ones(rows, heads, length))
    with pytest.raises(ValueError, match="no component"):
        site("resid", 0)
    with pytest.raises(KeyError):
        body.forward(some_ids(0), hooks=[("blocks.0.hook_nothing", lambda a: a)])


@pytest.mark.parametrize("component", COMPONENTS)
def test_patching_a_run_into_itself_changes_nothing(component: str, body: Body) -> None:
    ids, name = some_ids(0), site(component, 1)
    own = body.cache(ids, [name])[name]
    plain = body.forward(ids)
    assert torch.equal(body.forward(ids, hooks=[(name, lambda _: own.clone())]), plain)
    assert torch.equal(body.forward(ids, hooks=[(name, lambda _: None)]), plain)


@pytest.mark.parametrize("component", STREAM)
def test_patching_the_whole_stream_gives_the_other_run(component: str, body: Body) -> None:
    name = site(component, 1)
    there = body.cache(some_ids(1), [name])[name]
    other = body.forward(some_ids(1))
    patched = body.forward(some_ids(0), hooks=[(name, lambda _: there)])
    assert (patched - other).abs().max() < 1e-5 < (other - body.forward(some_ids(0))).abs().max()


@pytest.mark.parametrize("component", COMPONENTS[3:])
def test_an_edit_at_a_position_leaves_what_comes_before(component: str, body: Body) -> None:
    ids = some_ids(0)

    def edit(act: Tensor) -> Tensor:
        new = act.clone()
        if component == "pattern":
            new[:, :, 5:] = new[:, :, 5:].flip(-1) * 0.5
        elif component == "attn_scores":
            new[:, :, 5:, 1] = -50.0
        else:
            new[:, 5:] = new[:, 5:].flip(0) * 3 + 1
        return new

    edited, plain = body.forward(ids, hooks=[(site(component, 1), edit)]), body.forward(ids)
    if component != "pattern":  # a pattern that is not causal may let nothing earlier see it either
        assert torch.equal(edited[:, :5], plain[:, :5])
    assert (edited[:, 5:] - plain[:, 5:]).abs().max() > 1e-3


def test_every_hook_is_counted(body: Body) -> None:
    ids, name = some_ids(0), site("mlp_out", 0)
    fired: list[int] = []
    with body.hooks([(name, lambda _: fired.append(1))]):
        body.forward(ids)
        body.forward(ids)
    assert len(fired) == 2
    with pytest.raises(RuntimeError, match="fired 1 times in 0"), body.hooks([(name, lambda _: None)]):
        body._model(input_ids=ids)  # a forward that the body does not know of
    if body.config.model_type == "gpt2":  # the bridge never runs the fused projection, so this hook would be silent
        with pytest.raises(RuntimeError, match="fired 0 times in 1"):
            body.forward(ids, hooks=[("blocks.0.attn.qkv.hook_out", lambda _: None)])
    body.forward(ids)  # nothing is left behind
    with pytest.raises(ZeroDivisionError):
        body.forward(ids, hooks=[(name, lambda _: 1 / 0)])
    assert not body._bridge.blocks[0].mlp.hook_out.fwd_hooks


def test_positions_are_gathered_before_the_unembedding(body: Body) -> None:
    ids = some_ids(0)
    positions = torch.tensor([[3, 8], [0, -1]])
    full = body.forward(ids)
    read = body.forward(ids, positions=positions)
    assert read.shape[:2] == (2, 2)
    assert (read - torch.stack([full[0, [3, 8]], full[1, [0, 8]]])).abs().max() < 1e-5
    shapes: list[tuple[int, ...]] = []
    unembed = body.leaves()[-1]
    with unembed.watch(lambda x, y: shapes.extend([tuple(x.shape), tuple(y.shape)])):
        body.forward(ids, positions=positions)
    assert unembed.role == "unembed" and [s[1] for s in shapes] == [2, 2]


def test_padding_is_invisible(body: Body) -> None:
    short, long = some_ids(3, 1, 6), some_ids(4, 1, 9)
    alone = body.forward(short)
    left = torch.cat([torch.cat([torch.full((1, 3), 1), short], 1), long])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    right = torch.cat([torch.cat([short, torch.full((1, 3), 1)], 1), long])
    assert (body.forward(left, attention_mask=mask)[0, 3:] - alone[0]).abs().max() < 1e-4
    assert (body.forward(right)[0, :6] - alone[0]).abs().max() < 1e-4
    assert (body.forward(left)[0, 3:] - alone[0]).abs().max() > 1e-2  # without the mask it does matter


def test_too_long_a_sequence_is_refused(minds: dict[str, Minds]) -> None:
    with pytest.raises(UserError, match="1024 positions"):
        minds["gpt2"].body.forward(some_ids(0, 1, 1025))
    assert minds["llama"].body.forward(some_ids(0, 1, 1025), positions=torch.tensor([[-1]])).shape[1] == 1


def test_gradients_reach_sites_and_agree_with_differences(body: Body) -> None:
    ids = some_ids(0, 1, 6)
    for component in ("resid_pre", "resid_mid", "z", "k", "mlp_out"):
        store: dict[str, Tensor] = {}

        def keep(act: Tensor, store: dict[str, Tensor] = store) -> Tensor:
            store["act"] = act
            return act

        name = site(component, 1)
        out = body.forward(ids, hooks=[(name, keep)], positions=torch.tensor([[-1]]), grad=True)[0, 0, 7]
        (gradient,) = torch.autograd.grad(out, store["act"])
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
        h = 2e-3
        ahead, behind = (
            body.forward(ids, hooks=[(name, lambda a, move=s * h * direction: a + move)])[0, -1, 7] for s in (1.0, -1.0)
        )
        assert (gradient * direction).sum().abs() > 1e-3
        assert torch.isclose((gradient * direction).sum(), (ahead - behind) / (2 * h), rtol=2e-2, atol=2e-2)
    assert not body.forward(ids).requires_grad
    assert not any(p.requires_grad for p in body._bridge.parameters())


def test_leaves_own_every_parameter_and_all_run(body: Body) -> None:
    covered = {name: torch.zeros(shape) for name, shape in body.param_shapes.items()}
    calls: dict[str, int] = {}
    for leaf in body.leaves():
        for part in leaf.params:
            part.of(covered[part.param]).add_(1)
        calls[leaf.name] = 0

        def count(_x: Tensor, _y: Tensor, name: str = leaf.name) -> None:
            calls[name] += 1

        with leaf.watch(count):
            body.forward(some_ids(0))
    assert set(calls.values()) == {1}
    for name, c in covered.items():  # a tied embedding is used twice
        assert bool((c == (2 if body.tied and c.shape[0] == 300 else 1)).all()), name


def test_leaves_compute_what_they_say_and_are_linear(minds: dict[str, Minds]) -> None:
    """y(blend) - y(base) at the same input is f(x; delta), for every leaf that has parameters."""
    for family, pair in minds.items():
        body, ids = pair.body, some_ids(0)
        params = {k: p.detach() for k, p in pair._params.items()}
        delta = dict(pair.delta("base", "tuned"))
        for leaf in body.leaves():
            seen: list[tuple[Tensor, Tensor]] = []
            with pair.at("base"), leaf.watch(lambda x, y, seen=seen: seen.append((x.clone(), y.clone()))):
                body.forward(ids)
            ((x, y),) = seen
            with pair.at("base"):
                assert (leaf.apply(x, params) - y).abs().max() < 2e-5, (family, leaf.name)
                assert y.shape[0] == ids.shape[0], (family, leaf.name)  # one row each: entries per trace
            with pair.at(blend("base", "tuned", 0.5)):
                moved = leaf.apply(x, params)
            change = leaf.apply(x, delta)
            assert change.abs().max() > 1e-3 and (moved - y - 0.5 * change).abs().max() < 5e-5, (family, leaf.name)


def test_leaf_outputs_are_in_the_graph(body: Body) -> None:
    """Every leaf's output reaches the logits in the graph, though no weight requires a gradient."""
    ids = some_ids(0)
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for leaf in body.leaves():
            stack.enter_context(leaf.watch(lambda _x, y: outputs.append(y)))
        m = body.forward(ids, grad=True)[:, -1, 7].sum()
    gradients = torch.autograd.grad(m, outputs)
    assert len(gradients) == len(body.leaves()) and all(g.abs().sum() > 0 for g in gradients)


def test_directional_derivative_along_the_weights(minds: dict[str, Minds]) -> None:
    """Summed over all leaves, <dm/dy, f(x; delta)> is d m(base + a delta) / da, against central differences."""
    for family, pair in minds.items():
        body, ids = pair.body, some_ids(0)
        delta = dict(pair.delta("base", "tuned"))
        total = torch.zeros(())
        seen: list[tuple[int, Tensor, Tensor]] = []
        with pair.at(blend("base", "tuned", 0.5)):
            leaves = body.leaves()
            with ExitStack() as stack:
                for i, leaf in enumerate(leaves):
                    stack.enter_context(leaf.watch(lambda x, y, i=i, seen=seen: seen.append((i, x, y))))
                m = body.forward(ids, grad=True)[:, -1, 7].sum()
            for (i, x, _), g in zip(seen, torch.autograd.grad(m, [y for *_, y in seen]), strict=True):
                total = total + (g * leaves[i].apply(x.detach(), delta)[..., : g.shape[-1]]).sum()
        h = 0.01
        values = []
        for alpha in (0.5 - h, 0.5 + h):
            with pair.at(blend("base", "tuned", alpha)):
                values.append(body.forward(ids)[:, -1, 7].sum().double())
        numeric = (values[1] - values[0]) / (2 * h)
        assert numeric.abs() > 1e-2
        assert abs(float(total - numeric)) < 0.01 * abs(float(numeric)) + 0.01, family


def test_no_trace_of_a_body_in_files(tmp_path: Path) -> None:
    """Loading writes nothing beside the model."""
    base = tiny.save_tiny(tmp_path / "m", "llama")
    before = sorted(p.name for p in Path(base).iterdir())
    Minds.load({"base": base})
    assert sorted(p.name for p in Path(base).iterdir()) == before
