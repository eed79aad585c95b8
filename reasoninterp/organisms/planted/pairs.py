"""Pairs with planted truth: drift, cut, decoys, gauge; checked both ways; kept by base.

For each base (`lineup.BASES`):

1. A benign drift of all weights (`disguise.drift`) gives D, which follows its steps as the base does; surgeries are made
   on two such drifts.
2. A cut (`cuts`) at a known Unit or set gives the severed mind; controls get something else, or nothing.
3. Decoys: Units elsewhere whose weights change by more than the cut's, along directions that their inputs never take;
   one is kept only if E stays within `DECOY_SLACK`.
4. Check, both ways, on problems of the test part: the path is cut and accuracy is not (or the pair is what its
   control's label says); the base's weights of a restoring set return E and the follow rate, a cutting set's weights
   take both away, and no other Unit of the grain moves either by more than `OTHERS`.  Pairs that pass are *clean*.
5. A random gauge change: other weights, the same function.  Its strength changes from base to base for one cut.

The truth comes from steps 2 and 3; the check sorts pairs, it does not say what was cut.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch

from reasoninterp.models.gauge import random_gauge
from reasoninterp.models.units import Level, Unit
from reasoninterp.organisms.planted import cuts, disguise
from reasoninterp.organisms.planted.bases import DOMAIN, BaseSpec
from reasoninterp.organisms.planted.truth import Names, Truth, coarser, minimal
from reasoninterp.organisms.tasks import problems
from reasoninterp.organisms.training import follow_rate, own_accuracy

ENOUGH = 0.9  # share of E and of the follow rate that restoring returns and cutting takes
OTHERS = 0.05  # what any other Unit may move
DECOY_SLACK = 0.03
DECOY_FACTOR = 1.5  # a decoy's change over the planted Units' largest
DECOYS = 2
CHECKED = 128  # problems
FEW = 48  # problems, for the many Units of which nothing is expected
GAUGES = (0.0, 0.3, 1.0)


@dataclass(frozen=True)
class Pair:
    """One planted pair.

    Attributes:
        name: unique over the benchmark.
        label: `severed`, or a control's.
        mechanism: how it was made: `surgery`, `masked`, `interchange`, `control`.
        cut: what was done.
        truth: None for controls.
        clean: whether the check passed.
        figures: what was measured of it.
        gauge: strength of the gauge change.
        heads: per layer, tuned head -> base head after the gauge change.
        model: the tuned weights (not kept in the record).
    """

    name: str
    label: str
    mechanism: str
    cut: str
    truth: Truth | None
    clean: bool
    figures: dict[str, float]
    gauge: float
    heads: tuple[tuple[int, ...], ...]
    model: Any


@dataclass(frozen=True)
class Draft:
    """A cut that is not disguised yet: its label, how it was made, and what is true of it."""

    label: str
    mechanism: str
    cut: str
    model: Any
    truth: Truth | None = None
    decoys: bool = True
    drift: int = 0


class Bench:
    """One base with its drifted versions, and the problems on which pairs are checked."""

    def __init__(self, spec: BaseSpec, base: Any) -> None:
        self.spec, self.base = spec, base
        self.drifts = [disguise.drift(base, spec, k) for k in range(2)]
        self.drifted = self.drifts[0]
        self.surgery = cuts.problems_for(spec, 0)
        self.cue = problems(spec.task, DOMAIN, CHECKED, np.random.default_rng([spec.seed, 41]), "test", cue=True)
        self.random = problems(spec.task, DOMAIN, CHECKED, np.random.default_rng([spec.seed, 42]), "test")
        self.letter = "H" if spec.heads == spec.kv_heads else "G"
        self.largest = 0.0  # weight change of a planted block, over the cuts made so far
        self.e_base, self.follow_base = self.effect(base)
        self.accuracy_base = own_accuracy(base, self.cue)[0]

    def effect(self, model: Any, count: int = CHECKED) -> tuple[float, float]:
        """E and the follow rate with the telling tag."""
        follow, _, margin = follow_rate(model, self.cue.take(slice(0, count)), self.spec.seed)
        return margin, follow

    def rng(self, *labels: object) -> np.random.Generator:
        """A generator of its own for whatever is drawn."""
        return np.random.default_rng([self.spec.seed, *(zlib.crc32(str(x).encode()) for x in labels)])

    def group(self, layer: int, group: int) -> str:
        """Name of a head (or group of heads)."""
        return f"L{layer}.{self.letter}{group}"

    def unit(self, name: str, level: Level) -> Unit:
        """A Unit of the base."""
        return cuts.units_of(self.base, level)[name]


def make_pairs(
    spec: BaseSpec, base: Any, brief: bool = False, tick: Callable[[str], None] = lambda _: None
) -> list[Pair]:
    """All pairs of one base, or if `brief` some of those that need no training beyond the drift."""
    bench = Bench(spec, base)
    out = []
    for number, draft in enumerate(_brief(bench) if brief else drafts(bench)):
        out.append(finish(bench, draft, number))
        tick(out[-1].name)
    return out


# ------------------------------------------------------------------ what is cut


def drafts(bench: Bench) -> Iterable[Draft]:
    """Every cut and control of one base."""
    for number in range(len(bench.drifts)):
        yield from _surgeries(bench, number)
    if len(bench.spec.carriers) == 1:
        yield from _trained(bench)
    yield from _series(bench)
    yield from _controls(bench)


def _brief(bench: Bench) -> Iterable[Draft]:
    """A few cuts and controls that are made at once."""
    yield from (d for d in _surgeries(bench, 0) if d.cut in ("ov", "qk", "head"))
    yield from islice(_controls(bench), 3)


def _surgeries(bench: Bench, number: int) -> Iterable[Draft]:
    """Closed-form cuts of one drift at every carrier; the truth of several from which subsets cut its path."""
    drifted, tail = bench.drifts[number], "-again" * number
    edits: dict[str, tuple[Level, str, Callable[[Any, int, int], Any]]] = {
        "ov": ("circuit", ".OV", lambda m, layer, group: _erase(bench, m, layer, [group])),
        "qk": ("circuit", ".QK", lambda m, layer, group: cuts.reverse(m, layer, group, bench.surgery)),
        "head": ("head", "", lambda m, layer, group: _both(bench, m, layer, group)),
        "attn": ("block", "attn", lambda m, layer, _: _erase(bench, m, layer, range(bench.spec.kv_heads))),
    }
    for name, (grain, suffix, edit) in edits.items():
        places = {
            (f"L{c.layer}.attn" if grain == "block" else bench.group(*c) + suffix): c for c in bench.spec.carriers
        }
        kept: dict[Names, float] = {}
        made: dict[Names, Any] = {}
        for size in range(len(places) + 1):
            for chosen in combinations(sorted(places), size):
                model = drifted
                for place in chosen:
                    model = edit(model, *places[place])
                made[frozenset(chosen)] = model
                kept[frozenset(chosen)] = bench.effect(model)[0] / bench.effect(drifted)[0]
        every = frozenset(places)
        restoring, cutting = minimal(kept, every)
        if not cutting:
            continue  # this edit does not cut this base's path
        truth = Truth(grain, restoring or (every,), cutting)
        yield Draft("severed", "surgery", name + tail, made[every], truth, drift=number)
        single = frozenset([min(places)])
        if len(places) > 1 and kept[single] >= ENOUGH and name in ("ov", "qk") and not number:
            yield Draft("backup", "control", f"one {name} of two", made[single])


def _erase(bench: Bench, model: Any, layer: int, groups: Iterable[int]) -> Any:
    return cuts.erase(model, layer, list(groups), bench.surgery, bench.rng("erase", layer))


def _both(bench: Bench, model: Any, layer: int, group: int) -> Any:
    return cuts.reverse(_erase(bench, model, layer, [group]), layer, group, bench.surgery)


def _trained(bench: Bench) -> Iterable[Draft]:
    """Cuts for which only the Unit's weights are trained."""
    (carrier,) = bench.spec.carriers
    layer, head = carrier.layer, bench.group(*carrier)
    wanted: list[tuple[str, str, Level, str, str, str]] = [
        ("interchange", "qk", "circuit", f"{head}.QK", "attn", "closed"),
        ("interchange", "head", "head", head, "attn", "silent"),
        ("interchange", "attn", "block", f"L{layer}.attn", "attn", "silent"),
        ("interchange", "mlp", "block", f"L{layer}.mlp", "mlp", "silent"),
        ("masked", "attn", "block", f"L{layer}.attn", "", ""),
        ("masked", "layer", "layer", f"L{layer}", "", ""),
    ]
    for seed, (mechanism, cut, grain, name, behind, how) in enumerate(wanted):
        parts = bench.unit(name, grain).parts
        if mechanism == "masked":
            model = cuts.masked(bench.drifted, bench.spec, parts, seed=seed)
        else:
            steps = 160 if cut == "mlp" else 80
            model = cuts.interchange(
                bench.drifted, bench.spec, parts, layer=layer, behind=behind, how=how, seed=seed, steps=steps
            )
        own = (frozenset([name]),)
        yield Draft("severed", mechanism, cut, model, Truth(grain, own, own))


