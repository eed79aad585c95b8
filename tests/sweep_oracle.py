"""A second, slow way to every number of a sweep, for the tests: whole forward passes, one run at a time.

Nothing of the sweep's own tables is used: a run's tokens are the prompt and one answer, the two answers of a contrast
are read in two rows, and an edit replaces activations with a plain hook at a position.  `contrasts` makes the contrasts:
prompts of different lengths; answers of one token, of several, and such as begin alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.traces.contrast import Contrast, contrast
from reasoninterp.traces.trace import Format, Trace, encode
from tests.tiny import save_tiny, save_tuned

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
FORMAT = Format(after_question="\n", between_steps="\n", before_answer="\n= ", after_answer="\n")
# (question, number of steps, changed step, clean answer, corrupt answer)
CASES = (
    ("go 0", 2, 0, "7", "6"),  # one token each: one row
    ("go 1 2 x", 3, 1, "xq", "zv"),  # they part at once: two rows
    ("go", 3, 2, "7q", "7w"),  # they part in the last token: one row
    ("go 3 y", 2, 1, "7qx", "7wv"),  # a common beginning and two tails
    ("go 0 z z", 2, 0, "8", "7"),
)
PER_HEAD = ("z", "q", "k", "v", "pattern")
EVERY = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", *PER_HEAD)


def contrasts(tokenizer: Any, cases: Sequence[tuple[str, int, int, str, str]] = CASES) -> list[Item]:
    """Aligned contrasts, one for each case, in which one step differs."""
    out = []
    for k, (question, n_steps, changed, clean_answer, corrupt_answer) in enumerate(cases):
        clean = Trace(f"t{k}", question, tuple(f"now {'xyz'[j]}" for j in range(n_steps)), clean_answer, FORMAT)
        for letter in "abcdefghijklmnopqrstuvw":  # whichever this tokenizer gives as many tokens
            steps = [*clean.steps[:changed], f"now {letter}", *clean.steps[changed + 1 :]]
            corrupt = clean.with_steps(steps, answer=corrupt_answer)
            made = contrast("propagated", clean, corrupt, tokens=(encode(clean, tokenizer), encode(corrupt, tokenizer)))
            if made.aligned:
                out.append(Item(clean, made))
                break
    assert len(out) == len(cases)
    return out


def context_at(folder: Path, family: str, **kwargs: Any) -> Context:
    """A context of a tiny random base and a tuned copy, with the contrasts of `CASES`."""
    save_tiny(folder / "base", family, n_layers=3)
    save_tuned(folder / "base", folder / "tuned", scale=0.05)
    minds = Minds.load({"base": str(folder / "base"), "tuned": str(folder / "tuned")}, **kwargs)
    return Context(minds, contrasts(minds.tokenizer("base")))


def pairs(context: Context) -> list[Contrast]:
    """All contrasts of a context."""
    return [i.contrast for i in context.items if i.contrast is not None]


@dataclass(frozen=True)
class Put:
    """`values` [position of the span, ...] at a component of a layer, in one head or (-1) all, at `start:stop`."""

    component: str
    layer: int
    head: int
    start: int
    stop: int
    values: Tensor

    def hook(self) -> tuple[str, Hook]:
        """The edit as a hook on a whole forward pass."""

        def f(act: Tensor) -> Tensor:
            new, at = act.clone(), slice(self.start, self.stop)
            head = slice(None) if self.head < 0 else slice(self.head, self.head + 1)
            if self.component == "pattern":  # [row, head, query, key]; keys behind the source's length get none
                n_keys = self.values.shape[-1]
                new[:, head, at] = 0.0
                new[:, head, at, :n_keys] = self.values[:, head].transpose(0, 1)
            elif self.component in PER_HEAD:
                new[:, at, head] = self.values[:, head]
            else:
                new[:, at] = self.values
            return new

        return site(self.component, self.layer), f


def prompt_ids(context: Context, pair: Contrast, side: int) -> list[int]:
    """Tokens before the answer of one chain."""
    return list(context.encode((pair.clean, pair.corrupt)[side]).prompt_ids)


# By body: what unpatched runs were found to be, by the weights that were in, tokens and hooks.
_KNOWN: WeakKeyDictionary[Body, dict[Any, dict[Any, Any]]] = WeakKeyDictionary()


def known(body: Body, ids: Sequence[int], hooks: Sequence[tuple[str, Hook]]) -> dict[Any, Any]:
    """Room to remember what an unpatched run is."""
    return _KNOWN.setdefault(body, {}).setdefault((body.label, tuple(ids), tuple(hooks)), {})


def activations(
    body: Body, ids: Sequence[int], component: str, layer: int, hooks: Sequence[tuple[str, Hook]] = ()
) -> Tensor:
    """A site's activations [pos, ...] of one run; for `pattern`, [query, head, key]."""
    kept = known(body, ids, hooks)

    def keeper(key: tuple[str, int]) -> Hook:
        def keep(act: Tensor) -> None:
            kept[key] = act[0].detach().clone()

        return keep

    if (component, layer) not in kept:
        keys = [(c, n) for c in EVERY for n in range(body.n_layers)]
        body.forward(torch.tensor([list(ids)]), hooks=[*((site(*k), keeper(k)) for k in keys), *hooks])
    found = kept[component, layer]
    return found.transpose(0, 1) if component == "pattern" else found


