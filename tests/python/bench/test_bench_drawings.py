"""Drawings of benchmark records, on records made up for tests."""

import html
import re
from collections import Counter

import pytest
from benches import run
from made_up_records import MODELS, NARROW, SWEEPS, WIDE, record, size

from bench.reporting.figure_values import RESULTS
from sparse24.bench import results
from sparse24.mlp import pays


def texts(path):
    """All that is written in a drawing."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def labels(figure):
    """What a figure will have written in it, but for the numbers and names at its axes."""
    from matplotlib.text import Text

    lines = [line for panel in figure.axes for line in (panel.xaxis, panel.yaxis)]
    ticks = [tick for line in lines for tick in (*line.get_major_ticks(), *line.get_minor_ticks())]
    at_axes = {label for tick in ticks for label in (tick.label1, tick.label2)}
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text not in at_axes]


def test_drawings_show_the_losing_region(tmp_path):
    pytest.importorskip("matplotlib")
    exact = record(8192, (3072, 9216), "fp8", "sparse24_fused", "part", 110.0, sizes="large")
    results.write_json(tmp_path / "ffn_forward.json", [*SWEEPS, *MODELS, exact])
    printed = run("plot", tmp_path)
    assert "nothing to draw for mm" in printed
    drawn = (tmp_path / "ffn_forward.svg").read_text()
    written = texts(tmp_path / "ffn_forward.svg")
    panels = [text for text in written if "90 % zeros" in text]
    assert len(panels) == 4 and {"dense is faster", "8,192", "cuSPARSELt, composed of torch's ops"} <= set(written)
    labels = set(texts(tmp_path / "ffn_forward_sizes.svg"))
    assert {"torch._scaled_mm by row, compiled", "sparse24, bounded scales", "sparse24, exact scales"} <= labels
    run("plot", tmp_path)
    assert (tmp_path / "ffn_forward.svg").read_text() == drawn  # the same records, the same file


@pytest.mark.parametrize("folder", sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_committed_drawings_show_the_committed_records(folder):
    """What is written in them: places depend on the version of matplotlib, and its fonts."""
    pytest.importorskip("matplotlib")
    from bench.reporting.plots import drawings
    from sparse24.bench import drawing

    drawn = set()
    for name, draw in drawings(folder).items():
        figure = draw()
        if figure is None:
            continue
        drawn.add(f"{name}.svg")
        path = folder / f"{name}.svg"
        assert path.exists(), f"{path}: python -m bench plot {folder}"
        written = Counter(html.unescape(text).strip() for text in texts(path))
        missing = Counter(line.strip() for text in labels(figure) for line in text.split("\n") if line) - written
        assert not missing, f"{path} is of other records: {missing}; python -m bench plot {folder}"
        drawing.plt.close(figure)
    assert drawn == {path.name for path in folder.glob("*.svg")}


def test_numbers_that_are_written_are_whole(tmp_path):
    """Places in the file are rounded; versions and labels are not."""
    pytest.importorskip("matplotlib")
    records = [{**r, "torch": "2.11.0+cu130"} for r in MODELS]
    results.write_json(tmp_path / "ffn_forward.json", records)
    run("plot", tmp_path)
    written = texts(tmp_path / "ffn_forward_sizes.svg")
    assert any("torch 2.11.0+cu130" in text for text in written)
    labels = {text for text in written if re.fullmatch(r"\d\.\d\d", text)}
    assert "1.00" in labels and len(labels) > 2
    places = re.findall(r' x="([^"]*)"', (tmp_path / "ffn_forward_sizes.svg").read_text())
    assert places and not any(re.search(r"\.\d\d", place) for place in places)


def test_no_point_of_a_sweep_is_cut_off():
    """And what relu2_mlp runs dense is an empty marker, by the rule of the library."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    from bench.reporting.plots import forward

    axes = forward.draw_sweeps(SWEEPS).axes
    panels = [(dtype, ffn) for dtype in ("bf16", "fp8") for ffn in (NARROW, WIDE)]
    assert [axis.get_title() for axis in axes] == [
        f"{dtype}, {d} -> {f} -> {d} ({'nanochat d26' if d == 1664 else 'Persimmon-8B'}), 90 % zeros"
        for dtype, (d, f) in panels
    ]
    speedups = ((1.1,), (0.7, 1.02, 0.99, 1.1, 1.2), (0.8, 1.01, 1.1), (0.9, 1.0, 1.1, 1.2, 1.3))
    for axis, (dtype, (d_model, d_ff)), expected in zip(axes, panels, speedups, strict=True):
        (ours,) = (line for line in axis.lines if line.get_label() == "sparse24")
        assert {round(y, 2) for y in ours.get_ydata()} == set(expected)
        low, high = axis.get_ylim()
        assert low < 0.7 and high > 1.3
        filled = [tuple(colour) != to_rgba("white") for colour in axis.collections[0].get_facecolors()]
        assert filled == [pays(int(t), d_ff, d_model, fp8=dtype == "fp8") for t in ours.get_xdata()]


