"""The README's one table: the whole network forward, and a training step, at a few sizes, also where it loses."""

from __future__ import annotations

import report
import sizes
from ffn_tables import by_default
from markdown_table import gain, table, us

# The large sizes, more and fewer tokens, and a narrow network.
SHOWN = (
    *(size[:3] for size in sizes.LARGE),
    (16384, 4096, 16384),
    (1024, 4096, 16384),
    (128, 4096, 16384),
    (32768, 768, 3072),
)
# What is timed: bench, dtype, race, and what users run.
TIMED = {
    "forward bf16": ("ffn_forward", "bf16", "forward", "torch_compile"),
    "forward fp8": ("ffn_forward", "fp8", "forward", "scaled_mm_row"),
    "training bf16": ("ffn_training", "bf16", "training", "torch_compile"),
}


def markdown(records: list[report.Record]) -> str:
    """From the records of ffn_forward and ffn_training; a table for each GPU."""
    chosen = [r for r in records if r["bench"] in ("ffn_forward", "ffn_training") and report.usual(r)]
    gpus = dict.fromkeys(r["gpu"] for r in chosen)
    return "\n\n".join(_of_one_gpu([r for r in chosen if r["gpu"] == gpu]) for gpu in gpus)


def _of_one_gpu(records: list[report.Record]) -> str:
    rows = []
    for size in SHOWN:
        here = [r for r in records if (r["tokens"], r["d_model"], r["d_ff"]) == size]
        cells = [cell for timed in TIMED.values() for cell in _cells(here, *timed)]
        if any(cells):
            model = next((r["model"] for r in here if r.get("model")), "")
            rows.append([", ".join(map(str, size)), model, *cells])
    head = ["T, D, F", "FFN of"]
    for name, (*_, rival) in TIMED.items():
        head += [f"{name} us", f"over {rival}", "over fused_dense"]
    first = records[0]
    ms = report.pause_ms(r for r in records if r["bench"] == "ffn_forward")
    pause = f", the forward pass after pauses of {ms:g} ms" if ms else ""
    title = (
        f"{first['gpu']}, torch {first['torch']}, CUDA {first['cuda']}, 90 % zeros: medians of at least 15 interleaved "
        f"rounds on a cold L2{pause}, every output verified before it was timed. torch_compile is torch's own network, "
        "scaled_mm_row the same in fp8 with a scale per row, fused_dense a dense one with the activation in the first "
        "GEMM's epilogue, as ours has it (fp8: one scale). Where we lose is bold"
    )
    return table(title, head, rows)


def _cells(records: list[report.Record], bench: str, dtype: str, race: str, rival: str) -> list[str]:
    """relu2_mlp as it comes in us, and its speed-ups."""
    mine = [r for r in records if (r["bench"], r["dtype"], r["race"]) == (bench, dtype, race) and r["median_us"]]
    by_name = {r["variant"]: r for r in mine}
    ours = by_default(mine, "sparse24", "sparse24_fallback", fp8=dtype == "fp8")
    if not ours:
        return ["", "", ""]
    kind = " (dense)" if ours["variant"] == "sparse24_fallback" else ""
    return [us(ours) + kind, *(gain(by_name[name], ours) if name in by_name else "" for name in (rival, "fused_dense"))]
