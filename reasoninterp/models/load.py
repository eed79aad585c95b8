"""Loading one model as plain Hugging Face: where it lies, whether it can be trusted, whether it is whole.

1. `load_hf` loads a source (see `models.source`): safetensors only, no remote code (each unless told otherwise), every
   weight present and finite, in evaluation mode, eager attention, no key/value cache.
2. A LoRA adapter is merged into its base in float32, before anything is hooked: hooks on an unmerged adapter miss
   its part of fused projections.  An adapter whose tensors do not fit the base is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reasoninterp.errors import UserError
from reasoninterp.models.source import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Source,
    adapter_vocabulary,
    brief,
    find_file,
    quiet,
    resolve_source,
    tensor_shapes,
)

__all__ = ["Loaded", "Source", "load_hf", "read_config", "resolve_source"]

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass
class Loaded:
    """A plain Hugging Face model with its tokenizer, and what is worth telling about how it was loaded."""

    source: Source
    model: Any
    tokenizer: Any
    notes: list[str]


def load_hf(
    source: Source,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Loaded:
    """The plain Hugging Face model of a source, checked and ready to be read.

    Raises:
        UserError: no tokenizer, pickled weights, remote code, missing or non-finite weights, an unsupported
            architecture, or an adapter that does not fit.
    """
    notes: list[str] = []
    tokenizer = _tokenizer(source, trust_remote_code)
    # merging in float32 rounds once; merging in bf16 would round the low-rank product and the sum
    read_dtype = torch.float32 if source.kind == "adapter" else dtype
    model = _weights(source.weights, read_dtype, allow_pickle, trust_remote_code, notes)
    if source.kind == "adapter":
        model = _merge(model, source, allow_pickle).to(dtype)
    check_finite(model, source.text)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return Loaded(source, model.to(device), tokenizer, notes)


def read_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The Hugging Face configuration of a source; for an adapter its base's, with the adapter's vocabulary."""
    from transformers import AutoConfig

    weights = source.weights
    try:
        with quiet():
            config = AutoConfig.from_pretrained(weights.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _cannot_read(weights, "configuration", error) from error
    architecture = (config.architectures or ["unknown"])[0]
    if architecture not in SUPPORTED:
        raise UserError(f"{source.text}: {architecture} is not supported; supported are {', '.join(SUPPORTED)}.")
    if source.kind == "adapter":
        rows = adapter_vocabulary(source)
        if rows is not None:
            config.vocab_size = rows
    return config


def check_finite(model: Any, where: str) -> None:
    """Refuse NaN and infinity in any parameter.

    Raises:
        UserError: names the first such tensor.
    """
    for name, p in model.named_parameters():
        # a sum is finite only if every term is, and costs no mask the size of the tensor
        if not torch.isfinite(p.detach().float().sum()) and not torch.isfinite(p.detach()).all():
            raise UserError(f"{where}: the weight {name!r} has non-finite values; load an undamaged checkpoint.")


def _tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """The source's tokenizer; an adapter directory without one takes its base's."""
    from transformers import AutoTokenizer

    path = source.path
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        if source.base is None:
            raise UserError(f"{source.text}: the directory has no tokenizer; save the tokenizer beside the weights.")
        return _tokenizer(source.base, trust_remote_code)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        if source.base is not None:
            return _tokenizer(source.base, trust_remote_code)
        raise _cannot_read(source, "tokenizer", error) from error


def _weights(source: Source, dtype: torch.dtype, allow_pickle: bool, trust_remote_code: bool, notes: list[str]) -> Any:
    """The full model, with every tensor of the architecture present in its files."""
    from transformers import AutoModelForCausalLM

    config = read_config(source, trust_remote_code=trust_remote_code)
    directory = Path(source.path)
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        if not pickled:
            raise UserError(f"{source.text}: the directory has no weights; give one with *.safetensors files.")
        if not allow_pickle:
            raise UserError(f"{source.text}: the weights are pickled; save them as safetensors or allow pickles.")
    try:
        with quiet():
            found: Any = AutoModelForCausalLM.from_pretrained(
                source.path,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:
        raise _cannot_read(source, "weights", error) from error
    model, info = found
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{source.text}: the files lack the weight {missing[0]!r}; load a complete checkpoint.")
    wrong = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if wrong:
        raise UserError(f"{source.text}: the weight {wrong[0]} has another shape than config.json says.")
    if unexpected := sorted(info["unexpected_keys"]):
        notes.append(f"{source.text}: {len(unexpected)} tensors in the files are not used, {unexpected[0]!r} first.")
    return model


def _merge(model: Any, source: Source, allow_pickle: bool) -> Any:
    """The base with the adapter merged into it (in place)."""
    import warnings

    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        message = f"{source.text}: reading a LoRA adapter needs peft; install reasoninterp[lora]."
        raise UserError(message) from error
    assert source.base is not None
    here = f"{source.text}: the adapter does not fit the base {source.base.text!r}"
    weights = find_file(source.path, ADAPTER_WEIGHTS)
    if weights is None and not allow_pickle:
        raise UserError(f"{source.text}: there is no {ADAPTER_WEIGHTS}; save it as safetensors or allow pickles.")
    _check_recorded_base(source)
    rows = adapter_vocabulary(source)
    if rows is not None and rows != model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, source.path)
    except Exception as error:
        raise UserError(f"{here} ({brief(error)}); give the base that it was trained on.") from error
    if weights is not None:
        want, have = tensor_shapes(weights), get_peft_model_state_dict(adapted)
        if odd := sorted(key for key in set(want) ^ set(have) if "lora_" in key):
            raise UserError(f"{here} (the tensor {odd[0]!r} has no place); give the base that it was trained on.")
    merged = adapted.merge_and_unload()
    if any("lora_" in name for name, _ in merged.named_parameters()):
        raise UserError(f"{source.text}: the adapter could not be merged into its base.")
    return merged


def _check_recorded_base(source: Source) -> None:
    """Refuse an adapter that names, as its own base, a local model with other weights than the given base.

    A recorded base that is not at hand (a path on the machine that trained it, a hub id) cannot be compared; the
    shapes are then all that is checked.
    """
    assert source.base is not None
    file = find_file(source.path, ADAPTER_CONFIG)
    recorded = json.loads(Path(file or "").read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    mine, theirs = Path(source.base.path), Path(recorded)
    if not (recorded and mine.is_dir() and theirs.is_dir()) or mine.resolve() == theirs.resolve():
        return
    if not _same_weights(mine, theirs):
        raise UserError(
            f"{source.text}: the adapter was trained on {recorded!r}, whose weights differ from the base "
            f"{source.base.text!r}; give that one as base."
        )


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two directories of safetensors hold the same tensors (files may be cut differently)."""
    from safetensors import safe_open

    def where(folder: Path) -> dict[str, str]:
        return {key: str(file) for file in sorted(folder.glob("*.safetensors")) for key in tensor_shapes(str(file))}

    left, right = where(one), where(other)
    if not left or not right:
        return True  # nothing to compare
    if set(left) != set(right):
        return False
    for key in left:
        with safe_open(left[key], framework="pt") as a, safe_open(right[key], framework="pt") as b:
            x, y = a.get_tensor(key), b.get_tensor(key)
        if x.shape != y.shape:
            return False
        if x.dtype != y.dtype:  # one of the two was saved again in another precision
            if not torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-6):
                return False
        elif not torch.equal(x, y):
            return False
    return True


def _cannot_read(source: Source, what: str, error: Exception) -> UserError:
    """One sentence for the many ways in which reading a model's files fails."""
    if isinstance(error, UserError):
        return error
    if source.kind == "hub":
        return UserError(
            f"{source.text}: neither a directory nor a hub model whose {what} can be read ({brief(error)}); "
            "check the name, or give a directory."
        )
    return UserError(f"{source.text}: the {what} cannot be read ({brief(error)}).")
