"""What a ledger would cost at 7 B parameters on one GPU: arithmetic, and what `ledger.py` measured of activations.

1. *Activations.*  Bytes alive in a node, without weights, are fitted on all measured sizes (least squares of relative
   errors, no coefficient negative), with numbers of 4 bytes there and of 2 bytes (bf16) here:

       whole        numbers = a · rows · pos · layers · d_model  +  b · rows · pos² · layers · heads
       checkpointed numbers = c · rows · pos · layers · d_model  +  d · rows · pos · d_model  +  e · rows · pos² · heads

2. *Weights*, with P parameters:

       body           2 P bytes (bf16)
       difference     4 P bytes (float32; 2 P if it were kept in bf16)
       beside         4 P bytes in the host's memory (two minds in bf16), from which nodes are formed

3. *Seconds*, with T = 2 · contrasts · pos tokens a node:

       passes         4 P · T · nodes FLOPs in bf16: forward 2 P a token, backward to the activations 2 P, none to weights
       leaf products  2 P · T · nodes FLOPs in float32: one product with the difference
       blends         nodes · (18 P / host + 2 P / link): 2 + 2 bytes read, 4 + 4 + 4 in float32 and 2 written a
                      parameter by the host; 2 copied to the device
       checkpointed   2 P · T · nodes FLOPs more in bf16: every forward pass is computed twice

   so that passes and products together take 6 P · T · nodes FLOPs, as plain training on as many tokens.

Left out: the leaf that is at work holds a few float32 copies of its inputs and gradients (three of rows · pos · 11008 numbers
are 1.1 GB here), and what the allocator wastes.  The rates are assumptions, stated in `Large`, and every line is printed with its figures.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

GB, T = 1e9, 1e12


class Large(NamedTuple):
    """A model that is not here, a set of contrasts, and the machine that is assumed."""

    n_params: float = 6.74e9
    n_layers: int = 32
    d_model: int = 4096
    n_heads: int = 32
    n_contrasts: int = 128
    length: int = 512
    rows: int = 16  # in a batch
    nodes: int = 9
    bf16_rate: float = 300e12  # FLOP/s reached, of some 990e12 that an H100 states
    float32_rate: float = 40e12  # FLOP/s reached, of 67e12
    host_rate: float = 20e9  # bytes/s
    link_rate: float = 25e9  # bytes/s


def terms(rows: float, pos: float, layers: float, d_model: float, heads: float, checkpointed: bool) -> list[float]:
    """The terms of the module's two formulas for activations."""
    if checkpointed:
        return [rows * pos * layers * d_model, rows * pos * d_model, rows * pos**2 * heads]
    return [rows * pos * layers * d_model, rows * pos**2 * layers * heads]


def fitted(table: pd.DataFrame, checkpointed: bool) -> tuple[list[float], float]:
    """Coefficients in numbers a term (bytes over 4), least squares of relative errors; and the largest of these."""
    from scipy.optimize import nnls

    shape = table[["rows", "length", "n_layers", "d_model", "n_heads"]].to_numpy(float)
    x = np.array([terms(r, pos, layers, d, heads, checkpointed) for r, pos, layers, d, heads in shape])
    y = table["checkpointed_alive_bytes" if checkpointed else "alive_bytes"].to_numpy(float) / 4
    coefficients, _ = nnls(x / y[:, None], np.ones(len(y)))
    return coefficients.tolist(), float(np.abs(x @ coefficients / y - 1).max())


def at_seven_billion(table: pd.DataFrame, large: Large | None = None) -> tuple[list[str], dict[str, float]]:
    """The arithmetic of the module, line by line, and its results (bytes and seconds)."""
    m, lines = large or Large(), []
    p, tokens = m.n_params, 2 * m.n_contrasts * m.length
    out = {"body": 2 * p, "difference": 4 * p}
    lines.append(f"P = {p:.3g} parameters, {m.n_layers} layers x {m.d_model}, {m.n_heads} heads")
    lines.append(f"body            2 P = {2 * p / GB:.1f} GB (bf16)")
    lines.append(f"difference      4 P = {4 * p / GB:.1f} GB (float32); in bf16 2 P = {2 * p / GB:.1f} GB")
    for name, checkpointed in (("whole", False), ("checkpointed", True)):
        coefficients, worst = fitted(table, checkpointed)
        each = terms(m.rows, m.length, m.n_layers, m.d_model, m.n_heads, checkpointed)
        size = 2 * float(np.dot(coefficients, each))
        sums = " + ".join(f"{c:.3g} x {t:.3g}" for c, t in zip(coefficients, each, strict=True))
        out[name] = size
        lines.append(
            f"activations     {name}: 2 bytes x ({sums}) = {size / GB:.1f} GB, {m.rows} rows x {m.length} positions "
            f"({size / m.rows / m.length / 1e6:.2f} MB a row and position; fit off by at most {worst:.0%})"
        )
    for name in ("whole", "checkpointed"):
        out[f"device_{name}"] = 6 * p + out[name]
        lines.append(f"on the device   {name}: {(6 * p + out[name]) / GB:.1f} GB")
    lines.append(f"in host memory  4 P = {4 * p / GB:.1f} GB (two minds in bf16)")
    passes, products = 4 * p * tokens * m.nodes, 2 * p * tokens * m.nodes
    blends = m.nodes * (18 * p / m.host_rate + 2 * p / m.link_rate)
    lines.append(
        f"tokens          2 sides x {m.n_contrasts} contrasts x {m.length} = {tokens}; {m.nodes} nodes; "
        f"6 P x tokens x nodes = {(passes + products):.2e} FLOPs"
    )
    lines.append(
        f"passes          4 P x tokens x nodes / {m.bf16_rate / T:.0f} TFLOP/s (bf16) = {passes / m.bf16_rate:.0f} s"
    )
    lines.append(
        f"leaf products   2 P x tokens x nodes / {m.float32_rate / T:.0f} TFLOP/s (float32) = "
        f"{products / m.float32_rate:.0f} s"
    )
    lines.append(
        f"blends          nodes x (18 P / {m.host_rate / GB:.0f} GB/s + 2 P / {m.link_rate / GB:.0f} GB/s) = "
        f"{blends:.0f} s"
    )
    out["seconds"] = passes / m.bf16_rate + products / m.float32_rate + blends
    again = passes / 2 / m.bf16_rate  # checkpointing computes every forward pass twice
    out["seconds_checkpointed"] = out["seconds"] + again
    lines.append(f"in all          {out['seconds']:.0f} s, checkpointed {out['seconds'] + again:.0f} s")
    return lines, out
