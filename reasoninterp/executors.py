"""Where batches are measured: in this process, or in several that each load their own context.

Cells that share a group (a mind) are measured together; the group is entered once.  Out of memory halves the batch, asks
the context to shrink, and goes on.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from reasoninterp.errors import UserError
from reasoninterp.keys import source_file
from reasoninterp.study import Batch, Row, Study, load_module


@runtime_checkable
class Executor(Protocol):
    """Where batches are measured."""

    def run(self, work: Iterable[Batch], study: Study, context: Any) -> Iterator[tuple[Batch, list[Row], float]]:
        """Finished batches with their rows and seconds, in any order."""


class SerialExecutor:
    """Measures in this process, one group after the other."""

    def run(self, work: Iterable[Batch], study: Study, context: Any) -> Iterator[tuple[Batch, list[Row], float]]:
        """Finished batches with their rows and seconds, in order."""
        pending = list(work)
        size = max((len(b) for b in pending), default=1)
        while pending:
            group = pending[0].group
            with nullcontext() if group is None or group == "" else context.open(group):
                while pending and pending[0].group == group:
                    batch = pending.pop(0)
                    if len(batch) > size:
                        pending[:0] = [Batch(batch[i : i + size]) for i in range(0, len(batch), size)]
                        continue
                    began, rows = time.perf_counter(), None
                    try:
                        rows = list(study.measure(context, batch))
                    except Exception as error:
                        # A single cell is tried again for as long as the context can make do with less.
                        if not is_out_of_memory(error) or (len(batch) == 1 and not context.shrink()):
                            raise
                    if rows is None:  # here, not in the handler: the traceback holds on to what filled the memory
                        if len(batch) > 1:
                            context.shrink()
                        size = max(1, len(batch) // 2)
                        pending.insert(0, batch)
                        continue
                    yield batch, rows, time.perf_counter() - began


class ProcessExecutor:
    """Measures in several processes; each loads its own context from a picklable recipe.

    Args:
        workers: how many processes.
        recipe: a picklable callable that makes the context (a `ContextSpec`'s `load`).
    """

    def __init__(self, workers: int, recipe: Callable[[], Any]) -> None:
        self.workers = workers
        self.recipe = recipe

    def run(self, work: Iterable[Batch], study: Study, context: Any) -> Iterator[tuple[Batch, list[Row], float]]:
        """Finished batches with their rows and seconds, as they come."""
        from concurrent.futures import ProcessPoolExecutor, as_completed
        from multiprocessing import get_context

        cls, home = type(study), source_file(type(study))
        if home is None or "<locals>" in cls.__qualname__:
            raise UserError(f"study {study.name!r}: other processes cannot import it; define it at the top of a file.")
        spec = (cls.__module__, home, cls.__qualname__, study.parameters())
        with ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=_start_worker, initargs=(self.recipe, spec)
        ) as pool:
            try:
                for done in as_completed([pool.submit(_work, batch) for batch in work]):
                    yield from done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # else all that is queued is measured, and lost
                raise


_WORKER: dict[str, Any] = {}


def _start_worker(recipe: Callable[[], Any], spec: tuple[str, Path, str, dict[str, Any]]) -> None:
    name, path, cls, parameters = spec
    try:
        module = importlib.import_module(name)  # under its own name, so that items are of the study's own classes
    except ImportError:
        module = load_module(path)
    _WORKER["study"] = attrgetter(cls)(module)(**parameters)
    _WORKER["context"] = recipe()


def _work(batch: Batch) -> list[tuple[Batch, list[Row], float]]:
    return list(SerialExecutor().run([batch], _WORKER["study"], _WORKER["context"]))


_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on an accelerator."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)
