"""What the demo has found, in a few sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparse24.terminal import percent

Times = Mapping[str, float | None]


def gain(ms: Times, precision: str) -> float | None:
    """How many times as fast as the best dense variant 2:4 is, both in `precision`; None where one did not run."""
    sparse = ms[f"{precision} 2:4"]
    dense = [v for name, v in ms.items() if name.startswith(precision) and not name.endswith("2:4") and v is not None]
    return None if sparse is None or not dense else min(dense) / sparse


def verdict(
    losses: Mapping[str, float], layers: Sequence[Mapping[str, Any]], times: Sequence[Times], wrong: int
) -> str:
    """Sum up a run of the demo.

    Parameters
    ----------
    losses : mapping of str to float
        Held-out loss by how the networks were run.
    layers : sequence of mappings
        Statistics of each layer, as `sparse24.ActivationStats` names them.
    times : sequence of mappings
        Milliseconds by variant, of each size that was timed; empty without a GPU.
    wrong : int
        How many comparisons with the reference failed.
    """
    if wrong:
        return f"Verdict: {wrong} results are WRONG on this machine: do not use this build here, and report it."
    dense = losses["dense float32"]
    dropped = [layer["feature_nonzeros_dropped"] for layer in layers]
    changes = {"bf16": losses["2:4 bf16"] - dense, "fp8": losses["2:4 fp8, row-wise"] - dense}
    # Adding zero turns -0.0 into 0.0.
    cost = " and ".join(f"{round(change, 4) + 0.0:+.4f} nats/byte in {name}" for name, change in changes.items())
    text = (
        f"Verdict: right, and 2:4 changes the held-out loss by {cost}, where it drops "
        f"{percent(min(dropped), 1)} to {percent(max(dropped), 1)} % of a layer's non-zeros. "
    )
    said = [sentence for precision in ("bf16", "fp8") if (sentence := _speed(times, precision))]
    return text + (
        " ".join(said) or "Whether it is faster, a GPU has to tell: there is none that runs the kernels here."
    )


def _speed(times: Sequence[Times], precision: str) -> str:
    gains = [found for ms in times if (found := gain(ms, precision)) is not None]
    if not gains:
        return ""
    faster = [found for found in gains if found > 1]
    text = f"In {precision} it is {min(gains):.2f} to {max(gains):.2f} times as fast as the best dense network, "
    return text + f"faster at {len(faster)} of {len(gains)} sizes."
