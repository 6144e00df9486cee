"""Draws mm.json and ffn_forward.json: rates of the sparse GEMM beside its rivals, and speed-ups of the FFN forward.

    python -m bench plot bench/results/<gpu>      # writes mm.svg, ffn_forward.svg and ffn_forward_sizes.svg there

ffn_forward.svg has the sweeps over the number of tokens with the region where dense is faster, ffn_forward_sizes.svg
all variants of the large sizes. Only the independent zeros at 90 % are drawn; the JSON files hold the others too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from bench.reporting import threshold
from sparse24.bench import results

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first

COLOURS = {
    "dense": ["#9aa5b1", "#cbd2d9", "#616e7c"],
    "cusparselt": ["#e8a33d"],
    "sparse24": ["#2f6fde", "#7aa5f0"],
}
#: What the variants are called in drawings (matplotlib leaves out of a legend what begins with an underscore); in fp8
#: ours has a name for each kind of scales.
LABELS = {
    "eager": "torch, eager",
    "torch_compile": "torch.compile",
    "scaled_mm_row": "torch._scaled_mm row-wise, compiled",
    "scaled_mm_tensor": "torch._scaled_mm tensor-wise, compiled",
    "_scaled_mm row-wise": "torch._scaled_mm row-wise",
    "_scaled_mm tensor-wise": "torch._scaled_mm tensor-wise",
    "fused_dense": "fused dense (fp8: one scale)",
    "cusparselt": "cuSPARSELt",
}
FP8_LABELS = {"sparse24": "sparse24, bounded scales", "sparse24_fused": "sparse24, exact scales"}
LINES = {"bf16": "#2f6fde", "fp8": "#d1495b"}
DPI = 160


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with mm.json and ffn_forward.json (either may be missing)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    # Fixed ids, and below no date: the same records give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "sparse24"
    written = 0
    for source, target, draw in (
        ("mm", "mm", draw_mm),
        ("ffn_forward", "ffn_forward", draw_sweeps),
        ("ffn_forward", "ffn_forward_sizes", draw_sizes),
    ):
        path = args.folder / f"{source}.json"
        records = [r for r in results.read_json([path]) if drawn(r)] if path.exists() else []
        figure = draw(records) if records else None
        if figure is None:
            print(f"nothing to draw for {target}")
            continue
        path = args.folder / f"{target}.{args.format}"
        metadata = {"Date": None} if args.format == "svg" else None
        figure.savefig(path, dpi=DPI, metadata=metadata, bbox_inches="tight")
        print(path)
        written += 1
    return 0 if written else 1


def drawn(record: results.Record) -> bool:
    of_a_role = record["role"] in COLOURS or exact_scales(record)
    return record["race"] == "forward" and of_a_role and results.usual(record)


def exact_scales(record: results.Record) -> bool:
    """A part by its role, since relu2_mlp with a bound is faster; drawn beside it."""
    return (record["dtype"], record["variant"]) == ("fp8", "sparse24_fused")


def draw_mm(records: list[results.Record]) -> plt.Figure | None:
    """Dense-equivalent TFLOP/s per size, one panel per dtype."""
    records = [r for r in records if r["median_us"]]
    dtypes = [d for d in LINES if any(r["dtype"] == d for r in records)]
    if not dtypes:
        return None
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(11, 3.6 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        bars(axis, chosen, lambda r: r["tflops_dense_equivalent"])
        axis.set_ylabel("TFLOP/s (dense-equivalent)")
        axis.set_title(f"{dtype} GEMM, tokens x out x reduction, 2:4 data with 90 % zeros for all", fontsize=10)
    return finish(figure, records)


def draw_sweeps(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up over the fastest dense variant of the same precision against the number of tokens, one panel per FFN."""
    found = threshold.points(records)
    swept = threshold.sweeps(found)
    if not swept:
        return None
    figure, axes = plt.subplots(1, len(swept), figsize=(5.6 * len(swept), 4.8), squeeze=False, sharey=True)
    limits = threshold.thresholds(found)
    cusparselt = {
        (r["tokens"], r["d_model"], r["d_ff"], r["dtype"]): r["median_us"]
        for r in records
        if r["role"] == "cusparselt" and r["median_us"]
    }
    for axis, ((d_model, d_ff), some) in zip(axes[0], swept.items(), strict=True):
        for dtype, colour in LINES.items():
            mine = [p for p in some if p.dtype == dtype and p.speedup]
            axis.plot([p.tokens for p in mine], [p.speedup for p in mine], "o-", color=colour, label=f"{dtype} 2:4")
            rival = [(p, cusparselt.get((p.tokens, d_model, d_ff, dtype))) for p in mine]
            rival = [(p.tokens, p.dense["median_us"] / time) for p, time in rival if time]
            if rival:
                axis.plot(*zip(*rival, strict=True), ":", color=colour, label=f"{dtype} cuSPARSELt")
            if limit := limits.get(dtype):
                axis.axvline(limit, color=colour, linewidth=0.8, linestyle="--", label=f"{dtype} from {limit:,} on")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        ticks = sorted({p.tokens for p in some})
        axis.set_xticks(ticks, [f"{t:,}" for t in ticks], fontsize=7, rotation=45)
        axis.set_xlabel("tokens")
        axis.set_title(f"FFN forward {d_model} -> {d_ff} -> {d_model}, 90 % zeros", fontsize=10)
        axis.legend(fontsize=7, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.24))
        axis.spines[["top", "right"]].set_visible(False)
    low = axes[0][0].get_ylim()[0]  # of all panels, which share it
    for axis in axes[0]:
        axis.axhspan(min(low, 0.9), 1.0, color="#616e7c", alpha=0.15, linewidth=0)
        place = {"ha": "right", "va": "top", "transform": axis.get_yaxis_transform()}
        axis.text(0.99, 0.995, "dense is faster", fontsize=7, **place)
        axis.set_ylim(bottom=min(low, 0.9))
    axes[0][0].set_ylabel("speed-up over the best dense")
    return finish(figure, records)


