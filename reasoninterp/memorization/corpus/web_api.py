"""Requests to an infini-gram API: what is sent, when it is sent again, and what counts as an answer.

The API takes a POST of JSON (`index`, `query_type`, `query_ids` or `query`, options) and answers with JSON.  An error
may come as `{"error": …}` with status 200 (the query was refused), 400 (index or query type unknown) or 500 (the server
failed), or as no JSON at all where something in between failed.

1. A request that was answered before is answered from the cache, whose key is the address, the index and all that was
   asked.
2. Else it is sent, if that was allowed: whoever makes a request shows the server the text in it.
3. Time-outs and statuses from 500 on are tried again, a few times, with pauses that double; nothing else is.
4. An answer is stored once it was read without complaint, so that no failure is ever remembered as an answer.

Source: the server's own code and documentation (github.com/liujch1998/infini-gram, `api/`).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from reasoninterp.errors import UserError

T = TypeVar("T")
_LARGEST_REPLY = 64 * 2**20  # bytes; 65,535 ids with their counts and texts are a tenth of it


class Malformed(ValueError):
    """A reply that does not say what was asked; its text completes "the reply …"."""


class Api:
    """One index of one server, with what it answered before.

    Args:
        url: the server's address.
        index: the index's name there.
        online: whether anything may be sent; else the cache alone answers.
        cache: a file for answers, made where there is none; None remembers them until `close`.
        timeout_s: seconds without a sign of life after which a request is given up.
        retries: how often it is sent again after that, or after a status from 500 on.
        backoff_s: the first pause before that; each further one is twice as long.

    Raises:
        UserError: an address that is not http(s), or a cache that cannot be opened.
    """

    def __init__(
        self,
        url: str,
        index: str,
        *,
        online: bool = False,
        cache: str | Path | None = None,
        timeout_s: float = 30.0,
        retries: int = 3,
        backoff_s: float = 1.0,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"url {url!r}: give an address that starts with https:// or http://.")
        self.url, self.index, self.online = url, index, online
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._cache = _Cache(cache)

    def ask(self, payload: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """What `read` makes of the reply to a request.

        Args:
            payload: all of the request but the index.
            read: takes the reply, raises `Malformed` where it is not what it should be.

        Raises:
            UserError: nothing may be sent and it is not in the cache; the server cannot be reached, fails, or refuses;
                or its reply is malformed.  The sentence names the request.
        """
        body = json.dumps({"index": self.index, **payload}, sort_keys=True)
        key = hashlib.sha256(f"{self.url}\n{body}".encode()).hexdigest()
        stored = self._cache.get(key)
        if stored is None and not self.online:
            raise UserError(
                f"{_short(body)}: its answer is not in the cache; "
                f"pass online=True, which sends the ids or the text of each query to {self.url}."
            )
        text = stored if stored is not None else self._send(body)
        try:
            answer = read(_parsed(text))
        except Malformed as problem:
            where = "the cache" if stored is not None else self.url
            raise UserError(f"{where}, asked {_short(body)}: the reply {problem}; no count was read.") from problem
        if stored is None:
            self._cache.put(key, text)
        return answer

    def close(self) -> None:
        """Close the cache."""
        self._cache.close()

    def _send(self, body: str) -> str:
        request = Request(self.url, data=body.encode(), headers={"Content-Type": "application/json"})
        failure = ""
        for attempt in range(1 + self._retries):
            if attempt:
                time.sleep(self._backoff_s * 2 ** (attempt - 1))
            try:
                with urlopen(request, timeout=self._timeout_s) as response:
                    return response.read(_LARGEST_REPLY).decode("utf-8", errors="replace")
            except HTTPError as error:
                failure = f"status {error.code}, {_error_in(error.read(10_000))}"
                if error.code < 500:
                    raise UserError(f"{self.url}, asked {_short(body)}: {failure}; correct the request.") from error
            except TimeoutError:
                failure = f"no answer within {self._timeout_s:g} s"
            except (OSError, HTTPException) as error:
                if not isinstance(getattr(error, "reason", None), TimeoutError):
                    raise UserError(f"{self.url}, asked {_short(body)}: {error}; is the address right?") from error
                failure = f"no connection within {self._timeout_s:g} s"
        raise UserError(
            f"{self.url}, asked {_short(body)} {1 + self._retries} times: {failure}; try later or raise the time-out."
        )


class _Cache:
    """Answers by key in one SQLite file, which several processes may use at once."""

    def __init__(self, path: str | Path | None) -> None:
        self._path = path
        self._database = self._trying(lambda: sqlite3.connect(path or ":memory:", timeout=60.0, isolation_level=None))
        self._execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        row = self._execute("SELECT reply FROM replies WHERE key = ?", key).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, reply: str) -> None:
        self._execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, reply)

    def close(self) -> None:
        self._database.close()

    def _execute(self, statement: str, *values: str) -> sqlite3.Cursor:
        return self._trying(lambda: self._database.execute(statement, values))

    def _trying(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except sqlite3.Error as error:
            raise UserError(f"cache {self._path}: {error}; give a file of its own that can be written.") from error


def number(reply: Mapping[str, Any], key: str) -> int:
    """A count in a reply.

    Raises:
        Malformed: it is missing, no integer, or negative.
    """
    value = reply.get(key)
    if type(value) is not int or value < 0:
        raise Malformed(f"has no {key} that is an integer of at least 0 ({value!r:.40})")
    return value


def flag(reply: Mapping[str, Any], key: str) -> bool:
    """A truth value in a reply.

    Raises:
        Malformed: it is missing or something else.
    """
    value = reply.get(key)
    if type(value) is not bool:
        raise Malformed(f"has no {key} that is true or false ({value!r:.40})")
    return value


def _parsed(text: str) -> dict[str, Any]:
    try:
        reply = json.loads(text)
    except ValueError:
        raise Malformed(f"is no JSON ({text!r:.60})") from None
    if not isinstance(reply, dict):
        raise Malformed(f"is no JSON object ({text!r:.60})")
    if "error" in reply:
        raise Malformed(f"is the error {reply['error']!r:.200}")
    return reply


def _error_in(data: bytes) -> str:
    """What an error's body says: the server's own sentence, or how the body starts."""
    text = data.decode("utf-8", errors="replace")
    try:
        return f"error {json.loads(text)['error']!r:.200}"
    except (ValueError, KeyError, TypeError):
        return f"{text!r:.60}"


def _short(body: str) -> str:
    return body if len(body) <= 200 else f"{body[:150]} … {body[-40:]}"
