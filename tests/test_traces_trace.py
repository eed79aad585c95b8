"""Traces and their tokens: joining gives the text back, and every token lies in exactly one part."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Format, Span, Trace, encode, iter_tokens

CORPUS = [
    "So 3 + 4 = 7 cups.\nThen 7 * 12 = 84 cups.\n#### 84\n",
    "How many cups? \\boxed{84}  end",
    "straße ☃ 🙂 é\n\n",
] * 4


def byte_level(trim: bool, *, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `trim` leaves blanks out of its offsets, as GPT-2's and Llama 3's do."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tok.train_from_iterator(CORPUS, trainer)
    pieces = [processors.ByteLevel(trim_offsets=trim)]
    if bos or eos:
        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        pieces.append(processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)]))
    tok.post_processor = processors.Sequence(pieces)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """A unigram-like BPE on blanks written as a visible mark, as SentencePiece models have it."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>")


def random_trace(draw: random.Random) -> Trace:
    def text(longest: int) -> str:
        alphabet = "ab 3.\n#é☃🙂  \t{}"
        return "".join(draw.choice(alphabet) for _ in range(draw.randrange(longest)))

    fmt = Format(text(5), text(4), draw.choice(["\n", "", " ", "\n\n", text(3)]), text(6), text(4))
    return Trace("r", text(20), tuple(text(12) for _ in range(draw.randrange(4))), text(4) + "7", fmt)


def test_parts_join_to_the_text_and_steps_know_their_characters() -> None:
    draw = random.Random(0)
    for _ in range(300):
        trace = random_trace(draw)
        parts, text = trace.parts(), trace.text
        assert "".join(p.text for p in parts) == text
        assert [p.chars.start for p in parts[1:]] == [p.chars.stop for p in parts[:-1]]
        assert all(text[p.chars.start : p.chars.stop] == p.text for p in parts)
        assert tuple(text[s.chars.start : s.chars.stop] for s in trace.step_list()) == trace.steps
        assert text == trace.prompt + trace.answer + trace.format.after_answer
        assert text.startswith(trace.question_text)


@pytest.mark.parametrize("trim", [False, True])
def test_every_token_lies_in_the_part_of_its_first_visible_character(trim: bool) -> None:
    """Oracle: the byte-level token strings themselves, laid end to end, say which bytes each token covers."""
    tokenizer, draw = byte_level(trim), random.Random(1)
    back = {v: k for k, v in _byte_alphabet().items()}
    seen = 0
    for _ in range(300):
        trace = random_trace(draw)
        try:
            encoded = encode(trace, tokenizer)
        except UserError:
            continue  # the answer's only token began in the part before it
        owner = [k for k, p in enumerate(trace.parts()) for _ in p.text.encode()]
        blank = [c.isspace() for c in trace.text for _ in c.encode()]
        order = {(p.kind, p.index): k for k, p in enumerate(trace.parts())}
        at, found = 0, {pos: order[kind, index] for pos, kind, index in iter_tokens(encoded)}
        assert sorted(found) == list(range(len(encoded.ids)))
        text = trace.text.encode()
        for position, token in enumerate(tokenizer.convert_ids_to_tokens(encoded.ids)):
            width = len(token)
            assert bytes(back[c] for c in token) == text[at : at + width]
            first = next((i for i in range(at, at + width) if not blank[i]), at)
            while text[first] & 0xC0 == 0x80:
                first -= 1  # a token that starts inside a character belongs where the character starts
            assert found[position] == owner[first]
            at += width
        assert at == len(text)
        seen += 1
    assert seen > 200


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's table of visible stand-ins for bytes, from its definition."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in keep}
    table |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in keep)}
    return table


def test_spans_partition_under_a_tokenizer_that_marks_blanks() -> None:
    tokenizer, draw = metaspace(), random.Random(2)
    for _ in range(100):
        encoded = encode(random_trace(draw).with_steps(["so", "then 3"]), tokenizer)
        places = [p for p, _, _ in iter_tokens(encoded)]
        assert places == list(range(len(encoded.ids)))


def test_a_blank_before_the_answer_goes_with_the_answer_unless_it_is_a_token_of_its_own() -> None:
    trace = Trace("a", "How many cups?", ("So 3 + 4 = 7 cups.",), "7", Format())
    for trim in (False, True):
        tokenizer = byte_level(trim)
        encoded = encode(trace, tokenizer)
        assert tokenizer.decode(encoded.answer_ids) == " 7"
        assert tokenizer.decode(encoded.prompt_ids) == trace.prompt.rstrip(" ")
        lone = encode(Trace("b", "q", ("s  ",), "7", Format(before_answer="#")), tokenizer)
        assert tokenizer.decode(lone.ids[slice(*lone.steps[0])]) == "s  "
        assert len(encoded.answer) == 1 and encoded.answer.stop == len(encoded.ids) - 1


def test_opening_token_is_added_once_and_closing_token_never() -> None:
    tokenizer = byte_level(True, bos=True, eos=True)
    plain = Trace("a", "q", ("s",), "7")
    templated = Trace("b", "q", ("s",), "7", Format(before_question="<s>"))
    for trace in (plain, templated):
        encoded = encode(trace, tokenizer)
        assert encoded.ids.count(0) == 1 and encoded.ids[0] == 0 and 1 not in encoded.ids
        assert encoded.spans["before_question", 0] == Span(0, 1)
    assert encode(plain, tokenizer).ids == encode(templated, tokenizer).ids


def test_bad_input_is_one_sentence() -> None:
    tokenizer = byte_level(True)
    with pytest.raises(UserError, match=r"'x'.*no token"):
        encode(Trace("x", "q", ("s",), ""), tokenizer)
    with pytest.raises(UserError, match="fast"):
        encode(Trace("x", "q", ("s",), "1"), object())
    with pytest.raises(UserError, match="unknown format key 'sep'"):
        Format.from_json({"sep": ""})
    with pytest.raises(UserError, match="must be a string, not int"):
        Format.from_json({"before_answer": 3})
    with pytest.raises(UserError, match="object of strings"):
        Format.from_json(["a"])


def test_digest_tells_apart_what_reaches_a_model() -> None:
    base = Trace("a", "q", ("s",), "7")
    others = [base.with_steps(["t"]), base.with_steps(["s"], answer="8"), base.with_steps(["s"], format=Format("x"))]
    assert len({base.digest(), *(t.digest() for t in others)}) == 4
    assert base.with_steps(["s"], meta={"k": 1}).digest() == base.digest()
