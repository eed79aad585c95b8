"""Sampling chains: what is written is cut into steps and answer, ends are told apart, batches do not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reasoninterp.models import sample as room
from reasoninterp.models.decode import Decoded
from reasoninterp.models.minds import Minds
from reasoninterp.models.sample import Sampled, prompt_ids, sample_chains
from reasoninterp.traces.trace import Format, Trace
from tests import tiny

GSM = Format()
ASK = Trace("q1", "Tom has 3 apples.", (), "", GSM)


@pytest.fixture(scope="module")
def minds(tmp_path_factory: pytest.TempPathFactory) -> Minds:
    """Two minds."""
    root = tmp_path_factory.mktemp("sample")
    base = tiny.save_tiny(root / "base", "llama-gqa")
    return Minds.load({"base": base, "tuned": tiny.save_tuned(base, root / "tuned")})


def written(monkeypatch: pytest.MonkeyPatch, minds: Minds, trace: Trace, text: str, budget: int = 200) -> Sampled:
    """What is made of a mind that writes `text` and then its end token."""
    tokenizer = minds.tokenizer("base")

    def decode(body: Any, prompts: Any, *, max_new_tokens: int, stop: Any, **_: Any) -> list[Decoded]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        out = []
        for row in range(len(prompts)):
            so_far: list[int] = []
            for token in [*ids, tokenizer.eos_token_id]:
                so_far.append(token)
                if stop(row, so_far) or len(so_far) == max_new_tokens:
                    break
            out.append(Decoded(tuple(so_far), stop(row, so_far)))
        return out

    monkeypatch.setattr(room, "decode", decode)
    (sample,) = sample_chains(minds.body, tokenizer, [trace], max_new_tokens=budget)
    return sample


def test_a_chain_is_cut_into_steps_and_answer(monkeypatch, minds) -> None:
    got = written(monkeypatch, minds, ASK, "3 + 12 = 15\n\n15 - 5 = 10\n#### 10\nQ: another one")
    assert (got.steps, got.answer, got.status) == (("3 + 12 = 15\n", "15 - 5 = 10"), "10", "ok")
    assert "another" not in got.text  # it stopped
    assert got.trace.format.between_steps.join(got.steps) == "3 + 12 = 15\n\n15 - 5 = 10"
    assert got.trace.meta["mind"] == "base" and got.trace.meta["prompt"] == "Tom has 3 apples.\n"
    assert got.trace.meta["sampling"]["temperature"] == 0 and got.n_tokens > 10
    assert got.trace.text.startswith("Tom has 3 apples.\n3 + 12 = 15\n\n15 - 5 = 10\n#### 10")


def test_a_chain_without_steps(monkeypatch, minds) -> None:
    got = written(monkeypatch, minds, ASK, "#### 7\n")
    assert (got.steps, got.answer, got.status) == ((), "7", "ok")


def test_a_chain_is_continued_after_given_steps(monkeypatch, minds) -> None:
    given = ASK.with_steps(["one", "two"])
    got = written(monkeypatch, minds, given, "\nthree\n#### 9")
    assert (got.steps, got.answer, got.status) == (("one", "two", "three"), "9", "ok")
    got = written(monkeypatch, minds, given, "\n#### 9\n")
    assert (got.steps, got.answer) == (("one", "two"), "9")
    assert got.trace.meta["prompt"].endswith("one\ntwo")


@pytest.mark.parametrize(
    ("text", "budget", "status"),
    [
        ("so x = 1\n", 200, "no marker"),
        ("so x = 1\nso x = 1\nso x = 1\n", 6, "too long"),
        ("so x = 1\n#### ", 200, "no answer"),
        ("so x = 1\n####", 200, "no answer"),
        ("so\n#### 1 2 3 4 5 6 7 8 9 0 1 2 3", 12, "too long"),
    ],
)
def test_ends_are_told_apart(monkeypatch, minds, text: str, budget: int, status: str) -> None:
    got = written(monkeypatch, minds, ASK, text, budget)
    assert (got.status, got.answer, got.trace.answer) == (status, None, "")


def test_think_blocks(monkeypatch, minds) -> None:
    chat = Format("", "\n<think>\n", "\n", "\n</think>\n\nThe answer is ", ".\n")
    ask = replace(ASK, format=chat)
    got = written(monkeypatch, minds, ask, "a\nb\n</think>\n\nThe answer is 3.5.\nBye")
    assert (got.steps, got.answer, got.status) == (("a", "b"), "3.5", "ok")
    assert written(monkeypatch, minds, ask, "a\nb").status == "unclosed think"
    assert written(monkeypatch, minds, ask, "a\nb\n</think>\n\nHm.").status == "no marker"
    assert written(monkeypatch, minds, ask, "a\n</think>\n\nThe answer is 4.").answer == "4"


def test_word_level_blanks(monkeypatch, tmp_path) -> None:
    """A tokenizer whose tokens have no blanks of their own, in a format of blanks."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        WordLevel(
            {w: i for i, w in enumerate(["<eos>", "<unk>", ":", "=", "1", "2", "3", "+1", "*3"])}, unk_token="<unk>"
        )
    )
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    minds = Minds.load({"base": tiny.save_tiny(tmp_path / "w", tokenizer=tokenizer)})
    words = Format("", " : ", " ", " = ", " <eos>")
    ask = Trace("w", "1 +1", (), "", words)
    assert prompt_ids(tokenizer, ask.question_text) == tuple(tokenizer("1 +1 :")["input_ids"])
    got = written(monkeypatch, minds, ask, "2 3 1 = 3")
    assert (got.steps, got.answer, got.status) == (("2", "3", "1"), "3", "ok")
    got = written(monkeypatch, minds, ask.with_steps(["2"]), "3 = 1")
    assert (got.steps, got.answer) == (("2", "3"), "1")
    assert written(monkeypatch, minds, ask, "= 3").steps == ()
    assert got.trace.text == "1 +1 : 2 3 = 1 <eos>"


def test_real_samples_do_not_depend_on_the_batch(minds) -> None:
    asked = [replace(ASK, id=f"q{k}", question="Tom has 3 apples. " * (k + 1)) for k in range(5)]
    tokenizer = minds.tokenizer("base")

    def texts(order: list[Trace], **options: Any) -> dict[str, str]:
        found = sample_chains(minds.body, tokenizer, order, max_new_tokens=12, **options)
        return {s.trace.id: s.text for s in found}

    for temperature in (0.0, 1.0):
        whole = texts(asked, temperature=temperature, batch_size=5)
        assert whole == texts(asked[::-1], temperature=temperature, batch_size=2)
        assert len(set(whole.values())) == 5
    one, two = (texts(asked, temperature=1.0, seed=s) for s in (0, 1))
    assert one != two
    many = sample_chains(minds.body, tokenizer, asked[:2], n=3, temperature=1.0, max_new_tokens=12)
    assert [s.trace.id for s in many] == ["q0#0", "q0#1", "q0#2", "q1#0", "q1#1", "q1#2"]
    assert len({s.text for s in many}) == 6
    with minds.at("tuned") as body:
        tuned = sample_chains(body, tokenizer, asked[:1], max_new_tokens=12)[0]
    assert tuned.trace.meta["mind"] == "tuned"


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0])
    generator = room._generator(0, "q", 0)
    counts = torch.bincount(torch.tensor([room._draw(logits, generator) for _ in range(4000)]), minlength=4)
    assert torch.allclose(counts / 4000, logits.softmax(-1), atol=0.03) and counts[3] == 0
