"""Organisms with planted sources: the language against what its tokens say, and a tiny one trained, refused and cached."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax

from reasoninterp.errors import UserError
from reasoninterp.memorization.alternatives import chain_places
from reasoninterp.organisms.recipes import RecipeFailed
from reasoninterp.organisms.sourced import Size, Sourced, make_sourced, tokenizer_of
from reasoninterp.organisms.sourced_world import (
    DESIGNS,
    FIRST,
    KINDS,
    LENGTH,
    N_WORDS,
    QUESTION,
    REACH,
    WORDS_AT,
    Documents,
    Lexicon,
    World,
)
from reasoninterp.traces.io import read_traces
from reasoninterp.traces.trace import encode

FEW = Lexicon(cues=6, openers=4, mixed=3, fillers=5, spread=2.0)
TINY = Size(FEW, documents=12_800, lr=1e-2, width=48, held_out=64, most_left=0.6)


@pytest.fixture(scope="module")
def world() -> World:
    return World(FEW, 3)


@pytest.fixture(scope="module")
def drawn(world: World) -> Documents:
    return world.draw(np.random.default_rng(0), 20_000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "organisms"


@pytest.fixture(scope="module")
def organism(cache: Path) -> Sourced:
    return make_sourced(1, TINY, cache)


def read_off(world: World, tokens: list[str], step: int, kind: str) -> Any:
    """Log-probabilities of a word from the tokens of its document alone."""
    cue = {
        source: world.cue_odds[next(int(t[1:]) for t in tokens[span] if t[0] == "c")]
        for source, span in (("long", QUESTION), ("mid", FIRST))
    }
    before = tokens[WORDS_AT[step] - 1]
    offset = {"local": 0, "local+long": FEW.openers, "local+mid": FEW.openers + FEW.mixed}
    letter = {"local": "o", "local+long": "ol", "local+mid": "om"}
    parts = []
    for source in kind.split("+"):
        if source == "local":
            number = before.removeprefix(letter[kind])
            parts.append(world.opener_odds[offset[kind] + int(number)])
        elif source == "none":
            parts.append(world.step_odds[step])
        else:
            parts.append(cue[source])
    return log_softmax(sum(parts) / len(parts) ** 0.5)


def test_what_is_planted_can_be_read_off_the_tokens(world: World, drawn: Documents) -> None:
    seen = set()
    for ids, kinds, log_probs in list(zip(*drawn, strict=True))[:300]:
        tokens = [world.vocabulary[i] for i in ids]
        for step, code in enumerate(kinds[:-1]):
            kind = KINDS[code]
            seen.add(kind)
            assert np.allclose(log_probs[step], read_off(world, tokens, step, kind))
        assert KINDS[kinds[-1]] == "copy"
        assert tokens[WORDS_AT[-1]] == tokens[WORDS_AT[0]]
    assert seen == {*KINDS} - {"copy"}


def test_words_are_drawn_as_planted(drawn: Documents) -> None:
    words, planted = drawn.ids[:, WORDS_AT[:-1]], np.exp(drawn.log_probs)
    favourite = planted.argmax(-1)
    looked_at = 0
    for code in range(len(KINDS) - 1):
        for word in range(N_WORDS):
            at = (drawn.kinds[:, :-1] == code) & (favourite == word)
            p = planted[at]
            if len(p) < 200:
                continue
            often = p.sum(0) >= 10
            found = np.bincount(words[at], minlength=N_WORDS)[often]
            error = np.sqrt((p * (1 - p)).sum(0)[often])
            assert np.abs((found - p.sum(0)[often]) / error).max() < 5
            assert np.abs((found - len(p) / N_WORDS) / error).max() > 5  # there is something to tell apart
            looked_at += 1
    assert looked_at > 20


def test_tables_leave_all_words_equally_frequent(world: World) -> None:
    starts = (0, FEW.openers, FEW.openers + FEW.mixed)
    classes = [world.opener_odds[a:b] for a, b in zip(starts, (*starts[1:], None), strict=True)]
    for odds in (world.cue_odds, world.step_odds, *classes):
        probs = np.exp(log_softmax(odds, axis=1))
        assert np.allclose(probs.mean(0), 1 / N_WORDS)
        assert probs.std(0).min() > 0.005


def test_cues_stand_out_of_reach_and_everywhere_in_their_parts(world: World, drawn: Documents) -> None:
    cue = (drawn.ids >= world.id["c0"]) & (drawn.ids < world.id["c0"] + FEW.cues)
    for at in WORDS_AT:
        assert not cue[:, at - REACH : at].any()
    inside = np.zeros(LENGTH, dtype=bool)
    inside[QUESTION] = inside[FIRST] = True
    assert np.array_equal(cue.any(0), inside)
    assert (cue[:, QUESTION].sum(1) == 1).all()
    assert (cue[:, FIRST].sum(1) == 1).all()


def test_only_the_place_tells_the_cues_apart(world: World, drawn: Documents) -> None:
    plain = np.array([not any("+" in KINDS[k] for k in kinds) for kinds in drawn.kinds])
    counts = [
        np.bincount(drawn.ids[plain, span].ravel(), minlength=len(world.vocabulary)) for span in (QUESTION, FIRST)
    ]
    asked, first = (c[world.id["c0"] : world.id["c0"] + FEW.cues] for c in counts)
    assert asked.sum() == first.sum() == plain.sum()
    assert (np.abs(asked - first) < 5 * np.sqrt(asked + first)).all()


def test_a_topic_speaks_once_in_a_document(drawn: Documents) -> None:
    share = {design: 0 for _, design in DESIGNS}
    for kinds in drawn.kinds:
        names = [KINDS[k] for k in kinds[:-1]]
        for source in ("long", "mid"):
            assert sum(source in name.split("+") for name in names) == 1
        share[next(d for d in share if sorted(d) == sorted(names))] += 1
    for p, design in DESIGNS:
        assert abs(share[design] / len(drawn.kinds) - p) < 5 * (p * (1 - p) / len(drawn.kinds)) ** 0.5


def test_sources_of_a_mixture_agree(world: World, drawn: Documents) -> None:
    first = world.id["c0"]

    def topics(span: slice, at: Any) -> Any:
        ids = drawn.ids[at, span]
        return world.cue_odds[ids[(ids >= first) & (ids < first + FEW.cues)] - first]

    def agreement(at: Any) -> float:
        pairs = zip(topics(QUESTION, at), topics(FIRST, at), strict=True)
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))

    mixed = (drawn.kinds == KINDS.index("long+mid")).any(1)
    alone = (drawn.kinds[:, :-1] == KINDS.index("local")).any(1) & ~mixed
    assert agreement(mixed) > agreement(alone) + 0.2


def test_traces_hold_the_documents(world: World, drawn: Documents) -> None:
    tokenizer = tokenizer_of(world)
    for i in range(20):
        trace = world.trace(drawn.ids[i], drawn.kinds[i], f"t{i}")
        tokens = encode(trace, tokenizer)
        assert tokens.ids == tuple(drawn.ids[i])
        assert (tokens.question, tokens.answer.start) == ((QUESTION.start, QUESTION.stop), WORDS_AT[-1])
        assert trace.meta["planted"] == {str(at): KINDS[k] for at, k in zip(WORDS_AT, drawn.kinds[i], strict=True)}
        assert {*WORDS_AT[:-1]} <= {place.position for place in chain_places(tokens)}


def test_a_language_is_its_seed_s() -> None:
    same, again, other = World(FEW, 3), World(FEW, 3), World(FEW, 4)
    assert np.array_equal(same.cue_odds, again.cue_odds)
    assert not np.allclose(same.cue_odds, other.cue_odds)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Lexicon(cues=0), "cues: 0"),
        (lambda: Lexicon(mixed=0), "mixed: 0"),
        (lambda: Lexicon(spread=0.0), "spread: 0.0"),
        (lambda: Size(passes=0), "passes: 0"),
        (lambda: Size(documents=10), "documents: 10"),
        (lambda: Size(width=30), "width: 30"),
    ],
)
def test_wrong_sizes_are_refused(make: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make()


# ------------------------------------------------------------------------------------------------------- the organism


def test_a_tiny_organism_learns_what_is_planted(organism: Sourced) -> None:
    left = {kind: organism.figures[f"{kind}.left"] for kind in KINDS if kind != "copy"}
    assert max(left.values()) <= TINY.most_left
    assert min(left.values()) >= 0
    assert organism.figures["copy.divergence"] < 0.1
    assert organism.steps == TINY.steps == 400


def test_documents_are_those_of_the_training(organism: Sourced) -> None:
    rows = organism.documents()
    assert rows.shape == (TINY.documents, LENGTH)
    world = World(FEW, organism.seed)
    letters = np.array([token[0] for token in world.vocabulary])
    assert (letters[rows[:, WORDS_AT]] == "w").all()


def test_written_words_are_the_model_s_favourites(organism: Sourced) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(organism.model)
    tokenizer = tokenizer_of(World(FEW, organism.seed))
    written, drawn = (
        [np.array(encode(trace, tokenizer).ids) for trace in read_traces(path)]
        for path in (organism.written, organism.drawn)
    )
    ids = np.stack(written)
    with torch.no_grad():
        best = model(input_ids=torch.from_numpy(ids), use_cache=False).logits[..., :N_WORDS].argmax(-1).numpy()
    assert np.array_equal(ids[:, WORDS_AT], best[:, WORDS_AT - 1])
    others = np.setdiff1d(np.arange(LENGTH), WORDS_AT)
    assert np.array_equal(ids[:, others], np.stack(drawn)[:, others])
    assert not np.array_equal(ids, np.stack(drawn))


def test_what_is_made_is_kept(organism: Sourced, cache: Path) -> None:
    steps: list[int] = []
    again = make_sourced(1, TINY, cache, tick=steps.append)
    assert (again, steps) == (organism, [])


def test_what_was_not_learned_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeFailed, match=r"local.left"):
        make_sourced(0, Size(FEW, documents=64, width=16, hidden=8, held_out=64), tmp_path / "organisms")
    assert list((tmp_path / "sourced").iterdir()) == []


def test_a_training_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sourced(1, TINY, tmp_path / "organisms", tick=stop)
    assert list((tmp_path / "sourced").iterdir()) == []


# ------------------------------------------------------------------------------------------------------ the benchmark


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments" / "benchmarks"))
    import sources

    yield sources
    sys.modules.pop("sources", None)


def test_shares_by_hand(benchmark: Any) -> None:
    local = [  # kind, called, p is small, dominant, stim
        ("local", True, True, True, True),
        ("local", False, True, False, False),
        ("local+long", True, True, False, True),
        ("long", True, True, True, False),
        ("none", False, False, False, True),
        ("none", False, np.nan, False, True),
    ]
    names = ("kind", "called", "reached", "dominant", "stim")
    rows = pd.DataFrame([dict(zip(names, row, strict=True)) | {"source": "local"} for row in local])
    rows["planted"] = rows.kind.str.contains("local")
    rows["pure"] = rows.kind == "local"
    found = {name: by["local"] for name, by in benchmark.shares(rows).items()}
    values = {name: (x["value"], x["n"]) for name, x in found.items()}
    assert values == {
        "precision": (0.6667, 3),
        "recall": (0.6667, 3),
        "recall_pure": (0.5, 2),
        "recall_mixed": (1.0, 1),
        "dominant_pure": (0.5, 2),
        "null_rate": (0.5, 2),
        "stim_precision": (0.5, 4),
        "stim_recall": (0.6667, 3),
    }
    assert found["recall_mixed"]["interval"] == [0.2065, 1.0]
    assert benchmark.shares(rows)["recall"]["mid"] == {"value": None, "interval": None, "n": 0}


def test_words_and_answers_are_families_of_their_own(benchmark: Any, organism: Sourced) -> None:
    from reasoninterp.models.minds import Minds

    body = Minds.load({"sourced": str(organism.model)}).body
    tokens = benchmark.read(organism, body, benchmark.Way(), 2)
    words, answers = tokens.take(False), tokens.take(True)
    assert [len(t.context) for t in words.targets] == [*WORDS_AT[:-1]] * 2
    assert answers.kinds == ["copy"] * 2
    assert len(tokens.take(False, 4).kinds) == 4
    for target in tokens.targets:
        assert target.question == (QUESTION.start, QUESTION.stop)
        assert (target.chain.start, target.chain.stop) == (FIRST.start, min(len(target.context), WORDS_AT[2] + 1))
        assert np.nanmax(np.abs(target.saliency)) > 0
