"""Organisms: small real models, trained here, in which it is known whether the answer reads its steps.

`make(out_dir)` trains them (or takes them from the cache) and saves ordinary Hugging Face directories and trace
files; `RECIPES` says how each is trained and what it must measure.
"""

from __future__ import annotations

from reasoninterp.organisms.making import OrganismReport, cache_dir, make, read_record
from reasoninterp.organisms.recipes import RECIPES, Recipe, RecipeFailed, Target
from reasoninterp.organisms.rows import Mixture
from reasoninterp.organisms.tasks import BASE_DOMAIN, FORMAT, TUNING_DOMAIN, Domain, Problems, paraphrase, problems
from reasoninterp.organisms.tokenizer import word_tokenizer

__all__ = [
    "BASE_DOMAIN",
    "FORMAT",
    "RECIPES",
    "TUNING_DOMAIN",
    "Domain",
    "Mixture",
    "OrganismReport",
    "Problems",
    "Recipe",
    "RecipeFailed",
    "Target",
    "cache_dir",
    "make",
    "paraphrase",
    "problems",
    "read_record",
    "word_tokenizer",
]
