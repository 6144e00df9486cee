"""How drawings look: a colour means one thing in all of them, and every bar has a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple

import matplotlib

from sparse24.bench import results

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first

# An SVG names all fonts at each text.
matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana"]

DPI = 110
FAINT = {"fontsize": 7, "color": "#616e7c"}
OURS = "#2f6fde"


class Variant(NamedTuple):
    """What a variant is called in a legend, and its colour."""

    name: str
    colour: str


#: Greys are dense in 16 bits, ochre in fp8, green is cuSPARSELt, blue and violet are ours.
VARIANTS = {
    "eager": Variant("torch, eager", "#d5dae0"),
    "torch_compile": Variant("torch.compile", "#9aa5b1"),
    "torch.matmul": Variant("torch.matmul (cuBLAS)", "#9aa5b1"),
    "fused_dense": Variant("fused dense", "#4a5561"),
    "scaled_mm_row": Variant("torch._scaled_mm by row, compiled", "#f0c27b"),
    "scaled_mm_tensor": Variant("torch._scaled_mm by tensor, compiled", "#d98a1f"),
    "_scaled_mm row-wise": Variant("torch._scaled_mm by row", "#f0c27b"),
    "_scaled_mm tensor-wise": Variant("torch._scaled_mm by tensor", "#d98a1f"),
    "cusparselt": Variant("cuSPARSELt", "#4b9b6e"),
    "cuSPARSELt": Variant("cuSPARSELt", "#4b9b6e"),
    "sparse24": Variant("sparse24", OURS),
    "sparse24.mm": Variant("sparse24.mm", OURS),
    "sparse24.mm row-wise": Variant("sparse24.mm", OURS),
    "sparse24_fused": Variant("sparse24, exact scales", "#8db4f5"),
    "sparse24_no_split": Variant("sparse24, no dense features", "#12408f"),
    "sparse24_dense_dw": Variant("sparse24, dense weight gradients", "#bcd3fa"),
    "sparse24_fp8": Variant("sparse24, forward and dx in fp8", "#7b4fd0"),
}


def variant(name: str) -> Variant:
    """A variant that has no name here is drawn under its own."""
    return VARIANTS.get(name) or Variant(name.lstrip("_"), "#c2554d")


def bars(
    axis: plt.Axes,
    records: list[results.Record],
    group: Callable[[results.Record], Hashable],
    height: Callable[[results.Record], float | None],
    names: dict[str, str] | None = None,
    legend: bool = True,
) -> None:
    """Grouped bars in the order of VARIANTS, labelled with their heights; nothing where `height` gives None.

    `names` replaces some names of the legend.
    """
    groups = list(dict.fromkeys(group(r) for r in records))
    order = list(VARIANTS)
    found = dict.fromkeys(r["variant"] for r in records)
    variants = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    width = 0.85 / max(1, len(variants))
    crowded = len(groups) * len(variants) > 30
    for i, name in enumerate(variants):
        heights = {group(r): height(r) for r in records if r["variant"] == name}
        heights = {place: value for place, value in heights.items() if value is not None}
        places = [groups.index(place) + (i - (len(variants) - 1) / 2) * width for place in heights]
        usual, colour = variant(name)
        name = (names or {}).get(name, usual)
        drawn = axis.bar(places, list(heights.values()), width, label=name, color=colour, zorder=2)
        texts = [f"{v:.0f}" if v >= 10 else f"{v:.2f}" for v in heights.values()]
        labels = axis.bar_label(drawn, texts, fontsize=6, padding=2, zorder=3, rotation=90 if crowded else 0)
        for label, value in zip(labels, heights.values(), strict=True):
            if 0.85 < value < 1:  # the line at one would go through it
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})
    axis.set_xticks(range(len(groups)), groups, fontsize=7)
    axis.margins(y=0.15 if crowded else 0.12)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        columns = len(variants) if len(variants) <= 5 else 3
        axis.legend(fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)


def at_one(axis: plt.Axes) -> None:
    """Where ours and theirs are equally fast."""
    axis.axhline(1.0, color="black", linewidth=0.7, zorder=1)


def finish(figure: plt.Figure, records: list[results.Record]) -> plt.Figure:
    first = records[0]
    text = f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}, sparse24 {first['sparse24']}"
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
        text = re.sub(r"(\d\.\d)\d+", r"\1", path.read_text())
        path.write_text(re.sub(r"\n +", "\n", text))
