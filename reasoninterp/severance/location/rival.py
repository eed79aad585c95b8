"""Severed or overridden? The same two minds read once more with the rival removed.

A *rival* is whatever else a mind can answer from: a cue in the question, a memorised question.  A path that lost
against a rival is there still; a path that was cut is not, whatever the rival does.

1. Both minds are read with the rival in place and, if a second set of traces is given in which it is removed (the cue
   randomised, the question paraphrased or held out), without it: E, follow between the two answers, follow and stay of
   the answer that is given (`Answers`).
2. For E and for the follow rate: what the tuned mind *keeps* of the base's on the same traces, with the rival and
   without, and how much of what it lost has *returned*: `(kept without − kept with) / (1 − kept with)`.
3. *Overridden*: E survives under the rival, or E or the follow rate returns without it.  *Severed*: E is lost and
   neither returns.  Where an interval leaves this open, *undecided*.

E survives or is lost, and either returns or does not, according to the side of `HALF` on which the whole interval lies:
beyond it, the larger part of what the base has is there.  A path of which less is left than this is called lost, and
the share that it keeps is always told.  Where the answer follows in part (*weakened*), the path counts as overridden
only if it is `WHOLE` underneath, or the follow rate returns.

Intervals: of E by bootstrap over traces (paired between minds); of follow rates from Jeffreys' posterior of each share,
since the bootstrap of a share at 0 or 1 is a point.  They cover the choice of traces, not training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.stats import CONFIDENCE, N_RESAMPLES, derive_seed

HALF = 0.5
WHOLE = 0.9
_P50, _P90 = (f"{100 * x:.0f} %" for x in (HALF, WHOLE))
LEAST_LOSS = 0.05  # of the base's: a smaller loss is no denominator for what returned of it
COLUMNS = ["measure", "quantity", "value", "ci_low", "ci_high", "n", "decision"]
KEPT_WITH, KEPT_WITHOUT, RETURNED = "kept with the rival", "kept without the rival", "returned without the rival"
Decision = Literal["survives", "lost", "returns", "does not return", "cannot tell"]
Word = Literal["severed", "overridden", "weakened", "undecided"]


class Answers(NamedTuple):
    """What one mind does with some traces.

    `effect` (nats) and `follow_two` (0/1: prefers the corrupt answer after the corrupt chain and the clean one after the
    clean chain) are per contrast; the others (0/1) per swap: the answer it gives follows the chain, stays with the
    question (gives the right answer), or could not be read.  `right` (0/1, per swap) is of the chain left whole.
    """

    effect: NDArray[np.float64]
    follow_two: NDArray[np.float64]
    follow: NDArray[np.float64]
    stay: NDArray[np.float64]
    unreadable: NDArray[np.float64]
    right: NDArray[np.float64]

    @property
    def neither(self) -> float:
        """Share of swaps in which it gives neither answer, or none that can be read."""
        return float(1 - np.maximum(self.follow, self.stay).mean()) if len(self.follow) else float("nan")


def rival_table(
    base: Answers, tuned: Answers, free_base: Answers | None = None, free_tuned: Answers | None = None, *, seed: int = 0
) -> pd.DataFrame:
    """What the tuned mind keeps of E and of the follow rate with the rival and, if read, without it.

    Args:
        base, tuned: both minds on the traces with the rival.
        free_base, free_tuned: both on the traces without it.
        seed: of the draws.

    A measure that cannot be read in one set of traces is left out there, and with it what returned.

    Returns:
        `measure` (E, follow), `quantity`, `value, ci_low, ci_high, n, decision`.  `value` is NaN where there is nothing
        to divide by.
    """
    rows = []
    of: dict[str, tuple[Callable[..., NDArray[np.float64]], str]] = {
        "E": (_kept_means, "effect"),
        "follow": (_kept_shares, "follow"),
    }
    for measure, (draw, field) in of.items():
        pairs = [(getattr(base, field), getattr(tuned, field))]
        if free_base is not None and free_tuned is not None:
            pairs.append((getattr(free_base, field), getattr(free_tuned, field)))
        if not all(map(len, pairs[0])):
            continue
        # A measure that was read only with the rival in place is told of there, and nothing has returned.
        pairs = [pair for pair in pairs if all(map(len, pair))]
        points = [_ratio(a.mean(), b.mean()) for a, b in pairs]
        draws = [draw(a, b, derive_seed(seed, "rival", measure, k)) for k, (a, b) in enumerate(pairs)]
        for name, point, drawn, (a, _) in zip((KEPT_WITH, KEPT_WITHOUT), points, draws, pairs, strict=False):
            found = _estimate(point, drawn, len(a))
            rows.append({"measure": measure, "quantity": name, **found, "decision": _side(found, "survives", "lost")})
        if len(pairs) == 2:
            found = _estimate(_returned(*points), _returned(*draws), min(len(a) for a, _ in pairs))
            decision = _side(found, "returns", "does not return")
            rows.append({"measure": measure, "quantity": RETURNED, **found, "decision": decision})
    return pd.DataFrame(rows, columns=COLUMNS)


class Told(NamedTuple):
    """The word, the sentence that gives the reason, and what would have reversed it."""

    word: Word
    reason: str
    would_reverse: str


def tell_apart(word: Literal["severed", "weakened"], table: pd.DataFrame) -> Told:
    """Whether a lost (`severed`) or reduced (`weakened`) follow rate is a cut or a rival that wins.

    Args:
        word: what the follow rate alone says.
        table: a `rival_table`.
    """
    rows = {(r["measure"], r["quantity"]): r for r in table.to_dict("records")}
    kept = rows.get(("E", KEPT_WITH))
    e_with = kept["decision"] if kept else "cannot tell"
    returned = {m: rows[m, RETURNED] for m in ("E", "follow") if (m, RETURNED) in rows}
    back = [m for m, r in returned.items() if r["decision"] == "returns"]
    under = f"under the rival the tuned mind keeps {_percent(kept)} of the base's E" if kept else "E was not read"
    free = " and ".join(f"{_percent(r)} of the lost {_NAME[m]}" for m, r in returned.items())
    free = f"with the rival removed, {free} {'return' if len(returned) > 1 else 'returns'}" if free else ""
    if word == "weakened":
        whole = kept is not None and kept["ci_low"] >= WHOLE
        reasons = [f"less than {_P90} of E underneath"] * whole
        reasons += ["a follow rate that does not return"] * ("follow" in back)
        if reasons:
            return Told("overridden", _joined(under, free), " and ".join(reasons))
        return Told("weakened", _joined(under, free), f"{_P90} of E underneath, or a follow rate that returns")
    # Any one of the reasons is enough, so that all of them would have to go.
    reasons = [f"less than {_P50} of E underneath"] * (e_with == "survives")
    reasons += [f"less than {_P50} of the lost {' and of the lost '.join(_NAME[m] for m in back)} returning"] * bool(
        back
    )
    if reasons:
        return Told("overridden", _joined(under, free), " and ".join(reasons))
    if not returned:
        if e_with == "lost":
            said = f"{under}; a rival that also hides E is not excluded, since it was not removed"
            return Told("severed", said, "E or follow rate returning on traces without the rival")
        return Told("undecided", f"{under}, on neither side of {_P50}", "more traces, or traces without the rival")
    if e_with == "lost" and all(r["decision"] == "does not return" for r in returned.values()):
        return Told("severed", _joined(under, free), f"{_P50} of lost E or follow rate returning without the rival")
    return Told("undecided", f"{_joined(under, free)}, on neither side of {_P50}", "more traces")


def share_returned(table: pd.DataFrame) -> float:
    """The larger of the shares of E and of the follow rate that returned, within 0 and 1; 0 where none was measured."""
    found = table[table["quantity"] == RETURNED]["value"].dropna()
    return float(np.clip(found.max(), 0, 1)) if len(found) else 0.0


_NAME = {"E": "E", "follow": "follow rate"}


def _joined(*parts: str) -> str:
    return "; ".join(p for p in parts if p)


def _percent(row: Mapping[str, Any]) -> str:
    ends = [f"{100 * row[k]:.0f}".replace("-", "−") for k in ("value", "ci_low", "ci_high")]
    return f"{ends[0]} % [{ends[1]}, {ends[2]}]" if np.isfinite(row["value"]) else "no readable share"


def _ratio(base: float, tuned: float) -> float:
    return float(tuned / base) if base > 0 else float("nan")


def _kept_means(base: NDArray[np.float64], tuned: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Draws of `mean(tuned) / mean(base)` over resampled traces; NaN where the base's is not above 0."""
    rng, n = np.random.default_rng(seed), len(base)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    below, above = counts @ base, counts @ tuned
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)


