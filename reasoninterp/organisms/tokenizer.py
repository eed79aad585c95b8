"""The word-level tokenizer of the word-level tasks: one token per blank-separated word.

Decoding joins with single spaces, so `decode(encode(text)) == text` for every text of the tasks; nothing is added
in front (the first word is always a word that matters, and the position of the answer stays the last of the
prompt).
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from reasoninterp.organisms.tasks import EOS, PAD, UNK, VOCABULARY


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer over `VOCABULARY`, with `<eos>`, `<pad>` and `<unk>` and no opening token."""
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNK))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        padding_side="left",
    )
