"""Counts the bytes of tensors that are alive at once, to check a plan's by (`budget`).

Every storage that an operation makes inside the block is counted from then until nobody holds it; views are not, nor is
what an operation allocates and frees within itself.  Unlike a process' resident memory, the count is the same every time.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Counted(TorchDispatchMode):
    """`with Counted() as counted:` then `counted.peak`: the most bytes alive; `counted.now`: those alive still."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for storage in [x.untyped_storage() for x in tree_iter(out) if isinstance(x, Tensor)]:
            key = storage._cdata
            if key not in given and key not in self._alive:
                self._alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)
