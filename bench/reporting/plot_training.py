"""Draws ffn_training.json (speed-ups of a step, memory) and the runs of train_gpt (loss, activations).

python -m bench plot_training bench/results/<gpu>       # writes ffn_training.svg and train_gpt.svg there
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

from bench.reporting import train_table
from sparse24.bench import results

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first

Record = results.Record
DPI = 160
STEP_VARIANTS = {
    "torch_compile": "#9aa5b1",
    "fused_dense": "#616e7c",
    "scaled_mm_tensor": "#e8a33d",
    "sparse24_dense_dw": "#7aa5f0",
    "sparse24": "#2f6fde",
    "sparse24_no_split": "#4b9b6e",
}
LABELS = {
    "torch_compile": "torch.compile",
    "fused_dense": "fused dense",
    "scaled_mm_tensor": "torch.compile, six GEMMs in fp8",
    "sparse24_dense_dw": "sparse24, dense weight gradients",
    "sparse24_no_split": "sparse24, no dense features",
}
RUN_COLOURS = ["#616e7c", "#2f6fde", "#e8a33d", "#c2554d", "#4b9b6e", "#8a63c9"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with ffn_training.json and train_gpt/ (either may be missing)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args(argv)
    figures = {}
    source = args.folder / "ffn_training.json"
    steps = [r for r in results.read_json([source]) if r["bench"] == "ffn_training"] if source.exists() else []
    if steps := best_of_compiled([r for r in steps if r["race"] == "training" and r["median_us"]]):
        figures["ffn_training"] = draw_steps(steps)
    if runs := [r for r in train_table.read(args.folder / "train_gpt") if r["loss"]]:
        figures["train_gpt"] = draw_runs(runs)
    for name, figure in figures.items():
        target = args.folder / f"{name}.{args.format}"
        # No date and fixed ids: the same records give the same file.
        matplotlib.rcParams["svg.hashsalt"] = "sparse24"
        metadata = {"Date": None} if args.format == "svg" else None
        figure.savefig(target, dpi=DPI, metadata=metadata, bbox_inches="tight")
        print(target)
    return 0 if figures else 1


def best_of_compiled(records: list[Record]) -> list[Record]:
    """One record per variant: of ours as it is and compiled, the faster."""
    best: dict[tuple, Record] = {}
    for record in records:
        variant = record["variant"].removesuffix("_compiled")
        key = (*results.problem_of(record), variant)
        if key not in best or record["median_us"] < best[key]["median_us"]:
            best[key] = record | {"variant": variant}
    return list(best.values())


def draw_steps(records: list[Record]) -> plt.Figure:
    """Speed-up over the fastest dense bf16 step, at 90 % zeros and by pattern; and what is saved for backward."""
    figure, axes = plt.subplots(3, 1, figsize=(11, 10.5))
    usual = [r for r in records if r["pattern"] == "iid" and 0.85 < r["zeros"] < 0.93]
    dense: dict[tuple, float] = {}
    for key, group in results.group(records).items():
        times = [r["median_us"] for r in group if r["role"] == "dense" and r["dtype"] == "bf16"]
        if times:
            dense[key] = min(times)

    def speedup(r: Record) -> float | None:
        return dense[results.problem_of(r)] / r["median_us"] if results.problem_of(r) in dense else None

    def saved(r: Record) -> float:
        return r["saved_bytes"] / (r["tokens"] * r["d_ff"])

    bars(axes[0], usual, _size, speedup)
    axes[0].set_title("Forward and backward of the FFN, T x D x F, about 90 % independent zeros", fontsize=10)
    first = max(
        {_size(r) for r in records},
        key=lambda size: len({(r["pattern"], r["zeros"]) for r in records if _size(r) == size}),
    )
    bars(axes[1], [r for r in records if _size(r) == first], _zeros, speedup)
    axes[1].set_title(f"The same by zeros of the activation, {first}", fontsize=10)
    for axis in axes[:2]:
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_ylabel("speed-up over the best dense bf16")
    bars(axes[2], [r for r in usual if "saved_bytes" in r], _size, saved)
    axes[2].set_ylabel("bytes per element of the activation")
    axes[2].set_title("Saved between forward and backward, x included", fontsize=10)
    axes[2].legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return titled(figure, records)


def bars(axis: plt.Axes, records: list[Record], group, height) -> None:
    """Grouped bars, labelled with their heights; nothing where `height` gives None."""
    groups = list(dict.fromkeys(group(r) for r in records))
    variants = [v for v in STEP_VARIANTS if any(r["variant"] == v for r in records)]
    width = 0.85 / max(1, len(variants))
    for i, variant in enumerate(variants):
        heights = {group(r): height(r) for r in records if r["variant"] == variant}
        heights = {name: value for name, value in heights.items() if value is not None}
        places = [groups.index(name) + (i - (len(variants) - 1) / 2) * width for name in heights]
        drawn = axis.bar(
            places, list(heights.values()), width, label=LABELS.get(variant, variant), color=STEP_VARIANTS[variant]
        )
        axis.bar_label(drawn, [f"{v:.2f}" for v in heights.values()], fontsize=6, padding=1)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def draw_runs(runs: list[Record]) -> plt.Figure:
    """Training loss, difference to dense, held-out loss over time, and the activations of the layers."""
    figure, axes = plt.subplots(3, 2, figsize=(12, 11))
    variants = dict.fromkeys(r["variant"] for r in runs)
    colours = {v: RUN_COLOURS[i % len(RUN_COLOURS)] for i, v in enumerate(variants)}
    dense = {r["seed"]: r for r in runs if r["ffn"] == "dense"}
    named: set[str] = set()
    for run in runs:
        style = {"color": colours[run["variant"]], "linewidth": 1.0, "alpha": 0.9}
        label = {} if run["variant"] in named else {"label": run["variant"]}
        named.add(run["variant"])
        points = [[point[0], point[1]] for point in run["loss"]]
        axes[0, 0].plot(*_columns(points), **style, **label)
        if run["ffn"] == "sparse" and run["seed"] in dense:
            other = {step: loss for step, loss, _ in dense[run["seed"]]["loss"]}
            axes[0, 1].plot(*_columns([[step, loss - other[step]] for step, loss in points if step in other]), **style)
        axes[1, 0].plot(*_columns([[training_seconds(run, step), loss] for step, loss in run["held_out"]]), **style)
        looks = run["activations"]
        for axis, name in ((axes[2, 0], "feature_nonzeros_dropped"), (axes[2, 1], "recipe_token_nonzeros_dropped")):
            axis.plot(*_columns([[look["step"], 100 * statistics.mean(look[name])] for look in looks]), **style)
    shown = next((r for r in runs if r["variant"] == "sparse_default" and r["activations"]), runs[0])
    layers = len(shown["activations"][0]["zeros"]) if shown["activations"] else 0
    for layer in range(layers):
        points = [[look["step"], 100 * look["zeros"][layer]] for look in shown["activations"]]
        axes[1, 1].plot(*_columns(points), color=plt.cm.viridis(layer / max(1, layers - 1)), linewidth=1.0)
    axes[0, 0].legend(fontsize=8, frameon=False)
    titles = (
        (axes[0, 0], "training loss", "step"),
        (axes[0, 1], "training loss, sparse less dense of the same seed", "step"),
        (axes[1, 0], "held-out loss over training time (rates of steady steps)", "s"),
        (axes[1, 1], f"zeros of the activation in %, layers of {shown['variant']} (first dark)", "step"),
        (axes[2, 0], "non-zeros that 2:4 along features drops, %", "step"),
        (axes[2, 1], "non-zeros that 2:4 along tokens drops of the rest, with the run's recipe, %", "step"),
    )
    for axis, title, unit in titles:
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(unit, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        switch = next((r["first_sparse_step"] for r in runs if r.get("first_sparse_step")), None)
        if switch and unit == "step":
            axis.axvline(switch, color="black", linewidth=0.6, linestyle=":")
    axes[0, 1].axhline(0, color="black", linewidth=0.6)
    return titled(figure, runs)


def training_seconds(run: Record, steps: int) -> float:
    """Time of the first `steps` steps at the median rates of the phases: no compiling, no evaluation."""
    counts: dict[str, int] = defaultdict(int)
    switch = run.get("first_sparse_step")
    counts["dense"] = steps if switch is None else min(steps, switch)
    counts["sparse"] = steps - counts["dense"]
    per_step = run["tokens"] / run["steps"]
    rates = run["tokens_per_s"]
    fallback = statistics.mean(rates.values()) if rates else float("nan")
    return sum(count * per_step / rates.get(phase, fallback) for phase, count in counts.items() if count)


def titled(figure: plt.Figure, records: list[Record]) -> plt.Figure:
    first, commits = records[0], ", ".join(sorted({r["commit"][:7] for r in records}))
    text = f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}, sparse24 {first['sparse24']}"
    figure.suptitle(f"{text}, commit {commits}, {first['date'][:10]}", fontsize=9)
    figure.tight_layout()
    return figure


def _size(record: Record) -> str:
    return f"{record['tokens']} x {record['d_model']} x {record['d_ff']}"


def _zeros(record: Record) -> str:
    share = f"{100 * record['zeros']:.0f} %"
    return share if record["pattern"] == "iid" else f"{record['pattern']} ({share})"


def _columns(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]
