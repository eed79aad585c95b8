"""Mean activations of columns: over all tokens of a column, in the chains of one side of every aligned contrast.

The mean is of the whole context, not of a batch, so that it does not depend on how a run was cut up; it is computed once
for each mind, side and choice of sites, and kept with the context.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.patching.cells import Cells, Sites, spans_of
from reasoninterp.patching.lanes import Ints
from reasoninterp.patching.setting import Setting
from reasoninterp.patching.sources import Constant, shapes
from reasoninterp.patching.store import SiteKey, record


def column_means(setting: Setting, sites: Sites, cells: Cells, side: int) -> tuple[Constant, Ints]:
    """The means of `side` as a source, and the place of each cell's column in it.

    Raises:
        UserError: a column that no contrast of the context has.
    """
    body = setting.body
    key = ("column_means", body.label, side, sites, tuple(id(f) for _, f in setting.hooks))
    if key not in setting.context.memo:
        setting.context.memo[key] = _means(setting, sites, side)
    orders, table = setting.context.memo[key]
    columns = cells.table[["column_index", "column"]]
    missing = columns[~columns["column_index"].isin(orders)]
    if len(missing):
        raise UserError(
            f"source='mean': no contrast of the context has the column {missing['column'].iloc[0]!r}; put these in it."
        )
    like = setting.stores[body.label, side].hidden
    return Constant(shapes(body), like, table), columns["column_index"].map(orders).to_numpy(dtype=np.int64)


def _means(setting: Setting, sites: Sites, side: int) -> tuple[dict[int, int], dict[SiteKey, Tensor]]:
    """Place of each column, by its order, and the means [column, ...] of every site."""
    context, body = setting.context, setting.body
    reference = [i.contrast for i in context.items if i.contrast is not None and i.contrast.aligned]
    keys = sites.keys(body)
    total: dict[tuple[SiteKey, int], Tensor] = {}
    count: dict[int, int] = {}
    for at in range(0, len(reference), context.rows):
        part = reference[at : at + context.rows]
        tokens = [context.encode(c.corrupt if side else c.clean) for c in part]
        lengths = np.array([t.answer.start for t in tokens])
        ids = torch.zeros(len(part), int(lengths.max()), dtype=torch.long)
        for row, t in enumerate(tokens):
            ids[row, : lengths[row]] = torch.tensor(t.prompt_ids)
        reads = torch.as_tensor(lengths - 1)[:, None]
        store = record(body, ids, lengths, reads, keys, hooks=setting.hooks, max_tokens=setting.max_tokens)
        for row, t in enumerate(tokens):
            for column in spans_of(t, sites.spans):
                count[column.order] = count.get(column.order, 0) + len(column.span)
                for key in keys:
                    summed = store.at(*key)[row, column.span.start : column.span.stop].sum(0)
                    total[key, column.order] = total.get((key, column.order), torch.zeros_like(summed)) + summed
    orders = {order: k for k, order in enumerate(sorted(count))}
    table = {key: torch.stack([total[key, o] / max(count[o], 1) for o in orders]) for key in keys if orders}
    return orders, table
