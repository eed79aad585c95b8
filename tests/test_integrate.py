"""The ledger's core: laws of the integral, readouts against finite differences, tokens, modules, checkpointing."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from reasoninterp.errors import UserError
from reasoninterp.models.checkpoint import checkpointed
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Minds, blend, graft
from reasoninterp.models.units import LEVELS, units
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.severance.ledger.integrate import difference_of, entries, integrate, modules_of, node_entries
from reasoninterp.severance.ledger.products import atoms, leaf_products, ledger_units
from reasoninterp.severance.ledger.quadrature import Means, enough, rounding_of
from reasoninterp.severance.ledger.readouts import READOUTS, after_chains, readout_named
from reasoninterp.severance.ledger.tables import warnings_of
from reasoninterp.severance.ledger.tokens import token_entries
from tests.test_ledger import items, pair
from tests.tiny import save_lora, save_tiny, save_tuned

FAMILIES = ("llama-gqa", "qwen3", "gpt2", "llama-tied")


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Context]:
    return {family: Context(pair(tmp_path_factory.mktemp(family), family), items()) for family in FAMILIES}


def contrasts(context: Context) -> list:  # type: ignore[type-arg]
    return [i.contrast for i in context.items]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_sums_to_the_change_of_every_trace(family: str, contexts: dict[str, Context]) -> None:
    context = contexts[family]
    found = integrate(context, contrasts(context), tolerance=1e-3)
    change = found.e_to - found.e_from
    assert np.abs(change).max() > 0.1
    assert found.residual < 1e-3 and found.n_nodes == len(found.alphas) == found.passes
    with context.open("base") as body:
        for level in (*LEVELS, "module"):
            names = {u.name for u in units(body, level)}
            extra = {"unembed"} if body.tied and level != "module" else set()
            entry = found.at(level)
            assert set(entry) == names | extra
            assert sum(entry.values()) == pytest.approx(change, abs=1e-2)
    assert sum(float(np.abs(v).max()) > 1e-4 for v in found.at("fine").values()) > 0.7 * len(found.units)
    with pytest.raises(UserError, match="level"):
        found.at("row")


def test_the_path_run_backwards_gives_minus_the_entries(contexts: dict[str, Context]) -> None:
    context = contexts["qwen3"]
    there = integrate(context, contrasts(context), nodes=4, max_nodes=4)
    back = integrate(context, contrasts(context), from_mind="tuned", to_mind="base", nodes=4, max_nodes=4)
    assert np.abs(there.values).max() > 0.05
    np.testing.assert_allclose(back.values, -there.values, atol=2e-4)
    np.testing.assert_allclose(back.along[::-1], there.along, atol=1e-5)


def test_doubling_measures_each_node_once(contexts: dict[str, Context]) -> None:
    context = contexts["llama-gqa"]
    found = integrate(context, contrasts(context), nodes=2, max_nodes=8, tolerance=1e-12)
    assert found.n_nodes == 9 == found.passes  # 3, 5 and 9 nodes hold each other
    direct = integrate(context, contrasts(context), nodes=8, max_nodes=8)
    np.testing.assert_array_equal(found.values, direct.values)
    assert 0 < found.settled < 0.2


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gpt2"])
@pytest.mark.parametrize("level", ["fine", "module"])
def test_entries_are_the_slopes_of_grafts(family: str, level: str, contexts: dict[str, Context]) -> None:
    """Central differences of E when one Unit alone goes further along the path, by the graft machinery."""
    context, step = contexts[family], 0.02
    asked = contrasts(context)
    found = node_entries(context, asked, 0.5, from_mind="base", to_mind="tuned")
    with context.open("base") as body:
        every = units(body, level)  # type: ignore[arg-type]
        columns = [u.name for u in ledger_units(body)] if level == "fine" else modules_of(body)
    table = found.by_unit if level == "fine" else found.by_module
    mine = dict(zip(columns, table.sum(0), strict=True))
    if level == "fine" and context.minds.body.tied:
        mine["embed"] += mine.pop("unembed")  # a graft moves both uses
    middle = blend("base", "tuned", 0.5)
    for unit in every[::6]:
        effect = []
        for alpha in (0.5 - step, 0.5 + step):
            with context.open(graft(middle, blend("base", "tuned", alpha), [unit])) as body, torch.no_grad():
                effect.append(float(contrast_plan(context, asked).effects(body).double().sum()))
        slope = (effect[1] - effect[0]) / (2 * step)
        assert mine[unit.name] == pytest.approx(slope, abs=5e-3, rel=2e-2), unit.name
    assert max(abs(v) for v in mine.values()) > 0.05


@pytest.mark.parametrize("name", [*READOUTS, "after"])
def test_readouts_slope_and_value(name: str, contexts: dict[str, Context]) -> None:
    context, step = contexts["llama-gqa"], 0.01
    asked = contrasts(context)
    other = {c.clean.id: ("now 9",) for c in asked}
    readout = after_chains(other) if name == "after" else readout_named(name)

    def value(alpha: float) -> np.ndarray:  # type: ignore[type-arg]
        with context.open(blend("base", "tuned", alpha)) as body, torch.no_grad():
            return readout(context, asked).values(body).double().numpy()

    found = node_entries(context, asked, 0.5, from_mind="base", to_mind="tuned", readout=readout)
    slopes = (value(0.5 + step) - value(0.5 - step)) / (2 * step)
    assert np.abs(slopes).max() > 0.05
    np.testing.assert_allclose(found.by_unit.sum(1), slopes, atol=5e-3, rtol=1e-2)
    if name in ("accuracy", "chain", "text", "after"):
        with context.open("base") as body, torch.no_grad():
            for k, contrast in enumerate(asked):
                trace = contrast.clean.with_steps(other[contrast.clean.id]) if name == "after" else contrast.clean
                tokens = context.encode(trace)
                logp = body.forward(torch.tensor([tokens.ids])).log_softmax(-1)[0]
                kinds = {"chain": ("step",), "text": ("step", "answer")}.get(name, ("answer",))
                at = [p for (kind, _), s in tokens.spans.items() if kind in kinds for p in range(s.start, s.stop)]
                each = [float(logp[p - 1, tokens.ids[p]]) for p in at]
                expected = sum(each) / (len(each) if name in ("chain", "text") else 1)
                assert value(0.0)[k] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_entries_sum_to_the_entries_of_each_block(family: str, contexts: dict[str, Context]) -> None:
    context = contexts[family]
    delta = difference_of(context, "base", "tuned")
    with context.open(blend("base", "tuned", 0.4)) as body:
        plan = contrast_plan(context, contrasts(context))
        whole, _ = entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner)
        heat = [h.entries for h in token_entries(body, delta, plan)]
        blocks = [u.block for u in ledger_units(body)]
    for k, places in enumerate(heat):
        for block in dict.fromkeys(blocks):
            expected = sum(float(whole[k, j]) for j, b in enumerate(blocks) if b == block)
            mine = sum(by_block.get(block, 0.0) for by_block in places.values())
            assert mine == pytest.approx(expected, abs=1e-6), (block, k)
        assert len({p.side for p in places}) == 2
        assert sum(abs(v) for by_block in places.values() for v in by_block.values()) > 0.1


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_leafs_products_stand_at_their_positions(family: str, contexts: dict[str, Context]) -> None:
    """Central differences: the leaf's change is added at one position only."""
    context = contexts[family]
    delta = difference_of(context, "base", "tuned")
    role = {"qwen3": "q_norm", "gpt2": "mlp.out"}[family]
    with context.open("base") as body:
        plan = contrast_plan(context, contrasts(context)[:1])
        leaf = next(x for x in body.leaves() if x.role == role and x.layer == 0)
        seen: list[torch.Tensor] = []

        def watch(x: torch.Tensor, y: torch.Tensor) -> None:
            y.register_hook(lambda g: seen.append(leaf_products(body, leaf, x.detach(), g, delta)))

        with leaf.watch(watch):
            plan.effects(body, grad=True).sum().backward()
        by_position = seen[0].sum((0, 2))
        n_pos = plan.both.ids.shape[1]
        assert len(by_position) == n_pos != body.n_heads
        axis = 2 if role == "q_norm" else 1
        for pos in (1, n_pos // 2):

            def effect(step: float, pos: int = pos) -> float:
                def add(_module: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
                    mask = torch.zeros(n_pos)
                    mask[pos] = step
                    shape = [n_pos if d == axis else 1 for d in range(out.dim())]
                    return out + leaf.apply(args[0], delta) * mask.view(shape)

                handle = leaf._module.register_forward_hook(add)
                try:
                    with torch.no_grad():
                        return float(plan.effects(body).sum())
                finally:
                    handle.remove()

            slope = (effect(0.05) - effect(-0.05)) / 0.1
            assert float(by_position[pos]) == pytest.approx(slope, abs=2e-3, rel=2e-2)
    assert by_position.abs().max() > 1e-3


def test_a_lora_adapters_entries_lie_in_its_modules(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama-gqa", n_layers=2)
    save_lora(base, tmp_path / "adapter", targets=["q_proj", "down_proj"])
    minds = Minds.load({"base": base, "tuned": str(tmp_path / "adapter")})
    context = Context(minds, items())
    found = integrate(context, contrasts(context), nodes=8)
    touched = {name for name, v in found.at("module").items() if np.abs(v).max() > 0}
    assert touched == {f"model.layers.{k}.{m}" for k in range(2) for m in ("self_attn.q_proj", "mlp.down_proj")}
    assert sum(float(v.mean()) for v in found.at("module").values()) == pytest.approx(
        float((found.e_to - found.e_from).mean()), abs=0.01 * abs(found.e_from.mean())
    )
    # Only queries moved in attention, so no OV entry; the MLP's is the down projection's.
    assert all(np.abs(v).max() == 0 for name, v in found.at("circuit").items() if name.endswith(".OV"))
    np.testing.assert_allclose(
        found.at("block")["L0.mlp"], found.at("module")["model.layers.0.mlp.down_proj"], atol=1e-9
    )


class Alive:
    """Counts the bytes of saved activations that are alive, and their peak."""

    now = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        Alive.now += tensor.nbytes
        Alive.peak = max(Alive.peak, Alive.now)

    def __del__(self) -> None:
        Alive.now -= self.tensor.nbytes


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_checkpointing_changes_memory_and_nothing_else(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path / "base", family, n_layers=6)
    save_tuned(tmp_path / "base", tmp_path / "tuned", scale=0.05)
    context = Context(Minds.load({"base": str(tmp_path / "base"), "tuned": str(tmp_path / "tuned")}), items(2))
    delta = difference_of(context, "base", "tuned")
    found, peaks = [], []
    for active in (False, True):
        Alive.now = Alive.peak = 0
        with context.open("tuned") as body:
            plan = contrast_plan(context, contrasts(context))
            with torch.autograd.graph.saved_tensors_hooks(Alive, lambda a: a.tensor):
                found.append(
                    entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner, checkpoint=active)[0]  # noqa: B023
                )
            before = body.forward(torch.tensor([[1, 2, 3]]))
            with checkpointed(body):
                assert torch.equal(body.forward(torch.tensor([[1, 2, 3]])), before)
        peaks.append(Alive.peak)
    assert torch.equal(*found) and found[0].abs().max() > 0.05
    assert peaks[1] < 0.4 * peaks[0], peaks


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_nested_checkpointing_changes_nothing(contexts: dict[str, Context], family: str) -> None:
    context, found = contexts[family], []
    delta = difference_of(context, "base", "tuned")
    with context.open("tuned") as body:
        plan = contrast_plan(context, contrasts(context))
        blocks = [block.original_component for block in body._bridge.blocks]
        plain = [vars(b).get("forward") for b in blocks]
        found.append(entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner)[0])
        with checkpointed(body):
            outer = [b.forward for b in blocks]
            found.append(entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner, checkpoint=True)[0])
            assert [b.forward for b in blocks] == outer  # the inner one left the outer one in place
            with checkpointed(body, active=False):
                found.append(entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner)[0])
        assert [vars(b).get("forward") for b in blocks] == plain
        found.append(entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner)[0])
    assert found[0].abs().max() > 0.05 and all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_doubling_ends_where_only_rounding_is_left(tmp_path: Path, family: str) -> None:
    base = save_tiny(tmp_path / "base", family, n_layers=2)
    tuned = save_tuned(base, tmp_path / "tuned", scale=0.005)
    found = {}
    for dtype in ("float32", "bfloat16"):
        context = Context(Minds.load({"base": base, "tuned": tuned}, dtype=dtype), items())
        found[dtype] = integrate(context, contrasts(context))
    assert found["float32"].residual < 1e-4 and found["float32"].rounding == ""
    half = found["bfloat16"]
    assert half.residual > 0.02 and half.n_nodes == 9 and half.rounding == "bfloat16"
    assert half.settled < 0.01  # not a matter of nodes
    more = integrate(context, contrasts(context), nodes=16, max_nodes=16)
    assert more.residual > 0.9 * half.residual  # nor would it have been
    (said,) = [w for w in warnings_of(half, 0.005) if "residual" in w]
    assert "rounding of bfloat16 weights" in said and "use more nodes" not in said
    (said,) = [w for w in warnings_of(half._replace(rounding=""), 0.005) if "residual" in w]
    assert "use more nodes" in said
    assert not warnings_of(found["float32"], 0.005)


