"""What the figures of training with 2:4 weights are: a GPT's loss and sparse steps, and what is left of the gain."""

from __future__ import annotations

import statistics

from bench.reporting import train_table, weight_tables
from bench.reporting.figure_values import RESULTS, figure, span, speedups, times
from sparse24.bench import results

RECOMMENDED = "weights"


def runs() -> list[results.Record]:
    return train_table.read(RESULTS / "h200" / "train_gpt_weights")


def losses() -> list[float]:
    """Over that of dense, in %, by seed."""
    return list(weight_tables.of_recipe(runs(), RECOMMENDED).values())


def gains() -> list[float]:
    """Of a whole run over torch.compile, if its sparse steps are as fast as those with 2:4 activations alone."""
    share = weight_tables.sparse_share(runs(), RECOMMENDED)
    steps = speedups(times("h200", "ffn_training", "training"), "bf16", "sparse24", "torch_compile")
    return [1 / (1 - share + share / step) for step in steps]


figure("weights-share", lambda: f"{100 * weight_tables.sparse_share(runs(), RECOMMENDED):.0f}")
figure("weights-loss", lambda: f"{statistics.mean(losses()):+.1f}")
figure("weights-loss-seeds", lambda: span(losses(), "+.2f"))
figure("weights-seeds", lambda: str(len(losses())))
figure("weights-run-gain", lambda: span(gains()))
