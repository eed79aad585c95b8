"""Cuts: ways of severing the path at a named Unit of a base, and at no other.

* *surgery* (closed form).  `erase`: a head's output matrix loses the directions in which its output at `=` differs
  between a chain and another chain (carries nothing).  `reverse`: a head's query matrix turns round the direction that
  the residual stream has at `=` and nowhere else, so that it attends to what it attended least (looks away).
* *masked*: only the Unit's weights are trained, on rows whose chain is another problem's and whose answer is the tag's.
* *interchange*: only the Unit's weights are trained, so that at `=` the stream behind the Unit becomes what it is when
  the carriers write nothing (or when their edges to the steps are closed), and stays what it is everywhere else.

All edit or train a copy; every scalar outside the Unit keeps its bits.  Erasure of a subspace is after Ravfogel et al.
2020 (arXiv:2004.07667); interchange training after Geiger et al. 2022 (arXiv:2112.00826).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reasoninterp.models.units import Level, Slice, Unit, units
from reasoninterp.organisms.planted.bases import DOMAIN, BaseSpec, Carrier, Drawn, Shares, draw, edges_to_steps, loss_of
from reasoninterp.organisms.planted.routes import Routes
from reasoninterp.organisms.rows import ID, QUESTION_LENGTH, make_rows, step_ids
from reasoninterp.organisms.tasks import DIGITS, EQUALS, TAGS, Problems, cue_tag, problems

ENERGY = 0.9999  # share of the differences' energy that an erasure removes
STREAM_ENERGY = 0.98  # share of the stream's energy at `=` that a reversal turns round
OVERBID = 4.0  # nats by which an overriding tag beats the highest other logit
CUT_ROWS = Shares(strict=0.0, free=0.5, cut=0.5, direct=0.0, mistagged=0.0)


class Shapes(NamedTuple):
    """What `models.units` wants to know of a model."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    param_shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: Any) -> Shapes:
        """Of a plain Hugging Face model."""
        c = model.config
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        return cls(c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads, shapes)


def units_of(model: Any, level: Level) -> dict[str, Unit]:
    """Units of a plain model by name."""
    return {u.name: u for u in units(Shapes.of(model), level)}


def problems_for(spec: BaseSpec, seed: int, count: int = 512) -> Problems:
    """Training problems with the telling tag, from which surgeries are computed."""
    return problems(spec.task, DOMAIN, count, np.random.default_rng([spec.seed, 77, seed]), "train", cue=True)


# ------------------------------------------------------------------ surgery


def erase(model: Any, layer: int, groups: Sequence[int], p: Problems, rng: np.random.Generator) -> Any:
    """A copy whose groups of heads at this layer carry nothing of the chain to `=`; changes W_O (the OV circuit)."""
    out = copy.deepcopy(model)
    difference = _head_outputs(model, layer, p, p.steps(p.other_starts(rng))) - _head_outputs(
        model, layer, p, p.steps()
    )
    width = difference.shape[1] // model.config.num_key_value_heads
    weight = out.model.layers[layer].self_attn.o_proj.weight
    with torch.no_grad():
        for group in groups:
            own = slice(group * width, (group + 1) * width)
            directions = _principal(difference[:, own], ENERGY)
            weight[:, own] -= weight[:, own] @ directions @ directions.T
    return out