def test_when_doubling_ends_by_hand() -> None:
    """Trapezoid at 1 interval, Simpson at 2; two units whose entries cancel must count as having moved."""

    def known(middle: list[float], change: float) -> dict[float, Means]:
        ends = np.array([1.0, 1.0])
        return {0.0: Means(ends, 0.0), 0.5: Means(np.array(middle), 0.0), 1.0: Means(ends, change)}

    still, cancelling = known([1.0, 1.0], 2.5), known([4.0, -2.0], 2.5)
    assert enough(known([1.0, 1.0], 2.0), 2, 0.005, torch.float32)
    assert [enough(still, 2, 0.005, d) for d in (torch.float32, torch.bfloat16, torch.float16)] == [False, True, True]
    assert not enough(cancelling, 2, 0.005, torch.bfloat16)  # the sum stood still, the entries did not
    assert not enough(still, 1, 0.005, torch.bfloat16)  # nothing to compare with
    assert rounding_of(still, 2, torch.bfloat16) == "bfloat16" and rounding_of(still, 2, torch.float32) == ""
    moved = known([1.15, 1.15], 2.5)  # sums 2.0, then 2.2: the residual went from 0.5 to 0.3
    assert rounding_of(moved, 2, torch.bfloat16) == "" and not enough(moved, 2, 0.005, torch.bfloat16)


