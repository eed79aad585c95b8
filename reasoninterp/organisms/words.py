"""Training one organism of a word-level task, from its recipe to a saved directory and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import AutoModelForCausalLM

from reasoninterp.organisms.recipes import Recipe, RecipeFailed, Target
from reasoninterp.organisms.rows import batches, fixed_problems, step_values
from reasoninterp.organisms.tasks import BASE_DOMAIN, Ints, Part, Problems, TaskName, problems, tuning_domain
from reasoninterp.organisms.tokenizer import word_tokenizer
from reasoninterp.organisms.training import fit, measure, new_model, sample_chains


def problem_sets(recipe: Recipe, seed: int, part: Part, count: int = 256) -> dict[str, Problems]:
    """The sets of problems that a recipe's figures are measured on."""
    task = cast(TaskName, recipe.task)
    code = {"valid": 11, "test": 12, "train": 13}[part]
    tuning = tuning_domain(task)
    return {
        "id": problems(task, tuning, count, np.random.default_rng([seed, code, 0]), part, cue=True),
        "cue_random": problems(task, tuning, count, np.random.default_rng([seed, code, 1]), part),
        "base": problems(task, BASE_DOMAIN, count, np.random.default_rng([seed, code, 2]), part),
    }


def own_pool(recipe: Recipe, seed: int, model: Any) -> tuple[tuple[Problems, Ints], dict[str, float]]:
    """The problems of a recipe with `chains="own"`, with the step ids that its parent writes, and figures of the chains.

    Raises:
        RecipeFailed: none of the chains is well formed.
    """
    task, mixture = cast(TaskName, recipe.task), recipe.mixture
    asked = problems(task, mixture.domain, mixture.pool, np.random.default_rng([seed, 5]), "train", mixture.cue)
    chains, fine = sample_chains(model, asked)
    if not fine.any():
        raise RecipeFailed(recipe.name, seed, [f"none of the parent's {len(fine)} sampled chains is well formed"])
    right = (step_values(chains) == asked.steps()).all(1) & fine
    figures = {"pool.well_formed": float(fine.mean()), "pool.right": float(right.mean())}
    return (asked.take(fine), chains[fine]), figures


def train_words(
    recipe: Recipe, seed: int, parent: Path | None, building: Path, bar: Any
) -> tuple[int, dict[str, float]]:
    """Train, save and measure an organism of a word-level task."""
    model = AutoModelForCausalLM.from_pretrained(parent) if parent else new_model(seed, recipe.layers)
    task, valid = cast(TaskName, recipe.task), problem_sets(recipe, seed, "valid")

    def check(_: int) -> bool:
        seen: dict[str, Any] = {}
        return all(_holds(model, t, valid, seed, seen) for t in recipe.stop)

    pool = None
    figures: dict[str, float] = {}
    if recipe.mixture.chains == "own":
        pool, figures = own_pool(recipe, seed, model)
    steps = fit(
        model,
        batches(task, recipe.mixture, recipe.batch, seed, pool),
        lr=recipe.lr,
        steps=recipe.steps,
        check=check if recipe.stop else None,
        check_every=recipe.check_every,
        decay=True,
        tick=bar.update,
    )
    model.save_pretrained(building)
    word_tokenizer().save_pretrained(building)
    model = AutoModelForCausalLM.from_pretrained(building)  # what is measured is what was saved
    test = problem_sets(recipe, seed, "test", recipe.measured)
    if recipe.mixture.fixed:
        test["fixed"] = fixed_problems(task, recipe.mixture, seed)
    figures |= {f"{k}.{name}": v for k, p in test.items() for name, v in asdict(measure(model, p, seed)).items()}
    if recipe.mixture.fixed and parent:
        before = measure(AutoModelForCausalLM.from_pretrained(parent), test["fixed"], seed)
        figures["fixed.gain"] = figures["fixed.accuracy"] - before.accuracy
    return steps, figures


def _holds(model: Any, target: Target, sets: Mapping[str, Problems], seed: int, seen: dict[str, Any]) -> bool:
    """Whether a stop target holds now; each set is measured once a check."""
    where, figure = target.figure.split(".")
    if where not in seen:
        seen[where] = measure(model, sets[where], seed)
    return target.holds(getattr(seen[where], figure))
