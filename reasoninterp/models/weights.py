"""Named sets of weights: where each mind's tensors are kept, and what a handle's tensors are.

1. A `Handle` names a set of weights: one mind; a blend `a + alpha (b - a)` of two; or a graft, some Units from one and
   the rest from another.
2. Each tensor of a handle has a *recipe*, in its simplest form: a tensor that two minds share bit for bit has one
   recipe, `blend(..., 0)` has that of `a`, a graft of whole parameters that of their source.  Weights are rewritten
   only where the recipe changes, so putting in what is already in costs nothing.
3. `Store` keeps what recipes are made of: tensors that differ from the first mind's, in memory while the budget
   lasts and otherwise in safetensors files that are read on demand.

Blends are linear interpolations in float32, tensor by tensor, also for bf16 weights: in bf16, blending a difference
of 1e-5 to 1e-4 on weights of 0.02 loses a fifth to two fifths of it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reasoninterp.models.units import Slice, Unit


@dataclass(frozen=True)
class Handle:
    """An immutable name for a set of weights.  Made by `mind`, `blend` and `graft`."""

    kind: Literal["mind", "blend", "graft"]
    name: str = ""
    first: Handle | None = None  # blend: at alpha 0; graft: what is grafted onto
    second: Handle | None = None  # blend: at alpha 1; graft: the source of the units
    alpha: float = 0.0
    units: tuple[Unit, ...] = ()

    @property
    def label(self) -> str:
        """A readable name: `base`, `base+0.25(tuned-base)`, `tuned<-base[L0.attn]`."""
        if self.kind == "mind":
            return self.name
        assert self.first is not None and self.second is not None
        first, second = self.first.label, self.second.label
        if self.kind == "blend":
            return f"{first}+{self.alpha:g}({second}-{first})"
        names = [u.name for u in self.units]
        shown = ",".join(names) if len(names) <= 4 else f"{','.join(names[:3])},+{len(names) - 3}"
        return f"{first}<-{second}[{shown}]"

    def __str__(self) -> str:
        return self.label

    def minds(self) -> set[str]:
        """Names of the minds that it is made of."""
        if self.kind == "mind":
            return {self.name}
        assert self.first is not None and self.second is not None
        return self.first.minds() | self.second.minds()


def mind(name: str | Handle) -> Handle:
    """The handle of one mind; a handle is returned as it is."""
    return name if isinstance(name, Handle) else Handle("mind", name)


def blend(a: str | Handle, b: str | Handle, alpha: float) -> Handle:
    """`a + alpha (b - a)` in float32, tensor by tensor; `alpha` 0 is `a` and 1 is `b`, bit for bit."""
    return Handle("blend", first=mind(a), second=mind(b), alpha=float(alpha))


def graft(onto: str | Handle, source: str | Handle, units: Sequence[Unit]) -> Handle:
    """The `units` from `source`, the rest from `onto`."""
    return Handle("graft", first=mind(onto), second=mind(source), units=tuple(units))


# ("mind", owner) | ("blend", recipe, recipe, alpha) | ("graft", recipe, recipe, slices)
Recipe = tuple[Any, ...]


@dataclass
class Store:
    """Tensors of every mind that differ from the first mind's, by mind and parameter name."""

    home: str
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    budget: int
    rows: Mapping[str, int]  # rows of the embeddings, by mind
    vocabulary: frozenset[str]  # parameters whose first dimension is the vocabulary
    resident: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    on_file: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _digests: dict[tuple[str, str], bytes] = field(default_factory=dict)
    _derived: dict[tuple[str, str], str] = field(default_factory=dict)  # owners of a derived mind's tensors

    def add(self, name: str, params: Mapping[str, Tensor], home: Mapping[str, Tensor], files: FileIndex) -> None:
        """Take in a mind: keep its tensors that differ from the home mind's, and then those of the home mind too.

        Args:
            name: the mind.
            params: its parameters, with the body's shapes; what is kept is kept without a copy.
            home: the home mind's parameters.
            files: per mind, where its tensors can be read back; what is not there and does not fit goes to a
                temporary file.
        """
        spilled: dict[tuple[str, str], Tensor] = {}
        for param, tensor in params.items():
            if torch.equal(tensor, home[param]):
                continue
            for owner, value in ((name, tensor), (self.home, home[param])):
                key = owner, param
                if key in self.resident or key in self.on_file:
                    continue
                if value.nbytes <= self.budget:
                    # the home mind's tensors are the body's own and will be overwritten; the others are given away
                    self.resident[key] = value.detach().to("cpu", copy=owner == self.home)
                    self.budget -= value.nbytes
                elif place := files.find(owner, param, value):
                    self.on_file[key] = place
                else:
                    spilled[key] = value
        if spilled:
            self._spill(name, spilled)

    def derive(self, name: str, of: str, tensors: Mapping[str, Tensor], home: Mapping[str, Tensor]) -> None:
        """Take in a mind that is mind `of` but for `tensors`; only those that are new are kept.

        Args:
            name: the new mind.
            of: the mind that it shares the other tensors with.
            tensors: in the body's dtype and shapes, given away.
            home: the home mind's parameters.
        """
        new = {}
        for param in self.shapes:
            owner = self.owner(of, param)
            tensor = tensors.get(param)
            if tensor is None:
                self._derived[name, param] = owner
            elif not torch.equal(tensor, home[param].cpu()):
                same = owner != self.home and torch.equal(tensor, self.get(owner, param))
                self._derived[name, param] = owner if same else name
                if not same:
                    new[param] = tensor
        self.rows = {**self.rows, name: self.rows[of]}
        self.add(name, new, {param: home[param].cpu() for param in new}, FileIndex())

    def discard(self, name: str) -> None:
        """Forget a derived mind and what is kept for it alone."""
        for held in (self.resident, self.on_file, self._derived):
            for key in [k for k in held if k[0] == name]:
                gone = held.pop(key)  # type: ignore[attr-defined]
                self.budget += gone.nbytes if isinstance(gone, Tensor) else 0
        self._digests = {k: d for k, d in self._digests.items() if not k[0].startswith(f"{name}:")}
        self.rows = {n: r for n, r in self.rows.items() if n != name}

    def owner(self, name: str, param: str) -> str:
        """The mind itself where its tensor differs from the home mind's, the home mind where it does not.

        A derived mind's tensor may be that of the mind it was derived from.
        """
        if (name, param) in self._derived:
            return self._derived[name, param]
        key = name, param
        return name if key in self.resident or key in self.on_file else self.home

    def differs(self, param: str) -> bool:
        """Whether any mind differs from the home mind in this parameter."""
        key = self.home, param
        return key in self.resident or key in self.on_file

    def get(self, owner: str, param: str) -> Tensor:
        """A stored tensor, on the CPU, in the body's dtype and shape."""
        key = owner, param
        if key in self.resident:
            return self.resident[key]
        return pad_rows(read_tensor(*self.on_file[key]).to(self.dtype), self.shapes[param])

    def value(self, recipe: Recipe, param: str) -> Tensor:
        """The tensor that a recipe makes."""
        kind = recipe[0]
        if kind == "mind":
            return self.get(recipe[1], param)
        first, second = self.value(recipe[1], param), self.value(recipe[2], param)
        if kind == "blend":
            return torch.lerp(first.float(), second.float(), float(recipe[3])).to(self.dtype)
        out = first.clone()
        for part in recipe[3]:
            part.of(out).copy_(part.of(second))
        return out

    def recipe(self, handle: Handle, param: str) -> Recipe:
        """How a handle's tensor is made, in the simplest form."""
        if handle.kind == "mind":
            return "mind", self.owner(handle.name, param)
        assert handle.first is not None and handle.second is not None
        first, second = self.recipe(handle.first, param), self.recipe(handle.second, param)
        if first == second:
            return first
        if handle.kind == "blend":
            if handle.alpha in (0.0, 1.0):
                return second if handle.alpha else first
            return "blend", first, second, handle.alpha
        parts = tuple(part for unit in handle.units for part in unit.parts if part.param == param)
        if not parts:
            return first
        return second if self._covers(parts, param) else ("graft", first, second, parts)

    def _covers(self, parts: Sequence[Slice], param: str) -> bool:
        """Whether slices along one dimension make up the whole parameter."""
        dims = {part.dim for part in parts}
        if len(dims) != 1:
            return False
        at = 0
        for part in sorted(parts, key=lambda p: p.start):
            if part.start > at:
                return False
            at = max(at, part.stop)
        return bool(at >= self.shapes[param][dims.pop()])

    def digest(self, name: str, live: Mapping[str, Tensor]) -> str:
        """SHA-256 of a mind's weights (names, shapes and bytes in the loaded dtype), without padded rows.

        `live` gives the tensors that no mind changes.
        """
        total = hashlib.sha256()
        for param in self.shapes:
            owner = self.owner(name, param)
            rows = self.rows[name] if param in self.vocabulary else None
            key = f"{owner}:{rows}", param
            if key not in self._digests:
                tensor = self.get(owner, param) if self.differs(param) else live[param]
                self._digests[key] = _digest(tensor[:rows] if rows is not None else tensor)
            total.update(param.encode() + self._digests[key])
        return total.hexdigest()

    def bytes_by_mind(self) -> dict[str, tuple[int, int]]:
        """Per mind, bytes kept in memory and bytes read from files."""
        out: dict[str, list[int]] = {}
        for (owner, _), tensor in self.resident.items():
            out.setdefault(owner, [0, 0])[0] += tensor.nbytes
        for owner, param in self.on_file:
            size = torch.Size(self.shapes[param]).numel() * self.dtype.itemsize
            out.setdefault(owner, [0, 0])[1] += size
        return {name: (a, b) for name, (a, b) in out.items()}

    def _spill(self, name: str, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        from safetensors.torch import save_file

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="reasoninterp-")
        file = str(Path(self._folder.name) / f"{len(list(Path(self._folder.name).iterdir()))}.safetensors")
        save_file({f"{owner}/{param}": t.detach().cpu().contiguous() for (owner, param), t in tensors.items()}, file)
        self.on_file.update({(owner, param): (file, f"{owner}/{param}") for owner, param in tensors})


