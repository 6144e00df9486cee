"""The FFN in training: speed-ups of a step, by size and by zeros, and what is saved between its passes."""

from __future__ import annotations

from sparse24.bench import results, sizes
from sparse24.bench.drawing import bars, finish, pattern_name, plt, size_label
from sparse24.bench.variants import VARIANTS

NAMES = {
    "scaled_mm_tensor": "torch.compile, six GEMMs in fp8",
    "sparse24": "sparse24, bf16",
    "torch_compile": "torch.compile, bf16",
    "fused_dense": "fused dense, bf16",
    "fused_dense_fp8": "fused dense, fp8",
}


def draw(records: list[results.Record]) -> plt.Figure | None:
    """Speed-up over the fastest dense bf16 step, at 90 % zeros and by pattern; and what is saved for backward."""
    records = [r for r in records if r["bench"] == "ffn_training" and r["race"] == "training" and r["median_us"]]
    records = [r for r in best_of_compiled(records) if r["variant"] in VARIANTS]
    if not records:
        return None
    dense: dict[tuple, float] = {}
    for key, some in results.group(records).items():
        times = [r["median_us"] for r in some if r["role"] == "dense" and r["dtype"] == "bf16"]
        if times:
            dense[key] = min(times)

    def speedup(r: results.Record) -> float | None:
        return dense[results.problem_of(r)] / r["median_us"] if results.problem_of(r) in dense else None

    def saved(r: results.Record) -> float:
        return r["saved_bytes"] / (r["tokens"] * r["d_ff"])

    of_size = chosen(records)
    usual = [r for r in of_size if results.usual(r)]
    by_zeros = most_patterns(records)
    title = "Forward and backward: tokens, d_model x d_ff, about 90 % independent zeros"
    panels = [(usual, size_label, speedup, title)]
    if len({_zeros(r) for r in by_zeros}) > 1:
        by_zeros.sort(key=lambda r: (r["pattern"] != "iid", r["zeros"]))
        where = "{tokens:,} tokens, {d_model} x {d_ff}".format(**by_zeros[0])
        panels.append((by_zeros, _zeros, speedup, f"The same by zeros of the activation: {where}"))
    panels.append(([r for r in usual if "saved_bytes" in r], size_label, saved, "Saved between the passes, x included"))
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, 3.0 * len(panels)))
    for axis, (some, group, height, title) in zip(axes, panels, strict=True):
        bars(axis, some, group, height, NAMES, legend=False, line=1.0 if height is speedup else None)
        axis.set_title(title, fontsize=9)
        if height is speedup:
            axis.set_ylabel("speed-up over the best dense bf16", fontsize=8)
        else:
            axis.set_ylabel("bytes per element of the activation", fontsize=8)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    return finish(figure, records)


def best_of_compiled(records: list[results.Record]) -> list[results.Record]:
    """One record per variant: of ours as it is and compiled, the faster."""
    best: dict[tuple, results.Record] = {}
    for record in records:
        variant = record["variant"].removesuffix("_compiled")
        key = (*results.problem_of(record), variant)
        if key not in best or record["median_us"] < best[key]["median_us"]:
            best[key] = record | {"variant": variant}
    return list(best.values())


def chosen(records: list[results.Record]) -> list[results.Record]:
    """Of the training sizes proper; if none was measured, all."""
    main = [r for r in records if (r["tokens"], r["d_model"], r["d_ff"]) in sizes.TRAINING]
    return main or records


def most_patterns(records: list[results.Record]) -> list[results.Record]:
    """Those of the size with the most shares and patterns of zeros."""
    by_size: dict[str, list[results.Record]] = {}
    for r in records:
        by_size.setdefault(size_label(r), []).append(r)
    return max(by_size.values(), key=lambda some: len({_zeros(r) for r in some}))


def _zeros(record: results.Record) -> str:
    """What share, and of what: independent zeros, or the pattern of a layer of a GPT that was trained."""
    share = f"{100 * record['zeros']:.0f} %"
    if record["pattern"] == "iid":
        return f"{share}\nindependent"
    return f"{share}\nas {pattern_name(record['pattern'])}"
