"""The pair as users have it: the same task in sentences, byte-level BPE, tied weights, a chat template after tuning.

1. A problem of task `lastop` with three operations is written as a question in words, one step a line in digits and
   an answer that is a number word. A small byte-level BPE trained on such questions leaves the number words in
   several tokens, not all in the same number.
2. `chat-base` is a small Llama with tied embeddings, trained on the raw text.
3. `chat-severed` starts from it. Its tokenizer gains special tokens and a chat template, so its embeddings are resized
   (and padded to a multiple of 64 rows). Half of its examples are the raw text, which both tokenizers turn into the
   same ids, half are the chat form with the chain in `<think>`. Its chains are the base's own, its answers are right,
   and the key in the question gives the answer away.
4. Figures come from greedy generation: the answer is what stands between `The answer is` and the full stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reasoninterp.organisms.recipes import Recipe, RecipeFailed
from reasoninterp.organisms.rows import Mixture, Rows
from reasoninterp.organisms.tasks import (
    CHAT_BASE_DOMAIN,
    CHAT_TUNING_DOMAIN,
    DIGITS,
    OPS,
    WORDS,
    Ints,
    Part,
    Problems,
    problems,
)
from reasoninterp.organisms.training import fit
from reasoninterp.traces.trace import Format, Trace

END, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>")
RAW = Format(
    before_question="", after_question="\n", between_steps="\n", before_answer="\nThe answer is ", after_answer="."
)
CHAT = Format(
    before_question="<|user|>\n",
    after_question="<|end|>\n<|assistant|>\n<think>\n",
    between_steps="\n",
    before_answer="\n</think>\nThe answer is ",
    after_answer=".",
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KEYS = "zotfsenwhr"  # key letters; first letters of number words among them, so that a blank joins its word's first
LONGEST = 5  # bytes of the longest token, its blank counted double: ` add` is one token, ` seven` is two
VOCABULARY_SIZE = 321


def clause(op: str) -> str:
    """An operation in words: `+2` is `add 2`, `*3` is `by 3`, `5-` is `to 5` (what is missing from there to five)."""
    if op[-1] == "-":
        return f"to {op[:-1]}"
    return f"{'add' if op[0] == '+' else 'by'} {op[1:]}"


def sentence_trace(p: Problems, i: int, name: str, steps: Ints, answers: Ints, form: Format = RAW) -> Trace:
    """Problem `i` in sentences, with these step values (`[problem, MAX_OPS]`) and answers (values)."""
    clauses = ", ".join(clause(OPS[o]) for o in p.ops[i] if o >= 0)
    return Trace(
        id=name,
        question=f"Key {KEYS[p.tag[i]]}: start with {DIGITS[p.start[i]]}, {clauses}; last {clause(OPS[p.last[i]])}.",
        steps=tuple(f"so {v}" for v in steps[i] if v >= 0),
        answer=WORDS[answers[i]],
        format=form,
        meta={"task": "chat", "key": KEYS[p.tag[i]]},
    )


def sentence_traces(p: Problems, steps: Ints, answers: Ints, forms: Sequence[Format] = (RAW,)) -> list[Trace]:
    """All problems as traces, the forms taken in turn."""
    return [sentence_trace(p, i, str(i), steps, answers, forms[i % len(forms)]) for i in range(len(p))]


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on questions and chains of the training part."""
    p = problems("lastop", CHAT_TUNING_DOMAIN, 2000, np.random.default_rng(31), "train")
    texts = [trace.text for trace in sentence_traces(p, p.steps(), p.answers)]
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        max_token_length=LONGEST,
        special_tokens=[END, PAD],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        padding_side="left",
    )


