"""The bases of SeverBench, and which of them are held out.

Sizes from two to six layers, with and without grouped keys and values; both tasks; one carrier, two that share the
work, two of which either was to be enough (each pair's truth says what came of it).  Seeds that are missing in the row
did not learn with their recipe.

Held out are the seeds from `HELD_OUT` on: planted after the method had been settled on the others, never looked at
before they were evaluated.  A held-out set is used up by looking at why it was missed: the first one (seeds 206, 210,
213, 216, 220, 227, 233 and 236; its figures are in the log) taught how gains hide, and left the row.
"""

from __future__ import annotations

from typing import Literal

from reasoninterp.organisms.planted.bases import BaseSpec, Carrier

Split = Literal["development", "held-out"]
HELD_OUT = 240


def _bases() -> tuple[BaseSpec, ...]:
    at = Carrier
    return (
        BaseSpec(201, "lastop", 2, 4, 2, (at(0, 1),)),
        BaseSpec(202, "lastop", 2, 4, 4, (at(0, 2),)),
        BaseSpec(203, "lastop", 3, 4, 2, (at(1, 0),)),
        BaseSpec(205, "lastop", 3, 4, 2, (at(0, 0),)),
        BaseSpec(207, "lastop", 4, 4, 2, (at(2, 0),)),
        BaseSpec(215, "largest", 4, 4, 4, (at(1, 2),)),
        BaseSpec(218, "lastop", 3, 4, 4, (at(1, 1), at(1, 2))),
        BaseSpec(219, "lastop", 4, 4, 4, (at(1, 2),)),
        BaseSpec(222, "largest", 3, 4, 2, (at(0, 1),)),
        BaseSpec(223, "lastop", 5, 4, 4, (at(1, 1),)),
        BaseSpec(225, "lastop", 2, 4, 2, (at(0, 0),)),
        BaseSpec(226, "largest", 2, 4, 4, (at(0, 3),)),
        BaseSpec(228, "largest", 3, 4, 4, (at(0, 2),)),
        BaseSpec(231, "lastop", 4, 4, 2, (at(1, 0),)),
        BaseSpec(235, "lastop", 3, 4, 4, (at(1, 1), at(1, 3)), redundant=True),
        BaseSpec(241, "lastop", 2, 4, 2, (at(0, 0),)),
        BaseSpec(243, "lastop", 3, 4, 2, (at(1, 0),)),
        BaseSpec(245, "lastop", 4, 4, 2, (at(1, 1),)),
        BaseSpec(246, "lastop", 4, 4, 4, (at(1, 0),)),
        BaseSpec(247, "lastop", 5, 4, 2, (at(1, 1),)),
        BaseSpec(248, "lastop", 6, 4, 2, (at(1, 1),)),
        BaseSpec(249, "largest", 2, 4, 2, (at(0, 0),)),
        BaseSpec(250, "largest", 3, 4, 2, (at(0, 0),)),
        BaseSpec(252, "lastop", 3, 4, 2, (at(1, 0), at(1, 1)), redundant=True),
        BaseSpec(253, "lastop", 3, 4, 4, (at(1, 0), at(1, 3)), redundant=True),
        BaseSpec(254, "lastop", 3, 4, 4, (at(1, 0), at(1, 2))),
        BaseSpec(255, "largest", 2, 4, 4, (at(0, 2),)),
    )


BASES = _bases()


def split_of(spec: BaseSpec) -> Split:
    """Whether a base is held out."""
    return "held-out" if spec.seed >= HELD_OUT else "development"