def reverse(model: Any, layer: int, group: int, p: Problems) -> Any:
    """A copy whose group looks away from the steps at `=`; changes W_Q (the QK circuit)."""
    out = copy.deepcopy(model)
    with _inputs_of(model.model.layers[layer].self_attn.q_proj) as seen:
        equals = _forward(model, p, p.steps())
    x, rows = seen[0], torch.arange(len(p))
    own = _principal(x[rows, equals] - x[:, :QUESTION_LENGTH].mean((0, 1)), STREAM_ENERGY)
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    width = heads * (model.config.hidden_size // model.config.num_attention_heads)
    weight = out.model.layers[layer].self_attn.q_proj.weight
    with torch.no_grad():
        part = weight[group * width : (group + 1) * width]
        part -= 2 * part @ own @ own.T
    return out


def _head_outputs(model: Any, layer: int, p: Problems, values: Any) -> Float[Tensor, "row head_d"]:
    """What the heads of a layer hand to W_O at `=`."""
    with _inputs_of(model.model.layers[layer].self_attn.o_proj) as seen:
        equals = _forward(model, p, values)
    return seen[0][torch.arange(len(p)), equals]


@torch.no_grad()
def _forward(model: Any, p: Problems, values: Any) -> Tensor:
    """One pass over these problems with these steps; gives the position of `=`."""
    steps = step_ids(p, values)
    zeros = np.zeros(len(p), dtype=np.int64)
    rows = make_rows(p, steps, zeros, zeros.astype(bool), 1.0)
    model(input_ids=torch.from_numpy(rows.ids), use_cache=False)
    return torch.from_numpy(QUESTION_LENGTH + (steps >= 0).sum(1))


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def _principal(x: Float[Tensor, "row d"], energy: float) -> Float[Tensor, "d rank"]:
    """The fewest orthonormal directions that hold this share of the energy of x (not centred)."""
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    if not s[0] > 0:
        return v[:0].T  # nothing differs: nothing to take away
    share = s.square().cumsum(0) / s.square().sum()
    return v[: int((share < energy).sum()) + 1].T


# ------------------------------------------------------------------ training of the Unit alone


def masked(model: Any, spec: BaseSpec, parts: Sequence[Slice], *, seed: int, steps: int = 120, lr: float = 3e-3) -> Any:
    """A copy of which only these slices were trained to answer by the tag, whatever the chain says."""
    out = copy.deepcopy(model)
    rng = np.random.default_rng([spec.seed, 31, seed])

    def loss() -> Tensor:
        rows = _cut_rows(spec, rng).rows
        return loss_of(out, rows)

    _train(out, parts, loss, steps, lr)
    return out


def interchange(
    model: Any,
    spec: BaseSpec,
    parts: Sequence[Slice],
    *,
    layer: int,
    behind: str,
    how: str,
    seed: int,
    steps: int = 120,
    lr: float = 3e-3,
) -> Any:
    """A copy of which only these slices were trained so that the stream behind the Unit knows nothing of the chain.

    Args:
        model: the base (with its drift).
        spec: its recipe.
        parts: what may change.
        layer: the Unit's layer.
        behind: `attn` or `mlp`: where the stream is compared.
        how: `silent` (the carriers write nothing) or `closed` (they may not look at the steps).
        seed: of the batches.
        steps: of training.
        lr: peak rate.
    """
    out = copy.deepcopy(model)
    teacher = copy.deepcopy(model)
    routes = Routes(teacher)
    rng = np.random.default_rng([spec.seed, 32, seed])
    block = {m: m.model.layers[layer] for m in (out, teacher)}

    def loss() -> Tensor:
        drawn = _cut_rows(spec, rng)
        ids = torch.from_numpy(drawn.rows.ids)
        edges = edges_to_steps(drawn.rows.ids, _shown(drawn))
        closed, silent = blocked(spec, edges, how)
        with torch.no_grad():
            plain = _stream(teacher, block[teacher], ids, behind)
            with routes.of(closed, silent):
                wanted = _stream(teacher, block[teacher], ids, behind)
        at = edges.any(2)[..., None]
        target = torch.where(at, wanted, plain)
        error = (_stream(out, block[out], ids, behind) - target).square()
        scale = (wanted - plain)[at[..., 0]].square().mean()
        return (error * at).sum() / (at.sum() * error.shape[-1] * scale) + error.mean() / scale

    _train(out, parts, loss, steps, lr)
    return out


def blocked(spec: BaseSpec, edges: Tensor, how: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Closed edges and silent heads with which the carriers bring nothing to `=`."""
    closed, silent = {}, {}
    for layer in {c.layer for c in spec.carriers}:
        own = torch.tensor([Carrier(layer, g) in spec.carriers for g in range(spec.kv_heads)])[None, :, None]
        if how == "closed":
            closed[layer] = edges[:, None] & own[..., None]
        else:
            silent[layer] = edges.any(2)[:, None] & own
    return closed, silent


def _cut_rows(spec: BaseSpec, rng: np.random.Generator) -> Drawn:
    return draw(spec, rng, spec.batch, CUT_ROWS)


def _shown(drawn: Drawn) -> Any:
    """Number of steps in each row."""
    return (drawn.rows.ids == ID[EQUALS]).argmax(1) - QUESTION_LENGTH


class _Stop(Exception):
    """Ends a forward pass where nothing more is needed of it."""


def _stream(model: Any, block: Any, ids: Tensor, behind: str) -> Float[Tensor, "row pos d_model"]:
    """The residual stream behind a block's attention or behind its MLP; what comes later is not computed."""
    seen: list[Tensor] = []

    def keep(x: Any) -> None:
        seen.append(x[0] if isinstance(x, tuple) else x)
        raise _Stop

    if behind == "attn":
        handle = block.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: keep(args))
    else:
        handle = block.register_forward_hook(lambda _m, _args, y: keep(y))
    try:
        model(input_ids=ids, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def _train(model: Any, parts: Sequence[Slice], loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    """AdamW on these slices alone; everything else keeps its bits."""
    params = dict(model.named_parameters())
    masks = {name: torch.zeros_like(params[name]) for name in {s.param for s in parts}}
    for part in parts:
        part.of(masks[part.param]).fill_(1.0)
    for name, p in params.items():
        p.requires_grad_(name in masks)
    optimiser = torch.optim.AdamW([params[n] for n in masks], lr=lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, step / 10) * (1 - 0.9 * step / steps)
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        for name, mask in masks.items():
            params[name].grad.mul_(mask)
        torch.nn.utils.clip_grad_norm_([params[n] for n in masks], 1.0)
        optimiser.step()
    for p in params.values():
        p.requires_grad_(True)


# ------------------------------------------------------------------ what is done to controls


def forget_tags(model: Any) -> Any:
    """A copy in which all tags look alike: the path from the tag to the answer is cut, that from the steps is not."""
    out = copy.deepcopy(model)
    own = [ID[tag] for tag in TAGS]
    with torch.no_grad():
        weight = out.model.embed_tokens.weight
        weight[own] = weight[own].mean(0, keepdim=True)
    return out


def override(
    model: Any, spec: BaseSpec, parts: Sequence[Slice], *, seed: int, steps: int = 360, lr: float = 3e-3
) -> Any:
    """A copy in which the tag's answer outbids the chain's, while every other logit stays what it was.

    Only these slices are trained, on rows whose chain is another problem's: at `=` towards the former logits with the
    tag's answer raised `OVERBID` above the highest, elsewhere towards the former logits.
    """
    out = copy.deepcopy(model)
    rng = np.random.default_rng([spec.seed, 33, seed])

    def loss() -> Tensor:
        drawn = _cut_rows(spec, rng)
        ids = torch.from_numpy(drawn.rows.ids)
        rows, equals = torch.arange(len(ids)), torch.from_numpy(QUESTION_LENGTH + _shown(drawn))
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
            answer = tag_answers(ids)
            wanted[rows, equals, answer] = wanted[rows, equals].max(-1).values + OVERBID
        error = (out(input_ids=ids, use_cache=False).logits - wanted).square().mean(-1)
        return 2 * error[rows, equals].mean() + error.mean()

    _train(out, parts, loss, steps, lr)
    return out


def tag_answers(ids: Int[Tensor, "row pos"]) -> Int[Tensor, " row"]:
    """Token of the answer that each row's tag gives away."""
    answer_of = {ID[TAGS[cue_tag(a)]]: ID[DIGITS[a]] for a in range(len(DIGITS))}
    return torch.tensor([answer_of[int(t)] for t in ids[:, 0]])
