"""The table of a training step of the FFN."""

from __future__ import annotations

from bench.reporting.markdown import gain, size, table, us
from bench.reporting.origins import Origins
from sparse24.bench import results

HEAD = (
    "T, D, F",
    "relu2_mlp us",
    "no split",
    "dense weight gradients",
    "torch.compile",
    "fused dense",
    "torch.compile, fp8",
    "over torch.compile",
    "over fused dense",
    "over torch.compile, fp8",
    "saved for y",
)


def step_table(records: list[results.Record]) -> str:
    """From the records of bench "ffn_training": a row per size, forward and backward in bf16 (and torch's in fp8)."""
    records = [r for r in records if r["race"] == "training"]
    origins, rows = Origins(records), []
    for race in results.group(records).values():
        by_name = {r["variant"]: r for r in race if r["median_us"]}
        ours, dense, fused = (by_name.get(name) for name in ("sparse24", "torch_compile", "fused_dense"))
        if not (ours and dense and fused):
            continue
        no_split, fp8 = by_name.get("sparse24_no_split"), by_name.get("scaled_mm_tensor")
        others = ("sparse24_dense_dw", "torch_compile", "fused_dense", "scaled_mm_tensor")
        rows.append(
            [
                size(ours) + origins.mark(ours),
                us(ours),
                us(no_split) if no_split else "",
                *(us(by_name[name]) if name in by_name else "" for name in others),
                *(_gains(rival, ours, no_split) for rival in (dense, fused)),
                gain(fp8, ours) if fp8 else "",
                f"{(ours['saved_bytes'] - _x_bytes(ours)) / (dense['saved_bytes'] - _x_bytes(dense)):.2f}",
            ]
        )
    title = (
        "**Training step of the FFN**, forward and backward, bf16, 90 % zeros. In brackets without the split of the "
        "densest features. torch.compile in fp8 has all six GEMMs in fp8. Last column: bytes kept for the backward "
        f"pass beside x, over those of torch.compile. {origins.note()}"
    )
    return table(title, list(HEAD), rows) if rows else ""


def _gains(rival: results.Record, ours: results.Record, no_split: results.Record | None) -> str:
    over = gain(rival, ours)
    return f"{over} ({gain(rival, no_split)})" if no_split else over


def _x_bytes(record: results.Record) -> int:
    return 2 * record["tokens"] * record["d_model"]
