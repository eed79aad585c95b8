"""Gradient checkpointing of a body: activations of one block at a time.

Inside `checkpointed(body)` each block of the network keeps nothing but its input during a forward pass with a graph;
when the backward pass reaches the block, it is computed again, with a graph, and that graph is freed as soon as the
gradient has passed (Chen et al. 2016, arXiv:1604.06174).  The second computation is the first one bit for bit, so
gradients are too.  Hooks and watched leaves see both computations; only in the second do outputs require gradients.
Memory falls from all blocks' activations to one block's and one residual stream a block; time rises by one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from reasoninterp.models.body import Body


@contextmanager
def checkpointed(body: Body, active: bool = True) -> Iterator[None]:
    """Recompute each block during the backward passes inside, instead of keeping its activations.

    Args:
        body: the network.
        active: with False, nothing changes.

    May be nested; the inner one changes nothing.
    """
    every = [block.original_component for block in body._bridge.blocks] if active else []
    blocks = [block for block in every if not getattr(block.forward, "recomputing", False)]
    for block in blocks:
        block.forward = _recomputing(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance's; the class's own is seen again


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.utils.checkpoint import checkpoint

    @wraps(forward)  # the bridge asks for the signature
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The reentrant kind, which takes no keywords: its first pass is without a graph, so that nothing a watched
        # leaf sees is kept alive by it.
        return checkpoint(lambda *a: forward(*a, **kwargs), *args, use_reentrant=True, preserve_rng_state=False)

    run.recomputing = True  # type: ignore[attr-defined]  # by which a nested `checkpointed` knows it
    return run
