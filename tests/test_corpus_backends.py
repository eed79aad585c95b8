"""The judge and the web client through the conformance suite; the engine is in `test_corpus_engine.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reasoninterp.memorization.corpus.web import Vocabulary, WebIndex
from tests.corpus_conformance import BruteForce, Conformance, Documents, Make
from tests.infini_gram_api import MARK, Index, Server


class TestTheJudge(Conformance):
    """The suite's hand-worked cases hold for what it compares with."""

    @pytest.fixture
    def make(self) -> Make:
        return BruteForce


class TestWeb(Conformance):
    """The web client, against a stand-in for the server."""

    max_vocab = 65_535
    max_window = 1000
    inexact_next = True
    inexact_units = frozenset({"documents", "pairs", "anchors"})
    builds = False
    knows_sizes = False

    @pytest.fixture
    def make(self) -> Iterator[Make]:
        with Server() as server:

            def served(documents: Documents, vocab_size: int) -> WebIndex:
                used = {i for document in documents for i in document}
                end = next(i for i in range(MARK) if i not in used)
                server.indexes["these"] = Index(documents, vocab_size, end)
                return WebIndex("these", vocabulary=Vocabulary("ids", vocab_size, end), url=server.url, online=True)

            yield served
