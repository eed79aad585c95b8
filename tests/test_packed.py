"""Packed rows, stores, lanes and the staircase: against whole forward passes, and the routes against each other."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reasoninterp.models import packed as packed_module
from reasoninterp.models.body import Body, Hook, site
from reasoninterp.models.context import Context
from reasoninterp.models.minds import Minds
from reasoninterp.models.packed import Packed, supported
from reasoninterp.patching import readings
from reasoninterp.patching import sweep as sweep_module
from reasoninterp.patching.cells import COMPONENTS, Sites
from reasoninterp.patching.columns import columns
from reasoninterp.patching.lanes import Lanes, arrange, ragged
from reasoninterp.patching.staircase import LaneCut, climb
from reasoninterp.patching.store import Store, record
from reasoninterp.patching.sweep import sweep
from tests.sweep_oracle import FAMILIES, activations, contrasts, pairs, patched
from tests.tiny import save_tiny, tiny_tokenizer

LENGTHS = (12, 9, 12, 7)
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")


@pytest.fixture(scope="module")
def minds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Minds]:
    root = tmp_path_factory.mktemp("packed")
    return {f: Minds.load({"base": save_tiny(root / f, f)}) for f in (*FAMILIES, "llama")}


@pytest.fixture(params=(*FAMILIES, "llama"))
def body(request: pytest.FixtureRequest, minds: dict[str, Minds]) -> Body:
    return minds[str(request.param)].body


@pytest.fixture
def ids() -> Tensor:
    """Rows of different length, padded on the right; row 2 begins as row 0 does, up to position 5."""
    rows = torch.randint(2, 290, (4, 12), generator=torch.Generator().manual_seed(3))
    rows[2, :5] = rows[0, :5]
    for row, n in enumerate(LENGTHS):
        rows[row, n:] = 0
    return rows


def stored(body: Body, ids: Tensor, **kwargs: Any) -> tuple[Store, Tensor]:
    """A store of all sites of the rows, and the two positions that are read in each."""
    lengths = np.array(LENGTHS)
    reads = torch.tensor([[n - 2, n - 1] for n in LENGTHS])
    wanted = {(c, n) for c in SITES for n in range(body.n_layers)}
    return record(body, ids, lengths, reads, wanted, **kwargs), reads


def run(body: Body, store: Store, lanes: Lanes, reads: Tensor, **kwargs: Any) -> Tensor:
    """Logits of every lane where its row is read, in the order of the lanes."""
    out = torch.full((len(lanes), reads.shape[1], body.n_vocab_shared), float("nan"))
    for found in climb(body, store, lanes, kwargs.pop("edits", None), kwargs.pop("source", None), reads, **kwargs):
        assert out[found[0]].isnan().all()  # every lane once
        with torch.no_grad():
            out[found[0]] = body._bridge.unembed(body._bridge.ln_final(found[1]))[..., : body.n_vocab_shared].float()
    assert not out.isnan().any()
    return out


def some_lanes(n: int = 20, seed: int = 0) -> Lanes:
    """Lanes on all rows: many on one stem, stems of one length, starts that differ, every layer of joining."""
    generator = np.random.default_rng(seed)
    known = [(0, 6, 0), (0, 6, 1), (0, 6, 3), (2, 6, 0), (2, 6, 1), (2, 6, 3), (1, 3, 0), (3, 1, 2)]
    known += [(row, LENGTHS[row] - 4, join) for row in (0, 1, 3) for join in (0, 2)]  # one block, starts that differ
    row, start, join = (np.array(x) for x in zip(*known, strict=True))
    more = n - len(known)
    row = np.concatenate([row, generator.integers(0, 4, more)])
    start = np.concatenate([start, generator.integers(0, 3, more)])
    join = np.concatenate([join, generator.integers(0, 4, more)])
    return Lanes(row, start, np.array(LENGTHS)[row], join)


# -------------------------------------------------------------------------------------------- stores


def test_a_store_holds_what_a_whole_pass_computes(body: Body, ids: Tensor) -> None:
    store, reads = stored(body, ids, max_tokens=13)
    for component in SITES:
        for layer in range(body.n_layers):
            for row, n in enumerate(LENGTHS):
                want = activations(body, ids[row, :n].tolist(), component, layer)
                torch.testing.assert_close(store.at(component, layer)[row, :n], want, atol=2e-5, rtol=1e-4)
    logits = body.forward(ids, positions=reads)
    with torch.no_grad():
        got = body._bridge.unembed(body._bridge.ln_final(store.hidden))[..., : body.n_vocab_shared]
    torch.testing.assert_close(got, logits, atol=5e-5, rtol=1e-4)


def test_rows_that_begin_alike_are_run_from_their_first_own_token(body: Body, ids: Tensor) -> None:
    other = ids.clone()
    starts = np.array([4, 0, 11, 6])
    for row, first in enumerate(starts):
        other[row, first : LENGTHS[row]] = (other[row, first : LENGTHS[row]] + 7) % 290
    like, _ = stored(body, ids)
    short, reads = stored(body, other, like=like, starts=np.minimum(starts, reads_start()))
    whole, _ = stored(body, other)
    assert (whole.hidden - like.hidden).abs().max() > 1e-2
    torch.testing.assert_close(short.hidden, whole.hidden, atol=3e-5, rtol=1e-4)
    for row, n in enumerate(LENGTHS):
        for component in SITES:
            for layer in range(body.n_layers):
                a, b = short.at(component, layer)[row, :n], whole.at(component, layer)[row, :n]
                torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-4)
        for layer in range(body.n_layers):
            for ours, all_of in ((short.memory.keys, whole.memory.keys), (short.memory.values, whole.memory.values)):
                mine, want = ours[layer][row, :, :n], all_of[layer][row, :, :n]
                torch.testing.assert_close(mine, want, atol=3e-5, rtol=1e-4)
    assert reads.shape == (4, 2)


def reads_start() -> np.ndarray:
    return np.array([n - 2 for n in LENGTHS])


# -------------------------------------------------------------------------------------------- lanes on stems


@pytest.mark.parametrize("max_tokens", [1, 20, 10**6])
def test_lanes_without_edits_are_the_stored_runs(body: Body, ids: Tensor, max_tokens: int) -> None:
    store, reads = stored(body, ids)
    lanes = some_lanes(30)
    want = body.forward(ids, positions=reads)[lanes.row]
    got = run(body, store, lanes, reads, max_tokens=max_tokens)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


# (lane, layers, queries, keys, heads): keys before the lane's start, keys in it, keys across, several heads and layers
CUTS = (
    LaneCut(0, (0, 1, 2), (6, 12), (2, 5)),
    LaneCut(1, (1, 2), (7, 11), (4, 9), (1,)),
    LaneCut(3, (2,), (10, 12), (0, 8), (0, 3)),
    LaneCut(4, (1,), (11, 12), (6, 11), (2,)),
    LaneCut(4, (2,), (8, 9), (3, 4)),
    LaneCut(6, (0, 2), (3, 9), (1, 3), (0, 1)),
    LaneCut(8, (0, 1, 2), (8, 12), (0, 2)),
    LaneCut(10, (1,), (5, 9), (4, 6), (2, 3)),
    LaneCut(12, (0, 2), (3, 7), (2, 3), (1,)),
)


def cut_hooks(cuts: Sequence[LaneCut], n_layers: int) -> list[tuple[str, Hook]]:
    """The same edges hidden in a whole pass of one row."""

    def hook(layer: int) -> Hook:
        def f(scores: Tensor) -> Tensor:
            new = scores.clone()
            for x in cuts:
                if layer in x.layers:
                    for head in range(new.shape[1]) if x.heads is None else x.heads:
                        block = new[:, head, x.queries[0] : x.queries[1], x.keys[0] : x.keys[1]]
                        block.fill_(torch.finfo(new.dtype).min)
            return new

        return f

    return [(site("attn_scores", layer), hook(layer)) for layer in range(n_layers)]


@pytest.mark.parametrize("max_tokens", [1, 40, 10**6])
def test_cut_edges_equal_whole_passes_with_hidden_scores(body: Body, ids: Tensor, max_tokens: int) -> None:
    store, reads = stored(body, ids)
    drawn = some_lanes()
    join = drawn.join.copy()
    for x in CUTS:
        join[x.lane] = min(join[x.lane], min(x.layers))
    lanes = Lanes(drawn.row, drawn.start, drawn.stop, join)
    got = run(body, store, lanes, reads, cuts=CUTS, max_tokens=max_tokens)
    for lane in range(len(lanes)):
        row = int(lanes.row[lane])
        mine = [x for x in CUTS if x.lane == lane]
        at = reads[row : row + 1]
        one = ids[row : row + 1, : LENGTHS[row]]
        want = body.forward(one, hooks=cut_hooks(mine, body.n_layers), positions=at)[0]
        torch.testing.assert_close(got[lane], want, atol=5e-5, rtol=1e-4)
        inside = any(
            x.queries[0] < x.queries[1] and max(x.queries[0], int(lanes.start[lane])) < x.queries[1] for x in mine
        )
        if mine and inside:
            assert (want - body.forward(one, positions=at)[0]).abs().max() > 1e-3


def test_the_routes_of_attention_agree(body: Body, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernel with merged sums, scores written down, and scores written down a few at a time."""
    if packed_module._FLASH is None:
        pytest.skip("this torch has no such kernel")
    merged = []
    real = packed_module._merged

    def watched(*args: Any) -> Tensor:
        merged.append(1)
        found: Tensor = real(*args)
        return found

    monkeypatch.setattr(packed_module, "_merged", watched)
    store, reads = stored(body, ids)
    lanes = some_lanes(30)
    # lanes that differ from their runs: an edge is cut in the first layer, so all above is new
    cuts = [LaneCut(k, (0,), (int(s), 12), (0, max(1, int(s)))) for k, s in enumerate(lanes.start)]
    lanes = Lanes(lanes.row, lanes.start, lanes.stop, np.zeros_like(lanes.join))
    by_kernel = run(body, store, lanes, reads, cuts=cuts)
    assert merged
    monkeypatch.setattr(packed_module, "_FLASH", None)
    before = len(merged)
    written = run(body, store, lanes, reads, cuts=cuts)
    assert len(merged) == before
    monkeypatch.setattr(packed_module, "_SCORES", 60)
    few = run(body, store, lanes, reads, cuts=cuts)
    plain = body.forward(ids, positions=reads)[lanes.row]
    assert (written - plain).abs().max() > 1e-2
    torch.testing.assert_close(by_kernel, written, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(few, written, atol=5e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------- hooks in blocks


def test_a_hook_anywhere_in_a_block_fires_and_changes_no_number(
    body: Body, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reads = stored(body, ids)
    lanes = some_lanes()
    calls: list[int] = []
    real = Packed._call

    def watched(self: Packed, layer: int, *args: Any) -> Tensor:
        calls.append(layer)
        return real(self, layer, *args)

    monkeypatch.setattr(Packed, "_call", watched)
    raw = run(body, store, lanes, reads, max_tokens=10**6)
    assert not calls
    for name in [site(c, 1) for c in (*SITES, "k")] + ["blocks.1.ln1.hook_normalized", "blocks.1.mlp.hook_out"]:
        calls.clear()
        seen: list[tuple[int, ...]] = []

        def look(act: Tensor, seen: list[tuple[int, ...]] = seen) -> None:
            seen.append(tuple(act.shape))

        hooked = run(body, store, lanes, reads, hooks=[(name, look)], max_tokens=10**6)
        assert len(seen) == 1 and seen[0][0] == 1 and calls == [1], name
        torch.testing.assert_close(hooked, raw, atol=3e-5, rtol=1e-4)
    every = [(site("resid_mid", n), lambda act: act * 1.0) for n in range(body.n_layers)]
    calls.clear()
    torch.testing.assert_close(run(body, store, lanes, reads, hooks=every), raw, atol=3e-5, rtol=1e-4)
    assert calls == [0, 1, 2]


def test_an_edit_by_a_hook_equals_the_same_hook_in_a_whole_pass(body: Body, ids: Tensor) -> None:
    """Lanes that begin at 0 and join at 0 are whole passes."""
    store, reads = stored(body, ids)
    n = len(LENGTHS)
    lanes = Lanes(np.arange(n), np.zeros(n, dtype=np.int64), np.array(LENGTHS), np.zeros(n, dtype=np.int64))
    for component in (*SITES,):
        hooks = [(site(component, 1), lambda act: act * 0.5 + 0.1)]
        got = run(body, store, lanes, reads, hooks=hooks)
        want = body.forward(ids, positions=reads, hooks=hooks)
        assert (want - body.forward(ids, positions=reads)).abs().max() > 1e-2
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------- networks, restoring


def test_families_are_supported(body: Body) -> None:
    assert supported(body) is None


def sliding_home(path: Path) -> str:
    """A tiny Mistral with a sliding window of six tokens."""
    import transformers as hf

    tokenizer = tiny_tokenizer()
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(hf.MistralConfig(sliding_window=6, **shared))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.25 if p.dim() > 1 else 0.1))
    model.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    return str(path)


def test_sliding_windows_are_refused_and_swept_plainly(tmp_path: Path) -> None:
    minds = Minds.load({"base": sliding_home(tmp_path)})
    reason = supported(minds.body)
    assert reason is not None and "window" in reason
    context = Context(minds, contrasts(minds.tokenizer("base")))
    components = ("resid_pre", "z", "v")
    with context.open("base"):
        table = sweep(context, pairs(context)[:2], Sites(components, layers=(0, 1)), directions=["noising"])
        live = table[table["value"].abs() > 1e-4]
        assert len(live) > 6
        for row in live.sample(6, random_state=0).to_dict("records"):
            pair = pairs(context)[row["contrast"]]
            span = next(c.span for c in columns(context.encode(pair.clean)) if c.order == row["column_index"])
            want = patched(context, pair, "noising", row, *span)
            assert row["value"] == pytest.approx(want["value"], abs=5e-5, rel=2e-4)


def test_a_network_whose_packed_logits_are_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = Minds.load({"base": save_tiny(tmp_path, "llama-gqa")}).body
    monkeypatch.setattr(packed_module, "_rotated", lambda x, cos_sin: x)
    reason = supported(body)
    assert reason is not None and "off by" in reason


def test_the_plain_sweep_stands_in_with_equal_numbers(minds: dict[str, Minds], monkeypatch: pytest.MonkeyPatch) -> None:
    found = minds["llama-gqa"]
    context = Context(found, contrasts(found.tokenizer("base")))
    sites = Sites(("resid_pre", "z"), layers=(0, 2), heads=(1,))
    with context.open("base"):
        fast = sweep(context, pairs(context), sites)
        monkeypatch.setattr(sweep_module, "supported", lambda body: "it is asked for")
        slow = sweep(context, pairs(context), sites)
    keys = ["contrast", "direction", "component", "layer", "head", "column_index"]
    assert set(fast.columns) == set(slow.columns) and len(fast) == len(slow)
    both = fast.merge(slow, on=keys, validate="one_to_one")
    np.testing.assert_allclose(both["value_x"], both["value_y"], atol=3e-5)
    assert both["value_x"].abs().max() > 1e-2 and set(COMPONENTS) >= set(sites.components)


def test_blocks_are_put_back_after_an_exception(body: Body, ids: Tensor) -> None:
    before = body.forward(ids)
    store, _ = stored(body, ids)
    with pytest.raises(ZeroDivisionError), Packed(body, store.memory).installed():
        raise ZeroDivisionError
    assert torch.equal(body.forward(ids), before)
    assert torch.is_grad_enabled()


def test_blocks_are_put_back_while_the_exception_of_a_sweep_is_still_held(
    minds: dict[str, Minds], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, which keeps the last traceback, and with it every frame."""
    found = minds["llama-gqa"]
    context = Context(found, contrasts(found.tokenizer("base")))
    with context.open("base") as body:
        before = body.forward(ids[:1])
        real, count = readings.Reader.read, []

        def fails(self: Any, *args: Any) -> Any:
            count.append(1)
            if len(count) == 3:  # the first two read the runs that are not patched
                raise MemoryError("while a chunk is read")
            return real(self, *args)

        monkeypatch.setattr(readings.Reader, "read", fails)
        held = None
        try:
            sweep(context, pairs(context), "resid_pre")
        except MemoryError as error:
            held = error
        assert held is not None
        try:
            assert torch.is_grad_enabled()
            assert torch.equal(body.forward(ids[:1]), before)
        finally:
            held = None
            gc.collect()
    assert torch.equal(body.forward(ids[:1]), before)


# -------------------------------------------------------------------------------------------- arranging


@st.composite
def drawn_lanes(draw: st.DrawFn) -> Lanes:
    """Stems of few shapes, so that several share a block: (row, start) with the layers at which lanes join there."""
    n_rows = draw(st.integers(1, 4))
    stops = draw(st.lists(st.integers(6, 8), min_size=n_rows, max_size=n_rows))
    shapes = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=3))
    stems = draw(st.sets(st.tuples(st.integers(0, n_rows - 1), st.integers(0, 5)), min_size=1, max_size=12))
    lanes = [(r, s, stops[r], j) for r, s in sorted(stems) for j in draw(st.sampled_from(shapes))]
    row, start, stop, join = (np.array(x) for x in zip(*draw(st.permutations(lanes)), strict=True))
    return Lanes(row, start, stop, join)


@settings(max_examples=150, deadline=None)
@given(drawn_lanes(), st.integers(1, 200))
def test_every_lane_is_in_one_block_of_its_shape(lanes: Lanes, max_tokens: int) -> None:
    chunks = arrange(lanes, max_tokens)
    seen = [lane for chunk in chunks for block in chunk for lane in block.lanes.ravel().tolist()]
    assert sorted(seen) == list(range(len(lanes)))
    for chunk in chunks:
        n = sum(b.n_tokens for b in chunk)
        assert n == sum(b.lanes.size * b.length for b in chunk)
        assert n <= max_tokens or (len(chunk) == 1 and chunk[0].lanes.size == 1)
        for block in chunk:
            assert (lanes.length[block.lanes] == block.length).all()
            # one stem a column, one layer of joining a row, in order of joining
            assert (lanes.row[block.lanes] == lanes.row[block.lanes[0]]).all()
            assert (lanes.start[block.lanes] == lanes.start[block.lanes[0]]).all()
            assert (lanes.join[block.lanes] == block.joins[:, None]).all()
            assert (np.diff(block.joins) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12))
def test_ragged_ranges(ranges: list[tuple[int, int]]) -> None:
    starts, stops = (np.array([r[k] for r in ranges], dtype=np.int64) for k in (0, 1))
    owner, position = ragged(starts, stops)
    want = [(k, p) for k, (a, b) in enumerate(ranges) for p in range(a, b)]
    assert list(zip(owner.tolist(), position.tolist(), strict=True)) == want
