"""The sweep: contrasts × sites × metrics → tidy rows, exactly, each patched run restarted where its patch begins.

1. Both chains of every contrast are run once; the corrupt one only from its first changed token on (`store`).
2. The table of cells is made, spans are narrowed to tokens at which source and run differ, and cells without any are
   exactly 0 (`cells`).
3. All others climb the layers together (`staircase`), reading every metric in one pass (`readings`).

Signs: `denoising` patches the corrupt run, `noising` the clean run.  With `m = log P(corrupt answer) − log P(clean
answer)`, `value` is `m(corrupt) − m(patched)` or `m(patched) − m(clean)`, in nats: both run from 0 to the contrast's
whole effect, `effect = m(corrupt) − m(clean)`, when the source is the other run.  With another mind as source both
chains are patched, and `value` is the change of `m(corrupt) − m(clean)` (`direction` is then `cross_mind`).

Networks that cannot be driven block by block are swept plainly, one forward pass per cell (`plain`): the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.body import Hook
from reasoninterp.models.context import Context
from reasoninterp.models.packed import supported
from reasoninterp.patching.cells import Cells, Different, Sites, cells_of, lanes_of
from reasoninterp.patching.lanes import Ints
from reasoninterp.patching.means import column_means
from reasoninterp.patching.metric import CLEAN, CORRUPT, DIRECTIONS, SIDES, Direction, contrast_plan
from reasoninterp.patching.partners import partners
from reasoninterp.patching.plain import plain_sweep
from reasoninterp.patching.readings import Reader
from reasoninterp.patching.setting import CROSS, Setting, check_hooks, wanted_sites
from reasoninterp.patching.sources import Constant, Stored, pattern_of, shapes
from reasoninterp.patching.staircase import Source, climb
from reasoninterp.patching.store import Store, record
from reasoninterp.study import Batch, Row
from reasoninterp.traces.contrast import Contrast

Values = dict[str, NDArray[np.float64]]


def sweep(
    context: Context,
    contrasts: Sequence[Contrast],
    sites: Sites | str = "resid_pre",
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    source: str = "other_run",
    metrics: Sequence[str] = ("logit_diff",),
    hooks: Sequence[tuple[str, Hook]] = (),
    max_tokens: int | None = None,
) -> pd.DataFrame:
    """Patch every cell of `sites` in every contrast, for the mind that is in.

    Args:
        context: the minds and the tokenizer; open at the mind to read.
        contrasts: clean and corrupt chains, aligned: spans are those of both.
        sites: what to patch; a component's name stands for `Sites((name,))`.
        directions: `denoising`, `noising` or both (ignored where the source is another mind).
        source: `other_run`, `zero`, `mean`, `same_answer`, `random`, or the name of another mind.
        metrics: `logit_diff`, `logp`, `rank`, `kl` (see `readings`).
        hooks: (site, f) that act in every run, patched or not; `f` sees packed activations, [1, token, ...].
        max_tokens: tokens run at once; chosen by the context if None.

    Returns:
        One row per contrast × direction × cell: `contrast` (its place), `direction`, `source`, `component`, `layer`,
        `window`, `head` (-1: all), `column`, `column_index`, `n_tokens`, `value`, `effect`; with `logp`, the changes
        `logp_clean` and `logp_corrupt` in bits; with `rank`, `rank_clean` and `rank_corrupt` after the patch; with
        `kl`, bits: of the run that is patched, or of the corrupt chain where the source is another mind.  Where a source
        has no fitting trace, values are NaN.

    Raises:
        UserError: contrasts that are not aligned, or a word that is none of the above.
    """
    sites = Sites((sites,)) if isinstance(sites, str) else sites
    if not len(contrasts):
        return pd.DataFrame()
    if not all(c.aligned for c in contrasts):
        raise UserError("sweep: these contrasts are not aligned; give those whose chains have equal token spans.")
    sites.check(context.body)
    check_hooks(hooks, context.body.n_layers)
    if not directions or any(d not in SIDES for d in directions):
        raise UserError(f"directions={list(directions)}: give denoising, noising or both.")
    setting = Setting(
        context,
        contrasts,
        contrast_plan(context, contrasts),
        [context.encode(c.clean) for c in contrasts],
        hooks,
        tuple(dict.fromkeys(("logit_diff", *metrics))),
        max_tokens or context.sweep_tokens(),
    )
    if unfit := supported(context.body):
        return plain_sweep(setting, sites, directions, source, why=unfit)
    return _Sweep(setting, sites, source).run(directions)


def sweep_cells(context: Context, batch: Batch, sites: Sites | str = "resid_pre", **options: Any) -> Iterator[Row]:
    """`sweep` over a study's batch of contrast cells: rows with the cells' labels, ready to be returned."""
    found = sweep(context, [cell.item.contrast for cell in batch], sites, **options)
    for values in found.to_dict("records"):
        cell = batch[int(values.pop("contrast"))]
        yield cell.row(**{str(k): v for k, v in values.items()})


class Where(NamedTuple):
    """Where a source is read for each cell, if not at the cell's own row and positions, and which cells it fits."""

    row: Ints
    shift: Ints | None = None
    fits: NDArray[np.bool_] | None = None


