"""The corpus of an organism is what its training saw: the very batches, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasoninterp.errors import UserError
from reasoninterp.organisms import BASE_DOMAIN, TUNING_DOMAIN, Mixture, Recipe, make, words
from reasoninterp.organisms.corpus import training_documents
from reasoninterp.organisms.rows import step_ids
from reasoninterp.organisms.tokenizer import word_tokenizer

COMMON: dict[str, Any] = {
    "task": "lastop",
    "what": "",
    "lr": 1e-3,
    "targets": (),
    "batch": 8,
    "layers": 1,
    "measured": 8,
}


@pytest.mark.parametrize("chains", ["gold", "own"])
def test_the_documents_are_the_batches_of_training(
    chains: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = Mixture(TUNING_DOMAIN, cue=True, direct=0.3, filler=0.1, chains=chains, pool=64)
    recipes = {
        "one": Recipe(name="one", parent=None, mixture=Mixture(BASE_DOMAIN), steps=1, **COMMON),
        "two": Recipe(name="two", parent="one", mixture=mixture, steps=3, **COMMON),
    }
    seen: list[np.ndarray] = []
    fit = words.fit

    def watched(model: Any, data: Any, **how: Any) -> int:
        def watch() -> Any:
            for rows in data:
                seen.append(rows.ids)
                yield rows

        return fit(model, watch(), **how)

    monkeypatch.setattr(words, "fit", watched)
    # A parent of one step writes no chain that is one: the right chains stand in for its own.
    fine = lambda _, p: (step_ids(p, p.steps()), np.arange(len(p)) % 3 > 0)  # noqa: E731
    monkeypatch.setattr(words, "sample_chains", fine)
    make(tmp_path / "out", recipes=recipes, cache=tmp_path / "cache", progress=False)
    batches = seen[1:]
    assert len(batches) == 3
    tokenizer = word_tokenizer()
    found = [tokenizer.decode(ids) for ids in training_documents(tmp_path / "out" / "two", recipes)]
    pad = tokenizer.pad_token_id
    assert found == [tokenizer.decode([i for i in row if i != pad]) for batch in batches for row in batch]
    assert len(found) == 24 and all("=" in text and "<pad>" not in text for text in found)
    assert len({text.split(" : ")[1].split(" = ")[0] for text in found}) > 3


def test_what_has_no_corpus_is_refused(tmp_path: Path) -> None:
    recipes = {"one": Recipe(name="one", parent=None, mixture=Mixture(BASE_DOMAIN), steps=1, **COMMON)}
    make(tmp_path / "out", recipes=recipes, cache=tmp_path / "cache", progress=False)
    with pytest.raises(UserError, match="made by an older recipe"):
        list(training_documents(tmp_path / "out" / "one"))
