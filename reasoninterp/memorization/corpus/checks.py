"""What every backend refuses: ids that are none, windows and units that do not exist.

Ids arrive as lists, tuples or one-dimensional integer arrays, by the thousand and a handful at a time; so the common
case, a list of plain integers, is looked at by C code alone.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.interface import CoUnit


def checked_ids(given: Any, vocab_size: int | None, name: str = "ids") -> list[int]:
    """Token ids as a list of plain integers.

    Args:
        given: a list, a tuple or a one-dimensional array of integers.
        vocab_size: ids are below this; None where it is not known.
        name: what the argument is called, for the message.

    Raises:
        UserError: it is none of these, or an id is no integer (bools are none), negative, or not below `vocab_size`.
    """
    if type(given) is list or type(given) is tuple:
        kinds = {*map(type, given)}
        if not kinds <= {int}:
            for kind in kinds:
                if kind is bool or not issubclass(kind, int | np.integer):
                    raise UserError(f"{name}: a {kind.__name__} is no token id; give whole numbers.")
            given = [int(one) for one in given]
        ids = list(given)
        if ids:
            _check_range(min(ids), max(ids), vocab_size, name)
        return ids
    found: list[int] = checked_array(given, vocab_size, name).tolist()
    return found


def checked_array(given: Any, vocab_size: int | None, name: str = "ids") -> np.ndarray:
    """Token ids as a one-dimensional array of integers; arguments and errors as for `checked_ids`."""
    if isinstance(given, list | tuple):
        return np.array(checked_ids(list(given), vocab_size, name), dtype=np.int64)
    array = np.asarray(given)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        what = f"{array.ndim}-dimensional {array.dtype}" if isinstance(given, np.ndarray) else type(given).__name__
        raise UserError(f"{name}: {what} is no sequence of token ids; give a list of whole numbers.")
    if len(array):
        _check_range(int(array.min()), int(array.max()), vocab_size, name)
    return array


def checked_id(given: Any, vocab_size: int | None, name: str = "id") -> int:
    """One token id; errors as for `checked_ids`."""
    return checked_ids([given], vocab_size, name)[0]


def checked_positive(given: Any, name: str) -> int:
    """A whole number above 0.

    Raises:
        UserError: it is something else.
    """
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < 1:
        raise UserError(f"{name} {given!r}: give a whole number above 0.")
    return int(given)


def checked_cooccurrence(window: Any, unit: Any, max_window: int | None = None) -> int | None:
    """The window of a co-occurrence: tokens from start to start, or None for the whole document.

    Raises:
        UserError: a window below 1 or above `max_window`, or an unknown unit.
    """
    units = get_args(CoUnit)
    if unit not in units:
        raise UserError(f"unit {unit!r}: give one of {', '.join(units)}.")
    if window is None:
        return None
    window = checked_positive(window, "window")
    if max_window is not None and window > max_window:
        raise UserError(f"window {window}: this index goes up to {max_window} tokens; give a smaller one.")
    return window


def _check_range(least: int, most: int, vocab_size: int | None, name: str) -> None:
    if least < 0:
        raise UserError(f"{name}: {least} is negative and no token id; give ids from 0 on.")
    if vocab_size is not None and most >= vocab_size:
        raise UserError(
            f"{name}: {most} is not below the index's vocabulary of {vocab_size}; "
            "give ids of the tokenizer that the index was built with."
        )
