"""The FFN for few tokens: over the number of tokens, for independent zeros and recorded ones."""

from __future__ import annotations

from collections import defaultdict

from bench.reporting.plots.products import DTYPES
from sparse24.bench import results
from sparse24.bench.drawing import at_one, finish, pattern_name, plt

LOSING = "#616e7c"
#: Lines are no variants, and have none of their colours: those of FFNs, and of patterns and shares of zeros.
COLOURS = ("viridis", "plasma")
#: The FFNs of the first row: those that were measured with patterns or with most numbers of tokens.
MOST_LINES = 6

#: By number of tokens: the speed-up of single calls, and of calls in a stack where they were measured.
Line = dict[int, tuple[float, float | None]]


def draw(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up over the best dense of the weights' precision against the number of tokens.

    A column for each precision. Above, a line for each FFN with 90 % independent zeros; below, where there are records
    of them, one for each recorded pattern and share of zeros, for the FFN that has most of them. Dashed: calls in a
    stack of layers, where they were measured.
    """
    records = [r for r in records if r["race"] == "forward"]
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in records)]
    above = {d: _by_ffn([r for r in records if r["dtype"] == d and results.usual(r)]) for d in dtypes}
    if not any(above.values()):
        return None
    below = {d: _by_zeros([r for r in records if r["dtype"] == d]) for d in dtypes}
    rows = [above, below] if any(len(lines) > 1 for lines in below.values()) else [above]
    figure, axes = plt.subplots(
        len(rows), len(dtypes), figsize=(5.2 * len(dtypes), 3.2 * len(rows)), squeeze=False, sharex=True
    )
    for row, panels in enumerate(rows):
        for axis, dtype in zip(axes[row], dtypes, strict=True):
            _panel(axis, panels[dtype], COLOURS[row])
            weights = "bf16 weights" if dtype == "bf16" else "float8 weights"
            what = "90 % independent zeros" if row == 0 else _ffn_of_patterns(records)
            axis.set_title(f"{weights}, {what}", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("speed-up over the best dense", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    return finish(figure, records)


def _panel(axis: plt.Axes, lines: dict[str, Line], colours: str) -> None:
    for i, (name, points) in enumerate(lines.items()):
        tokens = sorted(points)
        colour = plt.get_cmap(colours)(0.9 * i / max(1, len(lines) - 1))
        single = [points[t][0] for t in tokens]
        axis.plot(tokens, single, "o-", color=colour, markersize=3, linewidth=1.2, label=name)
        stacked = [(t, points[t][1]) for t in tokens if points[t][1] is not None]
        axis.plot([t for t, _ in stacked], [speedup for _, speedup in stacked], "--", color=colour, linewidth=1)
    if any(stack is not None for points in lines.values() for _, stack in points.values()):
        axis.plot([], [], "--", color=LOSING, linewidth=1, label="in a stack of layers")
    ticks = sorted({t for points in lines.values() for t in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(t) for t in ticks], fontsize=7)
    axis.minorticks_off()
    low = min(0.9, axis.get_ylim()[0])
    axis.axhspan(low, 1.0, color=LOSING, alpha=0.15, linewidth=0, zorder=0, label="dense is faster")
    axis.set_ylim(bottom=low)
    axis.spines[["top", "right"]].set_visible(False)
    at_one(axis)
    if lines:
        axis.legend(fontsize=7, frameon=False)


def _speedups(records: list[results.Record]) -> list[tuple[results.Record, tuple[float, float | None]]]:
    """Ours with how many times as fast as the best dense it is, alone and in a stack."""
    found = []
    for race in results.group(records).values():
        mine, dense = results.fastest(race, "sparse24"), results.fastest(race, "dense")
        if mine and dense:
            stacks = [results.fastest(race, role, "stack_us") for role in ("sparse24", "dense")]
            in_stack = stacks[1]["stack_us"] / stacks[0]["stack_us"] if all(stacks) else None
            found.append((mine, (dense["median_us"] / mine["median_us"], in_stack)))
    return found


def _by_ffn(records: list[results.Record]) -> dict[str, Line]:
    lines: dict[str, Line] = defaultdict(dict)
    for record, speedup in _speedups(records):
        model = f", {record['model']}" if record.get("model") else ""
        lines[f"{record['d_model']} x {record['d_ff']}{model}"][record["tokens"]] = speedup
    ordered = sorted(lines, key=lambda name: -len(lines[name]))[:MOST_LINES]
    return {name: lines[name] for name in ordered}


def _by_zeros(records: list[results.Record]) -> dict[str, Line]:
    lines: dict[str, Line] = defaultdict(dict)
    chosen = _most_patterns(records)
    for record, speedup in _speedups([r for r in records if (r["d_model"], r["d_ff"]) == chosen]):
        if record["pattern"] == "iid":
            name = f"{5 * round(20 * record['zeros']):.0f} % independent"
        else:
            name = f"as {pattern_name(record['pattern'])}"
        lines[name][record["tokens"]] = speedup
    return dict(sorted(lines.items()))


def _most_patterns(records: list[results.Record]) -> tuple[int, int] | None:
    kinds: dict[tuple[int, int], set[tuple[str, float]]] = defaultdict(set)
    for r in records:
        kinds[r["d_model"], r["d_ff"]].add((r["pattern"], round(20 * r["zeros"])))
    return max(kinds, key=lambda ffn: len(kinds[ffn]), default=None)


def _ffn_of_patterns(records: list[results.Record]) -> str:
    return "{} x {}".format(*_most_patterns(records))