class Difference(Mapping[str, Tensor]):
    """`second - first`, float32 on the CPU, of every parameter in which two handles differ; nothing is kept.

    Rows of the vocabulary from `n_shared` on are zero.  A tensor costs a subtraction whenever it is asked for.

    Args:
        store: what recipes are made of.
        first: what is taken away.
        second: what it is taken from.
        params: in which any minds differ.
        n_shared: rows of the vocabulary that all minds share.
    """

    def __init__(self, store: Store, first: Handle, second: Handle, params: Sequence[str], n_shared: int) -> None:
        self._store, self._n_shared = store, n_shared
        pairs = {param: (store.recipe(first, param), store.recipe(second, param)) for param in params}
        self._recipes = {param: (a, b) for param, (a, b) in pairs.items() if a != b}

    def __getitem__(self, param: str) -> Tensor:
        a, b = (self._store.value(recipe, param).float() for recipe in self._recipes[param])
        out = b - a
        if param in self._store.vocabulary:
            out[self._n_shared :] = 0
        return out

    def __contains__(self, param: object) -> bool:
        return param in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)


@dataclass
class FileIndex:
    """Which safetensors file holds which tensor of a mind that was loaded from a local directory."""

    places: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)

    def add(self, name: str, folder: Path) -> None:
        """List the tensors of a mind's directory."""
        from safetensors import safe_open

        found: dict[str, tuple[str, str]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as handle:
                found.update({key: (str(file), key) for key in handle.keys()})  # noqa: SIM118
        self.places[name] = found

    def find(self, name: str, param: str, value: Tensor) -> tuple[str, str] | None:
        """The place of a tensor, if what lies there is bit for bit `value` (but for padded rows)."""
        place = self.places.get(name, {}).get(param)
        if place is None:
            return None
        there = read_tensor(*place).to(value.dtype)
        if there.dim() != value.dim() or any(a > b for a, b in zip(there.shape, value.shape, strict=True)):
            return None
        return place if torch.equal(pad_rows(there, tuple(value.shape)), value.cpu()) else None


def read_tensor(file: str, key: str) -> Tensor:
    """One tensor of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(key)
    return tensor


def pad_rows(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor with rows of zeros appended until it has this shape."""
    missing = shape[0] - tensor.shape[0]
    if missing <= 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(flat.shape)}{flat.dtype}".encode())
    digest.update(flat.view(torch.uint8).numpy().data)  # no copy
    return digest.digest()