def test_every_bar_has_a_name_and_a_colour_one_meaning():
    pytest.importorskip("matplotlib")
    from bench.reporting.plots import forward
    from sparse24.bench import drawing

    names = {}
    for axis in forward.draw_sizes([*SWEEPS, *MODELS]).axes:
        in_legend = {text.get_text() for text in axis.get_legend().get_texts()}
        for bars in axis.containers:
            assert not bars.get_label().startswith("_")  # matplotlib leaves it out of the legend
            assert bars.get_label() in in_legend
            names.setdefault(bars.patches[0].get_facecolor(), set()).add(bars.get_label().partition(",")[0])
        ticks = [label.get_text() for label in axis.get_xticklabels()]
        assert any("Nemotron" in tick for tick in ticks) and all(" tokens\n" in tick for tick in ticks)
    assert len(names) >= 4 and all(len(of_colour) == 1 for of_colour in names.values())
    assert all(not drawing.variant(name).name.startswith("_") for name in (*drawing.VARIANTS, "_another"))


def test_a_colour_has_one_meaning_in_all_drawings():
    """What is drawn in the same colour is the same; torch's own product is that of torch.compile."""
    pytest.importorskip("matplotlib")
    from bench.reporting.plots import gpt
    from sparse24.bench.variants import VARIANTS, variant

    meanings = {}
    for name, colour in VARIANTS.values():
        meanings.setdefault(colour, set()).add(name.removesuffix(", compiled").removesuffix(".mm"))
    assert meanings.pop("#9aa5b1") == {"torch.compile", "torch.matmul (cuBLAS)"}
    assert all(len(names) == 1 for names in meanings.values()), meanings
    of_runs = dict(gpt.COLOURS)
    assert of_runs.pop("dense") == VARIANTS["fused_dense"].colour
    assert of_runs.pop("sparse_default") == VARIANTS["sparse24"].colour
    assert of_runs.pop("dense_fp8") == VARIANTS["scaled_mm_tensor"].colour
    assert of_runs.pop("sparse_default_fp8") == VARIANTS["sparse24_fp8"].colour
    assert of_runs.pop("sparse_no_split") == VARIANTS["sparse24_no_split"].colour
    colours = [*of_runs.values(), variant("another").colour]
    assert len(set(colours)) == len(colours) and not set(colours) & {v.colour for v in VARIANTS.values()}
    assert gpt.NAMES.keys() == gpt.COLOURS.keys()


@pytest.mark.parametrize("crowded", [False, True])
def test_no_label_crosses_the_line(crowded):
    """Labels of bars that end just below it are inside of these."""
    pytest.importorskip("matplotlib")
    from sparse24.bench import drawing

    figure, axis = drawing.plt.subplots(figsize=(10, 3.4))
    tokens = range(1024, 1024 * (10 if crowded else 4), 1024)
    records = [
        record(t, WIDE, "bf16", variant, "dense", us)
        for t in tokens
        for variant, us in (("eager", 110.0), ("torch_compile", 104.0), ("fused_dense", 101.0), ("sparse24", 80.0))
    ]
    drawing.bars(axis, records, lambda r: r["tokens"], lambda r: 100 / r["median_us"], line=1.0)
    figure.canvas.draw()
    line = axis.transData.transform((0, 1.0))[1]
    texts = [text for text in axis.texts if text.get_text()]
    assert len(texts) == len(records)
    for text in texts:
        box = text.get_window_extent()
        assert not box.y0 < line < box.y1, text.get_text()
    drawing.plt.close(figure)


def test_nothing_is_drawn_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")

    results.write_json(tmp_path / "ffn_forward.json", size(8192, WIDE, "bf16", 1.2, zeros=0.5))
    run("plot", tmp_path, status=1)
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("tokens", [(8192,), (512, 2048, 8192)], ids=["one size", "several"])
def test_legends_stand_below_the_names_of_sizes(tokens):
    """However many panels there are, and lines in a name."""
    pytest.importorskip("matplotlib")
    from sparse24.bench import drawing

    names = [("torch_compile", "bf16"), ("scaled_mm_row", "fp8"), ("scaled_mm_tensor", "fp8"), ("fused_dense", "fp8")]
    names += [("fused_dense", "bf16"), ("sparse24", "bf16"), ("sparse24", "fp8")]
    roles = {"sparse24": "sparse24"}
    records = [
        record(t, WIDE, dtype, name, roles.get(name, "dense"), 100.0, sizes="large")
        for t in tokens
        for name, dtype in names
    ]
    figure = drawing.speedups(records)
    figure.canvas.draw()
    (axis,) = figure.axes
    names_end = min(label.get_window_extent().y0 for label in axis.get_xticklabels())
    assert axis.get_legend().get_window_extent().y1 <= names_end + 1
