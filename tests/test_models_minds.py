"""Minds: the hooked body equals the plain models, weights go in and come back bit for bit, bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reasoninterp.errors import UserError
from reasoninterp.models.minds import Minds, blend, graft
from reasoninterp.models.units import LEVELS, Unit, unit_named, units
from tests import tiny

IDS = torch.randint(2, 290, (3, 11), generator=torch.Generator().manual_seed(5))
TARGETS = {"gpt2": ["c_attn", "c_fc"]}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Per family, a base and a tuned directory."""
    root = tmp_path_factory.mktemp("pairs")
    out = {}
    for family in tiny.ALL_FAMILIES:
        base = tiny.save_tiny(root / family, family)
        out[family] = base, tiny.save_tuned(base, root / f"{family}-tuned")
    return out


@pytest.fixture(scope="module")
def loaded(pairs: dict[str, tuple[str, str]]) -> dict[str, Minds]:
    """Per family, the two minds."""
    return {family: Minds.load({"base": base, "tuned": tuned}) for family, (base, tuned) in pairs.items()}


def plain_logits(path: str, ids: torch.Tensor = IDS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What Hugging Face itself computes, independently of the package."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def state(minds: Minds) -> dict[str, torch.Tensor]:
    """A copy of the body's parameters."""
    return {name: p.detach().clone() for name, p in minds._params.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two copies are equal bit for bit."""
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
def test_each_mind_equals_its_plain_model(family, pairs, loaded) -> None:
    plain = [plain_logits(path) for path in pairs[family]]
    assert (plain[0] - plain[1]).abs().max() > 0.05  # the pair differs, so the wrong weights would show
    for name, expected in zip(("base", "tuned", "base"), (*plain, plain[0]), strict=True):
        with loaded[family].at(name) as body:
            assert (body.forward(IDS) - expected).abs().max() < 5e-5
    with loaded[family].at("tuned") as body:
        assert body.label == "tuned"
    assert loaded[family].body.label == "base"


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "gpt2"])
def test_bfloat16(family, pairs) -> None:
    base, tuned = pairs[family]
    minds = Minds.load({"base": base, "tuned": tuned}, dtype="bfloat16")
    expected = plain_logits(tuned, dtype=torch.bfloat16).float()
    with minds.at("tuned") as body:
        assert body.dtype == torch.bfloat16 and minds.dtype == torch.bfloat16
        assert (body.forward(IDS).float() - expected).abs().max() <= 0.02 * expected.std()


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_at_restores_bit_for_bit(family, loaded) -> None:
    minds = loaded[family]
    before = state(minds)
    with minds.at("tuned"):
        inside = state(minds)
        with minds.at(blend("base", "tuned", 0.3)), minds.at(graft("base", "tuned", minds.units("head")[:3])):
            assert not same(state(minds), inside)
        assert same(state(minds), inside)
    assert same(state(minds), before) and not same(inside, before)
    with pytest.raises(ValueError, match="on purpose"), minds.at("tuned"):
        raise ValueError("on purpose")
    assert same(state(minds), before)


def test_a_write_that_breaks_off_is_undone(loaded, monkeypatch) -> None:
    minds = loaded["llama"]
    before, value = state(minds), minds._store.value

    def breaks(recipe: tuple, param: str) -> torch.Tensor:
        if recipe[1] == "tuned" and param == "model.layers.1.mlp.up_proj.weight":
            raise OSError("the file is gone")
        return value(recipe, param)

    monkeypatch.setattr(minds._store, "value", breaks)
    with pytest.raises(OSError, match="gone"), minds.at("tuned"):
        pass
    assert same(state(minds), before) and minds.inside.label == "base"


def test_entering_what_is_in_writes_nothing(loaded) -> None:
    minds = loaded["llama"]
    with minds.at("tuned"):
        versions = {k: p._version for k, p in minds._params.items()}
        with minds.at("tuned"), minds.at(blend("base", "tuned", 1.0)):
            assert {k: p._version for k, p in minds._params.items()} == versions


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blend_ends_are_exact_and_the_middle_is_float32(family, loaded) -> None:
    minds = loaded[family]
    with minds.at("base"):
        base = state(minds)
    with minds.at("tuned"):
        tuned = state(minds)
    with minds.at(blend("base", "tuned", 0.0)):
        assert same(state(minds), base)
    with minds.at(blend("base", "tuned", 1.0)):
        assert same(state(minds), tuned)
    with minds.at(blend("base", "tuned", 0.25)):
        for name, value in state(minds).items():
            by_hand = 0.75 * base[name].double() + 0.25 * tuned[name].double()
            assert (value.double() - by_hand).abs().max() < 1e-6


def test_bfloat16_blend_keeps_small_differences(tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    tuned = tiny.save_tuned(base, tmp_path / "tuned", scale=0.003)
    minds = Minds.load({"base": base, "tuned": tuned}, dtype="bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    with minds.at("base"):
        a = state(minds)[name].float()
    with minds.at("tuned"):
        b = state(minds)[name].float()
    with minds.at(blend("base", "tuned", 0.5)):
        exact = (0.5 * (a + b)).to(torch.bfloat16)
        assert torch.equal(state(minds)[name], exact)


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
@pytest.mark.parametrize("level", LEVELS)
def test_each_level_partitions_all_parameters(family, level, loaded) -> None:
    minds = loaded[family]
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in minds.body.param_shapes.items()}
    found = units(minds.body, level)
    assert len({u.name for u in found}) == len(found)
    for unit in found:
        for part in unit.parts:
            part.of(covered[part.param]).add_(1)
    assert sum(c.numel() for c in covered.values()) == minds.n_params > 0
    assert all(bool((c == 1).all()) for c in covered.values())


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
@pytest.mark.parametrize("level", LEVELS)
def test_graft_of_every_unit_is_the_other_mind(family, level, loaded) -> None:
    minds = loaded[family]
    with minds.at("tuned"):
        tuned = state(minds)
    with minds.at(graft("base", "tuned", minds.units(level))):
        assert same(state(minds), tuned)
    with minds.at("base"):
        base = state(minds)
    # one unit at a time moves its own scalars and no other
    for unit in minds.units(level)[::3]:
        with minds.at(graft("base", "tuned", [unit])):
            now = state(minds)
        for name, before in base.items():
            mine = torch.zeros(before.shape, dtype=torch.bool)
            for part in unit.parts:
                if part.param == name:
                    part.of(mine).fill_(True)
            assert torch.equal(now[name], torch.where(mine, tuned[name], before))


def test_levels_refine_each_other_and_have_the_agreed_names(loaded) -> None:
    def names(family: str, level: str) -> list[str]:
        return [u.name for u in loaded[family].units(level)]

    assert {"embed", "L0.H2.QK", "L0.H2.OV", "L0.mlp", "L0.norms", "ln_final", "unembed"} <= set(
        names("llama", "circuit")
    )
    assert {"L0.G1", "L2.G0"} <= set(names("llama-gqa", "head")) and "L0.H1" not in names("llama-gqa", "head")
    assert {"pos_embed", "L0.attn.b_O", "L1.H3.QK"} <= set(names("gpt2", "circuit"))
    for tied in ("gpt2", "qwen2", "llama-tied"):
        assert "unembed" not in names(tied, "block") and loaded[tied].body.tied
    unit = unit_named(loaded["qwen2"].body, "L1.G0.QK")
    assert {p.param.split("layers.1.")[1] for p in unit.parts} == {
        "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight", "self_attn.k_proj.bias",
    }  # fmt: skip
    assert all(p.param.endswith("norm.weight") for p in unit_named(loaded["qwen3"].body, "L0.norms").parts)
    with pytest.raises(UserError, match="L9"):
        unit_named(loaded["llama"].body, "L9.attn")


def test_a_head_unit_is_that_head(loaded) -> None:
    """Grafting a head changes its own z and no other head's z in that layer."""
    from reasoninterp.models.body import site

    for family in ("llama", "gpt2", "llama-gqa"):
        minds = loaded[family]
        letter = "G" if minds.body.is_gqa else "H"
        unit: Unit = unit_named(minds.body, f"L0.{letter}1")
        with minds.at("base") as body:
            z = body.cache(IDS, [site("z", 0)])[site("z", 0)]
        with minds.at(graft("base", "tuned", [unit])) as body:
            moved = (body.cache(IDS, [site("z", 0)])[site("z", 0)] - z).abs().amax((0, 1, 3))
        group = minds.body.n_heads // minds.body.n_kv_heads
        mine = torch.zeros(minds.body.n_heads, dtype=torch.bool)
        mine[group : 2 * group] = True
        assert bool((moved[mine] > 1e-3).all()) and bool((moved[~mine] == 0).all())


def test_delta_and_hashes(loaded, pairs) -> None:
    minds = loaded["gpt2"]
    delta = dict(minds.delta("base", "tuned"))
    with minds.at("base"):
        base = state(minds)
    with minds.at("tuned"):
        assert all(
            torch.equal(base[k] + delta[k], v) or torch.allclose(base[k] + delta[k], v) for k, v in state(minds).items()
        )
    assert set(delta) == set(base) and all(d.dtype == torch.float32 for d in delta.values())
    assert dict(minds.delta("tuned", "tuned")) == {}
    turned = Minds.load({"x": pairs["gpt2"][1], "y": pairs["gpt2"][0]})
    assert turned.hashes == {"x": minds.hashes["tuned"], "y": minds.hashes["base"]}
    assert minds.hashes["base"] != minds.hashes["tuned"]
    with pytest.raises(UserError, match="'nobody' is not loaded"), minds.at("nobody"):
        pass


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_a_small_budget_reads_from_files_and_changes_nothing(family, pairs, loaded) -> None:
    base, tuned = pairs[family]
    small = Minds.load({"base": base, "tuned": tuned}, memory_budget=1)
    plan = small.plan()
    assert not any(plan.resident.values()) and all(plan.on_file.values()) and set(plan.on_file) == {"base", "tuned"}
    assert "read from files" in str(plan)
    roomy = loaded[family]
    for handle in ("tuned", blend("base", "tuned", 0.4), graft("tuned", "base", roomy.units("circuit")[1:4])):
        with small.at(handle), roomy.at(handle):
            assert same(state(small), state(roomy))
    assert small.hashes == roomy.hashes


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("turned", [False, True])
def test_resized_embeddings(family, turned, pairs, tmp_path: Path) -> None:
    base = pairs[family][0]
    tuned = tiny.save_tuned(base, tmp_path / "tuned", resize=7)
    sources = {"tuned": tuned, "base": base} if turned else {"base": base, "tuned": tuned}
    minds = Minds.load(sources)
    rows = plain_logits(base).shape[-1]
    assert minds.body.n_vocab_shared == rows and plain_logits(tuned).shape[-1] == rows + 7
    for name, path in sources.items():
        with minds.at(name) as body:
            logits = body.forward(IDS)
            assert logits.shape[-1] == rows
            assert (logits - plain_logits(path)[..., :rows]).abs().max() < 5e-5
    for name, d in minds.delta("base", "tuned"):
        if d.shape[0] == rows + 7:
            assert bool((d[rows:] == 0).all()) and bool((d[:rows] != 0).any()), name
    alone = Minds.load({"base": base})
    assert alone.hashes["base"] == minds.hashes["base"]


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gpt2"])
def test_lora_is_merged_and_equals_peft(family, pairs, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = pairs[family][0]
    adapter = tiny.save_lora(base, tmp_path / "lora", targets=TARGETS.get(family, ["q_proj", "o_proj", "up_proj"]))
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS, use_cache=False).logits
    minds = Minds.load({"base": base, "tuned": adapter})
    with minds.at("tuned") as body:
        assert (body.forward(IDS) - expected).abs().max() < 1e-4
        assert (expected - plain_logits(base)).abs().max() > 0.1
    # only what the adapter changes is stored
    assert 0 < minds.plan().resident["tuned"] < minds.plan().body / 2
    spilled = Minds.load({"base": base, "tuned": adapter}, memory_budget=1)
    assert spilled.hashes == minds.hashes


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_lora_with_resized_embeddings(family, pairs, tmp_path: Path) -> None:
    """An adapter that was trained after tokens were added carries its own, larger embeddings."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = pairs[family][0]
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|a|>", "<|b|>"])
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name or "embed_tokens" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        expected = tuned.eval()(input_ids=IDS, use_cache=False).logits
    tuned.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=True)
    tokenizer.save_pretrained(str(tmp_path / "lora"))
    minds = Minds.load({"base": base, "tuned": str(tmp_path / "lora")})
    assert len(minds.tokenizer("tuned")) == rows + 2 and minds.body.n_vocab_shared == rows
    with minds.at("tuned") as body:
        assert (body.forward(IDS) - expected[..., :rows]).abs().max() < 1e-4
        assert (expected[..., :rows] - plain_logits(base)).abs().max() > 0.1


def refused(sources: dict[str, str], **options: object) -> str:
    """The sentence with which loading is refused."""
    with pytest.raises(UserError) as caught:
        Minds.load(sources, **options)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def test_bad_sources_get_one_sentence(pairs, tmp_path: Path) -> None:
    base, _ = pairs["llama"]
    assert "no such directory" in refused({"base": str(tmp_path / "nowhere")})
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused({"base": str(tmp_path / "empty")})
    assert "is a file" in refused({"base": str(Path(base) / "config.json")})
    assert "architecture" in refused({"base": base, "tuned": pairs["qwen2"][0]})
    deeper = tiny.save_tiny(tmp_path / "deeper", "llama", n_layers=2)
    assert "num_hidden_layers (2 against 3)" in refused({"base": base, "tuned": deeper})
    assert "dtype" in refused({"base": base}, dtype="int7")
    assert "no mind" in refused({})
    bare = tiny.save_tiny(tmp_path / "bare", "llama")
    for file in Path(bare).glob("token*"):
        file.unlink()
    assert "tokenizer" in refused({"base": bare})
    assert "tokenizer" in refused({"base": base, "tuned": bare})
    hollow = tiny.save_tiny(tmp_path / "hollow", "llama")
    (Path(hollow) / "model.safetensors").unlink()
    assert "no weights" in refused({"base": hollow})
    torn = tiny.save_tiny(tmp_path / "torn", "llama")
    file = Path(torn) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert str(torn) in refused({"base": torn})
    other = tiny.save_tiny(tmp_path / "other", "llama")
    config = json.loads((Path(other) / "config.json").read_text())
    (Path(other) / "config.json").write_text(json.dumps({**config, "architectures": ["FalconForCausalLM"]}))
    assert "FalconForCausalLM is not supported" in refused({"base": other})


def test_a_hub_id_that_cannot_be_reached_is_told_from_a_path(pairs, monkeypatch) -> None:
    from huggingface_hub import HfApi

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    assert "neither a directory nor a hub model" in refused({"base": "some-org/never-there-1"})
    assert "neither a directory" in refused({"base": pairs["llama"][0], "tuned": "some-org/never-there-2"})
    for path in ("./never", "../a/b", "a/b/c", "/never"):
        assert "no such directory" in refused({"base": path})


def test_damaged_and_pickled_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tiny.save_tiny(tmp_path / "base", "llama")
    file = Path(base) / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    broken = {**tensors, name: tensors[name].clone()}
    broken[name][3, 4] = float("nan")
    save_file(broken, file, metadata={"format": "pt"})
    assert name in refused({"base": base})
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    assert name in refused({"base": base})
    torch.save(tensors, Path(base) / "pytorch_model.bin")
    file.unlink()
    assert "pickle" in refused({"base": base})
    minds = Minds.load({"base": base}, allow_pickle=True)
    assert torch.equal(minds._params[name], tensors[name])


def test_adapters_for_another_base(pairs, tmp_path: Path) -> None:
    base = pairs["llama"][0]
    twin = tiny.save_tiny(tmp_path / "twin", "llama", seed=9)  # same shapes, other weights
    for_twin = tiny.save_lora(twin, tmp_path / "for-twin", targets=["q_proj"])
    assert "twin" in refused({"base": base, "tuned": for_twin})
    Minds.load({"base": twin, "tuned": for_twin})
    short = tiny.save_tiny(tmp_path / "short", "llama", n_layers=2)
    config = Path(tiny.save_lora(pairs["gpt2"][0], tmp_path / "for-gpt2", targets=["c_attn"])) / "adapter_config.json"
    config.write_text(config.read_text().replace(pairs["gpt2"][0], "org/elsewhere"))
    assert "does not fit" in refused({"base": base, "tuned": str(tmp_path / "for-gpt2")})
    deep = tiny.save_lora(base, tmp_path / "deep", targets=["q_proj"])
    config = Path(deep) / "adapter_config.json"
    config.write_text(config.read_text().replace(base, "org/elsewhere"))
    assert "has no place" in refused({"base": short, "tuned": deep})
    config.write_text(config.read_text().replace('"LORA"', '"PREFIX_TUNING"'))
    assert "only LoRA" in refused({"base": base, "tuned": deep})


def test_loading_leaves_logging_as_it_was(pairs) -> None:
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    Minds.load({"base": pairs["llama"][0]})
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before
