"""A made language in which it is known what every word comes from: its n-gram, the question, an earlier step, or nothing.

A document is a question with a cue, a first step with a cue, and three steps that end in a word each; the answer repeats
the first word (`W` words, `C` cues, `O` openers, `S` slots, `f` fillers):

    <bos> f C f f : f C f so . f O W . f S W . f S W = W <eos>

1. Every cue and every opener favours some words over others: log-odds over the words, drawn once, normally with standard
   deviation `spread`, and shifted so that the rows of a table together leave all words equally frequent.
2. The question's cue and the first step's are drawn from one dictionary and stand anywhere among fillers: only the part of
   the document tells them apart.  Their log-odds are the question's *topic* and the step's.
3. The token before a word decides what the word comes from.  *local*: an opener, by its log-odds.  *long*, *mid*: slots of
   the question's topic and of the first step's.  *Mixtures*: an opener of another class, or a slot, that adds up two of
   these, over √2.  *none*: a slot whose words go by the number of the step, which no n-gram within reach and no cue
   tells; and the answer (*copy*), which comes from this document and from no other.
4. Every document has one word for each topic, alone or in a mixture, so no earlier word gives a topic away.
5. In a mixture the two sources agree in part: of `CANDIDATES` cues the one that goes best with the opener, or with the
   other topic, is taken.  (Each of two sources with nothing in common has a rank correlation of .7 with their sum: even
   with perfect counts, twenty alternatives then show it in 7 of 10 tokens at p ≤ .02.)
6. No cue is among the `REACH` tokens before a word.

What else it took, as measured and simulated (two layers, width 64, twenty alternatives):

* All words are in reach of twenty alternatives and dense log-odds rank them all.  Words that only one of two sources
  allows have counts of 0 with the other, which ranks nothing.
* A topic has one cue.  Of several that say the same none matters to a knockout; of two that say different things one may
  speak against the word that is written, and is then not salient (sources' counts correlated .68 with the truth).
* A context that recurs bounds p from below: 80 cues found little at q ≤ .05.  A third of the words have each source, so
  that the correction is met at a p of about .015.
* Words are equally frequent.  Among words of unequal frequency (Zipf's exponent .3) the frequencies hide in a document's
  co-occurrences what a topic adds, and what the control for unigram counts leaves is noisier.
* `so` ends the first step and `:` the question: places that gather the cues before them make training reliable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float64, Int64

from reasoninterp.errors import UserError
from reasoninterp.traces.trace import Format, Trace

Kind = Literal["local", "long", "mid", "none", "local+long", "local+mid", "long+mid", "copy"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BOS, COLON, SO, DOT, EQUALS, EOS, PAD, UNK = STRUCTURE = ("<bos>", ":", "so", ".", "=", "<eos>", "<pad>", "<unk>")
SLOTS: dict[Kind, str] = {"long": "ask", "mid": "then", "long+mid": "both", "none": "any"}
FORMAT = Format(
    before_question=f"{BOS} ", after_question=f" {COLON} ", between_steps=f" {DOT} ", before_answer=f" {EQUALS} ",
    after_answer=f" {EOS}",
)  # fmt: skip

N_WORDS = 24
QUESTION, FIRST = slice(1, 5), slice(6, 9)  # where cues stand
WORDS_AT: Int64[np.ndarray, " place"] = np.array([13, 17, 21, 23])
N_STEPS, LENGTH = 3, 25
STEPS = (slice(6, 10), slice(11, 14), slice(15, 18), slice(19, 22))
FIXED = {0: BOS, 5: COLON, 9: SO, 10: DOT, 14: DOT, 18: DOT, 22: EQUALS, 24: EOS}
REACH = 3
CANDIDATES = 60
DESIGNS: tuple[tuple[float, tuple[Kind, Kind, Kind]], ...] = (
    (0.72, ("local", "long", "mid")),
    (0.1, ("none", "long", "mid")),
    (0.06, ("local+long", "mid", "none")),
    (0.06, ("local+mid", "long", "none")),
    (0.06, ("long+mid", "local", "none")),
)
_FLAGS = np.array([[source in kind.split("+") for source in ("local", "mid", "long")] for kind in KINDS])


class Documents(NamedTuple):
    """Some documents, and what is planted in them.

    Attributes:
        ids: token ids.
        kinds: indices into `KINDS` of the words and the answer.
        log_probs: of all words, in nats, at the places of words (the answer's is certain).
    """

    ids: Int64[np.ndarray, "document pos"]
    kinds: Int64[np.ndarray, "document place"]
    log_probs: Float64[np.ndarray, "document step word"]


@dataclass(frozen=True)
class Lexicon:
    """How many of each there are.

    Attributes:
        cues: each a topic.
        openers: of the local source alone.
        mixed: openers of each of the two mixtures with a local source.
        fillers: tokens that mean nothing.
        spread: standard deviation of log-odds, in nats.

    Raises:
        UserError: a number too small.
    """

    cues: int = 120
    openers: int = 80
    mixed: int = 8
    fillers: int = 100
    spread: float = 1.5

    def __post_init__(self) -> None:
        for name in ("cues", "openers", "mixed", "fillers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}; give at least 1.")
        if not self.spread > 0:
            raise UserError(f"spread: {self.spread}; give more than 0.")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All tokens, the words first."""
        named = (("w", N_WORDS), ("c", self.cues), ("o", self.openers), ("ol", self.mixed), ("om", self.mixed))
        words = [f"{letter}{i}" for letter, n in (*named, ("f", self.fillers)) for i in range(n)]
        return (*words, *SLOTS.values(), *STRUCTURE)


class World:
    """The language of one seed.

    Args:
        lexicon: its sizes.
        seed: of all log-odds.
    """

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        self.lexicon, self.vocabulary = lexicon, lexicon.vocabulary
        self.id = {token: i for i, token in enumerate(self.vocabulary)}
        rng = np.random.default_rng([seed, 61])
        sizes = (lexicon.cues, lexicon.openers, lexicon.mixed, lexicon.mixed)
        self.cue_odds, *openers = (_levelled(lexicon.spread * rng.normal(size=(n, N_WORDS))) for n in sizes)
        self.opener_odds = np.concatenate(openers)
        ends = np.cumsum([0, *sizes[1:]])
        classes: tuple[Kind, ...] = ("local", "local+long", "local+mid")
        self._openers = {kind: (int(a), int(b)) for kind, a, b in zip(classes, ends, ends[1:], strict=False)}
        self.step_odds = _levelled(lexicon.spread * rng.normal(size=(N_STEPS, N_WORDS)))

    def draw(self, rng: np.random.Generator, n: int) -> Documents:
        """Documents, their words drawn as planted."""
        shares, designs = zip(*DESIGNS, strict=True)
        codes = np.array([[KINDS.index(kind) for kind in design] for design in designs])
        kinds = rng.permuted(codes[rng.choice(len(designs), p=shares, size=n)], axis=1)
        openers = np.zeros_like(kinds)
        for kind, (start, stop) in self._openers.items():
            openers = np.where(kinds == KINDS.index(kind), rng.integers(start, stop, size=kinds.shape), openers)
        asked, first = self._cues(rng, kinds, openers)
        log_probs = self._log_probs(kinds, openers, asked, first)
        passed = np.exp(log_probs).cumsum(-1) < rng.random((n, N_STEPS, 1))
        words = np.minimum(passed.sum(-1), N_WORDS - 1)

        slots = self.id["o0"] + openers
        for kind, slot in SLOTS.items():
            slots[kinds == KINDS.index(kind)] = self.id[slot]
        ids = self.id["f0"] + rng.integers(self.lexicon.fillers, size=(n, LENGTH))
        for span, cues in ((QUESTION, asked), (FIRST, first)):
            ids[np.arange(n), rng.integers(span.start, span.stop, size=n)] = self.id["c0"] + cues
        for position, token in FIXED.items():
            ids[:, position] = self.id[token]
        ids[:, WORDS_AT[:-1] - 1] = slots
        ids[:, WORDS_AT] = np.column_stack([words, words[:, 0]])
        return Documents(ids, np.column_stack([kinds, np.full(n, KINDS.index("copy"))]), log_probs)

    def trace(self, ids: Int64[np.ndarray, " pos"], kinds: Int64[np.ndarray, " place"], name: str) -> Trace:
        """A document as a trace; `meta["planted"]` says by token position which sources are planted, and the kind."""
        tokens = [self.vocabulary[i] for i in ids]
        steps = [" ".join(tokens[span]) for span in STEPS]
        planted = {str(at): KINDS[code] for at, code in zip(WORDS_AT.tolist(), kinds.tolist(), strict=True)}
        question, answer = " ".join(tokens[QUESTION]), tokens[WORDS_AT[-1]]
        return Trace(name, question, tuple(steps), answer, FORMAT, {"task": "sourced", "planted": planted})

    def _cues(
        self, rng: np.random.Generator, kinds: Int64[np.ndarray, "n step"], openers: Int64[np.ndarray, "n step"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The question's cue and the first step's: any, but such that the sources of a mixture agree."""
        asked, first = rng.integers(self.lexicon.cues, size=(2, len(kinds)))
        for kind, cues in (("local+long", asked), ("local+mid", first)):
            at = kinds == KINDS.index(kind)
            cues[at.any(1)] = self._agreeing(rng, self.opener_odds[openers[at]])
        both = (kinds == KINDS.index("long+mid")).any(1)
        first[both] = self._agreeing(rng, self.cue_odds[asked[both]])
        return asked, first

    def _agreeing(self, rng: np.random.Generator, odds: Float64[np.ndarray, "n word"]) -> Int64[np.ndarray, " n"]:
        """Of some candidates the cue that goes best with each of the given log-odds."""
        candidates = rng.integers(self.lexicon.cues, size=(len(odds), CANDIDATES))
        fit = np.einsum("ncw,nw->nc", self.cue_odds[candidates], odds)
        found: Int64[np.ndarray, " n"] = candidates[np.arange(len(odds)), fit.argmax(1)]
        return found

    def _log_probs(
        self,
        kinds: Int64[np.ndarray, "n step"],
        openers: Int64[np.ndarray, "n step"],
        asked: Int64[np.ndarray, " n"],
        first: Int64[np.ndarray, " n"],
    ) -> Float64[np.ndarray, "n step word"]:
        """What is planted at every step."""
        flags = _FLAGS[kinds]
        parts = np.stack(
            [
                self.opener_odds[openers],
                *(np.repeat(self.cue_odds[cues][:, None], N_STEPS, 1) for cues in (first, asked)),
            ],
            axis=2,
        )
        odds = (flags[..., None] * parts).sum(2) / np.sqrt(np.maximum(1, flags.sum(-1)))[..., None]
        odds = np.where((kinds == KINDS.index("none"))[..., None], self.step_odds, odds)
        log_probs: Float64[np.ndarray, "n step word"] = odds - np.logaddexp.reduce(odds, axis=-1, keepdims=True)
        return log_probs


def _levelled(odds: Float64[np.ndarray, "row word"]) -> Float64[np.ndarray, "row word"]:
    """Log-odds shifted by word so that all words are equally probable on average over the rows."""
    for _ in range(200):
        probs = np.exp(odds - np.logaddexp.reduce(odds, axis=1, keepdims=True))
        odds = odds - np.log(probs.mean(0) * N_WORDS)
    levelled: Float64[np.ndarray, "row word"] = odds
    return levelled