def draw_sizes(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up of every variant over the fastest dense one of its precision, at the large sizes."""
    records = [r for r in records if r["median_us"] and r.get("sizes", "large") == "large"]
    dtypes = [d for d in LINES if any(r["dtype"] == d for r in records)]
    if not dtypes:
        return None
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(11, 3.6 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        best = {key: results.fastest(group, "dense") for key, group in results.group(chosen).items()}
        chosen = [r for r in chosen if best[results.problem_of(r)]]
        names = LABELS | (FP8_LABELS if dtype == "fp8" else {})
        bars(axis, chosen, lambda r, best=best: best[results.problem_of(r)]["median_us"] / r["median_us"], names)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel("speed-up over the best dense")
        axis.set_title(f"{dtype} FFN forward, T x D x F, 90 % zeros", fontsize=10)
    return finish(figure, records)


def bars(axis: plt.Axes, records: list[results.Record], height, names: dict[str, str] = LABELS) -> None:
    """Grouped bars, one group per size, labelled with their heights."""
    sizes = list(dict.fromkeys((r["tokens"], r["d_model"], r["d_ff"]) for r in records))
    variants = list(dict.fromkeys((r["role"] if r["role"] in COLOURS else "sparse24", r["variant"]) for r in records))
    seen: dict[str, int] = {}
    width = 0.85 / len(variants)
    for i, (role, variant) in enumerate(variants):
        shade = seen[role] = seen.get(role, -1) + 1
        palette = COLOURS[role]
        mine = {(r["tokens"], r["d_model"], r["d_ff"]): height(r) for r in records if r["variant"] == variant}
        places = [sizes.index(size) + (i - (len(variants) - 1) / 2) * width for size in mine]
        drawn = axis.bar(
            places, list(mine.values()), width, label=names.get(variant, variant), color=palette[shade % len(palette)]
        )
        labels = [f"{v:.0f}" if v >= 10 else f"{v:.2f}" for v in mine.values()]
        axis.bar_label(drawn, labels, fontsize=6, padding=1)
    axis.set_xticks(range(len(sizes)), [" x\n".join(map(str, size)) for size in sizes], fontsize=7)
    axis.margins(y=0.12)
    axis.legend(fontsize=7, ncols=min(len(variants), 5), loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def finish(figure: plt.Figure, records: list[results.Record]) -> plt.Figure:
    first = records[0]
    text = f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}, sparse24 {first['sparse24']}"
    commits = ", ".join(sorted({r["commit"][:7] for r in records}))
    figure.suptitle(f"{text}, commit {commits}, {first['date'][:10]}", fontsize=9)
    figure.tight_layout()
    return figure
