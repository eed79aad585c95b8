"""A tiny GPT-2, set by hand, that answers with its one step; and versions of it whose truth is known.

Sequences are `q : s = a`.  In layer 0, head 0 looks from `=` to the step and copies it to the answer (the path); head 1
looks at the question and copies a digit that stands there (the rival), with strength 0 in the base.  A clean chain's
step is the question's digit, a corrupt one's another.  A question `x` is no digit: the rival has nothing to copy.
Two dimensions hold a large constant, so that the final norm's scale is nearly the same whatever is written: what the
rival adds to the logits leaves E as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Trace, encode

VOCAB = [*"0123456789", "x", ":", "=", "<eos>", "<unk>", "<pad>"]
FORMAT = Format(after_question=" : ", between_steps=" ", before_answer=" = ", after_answer=" <eos>")
N, POS, D_HEAD = len(VOCAB), 16, 25
OUT = N + POS  # where answers are written
WIDTH = 2 * D_HEAD  # tokens, positions, answers, and the two large ones
QUESTION, COLON, STEP, READ = range(4)


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def save(
    path: Path, *, carries: float = 1.0, looks_at: int = STEP, rival: float = 0.0, drift: float = 0.0, seed: int = 1
) -> str:
    """Write a model.

    Args:
        path: the directory.
        carries: what head 0's output counts (0: it carries nothing).
        looks_at: the position that head 0 looks at (another than the step: it looks away).
        rival: what head 1's output counts.
        drift: standard deviation of noise on every weight.
        seed: of that noise.
    """
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=N, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=POS, tie_word_embeddings=False, bos_token_id=13,
        eos_token_id=13, pad_token_id=15, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = name.endswith("weight") and ".ln_" in name
            p.copy_(torch.full_like(p, float(gain)) if p.dim() == 1 else 0.01 * torch.randn(p.shape))
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(N, WIDTH))
        model.transformer.wpe.weight.copy_(torch.roll(torch.eye(POS, WIDTH), N, 1))
        model.transformer.wpe.weight[:, -2], model.transformer.wpe.weight[:, -1] = 5.0, -5.0
        attn = model.transformer.h[0].attn
        q, k, v = attn.c_attn.weight.split(WIDTH, 1)  # views: inputs in rows
        attn.c_proj.weight.zero_()
        for head, (at, strength) in enumerate(((looks_at, carries), (QUESTION, rival))):
            first = head * D_HEAD
            q[N + READ : N + POS, first] = 13.0  # also behind the answer, so that what is written there says no more
            k[N + at, first] = 13.0
            for digit in range(10):
                v[digit, first + digit] = 1.0
                attn.c_proj.weight[first + digit, OUT + digit] = strength
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, OUT : OUT + N] = 10 * torch.eye(N)
        noise = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.add_(drift * torch.randn(p.shape, generator=noise))
    model.save_pretrained(str(path))
    tokenizer().save_pretrained(str(path))
    return str(path)


def items(n: int = 64, *, with_rival: bool = True, seed: int = 0) -> list[Item]:
    """Traces with a contrast and a swap each; without the rival, the question is `x`."""
    rng, words, out = np.random.default_rng(seed), tokenizer(), []
    for k in range(n):
        first, second = (str(d) for d in rng.choice(10, 2, replace=False))
        clean = Trace(f"t{k}", first if with_rival else "x", (first,), first, FORMAT)
        corrupt = clean.with_steps((second,), answer=second)
        tokens = encode(clean, words), encode(corrupt, words)
        out.append(Item(clean, *(contrast(kind, clean, corrupt, tokens=tokens) for kind in ("propagated", "swap"))))
    return out


def context(folder: Path, tuned: dict[str, dict[str, Any]], n: int = 64) -> Context:
    """The base beside tuned versions of it, by name, with the traces in which the rival is there."""
    sources = {"base": save(folder / "base"), **{name: save(folder / name, **how) for name, how in tuned.items()}}
    return Context(Minds.load(sources), items(n), max_new_tokens=4)
