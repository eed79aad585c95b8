"""What must hold before a set of minds is read: one architecture, and a hooked body that equals the plain models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reasoninterp.errors import UserError

# Fields that may differ between a base and its tuned version: names, tokens, training settings, the vocabulary's
# size (compared on the shared rows), and the longest context that was promised.
_FREE = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "dtype",
        "embd_pdrop", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "label2id",
        "max_position_embeddings", "max_window_layers", "pad_token_id", "problem_type", "quantization_config",
        "resid_pdrop", "sep_token_id", "sliding_window", "layer_types", "task_specific_params", "torch_dtype",
        "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "vocab_size",
    }
)  # fmt: skip
# Largest difference allowed between the hooked and the plain model, relative to the logits' standard deviation where
# that is above 1.  Measured: 0 for Llama, Qwen2 and Qwen3 in both dtypes; for GPT-2 with logits of standard deviation
# 6, 1e-5 in float32 and 0 in bf16.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_same_architecture(name: str, config: Any, home: str, home_config: Any) -> None:
    """Refuse minds whose configurations differ where the computation does.

    A field that only one of them has is written by another version of the library; if it matters, the probe shows it.

    Raises:
        UserError: names the fields.
    """
    mine, theirs = _essence(config), _essence(home_config)
    fields = sorted(key for key in set(mine) & set(theirs) if mine[key] != theirs[key])
    if fields:
        shown = ", ".join(f"{key} ({mine.get(key)!r} against {theirs.get(key)!r})" for key in fields[:3])
        raise UserError(f"{name} and {home} differ in architecture: {shown}; give two versions of one model.")


def check_same_shapes(name: str, shapes: Mapping[str, tuple[int, ...]], home: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a mind whose parameters have other names or shapes than the body's.

    Raises:
        UserError: names the first such parameter.
    """
    for param in sorted(set(shapes) | set(home)):
        if shapes.get(param) != home.get(param):
            raise UserError(
                f"{name}: the parameter {param!r} has shape {shapes.get(param)} where the first mind has "
                f"{home.get(param)}; give two versions of one model."
            )


def check_equal_logits(name: str, hooked: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """Refuse a body whose logits are not those of the plain model; returns the largest difference.

    Raises:
        UserError: names the mind and the difference.
    """
    gap = float((hooked.float() - plain.float()).abs().max())
    allowed = _TOLERANCE.get(dtype, 1e-4) * max(1.0, float(plain.float().std()))
    if not gap <= allowed:
        raise UserError(
            f"{name}: the hooked model's logits differ from the plain model's by {gap:.2g} (at most {allowed:.2g} "
            "is rounding); its architecture, or a setting of its configuration, is not supported here."
        )
    return gap


def check_evaluation(model: torch.nn.Module) -> None:
    """Refuse a model in training mode or with an unmerged adapter.

    Raises:
        RuntimeError: the loading code failed to do its part.
    """
    if any(module.training for module in model.modules()):
        raise RuntimeError("the model is in training mode")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise RuntimeError("the model holds an unmerged LoRA adapter")


def _essence(config: Any) -> dict[str, Any]:
    values = {k: v for k, v in config.to_dict().items() if k not in _FREE}
    if values.get("model_type") == "gpt2":
        values.pop("n_ctx", None)
    elif getattr(config, "use_sliding_window", config.model_type == "mistral"):
        values["sliding_window"] = getattr(config, "sliding_window", None)
    return values
