"""Collectives alone, of as many bytes as a layer exchanges: what estimates for other numbers of GPUs are made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from bench.distributed.exchange import gathered, scattered, summed
from sparse24.bench import results

if TYPE_CHECKING:
    from bench.distributed.race import Data

CALLS = 5
CALL = {"all_gather": gathered, "reduce_scatter": scattered, "all_reduce": summed}


def records(data: Data, rounds: int) -> list[results.Record]:
    """A record of each, on all ranks; `gb_per_s` are the bytes that each GPU sends and receives."""
    if data.device.type == "cpu":
        return []
    size, ranks = data.size, dist.get_world_size()
    weights = sum(w.numel() for w in data.weights.values()) // size.layers // ranks * ranks
    tokens = ranks * size.tokens * size.d_model
    found = []
    for variant, dtype, elements, what in (
        ("all_gather", torch.bfloat16, weights, "weights"),
        ("all_gather", torch.float8_e4m3fn, weights, "weights"),
        ("reduce_scatter", torch.float32, weights, "weights"),
        ("all_reduce", torch.bfloat16, weights, "weights"),
        ("all_gather", torch.bfloat16, tokens, "tokens"),
        ("reduce_scatter", torch.bfloat16, tokens, "tokens"),
    ):
        call = _call(variant, dtype, elements, data.device)
        us = statistics.median(_time(call) for _ in range(rounds))
        sent = elements * dtype.itemsize * (ranks - 1) // ranks * (2 if variant == "all_reduce" else 1)
        found.append(
            {
                "bench": "distributed",
                "problem": f"{size.name}, one layer's {what}",
                "race": "collective",
                "variant": f"{variant}_{what}",
                "role": "part",
                "dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, "fp8"),
                "model": size.name,
                "gpus": ranks,
                "tokens": ranks * size.tokens,
                "d_model": size.d_model,
                "d_ff": size.d_ff,
                "zeros": round(data.zeros, 4),
                "pattern": "iid",
                "verified": True,
                "median_us": round(us, 1),
                "iqr_us": 0.0,
                "bytes": sent,
                "gb_per_s": round(sent / us / 1e3, 1),
            }
        )
    return found


def _call(variant: str, dtype: torch.dtype, elements: int, device: torch.device) -> Callable[[], object]:
    # Bytes of any kind: nothing looks at the result. float8 travels as bytes.
    wire = torch.uint8 if dtype.itemsize == 1 else dtype
    part = variant == "all_gather"
    x = torch.zeros(elements // dist.get_world_size() if part else elements, dtype=wire, device=device)
    return partial(CALL[variant], x)


def _time(call: Callable[[], object]) -> float:
    """us of a call, back to back, the slowest rank's."""
    dist.barrier()
    torch.cuda.synchronize()
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    us = torch.tensor(begin.elapsed_time(end) * 1e3 / CALLS, device="cuda")
    dist.all_reduce(us, dist.ReduceOp.MAX)
    return float(us)
