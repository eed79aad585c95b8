"""Units finer than heads: neuron blocks, single norms, modules; each level refines the next."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from reasoninterp.errors import UserError
from reasoninterp.models.minds import Minds, graft
from reasoninterp.models.units import LEVELS, Unit, neuron_blocks, unit_named, units
from tests import tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Minds]:
    out = {}
    for family in tiny.ALL_FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        base = tiny.save_tiny(folder / "base", family, n_layers=2)
        tuned = tiny.save_tuned(base, folder / "tuned")
        out[family] = Minds.load({"base": base, "tuned": tuned})
    return out


def owners(minds: Minds, level: str) -> dict[str, torch.Tensor]:
    """For every scalar of every parameter, the number of its Unit."""
    out = {name: torch.full(shape, -1) for name, shape in minds.body.param_shapes.items()}
    for k, unit in enumerate(minds.units(level)):  # type: ignore[arg-type]
        for part in unit.parts:
            assert bool((part.of(out[part.param]) == -1).all()), unit.name
            part.of(out[part.param]).fill_(k)
    assert all(bool((o >= 0).all()) for o in out.values())
    return out


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
def test_each_level_refines_the_next(family: str, loaded: dict[str, Minds]) -> None:
    minds = loaded[family]
    for fine, coarse in pairwise(LEVELS):
        a, b = owners(minds, fine), owners(minds, coarse)
        pairs = {(int(i), int(j)) for p in a for i, j in torch.stack([a[p].ravel(), b[p].ravel()], 1).unique(dim=0)}
        assert len(pairs) == len(minds.units(fine)) > len(minds.units(coarse))
    owners(minds, "module")


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
def test_a_block_of_neurons_holds_rows_and_columns_of_the_same_neurons(family: str, loaded: dict[str, Minds]) -> None:
    minds = loaded[family]
    unit = unit_named(minds.body, "L1.mlp.N3")
    d_mlp, d_model = (128, 32) if family == "gpt2" else (64, 32)
    width = d_mlp // 8
    assert {(p.start, p.stop) for p in unit.parts} == {(3 * width, 4 * width)}
    n_in = 1 if family == "gpt2" else 2
    shapes = minds.body.param_shapes
    sizes = sum((p.stop - p.start) * torch.Size(shapes[p.param]).numel() // shapes[p.param][p.dim] for p in unit.parts)
    assert sizes == width * d_model * (n_in + 1) + (width if family == "gpt2" else 0)
    names = [u.name for u in minds.units("fine")]
    assert ("L0.mlp.b_out" in names) == (family == "gpt2")
    assert ("L0.qk_norm" in names) == (family == "qwen3")
    assert {"L0.ln1", "L0.ln2"} <= set(names) and "L0.norms" not in names and "L0.mlp" not in names


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_grafting_neurons_changes_what_those_neurons_write_only(family: str, loaded: dict[str, Minds]) -> None:
    minds = loaded[family]
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))

    def written(which: object) -> torch.Tensor:
        """Inputs of the first layer's output projection: one column a neuron."""
        seen: list[torch.Tensor] = []
        with minds.at(which) as body:  # type: ignore[arg-type]
            leaf = next(x for x in body.leaves() if x.role == "mlp.out" and x.layer == 0)
            with leaf.watch(lambda x, y: seen.append(x.clone())):
                body.forward(ids)
        return seen[0]

    unit = unit_named(minds.body, "L0.mlp.N2")
    change = (written(graft("base", "tuned", [unit])) - written("base")).abs().amax((0, 1))
    start, stop = unit.parts[0].start, unit.parts[0].stop
    assert change[start:stop].min() > 0
    change[start:stop] = 0
    assert change.max() == 0


def test_modules_are_named_by_their_paths(loaded: dict[str, Minds]) -> None:
    names = [u.name for u in loaded["gpt2"].units("module")]
    assert names[:2] == ["transformer.wte", "transformer.wpe"] and names[-1] == "transformer.ln_f"
    assert "transformer.h.1.attn.c_attn" in names
    unit: Unit = unit_named(loaded["llama-gqa"].body, "model.layers.0.mlp.up_proj")
    assert (unit.kind, unit.layer, len(unit.parts)) == ("mlp", 0, 1)


def test_neuron_blocks_by_hand() -> None:
    assert neuron_blocks(10, 4) == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert neuron_blocks(3) == [(0, 1), (1, 2), (2, 3)]
    model = SimpleNamespace(
        param_shapes={"model.layers.0.mlp.experts.weight": (4, 4)}, n_heads=2, n_kv_heads=2, d_head=2
    )
    with pytest.raises(UserError, match="not supported"):
        units(model, "fine")
