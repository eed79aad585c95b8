"""The infini-gram package as `corpus.py` asks it: an index from tokens that are written beforehand, and the same questions.

What it needs so that its counts are right: one process for each 200 kB of text at most, a path without "table" in it, a
limit of open files that the system grants, and plain lists of ints.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpus_text import Corpus

_SEPARATOR = 0xFFFF
_NEXT = 10_000_000  # so many occurrences are looked at for the distribution of the next token, rather than a sample


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("infini_gram") is not None


class Infini:
    """An engine over one index."""

    def __init__(self, folder: Path) -> None:
        from infini_gram.engine import InfiniGramEngine

        depths = dict.fromkeys(("ds_prefetch_depth", "sa_prefetch_depth", "od_prefetch_depth"), 0)
        self.engine = InfiniGramEngine(str(folder), eos_token_id=0, vocab_size=65_535, token_dtype="u16", **depths)

    @classmethod
    def build(cls, corpus: Corpus, folder: Path) -> Infini:
        """Write the tokens as its indexer would, and have it sort them."""
        (folder / "empty").mkdir(parents=True)
        if "table" in str(folder):
            raise RuntimeError(f"{folder}: the engine crashes on a path with 'table' in it")
        starts = corpus.starts[:-1]
        tokens = np.insert(corpus.tokens.astype("<u2"), starts, _SEPARATOR)
        tokens.tofile(folder / "tokenized.0")
        ((starts + np.arange(len(starts))) * 2).astype("<u8").tofile(folder / "offset.0")
        options: dict[str, Any] = {
            "data_dir": folder / "empty",
            "save_dir": folder,
            "token_dtype": "u16",
            "shards": 1,
            "mem": 4,
            "cpus": max(1, min(os.cpu_count() or 1, tokens.nbytes // 200_000)),
            "ulimit": min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        }
        call = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "infini_gram.indexing", *call], capture_output=True, check=True)
        return cls(folder)

    def asks(self, queries: Any, window: int) -> dict[str, Callable[[], list[Any]]]:
        """The tasks of `corpus.Queries`."""
        engine = self.engine

        def counting(ngrams: list[list[int]]) -> Callable[[], list[Any]]:
            return lambda: [engine.count(ngram)["count"] for ngram in ngrams]

        def together(limit: int) -> list[int]:
            asked = {"max_clause_freq": limit, "max_diff_tokens": window}
            return [engine.count_cnf([[a], [b]], **asked)["count"] for a, b in queries.pairs]

        both = list(zip(queries.contexts, queries.candidates, strict=True))
        return {
            **{name: counting(ngrams) for name, ngrams in queries.counts.items()},
            "continuations, counts": lambda: [
                [engine.count([*context, one])["count"] for one in candidates] for context, candidates in both
            ],
            "continuations, next": lambda: [engine.ntd(context, max_support=_NEXT) for context, _ in both],
            "suffix": lambda: [engine.infgram_prob(context, 0)["suffix_len"] for context in queries.long],
            "together, own limit": lambda: together(50_000),
            "together, STIM": lambda: together(500_000),
        }
