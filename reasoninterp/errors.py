"""What a user can get wrong: one sentence that names the file, line or argument, and the mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The command line prints its one sentence and exits with status 2, without a traceback."""
