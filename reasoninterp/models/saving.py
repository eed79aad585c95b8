"""Saving a mind (or a blend, or a graft) as an ordinary Hugging Face directory.

1. The weights of a handle are put into the body and written under the plain model's parameter names as safetensors (in
   several files with an index where they are large), in the body's dtype.
2. Configuration, generation configuration and tokenizer are those of one mind, `like`; a LoRA adapter has been merged
   when it was loaded, so what is saved is a full model with its base's configuration.
3. The vocabulary has the rows of `like`: rows that the body has beyond it are left out, and rows that not all minds
   share, which no comparison ever reads, are `like`'s own, whatever was blended or grafted.
4. Everything is written beside the target and renamed, so that a directory that is there is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.models.load import read_config
from reasoninterp.models.minds import Handle, Minds
from reasoninterp.models.source import quiet


def check_free(path: str | Path) -> Path:
    """The path, if a directory can be written there.

    Raises:
        UserError: a file, or a directory that is not empty.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path}: this is a file; give a directory.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {path}: the directory is not empty; give a new one, nothing is overwritten.")
    return path


def save_mind(minds: Minds, handle: str | Handle, path: str | Path, *, like: str | None = None) -> Path:
    """Write the weights of a handle as a Hugging Face directory.

    Args:
        minds: where the handle's minds are.
        handle: a mind, a blend or a graft.
        path: a directory that is not there yet, or is empty.
        like: the mind whose configuration, tokenizer and vocabulary it gets (default: the mind that is grafted onto,
            the one that a blend ends in, or the mind itself).

    Returns:
        The directory.

    Raises:
        UserError: the directory is not empty or cannot be written, or no such mind.
    """
    from huggingface_hub import save_torch_state_dict

    path, handle = check_free(path), minds.handle(handle)
    like = minds.handle(like if like is not None else _main_mind(handle)).name
    config = read_config(minds.sources[like])  # as its source states it, not as the body needs it
    config.dtype = minds.dtype
    unfinished = path.parent / f".{path.name}.unfinished-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        save_torch_state_dict(_state(minds, handle, like, int(config.vocab_size)), str(unfinished))
        config.save_pretrained(str(unfinished))
        minds.tokenizer(like).save_pretrained(str(unfinished))
        _save_generation_config(minds, like, unfinished)
        path.mkdir(parents=True, exist_ok=True)
        unfinished.rename(path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot write here ({error.strerror}); give another directory.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _state(minds: Minds, handle: Handle, like: str, rows: int) -> dict[str, Tensor]:
    """A handle's tensors by the plain model's names, with the vocabulary of the mind `like` (`rows` rows)."""
    state, n_shared = minds.weights(handle), minds.body.n_vocab_shared
    vocabulary = {p.param for u in minds.units("block") if u.name in ("embed", "unembed") for p in u.parts}
    own = minds.weights(like) if rows > n_shared else state
    for name in vocabulary:
        # No handle says what the rows are that not all minds share.
        state[name] = torch.cat([state[name][:n_shared], own[name][n_shared:rows]])
    return state


def _main_mind(handle: Handle) -> str:
    """The mind that a graft is put onto, that a blend ends in, or itself."""
    while handle.kind != "mind":
        following = handle.second if handle.kind == "blend" else handle.first
        assert following is not None
        handle = following
    return handle.name


def _save_generation_config(minds: Minds, like: str, folder: Path) -> None:
    """Save the generation configuration of a mind's weights, where there is one."""
    from transformers import GenerationConfig

    try:
        with quiet():
            GenerationConfig.from_pretrained(minds.sources[like].weights.path).save_pretrained(str(folder))
    except (OSError, ValueError):  # many models have none
        return
