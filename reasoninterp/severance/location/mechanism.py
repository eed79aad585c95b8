"""How a located set of Units lost the path: it looks away, it carries nothing, or a shortcut wins.

1. The located Units are taken apart at the finest level and their pieces gathered into *parts*: QK circuits (where a
   head looks), OV circuits (what it carries, the output bias included), MLPs, norms, embedding, unembedding.
2. Each part is grafted by itself, both ways (`severance.grafts.moves`): the share of the loss that it alone returns, and that
   it alone takes away; beside it stands the part's share of the set's entries in the ledger.
3. A part's *weight* is the mean of its two shares, each held within 0 and 1.  The part that leads names the mechanism
   if its weight is at least `LEAD` and at least `FACTOR` times the next one's: *looks away* (QK), *carries nothing*
   (OV), *mlp*, *norms*, *embedding*, *unembedding*.  Else *mixed*: several parts, or none without the others.  The
   weights are drawn over traces with the shares (`Moves.draws`): where the rule holds in some of the draws and not in
   the others, so that neither makes up `CONFIDENCE` and half of the rest, the word is *undecided (mixed)*.
4. *Shortcut wins* is for an overridden path: it is there, and a component's direct contribution moved towards the rival's
   answer, by itself, beyond chance and by enough (`severance.location.direct_logits`).
5. As evidence, the attention from the answer's position to the step that the base's head looks at most, in the located
   layers' head that looks at steps most, in both minds.  It decides nothing: attention may stay though nothing is
   carried, and go because nothing worth reading is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from reasoninterp.severance.location.direct_logits import LEAST_SHARE, leading_rival
from reasoninterp.severance.location.ledger_entries import as_moved
from reasoninterp.severance.verdict import percent, share
from reasoninterp.stats import CONFIDENCE, Estimate, difference, mean
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
UNDECIDED = "undecided (mixed)"
MEASURED = [f"{name}{end}" for name in ("restore", "cut", "weight") for end in ("", "_ci_low", "_ci_high")]
PARTS = ["part", "units", "ledger", "ledger_share", *MEASURED, "leads", "n"]
NOT_READ = Estimate(float("nan"), float("nan"), float("nan"), 0, "")


@dataclass(frozen=True)
class Mechanism:
    """The word, its sentence, what would have reversed it, and what it rests on.

    `parts`: one row a part (`PARTS`; `leads` is the share of draws in which it names the mechanism).  `attention`: mass from the
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
    table = _table(parts, moves, of, integral)
    head, attention = attention_to_steps(context, contrasts, chosen, from_mind=from_mind, to_mind=to_mind)
    word, sentence, reverse = words(table)
    if head:
        sentence += (
            f"; attention of {head} from the answer to its step went from {_between(attention[0])} to "
            f"{_between(attention[1])}"
        )
    return Mechanism(word, sentence, reverse, table, head, attention, moves.evaluations)


def words(parts: pd.DataFrame) -> tuple[str, str, str]:
    """Word, sentence and what would have reversed it, from a table of parts (step 3)."""
    if not len(parts):
        return "not known", "nothing was located, so that no mechanism can be told", "a located set"
    order = parts.sort_values("weight", ascending=False, kind="stable")
    first = order.iloc[0]
    numbers = "; ".join(
        f"{p['part']} alone returns {_shown(p, 'restore')} and takes away {_shown(p, 'cut')} of the loss"
        + (f" (ledger {_percent(p['ledger_share'])})" if np.isfinite(p["ledger_share"]) else "")
        for p in order.to_dict("records")
    )
    if not np.isfinite(first["weight"]):
        return "not known", f"{numbers}: the loss is too small to take shares of", "a larger loss"
    rule = f"one part that moves at least {percent(LEAD)} by itself and {FACTOR:g} times what any other moves"
    weight = f"by the rule ({rule}), with a mean of both of {_shown(first, 'weight')}, {first['part']}"
    tail = (1 - CONFIDENCE) / 2
    if first["leads"] >= 1 - tail:
        reverse = f"another part that moves half of what {first['part']} moves, or {first['part']} moving under {percent(LEAD)}"
        return WORDS[first["part"]], f"{numbers}; {weight} leads", reverse
    if first["leads"] <= tail:
        return "mixed", f"{numbers}; {weight} does not lead alone", rule
    said = f"{numbers}; {weight} leads in {percent(first['leads'])} of the draws over traces"
    return UNDECIDED, said, f"more traces, on which {first['part']} leads or does not"