def test_the_difference_is_not_held_as_a_whole(contexts: dict[str, Context]) -> None:
    """On the CPU a tensor of it lives as long as its product; the entries are those of the whole one, bit for bit."""
    context = contexts["llama-gqa"]
    delta = difference_of(context, "base", "tuned")
    alive = [weakref.ref(delta[name]) for name in delta]
    assert alive and not any(ref() is not None for ref in alive)
    full = dict(context.minds.delta("base", "tuned"))
    assert set(full) == set(delta) == set(context.minds.body.param_shapes)
    with context.open("tuned") as body:
        plan = contrast_plan(context, contrasts(context))
        found = [entries(body, d, lambda: plan.effects(body, grad=True), plan.owner)[0] for d in (delta, full)]
    assert torch.equal(*found) and found[0].abs().max() > 0.05


def test_half_precision_weights_have_float32_products(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama-gqa", n_layers=2, dtype=torch.bfloat16)
    tuned = save_tuned(base, tmp_path / "tuned", scale=0.05)
    found = {}
    for dtype in ("float32", "bfloat16"):
        context = Context(Minds.load({"base": base, "tuned": tuned}, dtype=dtype), items())
        delta = difference_of(context, "base", "tuned")
        assert {d.dtype for d in delta.values()} == {torch.float32}
        with context.open("tuned") as body:
            leaf = next(x for x in body.leaves() if x.role == "mlp.out")
            x = torch.randn(1, 3, 64).to(body.dtype)
            assert leaf_products(body, leaf, x, torch.randn(1, 3, 32), delta).dtype == torch.float32
        found[dtype] = node_entries(context, contrasts(context), 0.5, from_mind="base", to_mind="tuned").by_unit
    # The forward pass is in bfloat16 (3 digits); the entries keep what it leaves of them.
    scale = np.abs(found["float32"]).max()
    assert scale > 0.1
    assert np.abs(found["bfloat16"] - found["float32"]).max() < 0.15 * scale
    assert np.corrcoef(found["bfloat16"].ravel(), found["float32"].ravel())[0, 1] > 0.99


def test_atoms_name_every_module_and_unit(contexts: dict[str, Context]) -> None:
    for family, context in contexts.items():
        with context.open("base") as body:
            found = atoms(body)
            assert {a.unit for a in found} == {u.name for u in ledger_units(body)}, family
            assert {a.module for a in found} == {u.name for u in units(body, "module")}, family
            assert len(found) == len(set(found))


def test_wrong_numbers_are_said(contexts: dict[str, Context]) -> None:
    context = contexts["gpt2"]
    with pytest.raises(UserError, match="tolerance"):
        integrate(context, contrasts(context), tolerance=0.0)
    with pytest.raises(UserError, match="contrasts"):
        integrate(context, [])
    with pytest.raises(UserError, match="readout"):
        readout_named("speed")
