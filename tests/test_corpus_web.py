"""The web client against the stand-in: what is sent and when, failures of every kind, and what is marked as not exact."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reasoninterp.errors import UserError
from reasoninterp.memorization.corpus import web_api
from reasoninterp.memorization.corpus.interface import Count, NextTokens, SuffixMatch
from reasoninterp.memorization.corpus.web import LLAMA_2, Vocabulary, WebIndex
from tests.infini_gram_api import Index, Server

DOCUMENTS = [[1, 1, 1, 2], [3, 1, 2], [], [1], [2, 1, 2, 1, 2]]
FAILED = (500, '{"error": "[Flask] Internal server error: oh"}')

Open = Callable[..., WebIndex]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        running.indexes["these"] = Index(DOCUMENTS, 5, end=0)
        yield running


@pytest.fixture
def opened(server: Server) -> Open:
    def open_index(index: str = "these", **given: Any) -> WebIndex:
        options = {"vocabulary": Vocabulary("ids", 5, 0), "url": server.url, "online": True, "backoff_s": 0.0}
        return WebIndex(index, **{**options, **given})

    return open_index


# ---------------------------------------------------------------------------------------------- what is sent


def test_nothing_is_sent_unless_allowed(server: Server) -> None:
    index = WebIndex("these", vocabulary=Vocabulary("ids", 5, 0), url=server.url)
    for ask in (
        lambda: index.count([1]),
        lambda: index.next_token_counts([1]),
        lambda: index.cooccurrence([1], [2], window=3, unit="anchors"),
        lambda: index.count_text("w1"),
    ):
        with pytest.raises(UserError, match="online=True"):
            ask()
    assert server.requests == []


def test_requests_are_of_the_servers_format(server: Server, opened: Open) -> None:
    index = opened()
    index.count([1, 2])
    index.cooccurrence([1], [2, 1], window=7, unit="anchors")
    index.next_token_counts([3])
    index.count_text("w1 w2")
    index.cooccurrence_text("w1", "w2 w1", window=7)
    assert server.requests == [
        {"index": "these", "query_type": "count", "query_ids": [1, 2]},
        {
            "index": "these",
            "query_type": "count",
            "query_ids": [[[1]], [[2, 1]]],
            "max_clause_freq": 500_000,
            "max_diff_tokens": 7,
        },
        {"index": "these", "query_type": "ntd", "query_ids": [3], "max_support": 1000},
        {"index": "these", "query_type": "count", "query": "w1 w2"},
        {
            "index": "these",
            "query_type": "count",
            "query": "w1 AND w2 w1",
            "max_clause_freq": 500_000,
            "max_diff_tokens": 7,
        },
    ]


def test_what_was_asked_before_is_answered_from_the_cache_also_offline(
    server: Server, opened: Open, tmp_path: Path
) -> None:
    cache = tmp_path / "replies.sqlite"
    first = opened(cache=cache)
    asked = first.count([1, 2]), first.next_token_counts([1]), first.longest_suffix([3, 1, 2])
    assert asked == (Count(4), NextTokens({2: 4, 1: 2}, Count(6)), SuffixMatch(3, Count(1)))
    n = len(server.requests)
    assert first.count([1, 2]) == Count(4)
    first.close()
    again = opened(cache=cache, online=False)
    assert (again.count([1, 2]), again.next_token_counts([1]), again.longest_suffix([3, 1, 2])) == asked
    assert len(server.requests) == n > 0
    with pytest.raises(UserError, match="cache"):
        again.count([2, 1, 2])


def test_the_cache_keeps_indexes_addresses_and_options_apart(server: Server, opened: Open, tmp_path: Path) -> None:
    cache = tmp_path / "replies.sqlite"
    server.indexes["others"] = Index([[1, 0, 0, 0, 2]], 5, end=4)
    assert opened(cache=cache).count([1]) == Count(7)
    assert opened("others", cache=cache).count([1]) == Count(1)
    found = [opened("others", cache=cache).cooccurrence([1], [2], window=w, unit="anchors").value for w in (3, 4)]
    assert found == [0, 1]
    with pytest.raises(UserError, match="cache"):
        opened(cache=cache, online=False, url=server.url + "elsewhere").count([1])


def test_a_file_that_is_no_cache_is_refused(opened: Open, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("some notes of mine " * 1000)
    with pytest.raises(UserError, match=r"notes\.txt"):
        opened(cache=other)
    assert other.read_text().startswith("some notes")
    with pytest.raises(UserError, match="cache"):
        opened(cache=tmp_path / "missing" / "replies.sqlite")


# ---------------------------------------------------------------------------------------------- failures


def test_failures_of_the_server_are_tried_again_with_longer_and_longer_pauses(
    server: Server, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(web_api.time, "sleep", pauses.append)
    server.failing.extend([FAILED, (503, "<html>busy</html>"), FAILED])
    assert opened(backoff_s=0.5).count([1, 2]) == Count(4)
    assert pauses == [0.5, 1.0, 2.0]
    assert len(server.requests) == 4


def test_they_are_tried_so_often_and_no_more_and_not_remembered(server: Server, opened: Open) -> None:
    server.failing.extend([FAILED] * 3)
    index = opened(retries=2)
    with pytest.raises(UserError, match=r"3 times.*500.*oh") as caught:
        index.count([1, 2])
    assert '"query_ids": [1, 2]' in str(caught.value)
    assert len(server.requests) == 3
    assert index.count([1, 2]) == Count(4)  # the server is back


def test_an_answer_that_does_not_come_is_given_up_and_asked_for_again(server: Server, opened: Open) -> None:
    server.failing.extend([None, None])
    assert opened(timeout_s=0.2, retries=2).count([1, 2]) == Count(4)
    assert len(server.requests) == 3
    server.failing.extend([None, None])
    with pytest.raises(UserError, match=r"2 times: no answer within 0\.2 s"):
        opened(timeout_s=0.2, retries=1).count([1, 2])


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, '{"error": "Some item(s) in your query_ids are out-of-range!"}'), "out-of-range"),
        ((400, '{"error": "[Flask] Invalid index: these"}'), "Invalid index"),
        ((404, "<html>no such page</html>"), "404"),
        ((429, "slower, please"), "slower"),
        ((200, "<html><body>We moved.</body></html>"), "no JSON"),
        ((200, ""), "no JSON"),
        ((200, '{"count": 4, "approx": fal'), "no JSON"),
        ((200, "[4]"), "no JSON object"),
        ((200, "null"), "no JSON object"),
        ((200, '{"approx": false}'), "no count"),
        ((200, '{"count": null, "approx": false}'), "no count"),
        ((200, '{"count": -1, "approx": false}'), "no count"),
        ((200, '{"count": "4", "approx": false}'), "no count"),
        ((200, '{"count": 4.0, "approx": false}'), "no count"),
        ((200, '{"count": NaN, "approx": false}'), "no count"),
        ((200, '{"count": true, "approx": false}'), "no count"),
        ((200, '{"count": 4}'), "no approx"),
        ((200, '{"count": 4, "approx": 0}'), "no approx"),
    ],
    ids=str,
)
def test_a_reply_that_is_no_count_raises_at_once_and_names_the_request(
    server: Server, opened: Open, reply: tuple[int, str], said: str
) -> None:
    server.failing.append(reply)
    index = opened()
    with pytest.raises(UserError, match=said) as caught:
        index.count([1, 2])
    assert '"query_ids": [1, 2]' in str(caught.value)
    assert server.url in str(caught.value)
    assert len(server.requests) == 1
    assert index.count([1, 2]) == Count(4)  # it was not stored


@pytest.mark.parametrize(
    "listed",
    [
        None,
        [],
        {"x": {"cont_cnt": 1}},
        {"-1": {"cont_cnt": 1}},
        {"5": {"cont_cnt": 1}},
        {"1": 1},
        {"1": {"cont_cnt": -1}},
    ],
    ids=str,
)
def test_next_tokens_that_are_none_raise(server: Server, opened: Open, listed: Any) -> None:
    server.failing.append((200, json.dumps({"prompt_cnt": 1, "approx": False, "result_by_token_id": listed})))
    with pytest.raises(UserError, match="the reply"):
        opened().next_token_counts([1])


def test_a_server_that_is_not_there_is_said_at_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_api.time, "sleep", lambda _: pytest.fail("tried again"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(UserError, match="127"):
            opened(url=url).count([1])


def test_only_web_addresses_are_taken(opened: Open, tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/reply.json", "api.infini-gram.io", ""):
        with pytest.raises(UserError, match="https"):
            opened(url=url)


def test_an_unknown_index_is_the_servers_error(opened: Open) -> None:
    with pytest.raises(UserError, match="Invalid index: missing"):
        opened("missing").count([1])


# ---------------------------------------------------------------------------------------------- what is marked, refused


def test_whose_ids_they_are_must_be_known() -> None:
    assert WebIndex("v4_dolma-v1_7_llama").info.tokenizer == LLAMA_2.tokenizer == "Llama-2"
    assert WebIndex("v4_rpj_llama_s4").info.vocab_size == 32_000
    with pytest.raises(UserError, match="vocabulary"):
        WebIndex("v4_pileval_gpt2")
    assert WebIndex("v4_pileval_gpt2", vocabulary=Vocabulary("GPT-2", 50_257, 50_256)).info.tokenizer == "GPT-2"


def test_a_count_that_the_server_calls_approximate_is_marked(server: Server, opened: Open) -> None:
    server.failing.append((200, '{"count": 4, "approx": true}'))
    found = opened().count([1, 2])
    assert (found.value, found.exact) == (4, False)
    assert "approximate" in found.note


def test_the_neighbour_in_the_document_before_that_hides_one_is_not_passed_off_as_exact(
    server: Server, opened: Open
) -> None:
    server.indexes["edge"] = Index([[2], [1, 2]], 5, end=0)
    wide, narrow = (opened("edge").cooccurrence([1], [2], window=w, unit="anchors") for w in (1000, 1))
    assert (wide.value, narrow.value) == (0, 1)  # there is one: the server's fault, which the stand-in has too
    assert not wide.exact
    assert not narrow.exact
    assert "document-edge bias" in wide.note


@pytest.mark.parametrize(
    "asked",
    [
        {"unit": "documents"},
        {"unit": "pairs", "window": 3},
        {"unit": "anchors"},  # no window
        {"unit": "anchors", "window": 3, "b": [1]},  # an occurrence beside itself
        {"unit": "anchors", "window": 3, "b": [2] * 500},
    ],
    ids=str,
)
def test_other_cooccurrences_are_not_sent(server: Server, opened: Open, asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="this index"):
        opened().cooccurrence([1], asked.pop("b", [2]), **asked)
    assert server.requests == []


def test_what_follows_a_frequent_context_is_marked_as_sampled(server: Server, opened: Open) -> None:
    server.indexes["many"] = Index([[1, 2, 1, 3]] * 1000, 5, end=0)
    found = opened("many").next_token_counts([1])
    assert not found.total.exact
    assert not found.complete
    assert "1,000" in found.total.note
    assert found.counts.keys() == {2, 3}
    exact = opened("many").next_token_counts([1, 2])
    assert exact == NextTokens({1: 1000}, Count(1000), True)
    assert opened("many").continuation_counts([1], [2, 3]) == [Count(1000), Count(1000)]  # counts are never sampled


def test_an_end_of_text_id_is_told_from_ends_of_documents(server: Server, opened: Open) -> None:
    # After 1: 3 (here both a word and the end-of-text id) twice, 2, and the end of (0).
    server.indexes["ends"] = Index([[1, 3, 1], [2, 1, 3, 1, 2]], 5, end=3)
    index = opened("ends", vocabulary=Vocabulary("ids", 5, 3))
    assert index.next_token_counts([1]) == NextTokens({3: 2, 2: 1}, Count(3), True)


@pytest.mark.parametrize("as_token", [[], [1, 0]], ids=["no word", "a word"])
def test_ids_that_the_engine_takes_for_ends_of_documents_are_not_passed_over(
    server: Server, opened: Open, as_token: list[int]
) -> None:
    # After 1 come 2, 2, 3, 3, the end of (0) and that of all, which sort last and first and look alike: the engine says
    # that all six are 0.
    server.indexes["ends"] = Index([[*as_token, 1, 2, 1, 2, 1], [1, 3, 1, 3, 1]], 5, end=0)
    index = opened("ends")
    found = index.next_token_counts([1])
    assert found.counts == ({0: 1} if as_token else {})
    assert (found.total.value, found.total.exact) == (6 if as_token else 5, False)  # with the end of all
    assert "5 of them" in found.total.note
    assert not found.complete
    assert index.continuation_counts([1], [2, 3, 0]) == [Count(2), Count(2), Count(len(as_token) // 2)]


def test_queries_of_more_ids_than_the_server_takes_are_not_sent(server: Server, opened: Open) -> None:
    index = opened()
    with pytest.raises(UserError, match="500"):
        index.count([1] * 501)
    with pytest.raises(UserError, match="500"):
        index.next_token_counts([1] * 501)
    assert server.requests == []
    assert index.count([1] * 500) == Count(0)
    # The end of a longer context is what its longest suffix is looked for in, unless all of it matches.
    assert index.longest_suffix([4] * 600 + [3, 1, 2]) == SuffixMatch(3, Count(1))
    server.indexes["long"] = Index([[1] * 700], 5, end=0)
    assert opened("long").longest_suffix([1] * 500) == SuffixMatch(500, Count(201))
    for asked in ({}, {"last": 1}):
        with pytest.raises(UserError, match="all match"):
            opened("long").longest_suffix([1] * 600, **asked)


def test_texts_are_counted_as_the_server_cuts_them(opened: Open) -> None:
    index = opened()
    found = index.count_text("w1 w2")
    assert (found.value, found.exact) == (4, False)
    assert "tokenization" in found.note
    both = index.cooccurrence_text("w1", "w2", window=1)
    assert (both.value, both.exact) == (5, False)
    assert "document-edge bias" in both.note


@pytest.mark.parametrize("text", ["", "  ", "w1 AND w2", "w1 OR w2", "OR w1", "w1 AND", "w1 " * 400])
def test_texts_that_would_be_taken_for_something_else_are_not_sent(server: Server, opened: Open, text: str) -> None:
    index = opened()
    for ask in (
        lambda: index.count_text(text),
        lambda: index.cooccurrence_text(text, "w1", window=5),
        lambda: index.cooccurrence_text("w1", text, window=5),
    ):
        with pytest.raises(UserError, match="text"):
            ask()
    assert server.requests == []


def test_a_text_without_a_single_token_is_not_counted_as_everything(opened: Open) -> None:
    index = opened()
    with pytest.raises(UserError, match="token_ids"):
        index.count_text("?")  # no word of the stand-in's: the server counts the empty sequence
    with pytest.raises(UserError, match="cnf"):
        index.cooccurrence_text("w1", "?", window=5)
    with pytest.raises(UserError, match="window"):
        index.cooccurrence_text("w1", "w2", window=1001)
    index.close()
    with pytest.raises(UserError, match="closed"):
        index.count_text("w1")
