"""Judges by name: who says which tokens of a chain are wrong (`traces.judging`).

* `arithmetic`: the results of written calculations.
* `organism`: the steps and the answer of the organisms' word-level tasks, known exactly.
* `planted`: the words whose source is planted in an organism; none of them is wrong.
* `FILE.py:name`: a function of your own, `Trace -> pieces Judged`, in a Python file: an annotator's or a process reward
  model's labels, say.
"""

from __future__ import annotations

from importlib import import_module

from reasoninterp.errors import UserError
from reasoninterp.study import load_module
from reasoninterp.traces.judging import Judge

JUDGES = {
    "arithmetic": "reasoninterp.traces.judging:arithmetic",
    # Plug-ins like a user's: this room does not know that one.
    "organism": "reasoninterp.organisms.judge:judge",
    "planted": "reasoninterp.organisms.judge:planted",
}


def judge_named(which: str) -> Judge:
    """A judge by its name, or `FILE.py:name`.

    Raises:
        UserError: no such judge, file, or function in it.
    """
    if which in JUDGES:
        module, _, name = JUDGES[which].partition(":")
        found: Judge = getattr(import_module(module), name)
        return found
    path, _, name = which.rpartition(":")
    if not path.endswith(".py") or not name:
        raise UserError(f"--judge {which}: no such judge; give one of {', '.join(JUDGES)}, or FILE.py:name.")
    own = getattr(load_module(path), name, None)
    if not callable(own):
        raise UserError(f"--judge {which}: there is no function {name!r} in {path}.")
    return own  # type: ignore[no-any-return]
