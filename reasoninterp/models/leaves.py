"""Leaves: the modules of a body that own parameters, and what each computes with them.

Each leaf is linear in its parameters: `y = f(x; theta)` with `f(x; theta + delta) = f(x; theta) + f(x; delta)`.
Its role says where it stands (`embed`, `pos_embed`, `ln1`, `q`, `k`, `v`, `q_norm`, `k_norm`, `o`, `ln2`,
`mlp.gate`, `mlp.in`, `mlp.out`, `ln_final`, `unembed`) and its kind what it computes:

* linear: `y = x W^T + b`;  conv1d (GPT-2): `y = x W + b`;  embedding: `y = W[x]`;
* norm: `y = norm(x) * w + b`, with RMS or mean-and-variance normalisation.

What really runs inside the bridge (probed at construction, and by tests for Llama, Qwen2, Qwen3 and GPT-2): all
torch modules do, except GPT-2's LayerNorms, which the bridge computes by itself, and GPT-2's fused `c_attn`, of which
it runs three linear views (so the leaves `q`, `k` and `v` own slices of `c_attn`).  `Leaf.watch` hides the
difference: it hooks the torch module where it runs and the bridge's hook points around it where it does not.
With `Body.forward(positions=...)` the `unembed` leaf sees only the positions that are read: x is [row, read, d_model].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reasoninterp.models.units import Slice

LeafKind = Literal["linear", "conv1d", "embedding", "norm"]
Watcher = Callable[[Tensor, Tensor], None]
_BLOCK_PATHS = (
    ("ln1", "ln1"),
    ("attn.q", "q"),
    ("attn.k", "k"),
    ("attn.v", "v"),
    ("attn.q_norm", "q_norm"),
    ("attn.k_norm", "k_norm"),
    ("attn.o", "o"),
    ("ln2", "ln2"),
    ("mlp.gate", "mlp.gate"),
    ("mlp.in", "mlp.in"),
    ("mlp.out", "mlp.out"),
)


@dataclass(frozen=True, eq=False)
class Leaf:
    """One module that owns parameters.

    `weight` and `bias` say which part of which parameter of the plain model they are; `transposed` says that the
    module's weight is that part transposed (GPT-2's split q, k and v).
    """

    name: str
    role: str
    layer: int | None
    kind: LeafKind
    weight: Slice
    bias: Slice | None
    transposed: bool
    eps: float
    centred: bool
    _module: torch.nn.Module
    _component: Any
    _runs: bool

    @property
    def params(self) -> tuple[Slice, ...]:
        """The slices of parameters that it uses."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @contextmanager
    def watch(self, callback: Watcher) -> Iterator[None]:
        """Call `callback(x, y)` at each forward with the leaf's input and output (y in the graph, where there is one).

        x is [row, pos, in] (ids [row, pos] for embeddings); y is [row, pos, out].  The query and key norms of Qwen3
        see [row, head, pos, d_head].
        """
        handles = []
        if self._runs:

            def after(_module: Any, args: tuple[Any, ...], out: Tensor) -> None:
                callback(args[0], out)

            handles.append(self._module.register_forward_hook(after))
        else:
            seen: list[Tensor] = []

            def enter(_module: Any, _args: Any, out: Tensor) -> None:
                seen.append(out)

            def leave(_module: Any, args: tuple[Any, ...]) -> None:
                callback(seen.pop(), args[0])

            handles.append(self._component.hook_in.register_forward_hook(enter))
            handles.append(self._component.hook_out.register_forward_pre_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def apply(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """`f(x; params)` in the dtype of `params`: with weight differences for `params`, the change of y at this x.

        Args:
            x: the leaf's input, as `watch` gives it.
            params: by name, tensors shaped like the plain model's parameters; a missing one counts as zero.
        """
        weight = self._part(self.weight, params)
        bias = self._part(self.bias, params) if self.bias is not None else None
        dtype = next(t for t in (weight, bias) if t is not None).dtype
        if weight is not None and (self.transposed or self.kind == "conv1d"):
            weight = weight.T  # [out, in] for conv1d's [in, out]; likewise for the slices of a fused c_attn
        if self.kind == "embedding":
            assert weight is not None
            return torch.nn.functional.embedding(x, weight)
        if self.kind == "norm":
            y = self.normalised(x.to(dtype))
            y = y * weight if weight is not None else torch.zeros_like(y)
        else:
            y = x.to(dtype) @ weight.T if weight is not None else x.new_zeros(1, dtype=dtype)
        return y + bias if bias is not None else y

    def normalised(self, x: Tensor) -> Tensor:
        """What a norm multiplies by its gain: x over its root mean square, centred first in a LayerNorm."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    @contextmanager
    def starting_graph(self) -> Iterator[None]:
        """Make the outputs of this embedding the beginning of the graph."""

        def start(_module: Any, _args: Any, out: Tensor) -> None:
            out.requires_grad_(True)

        handle = self._module.register_forward_hook(start, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @staticmethod
    def _part(which: Slice, params: Mapping[str, Tensor]) -> Tensor | None:
        return which.of(params[which.param]) if which.param in params else None


def find_leaves(bridge: Any, params: Mapping[str, torch.nn.Parameter], probe: Callable[[], None]) -> list[Leaf]:
    """The leaves of a booted bridge, with the plain model's parameters found by their place in memory.

    Raises:
        RuntimeError: a leaf runs more than once per forward, or some parameter is used by no leaf.
    """
    found = []
    for path, role, layer in _paths(bridge):
        component = _get(bridge, path)
        module = getattr(component, "original_component", None) if component is not None else None
        if module is not None and any(True for _ in module.parameters(recurse=False)):
            found.append((role, layer, component, module))
    counts: dict[int, int] = {id(module): 0 for *_, module in found}
    handles = [module.register_forward_hook(_counter(counts)) for *_, module in found]
    try:
        probe()
    finally:
        for handle in handles:
            handle.remove()
    leaves = [
        _leaf(role, layer, component, module, params, runs=_once(role, counts[id(module)]))
        for role, layer, component, module in found
    ]
    missing = set(params) - {part.param for leaf in leaves for part in leaf.params}
    if missing:
        raise RuntimeError(f"the parameters {', '.join(sorted(missing)[:3])} are used by no leaf of the bridge")
    return leaves


def _counter(counts: dict[int, int]) -> Callable[..., None]:
    def count(module: torch.nn.Module, _args: Any, _out: Any) -> None:
        counts[id(module)] += 1

    return count


def _once(role: str, n: int) -> bool:
    if n > 1:
        raise RuntimeError(f"the module {role} runs {n} times per forward pass")
    return n == 1


def _paths(bridge: Any) -> Iterator[tuple[str, str, int | None]]:
    yield "embed", "embed", None
    yield "pos_embed", "pos_embed", None
    for layer in range(len(bridge.blocks)):
        for path, role in _BLOCK_PATHS:
            yield f"blocks.{layer}.{path}", role, layer
    yield "ln_final", "ln_final", None
    yield "unembed", "unembed", None


def _get(root: Any, path: str) -> Any:
    at = root
    for name in path.split("."):
        at = at._modules.get(name) if not name.isdigit() else at[int(name)]
        if at is None:
            return None
    return at


def _leaf(
    role: str, layer: int | None, component: Any, module: Any, params: Mapping[str, torch.nn.Parameter], *, runs: bool
) -> Leaf:
    weight, transposed = _locate(module.weight, params)
    own_bias = module._parameters.get("bias")
    bias = _locate(own_bias, params)[0] if own_bias is not None else None
    kind: LeafKind
    if isinstance(module, torch.nn.Embedding):
        kind = "embedding"
    elif isinstance(module, torch.nn.Linear):
        kind = "linear"
    elif type(module).__name__ == "Conv1D":
        kind = "conv1d"
    else:
        kind = "norm"
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))) if kind == "norm" else 0.0
    centred = isinstance(module, torch.nn.LayerNorm)
    name = role if layer is None else f"L{layer}.{role}"
    return Leaf(name, role, layer, kind, weight, bias, transposed, eps, centred, module, component, runs)


def _locate(tensor: Tensor, params: Mapping[str, torch.nn.Parameter]) -> tuple[Slice, bool]:
    """The parameter in whose memory a tensor lies, the range that it covers, and whether it lies there transposed."""
    for name, p in params.items():
        ahead = tensor.data_ptr() - p.data_ptr()
        if not 0 <= ahead < p.numel() * p.element_size():
            continue
        offset = ahead // p.element_size()
        if tensor.shape == p.shape and tensor.stride() == p.stride() and offset == 0:
            return Slice(name, 0, 0, p.shape[0]), False
        if tensor.dim() == 1 and p.dim() == 1:
            return Slice(name, 0, offset, offset + tensor.shape[0]), False
        if tensor.dim() == 2 and tensor.stride() == (1, p.stride(0)) and tensor.shape[1] == p.shape[0]:
            return Slice(name, 1, offset, offset + tensor.shape[0]), True
    raise RuntimeError("a module of the bridge uses weights that lie in no parameter of the plain model")
