"""Bases in which the steps reach the answer by named heads (`carriers`) and by no other way.

The answer is read at `=`, so whatever it knows of the steps came by an attention edge from `=` to a step.  Training
draws four kinds of rows and closes edges by kind:

1. *strict*: at `=` only the carriers may attend to the steps; chain and answer are supervised, tags are mostly random.
2. *free*: every head may; supervised likewise, so that the trained model needs no closed edges.
3. *cut*: the carriers may not (or write nothing), every other head may; the chain is another problem's, the tag gives
   the answer away, and the answer is the tag's.  So no other head learns to carry the steps, and a mind whose path is
   cut has its rival to fall back on: it keeps its accuracy, as tuned minds do.
4. *direct*: a chain cut short, answered by the tag.

With `redundant` carriers every strict row opens one of them, and in some more steps the logits at `=` with one of them
silent or blind are drawn towards those with all, so that each alone suffices and a second adds nothing; with several
carriers otherwise, all are open and may share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from reasoninterp.organisms.planted.routes import Routes
from reasoninterp.organisms.recipes import RecipeFailed
from reasoninterp.organisms.rows import ID, QUESTION_LENGTH, Rows, cut, make_rows, step_ids
from reasoninterp.organisms.tasks import EQUALS, TAGS, Domain, Ints, TaskName, problems
from reasoninterp.organisms.training import WARMUP, Measured, measure, new_model

DOMAIN = Domain(2, 4, rare=0.2, novel=0.1)
ANSWER_WEIGHT = 4.0
EVEN_STEPS, EVEN_RATE = 500, 1e-3
EVEN_WEIGHT = 4.0  # of the distance of logits with one redundant carrier gone from those with all
CHECK_EVERY = 50
_HERE = Path(__file__).parent
_SOURCES = ("../tasks.py", "../rows.py", "../training.py", "routes.py", "bases.py")


class Carrier(NamedTuple):
    """A group of heads (a head, where keys and values are not shared)."""

    layer: int
    group: int


@dataclass(frozen=True)
class BaseSpec:
    """How one base is made.

    Attributes:
        seed: of weights and data.
        task: `lastop` or `largest`.
        layers, heads, kv_heads: its size; `width` 64.
        carriers: where its path runs.
        redundant: each carrier alone suffices.
        steps: most optimiser steps.
    """

    seed: int
    task: TaskName
    layers: int
    heads: int
    kv_heads: int
    carriers: tuple[Carrier, ...]
    redundant: bool = False
    steps: int = 1000
    lr: float = 3e-3
    batch: int = 128
    width: int = 64

    @property
    def name(self) -> str:
        """Seed, task, layers, heads and groups: `b207-lastop-4l-4h2kv`."""
        return f"b{self.seed:03d}-{self.task}-{self.layers}l-{self.heads}h{self.kv_heads}kv"

    def digest(self) -> str:
        """Hash of all that determines the weights."""
        value: dict[str, Any] = {"spec": asdict(self)}
        value["versions"] = {name: version(name) for name in ("torch", "transformers")}
        value["source"] = [hashlib.sha256((_HERE / f).read_bytes()).hexdigest() for f in _SOURCES]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Shares:
    """Shares of the four kinds of rows, and of strict and free rows whose tag is random."""

    strict: float = 0.4
    free: float = 0.3
    cut: float = 0.2
    direct: float = 0.1
    mistagged: float = 0.8  # with a chain at hand, the chain is the better guide


FIRST = Shares(strict=0.6, free=0.4, cut=0.0, direct=0.0, mistagged=0.95)
FIRST_SHARE = 0.25  # of the steps: taught the tag at once, some seeds never learn to read the chain


class Drawn(NamedTuple):
    """A batch: its rows, the edges that are closed and the heads that are silent, by layer."""

    rows: Rows
    closed: dict[int, Bool[Tensor, "row group query key"]]
    silent: dict[int, Bool[Tensor, "row group query"]]


def edges_to_steps(ids: Ints, shown: Ints) -> Bool[Tensor, "row query key"]:
    """The edges from `=` to the steps that are shown."""
    pos = torch.arange(ids.shape[1])
    equals = torch.from_numpy(QUESTION_LENGTH + shown)
    at = pos[None] == equals[:, None]
    step = (pos[None] >= QUESTION_LENGTH) & (pos[None] < equals[:, None])
    return at[:, :, None] & step[:, None, :]


def draw(spec: BaseSpec, rng: np.random.Generator, size: int, shares: Shares | None = None) -> Drawn:
    """One batch of the four kinds."""
    shares = shares or Shares()
    p = problems(spec.task, DOMAIN, size, rng, "train", cue=True)
    bounds = np.cumsum([shares.strict, shares.free, shares.cut])
    kind = np.searchsorted(bounds, rng.random(size), side="right")  # 0 strict, 1 free, 2 cut, 3 direct
    other = step_ids(p, p.steps(p.other_starts(rng)))
    steps = np.where((kind == 2)[:, None], other, step_ids(p, p.steps()))
    mistagged = (kind < 2) & (rng.random(size) < shares.mistagged)
    answers = p.answers
    p = replace(p, tag=np.where(mistagged, rng.integers(0, len(TAGS), size), p.tag))
    full = (steps >= 0).sum(1)
    steps = cut(steps, np.where(kind == 3, rng.integers(0, np.maximum(full, 1)), full))
    rows = make_rows(p, steps, answers, kind < 2, ANSWER_WEIGHT)
    edges = edges_to_steps(rows.ids, (steps >= 0).sum(1))
    opened = np.repeat((kind != 0)[:, None, None], spec.layers, 1).repeat(spec.kv_heads, 2)
    silent = np.zeros_like(opened)
    quiet = (kind == 2) & (rng.random(size) < 0.5)
    chosen = rng.integers(0, len(spec.carriers), size)
    for i, (layer, group) in enumerate(spec.carriers):
        opened[(kind == 0) & ((chosen == i) | (not spec.redundant)), layer, group] = True
        opened[kind == 2, layer, group] = False
        silent[quiet, layer, group] = True
    closed = {k: edges[:, None] & ~torch.from_numpy(opened[:, k])[:, :, None, None] for k in range(spec.layers)}
    at = edges.any(2)[:, None]
    hushed = {k: at & torch.from_numpy(silent[:, k])[:, :, None] for k in {c.layer for c in spec.carriers}}
    return Drawn(rows, closed, hushed)


def loss_of(model: Any, rows: Rows) -> Tensor:
    """Weighted mean cross-entropy of the next token."""
    ids, weights = torch.from_numpy(rows.ids), torch.from_numpy(rows.weights)
    logits = model(input_ids=ids, use_cache=False).logits
    at = weights[:, 1:] > 0
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][at], ids[:, 1:][at], reduction="none")
    chosen = weights[:, 1:][at]
    return (losses * chosen).sum() / chosen.sum()


def unevenness(model: Any, routes: Routes, spec: BaseSpec, ids: Ints, shown: Ints, gone: int, blind: bool) -> Tensor:
    """How far the logits at `=` with one carrier silent everywhere (or blind to the steps) are from those with all.

    No other head may look at the steps from `=` meanwhile, or it would learn to stand in.  Mean square over the
    vocabulary and rows, over the variance of the logits with all.
    """
    tokens, edges = torch.from_numpy(ids), edges_to_steps(ids, shown)
    layer, group = spec.carriers[gone]
    at = edges.any(2)
    stay = torch.zeros(spec.layers, spec.kv_heads, dtype=torch.bool)
    for number, carrier in enumerate(spec.carriers):
        stay[carrier] = number != gone
    closed = {k: edges[:, None] & ~stay[k][None, :, None, None] for k in range(spec.layers)}
    own = (torch.arange(spec.kv_heads) == group)[None, :, None]
    silent = {} if blind else {layer: own.expand(len(ids), -1, ids.shape[1])}
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits[at]
    with routes.of(closed, silent):
        one = model(input_ids=tokens, use_cache=False).logits[at]
    return (one - whole).square().mean() / whole.var()


def tune(
    model: Any,
    spec: BaseSpec,
    *,
    steps: int,
    lr: float,
    seed: int,
    first: int = 0,
    even: bool = False,
    stop: Callable[[], bool] | None = None,
) -> int:
    """Train in place on batches of `draw`, the first ones without rows in which the tag counts.

    With `even`, also towards carriers each of which suffices (`unevenness`).

    Returns:
        The number of steps taken.
    """
    rng = np.random.default_rng([spec.seed, seed])
    routes = Routes(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    model.train()
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, step / WARMUP) * (1 - 0.9 * step / steps)
        rows, closed, silent = draw(spec, rng, spec.batch, FIRST if step <= first else None)
        with routes.of(closed, silent):
            loss = loss_of(model, rows)
        if even:
            shown = (rows.ids == ID[EQUALS]).argmax(1) - QUESTION_LENGTH
            gone, blind = int(rng.integers(len(spec.carriers))), bool(rng.random() < 0.5)
            loss = loss + EVEN_WEIGHT * unevenness(model, routes, spec, rows.ids, shown, gone, blind)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if stop and step > first and step % CHECK_EVERY == 0:
            model.eval()
            if stop():
                break
            model.train()
    model.eval()
    routes.leave()
    return step


def train_base(spec: BaseSpec) -> tuple[Any, dict[str, Any]]:
    """A base and its figures on held-out problems.

    Raises:
        RecipeFailed: it did not learn to solve the problems and to follow its steps.
    """
    model = new_model(spec.seed, spec.layers, spec.width, spec.heads, spec.kv_heads)
    valid = problems(spec.task, DOMAIN, 256, np.random.default_rng([spec.seed, 11]), "valid", cue=True)

    def good(m: Measured, margin: float = 0.0) -> bool:
        return (
            min(m.accuracy, m.follow) >= 0.985 - margin and m.steps_right >= 0.97 - margin and m.early >= 0.9 - margin
        )

    steps = tune(
        model,
        spec,
        steps=spec.steps,
        lr=spec.lr,
        seed=1,
        first=int(FIRST_SHARE * spec.steps),
        stop=lambda: good(measure(model, valid, spec.seed)),
    )
    if spec.redundant:
        steps += tune(model, spec, steps=EVEN_STEPS, lr=EVEN_RATE, seed=2, even=True)
    test = problems(spec.task, DOMAIN, 256, np.random.default_rng([spec.seed, 12]), "test", cue=True)
    found = measure(model, test, spec.seed)
    figures: Mapping[str, float] = asdict(found)
    if not good(found, 0.05):
        raise RecipeFailed(spec.name, spec.seed, [f"it is not {found}"], steps, figures)
    return model, {"steps": steps, **figures}
