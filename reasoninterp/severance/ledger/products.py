"""Leaf products: the directional derivative of a readout along a weight difference, without any weight gradient.

A leaf is linear in its parameters, y = f(x; θ), so `⟨∂E/∂θ, Δθ⟩ = Σ_t ⟨∂E/∂y_t, f(x_t; Δθ)⟩`: one backward pass to the
activations gives, for every leaf, a number per row, per position and per output feature.

1. An `Atom` is what one leaf's features give to one Unit of the level `fine`.  Features of q, k and v belong to heads,
   those of the MLP's gate and input to blocks of neurons; the two output projections are split by their *inputs*;
   output biases are atoms of their own.
2. `Products.watch` hooks every leaf that differs; during the backward pass each product is reduced at once to
   [row, atom] (and, where tokens are wanted, to [row, pos, block]), accumulated in float64.
3. Products are formed in float32 whatever the weights' dtype, since the differences are kept in float32.

Every coarser partition (circuit, head, block, layer, module) is a sum of atoms.  A tied embedding has two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.models.body import Body
from reasoninterp.models.leaves import Leaf
from reasoninterp.models.units import NEURON_BLOCKS, neuron_blocks, units


class LedgerUnit(NamedTuple):
    """A place in the ledger: a Unit of some level, with the block that holds it."""

    name: str
    layer: int | None
    kind: str
    head: int | None
    circuit: str | None
    block: str


class Atom(NamedTuple):
    """What one leaf gives to one finest Unit: the Unit's name and the module of the plain model that does it."""

    leaf: str
    unit: str
    module: str


def ledger_units(body: Body) -> list[LedgerUnit]:
    """The finest Units in the order of the forward pass; a tied embedding is listed once for each use."""
    out = [
        LedgerUnit(u.name, u.layer, u.kind, u.head, u.circuit, _block(u.name, u.kind, u.layer))
        for u in units(body, "fine")
    ]
    if body.tied:
        out.append(LedgerUnit("unembed", None, "unembed", None, None, "unembed"))
    return out


def home_of(unit: LedgerUnit, level: str) -> LedgerUnit:
    """The place of a level (`fine` to `layer`) that holds a finest place."""
    if level == "fine" or unit.layer is None:
        return unit
    layer = unit.layer
    if level == "layer":
        return LedgerUnit(f"L{layer}", layer, "layer", None, None, f"L{layer}")
    if level == "block" or unit.kind in ("mlp", "norms"):
        kind = "attn" if unit.block.endswith(".attn") else unit.kind
        return LedgerUnit(unit.block, layer, kind, None, None, unit.block)
    if level == "head" and unit.circuit is not None:
        return unit._replace(name=unit.name.rpartition(".")[0], circuit=None)
    return unit


def _block(name: str, kind: str, layer: int | None) -> str:
    if layer is None:
        return name
    return f"L{layer}.{'attn' if kind in ('head', 'attn') else kind}"


def atoms(body: Body) -> list[Atom]:
    """Every atom of a body, leaf by leaf in the order of the forward pass, weights before biases."""
    return [Atom(leaf.name, unit, module) for leaf in body.leaves() for unit, module in _atoms_of(body, leaf)]


def _atoms_of(body: Body, leaf: Leaf) -> list[tuple[str, str]]:
    """(Unit, module) of each column that `leaf_products` makes for a leaf."""
    module = leaf.weight.param.rpartition(".")[0]
    if leaf.layer is None:
        return [(leaf.role, module)]
    layer = f"L{leaf.layer}"
    if leaf.role in ("q", "k", "v", "o"):
        letter, circuit = "G" if body.is_gqa else "H", "QK" if leaf.role in ("q", "k") else "OV"
        names = [f"{layer}.{letter}{k}.{circuit}" for k in range(body.n_kv_heads)]
        names += [f"{layer}.attn.b_O"] if leaf.role == "o" and leaf.bias is not None else []
    elif leaf.role.startswith("mlp."):
        names = [f"{layer}.mlp.N{k}" for k in range(min(NEURON_BLOCKS, _n_neurons(leaf, body)))]
        names += [f"{layer}.mlp.b_out"] if leaf.role == "mlp.out" and leaf.bias is not None else []
    else:
        names = [f"{layer}.{'qk_norm' if leaf.role in ('q_norm', 'k_norm') else leaf.role}"]
    return [(name, module) for name in names]


def _n_neurons(leaf: Leaf, body: Body) -> int:
    shape = body.param_shapes[leaf.weight.param]
    return shape[1] if (leaf.role == "mlp.out") != (leaf.kind == "conv1d") else shape[0]


