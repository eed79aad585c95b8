"""reasoninterp: did fine-tuning cut the chain of thought off from the answer, how much, and where?

A chain of thought goes in as data, two minds read it, every reading is a number with an error bar.

Everything here is imported on first use: `import reasoninterp` pulls in no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasoninterp.errors import UserError
    from reasoninterp.models.context import Context, ContextSpec, Item
    from reasoninterp.running import run_study
    from reasoninterp.runs import Run
    from reasoninterp.severance.location.locate import locate
    from reasoninterp.stats import estimate
    from reasoninterp.study import Batch, Cell, Study
    from reasoninterp.traces.trace import Format, Trace

__version__ = "0.1.0"

_HOMES = {
    "Batch": "study",
    "Cell": "study",
    "Context": "models.context",
    "ContextSpec": "models.context",
    "Format": "traces.trace",
    "Item": "models.context",
    "Run": "runs",
    "Study": "study",
    "Trace": "traces.trace",
    "UserError": "errors",
    "estimate": "stats",
    "locate": "severance.location.locate",
    "run_study": "running",
}
__all__ = [
    "Batch",
    "Cell",
    "Context",
    "ContextSpec",
    "Format",
    "Item",
    "Run",
    "Study",
    "Trace",
    "UserError",
    "estimate",
    "locate",
    "run_study",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"reasoninterp.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'reasoninterp' has no attribute {name!r}")