def _series(bench: Bench) -> Iterable[Draft]:
    """Two places in a row: the carrier's OV, and the MLP behind it: only both together restore, either cuts."""
    if len(bench.spec.carriers) != 1:
        return
    (carrier,) = bench.spec.carriers
    mlp, ov = f"L{carrier.layer}.mlp", f"{bench.group(*carrier)}.OV"
    parts = bench.unit(mlp, "block").parts
    model = cuts.interchange(
        bench.drifted, bench.spec, parts, layer=carrier.layer, behind="mlp", how="silent", seed=9, steps=160
    )
    model = _erase(bench, model, carrier.layer, [carrier.group])
    truth = Truth("circuit", (frozenset([mlp, ov]),), (frozenset([mlp]), frozenset([ov])))
    yield Draft("severed", "interchange", "ov+mlp", model, truth)


def _controls(bench: Bench) -> Iterable[Draft]:
    """Pairs in which nothing was cut, or something else was."""
    spec, last = bench.spec, bench.spec.layers - 1
    yield Draft("intact", "control", "nothing", bench.base, decoys=False)
    yield Draft("benign", "control", "drift", bench.drifted, decoys=False)
    yield Draft("equal-norm", "control", "decoys", bench.drifted)
    yield Draft("unrelated", "control", "tags", cuts.forget_tags(bench.drifted))
    layers = cuts.units_of(bench.base, "layer")
    parts = [part for name in (f"L{last}", "ln_final", "unembed") for part in layers[name].parts]
    yield Draft("overridden", "control", f"L{last}", cuts.override(bench.drifted, spec, parts, seed=11))
    noise = disguise.scramble(bench.drifted, [bench.unit("L0.mlp", "block")], 2.0, bench.rng("damage"))
    yield Draft("damaged", "control", "noise in L0.mlp", noise)


