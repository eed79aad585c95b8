"""The words of this room, for its tables, figures and the report; imports nothing heavy.

A token is *called* by its dominant sources, `none` where at least one source was tested and none is present, `undefined`
where none could be tested.
"""

from __future__ import annotations

from typing import Literal, get_args

Source = Literal["local", "mid", "long"]
SOURCES: tuple[Source, ...] = get_args(Source)
NONE, UNDEFINED, JOINT = "none", "undefined", "joint"
CALLED = (*SOURCES, NONE, UNDEFINED)
CONTROL = "control"
REMOVED = (*SOURCES, CONTROL)  # parts of the context that are taken out (`ablation`)
GIVEN = "given"  # the writer of a chain that stands in the file
STEP, ANSWER = "step", "answer"

NAMES = {"local": "local", "mid": "mid-range", "long": "long-range", "none": "none", "undefined": "not defined"}
TAKEN_OUT = {"local": "local window", "mid": "chain before it", "long": "question", "control": "random tokens"}
