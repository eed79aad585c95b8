"""Random networks and contrasts of stated sizes for the benchmarks.

A prompt has `length` tokens: a question of a tenth of them, then `n_steps` steps of equal length.  Its corrupt chain differs
in one word, at the position where the two runs part.  Words are tokens, so every size is exact.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reasoninterp.models.context import Context, Item
from reasoninterp.models.minds import Minds
from reasoninterp.traces.contrast import contrast
from reasoninterp.traces.trace import Format, Trace, encode

FORMAT = Format(before_question="", after_question=" ", between_steps=" ", before_answer=" ", after_answer=" .")
N_WORDS = 1000
N_VOCABULARY = N_WORDS + 24
FAMILIES = ("gpt2", "llama")


class Size(NamedTuple):
    """A network and a batch of prompts."""

    n_layers: int
    d_model: int
    n_heads: int
    length: int
    batch: int

    @property
    def label(self) -> str:
        """Layers × width, positions."""
        return f"{self.n_layers} x {self.d_model}, {self.length} positions"


def word_tokenizer() -> Any:
    """One token a word: `w0` … `w999` and the full stop."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(N_WORDS)} | {".": N_WORDS, "<eos>": N_WORDS + 1, "<unk>": N_WORDS + 2}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>")


def kv_heads(size: Size, family: str) -> int:
    """Key and value heads: as many as heads in `gpt2`, half as many (GQA) in `llama`."""
    return size.n_heads if family == "gpt2" else size.n_heads // 2


def mlp_width(size: Size, family: str) -> int:
    """Hidden units of the MLP: 4 d_model, or two thirds of that where it is gated."""
    return 4 * size.d_model if family == "gpt2" else 8 * size.d_model // 3 // 8 * 8


def save_model(folder: Path, size: Size, family: str = "gpt2", seed: int = 0) -> Path:
    """Write a random network of a size: `gpt2`, or `llama` with grouped-query attention."""
    import transformers as hf

    shared: dict[str, Any] = {"vocab_size": N_VOCABULARY, "bos_token_id": N_WORDS + 1, "eos_token_id": N_WORDS + 1}
    torch.manual_seed(seed)
    if family == "gpt2":
        config: Any = hf.GPT2Config(
            n_embd=size.d_model, n_layer=size.n_layers, n_head=size.n_heads, n_positions=size.length + 8, **shared
        )
        model: Any = hf.GPT2LMHeadModel(config)
    else:
        config = hf.LlamaConfig(
            hidden_size=size.d_model,
            intermediate_size=mlp_width(size, family),
            num_hidden_layers=size.n_layers,
            num_attention_heads=size.n_heads,
            num_key_value_heads=kv_heads(size, family),
            max_position_embeddings=size.length + 8,
            **shared,
        )
        model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # larger than at initialisation, so that effects are of order 1
                p.mul_(4.0)
    model.eval().save_pretrained(str(folder))
    word_tokenizer().save_pretrained(str(folder))
    return folder


def contrasts(tokenizer: Any, size: Size, parts_at: float, n_steps: int = 9, seed: int = 0) -> list[Item]:
    """`size.batch` aligned contrasts whose runs part at a share of the prompt (at least the second token)."""
    rng = random.Random(seed)
    made = []
    n_question = max(1, size.length // (n_steps + 1))
    at = parting(size, parts_at)
    for k in range(size.batch):
        words = [f"w{rng.randrange(N_WORDS)}" for _ in range(size.length)]
        other = list(words)
        other[at] = f"w{(int(words[at][1:]) + 1 + rng.randrange(N_WORDS - 1)) % N_WORDS}"
        answers = rng.sample(range(N_WORDS), 2)
        edges = [n_question + i * (size.length - n_question) // n_steps for i in range(n_steps + 1)]

        def trace(chain: list[str], answer: int, k: int = k, edges: list[int] = edges) -> Trace:
            steps = tuple(" ".join(chain[a:b]) for a, b in itertools.pairwise(edges))
            return Trace(f"t{k}", " ".join(chain[:n_question]), steps, f"w{answer}", FORMAT)

        clean, corrupt = trace(words, answers[0]), trace(other, answers[1])
        if clean.question != corrupt.question:  # the runs part within the question: it becomes part of the first step
            clean, corrupt = (_open(t) for t in (clean, corrupt))
        item = contrast("propagated", clean, corrupt, tokens=(encode(clean, tokenizer), encode(corrupt, tokenizer)))
        assert item.aligned and len(encode(clean, tokenizer).prompt_ids) == size.length
        made.append(Item(clean, item))
    return made


def _open(trace: Trace) -> Trace:
    first, *rest = trace.question.split(" ")
    return Trace(trace.id, first, (" ".join([*rest, trace.steps[0]]), *trace.steps[1:]), trace.answer, trace.format)


def parting(size: Size, parts_at: float) -> int:
    """The token at which runs part that do so at a share of the prompt."""
    return max(1, int(parts_at * size.length))


def context_of(
    folder: Path, size: Size, parts_at: float, n_steps: int = 9, seed: int = 0, device: str = "cpu"
) -> Context:
    """A context of one mind and its contrasts."""
    minds = Minds.load({"base": str(folder)}, device=device)
    return Context(minds, contrasts(minds.tokenizer("base"), size, parts_at, n_steps, seed))