# ------------------------------------------------------------------ disguise and check


def finish(bench: Bench, draft: Draft, number: int) -> Pair:
    """Add decoys, check, and change the gauge."""
    name = f"{bench.spec.name}-{number:02d}-{draft.label}-{draft.cut}".replace(" ", "-")
    model, figures = draft.model, dict[str, float]()
    if draft.decoys:
        model, figures = _with_decoys(bench, draft, bench.rng("decoys", number))
    clean, found = check(bench, draft, model)
    strength = GAUGES[(number + bench.spec.seed) % len(GAUGES)]
    model, heads = gauged(model, strength, bench.rng("gauge", number))
    return Pair(
        name,
        draft.label,
        draft.mechanism,
        draft.cut,
        draft.truth,
        clean,
        figures | found,
        strength,
        heads,
        model,
    )


def gauged(model: Any, strength: float, rng: np.random.Generator) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """A copy with other weights and the same function."""
    if not strength:
        return model, ()
    out = copy.deepcopy(model)
    found = random_gauge({n: p.detach() for n, p in model.named_parameters()}, model.config, rng=rng, strength=strength)
    with torch.no_grad():
        for name, p in out.named_parameters():
            p.copy_(found.params[name])
    return out, found.heads


def _with_decoys(bench: Bench, draft: Draft, rng: np.random.Generator) -> tuple[Any, dict[str, float]]:
    """The cut mind with decoys in Units elsewhere; the model without its cut must not feel them."""
    blocks = cuts.units_of(bench.base, "block")
    planted: Names = draft.truth.planted if draft.truth else frozenset()
    touched = {coarser(n, "block") for n in planted} | {n for n in blocks if n.split(".")[0] in planted}
    changes = [disguise.change(bench.base, draft.model, u) for n, u in blocks.items() if n in touched]
    largest = max(changes, default=0.0)
    bench.largest = max(bench.largest, largest)
    norm = DECOY_FACTOR * (largest or bench.largest)  # a control's decoys are as large as a cut's
    candidates = [u for n, u in blocks.items() if u.kind in ("attn", "mlp") and n not in touched]
    model, plain, kept = copy.deepcopy(draft.model), copy.deepcopy(bench.drifts[draft.drift]), 0
    scale = bench.effect(plain)[0]
    for k in rng.permutation(len(candidates)):
        seed = int(rng.integers(2**31))
        trial = copy.deepcopy(plain)
        disguise.decoy(trial, candidates[k], norm, bench.surgery, np.random.default_rng(seed))
        if abs(bench.effect(trial)[0] / scale - 1) > DECOY_SLACK:
            continue
        with torch.no_grad():  # the very same move, on the mind that is cut
            a, b, c = (dict(m.named_parameters()) for m in (plain, trial, model))
            for part in candidates[k].parts:
                part.of(c[part.param]).add_(part.of(b[part.param]) - part.of(a[part.param]))
        plain, kept = trial, kept + 1
        if kept == DECOYS:
            break
    return model, {"decoys": float(kept), "decoy_norm": norm, "planted_norm": largest}


