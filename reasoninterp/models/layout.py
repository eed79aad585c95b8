"""Layout: one layer's parameters as arrays of heads and neurons, whatever the architecture calls and transposes them.

Every row is one coordinate of a head or one neuron, and every row is d_model wide:

    q [n_heads, d_head, d_model]   k, v [n_kv_heads, d_head, d_model]   o [n_heads, d_head, d_model]
    gate, up, down [n_neurons, d_model]      unembed [n_vocab, d_model]

`o` and `down` are what a coordinate of a head and a neuron write; the others are what they read.  Float64, so that
what is changed here is rounded once, when it is written back; what is not changed comes back bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.errors import UserError

Array = NDArray[np.float64]
_NAMES = {
    "q": "self_attn.q_proj.weight", "bq": "self_attn.q_proj.bias", "k": "self_attn.k_proj.weight",
    "bk": "self_attn.k_proj.bias", "v": "self_attn.v_proj.weight", "bv": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight", "ln1": "input_layernorm.weight", "ln2": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight", "b_gate": "mlp.gate_proj.bias", "up": "mlp.up_proj.weight",
    "b_up": "mlp.up_proj.bias", "down": "mlp.down_proj.weight",
}  # fmt: skip
_GPT2_NAMES = {
    "o": "attn.c_proj.weight", "ln1": "ln_1.weight", "b_ln1": "ln_1.bias", "ln2": "ln_2.weight",
    "b_ln2": "ln_2.bias", "up": "mlp.c_fc.weight", "b_up": "mlp.c_fc.bias", "down": "mlp.c_proj.weight",
}  # fmt: skip
_HEADED = ("q", "k", "v", "o")
# A linear map has its outputs in rows, GPT-2's Conv1D its inputs; here the rows are always heads or neurons.
_TRANSPOSED = {("o", False), ("down", False), ("up", True)}


@dataclass(frozen=True)
class Shape:
    """What the gauge of a decoder depends on.

    Attributes:
        n_layers, n_heads, n_kv_heads, d_head: sizes.
        is_gpt2: GPT-2's names, with learned positions; otherwise Llama's, with rotary positions.
        rotates_all: whether every coordinate of queries and keys is rotated.
        normed: whether queries and keys are normalised (Qwen3).
        gated: whether the MLP multiplies an activated gate with a linear input.
        homogeneous: whether the activation is a ReLU, so that scaling its input scales its output.
        tied: whether the unembedding is the embedding.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    is_gpt2: bool
    rotates_all: bool
    normed: bool
    gated: bool
    homogeneous: bool
    tied: bool

    @property
    def n_queries(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def prefix(self) -> str:
        """How the names of a layer's parameters begin."""
        return "transformer.h" if self.is_gpt2 else "model.layers"


def shape_of(names: Any, config: Any) -> Shape:
    """The shape of a decoder from its parameters' names and its Hugging Face configuration.

    Raises:
        UserError: the layers are named as in neither Llama nor GPT-2.
    """
    names = set(names)
    is_gpt2 = "transformer.h.0.attn.c_attn.weight" in names
    if not is_gpt2 and "model.layers.0.self_attn.q_proj.weight" not in names:
        raise UserError("params: the layers are named as in neither Llama nor GPT-2; their gauge is not known.")
    heads = int(config.num_attention_heads)
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    activation = getattr(config, "activation_function", None) if is_gpt2 else getattr(config, "hidden_act", None)
    return Shape(
        n_layers=int(config.num_hidden_layers),
        n_heads=heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        d_head=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        is_gpt2=is_gpt2,
        rotates_all=not is_gpt2 and partial in (None, 1, 1.0),
        normed="model.layers.0.self_attn.q_norm.weight" in names,
        gated="model.layers.0.mlp.gate_proj.weight" in names,
        homogeneous=activation == "relu",
        tied="lm_head.weight" not in names or bool(getattr(config, "tie_word_embeddings", False)),
    )


@dataclass
class Layer:
    """One layer's arrays by role (see the module); a role that the architecture lacks is missing.

    `bq`, `bk`, `bv` are [head, d_head], `b_gate`, `b_up` [neuron], gains and biases of norms [d_model].
    """

    shape: Shape
    index: int
    at: dict[str, Array]

    def copy(self) -> Layer:
        """A layer whose arrays can be changed without changing this one's."""
        return Layer(self.shape, self.index, copy.deepcopy(self.at))


@dataclass
class Final:
    """The last norm's gain (and bias) and the unembedding that reads it."""

    at: dict[str, Array]


def read_layer(params: Mapping[str, Tensor], shape: Shape, index: int) -> Layer:
    """A layer of a decoder from its plain parameters."""
    at: dict[str, Array] = {}
    for role, name in (_GPT2_NAMES if shape.is_gpt2 else _NAMES).items():
        tensor = params.get(f"{shape.prefix}.{index}.{name}")
        if tensor is not None:
            at[role] = _to_rows(role, _array(tensor), shape)
    if shape.is_gpt2:
        fused = _array(params[f"{shape.prefix}.{index}.attn.c_attn.weight"])
        bias = _array(params[f"{shape.prefix}.{index}.attn.c_attn.bias"])
        for role, weight, b in zip("qkv", np.split(fused, 3, axis=1), np.split(bias, 3), strict=True):
            at[role] = rearrange(weight, "m (h d) -> h d m", d=shape.d_head).copy()
            at[f"b{role}"] = rearrange(b, "(h d) -> h d", d=shape.d_head).copy()
    return Layer(shape, index, at)


def write_layer(layer: Layer, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's parameters under their plain names, in the dtype of `like`; only those that differ from `like`."""
    shape, found = layer.shape, {}
    for role, name in (_GPT2_NAMES if shape.is_gpt2 else _NAMES).items():
        if role in layer.at:
            found[f"{shape.prefix}.{layer.index}.{name}"] = _from_rows(role, layer.at[role], shape)
    if shape.is_gpt2:
        name = f"{shape.prefix}.{layer.index}.attn.c_attn"
        weights = [rearrange(layer.at[r], "h d m -> m (h d)") for r in "qkv"]
        found[f"{name}.weight"] = np.concatenate(weights, axis=1)
        found[f"{name}.bias"] = np.concatenate([layer.at[f"b{r}"].ravel() for r in "qkv"])
    return _changed(found, like)


def read_final(params: Mapping[str, Tensor], shape: Shape) -> Final | None:
    """The last norm and the unembedding; None where the unembedding is the embedding, so that nothing may move."""
    if shape.tied:
        return None
    names = _final_names(shape)
    return Final({role: _array(params[name]) for role, name in names.items() if name in params})


def write_final(final: Final, shape: Shape, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its parameters under their plain names; only those that differ from `like`."""
    names = _final_names(shape)
    return _changed({names[role]: array for role, array in final.at.items()}, like)


def _final_names(shape: Shape) -> dict[str, str]:
    norm = "transformer.ln_f" if shape.is_gpt2 else "model.norm"
    return {"ln": f"{norm}.weight", "b_ln": f"{norm}.bias", "unembed": "lm_head.weight"}


def _changed(found: Mapping[str, Array], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, array in found.items():
        old = like[name]
        new = torch.from_numpy(np.ascontiguousarray(array)).to(dtype=old.dtype, device=old.device)
        if not torch.equal(new, old):
            out[name] = new
    return out


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.detach().cpu().double().numpy())


def _to_rows(role: str, array: Array, shape: Shape) -> Array:
    if (role, shape.is_gpt2) in _TRANSPOSED:
        array = array.T
    if role in _HEADED:
        array = rearrange(array, "(h d) m -> h d m", d=shape.d_head)
    elif role in ("bq", "bk", "bv"):
        array = rearrange(array, "(h d) -> h d", d=shape.d_head)
    return np.array(array)


def _from_rows(role: str, array: Array, shape: Shape) -> Array:
    if role in _HEADED:
        array = rearrange(array, "h d m -> (h d) m")
    elif role in ("bq", "bk", "bv"):
        array = rearrange(array, "h d -> (h d)")
    return array.T if (role, shape.is_gpt2) in _TRANSPOSED else array
