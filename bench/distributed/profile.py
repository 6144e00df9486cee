"""What the GPU does in a step: kernels, collectives, both, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sparse24.bench.harness import describe

Spans = list[tuple[float, float]]


def shares(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """us of a step on this GPU, by torch's profiler.

    `kernels_us` with other kernels, `nccl_us` all collectives run, one beside another or not and with waiting,
    `nccl_alone_us` without other kernels, `idle_us` between the first kernel and the last.
    """
    run()
    if device.type == "cpu":
        return {}
    try:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return split((e.name, e.time_range.start, e.time_range.end) for e in events)
    except Exception as error:  # the profiler is a courtesy
        return {"profiler": describe(error)}


def split(events: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """The same of kernels by name, begin and end."""
    collectives: Spans = []
    others: Spans = []
    for name, begin, end in events:
        (collectives if name.startswith("nccl") else others).append((begin, end))
    everything = _length(collectives + others)
    times = {
        "kernels_us": _length(others),
        "nccl_us": sum(end - begin for begin, end in collectives),
        "nccl_alone_us": everything - _length(others),
        "idle_us": _last(collectives + others) - _first(collectives + others) - everything,
    }
    return {name: round(us, 1) for name, us in times.items()}


def _length(spans: Spans) -> float:
    """Of the time that lies in any of them."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _first(spans: Spans) -> float:
    return min((begin for begin, _ in spans), default=0.0)


def _last(spans: Spans) -> float:
    return max((end for _, end in spans), default=0.0)
