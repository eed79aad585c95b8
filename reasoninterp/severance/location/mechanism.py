"""How a located set of Units lost the path: it looks away, it carries nothing, or a shortcut wins.

1. The located Units are taken apart at the finest level and their pieces gathered into *parts*: QK circuits (where a
   head looks), OV circuits (what it carries, the output bias included), MLPs, norms, embedding, unembedding.
2. Each part is grafted by itself, both ways (`severance.grafts.moves`): the share of the loss that it alone returns, and that
   it alone takes away; beside it stands the part's share of the set's entries in the ledger.
3. A part's *weight* is the mean of its two shares, each held within 0 and 1.  The part that leads names the mechanism
   if its weight is at least `LEAD` and at least `FACTOR` times the next one's: *looks away* (QK), *carries nothing*
   (OV), *mlp*, *norms*, *embedding*, *unembedding*.  Else *mixed*: several parts, or none without the others.
4. *Shortcut wins* is for an overridden path: it is there, and a component's direct contribution moved towards the rival's
   answer (`severance.location.direct_logits`).
5. As evidence, the attention from the answer's position to the step that the base's head looks at most, in the located
   layers' head that looks at steps most, in both minds.  It decides nothing: attention may stay though nothing is
   carried, and go because nothing worth reading is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from reasoninterp.models.body import Body, site
from reasoninterp.models.context import Context
from reasoninterp.models.units import Unit, unit_named, units
from reasoninterp.severance.grafts.moves import WAYS, Moves
from reasoninterp.severance.ledger.integrate import Integral
from reasoninterp.severance.ledger.products import LedgerUnit
from reasoninterp.severance.location.direct_logits import leading_rival
from reasoninterp.stats import Estimate, difference, mean
from reasoninterp.traces.contrast import Contrast

LEAD = 0.5  # a part that moves less than half of the loss is not the mechanism by itself
FACTOR = 2.0  # the leader moves at least twice what the next part moves
WORDS = {
    "QK": "looks away",
    "OV": "carries nothing",
    "mlp": "mlp",
    "norms": "norms",
    "embedding": "embedding",
    "unembed": "unembedding",
}
PARTS = ["part", "units", "ledger", "ledger_share", "restore", "cut", "weight"]
NOT_READ = Estimate(float("nan"), float("nan"), float("nan"), 0, "")


@dataclass(frozen=True)
class Mechanism:
    """The word, its sentence, what would have reversed it, and what it rests on.

    `parts`: one row a part (`part, units, ledger, ledger_share, restore, cut, weight`).  `attention`: mass from the
    answer's position to the step in the base, in the tuned mind, and their difference, of `attention_head`.
    """

    word: str
    sentence: str
    would_reverse: str
    parts: pd.DataFrame
    attention_head: str
    attention: tuple[Estimate, Estimate, Estimate]
    evaluations: int

    @classmethod
    def only(cls, word: str, sentence: str, would_reverse: str) -> Mechanism:
        """A mechanism that no part of a located set was read for."""
        return cls(word, sentence, would_reverse, pd.DataFrame(columns=PARTS), "", (NOT_READ, NOT_READ, NOT_READ), 0)


def mechanism(
    context: Context,
    contrasts: Sequence[Contrast],
    located: Sequence[str],
    *,
    integral: Integral | None = None,
    of: Literal["effect", "follow"] = "effect",
    from_mind: str = "base",
    to_mind: str = "tuned",
) -> Mechanism:
    """How the located Units lost the path.

    Args:
        context: the minds.
        contrasts: what is read; at least one.
        located: names of Units, of any level, at least one.
        integral: the ledger; None where there is none.
        of: what shares are of.
        from_mind: the mind with the path.
        to_mind: the mind in which it is lost (aligned, if the located set is).

    Raises:
        UserError: a name that no Unit has.
    """
    with context.open(from_mind) as body:
        finest = units(body, "fine")
        chosen = [unit_named(body, name) for name in located]
    moves = Moves(context, contrasts, finest, from_mind=from_mind, to_mind=to_mind)
    parts = _parts(finest, chosen, moves.moved)
    table = _table(parts, moves, of, integral, {u.name for u in chosen})
    head, attention = attention_to_steps(context, contrasts, chosen, from_mind=from_mind, to_mind=to_mind)
    word, sentence, reverse = words(table)
    if head:
        sentence += (
            f"; attention of {head} from the answer to its step went from {attention[0].value:.2f} to "
            f"{attention[1].value:.2f}"
        )
    return Mechanism(word, sentence, reverse, table, head, attention, moves.evaluations)


def words(parts: pd.DataFrame) -> tuple[str, str, str]:
    """Word, sentence and what would have reversed it, from a table of parts (step 3)."""
    if not len(parts):
        return "not known", "nothing was located, so that no mechanism can be told", "a located set"
    order = parts.sort_values("weight", ascending=False, kind="stable")
    first = order.iloc[0]
    second = float(order.iloc[1]["weight"]) if len(order) > 1 else 0.0
    numbers = "; ".join(
        f"{p['part']} alone returns {_percent(p['restore'])} and takes away {_percent(p['cut'])} of the loss"
        + (f" (ledger {_percent(p['ledger_share'])})" if np.isfinite(p["ledger_share"]) else "")
        for p in order.to_dict("records")
    )
    if not np.isfinite(first["weight"]):
        return "not known", f"{numbers}: the loss is too small to take shares of", "a larger loss"
    if first["weight"] >= LEAD and first["weight"] >= FACTOR * second:
        reverse = (
            f"another part that moves half of what {first['part']} moves, or {first['part']} moving under {LEAD:.0%}"
        )
        return WORDS[first["part"]], numbers, reverse
    return "mixed", numbers, f"one part that moves {LEAD:.0%} by itself and {FACTOR:g} times what any other moves"


def shortcut_wins(found: Mechanism | None, direct: pd.DataFrame) -> tuple[str, str, str]:
    """Word, sentence and what would have reversed it, for an overridden path (step 4).

    Args:
        found: the mechanism of the Units that return the follow rate, if any were located.
        direct: a table of `severance.location.direct_logits`.
    """
    lead = leading_rival(direct)
    rest = f"; of the located Units, {found.sentence}" if found is not None else ""
    if lead is None:
        said = f"the path is there, and no component's direct contribution moved towards the rival's answer{rest}"
        return "not known", said, "a component that argues more for the rival's answer than in the base"
    name, change = lead
    said = (
        f"the path is there, and {name} argues {abs(change.value):.1f} nats [{abs(change.ci_high):.1f}, {abs(change.ci_low):.1f}] "
        f"more for the rival's answer than in the base{rest}"
    )
    return "shortcut wins", said, "no component that argues more for the rival's answer than in the base"


def part_of(unit: Unit | LedgerUnit) -> str:
    """The part that a finest Unit belongs to."""
    if unit.circuit is not None:
        return unit.circuit
    return "OV" if unit.kind == "attn" else unit.kind


def within(unit: Unit | LedgerUnit, chosen: set[str]) -> bool:
    """Whether a finest Unit is one of the named Units, or a piece of one."""
    name = unit.name
    if name in chosen or (unit.layer is not None and f"L{unit.layer}" in chosen):
        return True
    if name.rpartition(".")[0] in chosen:  # a circuit of a head, a block of an MLP's neurons
        return True
    block = {"head": "attn", "attn": "attn", "norms": "norms"}.get(unit.kind)
    return block is not None and f"L{unit.layer}.{block}" in chosen


def _parts(finest: Sequence[Unit], chosen: Sequence[Unit], moved: Sequence[str]) -> dict[str, list[str]]:
    """Names of the finest Units of the located set that the two minds differ in, by part, in the order of `WORDS`."""
    names, differ = {u.name for u in chosen}, set(moved)
    out: dict[str, list[str]] = {part: [] for part in WORDS}
    for unit in finest:
        if unit.name in differ and within(unit, names):
            out[part_of(unit)].append(unit.name)
    return {part: held for part, held in out.items() if held}


def _table(
    parts: dict[str, list[str]],
    moves: Moves,
    of: Literal["effect", "follow"],
    integral: Integral | None,
    chosen: set[str],
) -> pd.DataFrame:
    """One row a part: its entry in the ledger, what it returns and takes away by itself, and its weight."""
    share = moves.share if of == "effect" else moves.share_follow
    entry: dict[str, float] = {}
    if integral is not None:
        for unit, value in zip(integral.units, integral.values.mean(0), strict=True):
            if within(unit, chosen):
                entry[part_of(unit)] = entry.get(part_of(unit), 0.0) + float(value)
    total = sum(entry.values())
    rows = []
    for part, names in parts.items():
        restore, cut = (share(way, names) for way in WAYS)
        ledger = entry.get(part, 0.0) if entry else float("nan")
        rows.append(
            {
                "part": part,
                "units": "+".join(names),
                "ledger": ledger,
                # Shares of a sum of losses; where the set's entries cancel, they are shares of nothing.
                "ledger_share": ledger / total if total < 0 else float("nan"),
                "restore": restore,
                "cut": cut,
                "weight": float(np.mean(np.clip([restore, cut], 0, 1))),
            }
        )
    return pd.DataFrame(rows, columns=PARTS)


# ------------------------------------------------------------------------------------------------- attention to steps


def attention_to_steps(
    context: Context,
    contrasts: Sequence[Contrast],
    located: Sequence[Unit],
    *,
    from_mind: str = "base",
    to_mind: str = "tuned",
) -> tuple[str, tuple[Estimate, Estimate, Estimate]]:
    """Attention from the answer's position to one step, in base, in tuned, and tuned − base, on the clean chains.

    The head is, of the located ones (of all, where no attention is located), the one in which the base looks at a step
    most; the step is, trace by trace, the one that the base's head looks at most.  Name "" and empty estimates where no
    chain has a step.
    """
    with context.open(from_mind) as body:
        heads = _heads(body, located)
        base = _masses(body, context, contrasts, heads)
    with context.open(to_mind) as body:
        tuned = _masses(body, context, contrasts, heads)
    if not base.size:
        return "", (NOT_READ, NOT_READ, NOT_READ)
    best = base.max(-1).mean(0).argmax()
    at = base[:, best].argmax(-1)[:, None]
    before, after = (np.take_along_axis(x[:, best], at, 1)[:, 0] for x in (base, tuned))
    seed = context.seed
    name = f"L{heads[best][0]}.H{heads[best][1]}"
    return name, (mean(before, seed=seed), mean(after, seed=seed), difference(after, before, seed=seed))


def _heads(body: Body, located: Sequence[Unit]) -> list[tuple[int, int]]:
    """(layer, query head) of the located Units that attend; of all heads where none does."""
    group = body.n_heads // body.n_kv_heads
    out: list[tuple[int, int]] = []
    for unit in located:
        if unit.layer is None or unit.kind not in ("layer", "attn", "head"):
            continue
        held = range(body.n_heads) if unit.head is None else range(unit.head * group, (unit.head + 1) * group)
        out += [(unit.layer, head) for head in held]
    every = [(layer, head) for layer in range(body.n_layers) for head in range(body.n_heads)]
    return list(dict.fromkeys(out)) or every


def _masses(
    body: Body, context: Context, contrasts: Sequence[Contrast], heads: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """`[contrast, head, step]`: attention from the last token before the answer to each step; 0 where there is none."""
    traces = [context.encode(c.clean) for c in contrasts]
    most = max((len(t.steps) for t in traces), default=0)
    out = np.zeros((len(traces), len(heads), most))
    layers = sorted({layer for layer, _ in heads})
    for start in range(0, len(traces), context.rows):
        batch = traces[start : start + context.rows]
        width = max(len(t.prompt_ids) for t in batch)
        ids = torch.tensor([[*t.prompt_ids, *[0] * (width - len(t.prompt_ids))] for t in batch])
        patterns = body.cache(ids, [site("pattern", layer) for layer in layers])
        for k, trace in enumerate(batch):
            for h, (layer, head) in enumerate(heads):
                row: Float[torch.Tensor, " key"] = patterns[site("pattern", layer)][k, head, len(trace.prompt_ids) - 1]
                out[start + k, h, : len(trace.steps)] = [float(row[s.start : s.stop].sum()) for s in trace.steps]
    return out


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %".replace("-", "−") if np.isfinite(value) else "no readable share"
