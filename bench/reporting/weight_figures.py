"""What the figures of 2:4 weights are: times of networks with them, a GPT's loss and sparse steps, and the gain."""

from __future__ import annotations

import statistics

from bench.reporting import train_table, weight_speed, weight_tables
from bench.reporting.figure_values import RESULTS, figure, records, span
from sparse24.bench import results

RECOMMENDED = "weights"
#: By the figure's name: pass, precision, ours, and the rival.
GAINS = {
    "forward-bf16-over-fused": ("forward", "bf16", "sparse24_up", "fused_dense"),
    "forward-bf16-over-compile": ("forward", "bf16", "sparse24_up", "torch_compile"),
    "forward-fp8-over-fused": ("forward", "fp8", "sparse24_up", "fused_dense"),
    "forward-fp8-over-row": ("forward", "fp8", "sparse24_up_row", "scaled_mm_row"),
    "training-bf16-over-compile": ("training", "bf16", "sparse24_both", "torch_compile"),
    "training-fp8-over-compile": ("training", "fp8", "sparse24_both", "scaled_mm_tensor"),
    "first-bf16-over-dense": ("gemm1", "bf16", "linear_compress_packed", "linear_compress"),
    "first-fp8-over-dense": ("gemm1", "fp8", "linear_compress_packed", "linear_compress"),
    "activations-bf16-over-compile": ("training", "bf16", "sparse24", "torch_compile"),
    "activations-fp8-over-compile": ("training", "fp8", "sparse24_fp8", "scaled_mm_tensor"),
}


def gains(name: str, field: str = "median_us") -> list[float]:
    """Of the records of ffn_weights, by size."""
    return weight_speed.gains(records("h200", "ffn_weights"), *GAINS[name], field)


def runs() -> list[results.Record]:
    return train_table.read(RESULTS / "h200" / "train_gpt_weights")


def losses() -> list[float]:
    """Over that of dense, in %, by seed."""
    return list(weight_tables.of_recipe(runs(), RECOMMENDED).values())


def run_gains() -> list[float]:
    """The networks of a whole run over torch.compile, with both weights 2:4 in its sparse steps."""
    share = weight_tables.sparse_share(runs(), RECOMMENDED)
    return [1 / (1 - share + share / step) for step in gains("training-bf16-over-compile")]


for name in GAINS:
    for hot, field in (("", "median_us"), ("-hot", "sustained_us")):
        figure(f"weights-{name}{hot}", lambda name=name, field=field: span(gains(name, field)))
figure("weights-share", lambda: f"{100 * weight_tables.sparse_share(runs(), RECOMMENDED):.0f}")
figure("weights-loss", lambda: f"{statistics.mean(losses()):+.1f}")
figure("weights-loss-seeds", lambda: span(losses(), "+.2f"))
figure("weights-seeds", lambda: str(len(losses())))
figure("weights-run-gain", lambda: span(run_gains()))
