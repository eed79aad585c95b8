"""Edits change the chain, nothing else, and say what they changed."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasoninterp.errors import UserError
from reasoninterp.traces.edits import drop, filler, replace_step, shuffle, swap, truncate
from reasoninterp.traces.formats import PRESETS
from reasoninterp.traces.trace import Trace, encode

TRACE = Trace("a", "q", ("one 1", "two 22 two", "three three 3 3"), "7")


def words() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.WordLevel({"<unk>": 0, "...": 1}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>")


def test_edits_by_hand() -> None:
    other = Trace("b", "r", ("x", "y"), "8")
    cases = [
        (truncate(TRACE, 1), TRACE.steps[:1], (), (1, 2)),
        (truncate(TRACE, 0), (), (), (0, 1, 2)),
        (truncate(TRACE, 3), TRACE.steps, (), ()),
        (drop(TRACE, 1), (TRACE.steps[0], TRACE.steps[2]), (1,), (2,)),
        (replace_step(TRACE, 2, "z"), (*TRACE.steps[:2], "z"), (2,), ()),
        (swap(TRACE, other), ("x", "y"), (0, 1), (2,)),
        (filler(TRACE, start=1), (TRACE.steps[0], "...", "..."), (1, 2), ()),
    ]
    for edit, steps, changed, removed in cases:
        assert (edit.trace.steps, edit.changed, edit.removed) == (steps, changed, removed), edit.edit
        assert (edit.trace.question, edit.trace.answer, edit.trace.format) == ("q", "7", TRACE.format)


def test_token_matched_filler_has_as_many_tokens_in_every_step() -> None:
    tokenizer = words()
    filled = filler(TRACE, tokenizer).trace
    assert len(encode(filled, tokenizer).ids) == len(encode(TRACE, tokenizer).ids)
    assert [len(s) for s in encode(filled, tokenizer).steps] == [len(s) for s in encode(TRACE, tokenizer).steps]
    assert set(" ".join(filled.steps).split()) == {"..."}


def test_shuffle_is_seeded_and_never_the_same_order() -> None:
    for seed in range(20):
        moved = shuffle(TRACE, seed)
        assert moved.trace.steps != TRACE.steps and sorted(moved.trace.steps) == sorted(TRACE.steps)
        assert moved == shuffle(TRACE, seed) and moved.changed
    same = TRACE.with_steps(["s", "s"])
    assert shuffle(same, 0).trace.steps == ("s", "s") and shuffle(same, 0).changed == ()


def test_bad_arguments_are_named() -> None:
    for call, message in [
        (lambda: truncate(TRACE, 4), "k=4"),
        (lambda: drop(TRACE, 3), "no step 3"),
        (lambda: drop(TRACE, -1), "no step -1"),
        (lambda: replace_step(TRACE, 0, " "), "blank"),
        (lambda: filler(TRACE, text=" "), "blank"),
        (lambda: filler(TRACE, start=5), "no step 5"),
        (lambda: swap(TRACE, Trace("b", "q", ("s",), "1", PRESETS["boxed"])), "differently"),
    ]:
        with pytest.raises(UserError, match=message):
            call()
