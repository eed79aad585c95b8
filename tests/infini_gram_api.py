"""A stand-in for the infini-gram web API: its requests, replies, limits and errors, over documents of ids in memory.

Written from the server's documentation and from what its code does with each request, including what a client must
mind: refusals come with status 200, a document's mark counts as a token and shows as the end-of-text id in what follows
(where it can hide other ids), and a conjunction loses occurrences near the ends of documents.  `Server.failing` makes the
next requests fail in a way of the test's choice.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MARK = 65_535  # stands before each document
Reply = tuple[int, str]  # status, body


class Refused(Exception):
    """What the server answers with `{"error": …}` and the given status."""

    def __init__(self, text: str, status: int = 200) -> None:
        super().__init__(text)
        self.status = status


class Index:
    """One index of the server: documents of ids, and words for texts (`w7` is the id 7)."""

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int, end: int) -> None:
        self.tokens = [i for document in documents for i in (MARK, *document)]
        self.vocab_size, self.end = vocab_size, end

    def answer(self, query_type: str, data: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request from which the index and the type were taken."""
        data = dict(data)
        query = data.pop("query", None)
        ids = data.pop("query_ids", None)
        if query is not None:
            if len(query) > 1000:
                raise Refused("Please limit your input to <= 1000 characters!")
            if " AND " in query or " OR " in query:
                ids = [[self._words(term) for term in clause.split(" OR ")] for clause in query.split(" AND ")]
            else:
                ids = self._words(query)
        flat = all(type(i) is int for i in ids)
        every = ids if flat else [i for clause in ids for term in clause for i in term]
        if len(every) > 500:
            raise Refused("Please limit your input to <= 500 tokens!")
        if any(i < 0 or (i >= self.vocab_size and i != MARK) for i in every):
            raise Refused("Some item(s) in your query_ids are out-of-range!")
        known: dict[str, Callable[..., dict[str, Any]]] = {
            "count": self._count if flat else self._count_cnf,
            "prob": self._prob,
            "ntd": self._ntd,
        }
        # A field that the method does not know is a TypeError there, which becomes a 500.
        reply = known[query_type](ids, **data)
        return {**reply, "latency": 0.1, "token_ids": ids, "tokens": [f"w{i}" for i in every]}

    def _words(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split() if word[:1] == "w"]

    def _starts(self, ids: list[int]) -> list[int]:
        return [p for p in range(len(self.tokens)) if self.tokens[p : p + len(ids)] == ids]

    def _count(self, ids: list[int]) -> dict[str, Any]:
        return {"count": len(self._starts(ids)), "approx": False}

    def _prob(self, ids: list[int]) -> dict[str, Any]:
        if not ids:
            raise Refused("Please provide a non-empty query!")
        prompt, cont = len(self._starts(ids[:-1])), len(self._starts(ids))
        return {"prompt_cnt": prompt, "cont_cnt": cont, "prob": cont / prompt if prompt else -1.0}

    def _ntd(self, ids: list[int], max_support: int = 1000) -> dict[str, Any]:
        if not 0 < max_support <= 1000:
            raise Refused("max_support must be an integer in [1, 1000]!")
        starts = self._starts(ids)
        unit = 1  # of so many neighbours in the order of the suffixes one is looked at, and stands for all
        while len(starts) > unit * max_support:
            unit *= 2
        # In the order of the suffixes' bytes; nothing, at the end of all documents, comes first, and a mark last.
        following = sorted(
            [self.tokens[p + len(ids) : p + len(ids) + 1] for p in starts],
            key=lambda tokens: [token.to_bytes(2, "little") for token in tokens],
        )
        counts: Counter[int] = Counter()
        self._divide([self.end if tokens in ([], [MARK]) else tokens[0] for tokens in following], unit, counts)
        entries = {
            str(token): {"cont_cnt": n, "prob": n / len(starts), "token": f"w{token}"} for token, n in counts.items()
        }
        return {"prompt_cnt": len(starts), "result_by_token_id": entries, "approx": unit > 1}

    def _divide(self, following: list[int], unit: int, counts: Counter[int]) -> None:
        """Count what follows, in halves; a part that starts and ends alike is taken to be all of that, marks or not."""
        if len(following) < 4 * unit:
            for i in range(0, len(following), unit):
                part = following[i : i + unit]
                counts[part[len(part) // 2]] += len(part)
        elif following[0] == following[-1]:
            counts[following[0]] += len(following)
        else:
            self._divide(following[: len(following) // 2], unit, counts)
            self._divide(following[len(following) // 2 :], unit, counts)

    def _count_cnf(
        self, cnf: list[list[list[int]]], max_clause_freq: int = 50_000, max_diff_tokens: int = 100
    ) -> dict[str, Any]:
        if not 0 < max_diff_tokens <= 1000:
            raise Refused("max_diff_tokens must be an integer in [1, 1000]!")
        if not 0 < max_clause_freq <= 500_000:
            raise Refused("max_clause_freq must be an integer in [1, 500000]!")
        if len(cnf) > 4:
            raise Refused("Please enter at most 4 disjunctive clauses!")
        if any(not term for clause in cnf for term in clause):
            raise Refused("cnf must be a non-empty, triply-nested list of integers in range [0, 65535]")
        places = sorted((sorted({p for term in clause for p in self._starts(term)}) for clause in cnf), key=len)
        ranges = [(p, p) for p in places[0]]
        for others in places[1:]:
            widened = []
            for low, high in ranges:
                left = max((p for p in others if p < high), default=None)
                right = min((p for p in others if p >= low), default=None)
                new_low = min(low, left) if left is not None and left >= low - max_diff_tokens else None
                new_high = max(high, right) if right is not None and right <= high + max_diff_tokens else None
                # The fault: with a neighbour on both sides only the range over both is kept, …
                if new_low is not None or new_high is not None:
                    widened.append((low if new_low is None else new_low, high if new_high is None else new_high))
            ranges = widened
        # … and one that crosses a document's end is dropped with both.
        return {"count": sum(MARK not in self.tokens[low:high] for low, high in ranges), "approx": False}


class Server:
    """The stand-in on a free port of this machine; a context manager.

    Attributes:
        url: its address.
        indexes: by name; put more in at any time.
        failing: what to answer the next requests with, first come first served: a status and a body, or None for no
            answer until `close`.
        requests: the bodies received so far.
    """

    def __init__(self) -> None:
        self.indexes: dict[str, Index] = {}
        self.failing: deque[Reply | None] = deque()
        self.requests: list[dict[str, Any]] = []
        self._released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status, body = server.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                data = body.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        # Where the machine sends requests through a proxy, not these.
        os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1"]))
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up is no error
        self.url = f"http://127.0.0.1:{self._http.server_port}/"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    def reply(self, data: dict[str, Any]) -> Reply:
        """Status and body for a request."""
        self.requests.append(dict(data))
        if self.failing:
            failure = self.failing.popleft()
            if failure is None:
                self._released.wait()
                return 500, ""
            return failure
        try:
            return 200, json.dumps(self._answer(data))
        except Refused as refusal:
            return refusal.status, json.dumps({"error": str(refusal)})
        except Exception as error:
            return 500, json.dumps({"error": f"[Flask] Internal server error: {error}"})

    def _answer(self, data: dict[str, Any]) -> dict[str, Any]:
        for key in ("index", "query_type"):
            if key not in data:
                raise Refused(f"[Flask] Missing required field: '{key}'", 400)
        name, query_type = data.pop("index"), data.pop("query_type")
        if ("query" in data) == ("query_ids" in data):
            raise Refused("[Flask] Exactly one of query and query_ids must be present!", 400)
        if name not in self.indexes:
            raise Refused(f"[Flask] Invalid index: {name}", 400)
        if query_type not in ("count", "prob", "ntd"):
            raise Refused(f"[Flask] Invalid query_type: {query_type}", 400)
        return self.indexes[name].answer(query_type, data)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
