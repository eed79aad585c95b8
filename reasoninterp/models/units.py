"""Units: the blocks of weights that a graft can move and a ledger can charge.

1. Every parameter is cut into `Slice`s: a whole parameter, or a range of its rows or columns that belongs to one
   attention head (one group of heads that share a key and value head, under grouped-query attention).
2. A `level` names a partition of all scalars of all parameters into Units, from coarse to fine: `layer` (a whole
   block), `block` (attention, MLP, norms), `head` (one head's four matrices), `circuit` (a head's QK: what it
   looks at; and its OV: what it carries) and `fine` (circuits; MLPs in blocks of neurons, `L0.mlp.N3`; norms one by
   one, `L0.ln1`, `L0.ln2`, `L0.qk_norm`).  Each level refines the one before it.
3. What heads share stays apart: the output bias is `L0.attn.b_O`; the gains of query and key norms (Qwen3) act on
   all heads alike and belong to `L0.norms` at every level finer than the layer.  Likewise what neurons share: at
   the level `fine` the MLP's output bias is `L0.mlp.b_out`.
4. A tied embedding is one Unit, `embed`, which covers the unembedding too.
5. `module` is a partition of another kind, across heads: one Unit for each module of the plain model, by its path
   (`model.layers.0.self_attn.q_proj`), which is what a LoRA adapter adds its deltas to.

The split of a head into QK and OV circuits follows Elhage et al. (2021), A Mathematical Framework for Transformer
Circuits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from reasoninterp.errors import UserError

Level = Literal["fine", "circuit", "head", "block", "layer", "module"]
UnitKind = Literal["embedding", "attn", "head", "mlp", "norms", "unembed", "layer"]
LEVELS: tuple[Level, ...] = ("fine", "circuit", "head", "block", "layer")  # each refines the next
NEURON_BLOCKS = 8  # blocks of neurons an MLP at the level `fine`

_BLOCK_OF_NEURONS = re.compile(r"^L\d+\.mlp\.N(\d+)$")
_BLOCK = re.compile(r"^(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)$")
_OUTSIDE = {
    "model.embed_tokens.weight": "embed",
    "transformer.wte.weight": "embed",
    "transformer.wpe.weight": "pos_embed",
    "model.norm.weight": "ln_final",
    "transformer.ln_f.weight": "ln_final",
    "transformer.ln_f.bias": "ln_final",
    "lm_head.weight": "unembed",
    "lm_head.bias": "unembed",
}
_KIND: dict[str, UnitKind] = {
    "embed": "embedding",
    "pos_embed": "embedding",
    "ln_final": "norms",
    "unembed": "unembed",
}
_ROLE = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "self_attn.q_norm": "qk_norm",
    "self_attn.k_norm": "qk_norm",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "ln_1": "ln1",
    "ln_2": "ln2",
}
_NORMS = ("ln1", "ln2", "qk_norm")
# The dimension along which a weight of the MLP lists its neurons (GPT-2's Conv1D keeps inputs in rows).
_NEURONS = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 0}
_MLP_OUT = ("mlp.down_proj", "mlp.c_proj")


class Slice(NamedTuple):
    """Range `[start, stop)` along dimension `dim` of the parameter named `param`."""

    param: str
    dim: int
    start: int
    stop: int

    def of(self, tensor: Any) -> Any:
        """The slice as a view of a tensor shaped like the parameter."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Unit:
    """A named block of weights.

    `head` is the head's number, or its group's under grouped-query attention; `circuit` is "QK", "OV" or None.
    """

    name: str
    kind: UnitKind
    layer: int | None
    head: int | None
    circuit: str | None
    parts: tuple[Slice, ...]


@runtime_checkable
class HasShapes(Protocol):
    """What `units` needs to know of a model: a Body or Minds has it."""

    @property
    def param_shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...


class _Piece(NamedTuple):
    """A Slice with where it belongs, at the finest level; `head` is the block of neurons in an MLP."""

    layer: int | None
    role: str  # "embed", ..., "q", "k", "v", "o", "b_O", "mlp", "b_out", "ln1", "ln2", "qk_norm"
    head: int | None
    part: Slice


def units(model: HasShapes, level: Level = "block") -> list[Unit]:
    """The Units of a model at a level, in the order of the forward pass; they partition all its parameters.

    Raises:
        UserError: an unknown level.
    """
    if level not in get_args(Level):
        raise UserError(f"level: {level!r} is not one of {', '.join(get_args(Level))}.")
    grouped: dict[str, list[_Piece]] = {}
    about: dict[str, tuple[UnitKind, int | None, int | None, str | None]] = {}
    letter = "G" if model.n_kv_heads != model.n_heads else "H"
    for piece in _pieces(model):
        name, kind, head, circuit = _home(piece, level, letter)
        grouped.setdefault(name, []).append(piece)
        about[name] = (kind, piece.layer, head, circuit)
    out = [Unit(name, *about[name], tuple(_join([p.part for p in pieces]))) for name, pieces in grouped.items()]
    return sorted(out, key=_order)


def unit_named(model: HasShapes, name: str) -> Unit:
    """The Unit with this name, at whichever level has it.

    Raises:
        UserError: no level has such a Unit.
    """
    for level in get_args(Level):
        for unit in units(model, level):
            if unit.name == name:
                return unit
    raise UserError(f"unit: {name!r} is not a Unit of this model; names look like embed, L0.attn, L0.H1.QK, L0.mlp.")


