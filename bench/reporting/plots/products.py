"""The sparse GEMM beside its rivals."""

from __future__ import annotations

from sparse24.bench import results
from sparse24.bench.drawing import bars, finish, plt, size_label

DTYPES = ("bf16", "fp8")


def draw(records: list[results.Record]) -> plt.Figure | None:
    """Dense-equivalent TFLOP/s per size, one panel per dtype."""
    records = [r for r in records if r["race"] == "forward" and results.usual(r) and r["median_us"]]
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in records)]
    if not dtypes:
        return None
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(10, 3.4 * len(dtypes)), squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        bars(axis, chosen, size_label, lambda r: r["tflops_dense_equivalent"])
        axis.set_ylabel("TFLOP/s (dense-equivalent)", fontsize=8)
        axis.set_title(
            f"{dtype} GEMM of the second layer: tokens, d_model x d_ff; all multiply 2:4 data with 90 % zeros",
            fontsize=9,
        )
    return finish(figure, records)
