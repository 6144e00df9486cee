"""Drawings of benchmark records, on records made up for tests."""

import re

import pytest
from benches import run
from made_up_records import MODELS, NARROW, SWEEPS, WIDE, record, size

from sparse24.bench import results
from sparse24.mlp import pays


def texts(path):
    """All that is written in a drawing."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


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


def test_no_point_of_a_sweep_is_cut_off():
    """And what relu2_mlp runs dense is an empty marker, by the rule of the library."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgba

    from bench.reporting.plots import forward

    axes = forward.draw_sweeps(SWEEPS).axes
    panels = [(dtype, ffn) for dtype in ("bf16", "fp8") for ffn in (NARROW, WIDE)]
    assert [axis.get_title() for axis in axes] == [
        f"{dtype}, {d} -> {f} -> {d}, 90 % zeros" for dtype, (d, f) in panels
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
        for bars in axis.containers:
            assert not bars.get_label().startswith("_")  # matplotlib leaves it out of the legend
            names.setdefault(bars.patches[0].get_facecolor(), set()).add(bars.get_label().partition(",")[0])
    assert len(names) >= 4 and all(len(of_colour) == 1 for of_colour in names.values())
    assert all(not drawing.variant(name).name.startswith("_") for name in (*drawing.VARIANTS, "_another"))


def test_nothing_is_drawn_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")

    results.write_json(tmp_path / "ffn_forward.json", size(8192, WIDE, "bf16", 1.2, zeros=0.5))
    run("plot", tmp_path, status=1)
    assert not list(tmp_path.glob("*.svg"))
