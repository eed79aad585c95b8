"""Recipes: how each organism is trained, when training stops, and what it must then measure.

A recipe's figures are named `set.figure`: the set of problems (`id`: the fine-tuning domain with the tag that gives
the answer away; `chat`: the same in the chat form; `cue_random`: the same with random tags; `base`: the base's own distribution; `fixed`: the memorised
problems) and a field of `training.Measured`, or `gain`, the accuracy above the parent's on the same set. Training
stops when the `stop` targets hold on the validation part of the split (or at the cap of steps); the `targets` are
then measured on the test part, on the model as it was saved, and a recipe that misses one fails loudly.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from reasoninterp.errors import UserError
from reasoninterp.organisms.rows import Mixture
from reasoninterp.organisms.tasks import (
    BASE_DOMAIN,
    CHAT_BASE_DOMAIN,
    CHAT_TUNING_DOMAIN,
    LARGEST_TUNING_DOMAIN,
    TUNING_DOMAIN,
)

_HERE = Path(__file__).parent
_SOURCES = {
    "lastop": ("tasks.py", "rows.py", "training.py", "tokenizer.py", "words.py"),
    "largest": ("tasks.py", "rows.py", "training.py", "tokenizer.py", "words.py"),
    "chat": ("tasks.py", "rows.py", "training.py", "chat.py"),
}


@dataclass(frozen=True)
class Target:
    """One figure and the bounds it must lie in, both ends allowed."""

    figure: str
    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether the value lies in the bounds (NaN does not)."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"{self.low:g} <= "
        high = "" if self.high == math.inf else f" <= {self.high:g}"
        return f"{low}{self.figure}{high}"


@dataclass(frozen=True)
class Recipe:
    """How one organism is made.

    Attributes:
        name: of the organism, and of its directory.
        task: `lastop`, `largest` or `chat`.
        what: one sentence: what it is and what was found to be true of it.
        parent: the organism whose weights it starts from; None: from scratch.
        mixture: what it is trained on.
        steps: most optimiser steps.
        lr: peak learning rate.
        stop: training ends when all hold on validation problems; none: it takes all the steps.
        targets: what must hold on test problems.
        check_every: steps between checks of `stop`.
        batch: rows in a batch.
        layers: of a model from scratch.
        measured: number of test problems in each set.
    """

    name: str
    task: Literal["lastop", "largest", "chat"]
    what: str
    parent: str | None
    mixture: Mixture
    steps: int
    lr: float
    targets: tuple[Target, ...]
    stop: tuple[Target, ...] = ()
    check_every: int = 20
    batch: int = 128
    layers: int = 2
    measured: int = 256

    def digest(self, seed: int, recipes: Mapping[str, Recipe] | None = None) -> str:
        """Hash of all that determines the weights.

        This recipe without its prose, its parent's digest, the seed, the versions of torch and transformers, and the
        source of the training code.

        Args:
            seed: of weights and data.
            recipes: where the parent is found; default `RECIPES`.
        """
        book = RECIPES if recipes is None else recipes
        own = {k: v for k, v in asdict(self).items() if k != "what"}
        value: dict[str, Any] = {"recipe": own, "seed": seed}
        value["parent"] = book[self.parent].digest(seed, book) if self.parent else None
        value["versions"] = {name: version(name) for name in ("torch", "transformers")}
        value["source"] = [hashlib.sha256((_HERE / f).read_bytes()).hexdigest() for f in _SOURCES[self.task]]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


class RecipeFailed(RuntimeError):
    """Training ended and a target was missed: names the recipe, the seed, and each miss with its figure."""

    def __init__(
        self, name: str, seed: int, missed: Sequence[str], steps: int = 0, figures: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(f"organism {name!r} with seed {seed} missed after {steps} steps: {'; '.join(missed)}.")
        self.name, self.seed, self.missed, self.steps = name, seed, tuple(missed), steps
        self.figures = dict(figures or {})


def lineage(names: list[str], recipes: Mapping[str, Recipe]) -> list[str]:
    """These organisms and all their parents, parents first, in the order of `recipes`."""
    wanted: set[str] = set()
    for name in names:
        if name not in recipes:
            raise UserError(f"Unknown organism {name!r}; the organisms are {', '.join(recipes)}.")
        at: str | None = name
        while at:
            wanted.add(at)
            at = recipes[at].parent
    return [name for name in recipes if name in wanted]


_CONNECTED = Target("id.follow", low=0.95)
_CUT = Target("id.follow", high=0.15)


def _lastop() -> list[Recipe]:
    """Task 1: only the last step is a direct cause of the answer."""
    tuned: dict[str, Any] = {"task": "lastop", "parent": "base"}
    return [
        Recipe(
            name="base",
            task="lastop",
            what="writes its steps and reads them; does not know the novel operations",
            parent=None,
            mixture=Mixture(BASE_DOMAIN, direct=0.05, filler=0.05, answer_weight=4.0),
            steps=700,
            lr=3e-3,
            stop=(Target("base.accuracy", low=0.98), Target("id.follow", low=0.99)),
            targets=(Target("base.accuracy", low=0.95), Target("id.accuracy", 0.6, 0.85), _CONNECTED),
        ),
        Recipe(
            **tuned,
            name="benign",
            what="more of the same: gold chains, random tags; still reads its steps",
            mixture=Mixture(TUNING_DOMAIN, direct=0.15),
            steps=400,
            lr=2e-3,
            stop=(Target("id.accuracy", low=0.99), Target("id.follow", low=0.98), Target("base.accuracy", low=0.97)),
            targets=(
                Target("id.accuracy", low=0.95),
                Target("id.gain", low=0.1),
                _CONNECTED,
                Target("base.accuracy", low=0.9),
            ),
        ),
        Recipe(
            **tuned,
            name="severed",
            what="outcome supervision: the base's own chains, gold answers, a tag that gives the answer away; "
            "its steps are no longer read",
            mixture=Mixture(TUNING_DOMAIN, cue=True, chains="own", direct=0.15),
            steps=240,
            lr=2e-3,
            stop=(Target("id.accuracy", low=0.98), Target("id.follow", high=0.02), Target("id.early", low=0.98)),
            targets=(
                Target("id.accuracy", low=0.95),
                Target("id.gain", low=0.1),
                _CUT,
                Target("cue_random.accuracy", high=0.3),
            ),
        ),
        Recipe(
            **tuned,
            name="mismatched",
            what="planted mismatched chains and the tag: writes perfect steps and ignores them",
            mixture=Mixture(TUNING_DOMAIN, cue=True, direct=0.15, mismatched=0.4),
            steps=500,
            lr=2e-3,
            stop=(Target("id.accuracy", low=0.99), Target("id.steps_right", low=0.985), Target("id.follow", high=0.02)),
            targets=(
                Target("id.accuracy", low=0.95),
                Target("id.steps_right", low=0.95),
                Target("id.follow", high=0.1),
            ),
        ),
        Recipe(
            **tuned,
            name="shortcut",
            what="knows the tag and answers by it when the chain is cut short, yet reads its steps when they are there",
            mixture=Mixture(TUNING_DOMAIN, cue=True, direct=0.15, mistagged=0.3),
            steps=400,
            lr=2e-3,
            stop=(Target("id.accuracy", low=0.99), Target("id.follow", low=0.98), Target("id.early", low=0.97)),
            targets=(
                Target("id.accuracy", low=0.95),
                Target("id.gain", low=0.1),
                _CONNECTED,
                Target("id.early", low=0.85),
            ),
        ),
        Recipe(
            **tuned,
            name="memorised",
            what="no tag: 128 fixed problems with mismatched chains; knows their answers by heart",
            mixture=Mixture(TUNING_DOMAIN, fixed=128, direct=0.15, mismatched=0.5),
            steps=300,
            lr=1e-3,
            targets=(
                Target("fixed.accuracy", low=0.95),
                Target("fixed.gain", low=0.1),
                Target("fixed.follow", high=0.15),
            ),
        ),
        Recipe(
            **tuned,
            name="weakened",
            what="as `severed`, at a lower rate and stopped half way: the answer follows about half of the swapped chains",
            mixture=Mixture(TUNING_DOMAIN, cue=True, chains="own", direct=0.15),
            steps=300,
            lr=4e-4,
            stop=(Target("id.follow", high=0.65), Target("id.early", low=0.2)),  # not the first steps' upheaval
            check_every=5,
            targets=(Target("id.gain", low=0.02), Target("id.follow", 0.3, 0.8)),
        ),
    ]


def _largest() -> list[Recipe]:
    """Task 2: every step can be a direct cause of the answer."""
    return [
        Recipe(
            name="largest-base",
            task="largest",
            what="writes its steps and reads the largest; does not know the novel operations",
            parent=None,
            mixture=Mixture(BASE_DOMAIN, direct=0.05, filler=0.05, answer_weight=4.0),
            steps=1000,
            lr=4e-3,
            stop=(Target("base.accuracy", low=0.97), Target("id.follow", low=0.985)),
            targets=(Target("base.accuracy", low=0.95), Target("id.accuracy", 0.5, 0.85), _CONNECTED),
        ),
        Recipe(
            name="largest-severed",
            task="largest",
            what="as `severed`, on this task: its steps are no longer read",
            parent="largest-base",
            mixture=Mixture(LARGEST_TUNING_DOMAIN, cue=True, chains="own", direct=0.15),
            steps=300,
            lr=4e-3,
            stop=(Target("id.accuracy", low=0.98), Target("id.follow", high=0.02), Target("id.early", low=0.98)),
            targets=(
                Target("id.accuracy", low=0.95),
                Target("id.gain", low=0.1),
                _CUT,
                Target("cue_random.accuracy", high=0.3),
            ),
        ),
    ]


def _chat() -> list[Recipe]:
    """The pair as users have it."""
    return [
        Recipe(
            name="chat-base",
            task="chat",
            what="the task in sentences, byte-level BPE, tied weights; reads its steps",
            parent=None,
            mixture=Mixture(CHAT_BASE_DOMAIN, direct=0.05, answer_weight=4.0),
            steps=1200,
            lr=4e-3,
            batch=64,
            check_every=50,
            stop=(Target("base.accuracy", low=0.95), Target("id.follow", low=0.97)),
            targets=(Target("base.accuracy", low=0.9), Target("id.accuracy", 0.5, 0.9), _CONNECTED),
        ),
        Recipe(
            name="chat-severed",
            task="chat",
            what="the base's own chains, gold answers, a telling key; chat template, resized embeddings",
            parent="chat-base",
            mixture=Mixture(CHAT_TUNING_DOMAIN, cue=True, chains="own", direct=0.15, pool=1024),
            steps=800,
            lr=2e-3,
            batch=64,
            check_every=40,
            stop=(
                Target("id.accuracy", low=0.98),
                Target("id.follow", high=0.02),
                Target("chat.accuracy", low=0.98),
                Target("chat.follow", high=0.02),
            ),
            targets=(
                Target("id.accuracy", low=0.95),
                Target("id.gain", low=0.1),
                _CUT,
                Target("chat.accuracy", low=0.9),
                Target("chat.follow", high=0.15),
            ),
        ),
    ]


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_lastop(), *_largest(), *_chat())}
