"""Training and measuring the word-level organisms, as plain Hugging Face causal language models on one thread.

1. `new_model` makes a small `LlamaForCausalLM` (grouped-query attention, untied embeddings). The scale of its first
   weights, `initializer_range=0.1`, decides whether the task is learned in hundreds of steps or in thousands.
2. `fit` minimises the weighted mean cross-entropy of the next token with AdamW until a check says stop.
3. `sample_chains` writes chains greedily; `answer_logits` reads the answer under any chain.
4. `measure` gives the figures that recipes promise: accuracy on the model's own chains, share of chains that are
   right, follow and stay rates of a whole-chain swap, and how often a cut chain gives the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reasoninterp.organisms.rows import (
    DIGIT_IDS,
    ID,
    QUESTION_LENGTH,
    Rows,
    cut,
    make_rows,
    question_ids,
    step_ids,
    step_values,
)
from reasoninterp.organisms.tasks import EOS, EQUALS, MAX_OPS, MODULUS, PAD, VOCABULARY, Ints, Problems

WARMUP = 20
THETA = 100.0  # the sequences are short: a small base keeps every rotary frequency useful


def new_model(seed: int, layers: int = 3, width: int = 64, heads: int = 4, kv_heads: int = 2) -> LlamaForCausalLM:
    """An untrained organism of the word-level tasks."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ID[EOS],
        pad_token_id=ID[PAD],
    )
    return LlamaForCausalLM(config)


