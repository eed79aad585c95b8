"""Lanes: which patched runs a sweep runs, and in which order they join on the way up.

A lane is one patched row.  It continues the run of a row (`row`) from the first token that the patch changes
(`start`) and joins the batch at layer `join`; below that, and before that token, it *is* the stored run.

`arrange` puts lanes into chunks of at most `max_tokens` tokens:

1. lanes on one stem (row and start) are sorted by the layer at which they join;
2. stems whose lanes have one length and join at the same layers form a block [lane, stem], so that the stem's keys
   and values are shared by matrix products over the block;
3. blocks are cut where they exceed `max_tokens` and packed into chunks by length.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lanes:
    """Parallel arrays over lanes: row of the run, first own token, token behind the last, layer of joining."""

    row: Ints
    start: Ints
    stop: Ints
    join: Ints

    def __len__(self) -> int:
        return len(self.row)

    @property
    def length(self) -> Ints:
        """Tokens of each lane."""
        return self.stop - self.start


class Block(NamedTuple):
    """Lanes of one length on some stems: `lanes[k, c]` is the k-th lane (by joining layer) on stem c."""

    lanes: Ints
    joins: Ints
    length: int

    @property
    def n_tokens(self) -> int:
        """Tokens once all lanes have joined."""
        return int(self.lanes.size) * self.length


def arrange(lanes: Lanes, max_tokens: int) -> list[list[Block]]:
    """Chunks of blocks; every lane is in exactly one."""
    stems: dict[tuple[int, int], list[int]] = defaultdict(list)
    order = np.lexsort((lanes.join, lanes.start, lanes.row))
    for lane, row, start in zip(order.tolist(), lanes.row[order].tolist(), lanes.start[order].tolist(), strict=True):
        stems[row, start].append(lane)
    alike: dict[tuple[int, tuple[int, ...]], list[list[int]]] = defaultdict(list)
    length = lanes.length
    for members in stems.values():
        n = int(length[members[0]])
        most = max(1, max_tokens // n)
        for at in range(0, len(members), most):
            part = members[at : at + most]
            alike[n, tuple(lanes.join[part].tolist())].append(part)
    blocks = []
    for (n, joins), found in sorted(alike.items()):
        most = max(1, max_tokens // (n * len(joins)))
        for at in range(0, len(found), most):
            blocks.append(Block(np.array(found[at : at + most]).T.copy(), np.array(joins), n))
    return _packed(blocks, max_tokens)


def _packed(blocks: list[Block], max_tokens: int) -> list[list[Block]]:
    chunks: list[list[Block]] = []
    n = 0
    for block in blocks:
        if not chunks or n + block.n_tokens > max_tokens:
            chunks.append([])
            n = 0
        chunks[-1].append(block)
        n += block.n_tokens
    return chunks


def ragged(starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """All positions of half-open ranges, and the range that each belongs to."""
    lengths = np.maximum(stops - starts, 0)
    owner = np.repeat(np.arange(len(starts)), lengths)
    before = np.cumsum(lengths) - lengths
    return owner, np.arange(int(lengths.sum())) - before[owner] + starts[owner]
