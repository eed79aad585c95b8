"""Counts in corpora of trillions of tokens, by the infini-gram web API (Dolma, OLMo's training mixes, Pile, C4).

The ids are those of the index's own tokenizer, Llama-2's for nearly all of them, *not* those of the model under study:
a model's ids would be counted without complaint as other words.  Where no Llama-2 ids are at hand, `count_text` and
`cooccurrence_text` let the server tokenize.

1. Counts of sequences are exact.  The server counts a mark per document (65,535) as a token; it is taken off.
2. The longest suffix is found by counts alone.
3. What follows a context is exact up to 1,000 occurrences of it and sampled above.  The engine shows ends of documents as
   the tokenizer's end-of-text id, and where the first and the last follower in its order are shown alike, it takes all
   between them for the same: after the last words of a shard, for one.  So ends and that id are counted by themselves,
   and where they do not add up, what follows is marked.
4. Co-occurrence is a conjunction ("CNF") of two sequences: occurrences of the rarer one with the other at most `window`
   (1 to 1,000) tokens away, our unit `anchors`.  It is never exact: near the ends of documents the engine misses some,
   typically half at a window of 1,000 in short documents, without saying so; above 500,000 occurrences it
   extrapolates from a contiguous piece.  Other units, a whole document as the window, and a = b cannot be asked.

Source: Liu et al. (2024), "Infini-gram", arXiv:2401.17377; the server's code and documentation
(github.com/liujch1998/infini-gram, `api/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus.base import CheckedIndex, most_frequent
from reasoninterp.memorization.corpus.checks import checked_cooccurrence
from reasoninterp.memorization.corpus.interface import CorpusInfo, Count, NextTokens, SuffixMatch
from reasoninterp.memorization.corpus.web_api import Api, Malformed, flag, number

URL = "https://api.infini-gram.io/"
MAX_TOKENS = 500  # of a query
MAX_CHARACTERS = 1000  # of a query
MAX_WINDOW = 1000
MAX_SUPPORT = 1000  # occurrences of a context whose next tokens are looked at
MAX_CLAUSE_FREQ = 500_000  # occurrences of a sequence from which a co-occurrence is extrapolated
DOCUMENT_END = 65_535
_BIAS = (
    "document-edge bias: occurrences near a document's end may be missed, and a sequence that occurs more than "
    f"{MAX_CLAUSE_FREQ:,} times is sampled"
)
_TOKENIZED = "counts the server's tokenization of the text, not the text in every tokenization"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a remote index: its name, its number of ids, and its end-of-text id (which may lie beyond)."""

    tokenizer: str
    size: int
    end: int


LLAMA_2 = Vocabulary("Llama-2", 32_000, 2)