def shortcut_wins(found: Mechanism | None, direct: pd.DataFrame) -> tuple[str, str, str]:
    """Word, sentence and what would have reversed it, for an overridden path (step 4).

    Args:
        found: the mechanism of the Units that return the follow rate, if any were located.
        direct: a table of `severance.location.direct_logits`.
    """
    lead = leading_rival(direct)
    rest = f"; of the located Units, {found.sentence}" if found is not None else ""
    if lead is None:
        said = (
            "the path is there, and no component is shown to argue for the rival's answer and to have moved by "
            f"{percent(LEAST_SHARE)} of the lost margin{rest}"
        )
        return "not known", said, "such a component"
    name, change = lead
    said = (
        f"the path is there, and {name} argues {abs(change.value):.1f} nats [{abs(change.ci_high):.1f}, {abs(change.ci_low):.1f}] "
        f"more for the rival's answer than in the base{rest}"
    )
    reverse = f"a contribution that does not argue for the rival, or under {percent(LEAST_SHARE)} of the lost margin"
    return "shortcut wins", said, reverse


def part_of(unit: Unit) -> str:
    """The part that a finest Unit belongs to."""
    if unit.circuit is not None:
        return unit.circuit
    return "OV" if unit.kind == "attn" else unit.kind


def within(unit: Unit, chosen: set[str]) -> bool:
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
    parts: dict[str, list[str]], moves: Moves, of: Literal["effect", "follow"], integral: Integral | None
) -> pd.DataFrame:
    """One row a part: its entry in the ledger, what it returns and takes away by itself, its weight, and if it leads."""
    if not parts:
        return pd.DataFrame(columns=PARTS)
    fine = as_moved(integral.at("fine"), moves.names) if integral is not None else {}
    entry = {p: float(sum(fine[n].mean() for n in names)) if fine else float("nan") for p, names in parts.items()}
    total = sum(entry.values())
    table = pd.DataFrame({"part": list(parts), "units": ["+".join(names) for names in parts.values()]})
    table["ledger"] = list(entry.values())
    # Shares of a sum of losses; where the set's entries cancel, they are shares of nothing.
    table["ledger_share"] = table["ledger"] / total if total < 0 else float("nan")
    sets = list(parts.values())
    for way in WAYS:
        found = pd.DataFrame(moves.estimates(way, sets, of=of))
        for column, end in (("value", ""), ("ci_low", "_ci_low"), ("ci_high", "_ci_high")):
            table[f"{way}{end}"] = found[column].to_numpy()
    table["weight"] = table[list(WAYS)].clip(0, 1).mean(axis=1, skipna=False)
    if not moves.safe(of):
        return table.assign(weight_ci_low=np.nan, weight_ci_high=np.nan, leads=np.nan, n=0)[PARTS]
    drawn = np.mean([np.clip(moves.draws(way, sets, of=of), 0, 1) for way in WAYS], axis=0)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    table["weight_ci_low"] = np.minimum(low, table["weight"])
    table["weight_ci_high"] = np.maximum(high, table["weight"])
    table["leads"] = [
        _leads(drawn[:, k], np.delete(drawn, k, axis=1).max(axis=1, initial=0.0)) for k in range(len(sets))
    ]
    return table.assign(n=len(moves.base.effect))[PARTS]


def _leads(weight: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Share of draws in which a part names the mechanism."""
    return float(((weight >= LEAD) & (weight >= FACTOR * second)).mean())


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
    return percent(value) if np.isfinite(value) else "no readable share"


def _shown(row: Mapping[str, Any] | pd.Series, name: str) -> str:
    """A share with its interval."""
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_ci_low", "_ci_high"))
    return share(Estimate(value, low, high, 0, "")) if np.isfinite(value) else "no readable share"


def _between(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.ci_low:.2f}, {e.ci_high:.2f}]"
