"""The corpus of an organism: the very rows that it was trained on, drawn again, as documents of token ids.

1. The recipe, the seed and the number of steps that training took (in the organism's record) determine every batch; chains
   of the parent's own are sampled from the parent again.
2. A document is a row without its padding, question and chain together, whatever part of it was supervised.  Rows that
   occurred in several batches are as many documents: the corpus holds what training saw as often as training saw it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from transformers import AutoModelForCausalLM

from reasoninterp.errors import UserError
from reasoninterp.organisms.making import one_thread, quiet_transformers, read_record
from reasoninterp.organisms.recipes import RECIPES, Recipe
from reasoninterp.organisms.rows import ID, batches
from reasoninterp.organisms.tasks import PAD, Ints
from reasoninterp.organisms.words import own_pool


def training_documents(directory: str | Path, recipes: Mapping[str, Recipe] | None = None) -> Iterator[Ints]:
    """What an organism of a word-level task was trained on after its parent, one document of ids after the other.

    Args:
        directory: the organism's, its parent's beside it where the recipe takes the parent's own chains.
        recipes: those it was made from, if not `RECIPES`.

    Raises:
        UserError: an organism of another task, or of a recipe that there is no more.
    """
    folder = Path(directory)
    record = read_record(folder)
    book = RECIPES if recipes is None else recipes
    recipe = book.get(record.name)
    if recipe is None or recipe.digest(record.seed, book) != record.digest:
        raise UserError(f"{folder}: made by an older recipe; make the organism again.")
    if recipe.task == "chat":
        raise UserError(f"{folder}: its text is sentences; only organisms of the word-level tasks have a corpus here.")
    pool = None
    if recipe.mixture.chains == "own":
        with quiet_transformers(), one_thread():  # the same sums, in the same order, as in training
            parent = AutoModelForCausalLM.from_pretrained(folder.parent / str(record.parent))
            pool, _ = own_pool(recipe, record.seed, parent)
    rows = batches(recipe.task, recipe.mixture, recipe.batch, record.seed, pool)
    for batch in islice(rows, record.steps):
        for ids in batch.ids:
            yield ids[ids != ID[PAD]]
