"""The report: every number a figure must show is in it, and the page stands alone and is safe to open."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from reasoninterp import figures
from reasoninterp.report import content, plots, render, weight_plots
from reasoninterp.runs import Run
from tests import synthetic_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: synthetic_run.make(root / kind, kind) for kind in synthetic_run.KINDS}


@pytest.fixture(scope="module")
def pages(runs: dict[str, Run]) -> dict[str, str]:
    severed = render(runs["severed"], [runs["benign"], runs["floor"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_figure", blank)
        others = {kind: render(runs[kind]) for kind in ("benign", "floor")}
    return {kind: path.read_text(encoding="utf-8") for kind, path in {"severed": severed, **others}.items()}


def blank(run: Run, name: str, figure: object) -> list[Path]:
    """Instead of `Run.save_figure` where a test looks at words: the figure is drawn, but not written out."""
    return [run.save_text(f"figures/{name}.svg", '<svg width="300pt" height="200pt"></svg>')]


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "save_figure", blank)


class Page(HTMLParser):
    """Text, tags and attributes of a page; unbalanced tags are an error."""

    VOID = frozenset({"meta", "img", "br", "line", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


# --- figures show their tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", synthetic_run.KINDS)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_maps_hold_every_value_on_one_scale(runs: dict[str, Run], kind: str, direction: str) -> None:
    table = runs[kind].table("residual")
    table = table[table["direction"] == direction]
    fig: Any = plots.residual_maps(runs[kind].table("residual"), direction)
    panels = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in panels] == [f"base, {direction}", f"tuned, {direction}"]
    limits = {ax.images[0].get_clim() for ax in panels}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low == -high
    largest = table["value"].abs().max()
    assert high == (largest if largest else 1.0)
    for ax, mind in zip(panels, ["base", "tuned"], strict=True):
        shown = np.asarray(ax.images[0].get_array())
        assert shown.size
        for row in table[table["mind"] == mind].to_dict("records"):
            assert shown[row["layer"], row["column_index"]] == row["value"]
        labels = [t.get_text().replace("\n", " ") for t in ax.get_xticklabels()]
        assert labels == ["question", "step 1", "step 2", "step 3", "last step", "answer position"]


def test_map_prints_n_where_columns_differ_and_greys_what_was_not_measured() -> None:
    table = pd.DataFrame(
        {"mind": "base", "layer": [0, 0, 1], "column": ["a", "b", "a"], "value": [1.0, -2.0, 0.5], "n": [9, 4, 9]}
    )
    fig: Any = figures.heatmap(table, "column", "layer")
    ax = fig.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a (n=9)", "b (n=4)"]
    assert bool(np.ma.getmaskarray(np.ma.masked_invalid(ax.images[0].get_array()))[1, 1])
    assert [t.get_text() for t in ax.texts] == ["1.0", "−2.0", "0.50"]
    with pytest.raises(ValueError, match="duplicate"):
        figures.heatmap(pd.concat([table, table]), "column", "layer")


@pytest.mark.parametrize("kind", synthetic_run.KINDS)
def test_ledger_bars_are_the_tables_and_the_residual_is_printed(runs: dict[str, Run], kind: str) -> None:
    table, total = runs[kind].table("ledger"), runs[kind].table("ledger_total").iloc[0].to_dict()
    fig: Any = weight_plots.ledger(table, total)
    ax, weights = fig.axes
    names = [t.get_text() for t in ax.get_yticklabels()]
    widths = dict(zip(names, [p.get_width() for p in ax.patches if p.get_height() < 1], strict=False))
    blocks = table[table["level"] == "block"].set_index("unit")
    assert widths.pop("residual") == pytest.approx(total["residual"])
    assert widths == pytest.approx(blocks["attribution"].to_dict())
    assert sum(widths.values()) - total["residual"] == pytest.approx(total["loss"], abs=1e-9)
    assert [abs(widths[n]) for n in names[:-1]] == sorted((abs(v) for v in widths.values()), reverse=True)
    texts = " ".join(t.get_text() for t in ax.texts)
    assert weight_plots.residual_text(total) in texts
    assert figures.number(total["residual"], 2) in texts
    assert any(p.get_hatch() for p in ax.patches)
    assert figures.number(total["loss"]) in ax.get_title(loc="left")
    line = [x for line in ax.lines for x in line.get_xdata() if len(set(line.get_xdata())) == 1]
    assert total["loss"] in line
    low, high = ax.get_xlim()
    assert low <= total["loss"] <= high
    drawn = sorted(p.get_width() for p in weights.patches)
    assert drawn == pytest.approx(sorted(blocks["weight_change"]))
    assert any("largest" in t.get_text() for t in weights.texts)


def test_ledger_of_a_deep_model_keeps_its_sum(tmp_path: Path, unsaved: None) -> None:
    run = synthetic_run.make(tmp_path / "deep", layers=8, steps=12, heads=2)
    table, total = run.table("ledger"), run.table("ledger_total").iloc[0].to_dict()
    ax: Any = weight_plots.ledger(table, total).axes[0]
    widths = [p.get_width() for p in ax.patches if p.get_height() < 1]
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert len(names) == weight_plots.TOP_UNITS + 2
    assert names[-2].endswith(weight_plots.REST)
    assert sum(widths[:-1]) == pytest.approx(total["total"])
    assert f"The {weight_plots.TOP_UNITS} largest of {3 * 8 + 3} blocks" in render(run).read_text(encoding="utf-8")


def test_small_change_of_a_large_effect_looks_small() -> None:
    table = pd.DataFrame({"unit": ["embed"], "attribution": [0.1], "ci_low": [0.0], "ci_high": [0.2], "circuit": [""]})
    total = {"e_base": 20.0, "e_tuned": 20.1, "loss": 0.1, "residual": 0.0}
    low, high = weight_plots.ledger(table, total).axes[0].get_xlim()
    assert (low, high) == pytest.approx((-0.25 * 20.1, 0.25 * 20.1))


def test_circuits_are_the_tables(runs: dict[str, Run]) -> None:
    table = runs["severed"].table("ledger")
    ax: Any = weight_plots.ledger_circuits(table, None).axes[0]
    fine = table[table["level"] == "circuit"].set_index("unit")["attribution"]
    shown = dict(zip([t.get_text() for t in ax.get_yticklabels()], [p.get_width() for p in ax.patches], strict=True))
    assert shown == pytest.approx(fine[list(shown)].to_dict())
    assert min(shown, key=lambda n: shown[n]) == fine.idxmin()


def test_grafts_stand_in_the_ledgers_order_with_both_directions(runs: dict[str, Run]) -> None:
    table = runs["severed"].table("grafts")
    order = list(weight_plots.blocks(runs["severed"].table("ledger"))["unit"])
    fig: Any = weight_plots.grafts(table, order, follow={"base": 0.9, "tuned": 0.1})
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == order
    by_unit = table.set_index("unit").loc[order]
    columns = [("restore", "cut"), ("e_restored", "e_cut"), ("follow_restored", "follow_cut")]
    for ax, pair in zip(fig.axes, columns, strict=True):
        for container, column in zip(ax.containers, pair, strict=True):
            assert list(container.lines[0].get_xdata()) == pytest.approx(list(by_unit[column]))
    lines = [line.get_xdata()[0] for line in fig.axes[2].lines if line.get_linestyle() == "--"]
    assert lines == [0.9, 0.1]


def test_graft_sets_are_drawn_against_random_sets(runs: dict[str, Run]) -> None:
    table = runs["severed"].table("graft_sets")
    fig: Any = weight_plots.graft_sets(table)
    share, follow = fig.axes
    for ax, columns in ((share, ["restore", "cut"]), (follow, ["follow_restored", "follow_cut"])):
        drawn = [list(c.lines[0].get_ydata()) for c in ax.containers]
        wanted = [list(table.loc[table["chosen"] == who, c]) for c in columns for who in ("ledger", "random")]
        assert drawn == wanted
    raw: Any = weight_plots.graft_sets(table.assign(restore=np.nan, cut=np.nan)).axes[0]
    assert raw.get_title(loc="left") == "E, in nats"
    assert list(raw.containers[0].lines[0].get_ydata()) == list(table.loc[table["chosen"] == "ledger", "e_restored"])


@pytest.mark.parametrize("kind", ["benign", "floor"])
def test_undefined_shares_leave_raw_effects_only(runs: dict[str, Run], pages: dict[str, str], kind: str) -> None:
    fig: Any = weight_plots.grafts(runs[kind].table("grafts"))
    assert [ax.get_xlabel() for ax in fig.axes] == ["E, in nats", "share of contrasts"]
    assert "raw effects only" in Page(pages[kind]).text


def test_accuracy_follow_draws_points_intervals_and_siblings(runs: dict[str, Run]) -> None:
    table = runs["severed"].table("behaviour")
    fig: Any = plots.accuracy_follow(table, {"kept": runs["benign"].table("behaviour")})
    ax = fig.axes[0]
    points = {(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in ax.containers}
    assert points == {(0.996, 0.777), (0.022, 0.996), (1.0, 1.0)}
    texts = {t.get_text(): t for t in ax.texts}
    assert {"base", "tuned", "kept", "chance 10 %"} <= set(texts)
    assert to_hex(texts["base"].get_color()) == figures.MIND_COLOURS["base"]
    row = table[(table["mind"] == "base") & (table["test"] == "swap_follow")].iloc[0]
    bars = [s for c in ax.containers if c.lines[0].get_xdata()[0] == 0.996 for s in c.lines[2]]
    assert bars[0].get_segments()[0][:, 0] == pytest.approx([row["ci_low"], row["ci_high"]])


def test_many_points_in_one_corner_have_labels_that_do_not_overlap(runs: dict[str, Run]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    benign = runs["benign"].table("behaviour")
    fig: Any = plots.accuracy_follow(
        benign, dict.fromkeys(("shortcut", "kept", "longer name", "other", "fifth"), benign)
    )
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    names = {"base", "tuned", "shortcut", "kept", "longer name", "other", "fifth"}
    labels = [t for t in fig.axes[0].texts if t.get_text() in names]
    assert len(labels) == 7
    boxes = [Text.get_window_extent(t, canvas.get_renderer()) for t in labels]
    frame = fig.axes[0].bbox
    assert all(frame.x0 < b.x0 and b.x1 < frame.x1 and frame.y0 < b.y0 and b.y1 < frame.y1 for b in boxes)
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert plots._overlap(a, b) == 0


def test_step_curves_count_changed_steps_from_one(runs: dict[str, Run]) -> None:
    table = runs["severed"].table("behaviour")
    fig: Any = plots.step_curves(table)
    forced, regenerated, truncated = fig.axes[:3]
    rows = table[(table["test"] == "forced_same") & (table["mind"] == "base")]
    base = forced.containers[0].lines[0]
    assert list(np.round(base.get_xdata())) == [1, 2, 3, 4]
    assert list(base.get_ydata()) == list(rows["value"])
    assert len(regenerated.containers) == 4
    assert list(np.round(truncated.containers[0].lines[0].get_xdata())) == [0, 1, 2, 3, 4]


def test_general_plots_carry_values_and_intervals() -> None:
    table = pd.DataFrame(
        {
            "mind": ["base", "base", "tuned", "tuned"],
            "k": [0, 1, 0, 1],
            "value": [0.1, 0.9, 0.4, 0.5],
            "ci_low": [0.0, 0.8, np.nan, 0.45],
            "ci_high": [0.2, 1.0, np.nan, 0.6],
        }
    )
    curves: Any = figures.curve(table, "k")
    lines = curves.axes[0].containers
    assert [list(c.lines[0].get_ydata()) for c in lines] == [[0.1, 0.9], [0.4, 0.5]]
    assert lines[0].lines[2][0].get_segments()[1][:, 1] == pytest.approx([0.8, 1.0])
    assert [to_hex(c.lines[0].get_color()) for c in lines] == list(figures.MIND_COLOURS.values())
    ax: Any = figures.bars(table, "k", hue="mind").axes[0]
    assert [p.get_width() for p in ax.patches] == [0.1, 0.9, 0.4, 0.5]
    fig: Any = figures.figure()
    same = figures.bars(table, "k", hue="mind", ax=fig.add_subplot()) is fig
    assert same
    assert fig._repr_png_().startswith(b"\x89PNG")


def test_numbers_read_as_numbers() -> None:
    shown = [figures.number(v) for v in (16.7, -0.0123, 0, float("nan"), 12345.6, 1e-9, 0.074)]
    assert shown == ["16.7", "−0.0123", "0", "–", "12,346", "1.0e−09", "0.0740"]
    assert content.fixed(-0.0004) == "0.000"
    assert content.fixed(0.9961, "%") == "99.6"
    assert content.interval(-1.234, 17.5, "nats") == "[−1.23, 17.50]"


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", synthetic_run.KINDS)
def test_page_stands_alone(pages: dict[str, str], kind: str) -> None:
    text = pages[kind]
    assert "http:" not in text
    assert "https:" not in text
    page = Page(text)
    sources = [a["src"] for _, a in page.tags if "src" in a]
    assert len(sources) >= 8
    assert all(s and s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    assert "url(" not in text
    assert "@import" not in text
    for source in sources:
        svg = base64.b64decode((source or "").split(",", 1)[1])
        assert b"<svg" in svg[:2000]


@pytest.mark.parametrize("kind", synthetic_run.KINDS)
def test_page_says_the_verdict_and_every_number_of_the_behaviour_table(
    runs: dict[str, Run], pages: dict[str, str], kind: str
) -> None:
    page = Page(pages[kind]).text
    verdict = synthetic_run.VERDICTS[kind]
    for sentence in [*verdict["sentences"], *verdict["caveats"], verdict["word"]]:
        assert sentence in page
    table = runs[kind].table("behaviour")
    whole = table[table["step"].isna() & table["value"].notna()]
    assert len(whole)
    for row in whole.to_dict("records"):
        unit = content.unit_of(row["test"])
        assert content.fixed(row["value"], unit) in page
        assert content.interval(row["ci_low"], row["ci_high"], unit) in page
    total = runs[kind].table("ledger_total").iloc[0].to_dict()
    assert weight_plots.residual_text(total) in page
    for reason, count in runs[kind].manifest["traces"]["refused"].items():
        assert f"{reason}{count}" in page.replace(" ", "").replace(reason.replace(" ", ""), reason)


def test_page_of_a_base_at_floor_warns_in_every_section_it_qualifies(pages: dict[str, str]) -> None:
    assert pages["floor"].count('<p class="alert">') == 4
    assert '<p class="alert">' not in pages["benign"]


def test_siblings_are_named_with_their_verdicts_and_relative_links(pages: dict[str, str]) -> None:
    page = Page(pages["severed"])
    links = [a["href"] for tag, a in page.tags if tag == "a" and not (a["href"] or "").startswith("#")]
    assert links == ["../benign/report.html", "../floor/report.html"]
    assert "no damage found" in page.text
    assert "not interpretable here" in page.text
    assert "The other pairs" not in Page(pages["benign"]).text


def test_hostile_text_is_shown_and_not_run(tmp_path: Path, unsaved: None) -> None:
    evil = "<script>alert('x')</script><img src=http://evil onerror=1>"
    run = synthetic_run.make(tmp_path / "r")
    example = synthetic_run.example(3)
    example.update(question=evil, steps=[evil, "7"], corrupt_steps=[evil + "!", "8"], answer=None)
    example["readings"].append({"mind": evil, "chain": "swapped", "answer": None})
    verdict = {"word": evil, "sentences": [evil], "caveats": [evil], "evidence": []}
    run.record(example=example, verdict=verdict, arguments={"minds": {"base": "b", "tuned": evil}})
    behaviour = run.table("behaviour")
    unknown = behaviour.iloc[[0]].assign(test="new_<b>test")
    run.save_table("behaviour", pd.concat([behaviour, unknown]))
    text = render(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in a for _, a in page.tags)
    assert page.text.count("<script>alert('x')</script>") >= 5
    assert "new <b>test" in page.text
    assert "no answer found" in page.text


@pytest.mark.parametrize(
    "missing", ["behaviour", "gate", "effect", "residual", "heads", "ledger", "ledger_total", "grafts"]
)
def test_each_missing_table_is_named(runs: dict[str, Run], tmp_path: Path, missing: str, unsaved: None) -> None:
    source = runs["severed"]
    run = Run.open(tmp_path / "r", {"traces": "x"})
    for path in (source.path / "tables").glob("*.parquet"):
        if path.stem != missing:
            run.save_table(path.stem, source.table(path.stem))
    text = Page(render(run).read_text(encoding="utf-8")).text
    run.close()
    assert f"This run has no table {missing} ." in text or f"This run has no table {missing}." in text
    assert "No verdict is recorded" in text
    assert "No example is recorded" in text


def test_a_run_without_any_table_says_so_of_all(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "r", {"traces": "x"})
    run.save_table("grafts", pd.DataFrame(columns=["unit", "restore", "cut"]))
    text = render(run).read_text(encoding="utf-8")
    run.close()
    assert text.count("Not run: ") >= 8
    assert "<img" not in text


def test_long_names_do_not_break_figures_or_page(runs: dict[str, Run], tmp_path: Path, unsaved: None) -> None:
    long = "a-very-long-name-of-a-checkpoint-" * 8
    run = Run.open(tmp_path / "r", {"traces": "x"}, {"minds": {"base": long, "tuned": long + "2"}})
    for path in (runs["severed"].path / "tables").glob("*.parquet"):
        table = runs["severed"].table(path.stem)
        for column in ("mind", "unit"):
            if column in table:
                table[column] = [f"{v}-{long}" if v != "base" else v for v in table[column]]
        run.save_table(path.stem, table)
    path = render(run)
    run.close()
    fig: Any = weight_plots.ledger(run.table("ledger"), run.table("ledger_total").iloc[0].to_dict())
    assert fig.get_tightbbox().width < 1.2 * fig.get_figwidth()
    assert long in path.read_text(encoding="utf-8")


def test_a_page_of_the_same_numbers_is_left_and_of_others_is_made_again(tmp_path: Path, unsaved: None) -> None:
    run = synthetic_run.make(tmp_path / "r")
    path = render(run)
    path.write_text(path.read_text(encoding="utf-8") + "<!-- kept -->", encoding="utf-8")
    assert "<!-- kept -->" in render(run).read_text(encoding="utf-8")
    gate = run.table("gate")
    run.save_table("gate", gate.assign(reason="another reason"))
    text = render(run).read_text(encoding="utf-8")
    assert "<!-- kept -->" not in text
    assert "another reason" in text


def test_figures_are_saved_as_png_and_svg(runs: dict[str, Run], pages: dict[str, str]) -> None:
    saved = {p.name for p in (runs["severed"].path / "figures").iterdir()}
    names = ["accuracy_follow", "steps", "ledger", "ledger_circuits", "grafts", "graft_sets"]
    names += [f"{t}_{d}" for t in ("residual", "heads") for d in ("denoising", "noising")]
    assert saved == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    assert pages["severed"].count("<img") == len(names)


def test_the_same_numbers_give_the_same_svg(runs: dict[str, Run], pages: dict[str, str], tmp_path: Path) -> None:
    again = Run(tmp_path, {})
    fig = plots.residual_maps(runs["severed"].table("residual"), "noising")
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    with figures.style():
        again.save_figure("residual_noising", fig)
    first, second = ((r.path / "figures" / "residual_noising.svg").read_bytes() for r in (runs["severed"], again))
    assert first == second


# --- what the page computes ----------------------------------------------------------------------------------------


def test_difference_interval_by_hand() -> None:
    a = pd.Series({"value": 0.5, "ci_low": 0.4, "ci_high": 0.65})
    b = pd.Series({"value": 0.8, "ci_low": 0.7, "ci_high": 0.85})
    # low = .3 − √(.1² + .15²) = .1197, high = .3 + √(.05² + .1²) = .4118
    found = content.difference(a, b)
    assert (found.value, found.interval) == ("0.300", "[0.120, 0.412]")
    assert found.raw == pytest.approx(0.3)
    table = pd.DataFrame(
        {"mind": ["base", "tuned"], "test": "t", "step": np.nan, "value": [0.5, 0.8]}
        | {"ci_low": [0.4, 0.7], "ci_high": [0.65, 0.85], "n": 9, "method": "wilson"}
    )
    (group,) = content.behaviour_groups(table, None, ["base", "tuned"])
    assert group[1][0].difference.interval == "[12.0, 41.2]"
    stated = table.iloc[[1]].assign(value=0.3, ci_low=0.21, ci_high=0.39)
    by_step = stated.assign(step=0.0, ci_low=0.0)
    (group,) = content.behaviour_groups(table, None, ["base", "tuned"], pd.concat([by_step, stated]))
    assert group[1][0].difference.interval == "[21.0, 39.0]"


@pytest.mark.parametrize(("a", "b"), [("4 + 2 = 6", "4 + 2 = 9"), ("", "new"), ("  x  y", "x y "), ("same", "same")])
def test_marked_pieces_join_back_and_mark_only_changes(a: str, b: str) -> None:
    left, right = content.marked(a, b)
    assert "".join(t for t, _ in left) == a
    assert "".join(t for t, _ in right) == b
    assert "".join(t for t, c in left if not c) == "".join(t for t, c in right if not c)
    if a == b:
        assert not any(c for _, c in left)


def test_example_says_who_follows(runs: dict[str, Run]) -> None:
    shown = content.example(runs["severed"].manifest["example"])
    assert shown is not None
    assert [r["meaning"] for r in shown["readings"]] == [
        "the clean answer",
        "follows the changed chain",
        "the clean answer",
        "stays with the clean answer",
    ]
    assert all(p["changed"] for p in shown["pairs"])


def test_finding_names_the_block_that_lost_most_and_the_one_that_moved_most(runs: dict[str, Run]) -> None:
    tables = {n: runs["severed"].table(n) for n in ("ledger", "ledger_total")}
    text, split = content.findings(tables)
    assert text.startswith("L0.attn carries −")
    assert text.endswith("The weights changed most in unembed.")
    fine = tables["ledger"]
    qk = fine[(fine["circuit"] == "QK") & (fine["layer"] == 0)]["attribution"].sum()
    assert content.fixed(qk, "nats") in split
    benign = {n: runs["benign"].table(n) for n in ("ledger", "ledger_total")}
    assert content.findings(benign)[0].endswith("there is no loss to place.")
    assert content.leading(benign) is None


def test_command_gives_back_the_call(tmp_path: Path) -> None:
    minds = {"base": "org/base", "tuned": "my dir/tuned"}
    arguments = {
        "minds": minds,
        "traces": "t.jsonl",
        "limit": None,
        "seed": 3,
        "allow_pickle": False,
        "extractor": "auto",
    }
    run = Run(tmp_path / "out", {"arguments": arguments})
    assert content.command(run) == (
        "reasoninterp compare --base org/base --tuned 'my dir/tuned' --extract auto --traces t.jsonl --seed 3 "
        f"--out {tmp_path / 'out'}"
    )


def test_a_location_has_its_section_and_gives_a_run_of_its_own_the_word(
    runs: dict[str, Run], tmp_path: Path, unsaved: None
) -> None:
    """Beside a comparison the verdict stays the comparison's; alone the location's word heads the page."""
    units = ["L0.attn", "L1.mlp", "embed"]
    ranking = pd.DataFrame({"unit": units, "in_restoring": [True, False, False], "in_cutting": [True] * 2 + [False]})
    for name, values in (("ledger", [-5.5, -4.25, 0.5]), ("restore", [0.16, 0.14, 0.0]), ("cut", [0.49, 0.13, 0.0])):
        for end, shift in (("", 0.0), ("_ci_low", -0.1), ("_ci_high", 0.1)):
            ranking[f"{name}{end}"] = np.array(values) + shift
    ranking["n"] = 32
    claim = {"claim": "share of the lost E returned by L0.attn", "value": 1.02, "ci_low": 0.9, "ci_high": 1.13, "n": 32}
    location = {"verdict": "weakened", "confidence": 0.876, "confidence_basis": "a benchmark"}
    alone = Run.open(tmp_path / "alone", {"traces": "x"})
    beside = Run.open(tmp_path / "beside", {"traces": "x"})
    beside.record(verdict=runs["severed"].manifest["verdict"])
    for run in (alone, beside):
        run.save_table("location", pd.DataFrame([location]))
        run.save_table("ranking", ranking)
        run.save_table("evidence", pd.DataFrame([{**claim, "would_reverse": "a share under the threshold"}]))
        run.record(location={"sentences": ["Weakened: a < b.", "L0.attn returns most."]})
    pages = {run.path.name: render(run).read_text() for run in (alone, beside)}
    for page in pages.values():
        section = page[page.index('id="located"') : page.index('id="example"')]
        assert "Confidence in the set 0.88 (a benchmark)" in section and "<li>Weakened: a &lt; b.</li>" in section
        assert "102.0 %" in section and "[90.0, 113.0]" in section and "a share under the threshold" in section
        assert "figures/location.svg" in section and "−4.25" in section.replace("-", "−")
    head = {name: page[page.index('<header id="verdict"') : page.index("</header>")] for name, page in pages.items()}
    assert "weakened" in head["alone"] and "tone-warn" in head["alone"] and "Weakened: a &lt; b." in head["alone"]
    assert "severed" in head["beside"] and "weakened" not in head["beside"]


def test_report_needs_no_torch_and_figures_no_matplotlib_to_import() -> None:
    code = (
        "import sys, reasoninterp.figures, reasoninterp.report; "
        "print(sorted({'torch', 'matplotlib', 'transformers', 'jinja2'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
