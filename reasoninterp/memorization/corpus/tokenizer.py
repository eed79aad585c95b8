"""Which tokenizer an index's ids are of: counting another tokenizer's ids is wrong in silence, so it is refused.

The identity of a tokenizer is a hash of what turns plain text into ids: its normaliser, its pre-tokenizer and its model
(vocabulary and merges).  Chat template, truncation, padding and the marks put around a text take no part.  Neither do
added tokens: a tuned model that brings some of its own still splits the corpus' text in the same way, and the ids of
those tokens are beyond the index's vocabulary, which refuses them.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.interface import CorpusInfo

_ENCODING = ("normalizer", "pre_tokenizer", "model")


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The fast Hugging Face tokenizer of a directory or a hub id.

    Raises:
        UserError: it cannot be read, or is not a fast one.
    """
    from transformers import AutoTokenizer

    from reasoninterp.models.source import quiet

    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(os.fspath(path))
    except Exception as error:  # the libraries raise whatever the file's contents lead them into
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"tokenizer {path}: none can be read here ({reason}); give its directory.") from None
    _backend(tokenizer)
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> str:
    """The identity of a tokenizer: 16 hexadecimal digits, see the module.

    Raises:
        UserError: it is not a fast one.
    """
    parts = json.loads(_backend(tokenizer).to_str())
    # Options that are off are left out: a later version of the library may have more of them.
    kept = {
        name: {k: v for k, v in (parts[name] or {}).items() if v is not None and v is not False} for name in _ENCODING
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def check_tokenizer(info: CorpusInfo, tokenizer: Any, whose: str = "the model") -> None:
    """See to it that a tokenizer's ids may be counted in an index.

    Raises:
        UserError: the index was made with another tokenizer.
    """
    if (identity := tokenizer_identity(tokenizer)) != info.tokenizer:
        raise UserError(
            f"corpus index {info.corpus}: it was built with the tokenizer {info.tokenizer}, and the tokenizer of {whose} is "
            f"{identity}; build the index with that one."
        )


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "The tokenizer is not a fast one (no tokenizer.json), so it has no identity; save it as a fast one."
        )
    return backend
