"""Sources: what a text names (a local directory, a hub id, or a PEFT adapter for a base), and finding its files.

A text that looks like a path and is no directory is refused at once; anything else is looked up in the local cache of
the hub and then, once, on the hub itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from reasoninterp.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a local directory or a hub id; an adapter names its base besides."""

    text: str
    kind: Literal["local", "hub", "adapter"]
    path: str  # directory or hub id of the weights (of the adapter, for an adapter)
    base: Source | None = None

    @property
    def weights(self) -> Source:
        """The source of the full weights: itself, or the adapter's base."""
        return self.base if self.base is not None else self


def resolve_source(text: str, *, base: str | None = None) -> Source:
    """What a text names.

    Args:
        text: a directory, a hub id, or either of these that holds a PEFT adapter.
        base: what an adapter is put on (default: the base that the adapter's own configuration names).

    Raises:
        UserError: a path that does not exist, or a directory without a model.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return _adapter(text, str(path), base)
        if not (path / "config.json").is_file():
            raise UserError(f"{text}: the directory has no config.json; give a Hugging Face model directory.")
        return Source(text, "local", str(path))
    if path.is_file():
        raise UserError(f"{text}: this is a file; give the Hugging Face directory that holds the model.")
    if _looks_like_path(text):
        raise UserError(f"{text}: no such directory; give a Hugging Face model directory or a hub id.")
    if _hub_has(text, ADAPTER_CONFIG):
        return _adapter(text, text, base)
    return Source(text, "hub", text)


def names_adapter(text: str) -> bool:
    """Whether a text names a PEFT adapter (one that cannot be found is left to `resolve_source` to refuse)."""
    path = Path(text).expanduser()
    if path.exists() or _looks_like_path(text):
        return (path / ADAPTER_CONFIG).is_file()
    return _hub_has(text, ADAPTER_CONFIG)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and logging inside the block, and put both back after it."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as hf_logging

    level, bars, hub = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub)
        if bars:
            hf_logging.enable_progress_bar()


def _adapter(text: str, path: str, base: str | None) -> Source:
    """An adapter's source with its base's; the base must itself be a full model."""
    file = find_file(path, ADAPTER_CONFIG)
    try:
        config = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{text}: adapter_config.json cannot be read ({brief(error)}).") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{text}: the adapter is of type {config.get('peft_type')!r}; only LoRA can be merged.")
    recorded = config.get("base_model_name_or_path")
    if base is None and not recorded:
        raise UserError(f"{text}: the adapter names no base; give the base model too.")
    on = resolve_source(base if base is not None else str(recorded))
    if on.kind == "adapter":
        raise UserError(f"{text}: the base {on.text!r} is itself an adapter; give the full model as base.")
    return Source(text, "adapter", path, on)


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "~", "/"))
        or text.count("/") > 1
        or "\\" in text
        or text.endswith("/")
        or (os.sep in text and Path(text).parent.is_dir())
    )


@lru_cache
def _hub_has(repo: str, name: str) -> bool:
    """Whether a hub repository has a file: by the local cache, or else by asking the hub once.

    Raises:
        UserError: the repository is not in the cache and cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(repo, name), str):
            return True
        if isinstance(try_to_load_from_cache(repo, "config.json"), str):
            return False  # a full model that was downloaded before
        with quiet():
            found = HfApi().model_info(repo, timeout=10)
    except Exception as error:
        raise UserError(
            f"{repo}: neither a directory nor a hub model that can be reached ({brief(error, 80)}); "
            "check the name, or give a directory."
        ) from error
    return any(file.rfilename == name for file in found.siblings or ())


def _hub_file(repo: str, name: str) -> str | None:
    """A file of a hub repository, in the local cache; None where it has none."""
    from huggingface_hub import hf_hub_download

    if not _hub_has(repo, name):
        return None
    with quiet():
        return str(hf_hub_download(repo, name))


def find_file(path: str, name: str) -> str | None:
    """A file of a directory or hub repository; None where it has none."""
    local = Path(path) / name
    if Path(path).is_dir():
        return str(local) if local.is_file() else None
    return _hub_file(path, name)


def adapter_vocabulary(source: Source) -> int | None:
    """Rows of the embedding that an adapter brings along, where tuning resized it."""
    weights = find_file(source.path, ADAPTER_WEIGHTS)
    if weights is None:
        return None
    for key, shape in tensor_shapes(weights).items():
        is_embedding = any(name in key for name in ("embed_tokens", "wte", "lm_head"))
        if is_embedding and "lora_" not in key and len(shape) == 2:
            return int(shape[0])
    return None


def tensor_shapes(file: str) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file, without reading them."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return {key: list(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{file}: the file is not readable as safetensors ({brief(error)}).") from error


def brief(error: BaseException, limit: int = 160) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
