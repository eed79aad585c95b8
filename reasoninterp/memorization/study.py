"""The study `memorization`: where each token of a chain came from, for every mind, and whether that is so in the network.

1. Each mind reads every trace: the chain given in the file, or (`chains="own"`) the one that it writes itself.
2. For each token of the steps and of the answer: its alternatives, the saliency of its context, the three sources
   (`sources`), what the judge says of it (`judges`), and what the prediction loses when the local window, the chain so
   far, the question, or as many random tokens are taken out of the context (`ablation`).
3. When all are measured, the sources are tested (`nulls`).  Tokens of one mind, one distribution (`shift`) and one part
   (step or answer) are one family: they are each other's null contexts, traces of one id aside, and are corrected
   together.
4. The tables are in `tables`, `finding` and `causes`, the figures in `drawing`.

All intervals are 95 % over traces.  Nothing here says that a source *caused* a token but the columns `kl_…` and `drop_…`,
and nothing but the corpus of the index was counted: whether it is the one that the mind was trained on, only its maker
knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from reasoninterp.errors import UserError
from reasoninterp.memorization.ablation import Effect, mean_embedding, part_effects, parts_of
from reasoninterp.memorization.alternatives import K, Place, chain_places, parts_before, read_alternatives
from reasoninterp.memorization.causes import agreement_table, causes_table
from reasoninterp.memorization.corpus.opening import open_index
from reasoninterp.memorization.counts import CountBook
from reasoninterp.memorization.finding import finding_table
from reasoninterp.memorization.judges import judge_named
from reasoninterp.memorization.names import ANSWER, GIVEN, REMOVED, STEP
from reasoninterp.memorization.records import from_record, to_record
from reasoninterp.memorization.saliency import Saliency, gradient_saliency, knockout_saliency
from reasoninterp.memorization.settings import Settings
from reasoninterp.memorization.shapley import shapley_saliency
from reasoninterp.memorization.sources import Target, observe
from reasoninterp.memorization.tables import changes_table, sources_table, steps_summary, steps_table, token_table
from reasoninterp.memorization.verdicts import TokenSources, judged
from reasoninterp.models.context import Context
from reasoninterp.stats import derive_seed
from reasoninterp.study import Batch, Cell, Row, Study
from reasoninterp.traces.judging import wrong_tokens
from reasoninterp.traces.trace import Span, TokenTrace, Trace, token_chars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILY = ("mind", "shift", "part")


class Written(NamedTuple):
    """A chain that is read: whose it is, its tokens, the places in it, and which tokens of the row are wrong."""

    cell: Cell
    writer: str
    tokens: TokenTrace
    chars: list[Span]
    places: list[Place]
    wrong: list[bool | None]


class Memorization(Study):
    """Which tokens of a chain the corpus explains: local n-grams, the chain so far, or the question; base and tuned.

    Parameters:
        index: directory of a corpus index (`reasoninterp corpus build`), or `web:NAME` of the infini-gram API (it is asked
            only with `REASONINTERP_ONLINE=1`; it counts `--unit anchors --window 1000`).
        chains: `given`: all minds read the chains of the file; `own`: each writes its own.
        judge: who says which tokens are wrong: `arithmetic`, `organism`, or FILE.py:name; none by default.
        saliency: of context tokens: attention `knockout`, `gradient` × input (one backward pass a token), or sampled
            `shapley` values (LERG's, some hundred forward passes a token), in which padding stands for an absent token.
        k: alternatives of each token, itself besides.
        n_salient: salient tokens of the chain, and of the question.
        stop: words that are never salient (repeat the flag).
        unit: what a co-occurrence counts: `documents`, `pairs` or `anchors` (see the corpus' interface).
        window: tokens within which `pairs` and `anchors` occur together; 0: the whole document.
        max_suffix: longest local window, in tokens.
        min_count: how often the token must follow the local window.
        n_null: null contexts for each token and source; where a share r of the tokens has a source, it takes at least
            1 / (level × r) of them, and as many other tokens, to find one.
        tokens: `all` of the steps and the answer, or those that the judge `judged`: the fewer that have nothing to be
            found take part, the more is found in the others.
        level: a source is present where q is at most this.
        correct: control the false discovery rate at `level`; otherwise p itself is compared with it.
        shift: key of a trace's `meta` that names its distribution; results are split by it.
        max_traces: at most so many traces.
        causal: also take the local window, the chain and the question out of the context.
    """

    index: str
    chains: Literal["given", "own"] = "given"
    judge: str = ""
    saliency: Literal["knockout", "gradient", "shapley"] = "knockout"
    k: int = K
    n_salient: int = 5
    stop: tuple[str, ...] = ()
    unit: Literal["documents", "pairs", "anchors"] = "documents"
    window: int = 0
    max_suffix: int = 64
    min_count: int = 1
    n_null: int = 999
    tokens: Literal["all", "judged"] = "all"
    level: float = 0.05
    correct: bool = True
    shift: str = "shift"
    max_traces: int = 64
    causal: bool = True

    def settings(self, context: Context) -> Settings:
        """The conventions of the counts and of the tests."""
        stop = {i for word in self.stop for i in _ids(word, context.tokenizer)}
        return Settings(
            n_salient=self.n_salient,
            stop=frozenset(stop),
            unit=self.unit,
            window=self.window or None,
            max_suffix=self.max_suffix,
            min_count=self.min_count,
            n_null=self.n_null,
            level=self.level,
            correct=self.correct,
            seed=context.seed,
        )

    def book(self, context: Context) -> CountBook:
        """The counts of the index under these settings, kept with the context."""
        settings = self.settings(context)
        key = ("memorization", self.index, settings)
        if key not in context.memo:
            context.memo[key] = CountBook(open_index(self.index, context.tokenizer), settings)
        book: CountBook = context.memo[key]
        return book

    def cells(self, context: Context) -> Iterator[Cell]:
        """Every mind × the first traces; which corpus was counted is part of the key."""
        corpus = self.book(context).corpus
        if self.judge:
            judge_named(self.judge)
        elif self.tokens == "judged":
            raise UserError("--tokens judged: nobody judges; give a --judge.")
        for mind in context.minds.names:
            for item in context.items[: self.max_traces]:
                cell = context.cell(mind, item)
                yield replace(cell, key=f"{cell.key}/{corpus}")

    def measure(self, context: Context, batch: Batch) -> Iterator[Row]:
        """One row a token: what was observed of it (`records`), its part, text and judgement, and the effects."""
        book, settings = self.book(context), self.settings(context)
        chains = self._written(context, batch)
        places = [place for one in chains for place in one.places]
        found = read_alternatives(context.body, places, k=self.k, max_rows=context.rows)
        salient = self._saliency(context, places)
        whose = [one for one in chains for _ in one.places]
        targets = []
        for one, place, alternatives, values in zip(whose, places, found, salient, strict=True):
            question, chain = parts_before(one.tokens, place.position)
            trace = one.cell.labels["trace"]
            targets.append(Target(trace, place.context, alternatives, question, chain, values))
        observed = observe(book, targets)
        effects = self._effects(context, whose, places, targets, [len(o.scores["local"].tokens) for o in observed])
        for one, place, seen, effect in zip(whose, places, observed, effects, strict=True):
            trace = one.tokens.trace
            step = next((i for i, s in enumerate(one.tokens.steps) if s.start <= place.position < s.stop), None)
            chars = one.chars[place.position]
            moved: dict[str, float] = {}
            for name in REMOVED:
                kl, drop = effect.get(name, Effect(float("nan"), float("nan")))
                moved |= {f"kl_{name}": kl, f"drop_{name}": drop}
            yield one.cell.row(
                writer=one.writer,
                shift=str(trace.meta.get(self.shift, "")),
                part=ANSWER if step is None else STEP,
                step=len(trace.steps) if step is None else step,
                position=place.position,
                text=trace.text[chars.start : chars.stop],
                wrong=one.wrong[place.position],
                **to_record(seen, settings.max_suffix),
                **moved,
            )

    def _saliency(self, context: Context, places: Sequence[Place]) -> list[Saliency]:
        """Of each place's context, by the measure that was asked for."""
        body, rows = context.body, context.rows
        if self.saliency == "gradient":
            return gradient_saliency(body, places, max_rows=rows)
        if self.saliency == "knockout":
            return knockout_saliency(body, places, max_rows=rows)
        tokenizer = context.tokenizer
        absent = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        return [
            shapley_saliency(body, place, baseline=absent, seed=context.seed, max_rows=rows).values for place in places
        ]

    def _written(self, context: Context, batch: Batch) -> list[Written]:
        """The chains of a batch that have a step; the answer is read where there is one."""
        traces: list[tuple[Cell, Trace, bool]] = [(c, c.item.trace, True) for c in batch]
        if self.chains == "own":
            sampled = context.sample([cell.item.trace.with_steps(()) for cell in batch])
            traces = []
            for cell, one in zip(batch, sampled, strict=True):
                answered = one.status == "ok"
                # Steps are read also where no answer came; the trace's own stands there, and is not read.
                answer = one.trace.answer if answered else cell.item.trace.answer
                traces.append((cell, replace(cell.item.trace, steps=one.steps, answer=answer), answered))
        judge = judge_named(self.judge) if self.judge else None
        out = []
        for cell, trace, answered in traces:
            if trace.steps:
                tokens = context.encode(trace)
                chars = token_chars(tokens, context.tokenizer)
                wrong = wrong_tokens(judge(trace) if judge else (), chars)
                places = chain_places(tokens)
                places += [Place(tokens.ids, position) for position in range(*tokens.answer) if answered]
                if self.tokens == "judged":
                    places = [place for place in places if wrong[place.position] is not None]
                writer = GIVEN if self.chains == "given" else str(cell.labels["mind"])
                out.append(Written(cell, writer, tokens, chars, places, wrong))
        return out

    def _effects(
        self,
        context: Context,
        whose: Sequence[Written],
        places: Sequence[Place],
        targets: Sequence[Target],
        windows: Sequence[int],
    ) -> list[dict[str, Effect]]:
        """What taking each part out does at each place; nothing where that is not asked for."""
        if not self.causal or not places:
            return [{} for _ in places]
        key = ("memorization", "mean embedding", context.body.label)
        if key not in context.memo:
            rows = [context.encode(item.trace).ids for item in context.items[: self.max_traces]]
            context.memo[key] = mean_embedding(context.body, rows, max_rows=context.rows)
        parts = []
        for one, place, target, window in zip(whose, places, targets, windows, strict=True):
            rng = np.random.default_rng(derive_seed(context.seed, "control", one.cell.labels["trace"], place.position))
            parts.append(parts_of(place.position, window, target.question, target.chain, rng))
        return part_effects(context.body, places, parts, context.memo[key], max_rows=context.rows)

    def summarise(self, rows: pd.DataFrame, context: Context) -> dict[str, pd.DataFrame]:
        """Tables by name: `memorization` (shares and strengths), its `_changes`, `_steps`, `_by_step`, `_finding`,
        `_causes`, `_agreement`, `_tokens`, one row a token, and `_questions`, one row a trace.
        """
        if rows.empty:
            raise UserError("memorization: no trace has a step to read, or none that the judge says anything of.")
        tokens = token_table(rows, self.decide(rows, context), context.tokenizer)
        seed = context.seed
        tables = {
            "memorization": sources_table(tokens, self.level, seed),
            "memorization_changes": changes_table(tokens, context.minds.names, self.level, seed),
            "memorization_steps": steps_table(tokens),
            "memorization_by_step": steps_summary(tokens, seed),
            "memorization_finding": finding_table(tokens, seed),
            "memorization_causes": causes_table(tokens, seed),
            "memorization_agreement": agreement_table(tokens),
            "memorization_tokens": tokens,
            "memorization_questions": pd.DataFrame(
                [{"trace": item.id, "question": item.trace.question} for item in context.items[: self.max_traces]]
            ),
        }
        return {name: table for name, table in tables.items() if len(table)}

    def decide(self, rows: pd.DataFrame, context: Context) -> list[TokenSources]:
        """The verdict on each row's token, family by family, in the rows' order."""
        book = self.book(context)
        out: dict[int, TokenSources] = {}
        observed = [from_record(row, row["trace"]) for row in rows.to_dict("records")]
        with tqdm(total=len(observed), desc="null", unit="token", delay=10, disable=None) as bar:

            def counted(some: Sequence[Any]) -> Iterable[Any]:
                for one in some:
                    yield one
                    bar.update()

            for where in rows.reset_index(drop=True).groupby(list(FAMILY), sort=False).indices.values():
                family = [observed[i] for i in where]
                out.update(zip(where.tolist(), judged(book, family, family, counted), strict=True))
        return [out[i] for i in range(len(observed))]

    def draw(self, summary: dict[str, pd.DataFrame]) -> dict[str, Figure]:
        """`memorization`, `memorization-finding`, `memorization-causes`."""
        from reasoninterp.memorization.drawing import draw_all

        return draw_all(summary)


def _ids(word: str, tokenizer: Any) -> set[int]:
    """The tokens that are a word, with a blank before it and without.

    Raises:
        UserError: there is none.
    """
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")]
    found = {ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}
    if not found:
        raise UserError(f"--stop {word}: the minds' tokenizer has no token that is this word; leave it out.")
    return found
