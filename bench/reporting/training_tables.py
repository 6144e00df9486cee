"""The tables of a training step of the FFN: in bf16, and in fp8."""

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


FP8_HEAD = (
    "T, D, F",
    "relu2_mlp us",
    "with 16-bit weight gradients",
    "torch.compile, fp8",
    "fused dense, fp8",
    "torch.compile, bf16",
    "over torch.compile, fp8",
    "over fused dense, fp8",
    "over torch.compile, bf16",
    "over the best dense",
    "saved for the hidden layer",
)


def fp8_table(records: list[results.Record]) -> str:
    """From the records of bench "ffn_training": a row per size that was measured with all six products in fp8."""
    records = [r for r in records if r["race"] == "training" and r["median_us"]]
    rows = []
    chosen = [race for race in results.group(records).values() if any(r["variant"] == "sparse24_fp8" for r in race)]
    origins = Origins(r for race in chosen for r in race)
    for race in chosen:
        by_name = {r["variant"]: r for r in race}
        eager = by_name["sparse24_fp8"]
        ours = min((eager, by_name.get("sparse24_fp8_compiled", eager)), key=lambda r: r["median_us"])
        best = min((r for r in race if r["role"] == "dense"), key=lambda r: r["median_us"])
        rivals = [by_name.get(name) for name in ("scaled_mm_tensor", "fused_dense_fp8", "torch_compile")]
        shown = ours, by_name.get("sparse24_fp8_16bit_dw"), *rivals
        rows.append(
            [
                size(ours) + origins.mark(ours),
                *(f"{us(r)} ({us(hot(r))})" if r else "" for r in shown),
                *(f"{gain(r, ours)} ({gain(hot(r), hot(ours))})" if r else "" for r in (*rivals, best)),
                f"{hidden_share(ours):.3f}",
            ]
        )
    title = (
        "**Training step of the FFN in fp8**, all six products, 90 % zeros; of ours the faster of as it is and "
        "compiled. In brackets back to back, on a hot card. Last column: over the bytes that an unfused dense network "
        f"in bf16 keeps for it. {origins.note()}"
    )
    return table(title, list(FP8_HEAD), rows) if rows else ""


def hot(record: results.Record) -> results.Record:
    """A record whose time is that back to back."""
    return record | {"median_us": record["sustained_us"]}


def hidden_share(record: results.Record) -> float:
    """What is saved beside the codes of x and of both weights, over what an unfused dense network in bf16 saves."""
    weights = 2 * record["d_model"] * record["d_ff"]
    kept = record["saved_bytes"] - record["tokens"] * record["d_model"] - weights
    return kept / (4 * record["tokens"] * record["d_ff"])


def _gains(rival: results.Record, ours: results.Record, no_split: results.Record | None) -> str:
    over = gain(rival, ours)
    return f"{over} ({gain(rival, no_split)})" if no_split else over


def _x_bytes(record: results.Record) -> int:
    return 2 * record["tokens"] * record["d_model"]
