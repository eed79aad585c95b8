"""Gauge and alignment: the function stays, the weights come back, and the ledger is no longer misled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from reasoninterp.errors import UserError
from reasoninterp.models.context import Context
from reasoninterp.models.gauge import KINDS, permute_heads, random_gauge
from reasoninterp.models.layout import read_layer, shape_of, write_layer
from reasoninterp.models.minds import Minds
from reasoninterp.severance.gauge import bases
from reasoninterp.severance.gauge.align import align, is_clear
from reasoninterp.severance.ledger.integrate import integrate
from tests import tiny
from tests.test_ledger import items

FAMILIES = (*tiny.FAMILIES, "llama-tied")
IDS = torch.randint(2, 290, (3, 15), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Minds]:
    """Per family a base and an ordinary tuned copy (noise on every weight)."""
    root = tmp_path_factory.mktemp("align")
    out = {}
    for family in FAMILIES:
        base = tiny.save_tiny(root / family, family, n_layers=2)
        tuned = tiny.save_tuned(base, root / f"{family}-tuned")
        out[family] = Minds.load({"base": base, "tuned": tuned})
    return out


def plain(family: str, params: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits that Hugging Face computes in float64 with these weights, independently of the package."""
    model = tiny.tiny_model(family, len(tiny.tiny_tokenizer()), n_layers=2)
    extra = model.load_state_dict(params, strict=False).unexpected_keys
    assert not extra
    model.tie_weights()
    with torch.no_grad():
        return model.double()(input_ids=IDS, use_cache=False).logits


def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum((a[k].double() - b[k].double()).square().sum() for k in a) ** 0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_gauge_keeps_the_function_and_moves_the_weights(family: str, kind: str, loaded: dict[str, Minds]) -> None:
    minds = loaded[family]
    base = minds.weights("base")
    found = random_gauge(base, minds.config, [kind], rng=3, strength=1.0)
    expected, logits = plain(family, base), plain(family, found.params)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()
    allowed = kind != "neuron_scale" or family != "gpt2"  # GELU is not homogeneous
    assert (norm(found.params, base) > 3) == allowed
    assert (found.heads != tuple(tuple(range(4)) for _ in range(2))) == (kind == "heads")
    assert all(found.params[k].dtype == base[k].dtype for k in base)


