"""Which index a name on the command line means.

1. A directory: the embedded index in it (`embedded`).
2. `web:NAME`: the index NAME of the infini-gram web API (`web`), which shows the server what is asked; offline, that is
   unless `REASONINTERP_ONLINE=1`, only what was asked before is answered.

Ids are counted, so the index must be of the tokenizer that reads the traces.  Of a remote index only the name and size of
its vocabulary are known: there the size is checked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.base import CheckedIndex
from reasoninterp.memorization.corpus.tokenizer import check_tokenizer

WEB = "web:"
ONLINE = "REASONINTERP_ONLINE"


def open_index(which: str, tokenizer: Any) -> CheckedIndex:
    """The index of that name, for the ids of a tokenizer.

    Args:
        which: a directory, or `web:NAME`.
        tokenizer: the fast Hugging Face tokenizer whose ids will be asked for.

    Raises:
        UserError: there is none, it is damaged, or it is of another tokenizer.
    """
    if which.startswith(WEB):
        from reasoninterp.memorization.corpus.web import WebIndex

        index = WebIndex(which.removeprefix(WEB), online=os.environ.get(ONLINE, "") == "1")
        if tokenizer.vocab_size != index.info.vocab_size:
            raise UserError(
                f"--index {which}: it holds ids of {index.info.tokenizer} ({index.info.vocab_size}), and these minds' "
                f"tokenizer has {tokenizer.vocab_size}; give an index of their own tokenizer."
            )
        return index
    if not Path(which).is_dir():
        raise UserError(
            f"--index {which}: no such directory; make one with `reasoninterp corpus build`, or give {WEB}NAME."
        )
    from reasoninterp.memorization.corpus.embedded import EmbeddedIndex

    embedded = EmbeddedIndex(which)
    check_tokenizer(embedded.info, tokenizer)
    return embedded