def read(
    context: Context, pair: Contrast, side: int, puts: Sequence[Put] = (), hooks: Sequence[tuple[str, Hook]] = ()
) -> dict[str, Any]:
    """The metrics of one run (`m` in nats, log-probabilities in bits), and `fork`: log-probabilities where they part."""
    prompt = prompt_ids(context, pair, side)
    trace = (pair.clean, pair.corrupt)[side]
    answers = [list(context.encode(replace(trace, answer=c.answer)).answer_ids) for c in (pair.clean, pair.corrupt)]
    longest = max(len(a) for a in answers)
    assert len(answers[0]) == len(answers[1]) and answers[0] != answers[1]
    ids = torch.tensor([[*prompt, *a] for a in answers])
    remembered = known(context.body, ids.flatten().tolist(), hooks)
    if not puts and "read" in remembered:
        return dict(remembered["read"])
    logits = context.body.forward(ids, hooks=[*(p.hook() for p in puts), *hooks])
    logp = logits.double().log_softmax(-1)
    first = len(prompt) - 1
    sums = [sum(float(logp[k, first + j, t]) for j, t in enumerate(a)) for k, a in enumerate(answers)]
    fork = next(j for j in range(longest) if answers[0][j] != answers[1][j])
    at = logp[0, first + fork]
    found = {
        "m": sums[1] - sums[0],
        "logp_clean": sums[0] / math.log(2),
        "logp_corrupt": sums[1] / math.log(2),
        "rank_clean": int((at > at[answers[0][fork]]).sum()),
        "rank_corrupt": int((at > at[answers[1][fork]]).sum()),
        "fork": at,
    }
    if not puts:
        remembered["read"] = found
    return found


def kl_bits(plain: dict[str, Any], patched: dict[str, Any]) -> float:
    """KL(plain ‖ patched) in bits where the answers part."""
    return float((plain["fork"].exp() * (plain["fork"] - patched["fork"])).sum() / math.log(2))


def values_of(
    context: Context,
    pair: Contrast,
    side: int,
    component: str,
    layer: int,
    start: int,
    stop: int,
    hooks: Sequence[tuple[str, Hook]] = (),
) -> Tensor:
    """The activations of one chain of a contrast at a span."""
    return activations(context.body, prompt_ids(context, pair, side), component, layer, hooks)[start:stop]


def patched(
    context: Context,
    pair: Contrast,
    direction: str,
    row: dict[str, Any],
    start: int,
    stop: int,
    hooks: Sequence[tuple[str, Hook]] = (),
) -> dict[str, Any]:
    """One cell (a row of the sweep's table) by whole forward passes: its metrics, `value`, `effect` and `kl`."""
    into, source = (1, 0) if direction == "denoising" else (0, 1)
    puts = []
    for layer in range(row["layer"], row["layer"] + row["window"]):
        given = values_of(context, pair, source, row["component"], layer, start, stop, hooks)
        puts.append(Put(row["component"], layer, row["head"], start, stop, given))
    return compare(context, pair, into, puts, hooks)


def compare(
    context: Context, pair: Contrast, into: int, puts: Sequence[Put], hooks: Sequence[tuple[str, Hook]] = ()
) -> dict[str, Any]:
    """The metrics of a run with edits, against the run without: `value` with the sign of the run's direction."""
    plain, other = read(context, pair, into, hooks=hooks), read(context, pair, 1 - into, hooks=hooks)
    found = read(context, pair, into, puts, hooks)
    sign = 1.0 if into == 0 else -1.0
    return {
        "value": sign * (found["m"] - plain["m"]),
        "effect": sign * (other["m"] - plain["m"]),
        "logp_clean": found["logp_clean"] - plain["logp_clean"],
        "logp_corrupt": found["logp_corrupt"] - plain["logp_corrupt"],
        "rank_clean": found["rank_clean"],
        "rank_corrupt": found["rank_corrupt"],
        "kl": kl_bits(plain, found),
    }
