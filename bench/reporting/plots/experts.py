"""Experts: over the number of tokens, balanced routing, and skewed routing beside it."""

from __future__ import annotations

from collections import defaultdict

from bench.reporting import experts_tables
from sparse24.bench import results
from sparse24.bench.drawing import at_one, finish, plt

LOSING = "#616e7c"
COLOURS = "viridis"
MARKERS = {"balanced": "o", "zipf": "^", "recorded": "s"}

#: By model and routing: speed-ups by the number of tokens.
Lines = dict[tuple[str, str], dict[int, float]]


def draw(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up over torch's grouped products: a column for each pass and precision, a line for each model."""
    panels: dict[tuple[str, str], Lines] = defaultdict(lambda: defaultdict(dict))
    for problem in experts_tables.problems(records):
        ours, rival = experts_tables.fastest(problem), experts_tables.named(problem, "grouped_mm")
        if ours and rival:
            line = panels[ours["race"], ours["dtype"]][ours.get("model", ""), ours["routing"]]
            line[ours["tokens"]] = rival["median_us"] / ours["median_us"]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, ((race, dtype), lines) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, lines)
        axis.set_title(f"{race}, {dtype}", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
    axes[0][0].set_ylabel("speed-up over torch._grouped_mm, compiled", fontsize=8)
    return finish(figure, records)


def _panel(axis: plt.Axes, lines: Lines) -> None:
    models = list(dict.fromkeys(model for model, _ in lines))
    for (model, routing), points in lines.items():
        colour = plt.get_cmap(COLOURS)(0.9 * models.index(model) / max(1, len(models) - 1))
        tokens = sorted(points)
        style = "-" if routing == "balanced" else ""
        axis.plot(
            tokens,
            [points[t] for t in tokens],
            f"{MARKERS.get(routing, 'x')}{style}",
            color=colour,
            markersize=4,
            linewidth=1.2,
            label=f"{model}, {routing}",
        )
    ticks = sorted({t for points in lines.values() for t in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(t) for t in ticks], fontsize=7, rotation=60)
    axis.minorticks_off()
    low = min(0.9, axis.get_ylim()[0])
    axis.axhspan(low, 1.0, color=LOSING, alpha=0.15, linewidth=0, zorder=0, label="torch is faster")
    axis.set_ylim(bottom=low)
    axis.spines[["top", "right"]].set_visible(False)
    at_one(axis)
    axis.legend(fontsize=6, frameon=False)
