"""Derived minds: what `Minds.derive` adds behaves as a mind that was loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reasoninterp.errors import UserError
from reasoninterp.models.minds import Minds, blend, graft
from tests import tiny

IDS = torch.randint(2, 290, (2, 9), generator=torch.Generator().manual_seed(3))


def load(root: Path, family: str) -> Minds:
    base = tiny.save_tiny(root / "base", family, n_layers=2)
    tiny.save_tuned(base, root / "tuned")
    return Minds.load({"base": base, "tuned": str(root / "tuned")})


def saved(root: Path, minds: Minds, name: str, **kwargs: object) -> str:
    """A derived mind written as a Hugging Face directory: the oracle is to load it like any other."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(root / "base"))
    missing, extra = model.load_state_dict(minds.weights(name), strict=False)
    assert not extra and all("lm_head" in m for m in missing)
    model.save_pretrained(str(root / name))
    minds.tokenizer().save_pretrained(str(root / name))
    return str(root / name)


def live(minds: Minds) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in minds._params.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gpt2"])
def test_a_derived_mind_equals_one_that_was_loaded(tmp_path: Path, family: str) -> None:
    minds = load(tmp_path, family)
    before, tuned = live(minds), minds.weights("tuned")
    names = list(tuned)
    changed, returned = names[3], names[5]
    minds.derive("new", "tuned", {changed: tuned[changed] * 2, returned: minds.weights("base")[returned]})
    assert same(live(minds), before) and (minds.names, minds.derived) == (("base", "tuned"), ("new",))
    loaded = Minds.load({"base": str(tmp_path / "base"), "new": saved(tmp_path, minds, "new")})
    assert loaded.hashes["new"] == minds.digest("new") != minds.hashes["tuned"]
    assert loaded.hashes["base"] == minds.hashes["base"]
    with loaded.at("new") as body:
        expected = body.forward(IDS)
    with minds.at("new") as body:
        found = body.forward(IDS)
        with minds.at(graft("tuned", "new", minds.units("layer")[:2])), minds.at("tuned"):
            assert same(live(minds), tuned)
        assert same(live(minds), minds.weights("new"))
    assert torch.equal(found, expected)
    assert same(live(minds), before)
    assert {p for p, _ in minds.delta("tuned", "new")} == {changed, returned}
    deltas = dict(minds.delta("base", "new"))
    assert returned not in deltas
    torch.testing.assert_close(deltas[changed], 2 * tuned[changed] - minds.weights("base")[changed])
    # only what is new is kept: one tensor, not the tuned mind again
    assert minds.plan().resident["new"] == tuned[changed].nbytes


def test_a_parameter_that_no_mind_changed_before(tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base", "llama", n_layers=2)
    minds = Minds.load({"base": base, "twin": base})
    before, name = live(minds), "model.layers.1.mlp.up_proj.weight"
    assert not list(minds.delta("base", "twin"))
    with minds.at("twin"):
        minds.derive("new", "twin", {name: before[name] + 1})
        assert minds.inside.label == "twin" and same(live(minds), before)
        with minds.at(blend("base", "new", 0.5)):
            torch.testing.assert_close(live(minds)[name], before[name] + 0.5)
        minds.derive("newer", "new", {"model.norm.weight": before["model.norm.weight"] * 3})
        with minds.at("newer"):
            torch.testing.assert_close(live(minds)[name], before[name] + 1)
    assert same(live(minds), before)
    assert minds.hashes["base"] == minds.hashes["twin"]
    with pytest.raises(UserError, match="in use"):
        minds.discard("new")  # "newer" has its tensor
    minds.discard("newer")
    minds.discard("new")
    assert not minds.derived
    minds.derive("new", "twin", {name: before[name] + 2})
    with minds.at("new"):
        assert torch.equal(live(minds)[name], before[name] + 2)
    hash_of_two = minds.digest("new")
    minds.discard("new")
    minds.derive("new", "twin", {name: before[name] + 1})
    assert minds.digest("new") != hash_of_two and list(minds.hashes) == ["base", "twin"]


def test_what_is_kept_by_names_is_forgotten_with_a_name(tmp_path: Path) -> None:
    minds = load(tmp_path, "llama")
    name = "model.norm.weight"
    minds.derive("new", "tuned", {name: minds.weights("tuned")[name] + 1})
    minds.memo["alignment", "base", "tuned"] = "new"  # made from `tuned`
    minds.memo["difference", "base", "new"] = "of what was called new"
    minds.memo["difference", "base", "base"] = "of others"
    minds.derive("other", "tuned", {})
    assert len(minds.memo) == 3  # further names change nothing
    held = minds.difference("base", "new")
    assert set(held) == {p for p, _ in minds.delta("base", "new")} and name in held and "nothing" not in held
    torch.testing.assert_close(held[name], minds.weights("tuned")[name] + 1 - minds.weights("base")[name])
    held[name].zero_()  # formed anew
    assert held[name].abs().max() > 0.5 and len(held) == len(list(held))
    minds.discard("new")
    assert list(minds.memo.values()) == ["of others"]


def test_derived_tensors_are_copies_and_may_go_to_files(tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base", "llama-gqa", n_layers=2)
    minds = Minds.load({"base": base}, memory_budget=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    given = minds.weights("base")[name] + 1
    kept = given.clone()
    minds.derive("new", "base", {name: given})
    given.zero_()
    assert torch.equal(minds.weights("new")[name], kept)
    assert minds.plan().on_file["new"] == kept.nbytes and not minds.plan().resident.get("new")
    with minds.at("new") as body:
        inside = body.forward(IDS)
    assert (inside - minds.body.forward(IDS)).abs().max() > 0.01


def test_what_cannot_be_derived(tmp_path: Path) -> None:
    minds = Minds.load({"base": tiny.save_tiny(tmp_path / "base", "llama", n_layers=2)})
    with pytest.raises(UserError, match="here already"):
        minds.derive("base", "base", {})
    with pytest.raises(UserError, match="not loaded"):
        minds.derive("new", "other", {})
    with pytest.raises(UserError, match="does not exist"):
        minds.derive("new", "base", {"model.nothing": torch.zeros(2)})
    with pytest.raises(UserError, match="has shape"):
        minds.derive("new", "base", {"model.norm.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="no derived mind"):
        minds.discard("base")
    assert minds.names == ("base",)