@pytest.mark.parametrize("held", [False, True])
def test_a_ledger_is_of_the_mind_that_has_the_name_now(
    tmp_path: Path, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that was discarded and given again stands for other weights; nothing of the old ones is used."""
    if held:  # as on an accelerator
        monkeypatch.setattr("reasoninterp.severance.ledger.integrate.FORMED_ANEW", ())
    base = tiny.save_tiny(tmp_path / "base", "llama-gqa", n_layers=2)
    minds = Minds.load({"base": base, "tuned": tiny.save_tuned(base, tmp_path / "tuned", scale=0.05)})
    context = Context(minds, items())
    contrasts = [i.contrast for i in context.items]
    weights, step = minds.weights("base"), dict(minds.delta("base", "tuned"))
    minds.derive("new", "base", {k: weights[k] - d for k, d in step.items()})
    away = integrate(context, contrasts, to_mind="new")
    minds.discard("new")
    minds.derive("new", "base", {k: weights[k] + d for k, d in step.items()})
    found, expected = (integrate(context, contrasts, to_mind=name) for name in ("new", "tuned"))
    assert found.residual < 0.01 and expected.residual < 0.01
    assert np.abs(away.values.mean(0) - expected.values.mean(0)).max() > 0.05
    np.testing.assert_allclose(found.values, expected.values, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_in_another_gauge_comes_back(family: str, loaded: dict[str, Minds]) -> None:
    minds = loaded[family]
    base = minds.weights("base")
    for k, strength in enumerate((0.3, 1.0)):
        found = random_gauge(base, minds.config, rng=k, strength=strength)
        name = f"disguised-{strength}"
        minds.derive(name, "base", found.params)
        result = align(minds, "base", name)
        assert result.mind == f"{name}-aligned" and result.heads == found.heads
        assert result.distance_before == pytest.approx(norm(found.params, base), rel=1e-5)
        assert result.distance_before > 10 and result.distance_after < 1e-4
        back = minds.weights(result.mind)
        assert max(float((back[p] - base[p]).abs().max()) for p in base) < 1e-4
        places = [(j, i) for j, i in enumerate(found.heads[0]) if i != j]
        assert all(f"L0: head {j} of tuned is head {i} of base." in result.notes for j, i in places)
        assert any(".OV: a change of basis explained" in note for note in result.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_what_tuning_changed(family: str, loaded: dict[str, Minds]) -> None:
    minds = loaded[family]
    noise = norm(minds.weights("tuned"), minds.weights("base"))
    found = random_gauge(minds.weights("tuned"), minds.config, rng=11, strength=1.0)
    minds.derive("noisy", "tuned", found.params)
    result = align(minds, "base", "noisy", name="noisy-back")
    assert result.mind == "noisy-back" and result.heads == found.heads
    assert result.distance_before > 5 * noise
    # the part of the noise that lies along the gauge goes too: a share of the weights, never most of it
    assert 0.9 * noise < result.distance_after < 1.02 * noise
    expected, logits = plain(family, minds.weights("tuned")), plain(family, minds.weights("noisy-back"))
    assert (logits - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_fine_tune_stays_bit_for_bit(family: str, loaded: dict[str, Minds]) -> None:
    minds = loaded[family]
    derived, before = minds.derived, minds.weights("tuned")
    result = align(minds, "base", "tuned")
    assert result.mind == "tuned" and minds.derived == derived
    assert result.heads == ((0, 1, 2, 3),) * 2
    assert result.distance_before == result.distance_after > 1
    after = minds.weights("tuned")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_only_the_piece_that_was_disguised_is_changed(loaded: dict[str, Minds]) -> None:
    minds = loaded["llama-gqa"]
    tuned = minds.weights("tuned")
    found = random_gauge(tuned, minds.config, ["ov"], rng=2)
    shape = shape_of(tuned, minds.config)
    moved = write_layer(read_layer(found.params, shape, 1), tuned)  # layer 1 alone
    minds.derive("one-layer", "tuned", moved)
    result = align(minds, "base", "one-layer")
    assert {p for p, _ in minds.delta("one-layer", result.mind)} == set(moved)
    assert {p.split(".self_attn.")[1] for p in moved} == {"v_proj.weight", "o_proj.weight"}
    assert [n.split(":")[0] for n in result.notes[:-1]] == ["L1.G0.OV", "L1.G1.OV"]


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "gpt2"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_heads_and_gains_come_back_under_much_noise_in_what_reads_them(
    family: str, strength: float, loaded: dict[str, Minds]
) -> None:
    """One attention block is drowned in noise as large as its weights: no step explains 30 % of that."""
    minds = loaded[family]
    rng = np.random.default_rng(6)
    weights = minds.weights("tuned")
    layer = read_layer(weights, shape_of(weights, minds.config), 1)
    for role in ("q", "k", "v", "o"):
        layer.at[role] += layer.at[role].std() * rng.normal(size=layer.at[role].shape)
    noisy = {**weights, **write_layer(layer, weights)}
    found = random_gauge(noisy, minds.config, rng=12, strength=strength)
    name = f"drowned-{strength}"
    minds.derive(name, "tuned", found.params)
    result = align(minds, "base", name)
    assert result.heads == found.heads != ((0, 1, 2, 3),) * 2
    shape = shape_of(weights, minds.config)
    base, back = (read_layer(minds.weights(m), shape, 1).at["ln1"] for m in ("base", result.mind))
    before = read_layer(found.params, shape, 1).at["ln1"]
    assert np.linalg.norm(back - base) < 0.1 * np.linalg.norm(before - base)
    assert any(n.startswith("L1.ln1: the scale of its gain explained") for n in result.notes)
    logits, expected = plain(family, minds.weights(result.mind)), plain(family, noisy)
    assert (logits - expected).abs().max() < 1e-3 * expected.std()


@pytest.mark.parametrize("drowned", [False, True])
def test_a_gain_that_was_tuned_by_itself_stays(drowned: bool, loaded: dict[str, Minds]) -> None:
    minds = loaded["llama"]
    rng = np.random.default_rng(3)
    weights = minds.weights("tuned")
    layer = read_layer(weights, shape_of(weights, minds.config), 0)
    layer.at["ln1"] *= np.exp(0.3 * rng.normal(size=layer.at["ln1"].shape))
    if drowned:
        for role in ("q", "k", "v"):
            layer.at[role] += layer.at[role].std() * rng.normal(size=layer.at[role].shape)
    name = f"gain-{drowned}"
    minds.derive(name, "tuned", write_layer(layer, weights))
    result = align(minds, "base", name)
    assert result.mind == name and not any("gain" in note for note in result.notes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_ledger_is_misled_by_a_gauge_and_not_after_alignment(family: str, tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base", family, n_layers=2)
    context = Context(Minds.load({"base": base}), items(2))
    minds = context.minds
    weights = minds.weights("base")
    # Truth by construction: one head's outputs are scaled down; everything else computes what it computed.
    shape = shape_of(weights, minds.config)
    layer = read_layer(weights, shape, 0)
    layer.at["o"][:1] *= 0.2
    cut = {**weights, **write_layer(layer, weights)}
    minds.derive("cut", "base", cut)
    found = random_gauge(cut, minds.config, rng=4, strength=1.0)
    minds.derive("disguised", "cut", found.params)
    result = align(minds, "base", "disguised")
    assert result.heads == found.heads  # the changed head too is recognised, by its QK
    contrasts = [i.contrast for i in context.items]
    circuits = {}
    for mind in ("cut", "disguised", result.mind):
        whole = integrate(context, contrasts, from_mind="base", to_mind=mind, nodes=8, max_nodes=9)
        circuits[mind] = {name: float(np.abs(v).mean()) for name, v in whole.at("circuit").items()}
        assert whole.residual < 0.02 or mind == "disguised"
    planted = "L0.H0.OV"
    truth = circuits["cut"][planted]
    assert abs(truth) > 0.05

    def elsewhere(mind: str) -> float:
        return max(abs(v) for name, v in circuits[mind].items() if name != planted)

    assert elsewhere("cut") < 1e-6 < abs(truth)
    assert elsewhere("disguised") > 0.5 * abs(truth)
    assert elsewhere(result.mind) < 0.02 * abs(truth)
    assert circuits[result.mind][planted] == pytest.approx(truth, rel=0.02)


def test_bfloat16_is_refused_with_a_note(tmp_path: Path) -> None:
    base = tiny.save_tiny(tmp_path / "base", "llama", n_layers=2)
    minds = Minds.load({"base": base}, dtype="bfloat16")
    minds.derive("other", "base", random_gauge(minds.weights("base"), minds.config).params)
    result = align(minds, "base", "other")
    assert result.mind == "other" and "bfloat16" in result.notes[0] and "float32" in result.notes[0]
    assert minds.derived == ("other",)


def test_an_alignment_that_would_change_the_function_is_refused(
    loaded: dict[str, Minds], monkeypatch: pytest.MonkeyPatch
) -> None:
    minds = loaded["llama"]
    minds.derive("wrong", "tuned", random_gauge(minds.weights("tuned"), minds.config, ["ov"]).params)
    right = bases.nearest_basis
    monkeypatch.setattr("reasoninterp.models.gauge.np.linalg.inv", lambda m: 0.9 * np.linalg.solve(m, np.eye(len(m))))
    assert right is bases.nearest_basis
    result = align(minds, "base", "wrong")
    assert result.mind == "wrong" and "wrong-aligned" not in minds.derived
    assert "logits would change" in result.notes[0] and result.distance_after == result.distance_before


def test_errors(loaded: dict[str, Minds]) -> None:
    minds = loaded["llama"]
    with pytest.raises(UserError, match="not loaded"):
        align(minds, "base", "nobody")
    with pytest.raises(UserError, match="here already"):
        align(minds, "base", "tuned", name="base")
    with pytest.raises(UserError, match="min_gain"):
        align(minds, "base", "tuned", min_gain=0.0)
    with pytest.raises(UserError, match="kinds"):
        random_gauge(minds.weights("base"), minds.config, ["everything"])
    with pytest.raises(UserError, match="strength"):
        random_gauge(minds.weights("base"), minds.config, strength=-1.0)
    with pytest.raises(UserError, match="gauge is not known"):
        random_gauge({"encoder.weight": torch.zeros(1)}, minds.config)
    assert align(minds, "base", "base").notes == ("base has the weights of base.",)
    layer = read_layer(
        loaded["llama-gqa"].weights("base"), shape_of(minds.weights("base"), loaded["llama-gqa"].config), 0
    )
    with pytest.raises(ValueError, match="apart"):
        permute_heads(layer, np.array([0, 2, 1, 3]))


def test_strength_zero_is_the_identity_and_a_seed_repeats(loaded: dict[str, Minds]) -> None:
    minds = loaded["qwen3"]
    base = minds.weights("base")
    still = random_gauge(base, minds.config, strength=0.0)
    assert norm(still.params, base) < 1e-4 and still.heads == ((0, 1, 2, 3),) * 2
    one, two, three = (random_gauge(base, minds.config, rng=seed).params for seed in (5, 5, 6))
    assert norm(one, two) == 0 < norm(one, three)


# ------------------------------------------------------------------ closed forms, each against a plain search


def test_scales_are_the_least_on_a_grid() -> None:
    a, b, c, d = np.random.default_rng(0).uniform(-1, 1, (4, 40)) + np.array([1.01, 0, 0, 1.01])[:, None]
    s = bases.nearest_scales(a, b, c, d)

    def value(s: np.ndarray) -> np.ndarray:
        return a * s**2 - 2 * b * s - 2 * c / s + d / s**2

    grid = np.exp(np.linspace(-6, 6, 20_001))[:, None]
    assert (value(s) <= value(grid).min(0) + 1e-6).all() and s.std() > 0.01
    assert (bases.nearest_scales(np.zeros(2), b[:2], c[:2], d[:2]) == 1).all()


def test_gains_and_rows_each_decide_where_the_other_was_changed() -> None:
    rng = np.random.default_rng(4)
    gains, rows, s = np.exp(0.1 * rng.normal(size=(1, 40))), rng.normal(size=(30, 40)), np.exp(rng.normal(size=40))

    def found(tuned_gains: np.ndarray, tuned_rows: np.ndarray) -> np.ndarray:
        return bases.nearest_gain(tuned_gains / s, tuned_rows * s, gains, rows) / s

    np.testing.assert_allclose(found(gains, rows), 1, rtol=1e-9)
    cut = rows.copy()
    cut[:5] = 0  # some rows only: the gains are exact
    np.testing.assert_allclose(found(gains, cut), 1, rtol=1e-9)
    drowned = rows + 3 * rng.normal(size=rows.shape)
    np.testing.assert_allclose(found(gains, drowned), 1, rtol=0.05)
    tuned = gains * np.exp(0.2 * rng.normal(size=gains.shape))  # the gains too, by themselves: the rows decide
    np.testing.assert_allclose(found(tuned, rows + 0.01 * rng.normal(size=rows.shape)), 1, rtol=0.02)
    np.testing.assert_allclose(bases.gain_ratio(-gains, gains), 1)  # no scale above 0 brings a sign back


def test_evidence_is_the_logarithm_of_the_ratio_of_two_normal_likelihoods() -> None:
    """By SciPy's densities, each at the spread that makes its own rows likeliest."""
    rng = np.random.default_rng(5)
    gains, rows, s = np.exp(0.1 * rng.normal(size=(1, 12))), rng.normal(size=(9, 12)), np.exp(0.3 * rng.normal(size=12))
    tuned = {
        "gauge": (gains * s, (rows + 0.8 * rng.normal(size=rows.shape)) / s),
        "alone": (gains * s, rows + 0.8 * rng.normal(size=rows.shape)),
    }
    for what, (new_gains, new_rows) in tuned.items():
        scaled = new_rows * s
        along = scipy.stats.norm.logpdf(scaled, rows, np.sqrt(((scaled - rows) ** 2).mean())) + np.log(s)
        alone = scipy.stats.norm.logpdf(new_rows, rows, np.sqrt(((new_rows - rows) ** 2).mean()))
        found = bases.gain_evidence(new_gains, new_rows, gains, rows)
        assert found == pytest.approx((along.sum() - alone.sum()) / len(rows))
        assert (found > 0.2) == (what == "gauge") and abs(found) > 0.2
    assert bases.gain_evidence(gains, rows + 1, gains, rows) == 0  # gains that did not move say nothing


def test_bases_bring_back_what_a_basis_changed() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.normal(size=(8, 33)), rng.normal(size=(8, 64))
    basis = rng.normal(size=(8, 8))
    found = bases.nearest_basis(basis @ left, np.linalg.inv(basis).T @ right, left, right)
    np.testing.assert_allclose(found @ basis, np.eye(8), atol=1e-8)
    # an output that writes nothing leaves the values to find the basis by
    found = bases.nearest_basis(basis @ left, 0 * right, left, right)
    np.testing.assert_allclose(found @ basis, np.eye(8), atol=1e-8)
    factors = np.exp(0.5 * rng.normal(size=4) + 2j * rng.normal(size=4))
    turn = bases.rotary_basis(factors)
    np.testing.assert_allclose(
        bases.rotary(turn @ left, np.linalg.inv(turn).T @ right, left, right) * factors, 1, atol=1e-8
    )


def test_cycles_are_taken_only_where_they_are_clearly_cheaper() -> None:
    cost = np.array([[1.0, 0.1, 9, 9], [0.1, 1.0, 9, 9], [9, 9, 1.0, 0.9], [9, 9, 0.9, 1.0]])
    assert bases.match(cost, 0.5).tolist() == [1, 0, 2, 3]
    assert bases.match(cost, 0.95).tolist() == [1, 0, 3, 2]


def test_chance_is_no_clear_gain() -> None:
    """Fitting a free basis to noise removes its share of the square; that alone must not count as an explanation."""
    arrays = [np.ones((4, 10)), np.ones((4, 10))]
    assert not is_clear(1.0, 0.6, dof=16, of=arrays, min_gain=0.1)  # noise alone leaves 1 - 16/40
    assert is_clear(1.0, 0.6, dof=0, of=arrays, min_gain=0.1)
    assert is_clear(1.0, 0.4, dof=16, of=arrays, min_gain=0.1)
    assert not is_clear(1e-13, 0.0, dof=0, of=arrays, min_gain=0.1)  # rounding
