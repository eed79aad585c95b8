"""What a study is measured in: minds, traces with their contrasts, and the few verbs every study needs.

1. `ContextSpec` is a recipe of plain values (it can be pickled, hashed and written to `run.json`);
   `spec.load()` reads the traces, makes the contrasts, loads the minds and checks that both read the same ids.
2. `Context` offers the verbs: `read` (the answer a mind gives after a chain), `margins` (how far it prefers the
   answer of one chain to that of another), `sample` (a chain of the mind's own), each for the mind that the runner
   has put in (`context.open(mind)`), in batches of at most `context.rows` rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
from tqdm import tqdm

from reasoninterp.errors import UserError
from reasoninterp.models.body import Body
from reasoninterp.models.minds import Handle, Minds
from reasoninterp.models.read import AnswerPair, Margins, greedy, margins, part_answers
from reasoninterp.models.sample import Sampled, sample_chains
from reasoninterp.runs import Run
from reasoninterp.stats import derive_seed
from reasoninterp.study import Cell, Study
from reasoninterp.traces.answers import as_number, extract, same_answer
from reasoninterp.traces.contrast import Contrast, ContrastKind, Refusal
from reasoninterp.traces.trace import TokenTrace, Trace, encode

_FRACTION = r"\\[dt]?frac\{[^{}]*\}\{[^{}]*\}"
_NUMBER = re.compile(rf"[-−]?{_FRACTION}|[-−]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
_ONE_LETTER = re.compile(r"\(?[A-J]\)?")
_FIRST_LETTER = re.compile(r"\W*([A-J])\b(?!\s+[a-z])")
WORDED_SLACK = 32  # an extractor looks for an answer in a sentence
ANSWER_SLACK = 2  # tokens read beyond the longest answer: one that runs on is seen to be another answer
MAX_ROWS = 128
MAX_ENCODED = 4096
SWEEP_TOKENS_ON_CPU, SWEEP_TOKENS = 4096, 65536  # tokens of patched rows at once
LEAST_SWEEP_TOKENS = 64  # fewer take longer and save next to nothing
SWEEP_SHARE = 0.5  # of the free memory, which a sweep may take unless a budget is given
MAX_TOKENS_ON_CPU = 8192  # beyond this, attention patterns of a batch leave the processor's caches and it gets slower


@dataclass(frozen=True)
class Item:
    """One trace with the contrasts made from it.

    Attributes:
        trace: the trace as given.
        contrast: a change carried consistently through later steps and the answer, or None (see `refused`).
        swap: a whole other chain under this question, with the answer that it implies: the corrupt chain that the
            file gives where that replaces every step, else the chain of another trace with another answer; or None.
    """

    trace: Trace
    contrast: Contrast | None = None
    swap: Contrast | None = None

    @property
    def id(self) -> str:
        """The trace's id."""
        return self.trace.id

    @cached_property
    def digest(self) -> str:
        """Hash of the trace and of its contrasts."""
        parts = [self.trace.digest()]
        for contrast in (self.contrast, self.swap):
            parts.append(contrast.corrupt.digest() if contrast else "-")
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def gold(trace: Trace) -> str:
    """The right answer: the trace's own, unless its meta knows better (chains that a mind wrote)."""
    return str(trace.meta.get("gold", trace.answer))


@dataclass(frozen=True)
class Reading:
    """What a mind answered: the text it wrote, the answer found in it, and `ok` or `missing`."""

    text: str
    value: str | None
    status: str

    def says(self, answer: str) -> bool:
        """Whether this is that answer; a missing answer is none."""
        return self.value is not None and same_answer(self.value, answer)


