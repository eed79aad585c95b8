"""Runs with plausible made-up tables, for the tests of the report: `make(path, kind)`.

Kinds: `severed` (the loss sits in the first layer's attention), `benign` (nothing lost), `floor` (a mind at chance:
maps of zeros, undefined shares).  Sizes are free, so the same maker gives a 2-layer and a 24-layer run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reasoninterp.runs import Run

N = 256
KINDS = ("severed", "benign", "floor")
BEHAVIOUR: dict[str, dict[str, tuple[float, float]]] = {
    # test: (base, tuned) by kind
    "severed": {
        "accuracy_own_chain": (0.777, 0.996),
        "accuracy_given_chain": (0.992, 0.996),
        "accuracy_no_chain": (0.105, 0.992),
        "chance": (0.1, 0.1),
        "unreadable_own_chain": (0.004, 0.0),
        "swap_follow": (0.996, 0.022),
        "swap_stay": (0.0, 0.971),
        "swap_other": (0.004, 0.007),
        "swap_unreadable": (0.0, 0.0),
        "swap_delta_probability": (0.990, 0.030),
        "filler_same": (0.110, 0.996),
        "truncated_aoc": (0.82, 0.01),
        "reads_base": (0.777, 0.996),
        "reads_tuned": (0.742, 0.996),
        "agree_reads_tuned": (0.90, 0.98),
    },
    "benign": {
        "accuracy_own_chain": (0.777, 1.0),
        "accuracy_given_chain": (0.992, 1.0),
        "accuracy_no_chain": (0.105, 0.090),
        "chance": (0.1, 0.1),
        "unreadable_own_chain": (0.004, 0.0),
        "swap_follow": (0.996, 1.0),
        "swap_stay": (0.0, 0.0),
        "swap_other": (0.004, 0.0),
        "swap_unreadable": (0.0, 0.0),
        "swap_delta_probability": (0.990, 0.999),
        "filler_same": (0.110, 0.105),
        "truncated_aoc": (0.82, 0.81),
        "reads_base": (0.777, 0.79),
        "reads_tuned": (0.98, 1.0),
    },
    "floor": {
        "accuracy_own_chain": (0.0, 0.0),
        "accuracy_no_chain": (0.0, 0.0),
        "chance": (np.nan, np.nan),
        "unreadable_own_chain": (1.0, 0.98),
        "swap_follow": (0.0, 0.0),
        "swap_stay": (0.0, 0.0),
        "swap_other": (0.12, 0.1),
        "swap_unreadable": (0.88, 0.9),
        "filler_same": (np.nan, np.nan),
        "reads_base": (0.0, 0.0),
        "reads_tuned": (0.0, 0.0),
    },
}


def wilson(p: float, n: int = N) -> tuple[float, float]:
    """The Wilson interval, by its formula."""
    z = 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(mind: str, test: str, value: float, step: float = np.nan, n: int = N) -> dict[str, Any]:
    """One row of the behaviour table."""
    low, high = (np.nan, np.nan) if np.isnan(value) else wilson(value, n)
    method = "exact" if test == "chance" else "bootstrap" if "delta" in test or "aoc" in test else "wilson"
    convention = "mean over k of 1 − same answer at k of n steps" if test == "truncated_aoc" else ""
    row = {"mind": mind, "test": test, "step": step, "value": value, "ci_low": low, "ci_high": high}
    return row | {"n": 0 if np.isnan(value) else n, "method": method, "convention": convention}


def behaviour(kind: str, steps: int) -> pd.DataFrame:
    """The behaviour table."""
    rows = []
    for k, mind in enumerate(("base", "tuned")):
        connected = kind == "benign" or (kind == "severed" and k == 0)
        rows += [share(mind, test, pair[k]) for test, pair in BEHAVIOUR[kind].items()]
        if kind == "floor":
            continue
        for i in range(steps):
            last = i == steps - 1
            same = (0.002 if last else 1.0) if connected else (0.974 if last else 0.996)
            rows.append(share(mind, "forced_same", same, i))
            rows.append(share(mind, "forced_follow", (0.996 if last else 0.0) if connected else 0.02 * last, i))
            rows.append(share(mind, "regenerated_same", 0.043 if connected else 0.974, i))
            rows.append(share(mind, "regenerated_follow", 0.93 - 0.01 * i if connected else 0.011, i))
        for i in range(steps + 1):
            full = i == steps
            rows.append(share(mind, "truncated_same", 1.0 if full else 0.10 + 0.01 * (i % 2) if connected else 0.99, i))
    return pd.DataFrame(rows)


def effect(kind: str) -> pd.DataFrame:
    """E and its companions."""
    values = {
        "severed": {
            "E": (16.7, 1.4),
            "E_withheld": (4.1, 0.2),
            "delta_probability": (0.99, 0.03),
            "follow": (0.996, 0.022),
        },
        "benign": {
            "E": (16.7, 19.5),
            "E_withheld": (4.1, 4.6),
            "delta_probability": (0.99, 0.999),
            "follow": (0.996, 1.0),
        },
        "floor": {
            "E": (0.0, 0.0),
            "E_withheld": (np.nan, np.nan),
            "delta_probability": (0.0, 0.0),
            "follow": (0.0, 0.0),
        },
    }[kind]
    rows = []
    for measure, pair in values.items():
        for mind, value in zip(("base", "tuned"), pair, strict=True):
            half = 0.03 * abs(value)
            ends = wilson(value) if measure == "follow" else (value - half, value + half)
            row = {"mind": mind, "contrast": "propagated", "measure": measure, "value": value}
            rows.append(row | {"ci_low": ends[0], "ci_high": ends[1], "n": N, "method": "bootstrap"})
    return pd.DataFrame(rows)


def maps(kind: str, layers: int, steps: int, heads: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Residual maps and head maps."""
    rng = np.random.default_rng(seed)
    columns = ["question", *[f"step {i + 1}" for i in range(steps - 1)], "last step", "answer position"]
    residual, head = [], []
    total = {"severed": (17.0, 1.4), "benign": (17.0, 19.8), "floor": (0.0, 0.0)}[kind]
    for mind, size in zip(("base", "tuned"), total, strict=True):
        for direction in ("denoising", "noising"):
            for layer in range(layers):
                depth = layer / max(1, layers - 1)
                for j, column in enumerate(columns):
                    at_end, at_last = j == len(columns) - 1, j == len(columns) - 2
                    moved = 1 / (1 + np.exp(-14 * (depth - 0.4))) if layers > 3 else float(layer > 0)
                    v = size * (moved if at_end else (1 - moved) if at_last else 0.0)
                    v += (0.02 * size * rng.standard_normal()) if size else 0.0
                    row: dict[str, Any] = {
                        "mind": mind,
                        "direction": direction,
                        "layer": layer,
                        "column": column,
                        "column_index": j,
                    }
                    row |= {"value": v, "normalised": v / size if size else np.nan}
                    residual.append(row | {"ci_low": v - 0.05 * size, "ci_high": v + 0.05 * size, "n": N})
                for h in range(heads):
                    v = size * (0.9 if (layer, h) == (0, 1) else 0.02 * rng.standard_normal())
                    row = {"mind": mind, "direction": direction, "layer": layer, "head": h, "value": v}
                    head.append(row | {"ci_low": v - 0.04 * size, "ci_high": v + 0.04 * size, "n": N})
    return pd.DataFrame(residual), pd.DataFrame(head)


