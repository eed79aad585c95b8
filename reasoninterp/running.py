"""How a study is run.

1. *Key.*  Finished cells live in a shard (`keys`, `runs.Shard`); what is there is not measured again.
2. *Batches* of cells go to an executor (`executors`); each finished batch is written before the next is waited for.
3. *Seeds.*  Each cell has its own, from the run's seed, the study's name and the cell's key: results do not depend
   on the batch size, the order, or where a killed run was taken up again.
4. *Merge.*  Rows are put in the order of the cells, whatever order they were finished in.
5. *Search.*  A study that searches asks for cells as it goes; every answer is kept, so the memo is the resume.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reasoninterp.executors import Executor, SerialExecutor
from reasoninterp.keys import own_source_hash, shard_key
from reasoninterp.runs import Run, Shard
from reasoninterp.stats import derive_seed
from reasoninterp.study import Batch, Cell, Row, Study


@dataclass(frozen=True)
class Result:
    """What a study left: its raw rows, its summary tables by name, seconds, and cells measured and reused."""

    study: Study
    rows: pd.DataFrame
    tables: Mapping[str, pd.DataFrame]
    seconds: float
    measured: int
    reused: int


def run_study(
    study: Study,
    context: Any,
    run: Run,
    *,
    quiet: bool = False,
    executor: Executor | None = None,
    figures: bool = True,
) -> Result:
    """Measure what is missing, summarise, draw, and write the study's tables and figures to the run.

    Args:
        study: the study with its parameters set.
        context: what it is measured in.
        run: the run's directory.
        quiet: no progress bar.
        executor: where batches are measured; in this process by default.
        figures: whether to draw.

    Returns:
        The rows, the tables and how many cells were measured and reused.
    """
    began = time.perf_counter()
    key = shard_key(study, context, run)
    shard = run.shard(study.name, key)
    done = shard.read()
    work = executor or SerialExecutor()
    if callable(getattr(study, "search", None)):
        order, measured = _search(study, context, shard, done, quiet, work)
        reused = len(order) - measured
    else:
        cells = _seeded(study, context, study.cells(context))
        order = [cell.key for cell in cells]
        todo = [cell for cell in cells if cell.key not in done]
        reused, measured = len(cells) - len(todo), len(todo)
        with _progress(study.name, len(cells), reused, quiet) as bar:
            for batch, rows, seconds in work.run(_batches(todo, context.batch_size(study)), study, context):
                done.update(shard.append(_by_cell(study, batch, rows), seconds))
                bar.update(len(batch))
    of = {"key": key, "cells": _digest(order), "source": own_source_hash(type(study)), "figures": figures}
    stands = None if measured else _standing(study, run, of)
    if stands:
        frame, tables = stands
    else:
        frame = pd.DataFrame([row for key in order for row in done[key]])
        tables = _conclude(study, context, run, frame, figures)
        files = {name: run.file_digest("tables", f"{name}.parquet") for name in [*tables, f"{study.name}.rows"]}
        run.record(studies={study.name: {"of": of, "files": files}})
    seconds = time.perf_counter() - began
    run.record(timings={study.name: {"seconds": round(seconds, 2), "cells": len(order), "reused": reused}})
    return Result(study, frame, tables, seconds, measured, reused)


def _conclude(study: Study, context: Any, run: Run, frame: pd.DataFrame, figures: bool) -> dict[str, pd.DataFrame]:
    """Summarise all rows, draw, and write rows, tables and figures."""
    if len(frame):
        run.save_table(f"{study.name}.rows", frame)
    else:
        run.drop_table(f"{study.name}.rows")
    tables = _named(study.name, study.summarise(frame, context))
    for name, table in tables.items():
        run.save_table(name, table)
    if figures:
        summary = tables[study.name] if list(tables) == [study.name] else tables
        for name, figure in _named(study.name, study.draw(summary)).items():
            run.save_figure(name, figure)
            figure.clear()
            if pyplot := sys.modules.get("matplotlib.pyplot"):
                pyplot.close(figure)
    return tables


def _standing(study: Study, run: Run, of: Mapping[str, Any]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]] | None:
    """Rows and tables as they stand in the run, if they are of the same cells and code and nobody touched them."""
    before = run.manifest.get("studies", {}).get(study.name, {})
    files = before.get("files", {})
    if before.get("of") != of or of["source"] is None:
        return None
    if any(run.file_digest("tables", f"{name}.parquet") != digest for name, digest in files.items()):
        return None
    rows = f"{study.name}.rows"
    frame = run.table(rows) if files.get(rows) else pd.DataFrame()
    return frame, {name: run.table(name) for name in files if name != rows}


def _digest(order: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(order).encode()).hexdigest()


def _search(
    study: Any, context: Any, shard: Shard, done: dict[str, list[Row]], quiet: bool, work: Executor
) -> tuple[list[str], int]:
    """Drive a sequential search over memoised evaluations; returns the cells in the order they were asked for."""
    order: dict[str, None] = {}
    asked_before: dict[str, tuple[Hashable, dict[str, Any]]] = {}
    measured = 0
    with _progress(study.name, None, 0, quiet) as bar:

        def evaluate(*cells: Cell) -> list[list[Row]]:
            nonlocal measured
            for cell in cells:
                about = (cell.group, dict(cell.labels))
                if asked_before.setdefault(cell.key, about) != about:
                    raise ValueError(
                        f"study {study.name!r}: the key {cell.key!r} was used for another cell; put in the key "
                        "whatever tells cells apart"
                    )
            asked = _seeded(study, context, cells)
            todo = [c for c in asked if c.key not in done]
            for batch, rows, seconds in work.run(_batches(todo, context.batch_size(study)), study, context):
                done.update(shard.append(_by_cell(study, batch, rows), seconds))
                measured += len(batch)
                bar.update(len(batch))
            order.update(dict.fromkeys(c.key for c in asked))
            return [[dict(row) for row in done[c.key]] for c in asked]

        study.search(context, evaluate)
    return list(order), measured


def _seeded(study: Study, context: Any, cells: Iterable[Cell]) -> list[Cell]:
    out = [dataclasses.replace(c, seed=derive_seed(context.seed, study.name, c.key)) for c in cells]
    twice = [key for key, n in Counter(c.key for c in out).items() if n > 1]
    if twice:
        raise ValueError(f"study {study.name!r}: two cells share the key {twice[0]!r}")
    return out


def _batches(cells: Sequence[Cell], size: int) -> Iterator[Batch]:
    groups: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    for group in groups.values():
        for i in range(0, len(group), max(1, size)):
            yield Batch(group[i : i + max(1, size)])


def _by_cell(study: Study, batch: Batch, rows: Iterable[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {cell.key: [] for cell in batch}
    for row in rows:
        if row.get("_cell") not in out:
            raise ValueError(f"study {study.name!r}: measure gave a row that was not made with cell.row(...)")
        out[row["_cell"]].append(row)
    return {key: [{k: v for k, v in row.items() if k != "_cell"} for row in found] for key, found in out.items()}


def _named(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {name: value}


def _progress(name: str, total: int | None, done: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=name, unit="cell", disable=quiet, delay=2, file=sys.stderr)
