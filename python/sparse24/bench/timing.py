"""Times of GPU work: CUDA events, cold L2, variants interleaved, medians; or back to back on a hot card."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sparse24.bench import environment

# A pass over a buffer of this many L2 sizes leaves nothing of the operands behind.
L2_MULTIPLE = 4
MIN_ROUNDS = 15
# torch.cuda._sleep counts clock cycles; this is above any clock of the GPUs in question, so waits are never shorter.
CYCLES_PER_US = 2000
MAX_WAIT_US = 3000.0
# Each sample begins on a device that has been idle for so long. A GPU at its power limit sets its clock by what it did
# just before: with shorter pauses, as long as the host happened to take, emptying the L2 slows the sample down, and
# some kernels more than others (docs/log/034).
PAUSE_US = 1000.0

Run = Callable[[int], object]


@dataclass
class Timing:
    """Device time of one variant, and what the GPU's sensors said while it worked."""

    median_us: float
    iqr_us: float
    min_us: float
    rounds: int
    host_us: float
    clocks: dict[str, float | None]
    pause_us: float  # at least, before each sample
    sustained_us: float | None = None  # of `sustain`
    stack_us: float | None = None  # of a call in a stack of layers

    @classmethod
    def of(cls, times_us: Sequence[float], host_us: float, clocks: dict[str, float | None], pause_us: float) -> Timing:
        ordered = sorted(times_us)
        low, median, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else ordered * 3
        return cls(median, high - low, ordered[0], len(ordered), host_us, clocks, pause_us)


def measure(
    runs: Sequence[Run], device: torch.device, *, rounds: int, seconds: float, repeat: int = 1, evict: bool = True
) -> list[Timing]:
    """Times `runs` round-robin, each round in another order, so that clocks and temperature are shared.

    Parameters
    ----------
    runs : sequence of callables
        Each takes a counter (for variants that rotate over buffer sets) and enqueues its work.
    rounds : int
        Samples per variant; fewer, at least 15, if they would take longer than `seconds`.
    repeat : int
        Back-to-back calls per sample, for kernels near the memory roof: what a call leaves dirty in L2 is then written
        back within the sample. Samples are divided by it.
    evict : bool
        Empty the L2 before each sample by reading a large buffer (reading, not writing: dirty lines would be written
        back at the variant's expense). Off for variants that rotate.
    """
    clock = _clock(device)
    # Enough work before the first sample for clocks to rise and for lazy initialisation to be over.
    host_us = [min(_host_us(run, clock, i) for i in range(3)) for run in runs]
    clock.wait_us = min(MAX_WAIT_US, max(clock.pause_us, 1.5 * repeat * max(host_us)))

    start = time.perf_counter()
    order = list(range(len(runs)))
    _round(runs, order, clock, repeat, evict, counter=0)
    clock.synchronize()
    per_round = time.perf_counter() - start
    if device.type == "cuda":
        rounds = max(MIN_ROUNDS, min(rounds, int(seconds / per_round)))

    shuffled = random.Random(0)
    samples = []
    for counter in range(rounds):
        shuffled.shuffle(order)
        samples += _round(runs, order, clock, repeat, evict, counter)
    clocks = environment.clocks(device)  # the last samples are still running
    clock.synchronize()

    times: list[list[float]] = [[] for _ in runs]
    for index, marks in samples:
        times[index].append(clock.elapsed_us(*marks) / repeat)
    return [Timing.of(t, h, clocks, clock.pause_us) for t, h in zip(times, host_us, strict=True)]


def sustain(runs: Sequence[Run], device: torch.device, timings: Sequence[Timing], *, seconds: float) -> list[float]:
    """The time of one call in us where each of `runs` is called back to back for `seconds`: a hot card, a warm L2.

    Twice each, the second time in the opposite order; the mean of both. Before that the first one warms the card up.
    `timings` says how many calls that are.
    """
    clock = _clock(device)

    def one_call(index: int) -> float:
        calls = max(1, int(seconds * 1e6 / timings[index].median_us))
        begin = clock.mark()
        for i in range(calls):
            runs[index](i)
        end = clock.mark()
        clock.synchronize()
        return clock.elapsed_us(begin, end) / calls

    order = range(len(runs))
    for index in 4 * list(order[:1]):
        one_call(index)
    there = [one_call(index) for index in order]
    back = [one_call(index) for index in reversed(order)][::-1]
    return [statistics.fmean(both) for both in zip(there, back, strict=True)]


def _clock(device: torch.device) -> _CudaClock | _HostClock:
    return _CudaClock(device) if device.type == "cuda" else _HostClock()


def _round(runs: Sequence[Run], order: Sequence[int], clock, repeat: int, evict: bool, counter: int) -> list:
    samples = []
    for index in order:
        if evict:
            clock.evict()
        clock.wait()
        begin = clock.mark()
        for i in range(repeat):
            runs[index](counter * repeat + i)
        samples.append((index, (begin, clock.mark())))
    return samples


def _host_us(run: Run, clock, counter: int) -> float:
    """Time until `run` returns, with an idle device in front of it: what the host spends on one call."""
    clock.synchronize()
    start = time.perf_counter()
    run(counter)
    elapsed = (time.perf_counter() - start) * 1e6
    clock.synchronize()
    return elapsed


class _CudaClock:
    """Events on the current stream."""

    pause_us = PAUSE_US

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.ones(L2_MULTIPLE * cache // 4, dtype=torch.float32, device=device)
        self.sink = torch.empty((), dtype=torch.float32, device=device)
        self.wait_us = 0.0

    def evict(self) -> None:
        torch.sum(self.buffer, dim=0, out=self.sink)

    def wait(self) -> None:
        """Keep the device waiting while the host enqueues: samples then hold no launch gaps of the host's making."""
        torch.cuda._sleep(int(self.wait_us * CYCLES_PER_US))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class _HostClock:
    """The host's clock, so that the whole path also runs without a GPU."""

    pause_us = wait_us = 0.0

    def evict(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_us(self, begin: float, end: float) -> float:
        return (end - begin) * 1e6

    def synchronize(self) -> None:
        pass
