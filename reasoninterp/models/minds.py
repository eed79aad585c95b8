"""Minds: several named sets of weights over one hooked body.

1. The first model is loaded as plain Hugging Face; the handles of its parameters are kept, and only then is it
   hooked (hooking rearranges the model in place, but not the memory of its parameters).
2. Each further model is loaded, checked against the first, and only what differs is kept (`weights.Store`).
3. `at(handle)` writes a mind, a blend or a graft into the body's parameters and on exit, or on an exception, writes
   back what was there, bit for bit.

All minds live in one basis: weights are never folded or centred.  Where tuning resized the vocabulary, the body has
the larger one; rows that a mind lacks are zeros, token ids are those that all minds share, and `Body.forward` returns
the logits of the shared rows only, so that no mind can answer with a token that another does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.checks import (
    check_equal_logits,
    check_evaluation,
    check_same_architecture,
    check_same_shapes,
)
from reasoninterp.models.load import Loaded, load_hf, read_config
from reasoninterp.models.source import Source, names_adapter, quiet, resolve_source
from reasoninterp.models.units import Level, Unit, units
from reasoninterp.models.weights import Difference, FileIndex, Handle, Recipe, Store, blend, graft, mind, pad_rows

__all__ = ["Handle", "MemoryPlan", "Minds", "blend", "graft", "mind"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_VOCABULARY = frozenset({"model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight", "lm_head.bias"})
_HEADROOM = 0.25  # share of the budget left to activations


@dataclass(frozen=True)
class MemoryPlan:
    """Where the weights are: in the body, kept in memory, or read from files when a mind is put in (bytes)."""

    budget: int
    body: int
    resident: Mapping[str, int]
    on_file: Mapping[str, int]

    def __str__(self) -> str:
        def gib(n: int) -> str:
            return f"{n / 2**30:.2f} GiB"

        kept = ", ".join(f"{name} {gib(n)}" for name, n in self.resident.items() if n) or "nothing"
        read = ", ".join(f"{name} {gib(n)}" for name, n in self.on_file.items() if n) or "nothing"
        return f"body {gib(self.body)}; kept beside it: {kept}; read from files: {read}; budget {gib(self.budget)}"


class Minds:
    """Named minds over one body.  Made by `Minds.load`.

    `names` are the minds that were loaded; those that `derive` made since are `derived`.  `memo` is for what is computed
    from minds: its keys are tuples that hold their names.  `discard` drops what was kept of the mind and of the one that
    it was made from, since from then on its name may stand for other weights (`discarded` counts, for keys of what is
    kept elsewhere).
    """

    def __init__(self, body: Body, params: Mapping[str, Tensor], store: Store, loaded: Mapping[str, Any]) -> None:
        self.body = body
        self.names: tuple[str, ...] = tuple(loaded)
        self.sources: dict[str, Source] = {name: entry.source for name, entry in loaded.items()}
        self.notes: list[str] = [note for entry in loaded.values() for note in entry.notes]
        self.probe_gap: dict[str, float] = {}
        self._tokenizers = {name: entry.tokenizer for name, entry in loaded.items()}
        self._params = dict(params)
        self._store = store
        self._hashes: dict[str, str] = {}
        self._derived: dict[str, str] = {}  # by derived mind, the mind it was made from
        self.memo: dict[tuple[str, ...], Any] = {}
        self.discarded = 0  # how many minds were
        self._budget = 0
        self._inside = mind(self.names[0])
        self._torn = False  # whether a write broke off half-way
        body.label = self._inside.label
        self._recipes: dict[str, Recipe] = {p: ("mind", store.home) for p in params if store.differs(p)}

    @classmethod
    def load(
        cls,
        sources: Mapping[str, str],
        *,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        memory_budget: int | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        probe_ids: Tensor | None = None,
    ) -> Minds:
        """Load minds and check that they can be compared.

        Args:
            sources: by name, a directory, hub id or LoRA adapter.  The first one that is a full model is what
                adapters are put on.
            device: where the body computes.
            dtype: of weights and activations: "float32" or "bfloat16".
            memory_budget: bytes for the body and what is kept beside it (default: the memory that is available).
            allow_pickle: read pickled weights, which can run code.
            trust_remote_code: run code that comes with a model.
            probe_ids: [row, pos] ids on which the hooked model must equal the plain one (default: random ids).

        Raises:
            UserError: a source that cannot be read, or that is no version of the first one.
        """
        if not sources:
            raise UserError("sources: no mind is given; name at least one model.")
        the_dtype = _dtype(dtype)
        check_device(device)
        found = _resolve(sources)
        configs = {n: read_config(s, trust_remote_code=trust_remote_code) for n, s in found.items()}
        home, *others = found
        for name in others:
            check_same_architecture(name, configs[name], home, configs[home])
        rows = {name: int(c.vocab_size) for name, c in configs.items()}
        n_shared, n_rows = min(rows.values()), max(rows.values())
        budget = memory_budget if memory_budget is not None else _available()

        def loaded(name: str) -> Loaded:
            options = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
            return load_hf(found[name], the_dtype, device=device, **options)

        entry = loaded(home)
        probe = _probe(probe_ids, n_shared).to(device)
        plain = {home: _plain_logits(entry.model, probe, n_shared)}
        _grow_vocabulary(entry.model, n_rows)
        params = dict(entry.model.named_parameters())  # before boot: afterwards the names are the bridge's
        shapes = {name: tuple(p.shape) for name, p in params.items()}
        body_bytes = sum(p.nbytes for p in params.values())
        left = max(0, int(budget * (1 - _HEADROOM)) - body_bytes)
        store = Store(home, the_dtype, shapes, left, rows, frozenset(shapes) & _VOCABULARY)
        files = FileIndex()
        entries: dict[str, Any] = {home: entry}
        _index(files, home, found[home])
        for name in others:
            other = loaded(name)
            plain[name] = _plain_logits(other.model, probe, n_shared)
            _index(files, name, found[name])
            own = dict(other.model.named_parameters())
            padded = {k: pad_rows(p, shapes[k]) if k in _VOCABULARY and k in shapes else p for k, p in own.items()}
            check_same_shapes(name, {k: tuple(p.shape) for k, p in padded.items()}, shapes)
            store.add(name, padded, params, files)
            entries[name] = Loaded(other.source, None, other.tokenizer, other.notes)
            del other, own, padded
        body = Body(_boot(entry.model), entry.model.config, params, n_shared)
        check_evaluation(entry.model)
        minds = cls(body, params, store, entries)
        minds._budget = budget
        for name in minds.names:
            with minds.at(name):
                minds.probe_gap[name] = check_equal_logits(name, body.forward(probe), plain[name], the_dtype)
        return minds

    @property
    def config(self) -> Any:
        """The body's Hugging Face configuration."""
        return self.body.config

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.body.dtype

    @property
    def derived(self) -> tuple[str, ...]:
        """The minds that `derive` made, without those that were discarded."""
        return tuple(self._derived)

    @property
    def n_params(self) -> int:
        """Number of scalars in the body."""
        return sum(p.numel() for p in self._params.values())

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each mind's weights, as loaded; computed once, tensors shared by minds read once."""
        if not self._hashes:
            with self.at(self.names[0]):
                self._hashes = {name: self._store.digest(name, self._params) for name in self.names}
        return dict(self._hashes)

    def digest(self, name: str) -> str:
        """SHA-256 of the weights of one mind, loaded or derived."""
        self.handle(name)
        with self.at(self.names[0]):
            return self._store.digest(name, self._params)

    @property
    def inside(self) -> Handle:
        """The handle whose weights the body has now."""
        return self._inside

    def tokenizer(self, name: str | Handle | None = None) -> Any:
        """A mind's tokenizer (default: the first mind's)."""
        handle = self.handle(name if name is not None else self.names[0])
        return self._tokenizers[handle.name if handle.kind == "mind" else next(n for n in self.names)]

    def units(self, level: Level = "block") -> list[Unit]:
        """The Units of the body at a level (see `models.units`)."""
        return units(self.body, level)

    def plan(self) -> MemoryPlan:
        """Where the weights are."""
        by_mind = self._store.bytes_by_mind()
        body = sum(p.nbytes for p in self._params.values())
        return MemoryPlan(
            self._budget, body, {n: a for n, (a, _) in by_mind.items()}, {n: b for n, (_, b) in by_mind.items()}
        )

    def handle(self, which: str | Handle) -> Handle:
        """A handle from a mind's name, or the handle itself, all of whose minds are checked to be here.

        Raises:
            UserError: no such mind.
        """
        handle = mind(which)
        here = (*self.names, *self.derived)
        if unknown := sorted(handle.minds() - set(here)):
            raise UserError(f"mind: {unknown[0]!r} is not loaded; the minds are {', '.join(here)}.")
        return handle

    def free_memory(self) -> int:
        """Bytes that are free where the body computes."""
        if self.body.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.body.device)[0])
        return _available()

    @contextmanager
    def at(self, which: str | Handle) -> Iterator[Body]:
        """The body with the weights of a handle; on exit or exception, those that were in before are put back.

        May be nested; entering what is already in costs nothing.
        """
        handle, before = self.handle(which), self._inside
        try:
            self._enter(handle)
            yield self.body
        finally:
            self._enter(before)

    def delta(self, start: str | Handle, stop: str | Handle) -> Iterator[tuple[str, Tensor]]:
        """(parameter, `stop - start` in float32 on the CPU) for every parameter that differs, in the body's shapes.

        Rows of the vocabulary that the minds do not share are zero.
        """
        return iter(self.difference(start, stop).items())

    def difference(self, start: str | Handle, stop: str | Handle) -> Difference:
        """As `delta`, each tensor formed anew whenever it is asked for, so that none is kept."""
        first, second = self.handle(start), self.handle(stop)
        return Difference(self._store, first, second, list(self._recipes), self.body.n_vocab_shared)

    def weights(self, which: str | Handle) -> dict[str, Tensor]:
        """Copies of a handle's parameters, on the CPU, in the body's dtype and shapes; what is in stays in."""
        handle, out = self.handle(which), {}
        for param, live in self._params.items():
            recipe = self._store.recipe(handle, param) if param in self._recipes else None
            value = live if recipe is None else self._store.value(recipe, param)
            out[param] = value.detach().to("cpu", copy=True)
        return out

    def derive(self, name: str, of: str, tensors: Mapping[str, Tensor]) -> None:
        """Register a further mind: the weights of mind `of`, with these tensors in place of its own.

        It is one of `derived` from now on, with the tokenizer and the source of `of`, and no part of what is told of the
        minds by their `names` (studies' cells, hashes).  Only what is new is kept.

        Args:
            name: of the new mind.
            of: a mind that is here.
            tensors: by parameter name, with the body's shapes; converted to the body's dtype and copied.

        Raises:
            UserError: the name is taken, there is no mind `of`, or a tensor fits no parameter.
        """
        if name in (*self.names, *self.derived):
            raise UserError(f"name: a mind {name!r} is here already; choose another name.")
        self.handle(of)
        new = {}
        for param, tensor in tensors.items():
            shape = self.body.param_shapes.get(param)
            if shape != tuple(tensor.shape):
                expected = f"has shape {shape}" if shape else "does not exist"
                raise UserError(f"tensors: {param!r} {expected} in the body; got shape {tuple(tensor.shape)}.")
            new[param] = tensor.detach().to("cpu", self.dtype, copy=True)
        with self.at(self.names[0]):
            self._store.derive(name, of, new, self._params)
            for param in new:
                if self._store.differs(param):
                    self._recipes.setdefault(param, ("mind", self.names[0]))
        self.sources[name], self._tokenizers[name] = self.sources[of], self._tokenizers[of]
        self._derived[name] = of

    def discard(self, name: str) -> None:
        """Forget a mind that `derive` made, and what `memo` has of it; the name may be given again.

        Raises:
            UserError: it was loaded, another mind was derived from it, or its weights are in.
        """
        if name not in self._derived:
            raise UserError(f"name: {name!r} is no derived mind; only what `derive` made can be discarded.")
        if name in self._derived.values() or name in self._inside.minds():
            raise UserError(f"name: {name!r} is in use; discard what was derived from it and leave `at` first.")
        self._store.discard(name)
        gone = {name, self._derived.pop(name)}
        del self.sources[name], self._tokenizers[name]
        self.memo = {key: kept for key, kept in self.memo.items() if gone.isdisjoint(key)}
        self.discarded += 1

    def _enter(self, handle: Handle) -> None:
        """Write a handle's tensors where they are made otherwise than those that are in."""
        if handle is self._inside and not self._torn:
            return
        self._torn = True
        with torch.no_grad():
            for param, now in self._recipes.items():
                recipe = self._store.recipe(handle, param)
                if recipe != now:
                    self._recipes[param] = ("unknown",)  # until the copy is whole
                    self._params[param].copy_(self._store.value(recipe, param))
                    self._recipes[param] = recipe
        self._inside, self._torn = handle, False
        self.body.label = handle.label


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def check_device(device: str) -> None:
    """Fail early where torch cannot compute on a device.

    Raises:
        UserError: names the device and what there is.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = str(problem).splitlines()[0]
        raise UserError(f"--device {device}: torch cannot use it here ({reason}); there is {have}.") from None


def _resolve(sources: Mapping[str, str]) -> dict[str, Source]:
    """Sources by name; adapters get the first full model among them as base."""
    first = {name: resolve_source(text) for name, text in sources.items() if not names_adapter(text)}
    base = next(iter(first.values())).text if first else None
    return {n: first[n] if n in first else resolve_source(text, base=base) for n, text in sources.items()}


def _index(files: FileIndex, name: str, source: Source) -> None:
    if source.kind == "local":
        files.add(name, Path(source.path))


def _plain_logits(model: Any, ids: Tensor, n_shared: int) -> Tensor:
    """Logits of the plain model on the probe."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[..., :n_shared].clone()


def _probe(ids: Tensor | None, n_shared: int) -> Tensor:
    if ids is not None:
        return ids
    return torch.randint(n_shared, (2, 12), generator=torch.Generator().manual_seed(0))


def _grow_vocabulary(model: Any, n_rows: int) -> None:
    """Append rows of zeros to the embeddings until there are `n_rows`."""
    have = model.config.vocab_size
    if have == n_rows:
        return
    with quiet():
        model.resize_token_embeddings(n_rows, mean_resizing=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.requires_grad_(False)
            if name in _VOCABULARY:
                p[have:] = 0


def _boot(model: Any) -> Any:
    """Wrap the model, in place, in a TransformerBridge."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model, model.config.architectures[0], hf_config=model.config).eval()


def _available() -> int:
    """Bytes of memory that are free to use."""
    import psutil

    return int(psutil.virtual_memory().available)