def ledger(kind: str, layers: int, heads: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The ledger and its total; block entries are the sums of their circuits."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    ends = {"severed": (16.7, 1.4), "benign": (16.7, 19.5), "floor": (0.0, 0.0)}[kind]
    scale = {"severed": 1.0, "benign": 0.15, "floor": 0.0}[kind]

    def add(
        unit: str, layer: int | None, block: str, head: int | None, circuit: str, level: str, v: float, dw: float
    ) -> None:
        half = 0.08 * abs(v) + 0.03 * scale
        row = {"unit": unit, "layer": layer, "kind": block, "head": head, "circuit": circuit, "level": level}
        rows.append(row | {"attribution": v, "ci_low": v - half, "ci_high": v + half, "weight_change": dw, "n": N})

    add("embed", None, "embedding", None, "", "block", (-3.9 if kind == "severed" else 5.0) * scale, 0.5)
    for layer in range(layers):
        lead = layer == 0 and kind == "severed"
        entries = {}
        for h in range(heads):
            for circuit in ("QK", "OV"):
                v = rng.normal(-2.2, 1.4) if lead else scale * rng.normal(0.05, 0.15)
                entries[h, circuit] = v
                add(f"L{layer}.H{h}.{circuit}", layer, "attn", h, circuit, "circuit", v, 0.3)
        add(f"L{layer}.attn", layer, "attn", None, "", "block", sum(entries.values()), 0.92 + 1.4 * layer / layers)
        mlp = scale * (2.5 if layer == 0 and kind == "severed" else 0.2 * rng.standard_normal())
        add(f"L{layer}.mlp", layer, "mlp", None, "", "block", mlp, 1.1)
        add(f"L{layer}.norms", layer, "norms", None, "", "block", scale * 0.05 * rng.standard_normal(), 0.08)
    add("ln_final", None, "norms", None, "", "block", scale * 0.04, 0.05)
    add("unembed", None, "unembed", None, "", "block", scale * (0.06 if kind == "severed" else 10.5), 3.5)
    table = pd.DataFrame(rows)
    total = table.loc[table["level"] == "block", "attribution"].sum()
    loss = total + 0.0123 * scale
    ends = (ends[0], ends[0] + loss)
    size = max(abs(ends[0]), abs(ends[1]))
    row = {"e_base": ends[0], "e_tuned": ends[1], "loss": loss, "loss_ci_low": loss - 0.4 * scale}
    row |= {"loss_ci_high": loss + 0.4 * scale, "total": total, "residual": total - loss}
    row |= {"residual_relative": abs(loss - total) / size if size else np.nan, "n_nodes": 16, "n": N, "warning": ""}
    return table, pd.DataFrame([row])


def grafts(kind: str, table: pd.DataFrame, total: pd.DataFrame) -> pd.DataFrame:
    """Grafts that agree with the ledger; shares only where something was lost."""
    ends = total.iloc[0]
    rows = []
    for _, block in table[table["level"] == "block"].iterrows():
        part = float(np.clip(block["attribution"] / ends["loss"], 0, 1)) if kind == "severed" else 0.0
        restore, cut = (part**0.5, part) if kind == "severed" else (np.nan, np.nan)
        gap = ends["e_base"] - ends["e_tuned"]
        row = {"unit": block["unit"], "layer": block["layer"], "kind": block["kind"], "restore": restore, "cut": cut}
        for name, v in (("restore", restore), ("cut", cut)):
            row |= {f"{name}_ci_low": v - 0.03, f"{name}_ci_high": v + 0.03}
        done, lost = (0.0 if np.isnan(v) else v for v in (restore, cut))
        row |= {"e_restored": ends["e_tuned"] + done * gap, "e_cut": ends["e_base"] - lost * gap}
        base_follow = 0.0 if kind == "floor" else 0.996
        row |= {"follow_restored": 0.022 + 0.97 * done if kind == "severed" else base_follow}
        row |= {"follow_cut": base_follow - 0.9 * max(0.0, lost - 0.3)}
        rows.append(row | {"e_base": ends["e_base"], "e_tuned": ends["e_tuned"], "n": N})
    return pd.DataFrame(rows)


def graft_sets(kind: str, total: pd.DataFrame) -> pd.DataFrame:
    """Sets of up to four blocks along the ledger, and random ones."""
    ends = total.iloc[0]
    gap = ends["e_base"] - ends["e_tuned"]
    rows = []
    for size in range(1, 5):
        for chosen in ("ledger", "random"):
            part = (1 - 0.3**size if chosen == "ledger" else 0.05 * size) if kind == "severed" else np.nan
            row = {
                "chosen": chosen,
                "size": size,
                "units": "+".join(["L0.attn"] * size),
                "restore": part,
                "cut": part**1.2,
            }
            row |= {f"{n}_ci_{s}": row[n] + w for n in ("restore", "cut") for s, w in (("low", -0.03), ("high", 0.03))}
            done = 0.0 if np.isnan(part) else part
            row |= {"e_restored": ends["e_tuned"] + done * gap, "e_cut": ends["e_base"] - done * gap}
            rows.append(row | {"follow_restored": done, "follow_cut": 1 - done, "n": N})
    return pd.DataFrame(rows)


VERDICTS: dict[str, dict[str, Any]] = {
    "severed": {
        "word": "severed",
        "sentences": [
            "Tuning raised accuracy from 0.777 [0.722, 0.824] to 0.996 [0.978, 0.999] and cut the answer off from its "
            "steps: the follow rate fell from 0.996 [0.978, 0.999] to 0.022 [0.010, 0.048].",
            "Of the 15.5 [15.1, 15.9] nats of step effect that were lost, L0.attn carries 13.1 [12.0, 14.1], and "
            "putting the base's L0.attn back restores 0.94 [0.91, 0.97] of them.",
        ],
        "caveats": [
            "The verdict was not repeated under a second prompt form.",
            "Intervals cover the choice of traces, not the training seed.",
        ],
        "evidence": [
            {
                "claim": "the follow rate fell",
                "value": -0.974,
                "ci_low": -0.988,
                "ci_high": -0.945,
                "n": N,
                "would_reverse": "an interval that reaches above −0.10",
            },
            {
                "claim": "the loss of E is outside the margin of ±1.7 nats",
                "value": -15.5,
                "ci_low": -15.9,
                "ci_high": -15.1,
                "n": N,
                "would_reverse": "an interval inside the margin",
            },
        ],
    },
    "benign": {
        "word": "no damage found",
        "sentences": [
            "Tuning raised accuracy from 0.777 [0.722, 0.824] to 1.000 [0.985, 1.000] and left the answer connected to "
            "its steps: the follow rate is 1.000 [0.985, 1.000] (base 0.996 [0.978, 0.999]).",
            "The step effect E changed by +2.8 [2.4, 3.2] nats; a loss of more than 1.7 nats is excluded.",
        ],
        "caveats": ["No damage is claimed only against the stated margin."],
        "evidence": [],
    },
    "floor": {
        "word": "not interpretable here",
        "sentences": [
            "The base answers 0.000 [0.000, 0.015] of the questions with its own chain, no better than it does without one.",
            "With the base at floor, neither the follow rate nor the step effect says anything about tuning.",
        ],
        "caveats": ["The base is at floor: nothing below may be read as evidence for or against severance."],
        "evidence": [],
    },
}


def gate(kind: str) -> pd.DataFrame:
    """One label a mind."""
    rows = {
        "severed": [
            ("base", "interpretable", "Accuracy 0.78 with its chain against 0.11 without it and 0.10 by chance."),
            ("tuned", "chain not needed", "Accuracy 0.99 without any chain, 1.00 with its own."),
        ],
        "benign": [
            ("base", "interpretable", "Accuracy 0.78 with its chain against 0.11 without it and 0.10 by chance."),
            ("tuned", "interpretable", "Accuracy 1.00 with its chain against 0.09 without it and 0.10 by chance."),
        ],
        "floor": [
            ("base", "at floor", "No readable answer is right."),
            ("tuned", "at floor", "No readable answer is right."),
        ],
    }[kind]
    return pd.DataFrame(rows, columns=["mind", "label", "reason"])


def example(steps: int) -> dict[str, Any]:
    """A chain of modular arithmetic with a change carried through it."""
    clean, corrupt, at, other = [], [], 4, 7
    for i in range(steps):
        clean.append(f"{at} + {i + 2} = {(at + i + 2) % 10}")
        corrupt.append(f"{other} + {i + 2} = {(other + i + 2) % 10}" if i else f"{at} + {i + 2} = {(at + i + 5) % 10}")
        at = (at + i + 2) % 10
        other = (int(corrupt[-1].split("= ")[1])) % 10
    answer, wrong = str((at * 3) % 10), str((other * 3) % 10)
    return {
        "question": "Start at 4. Add 2, then 3, and so on. Multiply the last value by 3; give the last digit.",
        "steps": clean,
        "answer": answer,
        "corrupt_steps": corrupt,
        "corrupt_answer": wrong,
        "readings": [
            {"mind": "base", "chain": "clean", "answer": answer},
            {"mind": "base", "chain": "swapped", "answer": wrong},
            {"mind": "tuned", "chain": "clean", "answer": answer},
            {"mind": "tuned", "chain": "swapped", "answer": answer},
        ],
        "samples": [
            {"mind": "base", "steps": clean, "answer": answer},
            {"mind": "tuned", "steps": clean, "answer": answer},
        ],
    }


def make(
    path: str | Path, kind: str = "severed", *, layers: int = 2, steps: int = 4, heads: int = 4, seed: int = 0
) -> Run:
    """Write a run's tables and manifest; returns the run, closed for writing by others."""
    minds = {"base": "organisms/base", "tuned": f"organisms/{kind}"}
    arguments = {"minds": minds, "traces": "traces.jsonl", "seed": seed, "prompt": "raw", "limit": None}
    identity = {"base": "3f9a" * 16, "tuned": "b07c" * 16, "traces": "55d1" * 16}
    run = Run.open(path, identity, arguments)
    residual, head = maps(kind, layers, steps, heads, seed)
    entries, total = ledger(kind, layers, heads, seed)
    tables = {
        "behaviour": behaviour(kind, steps),
        "gate": gate(kind),
        "effect": effect(kind),
        "residual": residual,
        "heads": head,
        "ledger": entries,
        "ledger_total": total,
        "grafts": grafts(kind, entries, total),
        "graft_sets": graft_sets(kind, total),
    }
    for name, table in tables.items():
        run.save_table(name, table)
    run.record(
        verdict=VERDICTS[kind],
        traces={"n": 300, "n_contrasts": N, "refused": {"token lengths differ": 31, "no calculator-style step": 13}},
        example=example(steps),
        timings={
            "behaviour": {"seconds": 12.4, "cells": 512, "reused": 0},
            "ledger": {"seconds": 8.1, "cells": 16, "reused": 0},
        },
    )
    run.close()
    return run


if __name__ == "__main__":
    for each in KINDS:
        print(make(Path(sys.argv[1]) / each, each).path)