def fit(
    model: torch.nn.Module,
    data: Iterator[Rows],
    *,
    lr: float,
    steps: int,
    check: Callable[[int], bool] | None = None,
    check_every: int = 25,
    decay: bool = False,
    weight_decay: float = 0.01,
    tick: Callable[[int], None] | None = None,
) -> int:
    """Train in place; returns the number of steps taken.

    Args:
        model: a Hugging Face causal language model.
        data: batches.
        lr: peak learning rate, reached after a linear warm-up.
        steps: most steps to take.
        check: called with the number of steps taken every `check_every` steps; true stops.
        check_every: see `check`.
        decay: let the rate fall linearly to a tenth over `steps`.
        weight_decay: of AdamW.
        tick: called after every step (a progress bar).
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
    model.train()
    for step in range(1, steps + 1):
        rate = min(1.0, step / WARMUP) * (1 - 0.9 * step / steps if decay else 1)
        for group in optimiser.param_groups:
            group["lr"] = lr * rate
        rows = next(data)
        ids, weights = torch.from_numpy(rows.ids), torch.from_numpy(rows.weights)
        logits = model(input_ids=ids, use_cache=False).logits
        at = weights[:, 1:] > 0
        losses = torch.nn.functional.cross_entropy(logits[:, :-1][at], ids[:, 1:][at], reduction="none")
        chosen = weights[:, 1:][at]
        loss = (losses * chosen).sum() / chosen.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if tick:
            tick(1)
        if check and step % check_every == 0:
            model.eval()
            stop = check(step)
            model.train()
            if stop:
                break
    model.eval()
    return step


@torch.no_grad()
def sample_chains(model: torch.nn.Module, p: Problems, batch: int = 512) -> tuple[Ints, np.ndarray]:
    """Chains written greedily from the question.

    Returns:
        `[problem, MAX_OPS]` step ids (-1 past the end) and, per problem, whether the chain is well formed: at least
        one step, only values, closed by `=` in time.
    """
    out = np.full((len(p), MAX_OPS + 1), -1)
    for at in range(0, len(p), batch):
        part = slice(at, min(at + batch, len(p)))
        ids = torch.from_numpy(question_ids(p.take(part)))
        for i in range(MAX_OPS + 1):
            word = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            out[part, i] = word[:, 0].numpy()
            ids = torch.cat([ids, word], 1)
    closed = out == ID[EQUALS]
    length = np.where(closed.any(1), closed.argmax(1), 0)
    steps = cut(out[:, :MAX_OPS], length)
    fine = (length > 0) & ((step_values(steps) >= 0) == (steps >= 0)).all(1)
    return steps, fine


@torch.no_grad()
def answer_logits(model: torch.nn.Module, p: Problems, steps: Ints) -> Float[Tensor, "problem vocab"]:
    """Logits where the answer is read, after these step ids."""
    rows = make_rows(p, steps, np.zeros(len(p), dtype=np.int64), np.zeros(len(p), dtype=bool), 1.0)
    equals = torch.from_numpy(QUESTION_LENGTH + (steps >= 0).sum(1))
    logits: Tensor = model(input_ids=torch.from_numpy(rows.ids), use_cache=False).logits
    return logits[torch.arange(len(p)), equals]


def read_answers(model: torch.nn.Module, p: Problems, steps: Ints) -> Ints:
    """Answers as values (-1: the likeliest token is no digit), after these step ids."""
    best: Ints = answer_logits(model, p, steps).argmax(-1).numpy()
    table = np.full(len(VOCABULARY), -1)
    table[DIGIT_IDS] = np.arange(MODULUS)
    return table[best]


@dataclass(frozen=True)
class Measured:
    """Figures on one set of problems; every rate is over all of its problems.

    Attributes:
        accuracy: right answers after the model's own, greedily written chain (a malformed chain is wrong).
        steps_right: own chains that are right in every step.
        malformed: own chains that are not chains.
        follow: answers what a swapped-in chain implies (whole chain of another start value, this question).
        stay: answers what the question implies under that chain.
        early: same answer as under the gold chain when only its first k steps are shown, mean over 0 <= k < n.
        margin: mean of logit[a'] - logit[a] under the swapped-in chain minus the same under the gold chain.
    """

    accuracy: float
    steps_right: float
    malformed: float
    follow: float
    stay: float
    early: float
    margin: float


def own_accuracy(model: torch.nn.Module, p: Problems) -> tuple[float, float, float]:
    """`accuracy, steps_right, malformed` of `Measured`."""
    steps, fine = sample_chains(model, p)
    answers = read_answers(model, p, np.where(fine[:, None], steps, -1))
    values = step_values(steps)
    right = (values == p.steps()).all(1) & fine
    return float(((answers == p.answers) & fine).mean()), float(right.mean()), float((~fine).mean())


def follow_rate(model: torch.nn.Module, p: Problems, seed: int) -> tuple[float, float, float]:
    """`follow, stay, margin` of `Measured`."""
    gold = p.steps()
    swapped = p.steps(p.other_starts(np.random.default_rng([seed, 2])))
    clean, corrupt = p.answers, p.implied(swapped)
    under_swap, under_gold = (answer_logits(model, p, step_ids(p, s)) for s in (swapped, gold))
    best = under_swap.argmax(-1).numpy()
    rows = torch.arange(len(p))
    a, b = torch.from_numpy(DIGIT_IDS[clean]), torch.from_numpy(DIGIT_IDS[corrupt])
    margin = (under_swap[rows, b] - under_swap[rows, a]) - (under_gold[rows, b] - under_gold[rows, a])
    return (
        float((best == DIGIT_IDS[corrupt]).mean()),
        float((best == DIGIT_IDS[clean]).mean()),
        float(margin.mean()),
    )


def measure(model: torch.nn.Module, p: Problems, seed: int) -> Measured:
    """All figures on one set of problems."""
    model.eval()
    accuracy, right, malformed = own_accuracy(model, p)
    follow, stay, margin = follow_rate(model, p, seed)
    gold = step_ids(p, p.steps())
    full = read_answers(model, p, gold)
    lengths = p.lengths
    same, of = 0, 0
    for k in range(MAX_OPS):
        longer = np.flatnonzero(lengths > k)
        if len(longer):
            short = cut(gold[longer], np.full(len(longer), k))
            same += int((read_answers(model, p.take(longer), short) == full[longer]).sum())
            of += len(longer)
    return Measured(accuracy, right, malformed, follow, stay, same / of, margin)
