"""The ledger against weight gradients of a plain model, and its laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds, blend
from reasoninterp.models.units import units
from reasoninterp.patching.metric import contrast_plan
from reasoninterp.running import run_study
from reasoninterp.runs import Run
from reasoninterp.severance.ledger.integrate import difference_of, entries
from reasoninterp.severance.ledger.products import ledger_units
from reasoninterp.severance.ledger.quadrature import nodes
from reasoninterp.severance.ledger.study import Ledger
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Trace
from tests.tiny import save_tiny, save_tuned

FAMILIES = ("llama-gqa", "llama-mha", "qwen2", "qwen3", "gpt2")
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\nanswer ", after_answer="\n")


def items(n: int = 4) -> list[Item]:
    """Contrasts whose answers differ in length as well as in their tokens."""
    out = []
    for k in range(n):
        clean = Trace(
            f"t{k}", f"start with {k}", (f"now {k + 1}", f"now {k + 3}"), str(k + 4) if k % 2 else f"1{k}", FORMAT
        )
        corrupt = clean.with_steps((f"now {k + 2}", f"now {k + 5}"), answer=str(k + 5) if k % 2 else f"2{k}7")
        out.append(Item(clean, contrast("propagated", clean, corrupt)))
    return out


def pair(folder: Path, family: str) -> Minds:
    save_tiny(folder / "base", family, n_layers=2)
    save_tuned(folder / "base", folder / "tuned", scale=0.05)
    return Minds.load({"base": str(folder / "base"), "tuned": str(folder / "tuned")})


@pytest.mark.parametrize("family", FAMILIES)
def test_entries_equal_weight_gradients_times_difference(tmp_path: Path, family: str) -> None:
    minds = pair(tmp_path, family)
    context = Context(minds, items())
    delta = difference_of(context, "base", "tuned")
    with context.open(blend("base", "tuned", 0.3)) as body:
        plan = contrast_plan(context, [i.contrast for i in context.items])
        found, effects = entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner)
        names = [u.name for u in ledger_units(body)]
        # The oracle: ask for the gradient of every weight, on the same body, and multiply it out Unit by Unit.
        oracle = weight_gradients(minds, lambda: plan.effects(body, grad=True).sum())
        for unit in units(body, "fine"):
            expected = sum(
                float((part.of(oracle[part.param]) * part.of(delta[part.param])).sum()) for part in unit.parts
            )
            columns = [names.index(unit.name)]
            if unit.name == "embed" and body.tied:
                columns.append(names.index("unembed"))
            assert float(found[:, columns].sum()) == pytest.approx(expected, abs=2e-4, rel=2e-3), unit.name
    assert found.abs().sum(0).gt(1e-5).sum() > 0.6 * len(names)
    assert effects.abs().min() > 0


def weight_gradients(minds: Minds, run) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Gradients of a scalar by the plain model's parameter names, by central differences of autograd's own making."""
    from reasoninterp.models.leaves import Slice

    grads = {name: torch.zeros(shape) for name, shape in minds.body.param_shapes.items()}
    modules: dict[str, list[tuple[Slice, torch.nn.Parameter, bool]]] = {}
    for leaf in minds.body.leaves():
        for part, tensor in ((leaf.weight, leaf._module.weight), (leaf.bias, leaf._module._parameters.get("bias"))):
            if part is not None and tensor is not None:
                tensor.requires_grad_(True)
                tensor.grad = None
                modules.setdefault(part.param, []).append((part, tensor, leaf.transposed and tensor.dim() == 2))
    run().backward()
    seen: set[int] = set()
    for name, parts in modules.items():
        for part, tensor, transposed in parts:
            if tensor.grad is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                part.of(grads[name]).add_(tensor.grad.T if transposed else tensor.grad)
            tensor.requires_grad_(False)
    return grads


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_ledger_sums_to_the_loss_and_per_trace_entries_average_to_it(tmp_path: Path, family: str) -> None:
    context = Context(pair(tmp_path, family), items())
    run = Run.open(tmp_path / "run", {})
    context.run = run
    tables = run_study(Ledger(nodes=8), context, run, quiet=True).tables
    total, ledger, per_trace = tables["ledger_total"].iloc[0], tables["ledger"], tables["ledger_traces"]
    assert abs(total["loss"]) > 1e-3
    assert total["residual_relative"] < 0.01
    for level in ("fine", "circuit", "head", "block", "layer", "module"):
        assert ledger[ledger["level"] == level]["attribution"].sum() == pytest.approx(
            total["loss"], abs=0.01 * abs(total["e_base"])
        )
    blocks = ledger[ledger["level"] == "block"].set_index("unit")["attribution"]
    means = per_trace.groupby("unit")["attribution"].mean()
    assert means[blocks.index].to_numpy() == pytest.approx(blocks.to_numpy(), abs=1e-9)


def test_entries_of_a_trace_do_not_depend_on_its_batch(tmp_path: Path) -> None:
    context = Context(pair(tmp_path, "llama-gqa"), items())
    delta = difference_of(context, "base", "tuned")
    with context.open("tuned") as body:

        def run(chosen: list[Item]) -> torch.Tensor:
            plan = contrast_plan(context, [i.contrast for i in chosen])
            return entries(body, delta, lambda: plan.effects(body, grad=True), plan.owner)[0]

        together, alone = run(context.items), torch.cat([run([i]) for i in context.items])
    assert together.abs().max() > 0.01
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


def test_a_mind_against_itself_has_an_empty_ledger(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "qwen2", n_layers=2)
    context = Context(Minds.load({"base": str(tmp_path / "base"), "tuned": str(tmp_path / "base")}), items())
    run = Run.open(tmp_path / "run", {})
    context.run = run
    tables = run_study(Ledger(nodes=2), context, run, quiet=True).tables
    assert (tables["ledger"]["attribution"] == 0).all()
    assert tables["ledger_total"]["loss"].iloc[0] == 0


def test_nodes_integrate_polynomials_exactly() -> None:
    for n in (1, 2, 3, 8, 9):
        for power in range(n + 1):
            assert sum(w * a**power for a, w in nodes(n)) == pytest.approx(1 / (power + 1), abs=1e-12)
        assert {a for a, _ in nodes(n)} <= {a for a, _ in nodes(2 * n)}