class Context:
    """Minds and items, with the verbs of every study. Make it with `ContextSpec(...).load()`.

    Args:
        minds: the minds.
        items: the traces with their contrasts.
        seed: the run's seed.
        refused: traces from which no contrast could be made, with the reason.
        rows: most rows in one forward pass; chosen from the memory that is free if None.
        memory_budget: bytes that a sweep may take beside the weights; half of what is free if None.
        run: the run whose tables `table(name)` reads.
        extra: further values on which the numbers depend (prompt, extractor).
    """

    def __init__(
        self,
        minds: Minds,
        items: Sequence[Item],
        *,
        seed: int = 0,
        refused: Sequence[Refusal] = (),
        rows: int | None = None,
        memory_budget: int | None = None,
        extractor: str = "auto",
        max_new_tokens: int = 256,
        run: Run | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.minds = minds
        self.items = list(items)
        self.seed = seed
        self.refused = list(refused)
        self.extractor = extractor
        self.max_new_tokens = max_new_tokens
        self.run = run
        self.extra = dict(extra or {})
        self._encoded: dict[Any, TokenTrace] = {}
        self.memo: dict[Any, Any] = {}  # what a room computes once for all batches, by keys of its own
        self.rows = rows or self._auto_rows()
        self.memory_budget = memory_budget
        self._body: Body | None = None
        self._most_tokens = SWEEP_TOKENS_ON_CPU if minds.body.device.type == "cpu" else SWEEP_TOKENS
        self._sweep_tokens = self._most_tokens

    # ------------------------------------------------------------------ what the runner asks

    def cells(self) -> Iterator[Cell]:
        """Every mind × item."""
        for mind in self.minds.names:
            for item in self.items:
                yield self.cell(mind, item)

    def contrast_cells(self, *, aligned: bool = False, most: int | None = None) -> Iterator[Cell]:
        """Every mind × item that has a contrast.

        Args:
            aligned: only contrasts whose two chains have equal token spans.
            most: at most so many contrasts a mind (the first ones).
        """
        kept = [i for i in self.items if i.contrast is not None and (i.contrast.aligned or not aligned)][:most]
        for mind in self.minds.names:
            for item in kept:
                yield self.cell(mind, item)

    def cell(self, mind: str, item: Item) -> Cell:
        """The cell of one mind and one item."""
        key = f"{mind}/{item.id}/{item.digest[:8]}"
        return Cell(key=key, group=mind, labels={"mind": mind, "trace": item.id}, item=item)

    @contextmanager
    def open(self, group: str | Handle) -> Iterator[Body]:
        """Put a mind (or any handle: a blend, a graft) in; `read`, `margins` and `sample` then speak of it."""
        before = self._body
        with self.minds.at(group) as body:
            self._body = body
            try:
                yield body
            finally:
                self._body = before

    def identity(self) -> dict[str, Any]:
        """Hashes of the weights and everything else the numbers depend on; the cells carry the traces' own."""
        return {
            "weights": dict(self.minds.hashes),
            "dtype": str(self.body_dtype),
            "seed": self.seed,
            "extractor": self.extractor,
            "max_new_tokens": self.max_new_tokens,
            **self.extra,
        }

    def batch_size(self, study: Study) -> int:
        """Cells measured at once, to begin with: what the study asks for, else the rows of a forward pass."""
        self._sweep_tokens = self._most_tokens
        return study.batch_size(self) or self.rows

    def set_sweep_tokens(self, n: int) -> None:
        """Let sweeps run at most `n` tokens at once, until another study begins."""
        self._sweep_tokens = min(n, self._most_tokens)

    def shrink(self) -> bool:
        """Halve the rows of one forward pass and the tokens of a sweep (the runner calls this when memory ran out).

        Returns:
            Whether the next try takes less; if not, both were at their least already.
        """
        before = (self.rows, self._sweep_tokens)
        self.rows = max(1, self.rows // 2)
        self._sweep_tokens = self._most_tokens = max(LEAST_SWEEP_TOKENS, self._sweep_tokens // 2)
        return before != (self.rows, self._sweep_tokens)

    def sweep_tokens(self) -> int:
        """Tokens of patched rows that a sweep runs at once."""
        return self._sweep_tokens

    def memory(self) -> int:
        """Bytes that a sweep may take beside the weights."""
        return self.memory_budget or int(SWEEP_SHARE * self.minds.free_memory())

    # ------------------------------------------------------------------ the verbs

    @property
    def body(self) -> Body:
        """The hooked model with the weights of the mind that is in."""
        if self._body is None:
            raise RuntimeError(
                "no mind is in: give the cells a group, Cell(group='base'), or use `with context.open(mind):`"
            )
        return self._body

    @property
    def body_dtype(self) -> Any:
        """The weights' dtype."""
        return self.minds.body.dtype

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with which the traces are read (the first mind's)."""
        return self.minds.tokenizer(self.minds.names[0])

    def seed_of(self, item: Item, *labels: object) -> int:
        """A seed for an item that all minds share (a cell's own seed differs between minds): edits stay paired."""
        return derive_seed(self.seed, item.id, *labels)

    def encode(self, trace: Trace) -> TokenTrace:
        """A trace as token ids with the span of every part."""
        key = (trace.question, trace.steps, trace.answer, trace.format)
        known = self._encoded.get(key)
        # All minds, layers and studies ask for the same few encodings; another trace may share text, not identity.
        if known is None or known.trace != trace:
            if len(self._encoded) >= MAX_ENCODED:
                self._encoded.clear()
            known = self._encoded[key] = encode(trace, self.tokenizer)
        return known

    def read(self, traces: Sequence[Trace]) -> list[Reading]:
        """The answer that the mind gives after each trace's chain (greedy), whatever answer the trace states."""
        prompts = [self.encode(trace).prompt_ids for trace in traces]
        unique = list(dict.fromkeys(prompts))
        stop = [s for s in {t.format.after_answer.strip(" ") for t in traces} if s]
        written = greedy(
            self.body,
            unique,
            max_new_tokens=self.answer_tokens,
            tokenizer=self.tokenizer,
            stop_strings=stop,
            batch_size=self.rows,
        )
        texts = dict(zip(unique, written, strict=True))
        out = []
        for trace, prompt in zip(traces, prompts, strict=True):
            out.append(find_answer(texts[prompt], trace, self.extractor))
        return out

    def margins(self, traces: Sequence[Trace], answers: Sequence[tuple[str, str]]) -> Margins:
        """How far the mind prefers the second answer to the first after each trace's chain; see `models.read`.

        Args:
            traces: the chains to read.
            answers: for each, (the clean answer, the corrupt answer).
        """
        prompts, pairs = [], []
        for trace, (clean, corrupt) in zip(traces, answers, strict=True):
            a, b = self.encode(replace(trace, answer=clean)), self.encode(replace(trace, answer=corrupt))
            prompts.append(a.prompt_ids)
            pairs.append(AnswerPair(a.answer_ids, b.answer_ids))
        return margins(self.body, prompts, pairs, end_id=self.end_id, batch_size=self.rows)

    def sample(self, traces: Sequence[Trace]) -> list[Sampled]:
        """A chain and an answer of the mind's own for each trace, from the trace's question and any steps it has."""
        return sample_chains(
            self.body,
            self.tokenizer,
            traces,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            batch_size=self.rows,
        )

    def table(self, name: str) -> pd.DataFrame:
        """A table that another study of this run made (name it in `needs`)."""
        if self.run is None:
            raise UserError(f"table {name!r}: this context belongs to no run.")
        return self.run.table(name)

    @cached_property
    def answer_tokens(self) -> int:
        """How many tokens an answer may take."""
        longest = max((len(self.encode(t).answer_ids) for item in self.items for t in _answers(item)), default=1)
        return longest + (ANSWER_SLACK if self.extractor == "auto" else WORDED_SLACK)

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends an answer: needed where one answer is the beginning of the other."""
        return end_of_answer(self.items[0].trace, self.tokenizer)

    def chance(self) -> float:
        """Accuracy of a guess: one over the options, or drawn from these traces' own answers."""
        options = [len(item.trace.meta["options"]) for item in self.items if item.trace.meta.get("options")]
        if options and len(options) == len(self.items):
            return float(sum(1 / n for n in options) / len(options))
        counts = Counter(gold(item.trace) for item in self.items)
        return sum((n / len(self.items)) ** 2 for n in counts.values())

    def _auto_rows(self) -> int:
        """Rows that fit in a fifth of the free memory, at the length of the longest trace."""
        longest = max((len(self.encode(t).ids) for item in self.items for t in _answers(item)), default=64)
        per_token = 4 * (40 * self.minds.config.hidden_size + longest * self.minds.config.num_attention_heads)
        per_row = per_token * (longest + ANSWER_SLACK) * self.minds.config.num_hidden_layers
        free = self.minds.free_memory()
        at_once = MAX_ROWS if self.minds.body.device.type == "cuda" else min(MAX_ROWS, MAX_TOKENS_ON_CPU / longest)
        return int(max(1, min(at_once, free / 5 / per_row)))


def contrast_kind(text: str) -> ContrastKind:
    """A kind of contrast that can be made from traces alone.

    Raises:
        UserError: another word.
    """
    if text not in ("propagated", "forced", "swap"):
        raise UserError(f"--contrast {text}: not one of propagated, forced, swap.")
    return cast(ContrastKind, text)


def find_answer(text: str, trace: Trace, how: str = "auto") -> Reading:
    """The answer in what a mind wrote where the answer stands.

    Args:
        text: what it wrote behind the format's `before_answer`.
        trace: whose answer's form decides under `auto`: the first number for a number, the first letter of a choice
            for a letter, else the first line.
        how: `auto`, or an extractor of `traces.answers`.
    """
    if how != "auto":
        # The format's own marks stand around what was written; an extractor may look for them.
        before, after = trace.format.before_answer, trace.format.after_answer
        tries = (extract(t, how) for t in (before + text, before + text + after))
        found = next((f for f in tries if f.status == "ok"), extract(text, how))
        return Reading(text, found.value, found.status)
    line = text.strip().split("\n")[0].strip()
    if as_number(trace.answer) is not None:
        match = _NUMBER.search(line)
        whole = line.rstrip(".,") if as_number(line) is not None else None
        value = whole or (match.group(0).rstrip(".,") if match else None)
    elif trace.meta.get("options") or _ONE_LETTER.fullmatch(trace.answer.strip()):
        cued = extract(line, "letter").value
        match = _FIRST_LETTER.match(line)
        value = cued or (match.group(1) if match else None)
    else:
        value = line or None
    return Reading(text, value, "ok" if value else "missing")


def unaskable(contrast: Contrast, tokenizer: Any, end_id: int | None) -> str | None:
    """Why the two answers of a contrast cannot be compared after both of its chains; None if they can."""
    for trace in (contrast.clean, contrast.corrupt):
        a = encode(replace(trace, answer=contrast.clean.answer), tokenizer)
        b = encode(replace(trace, answer=contrast.corrupt.answer), tokenizer)
        if a.prompt_ids != b.prompt_ids:
            return "the answer changes the tokens before it"
        try:
            part_answers(AnswerPair(a.answer_ids, b.answer_ids), end_id)
        except UserError:
            return "one answer begins the other and nothing ends it"
    return None


def end_of_answer(trace: Trace, tokenizer: Any) -> int | None:
    """The token that ends an answer in this format: what stands behind it, else the end of the sequence."""
    tokens = encode(trace, tokenizer)
    after = tokens.spans["after_answer", 0]
    return tokens.ids[after.start] if len(after) else tokenizer.eos_token_id


def _answers(item: Item) -> list[Trace]:
    found = [item.trace]
    if item.contrast:
        found.append(item.contrast.corrupt)
    if item.swap:
        found.append(item.swap.corrupt)
    return found


@dataclass(frozen=True)
class ContextSpec:
    """A context as plain values.

    Attributes:
        minds: where each mind's weights are (a directory, a hub id, or a LoRA adapter of the first mind).
        traces: the JSON Lines file.
        format: a preset's name or a JSON file; None takes the file's own first line.
        prompt: `raw`, `fewshot` or `chat`; chosen once for all minds.
        limit: read only the first traces.
        contrast: kind of the default contrast.
        memory_budget: bytes that a sweep may take beside the weights, in each process.
    """

    minds: Mapping[str, str]
    traces: str
    format: str | None = None
    prompt: str = "raw"
    limit: int | None = None
    contrast: str = "propagated"
    extractor: str = "auto"
    max_new_tokens: int = 256
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int | None = None
    memory_budget: int | None = None
    shots: int = 3
    allow_pickle: bool = False
    trust_remote_code: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def load(self, run: Run | None = None, minds: Minds | None = None, *, progress: bool = False) -> Context:
        """Read the traces, make the contrasts, load the minds, check that they read the same ids.

        Raises:
            UserError: anything wrong with the files, the weights or the tokenizers.
        """
        from reasoninterp.models.prompt import with_prompt
        from reasoninterp.models.tokens import check_ids
        from reasoninterp.traces.contrast import make_contrasts
        from reasoninterp.traces.formats import resolve_format
        from reasoninterp.traces.io import read_traces

        if not Path(self.traces).exists():
            raise UserError(f"--traces {self.traces}: no such file; give a JSON Lines file of traces.")
        minds = minds or Minds.load(
            dict(self.minds),
            device=self.device,
            dtype=self.dtype,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )
        tokenizer = minds.tokenizer(minds.names[0])
        # Tuning often brings the chat template that the base lacks; whoever has one, all minds read what it writes.
        every = [minds.tokenizer(name) for name in minds.names]
        templated = next((t for t in every if getattr(t, "chat_template", None)), tokenizer)
        found = read_traces(self.traces, format=resolve_format(self.format, templated) if self.format else None)
        found = with_prompt(found, self.prompt, templated, shots=self.shots)
        found = found.head(self.limit)
        check_ids(minds, found.traces)
        bar = partial(tqdm, desc="contrasts", unit="trace", disable=not progress, delay=2)
        main = make_contrasts(
            found, kind=contrast_kind(self.contrast), tokenizer=tokenizer, seed=self.seed, progress=bar
        )
        swaps = make_contrasts(found, kind="swap", tokenizer=tokenizer, seed=self.seed)
        kind = self.contrast
        if not len(main) and len(swaps):  # chains without calculations (proofs, options): a whole other chain is left
            stand_in = [Refusal(r.trace_id, f"propagated (a swap stands in): {r.reason}") for r in main.refused]
            main, kind = replace(swaps, refused=tuple(stand_in)), "swap"
        end = end_of_answer(found.traces[0], tokenizer)
        by_id, refused = {c.clean.id: c for c in main.contrasts}, list(main.refused)
        for key, contrast in list(by_id.items()):
            reason = unaskable(contrast, tokenizer, end)
            if reason:
                del by_id[key]
                refused.append(Refusal(key, reason))
        swap_by_id = {c.clean.id: c for c in swaps.contrasts}
        for key, contrast in by_id.items():
            if key in found.pairs and len(contrast.changed) == len(contrast.clean.steps):
                swap_by_id[key] = contrast
        refused += [Refusal(r.trace_id, f"swap: {r.reason}") for r in swaps.refused if r.trace_id not in swap_by_id]
        items = [Item(t, by_id.get(t.id), swap_by_id.get(t.id)) for t in found.traces]
        extra = {"prompt": self.prompt, "contrast": kind, "format": found.format.to_json()}
        return Context(
            minds,
            items,
            seed=self.seed,
            refused=refused,
            rows=self.batch_size,
            memory_budget=self.memory_budget,
            extractor=self.extractor,
            max_new_tokens=self.max_new_tokens,
            run=run,
            extra=extra,
        )

    def to_json(self) -> dict[str, Any]:
        """The spec as plain values."""
        return json.loads(json.dumps(asdict(self), default=str))
