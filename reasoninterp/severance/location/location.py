"""A location: what `locate` found, as frozen values that can be written as JSON and as tables."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasoninterp.severance.ledger.integrate import Integral
from reasoninterp.severance.location.confidence import Confidence
from reasoninterp.severance.location.mechanism import Mechanism
from reasoninterp.severance.verdict import Evidence
from reasoninterp.stats import Estimate

TABLES = (
    "location", "ranking", "evidence", "sets", "answers", "rival", "direct", "controls", "mechanism",
)  # fmt: skip
RANKING = [
    "unit", "layer", "kind", "ledger", "ledger_ci_low", "ledger_ci_high", "restore", "restore_ci_low", "restore_ci_high",
    "cut", "cut_ci_low", "cut_ci_high", "in_restoring", "in_cutting", "marginal", "marginal_ci_low", "marginal_ci_high",
    "rank_ledger", "rank_grafts", "rank_both", "weight_change", "n",
]  # fmt: skip


@dataclass(frozen=True)
class LocatedSet:
    """A 1-minimal set of Units in one direction (`restore` or `cut`).

    `share` is of the lost E and `share_follow` of the lost follow rate (NaN where that loss is not safe).  Where nothing
    `reached` the threshold, `units` is empty.  `alternatives` are other such sets, and `alternative_shares` theirs, of E
    and of the follow rate; `complete` says that the search for them was not broken off.  A set was searched on the very
    traces that its shares are read on: the intervals cover the traces, not the search.
    """

    direction: str
    units: tuple[str, ...]
    share: Estimate
    share_follow: Estimate
    reached: bool
    alternatives: tuple[tuple[str, ...], ...]
    complete: bool
    threshold: float = 0.9
    alternative_shares: tuple[tuple[Estimate, Estimate], ...] = ()


@dataclass(frozen=True)
class Costs:
    """Passes over both chains of all contrasts in one mind, evaluations of sets of Units, and seconds.

    Every backward pass is counted as a forward pass too.  The passes are those that the numbers rest on, whether read now
    or remembered from an earlier call with this context; the seconds are those of this call.
    """

    forward_passes: int
    backward_passes: int
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Location:
    """Verdict, sets, ranking, mechanism and what they rest on.

    Attributes:
        verdict: *intact*, *weakened*, *severed*, *overridden*, *undecided* or *not interpretable*.
        level: of the Units.
        severance_score: how far a path that was there is gone, from 0 to 1; NaN where not interpretable.
        sentences: what a colleague can quote, each with what would have reversed it.
        restoring, cutting: the smallest sets; None where nothing was looked for.
        shares_of: what the shares are of, `effect` or `follow`; None where neither is safely lost.
        ranking: one row a Unit (`RANKING`), the most suspected first.
        mechanism: how the located Units lost the path; None where nothing was located.
        evidence: claims with their numbers.
        confidence: that the located set is right.
        answers, rival, direct: tables of `severance.location.answers`, `severance.location.rival`, `severance.location.direct_logits`.
        integral: the ledger, and `ledger_of` what is split; None where the location ended before it.
        controls: random sets beside the located one, moved the same way, one row a kind (`match`, shares, `norm_ratio`).
        aligned: the mind whose Units were grafted and charged: the tuned mind in the base's gauge, or itself.
        costs, notes, minds: what it took, what is to be known, and the names of the two minds.
    """

    verdict: str
    level: str
    severance_score: float
    answers: pd.DataFrame
    rival: pd.DataFrame
    confidence: Confidence
    costs: Costs
    notes: tuple[str, ...]
    minds: tuple[str, str]
    sentences: tuple[str, ...] = ()
    restoring: LocatedSet | None = None
    cutting: LocatedSet | None = None
    shares_of: str | None = None
    ranking: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=RANKING))
    mechanism: Mechanism | None = None
    evidence: tuple[Evidence, ...] = ()
    direct: pd.DataFrame = field(default_factory=pd.DataFrame)
    integral: Integral | None = None
    ledger_of: str = "E"
    aligned: str = ""
    controls: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def located(self) -> tuple[str, ...]:
        """Units of the restoring set, or of the cutting set where nothing restores; empty where nothing was located."""
        return next((s.units for s in (self.restoring, self.cutting) if s is not None and s.reached), ())

    @property
    def units(self) -> tuple[str, ...]:
        """All Units of the level in the order of the ranking, as the `rank_*` arrays have them."""
        return tuple(self.ranking["unit"])

    @property
    def rank_ledger(self) -> NDArray[np.float64]:
        """Score of each Unit by the ledger alone: the effect it lost, in nats; the lowest where it does not differ."""
        return self.ranking["rank_ledger"].to_numpy(np.float64)

    @property
    def rank_grafts(self) -> NDArray[np.float64]:
        """Score of each Unit by single grafts alone: the larger share that it returns or takes away."""
        return self.ranking["rank_grafts"].to_numpy(np.float64)

    @property
    def rank_both(self) -> NDArray[np.float64]:
        """Score of each Unit by smallest sets, grafts and ledger together (see `severance.location.rank`)."""
        return self.ranking["rank_both"].to_numpy(np.float64)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything as tidy tables (those of `TABLES` that have rows); `location` has one row."""
        sets = [s for s in (self.restoring, self.cutting) if s is not None]
        out = {
            "location": pd.DataFrame([self._row()]),
            "ranking": self.ranking,
            "evidence": pd.DataFrame([asdict(e) for e in self.evidence]),
            "sets": pd.DataFrame([row for s in sets for row in _rows(s)]),
            "answers": self.answers,
            "rival": self.rival,
            "direct": self.direct,
            "controls": self.controls,
        }
        if self.mechanism is not None:
            out["mechanism"] = self.mechanism.parts
        return {name: table for name, table in out.items() if len(table)}

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not a finite number is null."""
        tables = {n: t.to_dict("records") for n, t in self.tables().items() if n in ("ranking", "answers", "rival")}
        how = self.mechanism
        return _plain(
            {
                **{k: v for k, v in self._row().items() if k not in ("restoring", "cutting")},
                "sentences": self.sentences,
                "restoring": self.restoring,
                "cutting": self.cutting,
                "mechanism": None
                if how is None
                else {"word": how.word, "sentence": how.sentence, "would_reverse": how.would_reverse},
                "evidence": self.evidence,
                "confidence": self.confidence,
                "notes": self.notes,
                **tables,
            }
        )

    def _row(self) -> dict[str, Any]:
        """The location as one row of plain values."""
        one = {
            "verdict": self.verdict,
            "level": self.level,
            "severance_score": self.severance_score,
            "restoring": "+".join(self.restoring.units) if self.restoring else "",
            "cutting": "+".join(self.cutting.units) if self.cutting else "",
            "mechanism": self.mechanism.word if self.mechanism else "",
            "shares_of": self.shares_of or "",
            "aligned": self.aligned,
            "confidence": self.confidence.value,
            "confidence_basis": self.confidence.basis,
            **asdict(self.costs),
        }
        ledger = self.integral
        if ledger is not None:
            ends = float(np.mean(ledger.e_from)), float(np.mean(ledger.e_to))
            one |= {
                "ledger_of": self.ledger_of,
                "ledger_from": ends[0],
                "ledger_to": ends[1],
                "residual": ledger.residual,
                "n_nodes": ledger.n_nodes,
            }
        return one


def _rows(found: LocatedSet) -> list[dict[str, Any]]:
    """A set and its alternatives, one row each."""
    all_units = [found.units, *found.alternatives]
    out = []
    for k, (units, pair) in enumerate(
        zip(all_units, [(found.share, found.share_follow), *found.alternative_shares], strict=True)
    ):
        row: dict[str, Any] = {"direction": found.direction, "units": "+".join(units), "size": len(units)}
        row["chosen"] = k == 0
        for name, e in zip(("share", "share_follow"), pair, strict=True):
            row |= {name: e.value, f"{name}_ci_low": e.ci_low, f"{name}_ci_high": e.ci_high}
        row |= {"n": max(e.n for e in pair), "reached": found.reached, "threshold": found.threshold}
        out.append(row | {"complete": found.complete})
    return out


def _plain(value: Any) -> Any:
    """Values as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {k: _plain(v) for k, v in asdict(value).items()}
    if hasattr(value, "_asdict"):
        return {k: _plain(v) for k, v in value._asdict().items()}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value
