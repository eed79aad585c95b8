"""The report of a comparison: one self-contained HTML page drawn from a run's tables.

`render(run)` writes it; `plots` has its figures as functions of tables, for notebooks; `content` turns tables into
what the page prints.
"""

from __future__ import annotations

from reasoninterp.report.render import render

__all__ = ["render"]
