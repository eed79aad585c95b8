"""Saliency of context tokens: brute force in the plain model, finite differences, exact Shapley values, alignment."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reasoninterp.errors import UserError
from reasoninterp.memorization.alternatives import Place, chain_places, parts_before, pick, read_alternatives
from reasoninterp.memorization.names import SOURCES
from reasoninterp.memorization.saliency import gradient_saliency, knockout_saliency
from reasoninterp.memorization.salient import ranked_ids
from reasoninterp.memorization.settings import Settings
from reasoninterp.memorization.shapley import shapley_saliency
from reasoninterp.memorization.sources import Target
from reasoninterp.memorization.verdicts import trace_sources
from reasoninterp.models.body import Body, site
from reasoninterp.models.minds import Minds
from reasoninterp.traces.trace import Format, Span, Trace, encode
from tests.corpus_conformance import BruteForce
from tests.tiny import save_tiny, tiny_tokenizer

FAMILIES = ("llama-gqa", "qwen3", "gpt2")
ROW = (5, 90, 17, 203, 44, 17, 121, 260, 8)
PLACES = [Place(ROW, 7), Place(ROW, 4), Place((200, 3, 66, 12, 150), 4)]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("saliency")
    return {family: save_tiny(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def bodies(homes: dict[str, str]) -> dict[str, Body]:
    return {family: Minds.load({"base": home}).body for family, home in homes.items()}


@pytest.fixture(scope="module")
def plain(homes: dict[str, str]) -> dict[str, Any]:
    """The same networks without any hook, in float64."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    return {f: load(home, attn_implementation="eager").double().eval() for f, home in homes.items()}


