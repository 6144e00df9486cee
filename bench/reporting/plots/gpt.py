"""A GPT in training: loss, its difference to dense, held-out loss over time, and its activations."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

from bench.reporting import train_table
from sparse24.bench.drawing import FAINT, finish, plt
from sparse24.bench.results import Record
from sparse24.bench.variants import OURS, VARIANTS

NAMES = {
    "dense": "dense, bf16",
    "dense_fp8": "dense, fp8: torch.compile, six products",
    "sparse_default": "sparse24, bf16",
    "sparse_default_fp8": "sparse24, fp8: six products",
    "sparse_large_split": "sparse24, 5 % dense features",
    "sparse_no_split": "sparse24, no dense features",
    "sparse_no_permutation": "sparse24, neighbouring tokens in a group",
    "sparse_no_mask_reuse": "sparse24, backward with a mask of its own",
}
COLOURS = {
    "dense": "#4a5561",
    "dense_fp8": VARIANTS["scaled_mm_tensor"].colour,
    "sparse_default": OURS,
    "sparse_default_fp8": VARIANTS["sparse24_fp8"].colour,
    "sparse_large_split": "#e08bb0",
    "sparse_no_split": VARIANTS["sparse24_no_split"].colour,
    "sparse_no_permutation": "#c2554d",
    "sparse_no_mask_reuse": "#1b9e9e",
}
Points = list[tuple[float, float]]


def draw(runs: list[Record]) -> plt.Figure | None:
    """A line is the mean over the seeds of a variant, the band around it their range."""
    runs = [r for r in runs if r["loss"]]
    if not runs:
        return None
    figure, axes = plt.subplots(3, 2, figsize=(10, 9))
    dense = {seed: {step: loss for step, loss, _ in r["loss"]} for seed, r in train_table.dense_runs(runs).items()}

    def excess(run: Record) -> Points:
        other = dense.get(run["seed"], {}) if run["variant"] != "dense" else {}
        return [(step, loss - other[step]) for step, loss, _ in run["loss"] if step in other]

    def looks(name: str) -> Callable[[Record], Points]:
        return lambda run: [(look["step"], 100 * statistics.mean(look[name])) for look in run["activations"]]

    panels = (
        (
            axes[0, 0],
            lambda run: [(tokens(run, step), loss) for step, loss, _ in run["loss"]],
            "training loss",
            "million tokens",
        ),
        (axes[0, 1], excess, "training loss less that of the dense run of the same seed", "step"),
        (
            axes[1, 0],
            lambda run: [(train_table.training_seconds(run, step), loss) for step, loss in run["held_out"]],
            "held-out loss over training time",
            "seconds, at the rates of steady steps",
        ),
        (axes[2, 0], looks("feature_nonzeros_dropped"), "non-zeros that 2:4 along features drops, %", "step"),
        (
            axes[2, 1],
            looks("recipe_token_nonzeros_dropped"),
            "non-zeros that 2:4 along tokens drops of the rest, %",
            "step",
        ),
    )
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for run in runs:
        by_variant[run["variant"]].append(run)
    for axis, points, title, unit in panels:
        for name, some in by_variant.items():
            _band(axis, [points(run) for run in some], name)
        _label(axis, title, unit)
    _zeros_by_layer(axes[1, 1], next((r for r in runs if r["variant"] == "sparse_default"), runs[0]))
    axes[0, 1].axhline(0, color="black", linewidth=0.6)
    switch = next((r["first_sparse_step"] for r in runs if r.get("first_sparse_step")), None)
    for axis in axes.flat[[1, 3, 4, 5]] if switch else ():
        axis.axvline(switch, color="black", linewidth=0.6, linestyle=":")
    if switch:
        axes[0, 1].annotate(
            "first sparse step", (switch, 1), xycoords=("data", "axes fraction"), xytext=(4, -8),
            textcoords="offset points", **FAINT,
        )  # fmt: skip
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    return finish(figure, runs)


def tokens(run: Record, steps: int) -> float:
    """In millions."""
    return steps * run["tokens"] / run["steps"] / 1e6


def _band(axis: plt.Axes, lines: list[Points], name: str) -> None:
    """Mean and range of several lines of equal length."""
    lines = [line for line in lines if line]
    if not lines:
        return
    columns = list(zip(*lines, strict=False))
    x = [statistics.mean(point[0] for point in column) for column in columns]
    y = [[point[1] for point in column] for column in columns]
    label = NAMES.get(name, "sparse24, " + name.removeprefix("sparse_").replace("_", " "))
    label += f" ({len(lines)} seed{'s' if len(lines) > 1 else ''})"
    colour = COLOURS.get(name, "#c2554d")
    axis.plot(x, [statistics.mean(values) for values in y], color=colour, linewidth=1.1, label=label)
    if len(lines) > 1:
        low, high = ([pick(values) for values in y] for pick in (min, max))
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _zeros_by_layer(axis: plt.Axes, run: Record) -> None:
    looks = run["activations"]
    layers = len(looks[0]["zeros"]) if looks else 0
    for layer in range(layers):
        points = [(look["step"], 100 * look["zeros"][layer]) for look in looks]
        name = f"layer {layer + 1}" if layer in (0, layers - 1) else None
        colour = plt.cm.viridis(layer / max(1, layers - 1))
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.0, label=name)
    if layers:
        axis.legend(fontsize=7, frameon=False)
    _label(axis, "zeros of the activation by layer, dark to light, default recipe, %", "step")


def _label(axis: plt.Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
