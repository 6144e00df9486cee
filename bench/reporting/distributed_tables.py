"""The tables of training steps on several GPUs: speed beside one GPU, and memory and collectives."""

from __future__ import annotations

from collections.abc import Callable

from bench.reporting.markdown import gain, table
from bench.reporting.origins import Origins
from sparse24.bench import results

#: By variant: its column, and the variant that it is compared with.
VARIANTS = {
    "module_dense": ("dense, bf16, backward not fused", None),
    "fused_dense": ("dense, bf16", None),
    "sparse24": ("2:4, bf16", "fused_dense"),
    "fused_dense_fp8": ("dense, fp8", None),
    "sparse24_fp8": ("2:4, fp8", "fused_dense_fp8"),
}
WAYS = {
    "alone": "one GPU",
    "fsdp2": "FSDP2",
    "fsdp2_engines": "FSDP2, copy engines",
    "fsdp2_float8": "FSDP2, codes gathered",
    "fsdp2_float8_once": "FSDP2, codes gathered once",
    "fsdp2_float8_engines": "FSDP2, codes gathered once by copy engines",
    "tensor": "tensor and sequence parallel",
    "ddp": "DDP",
    "expert": "expert parallel",
}

Cell = Callable[[results.Record, "results.Record | None"], str]


def all_tables(records: list[results.Record]) -> str:
    """From the records of bench "distributed"."""
    steps = [r for r in records if r["race"] in WAYS]
    origins = Origins(steps)
    speed = (
        "**Training steps on several GPUs**, 90 % zeros: layers of attention and the network, forward and backward, "
        "until all ranks have their gradients. Tokens per second of all GPUs; in brackets of one GPU's speed times "
        "their number; and the speed-up of 2:4 over dense in that precision. All dense networks are the library's "
        f"own, with fused activation and, where it does not say otherwise, derivative. {origins.note()}"
    )
    memory = (
        "**Memory and communication of these steps**: peak GB of a GPU (weights, gradients, activations), and how "
        "long collectives run, as a share of the step: beside other kernels or not, and with waiting."
    )
    made = [_table(speed, steps, origins, _speed), _table(memory, steps, origins, _memory)]
    alone = [r for r in records if r["race"] == "collective"]
    return "\n\n".join([*made, _collectives(alone)] if alone else made)


def _table(title: str, records: list[results.Record], origins: Origins, cell: Cell) -> str:
    rows = []
    columns = {name: of for name, of in VARIANTS.items() if any(r["variant"] == name for r in records)}
    for model, way, gpus in dict.fromkeys((r["model"], r["race"], r["gpus"]) for r in records):
        mine = {r["variant"]: r for r in records if (r["model"], r["race"], r["gpus"]) == (model, way, gpus)}
        first = next(iter(mine.values()))
        size = f"{model}, {first['layers']} layers{origins.mark(first)}"
        row = [size, WAYS[way] if gpus == 1 else f"{WAYS[way]}, {gpus}", f"{first['tokens']:,}"]
        for name, (_, rival) in columns.items():
            row.append(cell(mine[name], mine.get(rival or "")) if name in mine else "")
        rows.append(row)
    return table(title, ["model", "GPUs", "tokens", *(name for name, _ in columns.values())], rows)


def _speed(record: results.Record, rival: results.Record | None) -> str:
    if not record["median_us"]:
        return "not verified"
    text = f"{record['tokens_per_s']:,.0f}"
    text += f" ({100 * record['scaling']:.1f} %)" if "scaling" in record else ""
    return text + (f", {gain(rival, record)}" if rival and rival["median_us"] else "")


def _memory(record: results.Record, _rival: results.Record | None) -> str:
    text = f"{record['peak_gb']:.1f}" if "peak_gb" in record else ""
    if "nccl_us" in record and record["median_us"]:
        text += f", {100 * record['nccl_us'] / record['median_us']:.0f} %"
    return text


def _collectives(records: list[results.Record]) -> str:
    rows = [
        [
            f"{r['model']}, {r['gpus']}",
            f"{r['variant'].replace('_', ' ')}, {r['dtype']}",
            f"{r['bytes'] / 1e6:,.0f}",
            f"{r['median_us']:,.0f}",
            f"{r['gb_per_s']:,.0f}",
        ]
        for r in records
    ]
    title = "**Collectives alone**, of one layer's weights, or of the tokens of all ranks, back to back."
    return table(title, ["model, GPUs", "collective", "MB a GPU sends", "us", "GB/s"], rows)
