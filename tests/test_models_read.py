"""Margins against log-softmax by hand; greedy batches against one prompt at a time; tokenizers that disagree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body, site
from reasoninterp.models.minds import Minds
from reasoninterp.models.prompt import with_prompt
from reasoninterp.models.read import (
    AnswerPair,
    greedy,
    greedy_ids,
    margins,
    margins_from_logits,
    part_answers,
    plan_margins,
)
from reasoninterp.models.tokens import check_ids
from reasoninterp.traces.io import TraceFile
from reasoninterp.traces.trace import Format, Trace, encode
from tests import tiny

END = 0
TRACE = Trace("t1", "Tom has 3 apples and buys 12 more.", ("3 + 12 = 15",), "15")


@pytest.fixture(scope="module")
def minds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Minds]:
    """One mind per family."""
    root = tmp_path_factory.mktemp("read")
    return {f: Minds.load({"base": tiny.save_tiny(root / f, f)}) for f in tiny.FAMILIES}


@pytest.fixture(params=tiny.FAMILIES)
def body(request: pytest.FixtureRequest, minds: dict[str, Minds]) -> Body:
    """The body of each family."""
    return minds[request.param].body


def log_probability(body: Body, prompt: list[int], answer: list[int]) -> float:
    """Summed log-probability of `answer` after `prompt`, one token at a time and one forward for each."""
    total = 0.0
    for k, token in enumerate(answer):
        logits = body.forward(torch.tensor([prompt + answer[:k]]))[0, -1].double()
        total += float(logits[token] - torch.logsumexp(logits, 0))
    return total


def prompts_of(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 290, (3 + 2 * k,), generator=generator).tolist() for k in range(n)]


PAIRS = [
    AnswerPair([10], [11]),  # one token each
    AnswerPair([10, 12], [10, 13]),  # part in the last of two
    AnswerPair([10, 12, 14], [10, 13, 15]),  # tails of two
    AnswerPair([10], [11, 12, 13]),  # unequal lengths
    AnswerPair([10, 12], [10]),  # one begins the other: its end is read
]


def test_margins_equal_log_softmax_by_hand(body: Body) -> None:
    prompts = prompts_of(len(PAIRS))
    found = margins(body, prompts, PAIRS, end_id=END, batch_size=2)
    for i, (prompt, pair) in enumerate(zip(prompts, PAIRS, strict=True)):
        clean, corrupt = list(pair.clean), list(pair.corrupt)
        if i == 4:
            clean, corrupt = [*clean, END], [*corrupt, END]
        by_hand = [log_probability(body, prompt, a) for a in (clean, corrupt)]
        assert found.logp_clean[i].item() == pytest.approx(by_hand[0], abs=2e-4)
        assert found.logp_corrupt[i].item() == pytest.approx(by_hand[1], abs=2e-4)
        assert found.margin[i].item() == pytest.approx(by_hand[1] - by_hand[0], abs=2e-4)
        assert abs(by_hand[1] - by_hand[0]) > 1e-3
    assert float(found.logp_common[0]) == 0 and float(found.logp_common[1]) < 0
    assert torch.allclose(found.p_corrupt, found.logp_corrupt.exp()) and torch.allclose(
        found.p_clean, found.logp_clean.exp()
    )


def test_one_token_margin_is_exactly_the_logit_difference(body: Body) -> None:
    prompts = prompts_of(1)
    plan = plan_margins(prompts, [AnswerPair([10], [11])])
    assert plan.ids.shape[0] == 1  # one row serves both answers
    logits = body.forward(plan.ids, positions=plan.positions)
    m = margins_from_logits(plan, logits).margin
    assert torch.equal(m[0], logits[0, 0, 11] - logits[0, 0, 10])


def test_margins_do_not_depend_on_the_batch(body: Body) -> None:
    prompts = prompts_of(len(PAIRS))
    whole = margins(body, prompts, PAIRS, end_id=END, batch_size=8).margin
    turned = margins(body, prompts[::-1], PAIRS[::-1], end_id=END, batch_size=1).margin.flip(0)
    assert torch.allclose(whole, turned, atol=1e-4)
    assert margins(body, [], []).margin.shape == (0,)


def test_margins_are_differentiable_and_hooks_act(body: Body) -> None:
    prompts = prompts_of(len(PAIRS))
    store: list[torch.Tensor] = []

    def keep(act: torch.Tensor) -> torch.Tensor:
        store.append(act)
        return act

    name = site("resid_post", 1)
    found = margins(body, prompts, PAIRS, end_id=END, hooks=[(name, keep)], grad=True)
    (gradient,) = torch.autograd.grad(found.margin.sum(), store)
    assert gradient.abs().sum() > 0
    assert not margins(body, prompts, PAIRS, end_id=END).margin.requires_grad
    moved = margins(body, prompts, PAIRS, end_id=END, hooks=[(name, lambda a: a * 0)]).margin
    assert (moved - found.margin.detach()).abs().max() > 1e-2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_answers_part_where_they_first_differ(clean: list[int], corrupt: list[int]) -> None:
    if clean == corrupt:
        with pytest.raises(UserError, match="both"):
            part_answers(AnswerPair(clean, corrupt), END)
        return
    tails = part_answers(AnswerPair(clean, corrupt), END)
    assert tails.clean and tails.corrupt and tails.clean[0] != tails.corrupt[0]
    for tail, answer in ((tails.clean, clean), (tails.corrupt, corrupt)):
        assert [*tails.common, *tail] in (answer, [*answer, END])


def test_answers_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(UserError, match="no token ends"):
        part_answers(AnswerPair([5], [5, 6]), None)
    with pytest.raises(UserError, match="differ only in the token"):
        part_answers(AnswerPair([5], [5, END]), END)
    with pytest.raises(UserError, match="no token before the answer"):
        plan_margins([[]], [AnswerPair([5], [6])])


def test_greedy_batches_equal_one_by_one_without_a_cache(body: Body) -> None:
    prompts = prompts_of(6, seed=3)
    together = greedy_ids(body, prompts, max_new_tokens=7, batch_size=4)
    for prompt, ids in zip(prompts, together, strict=True):
        by_hand = list(prompt)
        for _ in range(7):
            by_hand.append(int(body.forward(torch.tensor([by_hand]))[0, -1].argmax()))
        assert list(ids) == by_hand[len(prompt) :]
    assert len(set(together)) > 1
    assert greedy_ids(body, prompts, max_new_tokens=1, batch_size=4) == [ids[:1] for ids in together]


def test_greedy_stops_row_by_row(body: Body) -> None:
    prompts = prompts_of(6, seed=3)
    free = greedy_ids(body, prompts, max_new_tokens=7)
    ends = [ids[k] for k, ids in enumerate(free[:3])]  # rows end after different numbers of tokens
    stopped = greedy_ids(body, prompts, max_new_tokens=7, stop_ids=ends, batch_size=6)
    for full, cut in zip(free, stopped, strict=True):
        first = next((k for k, token in enumerate(full) if token in ends), 6)
        assert cut == full[: first + 1]
    assert {len(c) for c in stopped} != {7}


def test_greedy_text_ends_before_the_stop_string(minds: dict[str, Minds]) -> None:
    pair = minds["llama"]
    tokenizer = pair.tokenizer("base")
    prompts = [encode(TRACE, tokenizer).prompt_ids, tuple(prompts_of(1)[0])]
    free = greedy(pair.body, prompts, tokenizer=tokenizer, max_new_tokens=8)
    ids = greedy_ids(pair.body, prompts, tokenizer=tokenizer, max_new_tokens=8)
    assert free == [tokenizer.decode(i[:-1] if i[-1] == END else i) for i in ids] and all(free)
    stop = free[0][2:4]
    cut = greedy(pair.body, prompts, tokenizer=tokenizer, max_new_tokens=8, stop_strings=["", stop])
    assert cut[0] == free[0][: free[0].find(stop)] and stop not in cut[0]


def test_tokenizers_that_agree_on_the_traces(tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base")
    tokenizer = tiny.tiny_tokenizer(chat=True, added=("<|tool|>",))
    tuned = tiny.save_tiny(tmp_path / "tuned", seed=1, tokenizer=tokenizer, vocab_size=len(tokenizer) + 5)
    minds = Minds.load({"base": base, "tuned": tuned})
    assert check_ids(minds, [TRACE, replace(TRACE, id="t2", answer="seven")]) == 2
    turned = Minds.load({"tuned": tuned, "base": base})
    added = replace(TRACE, id="t9", question="Use <|tool|> now.")
    with pytest.raises(UserError, match=r"'t9': token \d+ is .*(which not all minds have|for base)"):
        check_ids(turned, [TRACE, added])


def test_tokenizers_that_differ_name_the_first_trace_and_token(tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base")
    other = tiny.save_tiny(tmp_path / "other", extra="apples and apples " * 50, vocab_size=300)
    minds = Minds.load({"base": base, "tuned": other})
    fine = Trace("fine", "9", (), "9", Format("", ";", "", ":", ""))
    with pytest.raises(UserError) as caught:
        check_ids(minds, [fine, TRACE])
    text = str(caught.value)
    mine, theirs = (encode(TRACE, minds.tokenizer(n)).ids for n in minds.names)
    first = next(k for k, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    assert f"trace 't1': token {first} is" in text and "\n" not in text


def test_prompts() -> None:
    traces = [replace(TRACE, id=f"t{k}", question=f"Q{k}?") for k in range(5)]
    tokenizer = tiny.tiny_tokenizer(chat=True)
    assert with_prompt(traces, "raw", tokenizer) == traces
    file = TraceFile.of(traces, {"t0": (("x",), "1"), "t4": (("y",), "2")})
    shot = with_prompt(file, "fewshot", tokenizer, shots=2)
    assert [t.id for t in shot] == ["t2", "t3", "t4"] and set(shot.pairs) == {"t4"}
    assert all(t.text.count("Q0?") == 1 and t.text.count("Q1?") == 1 for t in shot)
    assert all(t.text.endswith(original.text) for t, original in zip(shot, traces[2:], strict=True))
    assert shot.format == shot.traces[0].format
    given = with_prompt(traces, "fewshot", tokenizer, examples=traces[:1])
    assert len(given) == 5
    chat = with_prompt(traces, "chat", tokenizer)
    assert all("<|im_start|>user\n" in t.text and "<think>" in t.text for t in chat)
    for kind, message in (("loud", "unknown prompt"), ("chat", "chat template"), ("fewshot", "leave no trace")):
        with pytest.raises(UserError, match=message):
            with_prompt(traces[:2], kind, tiny.tiny_tokenizer())