def _logits(model: Any, context: tuple[int, ...], cut: list[tuple[int, int]] = []) -> Tensor:  # noqa: B006
    """Logits [pos, vocab] of the plain model, with some (query, key) pairs masked."""
    n = len(context)
    mask = torch.full((n, n), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    for query, key in cut:
        mask[query, key] = torch.finfo(torch.float64).min
    with torch.no_grad():
        return model(input_ids=torch.tensor([context]), attention_mask=mask[None, None]).logits[0]


def _log_p(logits: Tensor, target: int) -> float:
    return float(logits.log_softmax(-1)[target])


# ------------------------------------------------------------------------------------------------------ knockout


@pytest.mark.parametrize("queries", ["later", "predictor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_knockout_equals_masking_in_the_plain_model(
    family: str, queries: Any, bodies: dict[str, Body], plain: dict[str, Any]
) -> None:
    found = knockout_saliency(bodies[family], PLACES, queries=queries)
    for place, values in zip(PLACES, found, strict=True):
        last = place.position - 1
        uncut = _log_p(_logits(plain[family], place.context)[last], place.target)
        assert values.shape == (place.position,)
        assert np.isnan(values[[0, last]]).all()
        for key in range(1, last):
            first = key + 1 if queries == "later" else last
            cut = [(query, key) for query in range(first, last + 1)]
            want = uncut - _log_p(_logits(plain[family], place.context, cut)[last], place.target)
            assert abs(want) > 1e-3
            assert values[key] == pytest.approx(want, abs=2e-4)


def test_in_one_layer_only_the_predictor_reads(tmp_path: Path) -> None:
    one = Minds.load({"base": save_tiny(tmp_path / "one", n_layers=1)}).body
    later, predictor = (knockout_saliency(one, PLACES, queries=q)[0] for q in ("later", "predictor"))
    assert np.nanmax(np.abs(later)) > 0.01
    np.testing.assert_allclose(later, predictor, atol=1e-5)


def test_in_three_layers_what_arrives_through_others_counts_too(bodies: dict[str, Body]) -> None:
    later, predictor = (knockout_saliency(bodies["qwen3"], PLACES[:1], queries=q)[0] for q in ("later", "predictor"))
    assert np.nanmax(np.abs(later - predictor)) > 0.01
    # Nothing lies between the last but one token and the predictor.
    assert later[-2] == pytest.approx(predictor[-2], abs=1e-5)


def test_short_contexts_have_no_defined_knockout(bodies: dict[str, Body]) -> None:
    assert np.isnan(knockout_saliency(bodies["gpt2"], [Place(ROW, 1), Place(ROW, 2)])[1]).all()
    assert knockout_saliency(bodies["gpt2"], []) == []


# ------------------------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_times_input_is_a_finite_difference(family: str, bodies: dict[str, Body]) -> None:
    body, step = bodies[family], 3e-3
    for place, values in zip(PLACES, gradient_saliency(body, PLACES), strict=True):
        assert values.shape == (place.position,)
        for position in range(place.position):

            def scaled(factor: float, position: int = position, place: Place = place) -> float:
                def f(stream: Tensor) -> Tensor:
                    stream = stream.clone()
                    stream[0, position] *= factor
                    return stream

                at = torch.tensor([[place.position - 1]])
                hooks = [(site("resid_pre", 0), f)]
                logits = body.forward(torch.tensor([place.context]), hooks=hooks, positions=at)
                return _log_p(logits[0, 0].double(), place.target)

            want = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
            assert values[position] == pytest.approx(want, abs=2e-3 + 0.01 * abs(want))
        assert np.abs(values).min() > 1e-4


@pytest.mark.parametrize("measure", [gradient_saliency, knockout_saliency])
def test_batches_change_nothing(measure: Any, bodies: dict[str, Body]) -> None:
    together, apart = measure(bodies["llama-gqa"], PLACES), measure(bodies["llama-gqa"], PLACES, max_rows=2)
    for a, b in zip(together, apart, strict=True):
        assert np.nanmax(np.abs(a)) > 0.01
        np.testing.assert_allclose(a, b, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- alignment


def test_saliency_is_of_the_distribution_that_predicts_the_target(
    bodies: dict[str, Body], plain: dict[str, Any]
) -> None:
    """STIM's code appends the target and reads the logits at it: the distribution of the token after the target."""
    body, model, place = bodies["llama-gqa"], plain["llama-gqa"], PLACES[0]
    t = place.position

    def gradient(row: tuple[int, ...], read: int) -> np.ndarray:
        x = model.get_input_embeddings()(torch.tensor([row])).detach().requires_grad_()
        model(inputs_embeds=x).logits[0, read].log_softmax(-1)[place.target].backward()
        return (x * x.grad).sum(-1)[0, :t].detach().numpy()  # type: ignore[operator]

    ours = gradient_saliency(body, [place])[0]
    right, off_by_one = gradient(place.row[:t], t - 1), gradient(place.row[: t + 1], t)
    np.testing.assert_allclose(ours, right, atol=1e-4, rtol=1e-3)
    assert np.abs(ours - off_by_one).max() > 0.1
    assert (np.argsort(ours) != np.argsort(off_by_one)).any()


def test_what_stands_at_and_behind_the_target_does_not_reach_its_saliency(bodies: dict[str, Body]) -> None:
    place = PLACES[0]
    behind = Place((*place.row[: place.position + 1], 77, 78, 79), place.position)
    for measure in (knockout_saliency, gradient_saliency):
        here, there = measure(bodies["gpt2"], [place])[0], measure(bodies["gpt2"], [behind])[0]
        np.testing.assert_array_equal(here, there)
        other = Place((*place.row[: place.position], 99), place.position)
        assert np.nanmax(np.abs(here - measure(bodies["gpt2"], [other])[0])) > 0.01


def test_alternatives_are_those_of_the_plain_model(bodies: dict[str, Body], plain: dict[str, Any]) -> None:
    found = read_alternatives(bodies["qwen3"], PLACES, k=7, max_rows=1)
    for place, alternatives in zip(PLACES, found, strict=True):
        log_probs = _logits(plain["qwen3"], place.context)[-1].log_softmax(-1)
        best = log_probs.argsort(descending=True)[:7].tolist()
        want = best if place.target in best else [*best, place.target]
        assert alternatives.ids.tolist() == want
        np.testing.assert_allclose(alternatives.log_probs, log_probs[want].numpy(), atol=1e-4)
        assert alternatives.rank == int((log_probs > log_probs[place.target]).sum())
        assert alternatives.surprise == pytest.approx(-float(log_probs[place.target]) / np.log(2), abs=1e-4)


def test_ties_among_alternatives_go_by_id_and_the_target_is_kept() -> None:
    log_probs = np.log(np.array([0.1, 0.2, 0.1, 0.3, 0.1, 0.2]))
    assert pick(log_probs, 5, 4).ids.tolist() == [3, 1, 5, 0]
    kept = pick(log_probs, 4, 4)
    assert kept.ids.tolist() == [3, 1, 5, 0, 4] and kept.rank == 3
    assert pick(log_probs, 4, 100).ids.tolist() == [3, 1, 5, 0, 2, 4]


def test_places_of_a_trace() -> None:
    trace = Trace("a", "3 apples", ("3 + 12 = 15", "15 - 1"), "14", Format())
    tokens = encode(trace, tiny_tokenizer())
    places = chain_places(tokens)
    steps = [p for span in tokens.steps for p in range(span.start, span.stop)]
    assert [p.position for p in places] == steps and len(steps) > 5
    question, chain = parts_before(tokens, steps[-1])
    assert question == tokens.question and chain == Span(tokens.steps[0].start, steps[-1])
    assert parts_before(tokens, steps[0])[1] == Span(steps[0], steps[0])


@pytest.mark.parametrize("position", [0, 9])
def test_nothing_predicts_the_first_token(position: int, bodies: dict[str, Body]) -> None:
    place = Place(ROW, position)
    for measure in (knockout_saliency, gradient_saliency, read_alternatives):
        with pytest.raises(UserError, match=r"places\[0\]: position"):
            measure(bodies["gpt2"], [place])
    with pytest.raises(UserError, match="position"):
        shapley_saliency(bodies["gpt2"], place, baseline=0)


# ------------------------------------------------------------------------------------------------------- Shapley


def _exact(model: Any, place: Place, players: list[int], baseline: int) -> np.ndarray:
    """Shapley values over all orders of the players."""

    def payoff(there: set[int]) -> float:
        context = tuple(baseline if i in players and i not in there else token for i, token in enumerate(place.context))
        return _log_p(_logits(model, context)[-1], place.target)

    values = np.zeros(len(players))
    orders = list(permutations(range(len(players))))
    for order in orders:
        there: set[int] = set()
        for player in order:
            before = payoff(there)
            there.add(players[player])
            values[player] += (payoff(there) - before) / len(orders)
    return values


def test_sampled_shapley_values_are_the_exact_ones(bodies: dict[str, Body], plain: dict[str, Any]) -> None:
    place = PLACES[1]
    exact = _exact(plain["llama-gqa"], place, [0, 1, 2, 3], 1)
    assert np.abs(exact).min() > 0.01
    few = shapley_saliency(bodies["llama-gqa"], place, baseline=1, n_orders=6, seed=3)
    assert (np.abs(few.values - exact) < 5 * few.errors + 1e-3).all() and (few.errors > 0).any()
    many = shapley_saliency(bodies["llama-gqa"], place, baseline=1, n_orders=4000)
    np.testing.assert_allclose(many.values, exact, atol=0.02 * np.abs(exact).max())
    for found in (few, many):  # efficiency, whatever the number of orders
        assert found.values.sum() == pytest.approx(found.total, abs=1e-5)
        assert abs(found.total) > 0.1


def test_an_order_and_its_reverse_are_all_orders_of_two_players(bodies: dict[str, Body], plain: dict[str, Any]) -> None:
    found = shapley_saliency(bodies["gpt2"], PLACES[1], baseline=1, players=[1, 3], n_orders=1)
    np.testing.assert_allclose(found.values[[1, 3]], _exact(plain["gpt2"], PLACES[1], [1, 3], 1), atol=2e-4)
    assert np.isnan(found.errors).all() and np.abs(found.values[[1, 3]]).min() > 0.01


def test_players_that_are_the_baseline_count_nothing_and_others_are_no_players(
    bodies: dict[str, Body], plain: dict[str, Any]
) -> None:
    place, players = PLACES[0], [1, 2, 5]
    found = shapley_saliency(bodies["llama-gqa"], place, baseline=ROW[1], players=players, n_orders=500)
    assert found.values[1] == 0 and found.errors[1] == 0
    assert np.isnan(np.delete(found.values, players)).all()
    exact = _exact(plain["llama-gqa"], place, players, ROW[1])
    np.testing.assert_allclose(found.values[players], exact, atol=0.02 * np.abs(exact).max())
    assert np.nansum(found.values) == pytest.approx(found.total, abs=1e-5) and abs(found.total) > 0.05
    again = shapley_saliency(bodies["llama-gqa"], place, baseline=ROW[1], players=players, n_orders=500)
    np.testing.assert_array_equal(found.values, again.values)


@pytest.mark.parametrize("players", [[], [1, 1], [4], [-1]])
def test_players_are_positions_of_the_context(players: list[int], bodies: dict[str, Body]) -> None:
    with pytest.raises(UserError, match="players"):
        shapley_saliency(bodies["gpt2"], PLACES[1], baseline=0, players=players)


# -------------------------------------------------------------------------------------------------- altogether


def test_from_a_trace_and_a_network_to_its_sources(bodies: dict[str, Body]) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["She has 3 + 12 = 15 apples.", "so x = 9 - 4 = 5 pencils", "Tom pays 4 * 5 = 20 dollars"]
    index = BruteForce([tokenizer(text * 2)["input_ids"] for text in texts], len(tokenizer))
    targets = []
    for i, text in enumerate(texts):
        tokens = encode(Trace(str(i), text, (f"{i} + 12 = {i + 12}", "so 4 * 5 = 20"), "20"), tokenizer)
        places = chain_places(tokens)
        saliency = knockout_saliency(bodies["qwen3"], places)
        alternatives = read_alternatives(bodies["qwen3"], places)
        for place, one, salient in zip(places, alternatives, saliency, strict=True):
            question, chain = parts_before(tokens, place.position)
            targets.append(Target(i, place.context, one, question, chain, salient))
    found = [x.to_row() for x in trace_sources(index, targets, settings=Settings(n_null=19))]
    assert {x["n_alternatives"] for x in found} <= {20, 21}
    for source in SOURCES:
        p = [x[f"{source}_p"] for x in found]
        assert 0 < min(v for v in p if v is not None) < 0.5
        assert all((v is None) == bool(x[f"{source}_reason"]) for v, x in zip(p, found, strict=True))
    assert not any(isinstance(v, float) and np.isnan(v) for x in found for v in x.values())


# ---------------------------------------------------------------------------------------------- salient tokens


def test_salient_tokens_by_hand() -> None:
    context = (7, 3, 9, 3, 5, 8, 2)
    saliency = np.array([0.9, 0.2, np.nan, 0.5, -2.0, 0.3, 0.8])
    assert ranked_ids(context, saliency, Span(0, 7)) == (7, 2, 3, 8)  # 3 once, at its best; 5 against; 9 undefined
    assert ranked_ids(context, saliency, Span(1, 7), window=1, without={8}) == (3,)
    assert ranked_ids(context, saliency, Span(5, 7), window=3) == ()
    assert ranked_ids((1, 2), np.array([0.5, 0.5]), Span(0, 2)) == (1, 2)
