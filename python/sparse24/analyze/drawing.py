"""Drawings of a model's layers. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sparse24.analyze.columns import COLUMNS, display

#: Groups with up to two non-zeros fit: blue; with more do not: orange.
_GROUPS = {0: "#dbe7fb", 1: "#8db4f5", 2: "#2f6fde", 3: "#f0a35e", 4: "#c2554d"}
#: So many lines have a name each; of more the colour tells which they are.
_NAMED_LINES = 8
_FAINT = "#616e7c"


def draw(layers: Mapping[str, Mapping[str, Any]], verdict: str, path: Path) -> None:
    """Draw a heat map of all metrics, the non-zeros per group, and the density of the features."""
    if not layers:
        raise RuntimeError("sparse24.ModelReport.plot: expected a report with at least one layer, got none")
    names = [display(name) for name in layers]
    rows = list(layers.values())
    height = 1.3 + 0.24 * len(rows)
    figure = Figure(figsize=(11, 2 * height + 4.2))
    grid = figure.add_gridspec(3, 1, height_ratios=(height, height, 3.0))
    _heat_map(figure.add_subplot(grid[0]), names, rows)
    _groups(figure.add_subplot(grid[1]), names, rows)
    _densities(figure, figure.add_subplot(grid[2]), names, rows)
    figure.tight_layout()
    figure.suptitle("Feed-forward networks under 2:4\n" + _wrapped(verdict), fontsize=9, y=1.0, va="bottom")
    with matplotlib.rc_context({"svg.hashsalt": "sparse24", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None, bbox_inches="tight")


def _heat_map(axis: Any, names: list[str], rows: list[Mapping[str, Any]]) -> None:
    values = [[100 * (row[key] or 0.0) for key in COLUMNS] for row in rows]
    most = [max(column) or 1.0 for column in zip(*values, strict=True)]
    shades = [[value / top for value, top in zip(row, most, strict=True)] for row in values]
    axis.imshow(shades, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "white" if shades[i][j] > 0.75 else "black"
            axis.text(
                j,
                i,
                f"{value:.2f}" if value < 9.95 else f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )
    axis.set_xticks(range(len(COLUMNS)), [name for _, name in COLUMNS.values()], fontsize=7, rotation=20, ha="left")
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("in %; the darkest cell of a column is its largest", fontsize=8, color=_FAINT)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _groups(axis: Any, names: list[str], rows: list[Mapping[str, Any]]) -> None:
    left = [0.0] * len(rows)
    for number, colour in _GROUPS.items():
        shares = [100 * row["nonzeros_per_group"][number] for row in rows]
        label = f"{number} non-zeros" if number != 1 else "1 non-zero"
        axis.barh(range(len(rows)), shares, left=left, color=colour, height=0.8, label=label)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.margins(y=0.01)
    axis.set_xlabel("share of the groups of four features, %; 2:4 keeps two of each: 3 and 4 do not fit", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _densities(figure: Figure, axis: Any, names: list[str], rows: list[Mapping[str, Any]]) -> None:
    colours = matplotlib.colormaps["viridis"]
    few = len(rows) <= _NAMED_LINES
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        density = row["feature_density"]
        places = [100 * step / (len(density) - 1) for step in range(len(density))]
        colour = colours(0.9 * i / max(1, len(rows) - 1))
        axis.plot(places, [100 * share for share in density], color=colour, linewidth=1.2, label=name)
    axis.set_xlabel("features in ascending order, %", fontsize=8)
    axis.set_ylabel("tokens that light it, %", fontsize=8)
    axis.set_xlim(0, 100)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    if few:
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    else:
        last = len(rows) - 1
        scale = matplotlib.cm.ScalarMappable(Normalize(0, last / 0.9), colours)
        shown = figure.colorbar(scale, ax=axis, pad=0.01, boundaries=[step * last / 64 for step in range(65)])
        shown.set_ticks([0, last], labels=[names[0], names[-1]], fontsize=7)


def _wrapped(text: str, width: int = 130) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.rstrip() for line in lines)
