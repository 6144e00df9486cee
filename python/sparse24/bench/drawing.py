"""How drawings look: a colour means one thing in all of them, and every bar has a name.

Needs matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.transforms import ScaledTranslation

from sparse24.bench import results, sizes
from sparse24.bench.variants import VARIANTS, drawn_as, variant

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first

# An SVG names all fonts at each text.
matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana"]

DPI = 110
FAINT = {"fontsize": 7, "color": "#616e7c"}


def bars(
    axis: plt.Axes,
    records: list[results.Record],
    group: Callable[[results.Record], Hashable],
    height: Callable[[results.Record], float | None],
    names: dict[str, str] | None = None,
    legend: bool = True,
    line: float | None = None,
) -> None:
    """Grouped bars in the order of VARIANTS, labelled with their heights; nothing where `height` gives None.

    `names` replaces some names of the legend. At `line` there is one, which no label crosses.
    """
    groups = list(dict.fromkeys(group(r) for r in records))
    order = list(VARIANTS)
    found = dict.fromkeys(drawn_as(r["variant"], r["dtype"]) for r in records)
    variants = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    heights = {
        (group(r), drawn_as(r["variant"], r["dtype"])): value for r in records if (value := height(r)) is not None
    }
    # A group has no gaps for variants that it lacks.
    rows = {place: [name for name in variants if (place, name) in heights] for place in groups}
    width = 0.85 / max(1, *map(len, rows.values()))
    crowded = len(heights) > 24
    for name in variants:
        mine = {place: heights[place, name] for place in groups if (place, name) in heights}
        places = [i + (rows[g].index(name) - (len(rows[g]) - 1) / 2) * width for i, g in enumerate(groups) if g in mine]
        usual, colour = variant(name)
        label = (names or {}).get(name, usual)
        axis.bar(places, list(mine.values()), width, label=label, color=colour, zorder=2)
        for place, value in zip(places, mine.values(), strict=True):
            # As high as a label is, or as long where it stands upright: those that would meet the line are inside.
            room = (0.2 if crowded else 0.09) * max(heights.values())
            inside = line is not None and line - room < value < line
            axis.annotate(
                f"{value:,.0f}" if value >= 10 else f"{value:.2f}", (place, value), (0, -2 if inside else 2),
                textcoords="offset points", ha="center", va="top" if inside else "bottom", fontsize=6, zorder=3,
                rotation=90 if crowded else 0, color=_on(colour) if inside else "black",
            )  # fmt: skip
    if line is not None:
        axis.axhline(line, color="black", linewidth=0.7, zorder=1)
    axis.set_xticks(range(len(groups)), groups, fontsize=7)
    axis.margins(y=0.15 if crowded else 0.12)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        columns = len(variants) if len(variants) <= 5 else 3
        lines = max((str(place).count("\n") + 1 for place in groups), default=1)
        # In points: as far below as the names of the groups are high, however high the panel is.
        below = axis.transAxes + ScaledTranslation(0, -(8 + 9.5 * lines) / 72, axis.figure.dpi_scale_trans)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
        axis.legend(fontsize=7, ncols=columns, frameon=False, **place)


def _on(colour: str) -> str:
    """What can be read on a colour."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"


def size_label(record: results.Record) -> str:
    """Tokens, sizes, and the model whose network has them."""
    shape = record["d_model"], record["d_ff"]
    model = next((size.model for size in sizes.USERS if size[1:3] == shape), "")
    return f"{record['tokens']:,} tokens\n{shape[0]} x {shape[1]}\n{model.partition(',')[0]}"


def pattern_name(pattern: str) -> str:
    """Name zeros that were recorded: those of a layer of a GPT that was trained."""
    name = pattern.removeprefix("pattern_")
    layer = name.removeprefix("layer")
    return f"layer {int(layer) + 1} of a GPT" if layer.isdigit() else name


def at_one(axis: plt.Axes) -> None:
    """Where ours and theirs are equally fast."""
    axis.axhline(1.0, color="black", linewidth=0.7, zorder=1)


def speedups(records: list[results.Record]) -> plt.Figure | None:
    """Speed of every variant over the fastest dense one of its precision: a panel for each pass."""
    benches = dict.fromkeys(r["bench"] for r in records if r["median_us"])
    if not benches:
        return None
    figure, axes = plt.subplots(len(benches), 1, figsize=(10, 3.6 * len(benches)), squeeze=False)
    for axis, bench in zip(axes[:, 0], benches, strict=True):
        mine = [r for r in records if r["bench"] == bench and r["median_us"]]
        mine.sort(key=lambda r: (r["d_model"], r["d_ff"], r["tokens"], r["dtype"]))
        best = {key: results.fastest(some, "dense") for key, some in results.group(mine, "dtype").items()}

        def height(r: results.Record, best: dict = best) -> float | None:
            dense = best[(*results.problem_of(r), r["dtype"])]
            return dense["median_us"] / r["median_us"] if dense else None

        bars(axis, mine, lambda r: f"{r['dtype']}\n{size_label(r)}", height, line=1.0)
        axis.set_ylabel("speed-up over the best dense", fontsize=8)
        what = "Forward and backward" if bench == "ffn_training" else "Forward"
        axis.set_title(f"{what}: tokens, d_model x d_ff, {100 * mine[0]['zeros']:.0f} % zeros", fontsize=9)
    return finish(figure, records)


def finish(figure: plt.Figure, records: list[results.Record]) -> plt.Figure:
    first = records[0]
    ours = f", sparse24 {first['sparse24']}" if "sparse24" in first else ""  # compact records have the commit alone
    text = f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}{ours}"
    commits = ", ".join(sorted({r["commit"][:7] for r in records}))
    figure.suptitle(f"{text}, commit {commits}, {first['date'][:10]}", fontsize=9)
    figure.tight_layout()
    return figure


def save(figure: plt.Figure, path: Path) -> None:
    """The same records give the same file: no date and fixed ids. Text stays text and places are short: it is small."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "sparse24", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=DPI, metadata=metadata, bbox_inches="tight")
    plt.close(figure)
    if path.suffix == ".svg":
        # Places stand in tags; a number between them, such as a version or a label, stays what it is.
        text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), path.read_text())
        path.write_text(_shorter(text))


def _shorter(svg: str) -> str:
    """The same drawing without spaces that nothing reads, in the fonts of who looks at it."""
    svg = svg.replace("font-family: 'DejaVu Sans', 'Verdana', sans-serif", "font-family: sans-serif")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)  # which nothing refers to
    svg = re.sub(r"\s*\n *", "\n", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\s*([MLQCz])\s*", r"\1", path[0]), svg)
    return re.sub(r'style="[^"]*"', lambda style: re.sub(r"([:;]) ", r"\1", style[0]), svg)
