"""Tiny random models in Hugging Face directories, with a real byte-level BPE tokenizer, for the tests.

`save_tiny(path, family)` writes one; families are `llama` (MHA), `llama-gqa`, `llama-tied`, `qwen2`, `qwen3` and
`gpt2`.  All have 3 layers, d_model 32, 4 heads (2 key/value heads where grouped) and a vocabulary of about 300
tokens, take some 20 ms to make, and have weights large enough that logits differ by order 1.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

FAMILIES = ("llama", "llama-gqa", "qwen2", "qwen3", "gpt2")
ALL_FAMILIES = (*FAMILIES, "llama-tied")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "Tom has 3 apples and buys 12 more, so he has 3 + 12 = 15 apples.",
    "She pays 4 * 5 = 20 dollars. The answer is 20.",
    "There are seven days in a week, so 2 weeks have 14 days.\n#### 14\n",
    "Q: how many pencils are left? A: 9 - 4 = 5 pencils are left.",
    "so x = 1 2 3 4 5 6 7 8 9 0 plus minus times\n",
]


@lru_cache
def _bpe(vocab_size: int, extra: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_CORPUS, extra], trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, extra: str = "", vocab_size: int = 300, added: tuple[str, ...] = (), chat: bool = False) -> Any:
    """A byte-level BPE tokenizer; `extra` changes its merges, `added` adds special tokens, `chat` a chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(vocab_size, extra)), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    added = (*added, "<|im_start|>", "<|im_end|>") if chat else added
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(family: str, vocab_size: int, *, seed: int = 0, n_layers: int = 3) -> Any:
    """A random causal language model in float32 and eval mode; biases and norm gains are random too."""
    import transformers as hf

    shared: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }
    torch.manual_seed(seed)
    if family == "gpt2":
        model: Any = hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=n_layers, n_head=4, n_positions=1024, **shared)
        )
    elif family.startswith("llama"):
        n_kv = 2 if family == "llama-gqa" else 4
        tied = family == "llama-tied"
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(num_key_value_heads=n_kv, tie_word_embeddings=tied, **size, **shared)
        )
    elif family == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **size, **shared))
    elif family == "qwen3":
        model = hf.Qwen3ForCausalLM(
            hf.Qwen3Config(num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, **size, **shared)
        )
    else:
        raise ValueError(family)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "ln_" in name or "norm" in name:
                p.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            elif p.dim() == 1:
                p.copy_(0.2 * noise)
            else:
                p.copy_(noise * (1.0 if "embed" in name or "wte" in name else 0.25))
    return model.eval()


def save_tiny(
    path: Path | str,
    family: str = "llama",
    *,
    seed: int = 0,
    n_layers: int = 3,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    **kwargs: Any,
) -> str:
    """Write a tiny model with its tokenizer as a Hugging Face directory and return the path.

    `vocab_size` is the number of rows of the embedding (default: the tokenizer's); other keywords are passed to
    `tiny_tokenizer`.
    """
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer(**kwargs)
    model = tiny_model(family, vocab_size or len(tokenizer), seed=seed, n_layers=n_layers)
    model.to(dtype).save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    return str(path)


def save_tuned(base: Path | str, path: Path | str, *, scale: float = 0.02, seed: int = 1, resize: int = 0) -> str:
    """Write a tuned copy of the model at `base`: every parameter moved by `scale` times a standard normal.

    `resize` appends that many rows to the embeddings (and that many tokens `<|extra_k|>` to the tokenizer).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(base))
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    if resize:
        tokenizer.add_tokens([f"<|extra_{k}|>" for k in range(resize)])
        model.resize_token_embeddings(model.config.vocab_size + resize, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((scale * torch.randn(p.shape, generator=generator)).to(p.dtype))
    model.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    return str(path)


def save_lora(base: Path | str, path: Path | str, *, targets: list[str], seed: int = 2, rank: int = 4) -> str:
    """Write a random LoRA adapter (with effect of order 0.1 on the weights) for the model at `base`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base))
    fan_in_fan_out = model.config.model_type == "gpt2"
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=fan_in_fan_out
    )
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    peft.save_pretrained(str(path))
    return str(path)