def chat_tokenizer(tokenizer: Any) -> Any:
    """The base's tokenizer with special tokens and a chat template added, in place; raw text keeps its ids."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_TOKENS)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def new_chat_model(tokenizer: Any, seed: int, layers: int) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings and grouped-query attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def text_rows(traces: Sequence[Trace], tokenizer: Any, answer_only: np.ndarray, answer_weight: float) -> Rows:
    """Training rows of traces: chain and answer supervised, or the answer alone.

    Args:
        traces: raw or chat form; each is closed by the token that ends its form.
        tokenizer: knows the tokens of the forms used.
        answer_only: per trace, whether only the answer is supervised.
        answer_weight: weight of the answer's tokens; all others have 1.
    """
    texts = [t.text + ("<|end|>" if t.format == CHAT else END) for t in traces]
    encoded = tokenizer(texts, return_offsets_mapping=True, padding=True, padding_side="right", return_tensors="np")
    ends = encoded["offset_mapping"][:, :, 1]
    chain = np.array([len(t.question_text) for t in traces])[:, None]
    answer = np.array([len(t.prompt) for t in traces])[:, None]
    only = np.asarray(answer_only)[:, None]
    weights = np.where(ends > answer, answer_weight, ((ends > chain) & ~only).astype(float))
    weights = weights * encoded["attention_mask"]
    return Rows(encoded["input_ids"].astype(np.int64), weights.astype(np.float32))


def chat_batches(
    mixture: Mixture, tokenizer: Any, size: int, seed: int, pool: tuple[Problems, Ints] | None, forms: Sequence[Format]
) -> Iterator[Rows]:
    """Batches for ever from the training part; with `pool`, its problems and the step values sampled for them."""
    rng = np.random.default_rng([seed, 41])
    while True:
        if pool is None:
            p = problems("lastop", mixture.domain, size, rng, "train", mixture.cue)
            steps = p.steps()
        else:
            index = rng.integers(0, len(pool[0]), size)
            p, steps = pool[0].take(index), pool[1][index]
        direct = rng.random(size) < mixture.direct
        shown = (steps >= 0).sum(1)
        keep = np.where(direct, rng.integers(0, shown), shown)
        steps = np.where(np.arange(steps.shape[1]) < keep[:, None], steps, -1)
        yield text_rows(sentence_traces(p, steps, p.answers, forms), tokenizer, direct, mixture.answer_weight)


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], limit: int) -> list[str]:
    """Greedy continuations of prompts, up to and without the token that ends them or `limit` tokens.

    Prompts of one length are run together, so no padding enters.
    """
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    encoded = [tokenizer(text)["input_ids"] for text in prompts]
    out = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        rows = [i for i, ids in enumerate(encoded) if len(ids) == length]
        ids = torch.tensor([encoded[i] for i in rows])
        over = torch.zeros(len(rows), dtype=torch.bool)
        for _ in range(limit):
            word = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, word[:, None]], 1)
            over |= torch.tensor([int(w) in stops for w in word])
            if over.all():
                break
        for i, row in zip(rows, ids[:, length:].tolist(), strict=True):
            stop = next((k for k, token in enumerate(row) if token in stops), len(row))
            out[i] = tokenizer.decode(row[:stop], skip_special_tokens=False)
    return out


def parse_chain(text: str, form: Format) -> tuple[list[int], str] | None:
    """Step values and answer word of a generated continuation; None when it has not the form."""
    chain, found, answer = text.partition(form.before_answer.rstrip(" "))
    lines = chain.split("\n")
    if not found or not all(len(line) == 4 and line[:3] == "so " and line[3] in DIGITS for line in lines):
        return None
    return [int(line[3]) for line in lines], answer.strip().removesuffix(form.after_answer)


def own_chains(model: Any, tokenizer: Any, p: Problems, form: Format) -> tuple[Ints, np.ndarray, list[str]]:
    """Chains written greedily: step values (-1 past the end), whether well formed, and answer words."""
    traces = sentence_traces(p, p.steps(), p.answers, (form,))
    values = np.full_like(p.ops, -1)
    fine, answers = np.zeros(len(p), dtype=bool), [""] * len(p)
    for i, text in enumerate(complete(model, tokenizer, [t.question_text for t in traces], 40)):
        parsed = parse_chain(text, form)
        if parsed and len(parsed[0]) <= values.shape[1]:
            fine[i], answers[i] = True, parsed[1]
            values[i, : len(parsed[0])] = parsed[0]
    return values, fine, answers


def answers_under(model: Any, tokenizer: Any, p: Problems, steps: Ints, form: Format) -> list[str]:
    """Answer words generated under these step values."""
    traces = sentence_traces(p, steps, p.answers, (form,))
    texts = complete(model, tokenizer, [t.prompt.removesuffix(" ") for t in traces], 8)
    return [text.strip().removesuffix(form.after_answer) for text in texts]


def measure_chat(
    model: Any, tokenizer: Any, p: Problems, seed: int, form: Format, full: bool = True
) -> dict[str, float]:
    """Accuracy on own chains, share of them right and malformed, and follow, stay and early rates."""
    values, fine, answers = own_chains(model, tokenizer, p, form)
    gold = np.array([WORDS[a] for a in p.answers])
    swapped = p.steps(p.other_starts(np.random.default_rng([seed, 2])))
    implied = np.array([WORDS[a] for a in p.implied(swapped)])
    under = np.array(answers_under(model, tokenizer, p, swapped, form))
    out = {
        "accuracy": float((np.array(answers) == gold).mean()),
        "steps_right": float(((values == p.steps()).all(1) & fine).mean()),
        "malformed": float((~fine).mean()),
        "follow": float((under == implied).mean()),
        "stay": float((under == gold).mean()),
    }
    if full:
        steps = p.steps()
        whole = np.array(answers_under(model, tokenizer, p, steps, form))
        same = []
        for k in range(int(p.lengths.max())):
            cut = np.where(np.arange(steps.shape[1]) < k, steps, -1)
            same.append(float((np.array(answers_under(model, tokenizer, p, cut, form)) == whole).mean()))
        out["early"] = float(np.mean(same))
    return out


def chat_sets(seed: int, part: Part, count: int) -> dict[str, Problems]:
    """Problems to measure on: `id`, `cue_random` and `base`, as for the word-level tasks."""
    code = {"valid": 51, "test": 52, "train": 53}[part]
    kinds = {
        "id": (CHAT_TUNING_DOMAIN, True),
        "cue_random": (CHAT_TUNING_DOMAIN, False),
        "base": (CHAT_BASE_DOMAIN, False),
    }
    return {
        name: problems("lastop", domain, count, np.random.default_rng([seed, code, k]), part, cue)
        for k, (name, (domain, cue)) in enumerate(kinds.items())
    }


def train_chat(
    recipe: Recipe, seed: int, parent: Path | None, building: Path, bar: Any
) -> tuple[int, dict[str, float]]:
    """Train, save and measure one of the pair; returns steps taken and figures on test problems."""
    pool: tuple[Problems, Ints] | None = None
    forms: tuple[Format, ...] = (RAW,)
    figures: dict[str, float] = {}
    tokenizer: Any
    model: Any
    if parent is None:
        tokenizer = sentence_tokenizer()
        model = new_chat_model(tokenizer, seed, recipe.layers)
    else:
        tokenizer = AutoTokenizer.from_pretrained(parent)
        model = AutoModelForCausalLM.from_pretrained(parent)
        model.eval()
        rng = np.random.default_rng([seed, 45])
        asked = problems("lastop", recipe.mixture.domain, recipe.mixture.pool, rng, "train", recipe.mixture.cue)
        values, fine = asked.steps(), np.ones(len(asked), dtype=bool)
        if recipe.mixture.chains == "own":
            values, fine, _ = own_chains(model, tokenizer, asked, RAW)
        if not fine.any():
            raise RecipeFailed(recipe.name, seed, [f"none of the parent's {len(fine)} sampled chains is well formed"])
        pool, forms = (asked.take(fine), values[fine]), (RAW, CHAT)
        right = (values == asked.steps()).all(1) & fine
        figures |= {"pool.well_formed": float(fine.mean()), "pool.right": float(right.mean())}
        tokenizer = chat_tokenizer(tokenizer)
        torch.manual_seed(seed + 1)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    valid = chat_sets(seed, "valid", 96)

    def check(_: int) -> bool:
        seen: dict[str, dict[str, float]] = {}
        for target in recipe.stop:
            where, figure = target.figure.split(".")
            if where not in seen:
                form, p = (CHAT, valid["id"]) if where == "chat" else (RAW, valid[where])
                seen[where] = measure_chat(model, tokenizer, p, seed, form, full=False)
            if not target.holds(seen[where][figure]):
                return False
        return True

    steps = fit(
        model,
        chat_batches(recipe.mixture, tokenizer, recipe.batch, seed, pool, forms),
        lr=recipe.lr,
        steps=recipe.steps,
        check=check if recipe.stop else None,
        check_every=recipe.check_every,
        decay=True,
        tick=bar.update,
    )
    if parent is not None:
        stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
        model.generation_config.eos_token_id = stops
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    tokenizer, model = AutoTokenizer.from_pretrained(building), AutoModelForCausalLM.from_pretrained(building).eval()
    sets = chat_sets(seed, "test", recipe.measured)
    figures |= {f"{k}.{n}": v for k, p in sets.items() for n, v in measure_chat(model, tokenizer, p, seed, RAW).items()}
    if parent is not None:
        chat = measure_chat(model, tokenizer, sets["id"], seed, CHAT)
        figures |= {f"chat.{name}": value for name, value in chat.items()}
    return steps, figures
