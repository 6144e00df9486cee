"""The FFN forward: over the number of tokens, and all variants at the large sizes."""

from __future__ import annotations

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.reporting import threshold
from bench.reporting.plots.products import DTYPES
from sparse24.bench import results, sizes
from sparse24.bench.drawing import at_one, bars, finish, plt, size_label
from sparse24.bench.variants import OURS, VARIANTS
from sparse24.mlp import pays

#: In fp8 ours has a variant for each kind of scales.
FP8_NAMES = {"sparse24": "sparse24, bounded scales", "fused_dense_fp8": "fused dense, one scale"}
EXACT = ("fp8", "sparse24_fused")
LOSING = "#616e7c"


def draw_sweeps(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up over the fastest dense variant of the precision against the number of tokens.

    A row of panels for each precision, a column for each FFN. The markers are empty where relu2_mlp runs dense.
    """
    records = [r for r in records if r["race"] == "forward" and results.usual(r)]
    found = threshold.points(records)
    swept = threshold.sweeps(found)
    if not swept:
        return None
    dtypes = [d for d in DTYPES if any(p.dtype == d for p in found)]
    figure, axes = plt.subplots(
        len(dtypes), len(swept), figsize=(4.6 * len(swept), 3.0 * len(dtypes)), squeeze=False, sharey=True
    )
    for column, ((d_model, d_ff), points) in enumerate(swept.items()):
        ticks = sorted({p.tokens for p in points})
        for axis, dtype in zip(axes[:, column], dtypes, strict=True):
            _sweep(axis, [p for p in points if p.dtype == dtype and p.speedup], _rivals(records, d_model, d_ff, dtype))
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{t:,}" for t in ticks], fontsize=7, rotation=45)
            axis.minorticks_off()
            model = next((size.model for size in sizes.USERS if size[1:3] == (d_model, d_ff)), "")
            of = f" ({model})" if model else ""
            axis.set_title(f"{dtype}, {d_model} -> {d_ff} -> {d_model}{of}, 90 % zeros", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    low = min(0.9, axes[0][0].get_ylim()[0])  # of all panels, which share it
    for axis in axes.flat:
        axis.axhspan(low, 1.0, color=LOSING, alpha=0.15, linewidth=0, zorder=0)
        axis.set_ylim(bottom=low)
    for axis in axes[:, 0]:
        axis.set_ylabel("speed-up over the best dense", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    figure.legend(handles=_legend(), fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    return finish(figure, records)


def _sweep(axis: plt.Axes, points: list[threshold.Point], rivals: dict[int, float]) -> None:
    tokens, speedups = [p.tokens for p in points], [p.speedup for p in points]
    axis.plot(tokens, speedups, "-", color=OURS, linewidth=1.2, label="sparse24", zorder=2)
    sparse = [pays(p.tokens, p.d_ff, p.d_model, **({"fp8": True} if p.dtype == "fp8" else {})) for p in points]
    fill = [OURS if runs else "white" for runs in sparse]
    axis.scatter(tokens, speedups, s=22, c=fill, edgecolors=OURS, linewidths=1.2, zorder=3)
    known = [(p.tokens, p.dense["median_us"] / rivals[p.tokens]) for p in points if p.tokens in rivals]
    if known:
        colour = VARIANTS["cusparselt"].colour
        axis.plot(*zip(*known, strict=True), "s:", color=colour, markersize=3, linewidth=1, label="cuSPARSELt")
    at_one(axis)


def _rivals(records: list[results.Record], d_model: int, d_ff: int, dtype: str) -> dict[int, float]:
    """Times of cuSPARSELt by tokens."""
    return {
        r["tokens"]: r["median_us"]
        for r in records
        if (r["role"], r["d_model"], r["d_ff"], r["dtype"]) == ("cusparselt", d_model, d_ff, dtype) and r["median_us"]
    }


def _legend() -> list[Line2D | Patch]:
    ours = {"color": OURS, "linewidth": 1.2, "marker": "o", "markersize": 5}
    rival = {"color": VARIANTS["cusparselt"].colour, "linewidth": 1, "linestyle": ":", "marker": "s", "markersize": 3}
    return [
        Line2D([], [], **ours, label="sparse24; relu2_mlp runs sparse"),
        Line2D([], [], **ours, markerfacecolor="white", label="sparse24 made to run sparse; relu2_mlp runs dense"),
        Line2D([], [], **rival, label="cuSPARSELt, composed of torch's ops"),
        Patch(color=LOSING, alpha=0.15, linewidth=0, label="dense is faster"),
    ]


def draw_sizes(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up of every variant over the fastest dense one of its precision, at the large sizes."""
    records = [r for r in records if r["race"] == "forward" and results.usual(r) and r["median_us"]]
    records = [r for r in records if r.get("sizes", "large") == "large"]
    records = [r for r in records if r["role"] != "part" or (r["dtype"], r["variant"]) == EXACT]
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in records)]
    if not dtypes:
        return None
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(10, 3.4 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        best = {key: results.fastest(some, "dense") for key, some in results.group(chosen).items()}
        chosen = [r for r in chosen if best[results.problem_of(r)]]
        names = FP8_NAMES if dtype == "fp8" else None

        def height(r: results.Record, best: dict = best) -> float:
            return best[results.problem_of(r)]["median_us"] / r["median_us"]

        bars(axis, chosen, size_label, height, names, line=1.0)
        axis.set_ylabel("speed-up over the best dense", fontsize=8)
        axis.set_title(f"Forward pass in {dtype}: tokens, d_model x d_ff, 90 % zeros", fontsize=9)
    return finish(figure, records)