def _home(piece: _Piece, level: Level, letter: str) -> tuple[str, UnitKind, int | None, str | None]:
    """Name, kind, head and circuit of the Unit that holds a piece at a level."""
    if piece.layer is None and level == "module":
        return _module_of(piece.part.param), _KIND[piece.role], None, None
    if piece.layer is None:
        return piece.role, _KIND[piece.role], None, None
    layer = f"L{piece.layer}"
    if level == "module":
        return _module_of(piece.part.param), _kind_of(piece), None, None
    if level == "layer":
        return layer, "layer", None, None
    if piece.role in ("mlp", "b_out"):
        block = f"N{piece.head}" if piece.role == "mlp" else piece.role
        return f"{layer}.mlp.{block}" if level == "fine" else f"{layer}.mlp", "mlp", None, None
    if piece.role in _NORMS:
        return f"{layer}.{piece.role if level == 'fine' else 'norms'}", "norms", None, None
    if level == "block":
        return f"{layer}.attn", "attn", None, None
    if piece.role == "b_O":
        return f"{layer}.attn.b_O", "attn", None, None
    head = f"{layer}.{letter}{piece.head}"
    if level == "head":
        return head, "head", piece.head, None
    circuit = "QK" if piece.role in ("q", "k") else "OV"
    return f"{head}.{circuit}", "head", piece.head, circuit


def neuron_blocks(d_mlp: int, n: int = NEURON_BLOCKS) -> list[tuple[int, int]]:
    """Half-open ranges of neurons, `n` (or `d_mlp`, if that is less) blocks whose sizes differ by at most one."""
    n = min(n, d_mlp)
    edges = [k * d_mlp // n for k in range(n + 1)]
    return list(pairwise(edges))


def _module_of(param: str) -> str:
    return param.rpartition(".")[0]


def _kind_of(piece: _Piece) -> UnitKind:
    """What a module of a layer is for."""
    if piece.role in _NORMS:
        return "norms"
    return "mlp" if piece.role in ("mlp", "b_out") else "attn"


def _pieces(model: HasShapes) -> Iterator[_Piece]:
    """Every parameter, cut as finely as any level needs."""
    for name, shape in model.param_shapes.items():
        whole = Slice(name, 0, 0, shape[0])
        if name in _OUTSIDE:
            yield _Piece(None, _OUTSIDE[name], None, whole)
            continue
        match = _BLOCK.match(name)
        if match is None:
            raise UserError(f"The parameter {name!r} belongs to no known Unit; this architecture is not supported.")
        layer, module, which = int(match[1]), match[2], match[3]
        role = "mlp" if module in _NEURONS else _ROLE.get(module)
        if role is None:
            raise UserError(f"The parameter {name!r} belongs to no known Unit; this architecture is not supported.")
        if role in _NORMS:
            yield _Piece(layer, role, None, whole)
        elif role == "mlp" and which == "bias" and module in _MLP_OUT:
            yield _Piece(layer, "b_out", None, whole)
        elif role == "mlp":
            dim = 0 if which == "bias" else _NEURONS[module]
            for block, (start, stop) in enumerate(neuron_blocks(shape[dim])):
                yield _Piece(layer, "mlp", block, Slice(name, dim, start, stop))
        elif role == "o" and which == "bias":
            yield _Piece(layer, "b_O", None, whole)
        elif role == "o":
            # a linear map keeps its inputs (heads) in columns, GPT-2's Conv1D in rows
            yield from _by_head(model, layer, "o", name, dim=0 if module == "attn.c_proj" else 1)
        elif role == "qkv":
            width = model.n_heads * model.d_head
            for i, one in enumerate("qkv"):
                yield from _by_head(model, layer, one, name, dim=len(shape) - 1, offset=i * width)
        else:
            yield from _by_head(model, layer, role, name, dim=0)


def _by_head(model: HasShapes, layer: int, role: str, name: str, *, dim: int, offset: int = 0) -> Iterator[_Piece]:
    """One piece a head (or group of heads): `group` query heads' width for q and o, one key/value head's for k, v."""
    group = model.n_heads // model.n_kv_heads if role in ("q", "o") else 1
    width = group * model.d_head
    for head in range(model.n_kv_heads):
        start = offset + head * width
        yield _Piece(layer, role, head, Slice(name, dim, start, start + width))


def _join(parts: Sequence[Slice]) -> Iterator[Slice]:
    """Neighbouring slices of one parameter as one slice."""
    held: Slice | None = None
    for part in parts:
        if held and held.param == part.param and held.dim == part.dim and held.stop == part.start:
            held = held._replace(stop=part.stop)
            continue
        if held:
            yield held
        held = part
    if held:
        yield held


def _order(unit: Unit) -> tuple[int, int, int, int, str]:
    """Forward order: embeddings, then each layer's heads, bias, MLP and norms, then the final norm and unembedding."""
    place = {"embed": -2, "pos_embed": -1, "ln_final": 10**6, "unembed": 10**6 + 1}
    if unit.layer is None:
        return place[_OUTSIDE.get(unit.parts[0].param, unit.name)], 0, 0, 0, unit.name
    kind = {"layer": 0, "head": 0, "attn": 1, "mlp": 2, "norms": 3}[unit.kind]
    circuit = {None: 0, "QK": 0, "OV": 1}[unit.circuit]
    block = _BLOCK_OF_NEURONS.search(unit.name)
    number = int(block[1]) if block else 10**6 if unit.name.endswith(".b_out") else unit.head or 0
    return unit.layer, kind, number, circuit, unit.name
