"""Calls in CUDA graphs, and the host's time of calls without one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

#: Calls before a capture, and calls whose host time is taken.
WARM_UP, HOST_CALLS = 3, 15

Call = Callable[[], torch.Tensor]


def graphed(calls: Sequence[Call], device: torch.device) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Capture `calls` one after another as one graph, and replay it; on the CPU call them.

    Returns
    -------
    callable
        Takes a counter, and returns the outputs of the first call and of the last one.
    """

    def all_of_them() -> tuple[torch.Tensor, torch.Tensor]:
        first = last = calls[0]()
        for call in calls[1:]:
            last = call()  # memory of those between is used again, as in a model
        return first, last

    if device.type != "cuda":
        return torch.inference_mode()(lambda _: all_of_them())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            all_of_them()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = all_of_them()
    for out in outputs:
        out.fill_(torch.nan)  # what a replay does not write shows

    # Operands live as long as the graph that reads them.
    def replay(_: int, operands: object = tuple(calls)) -> tuple[torch.Tensor, torch.Tensor]:
        graph.replay()
        return outputs

    return replay


@torch.inference_mode()
def host_us(run: Call, device: torch.device) -> float:
    """Median time until a call returns, with an idle device in front of it."""
    times = []
    for _ in range(WARM_UP + HOST_CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[WARM_UP:])
