"""Training steps on several GPUs: how they scale from one, and what 2:4 gains there."""

from __future__ import annotations

from bench.reporting.distributed_tables import WAYS
from sparse24.bench import results
from sparse24.bench.drawing import bars, finish, plt

NAMES = {
    "module_dense": "dense, bf16, backward not fused",
    "fused_dense": "dense, bf16",
    "sparse24": "2:4, bf16",
    "fused_dense_fp8": "dense, fp8",
    "sparse24_fp8": "2:4, fp8",
}


def draw(records: list[results.Record]) -> plt.Figure | None:
    """Speed of a GPU beside that of one alone, and the speed-up over dense, one GPU's first."""
    records = [r for r in records if r["race"] in WAYS and r["median_us"]]
    several = [r for r in records if "scaling" in r]
    if not several:
        return None
    ours = [r for r in records if "speedup_vs_best_dense" in r]
    figure, axes = plt.subplots(2 if ours else 1, 1, figsize=(10, 6.4 if ours else 3.2), squeeze=False)
    panels = [(several, "scaling", "A GPU among several beside one alone, the same tokens a GPU", "speed")]
    panels += [(ours, "speedup_vs_best_dense", "2:4 over dense, of the same precision", "speed-up")] if ours else []
    for axis, (some, field, title, label) in zip(axes[:, 0], panels, strict=True):
        bars(axis, some, _group, lambda r, field=field: r[field], NAMES, line=1.0)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(label, fontsize=8)
    return finish(figure, records)


def _group(record: results.Record) -> str:
    way = WAYS[record["race"]].partition(" and")[0]
    return f"{record['model']}\n{way}" + (f", {record['gpus']} GPUs" if record["gpus"] > 1 else "")