def _kept_shares(base: NDArray[np.float64], tuned: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Draws of the ratio of two shares, each from Jeffreys' posterior (the two taken as independent: wider)."""
    rng = np.random.default_rng(seed)
    draws = [rng.beta(x.sum() + 0.5, len(x) - x.sum() + 0.5, size=N_RESAMPLES) for x in (base, tuned)]
    return draws[1] / draws[0]


def _returned(kept: NDArray[np.float64] | float, without: NDArray[np.float64] | float) -> NDArray[np.float64]:
    lost = 1 - np.asarray(kept, dtype=np.float64)
    safe = lost >= LEAST_LOSS
    return np.where(safe, (np.asarray(without) - kept) / np.where(safe, lost, 1.0), np.nan)


def _estimate(point: NDArray[np.float64] | float, draws: NDArray[np.float64], n: int) -> dict[str, float | int]:
    """Value and interval; NaN where draws fall where the quantity is not defined more often than the interval allows."""
    tail = (1 - CONFIDENCE) / 2
    if not np.isfinite(point) or np.isnan(draws).mean() > tail:
        return {"value": float("nan"), "ci_low": float("nan"), "ci_high": float("nan"), "n": n}
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    # A share at 0 or 1 lies outside the quantiles of its posterior; the interval holds the value.
    return {"value": float(point), "ci_low": min(float(low), float(point)), "ci_high": max(float(high), float(point)), "n": n}  # fmt: skip


def _side(found: Mapping[str, Any], above: Decision, below: Decision) -> Decision:
    if found["ci_low"] >= HALF:
        return above
    return below if found["ci_high"] < HALF else "cannot tell"