def leaf_products(
    body: Body, leaf: Leaf, x: Tensor, g: Float[Tensor, "row ..."], delta: Mapping[str, Tensor]
) -> Float[Tensor, "row pos atom"]:
    """`⟨∂E/∂y, f(x; Δθ)⟩` of one leaf for every row and position, split over its atoms (see `atoms`).

    Args:
        body: whose leaf it is.
        leaf: the leaf; at least one of its parameters is in `delta`.
        x: its input, as `Leaf.watch` gives it.
        g: gradient of the readout with respect to its output, float32.
        delta: `θ_to − θ_from` by parameter name, float32.
    """
    split_by_input = leaf.role in ("o", "mlp.out")
    if split_by_input:
        weight = leaf.weight.of(delta[leaf.weight.param]) if leaf.weight.param in delta else None
        if weight is None:
            per_feature = torch.zeros_like(x, dtype=torch.float32)
        else:
            weight = weight.T if leaf.kind == "conv1d" or leaf.transposed else weight  # [d_model, inputs]
            per_feature = x.float() * (g @ weight)
    else:
        per_feature = g * leaf.apply(x, delta)
    if per_feature.dim() == 4:  # query and key norms: [row, head, pos, d_head]
        per_feature = per_feature.sum(1)
    if leaf.role in ("q", "k", "v", "o"):
        width = per_feature.shape[-1] // body.n_kv_heads
        out = per_feature.unflatten(-1, (body.n_kv_heads, width)).sum(-1)
    elif leaf.role.startswith("mlp."):
        blocks = neuron_blocks(per_feature.shape[-1])
        out = torch.stack([per_feature[..., start:stop].sum(-1) for start, stop in blocks], dim=-1)
    else:
        out = per_feature.sum(-1, keepdim=True)
    if split_by_input and leaf.bias is not None:
        bias = leaf.bias.of(delta[leaf.bias.param]) if leaf.bias.param in delta else g.new_zeros(g.shape[-1])
        out = torch.cat([out, (g @ bias)[..., None]], dim=-1)
    return out


@dataclass
class Products:
    """Accumulates leaf products during backward passes.

    Attributes:
        body: the hooked network; its weights may change between passes.
        delta: `θ_to − θ_from` by parameter name, float32, on the body's device.
        tokens: also keep products per position and block.
    """

    body: Body
    delta: Mapping[str, Tensor]
    tokens: bool = False
    atoms: list[Atom] = field(init=False)
    _columns: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.atoms = atoms(self.body)
        self._columns = {}
        for k, atom in enumerate(self.atoms):
            self._columns.setdefault(atom.leaf, []).append(k)

    @contextmanager
    def watch(self, n_rows: int, positions: Int[Tensor, "row read"] | None = None) -> Iterator[Sums]:
        """Hook every leaf that differs; the sums fill up during the backward passes inside.

        Args:
            n_rows: rows of the forward passes inside.
            positions: where the unembedding reads in each row (needed for `tokens`).
        """
        device = self.body.device
        sums = Sums(torch.zeros(n_rows, len(self.atoms), dtype=torch.float64, device=device), {})
        with ExitStack() as stack:
            for leaf in self.body.leaves():
                if any(p.param in self.delta for p in leaf.params):
                    stack.enter_context(leaf.watch(self._watcher(leaf, sums, positions)))
            yield sums

    def _watcher(self, leaf: Leaf, sums: Sums, positions: Tensor | None) -> Callable[[Tensor, Tensor], None]:
        columns = self._columns[leaf.name]

        def watch(x: Tensor, y: Tensor) -> None:
            if not y.requires_grad:  # a checkpointed block's first pass; its recomputation comes with a graph
                return
            x = x.detach()

            def on_gradient(g: Tensor) -> None:
                found = leaf_products(self.body, leaf, x, g.float(), self.delta).double()
                sums.per_row[:, columns] += found.sum(1)
                if self.tokens:
                    sums.add_tokens(self._block_of(leaf), found.sum(-1), positions if leaf.role == "unembed" else None)

            y.register_hook(on_gradient)

        return watch

    def _block_of(self, leaf: Leaf) -> str:
        if leaf.layer is None:
            return leaf.role
        if leaf.role in ("q", "k", "v", "o"):
            return f"L{leaf.layer}.attn"
        return f"L{leaf.layer}.{'mlp' if leaf.role.startswith('mlp.') else 'norms'}"


@dataclass
class Sums:
    """Products so far: `per_row` [row, atom]; `per_token`, by block, [row, pos]; float64."""

    per_row: Float[Tensor, "row atom"]
    per_token: dict[str, Float[Tensor, "row pos"]]

    def add_tokens(self, block: str, found: Float[Tensor, "row pos"], positions: Tensor | None) -> None:
        """Add a leaf's products; those of the unembedding stand at the positions that it reads."""
        if positions is not None:
            at = positions.to(found.device)
            found = torch.zeros(len(found), int(at.max()) + 1, dtype=found.dtype, device=found.device).scatter_add(
                1, at, found
            )
        held = self.per_token.get(block)
        if held is None:
            self.per_token[block] = found.clone()
            return
        if held.shape[1] < found.shape[1]:
            held, found = found.clone(), held
        held[:, : found.shape[1]] += found
        self.per_token[block] = held


def membership(names: Sequence[str], homes: Sequence[str]) -> Float[Tensor, "name home"]:
    """1 where a column (by the name of its home) belongs to a home, else 0."""
    place = {h: k for k, h in enumerate(homes)}
    out = torch.zeros(len(names), len(homes), dtype=torch.float64)
    for row, name in enumerate(names):
        out[row, place[name]] = 1.0
    return out
