"""Draws mm.json and ffn_forward.json: rates of the sparse GEMM beside its rivals, and speed-ups of the FFN forward.

    python bench/plot.py bench/results/<gpu>          # writes mm.svg and ffn_forward.svg there

Only the independent zeros at 90 % are drawn; the JSON files hold the other patterns too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import report

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first

COLOURS = {
    "dense": ["#9aa5b1", "#cbd2d9", "#616e7c"],
    "cusparselt": ["#e8a33d"],
    "sparse24": ["#2f6fde", "#7aa5f0"],
}
DPI = 160


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with mm.json and ffn_forward.json (either may be missing)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args()
    drawn = 0
    for name, draw in (("mm", draw_mm), ("ffn_forward", draw_ffn)):
        source = args.folder / f"{name}.json"
        if not source.exists():
            continue
        records = [r for r in report.read_json([source]) if usual(r)]
        if not records:
            print(f"nothing to draw in {source}")
            continue
        figure = draw(records)
        target = args.folder / f"{name}.{args.format}"
        # No date and fixed ids: the same records give the same file.
        matplotlib.rcParams["svg.hashsalt"] = "sparse24"
        metadata = {"Date": None} if args.format == "svg" else None
        figure.savefig(target, dpi=DPI, metadata=metadata, bbox_inches="tight")
        print(target)
        drawn += 1
    return 0 if drawn else 1


def usual(record: report.Record) -> bool:
    timed = record["median_us"] and record["race"] == "forward" and record["role"] in COLOURS
    return bool(timed) and record["pattern"] == "iid" and 0.85 < record["zeros"] < 0.93


def draw_mm(records: list[report.Record]) -> plt.Figure:
    """Dense-equivalent TFLOP/s per size, one panel per dtype."""
    dtypes = [d for d in ("bf16", "fp8") if any(r["dtype"] == d for r in records)]
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(11, 3.6 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        bars(axis, chosen, lambda r: r["tflops_dense_equivalent"])
        axis.set_ylabel("TFLOP/s (dense-equivalent)")
        axis.set_title(f"{dtype} GEMM, tokens x out x reduction, 2:4 data with 90 % zeros for all", fontsize=10)
    return finish(figure, records)


def draw_ffn(records: list[report.Record]) -> plt.Figure:
    """Speed-up of every variant over the fastest dense one of its precision."""
    dtypes = [d for d in ("bf16", "fp8") if any(r["dtype"] == d for r in records)]
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(11, 3.6 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        best = {key: report.fastest(group, "dense") for key, group in report.group(chosen).items()}
        chosen = [r for r in chosen if best[report.problem_of(r)]]
        bars(axis, chosen, lambda r, best=best: best[report.problem_of(r)]["median_us"] / r["median_us"])
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel("speed-up over the best dense")
        axis.set_title(f"{dtype} FFN forward, T x D x F, 90 % zeros", fontsize=10)
    return finish(figure, records)


def bars(axis: plt.Axes, records: list[report.Record], height) -> None:
    """Grouped bars, one group per size, labelled with their heights."""
    sizes = list(dict.fromkeys((r["tokens"], r["d_model"], r["d_ff"]) for r in records))
    variants = list(dict.fromkeys((r["role"], r["variant"]) for r in records))
    seen: dict[str, int] = {}
    width = 0.85 / len(variants)
    for i, (role, variant) in enumerate(variants):
        shade = seen[role] = seen.get(role, -1) + 1
        palette = COLOURS[role]
        mine = {(r["tokens"], r["d_model"], r["d_ff"]): height(r) for r in records if r["variant"] == variant}
        places = [sizes.index(size) + (i - (len(variants) - 1) / 2) * width for size in mine]
        drawn = axis.bar(places, list(mine.values()), width, label=variant, color=palette[shade % len(palette)])
        labels = [f"{v:.0f}" if v >= 10 else f"{v:.2f}" for v in mine.values()]
        axis.bar_label(drawn, labels, fontsize=6, padding=1)
    axis.set_xticks(range(len(sizes)), [" x\n".join(map(str, size)) for size in sizes], fontsize=7)
    axis.margins(y=0.12)
    axis.legend(fontsize=7, ncols=len(variants), loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def finish(figure: plt.Figure, records: list[report.Record]) -> plt.Figure:
    first = records[0]
    text = f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}, sparse24 {first['sparse24']}"
    figure.suptitle(f"{text}, commit {first['commit'][:12]}, {first['date'][:10]}", fontsize=9)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