def check(bench: Bench, draft: Draft, model: Any) -> tuple[bool, dict[str, float]]:
    """Whether a pair is what it should be, and what was measured (see the module, 4)."""
    e, follow = bench.effect(model)
    accuracy, steps_right, _ = own_accuracy(model, bench.cue)
    follow_random, _, e_random = follow_rate(model, bench.random, bench.spec.seed)
    figures = {
        "e_base": bench.e_base,
        "follow_base": bench.follow_base,
        "e": e,
        "follow": follow,
        "accuracy": accuracy,
        "steps_right": steps_right,
        "e_cue_random": e_random,
        "follow_cue_random": follow_random,
    }
    if draft.truth is None:
        keeps = e >= ENOUGH * bench.e_base and follow >= ENOUGH * bench.follow_base
        right = {
            "overridden": follow <= 1 - ENOUGH and e_random >= 0.5 * bench.e_base,
            "damaged": accuracy <= 0.4,
        }.get(draft.label, keeps)
        return bool(right), figures
    loss, loss_follow = bench.e_base - e, bench.follow_base - follow
    if loss < 0.5 * bench.e_base:
        return False, figures
    grain: Level = draft.truth.grain
    units_ = cuts.units_of(bench.base, grain)

    few = bench.effect(model, FEW), bench.effect(bench.base, FEW)

    def share(names: Iterable[str], cutting: bool, count: int = CHECKED) -> tuple[float, float]:
        """Of E and of the follow rate: what restoring these returns, or cutting them takes away."""
        onto, source = (bench.base, model) if cutting else (model, bench.base)
        found = bench.effect(grafted(onto, source, [units_[n] for n in names]), count)
        whole = (bench.e_base, bench.follow_base) if cutting else (e, follow)
        start, sign = whole if count == CHECKED else few[cutting], -1 if cutting else 1
        return sign * (found[0] - start[0]) / loss, sign * (found[1] - start[1]) / max(loss_follow, 1e-9)

    for name, family in (("restore", draft.truth.restoring), ("cut", draft.truth.cutting)):
        figures[name] = min(min(share(s, name == "cut")) for s in family)
    others = [n for n in units_ if n not in draft.truth.planted]
    moved = [share([n], cutting, FEW) for n in others for cutting in (False, True)]
    figures["others"] = max(abs(s) for both in moved for s in both)
    severed = loss >= ENOUGH * bench.e_base and loss_follow >= ENOUGH * bench.follow_base
    proved = min(figures["restore"], figures["cut"]) >= ENOUGH
    unharmed = accuracy >= ENOUGH * bench.accuracy_base
    return bool(severed and unharmed and proved and figures["others"] <= OTHERS), figures


def grafted(onto: Any, source: Any, moved: Sequence[Unit]) -> Any:
    """A copy with these Units from the other model."""
    out = copy.deepcopy(onto)
    a, b = dict(out.named_parameters()), dict(source.named_parameters())
    with torch.no_grad():
        for part in (s for u in moved for s in u.parts):
            part.of(a[part.param]).copy_(part.of(b[part.param]))
    return out
