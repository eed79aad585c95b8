"""Whole: a directory that appears under its name when all of it is on the disk, or never.

Until then it is called `.NAME.unfinished` and locked, so that two builders do not write to one place; what a killed one
left behind is swept up by the next.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reasoninterp.errors import UserError


@contextmanager
def appears_whole(target: Path) -> Iterator[Path]:
    """The directory to build in, empty and locked; it becomes `target` at the end, or goes where the building fails.

    Raises:
        UserError: there is something at `target`, it cannot be written, or another process is building there.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    _refuse_taken(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    except OSError as error:
        raise UserError(f"{target}: cannot write here ({error.strerror}); give another directory.") from None
    if lock is None:
        raise UserError(f"{target}: another process is building an index here; wait for it or stop it.")
    try:
        _refuse_taken(target)  # again: another process may have made it meanwhile
        for leftover in folder.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        os.rename(folder, target)
        _flush(target.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(
                f"{target}: the index cannot be built ({error}); make room there or give another directory."
            ) from None
        raise
    finally:
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a directory, made if need be; None where another process has it."""
    while True:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        # Its owner may have given the directory its name, or removed it, while it was opened here.
        if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
            return lock
        os.close(lock)


def _refuse_taken(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: there is something here already; give another directory, or remove it first.")


def _flush(path: Path) -> None:
    """Have the system write a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