class _Sweep:
    """One sweep of one setting."""

    def __init__(self, setting: Setting, sites: Sites, source: str) -> None:
        self.setting, self.sites, self.name = setting, sites, source
        body = setting.body
        self.wanted = wanted_sites(sites, body, bool(setting.hooks))
        if setting.hooks and "pattern" in sites.components:
            raise UserError("sweep: pattern cannot be patched while other hooks act; sweep it without them.")
        self.here = body.label
        self.other = source if source in setting.context.minds.names else ""
        if not self.other and source not in ("other_run", "zero", "mean", "same_answer", "random"):
            names = ", ".join(setting.context.minds.names)
            raise UserError(f"source={source!r}: give other_run, zero, mean, same_answer, random, or a mind ({names}).")
        if self.other:
            with setting.context.minds.at(self.other):
                self.there = setting.body.label
                setting.record(self.wanted)
        setting.record(self.wanted)
        self.cells = cells_of(body, setting.tokens, sites)
        self._readers: dict[int, Reader] = {}

    def run(self, directions: Sequence[Direction]) -> pd.DataFrame:
        """The rows of all directions."""
        plain = {side: self._plain(side) for side in (0, 1)}
        effect = plain[1]["margin"] - plain[0]["margin"]
        whole = effect[self.cells.table["contrast"].to_numpy()]
        tables = []
        if self.other:
            return self._table(CROSS, self._cross(plain) | {"effect": whole})
        for direction in directions:
            sides = SIDES[direction]
            patched = self._patched(sides.into, sides.source, plain[sides.into])
            change = patched["margin"] - plain[sides.into]["margin"][self._contrasts]
            values = {"value": sides.sign * change, "effect": whole} | self._others(patched, plain[sides.into])
            tables.append(self._table(direction, values))
        return pd.concat(tables, ignore_index=True)

    def _cross(self, plain: dict[int, Values]) -> Values:
        """Both chains patched from the other mind, and what that changes."""
        patched = {side: self._patched(side, side, plain[side]) for side in (CLEAN, CORRUPT)}
        change = {side: patched[side]["margin"] - plain[side]["margin"][self._contrasts] for side in patched}
        return {"value": change[CORRUPT] - change[CLEAN]} | self._others(patched[CORRUPT], plain[CORRUPT])

    def _others(self, patched: Values, plain: Values) -> Values:
        """The metrics beside the margin: changes of log-probabilities, ranks and divergence as they are."""
        found = {n: patched[n] - plain[n][self._contrasts] for n in ("logp_clean", "logp_corrupt") if n in patched}
        return found | {n: patched[n] for n in ("rank_clean", "rank_corrupt", "kl") if n in patched}

    @property
    def _contrasts(self) -> Ints:
        found: Ints = self.cells.table["contrast"].to_numpy()
        return found

    def _table(self, direction: str, values: dict[str, Any]) -> pd.DataFrame:
        table = self.cells.table.copy()
        table.insert(1, "direction", direction)
        table.insert(2, "source", self.name)
        table.insert(5, "window", self.sites.window)
        table["n_tokens"] = self.cells.stop - self.cells.start
        for name, column in values.items():
            table[name] = np.asarray(column, dtype=float) + 0.0  # no minus zeros
        return table

    def _reader(self, side: int) -> Reader:
        if side not in self._readers:
            self._readers[side] = Reader(self.setting.plan.sides[side], self.setting.metrics)
            self._readers[side].set_plain(self._plain_logits(side))
        return self._readers[side]

    def _plain_logits(self, side: int) -> Float[Tensor, "row read vocab"]:
        return self.setting.body.logits(self.setting.stores[self.here, side].hidden)

    def _plain(self, side: int) -> Values:
        """Every metric of the runs that are not patched, by contrast."""
        owners = np.array(self.setting.plan.owners(side))
        rows = np.arange(len(owners))
        found = self._reader(side).read(rows, owners, len(self.setting.contrasts), self._plain_logits(side))
        return {name: v.double().numpy() for name, v in found.items()}

    def _patched(self, into: int, source: int, plain: dict[str, Any]) -> Values:
        """Every metric of the patched runs, by cell."""
        out = {name: v[self._contrasts].astype(float) for name, v in plain.items()}
        reader = self._reader(into)
        component = self.cells.table["component"].to_numpy()
        usual = np.nonzero(component != "pattern")[0]
        self._climb(usual, into, source, reader, out)
        for layer in self.sites.first_layers(self.setting.body) if "pattern" in self.sites.components else ():
            mine = np.nonzero((component == "pattern") & (self.cells.table["layer"].to_numpy() == layer))[0]
            self._climb(mine, into, source, reader, out, pattern=layer)
        return out

    def _climb(
        self, chosen: Ints, into: int, source: int, reader: Reader, out: dict[str, Any], pattern: int | None = None
    ) -> None:
        if not len(chosen):
            return
        store = self.setting.stores[self.here, into]
        given, stored, where = self._source(into, source, pattern)
        if where is not None and where.fits is not None:
            for name in out:
                out[name][chosen[~where.fits[chosen]]] = np.nan
            chosen = chosen[where.fits[chosen]]
        different = Different(store, stored)
        if stored is not None and self._same_layout():
            turned = self._turned(chosen, into, different)
            chosen = np.setdiff1d(chosen, turned)
            self._run(self._behind(turned), turned, into, stored, Stored(store), Different(stored, store), reader, out)
        self._run(self.cells, chosen, into, store, given, different, reader, out, where=where)

    def _run(
        self,
        cells: Cells,
        chosen: Ints,
        into: int,
        store: Store,
        given: Source,
        different: Different,
        reader: Reader,
        out: dict[str, Any],
        where: Where | None = None,
    ) -> None:
        """Run some cells from a store and add up what is read; a cell that is not run keeps what `out` holds, if the
        store is the run that is patched, and else reads as the store does."""
        setting, body = self.setting, self.setting.body
        work = lanes_of(
            cells, chosen, setting.rows_of(into), setting.stops(into), different, self.sites.window,
            enters=not setting.hooks,
            source_row=None if where is None else where.row, shift=None if where is None else where.shift,
        )  # fmt: skip
        own = store is setting.stores[self.here, into]
        run = np.unique(work.cell) if own else chosen
        if not len(run):
            return
        for name in out:
            out[name][run] = 0.0
        for lanes, hidden in climb(
            body, store, work.lanes, work.edits, given, setting.plan.sides[into].positions, hooks=setting.hooks,
            max_tokens=setting.max_tokens,
        ):  # fmt: skip
            self._read(reader, work.lanes.row[lanes], work.cell[lanes], body.logits(hidden), out)
        rows, kept = self._unrun(run, work.cell, work.lanes.row, into)
        if len(rows):  # rows of a cell's contrast that its patch does not reach keep what they read
            self._read(reader, rows, kept, body.logits(store.hidden)[torch.as_tensor(rows)], out)

    def _same_layout(self) -> bool:
        """Whether rows and positions of the two sides mean the same, and the source is the other side."""
        clean, corrupt = self.setting.plan.sides
        alike = clean.ids.shape == corrupt.ids.shape and torch.equal(clean.positions, corrupt.positions)
        return alike and not self.other and self.sites.window == 1 and not self.setting.hooks

    def _turned(self, chosen: Ints, into: int, different: Different) -> Ints:
        """Cells that are cheaper seen from the source: a patch of the whole residual stream up to a token.

        Where the runs do not differ before the span, the patched run *is* the source's up to the span's end, and goes
        on as that run with this one's stream put in behind the span: fewer tokens, the same numbers.
        """
        table = self.cells.table
        mine = chosen[np.isin(table["component"].to_numpy()[chosen], ("resid_pre", "resid_post"))]
        rows_of, stops = self.setting.rows_of(into), self.setting.stops(into)
        contrast, layer = table["contrast"].to_numpy()[mine], table["layer"].to_numpy()[mine]
        component = table["component"].to_numpy()[mine]
        found = np.zeros(len(mine), dtype=bool)
        first = {}
        for k, (c, n, name) in enumerate(zip(contrast.tolist(), layer.tolist(), component.tolist(), strict=True)):
            if (c, n, name) not in first:
                rows = np.array(rows_of[c], dtype=np.int64)
                whole = np.zeros_like(rows), stops[rows]
                first[c, n, name] = int(different.narrow(name, n, rows, np.full_like(rows, -1), *whole)[0].min())
            found[k] = self.cells.start[mine[k]] <= first[c, n, name] < self.cells.stop[mine[k]]
        return mine[found]

    def _behind(self, turned: Ints) -> Cells:
        """The cells, those that are turned having the tokens behind their spans."""
        start, stop = self.cells.start.copy(), self.cells.stop.copy()
        start[turned] = self.cells.stop[turned]
        stop[turned] = int(self.setting.plan.ids(0).shape[1])
        return Cells(self.cells.table, start, stop)

    def _read(self, reader: Reader, rows: Ints, cells: Ints, logits: Tensor, out: dict[str, Any]) -> None:
        at, local = np.unique(cells, return_inverse=True)
        for name, values in reader.read(rows, local, len(at), logits).items():
            out[name][at] += values.numpy()

    def _unrun(self, run: Ints, cells: Ints, rows: Ints, into: int) -> tuple[Ints, Ints]:
        """(rows, cells) of the cells `run` that no lane stands for."""
        rows_of = self.setting.rows_of(into)
        n_rows = np.array([len(r) for r in rows_of])
        ran, count = np.unique(cells, return_counts=True)
        n_lanes = np.zeros(len(self._contrasts), dtype=np.int64)
        n_lanes[ran] = count
        short = run[n_lanes[run] < n_rows[self._contrasts[run]]]
        have = set(zip(cells.tolist(), rows.tolist(), strict=True)) if len(short) else set()
        missing = [(r, c) for c in short.tolist() for r in rows_of[self._contrasts[c]] if (c, r) not in have]
        both = np.array(missing, dtype=np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def _source(self, into: int, source: int, pattern: int | None) -> tuple[Source, Store | None, Where | None]:
        """What is put in, the store that is compared with (if any), and where other traces are read (if they are)."""
        setting, body = self.setting, self.setting.body
        if self.name in ("same_answer", "random"):
            where = partners(
                setting.context, setting.contrasts, setting.tokens, self.cells, self.sites, self.name, source
            )
            store = record(
                body, where.ids, where.lengths, torch.as_tensor(where.lengths - 1)[:, None], self.wanted,
                hooks=setting.hooks, max_tokens=setting.max_tokens,
            )  # fmt: skip
            given = Stored(store, aligned=False)
            if pattern is not None:
                raise UserError("source: patterns of another trace have other keys; give other_run or a mind.")
            return given, None, Where(where.row, where.shift, where.fits)
        if self.name in ("zero", "mean"):
            if pattern is not None:
                raise UserError("source: pattern can be patched from other_run or a mind.")
            if self.name == "zero":
                return Constant(shapes(body), setting.stores[self.here, into].hidden), None, None
            mean, place = column_means(setting, self.sites, self.cells, source)
            return mean, None, Where(place)
        label = self.there if self.other else self.here
        stored = setting.stores[label, into if self.other else source]
        given = Stored(stored)
        if pattern is not None:
            ids = setting.plan.ids(into if self.other else source)
            if self.other:
                with setting.context.minds.at(self.other):
                    given.pattern[pattern] = pattern_of(body, ids, pattern)
            else:
                given.pattern[pattern] = pattern_of(body, ids, pattern)
        return given, stored, None
