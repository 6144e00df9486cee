"""The table of a training step of the FFN."""

from __future__ import annotations

import report
from markdown_table import table, us

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
    "saved for y",
)


def step_table(records: list[report.Record]) -> str:
    """From the records of bench "ffn_training": a row per size, forward and backward in bf16 (and torch's in fp8)."""
    rows = []
    for race in report.group([r for r in records if r["race"] == "training"]).values():
        by_name = {r["variant"]: r for r in race if r["median_us"]}
        ours, dense, fused = (by_name.get(name) for name in ("sparse24", "torch_compile", "fused_dense"))
        if not (ours and dense and fused):
            continue
        no_split = by_name.get("sparse24_no_split")
        others = ("sparse24_dense_dw", "torch_compile", "fused_dense", "scaled_mm_tensor")
        rows.append(
            [
                f"{ours['tokens']}, {ours['d_model']}, {ours['d_ff']}",
                us(ours),
                us(no_split) if no_split else "",
                *(us(by_name[name]) if name in by_name else "" for name in others),
                *(_gains(rival, ours, no_split) for rival in (dense, fused)),
                f"{(ours['saved_bytes'] - _x_bytes(ours)) / (dense['saved_bytes'] - _x_bytes(dense)):.2f}",
            ]
        )
    title = (
        "**Training step of the FFN**, forward and backward, bf16, 90 % zeros. In brackets without the split of the "
        "densest features. Last column: bytes kept for the backward pass beside x, over those of torch.compile"
    )
    return table(title, list(HEAD), rows) if rows else ""


def _gains(rival: report.Record, ours: report.Record, no_split: report.Record | None) -> str:
    gain = f"{rival['median_us'] / ours['median_us']:.2f}"
    return f"{gain} ({rival['median_us'] / no_split['median_us']:.2f})" if no_split else gain


def _x_bytes(record: report.Record) -> int:
    return 2 * record["tokens"] * record["d_model"]
