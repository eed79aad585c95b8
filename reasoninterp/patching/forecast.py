"""A sweep foreseen: its lanes, the bytes of any batch of its contrasts, and its floating-point work.  See `budget`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reasoninterp.models.context import Context
from reasoninterp.models.packed import _SCORES
from reasoninterp.patching.cells import Cells, Different, Sites, cells_of, lanes_of
from reasoninterp.patching.footprint import Group, Widths
from reasoninterp.patching.lanes import Ints, Lanes, arrange
from reasoninterp.patching.metric import SIDES, Direction, contrast_plan
from reasoninterp.patching.staircase import ENTERS_ABOVE
from reasoninterp.patching.store import SiteKey
from reasoninterp.traces.contrast import Contrast

MARGIN, MARGIN_BELOW_FLOAT32 = 1.1, 1.25  # for small tensors, and copies in float32, not counted one by one
CELL_BYTES, LANE_BYTES = 320, 150  # of the tables behind one cell and one lane, as tracemalloc found them


class Work(NamedTuple):
    """Cells, those of them that are run, patched rows, their tokens × blocks, and floating-point operations.

    `n_run` counts the cells that are not 0 from the outset.  `flops` are the sweep's, stored runs included;
    `plain_flops` those of one forward pass for each cell.
    """

    n_cells: int
    n_run: int
    n_lanes: int
    block_tokens: int
    flops: float
    plain_flops: float


class Taken(NamedTuple):
    """Bytes of stored runs, of a chunk at its peak, and of tables."""

    stored: int
    chunk: int
    tables: int


class Lane(NamedTuple):
    """Parallel arrays over the lanes of one direction: their contrast, row, tokens, joining layer, patched tokens."""

    contrast: Ints
    row: Ints
    start: Ints
    stop: Ints
    join: Ints
    entering: Ints  # tokens of the patch with which it joins, where that goes through W_O or the MLP


class Foreseen(Different):
    """Where two runs will differ, from their token ids; `unequal` is [row, pos], or None for everywhere."""

    def __init__(self, unequal: NDArray[np.bool_] | None) -> None:
        self._tables: dict[bool, tuple[Ints, Ints]] = {}
        if unequal is not None:
            for exact, found in ((True, unequal), (False, np.logical_or.accumulate(unequal, axis=1))):
                at = np.arange(found.shape[1])[None]
                last = np.maximum.accumulate(np.where(found, at, -1), axis=1)
                following = np.minimum.accumulate(np.where(found, at, found.shape[1])[:, ::-1], axis=1)[:, ::-1]
                self._tables[exact] = (following, last)

    def narrow(self, component: str, layer: int, rows: Ints, heads: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
        """As `Different.narrow`."""
        if not self._tables or component == "pattern" or not len(rows):
            return start, stop
        following, last = self._tables[layer == 0 and component in ("resid_pre", "q", "k", "v")]
        width = following.shape[1]
        first = following[rows, np.minimum(start, width - 1)]
        return np.maximum(first, start), np.minimum(last[rows, np.clip(stop - 1, 0, width - 1)] + 1, stop)


class Forecast:
    """All lanes of a sweep, and what any batch of its contrasts takes."""

    def __init__(
        self,
        context: Context,
        contrasts: Sequence[Contrast],
        sites: Sites,
        wanted: Collection[SiteKey],
        directions: tuple[Direction, ...],
        source: str,
        metrics: tuple[str, ...],
        hooked: bool,
    ) -> None:
        body = context.minds.body
        self.widths, self.sites, self.wanted, self.metrics = Widths.of(body), sites, wanted, metrics
        self.rows_plan = contrast_plan(context, contrasts)
        self.n = self.rows_plan.n
        self.other = source in context.minds.names
        self.extra_store = source in ("same_answer", "random")
        self.cells: Cells = cells_of(body, [context.encode(c.clean) for c in contrasts], sites)
        # A patch in flight (q, k, v, higher layers of a window) needs the bridge's own block, which keeps more alive.
        self.in_flight = hooked or sites.window > 1 or bool({"q", "k", "v"} & set(sites.components))
        self.owner = [np.array(self.rows_plan.owners(side)) for side in (0, 1)]
        self.stops = [plan.positions.max(1).values.numpy() + 1 for plan in self.rows_plan.sides]
        self.n_read = max(plan.positions.shape[1] for plan in self.rows_plan.sides)
        shared = self.rows_plan.ids(0).shape == self.rows_plan.ids(1).shape
        shared = shared and self.rows_plan.owners(0) == self.rows_plan.owners(1)
        parted = np.array(self.rows_plan.first_difference())[self.owner[1]]
        reads = self.rows_plan.sides[1].positions.min(1).values.numpy()
        self.first = np.minimum(parted, reads) if shared else np.zeros_like(self.stops[1])
        self.into = (0, 1) if self.other else tuple(SIDES[d].into for d in directions)
        self.n_run = 0
        self.climbs: list[tuple[int, Lane]] = []
        component, layer = (self.cells.table[c].to_numpy() for c in ("component", "layer"))
        # One way up for all, but one for each layer's patterns: they are held one layer at a time.
        together = [component != "pattern", *((component == "pattern") & (layer == n) for n in np.unique(layer))]
        for side in self.into:
            unequal = self._unequal(side) if source == "other_run" else None
            turned = np.zeros(len(component), dtype=bool)
            if unequal is not None and shared and sites.window == 1 and not hooked:
                turned = self._turned(unequal)
            self.n_run += int(turned.sum())
            self._add(side, self._behind(), turned, unequal, enters=not hooked)
            for chosen in together:
                self.n_run += self._add(side, self.cells, chosen & ~turned, unequal, enters=not hooked)
        self.n_tables = 1 if self.other else len(self.into)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(max(s.max() for s in self.stops))

    def _add(
        self, side: int, cells: Cells, chosen: NDArray[np.bool_], unequal: NDArray[np.bool_] | None, *, enters: bool
    ) -> int:
        """Note the lanes of some cells patched into a side; returns how many of the cells have any."""
        if not chosen.any():
            return 0
        rows_of: list[list[int]] = [[] for _ in range(self.n)]
        for row, owner in enumerate(self.owner[side].tolist()):
            rows_of[owner].append(row)
        work = lanes_of(
            cells, np.nonzero(chosen)[0], rows_of, self.stops[side], Foreseen(unequal), self.sites.window, enters=enters
        )
        edits, lanes = work.edits, work.lanes
        entering = np.zeros(len(lanes), dtype=np.int64)
        above = edits.enters & np.isin(edits.component, ENTERS_ABOVE)
        entering[edits.lane[above]] = (edits.stop - edits.start)[above]
        owner_of = self.owner[side][lanes.row]
        self.climbs.append((side, Lane(owner_of, lanes.row, lanes.start, lanes.stop, lanes.join, entering)))
        return len(np.unique(work.cell))

    def _turned(self, unequal: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Cells that the sweep sees from the source (`_Sweep._turned`): the whole stream, from before the runs part."""
        first = np.full(self.n, unequal.shape[1])
        np.minimum.at(first, self.owner[0], np.where(unequal.any(1), unequal.argmax(1), unequal.shape[1]))
        table = self.cells.table
        parted = first[table["contrast"].to_numpy()]
        found: NDArray[np.bool_] = (self.cells.start <= parted) & (parted < self.cells.stop)
        return found & table["component"].isin(("resid_pre", "resid_post")).to_numpy()

    def _behind(self) -> Cells:
        """The cells with the tokens behind their spans."""
        return Cells(self.cells.table, self.cells.stop, np.full_like(self.cells.stop, self.longest))

    def _unequal(self, side: int) -> NDArray[np.bool_]:
        """[row, pos]: tokens that differ from the other side's row of the same contrast."""
        mine, theirs = (self.rows_plan.ids(s).numpy() for s in (side, 1 - side))
        width = mine.shape[1]
        other = np.zeros((len(theirs), width), dtype=theirs.dtype)
        other[:, : min(width, theirs.shape[1])] = theirs[:, :width]
        first_of = np.searchsorted(self.owner[1 - side], self.owner[side])  # owners ascend
        found: NDArray[np.bool_] = mine != other[first_of]
        return found

    # ------------------------------------------------------------------ bytes

    def taken(self, batch: int, tokens: int) -> Taken:
        """What the worst batch of so many contrasts takes."""
        size = np.zeros(self.n)
        for side in (0, 1):
            np.add.at(size, self.owner[side], self.stops[side])
        worst = np.zeros(self.n, dtype=bool)
        worst[np.argsort(-size, kind="stable")[:batch]] = True
        one = [self._stored(side, worst) for side in (0, 1)]
        minds = 2 if self.other else 1
        stored = minds * sum(one) + self.extra_store * max(one)
        phases = []
        for side in (0, 1):  # while the first side is recorded, the second is not there
            missing = one[1] if side == 0 else 0
            phases.append(self._recording(side, worst, tokens) - missing)
            phases += [self._reading(side, worst), self._making_patterns(side, worst)]
        if self.extra_store:
            phases.append(max(self._recording(side, worst, tokens, whole=True) for side in (0, 1)))
        kept = self._kept(worst)
        phases += [kept + self._climbing(side, lanes, worst, tokens) for side, lanes in self.climbs]
        lanes = max((int(worst[lanes.contrast].sum()) for _, lanes in self.climbs), default=0)
        n_cells = int(worst[self.cells.table["contrast"].to_numpy()].sum())
        margin = MARGIN if self.widths.itemsize >= 4 else MARGIN_BELOW_FLOAT32
        tables = CELL_BYTES * n_cells * self.n_tables + LANE_BYTES * lanes
        return Taken(stored, int(margin * max(0, *phases)), tables)

    def _stored(self, side: int, worst: NDArray[np.bool_]) -> int:
        """A `Store` of these contrasts."""
        w = self.widths
        mine = self.stops[side][worst[self.owner[side]]]
        layers = {n + (c == "resid_post") for c, n in self.wanted if c in ("resid_pre", "resid_post")}
        sites = sum(w.site(c) for c, _ in self.wanted if c not in ("resid_pre", "resid_post"))
        per_token = 2 * w.n_layers * w.kv + len(layers) * w.d_model + sites
        ids = 2 * 8  # of this side, and of both in one batch
        return len(mine) * (int(mine.max()) * (w.itemsize * per_token + ids) + self.n_read * w.itemsize * w.d_model)

    def _recording(self, side: int, worst: NDArray[np.bool_], tokens: int, *, whole: bool = False) -> int:
        """The chunk in which a side is recorded; `whole` if it does not go on from the other side's beginning."""
        w, mine = self.widths, worst[self.owner[side]]
        first = np.zeros_like(self.stops[side]) if side == 0 or whole else self.first
        own, prefix = (self.stops[side] - first)[mine], int(first[mine].max())
        n = int(min(own.sum(), max(tokens, own.max())))
        uniform = len(set(zip(own.tolist(), first[mine].tolist(), strict=True))) == len(set(own.tolist()))
        hooked = self.in_flight or any(c not in ("resid_pre", "resid_post") for c, _ in self.wanted)
        how: dict[str, Any] = {"written": not uniform, "hooked": hooked, "prefix_rows": len(own)}
        group = Group(n, int(own.max()), int(self.stops[side][mine].max()))
        return w.block(n, group, prefix, **how) + n * w.per_token()

    def _climbing(self, side: int, lanes: Lane, worst: NDArray[np.bool_], tokens: int) -> int:
        """The chunk of lanes in which most is alive."""
        w, mine = self.widths, worst[lanes.contrast]
        if not mine.any():
            return 0
        lanes = Lane(*(x[mine] for x in lanes))
        length = lanes.stop - lanes.start
        chunk, block = _places(Lanes(lanes.row, lanes.start, lanes.stop, lanes.join), tokens)
        here = chunk * (w.n_layers + 1) + lanes.join

        def by_join(weights: Ints) -> Ints:  # [chunk, layer]
            size = (int(chunk.max()) + 1) * (w.n_layers + 1)
            summed: Ints = np.bincount(here, weights, minlength=size).astype(np.int64)
            return summed.reshape(-1, w.n_layers + 1)

        new, m = by_join(length), by_join(lanes.entering)
        alive = new.cumsum(1)
        n, n_whole, at_once = int(alive.max()), int(alive[:, -3].max()), int(np.bincount(chunk).max())
        uniform, stems = _stems(length, lanes.start, lanes.row)
        how: dict[str, Any] = {"written": not uniform, "hooked": self.in_flight, "prefix_rows": stems}
        whole = n if self.in_flight else n_whole  # a block with hooks is whole, also the last
        tokens_of = np.bincount(block, length * (self.in_flight | (lanes.join < w.n_layers - 1)))
        first = np.unique(block, return_index=True)[1]
        at = first[int(np.argmax(tokens_of * lanes.stop[first]))]
        group = Group(int(tokens_of[block[at]]), int(length[at]), int(lanes.stop[at]))
        per_patched = 4 * w.d_model + max(2 * w.d_mlp, 3 * w.q)
        if "pattern" in self.sites.components:
            per_patched += 2 * w.n_heads * self.longest
        joining = int(np.maximum(2 * alive * w.d_model, alive * w.d_model + m * per_patched).max())
        one = w.n_heads * self.n_read * self.longest
        last = n * (2 * w.d_model + 3 * w.kv) * w.itemsize + w.scores(min(at_once * one, max(one, _SCORES)))
        found = max(w.block(whole, group, int(lanes.start.max()), **how), joining * w.itemsize, last)
        found = max(found, w.logits(at_once, self.n_read, self.metrics))
        return found + n * w.per_token() + self._patterns(side, worst)

    def _reading(self, side: int, worst: NDArray[np.bool_]) -> int:
        """The unpatched runs' logits, which are made twice."""
        w, rows = self.widths, int(worst[self.owner[side]].sum())
        once_more = rows * self.n_read * w.n_vocab * w.itemsize
        return w.logits(rows, self.n_read, self.metrics) + once_more + self._kept(worst)

    def _kept(self, worst: NDArray[np.bool_]) -> int:
        """Log-probabilities of the unpatched runs, against which `kl` is read."""
        return 2 * int(worst.sum()) * self.widths.n_vocab * 4 if "kl" in self.metrics else 0

    def _patterns(self, side: int, worst: NDArray[np.bool_]) -> int:
        """Attention patterns of one layer, and the network's own forward pass in which some rows' are made."""
        w, width = self.widths, self.longest
        if "pattern" not in self.sites.components:
            return 0
        rows = int(worst[self.owner[side]].sum())
        return rows * w.n_heads * width**2 * w.itemsize

    def _making_patterns(self, side: int, worst: NDArray[np.bool_]) -> int:
        """The network's own forward pass, of some rows, from which patterns are taken."""
        w, width = self.widths, self.longest
        if "pattern" not in self.sites.components:
            return 0
        rows = min(8, int(worst[self.owner[side]].sum()))
        block = w.block(rows * width, Group(rows * width, width, width), 0, written=False, hooked=True, prefix_rows=0)
        return self._patterns(side, worst) + block + 4 * rows * w.n_heads * width**2 * w.itemsize

    # ------------------------------------------------------------------ work

    def work(self) -> Work:
        """The work of all contrasts together."""
        w, layers = self.widths, self.widths.n_layers
        read = 2 * w.d_model * w.n_vocab * self.n_read
        keys_values = 4 * w.d_model * w.kv
        n_lanes, block_tokens, flops, plain = 0, 0, 0.0, 0.0
        whole_run = []  # of a row, by side
        for side, stops in enumerate(self.stops):
            first = self.first if side == 1 else np.zeros_like(stops)
            flops += float((layers * ((stops - first) * w.token_flops() + w.score_flops(first, stops)) + read).sum())
            row = layers * (stops * w.token_flops() + w.score_flops(0, stops)) + read
            whole_run.append(np.bincount(self.owner[side], row, minlength=self.n))
        flops *= 2 if self.other else 1
        for side in self.into:
            plain += float(whole_run[side][self.cells.table["contrast"].to_numpy()].sum())
        for _, lanes in self.climbs:
            length = lanes.stop - lanes.start
            n_lanes += len(length)
            block_tokens += int((length * (layers - lanes.join)).sum())
            below = np.maximum(layers - 1 - lanes.join, 0)
            last = (lanes.join < layers) * (length * keys_values + self.n_read * (w.token_flops() - keys_values))
            flops += float((below * (length * w.token_flops() + w.score_flops(lanes.start, lanes.stop)) + last).sum())
            flops += float(len(length) * read)
        return Work(len(self.cells.table) * self.n_tables, self.n_run, n_lanes, block_tokens, flops, plain)


def _places(lanes: Lanes, tokens: int) -> tuple[Ints, Ints]:
    """The chunk that each lane runs in, and its block, counted through all chunks."""
    chunk, block = np.zeros((2, len(lanes)), dtype=np.int64)
    n = 0
    for k, blocks in enumerate(arrange(lanes, tokens)):
        for found in blocks:
            chunk[found.lanes], block[found.lanes] = k, n
            n += 1
    return chunk, block


def _stems(length: Ints, start: Ints, row: Ints) -> tuple[bool, int]:
    """Whether lanes of one length start at one token; and most stems of one length that are not rows in a sequence."""
    stems = np.unique(np.stack([length, start, row]), axis=1)
    uniform, most = True, 0
    for n in np.unique(stems[0]):
        _, starts, rows = stems[:, stems[0] == n]
        uniform &= bool((starts == starts[0]).all())
        if len(rows) != rows.max() - rows.min() + 1:
            most = max(most, len(rows))
    return uniform, most