class WebIndex(CheckedIndex):
    """An index of an infini-gram server; methods as `interface.CorpusIndex` says.

    Nothing is sent unless `online`: each query shows the server the ids or the text in it.  Offline, what was asked
    before is answered from the cache.

    Args:
        index: its name, e.g. `v4_dolma-v1_7_llama`; names come and go, the server lists its own at `GET /`.
        vocabulary: whose ids it holds; None for an index whose name says llama.
        url, online, cache, timeout_s, retries, backoff_s: see `web_api.Api`.

    Raises:
        UserError: a vocabulary that is not known, or too large for a server (above 65,535 ids); see also `Api`.
    """

    def __init__(
        self,
        index: str,
        *,
        vocabulary: Vocabulary | None = None,
        url: str = URL,
        online: bool = False,
        cache: str | Path | None = None,
        timeout_s: float = 30.0,
        retries: int = 3,
        backoff_s: float = 1.0,
    ) -> None:
        if vocabulary is None:
            if "llama" not in index:
                raise UserError(f"index {index}: its name does not say whose ids it holds; give its vocabulary.")
            vocabulary = LLAMA_2
        if vocabulary.size > DOCUMENT_END:
            raise UserError(f"vocabulary of {vocabulary.size} ids: these servers hold at most {DOCUMENT_END}.")
        super().__init__(CorpusInfo(None, None, vocabulary.size, vocabulary.tokenizer, index, MAX_WINDOW))
        self._size, self._end = vocabulary.size, vocabulary.end
        self._api = Api(
            url, index, online=online, cache=cache, timeout_s=timeout_s, retries=retries, backoff_s=backoff_s
        )

    def count_text(self, text: str) -> Count:
        """Occurrences of a text as the server tokenizes it; marked as not exact, since the text may recur otherwise cut.

        Raises:
            UserError: a text without words, of more than 1,000 characters, or with the word AND or OR, which the server
                takes for an operator; and as for `count`.
        """
        return self._asked_text(_plain(text, "text"), _TOKENIZED)

    def cooccurrence_text(self, a: str, b: str, *, window: int) -> Count:
        """Anchors of two texts, as `cooccurrence` of ids; errors as for `count_text`."""
        query = f"{_plain(a, 'a')} AND {_plain(b, 'b')}"
        checked_cooccurrence(window, "anchors", MAX_WINDOW)
        return self._asked_text(query, f"{_TOKENIZED}; {_BIAS}", _limits(window))

    def close(self) -> None:
        """Close the cache; what is asked afterwards raises."""
        super().close()
        self._api.close()

    def _asked_text(self, query: str, note: str, options: dict[str, int] | None = None) -> Count:
        self._open()

        def read(reply: dict[str, Any]) -> Count:
            if not reply.get("token_ids"):
                raise Malformed("names no token_ids, so the text has none")
            return Count(number(reply, "count"), False, note)

        return self._api.ask({"query_type": "count", "query": query, **(options or {})}, read)

    def _count(self, ngram: list[int]) -> Count:
        if not ngram:
            every, ends = self._asked([]), self._asked([DOCUMENT_END])
            return Count(self._less(every.value, ends.value), every.exact and ends.exact, every.note or ends.note)
        return self._asked(ngram)

    def _less(self, every: int, ends: int) -> int:
        if ends > every:
            raise UserError(f"{self._api.url}: {ends} ends of documents among {every} tokens cannot be.")
        return every - ends

    def _asked(self, ids: list[int]) -> Count:
        def read(reply: dict[str, Any]) -> Count:
            value, sampled = number(reply, "count"), flag(reply, "approx")
            return Count(value, not sampled, "approximate, says the server" if sampled else "")

        return self._api.ask({"query_type": "count", "query_ids": _few(ids)}, read)

    def _next(self, context: list[int], limit: int | None) -> NextTokens:
        def read(reply: dict[str, Any]) -> tuple[dict[int, int], int, bool]:
            listed = reply.get("result_by_token_id")
            if not isinstance(listed, dict):
                raise Malformed("has no result_by_token_id")
            counts = {self._id(key): _occurrences(entry) for key, entry in listed.items()}
            return counts, number(reply, "prompt_cnt"), flag(reply, "approx")

        payload = {"query_type": "ntd", "query_ids": _few(context), "max_support": MAX_SUPPORT}
        counts, total, sampled = self._api.ask(payload, read)
        note = f"estimated from at most {MAX_SUPPORT:,} of the context's occurrences" if sampled else ""
        if self._end in counts:
            shown = counts.pop(self._end)
            ends = self._asked([*context, DOCUMENT_END]).value
            as_token = self._asked([*context, self._end]).value if self._end < self._size else 0
            if as_token:
                counts[self._end] = as_token
            total = self._less(total, ends)
            if shown != ends + as_token and not sampled:
                note = f"{shown - ends - as_token} of them may be the corpus' end or other ids, the engine does not say which"
        return most_frequent(counts, limit, Count(total, not note, note), complete=not note)

    def _together(self, a: list[int], b: list[int], window: int | None, unit: str) -> Count:
        if unit != "anchors" or window is None:
            raise UserError(f"unit {unit}, window {window}: this index counts anchors within 1 to {MAX_WINDOW} tokens.")
        if a == b:
            raise UserError("a and b: this index counts an occurrence as its own neighbour; give two sequences.")
        _few([*a, *b])
        payload = {"query_type": "count", "query_ids": [[a], [b]], **_limits(window)}
        return self._api.ask(payload, lambda reply: Count(number(reply, "count"), False, _BIAS))

    def _longest(self, context: list[int], followed: list[int], min_count: int) -> SuffixMatch:
        most = MAX_TOKENS - len(followed)
        match = super()._longest(context[-most:], followed, min_count)
        if match.length == most < len(context):
            raise UserError(f"context: its last {most} ids all match, and this index takes no more; give fewer ids.")
        return match

    def _id(self, key: str) -> int:
        if not key.isdecimal() or not (int(key) < self._size or int(key) == self._end):
            raise Malformed(f"names a token {key!r:.40} that is no id of {self.info.tokenizer}")
        return int(key)


def _occurrences(entry: Any) -> int:
    if not isinstance(entry, dict):
        raise Malformed(f"has {entry!r:.40} for a token")
    return number(entry, "cont_cnt")


def _limits(window: int) -> dict[str, int]:
    return {"max_diff_tokens": window, "max_clause_freq": MAX_CLAUSE_FREQ}


def _few(ids: list[int]) -> list[int]:
    if len(ids) > MAX_TOKENS:
        raise UserError(f"{len(ids)} ids in one query: this index takes at most {MAX_TOKENS}; give fewer.")
    return ids


def _plain(text: str, name: str) -> str:
    if not text.strip() or len(text) > MAX_CHARACTERS or {"AND", "OR"} & set(text.split()):
        raise UserError(
            f"{name} {text!r:.60}: give a text with words, of at most {MAX_CHARACTERS} characters and "
            "without AND or OR, which the server takes for operators."
        )
    return text
