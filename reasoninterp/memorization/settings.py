"""Conventions under which the sources of tokens are measured (`sources`, `nulls`, `verdicts`)."""

from __future__ import annotations

from dataclasses import dataclass

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.interface import CoUnit


@dataclass(frozen=True)
class Settings:
    """Conventions of a measurement.

    Attributes:
        n_salient: how many salient tokens.
        stop: ids that are never salient (function words, punctuation).
        unit, window: what a co-occurrence counts (see `corpus.interface`).
        max_suffix: longest local window, in tokens; a verbatim copy of a whole document is cut to this.
        min_count: how often the target must follow the local window.  At 1, STIM's, w is often so long that all but one
            or two counts are 0, and there is little to rank; more makes w shorter and its counts denser.
        n_null: null contexts for each token and source.  With the correction, a share r of targets that have a source
            is found only by p of about `level * r`: give at least `1 / (level * r)`.
        level: a source is present where q (p, if not `correct`) is at most this.
        correct: whether p is corrected for the number of targets (see `verdicts`).
        seed: of the order in which null contexts are drawn.

    Raises:
        UserError: a number below 1, a level that is none, or a window beside the unit `documents`, which has none.
    """

    n_salient: int = 5
    stop: frozenset[int] = frozenset()
    unit: CoUnit = "documents"
    window: int | None = None
    max_suffix: int = 64
    min_count: int = 1
    n_null: int = 199
    level: float = 0.05
    correct: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_salient", "max_suffix", "min_count", "n_null"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}; give at least 1.")
        if not 0 < self.level < 1:
            raise UserError(f"level: {self.level}; give a rate between 0 and 1.")
        if self.window is not None and self.unit == "documents":
            raise UserError(f"window: {self.window}, but documents are counted whole; give the unit pairs or anchors.")
