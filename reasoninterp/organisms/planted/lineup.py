"""The bases of SeverBench, and which third of them is held out.

Sizes from two to six layers, with and without grouped keys and values; both tasks; one carrier, two that share the
work, two of which either was to be enough (each pair's truth says what came of it).  Seeds that are missing in the row
did not learn with their recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from reasoninterp.organisms.planted.bases import BaseSpec, Carrier

Split = Literal["development", "held-out"]


def _bases() -> tuple[BaseSpec, ...]:
    at = Carrier
    return (
        BaseSpec(201, "lastop", 2, 4, 2, (at(0, 1),)),
        BaseSpec(202, "lastop", 2, 4, 4, (at(0, 2),)),
        BaseSpec(203, "lastop", 3, 4, 2, (at(1, 0),)),
        BaseSpec(205, "lastop", 3, 4, 2, (at(0, 0),)),
        BaseSpec(206, "lastop", 4, 4, 4, (at(1, 1),)),
        BaseSpec(207, "lastop", 4, 4, 2, (at(2, 0),)),
        BaseSpec(210, "lastop", 5, 4, 2, (at(2, 1),)),
        BaseSpec(213, "lastop", 3, 4, 4, (at(1, 0), at(1, 2)), redundant=True),
        BaseSpec(215, "largest", 4, 4, 4, (at(1, 2),)),
        BaseSpec(216, "largest", 2, 4, 2, (at(0, 0),)),
        BaseSpec(218, "lastop", 3, 4, 4, (at(1, 1), at(1, 2))),
        BaseSpec(219, "lastop", 4, 4, 4, (at(1, 2),)),
        BaseSpec(220, "lastop", 6, 4, 2, (at(1, 0),)),
        BaseSpec(222, "largest", 3, 4, 2, (at(0, 1),)),
        BaseSpec(223, "lastop", 5, 4, 4, (at(1, 1),)),
        BaseSpec(225, "lastop", 2, 4, 2, (at(0, 0),)),
        BaseSpec(226, "largest", 2, 4, 4, (at(0, 3),)),
        BaseSpec(227, "lastop", 3, 4, 2, (at(1, 1),)),
        BaseSpec(228, "largest", 3, 4, 4, (at(0, 2),)),
        BaseSpec(231, "lastop", 4, 4, 2, (at(1, 0),)),
        BaseSpec(233, "lastop", 3, 4, 2, (at(1, 0), at(1, 1)), redundant=True),
        BaseSpec(235, "lastop", 3, 4, 4, (at(1, 1), at(1, 3)), redundant=True),
        BaseSpec(236, "lastop", 4, 4, 2, (at(1, 0), at(1, 1)), redundant=True),
    )


BASES = _bases()


def split_of(spec: BaseSpec, bases: Sequence[BaseSpec] = BASES) -> Split:
    """The held-out third, by base: those with the smallest hash of their seed."""
    by_hash = sorted(bases, key=lambda b: hashlib.sha256(f"severbench/{b.seed}".encode()).hexdigest())
    return "held-out" if spec in by_hash[: round(len(bases) / 3)] else "development"
