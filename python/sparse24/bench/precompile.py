"""torch.compile in several processes, before anything is timed.

A bench compiles each size anew, one after the other, and its GPU waits for that longer than it works. Here worker
processes compile the same functions for operands of the same shapes first; torch keeps the graphs and kernels on disk,
and the process that times finds them there. What a worker could not compile, that process compiles itself.

Timings of kernels do not come from here: while others use the GPU too they would choose a wrong configuration. Workers
leave no such choice behind, so the process that times makes it.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import torch

# A CUDA context and what a worker's libraries hold beside it.
WORKER_BYTES = 2**30
# Of the GPU's free memory; the allocator's blocks are not filled to the last byte.
USED_SHARE = 0.8
# What a job may take after the time is up, before its process is stopped.
GRACE_SECONDS = 60.0
REPORT_EVERY = 20

Function = Callable[..., torch.Tensor]


class Operand(NamedTuple):
    """A contiguous tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    requires_grad: bool = False

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """A function at module level, and what it is called with; backward too if an operand requires it.

    `workspace` are the bytes that a call takes beside its operands, at most.
    """

    function: Function
    operands: tuple[Operand | None, ...]
    workspace: int = 0
    dynamic: bool = False

    @property
    def bytes(self) -> int:
        return self.workspace + sum(operand.bytes for operand in self.operands if operand)

    def __str__(self) -> str:
        return " ".join([self.function.__name__, *("x".join(map(str, o.shape)) for o in self.operands if o)])


def compiled(function: Function, dynamic: bool = False) -> Function:
    """As the benches compile: torch's caches know these arguments apart."""
    return torch.compile(function, dynamic=dynamic, fullgraph=True)


def release() -> None:
    """Give back what the last problem held: its data, and compiled functions (the recompile limit is per code)."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(jobs: Iterable[Job], workers: int, device: torch.device, seconds: float) -> None:
    """Compile all jobs, in their order as far as memory allows; none is started after `seconds`."""
    waiting = _distinct(jobs)
    print(f"compiling {len(waiting)} functions in up to {workers} processes", flush=True)
    started = time.perf_counter()
    limit = _free_bytes(device) - workers * WORKER_BYTES
    running: dict[Future, Job] = {}
    finished = 0
    # Not fork: CUDA does not survive it.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare) as pool:
        while True:
            left = max(0.0, seconds - (time.perf_counter() - started))
            for job in list(waiting) if left else []:
                used = sum(other.bytes for other in running.values())
                if len(running) < workers and (not running or used + job.bytes <= limit):
                    try:
                        running[pool.submit(_compile, job, str(device))] = job
                    except BrokenProcessPool:  # what the other jobs tell when they end
                        break
                    waiting.remove(job)
            if not running:
                break
            done, _ = wait(running, left + GRACE_SECONDS, FIRST_COMPLETED)
            if not done:
                for process in multiprocessing.active_children():
                    process.kill()
            for future in done:
                job = running.pop(future)
                # An exception of the future's own: its process is gone.
                error = _describe(future.exception()) if future.exception() else future.result()
                finished += not error
                if error:
                    print(f"left to the bench: {job}: {error}", flush=True)
                elif finished % REPORT_EVERY == 0:
                    print(f"[{time.perf_counter() - started:5.1f} s] {finished} compiled", flush=True)
    text = f", {len(waiting)} not started" if waiting else ""
    print(f"{finished} functions compiled in {time.perf_counter() - started:.1f} s{text}", flush=True)


def graphs() -> str:
    """What this process found in torch's caches: shows whether the workers' operands are those of the bench."""
    counted = torch._dynamo.utils.counters["inductor"]
    return f"{counted['fxgraph_cache_hit']} graphs found, {counted['fxgraph_cache_miss']} compiled"


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each once; of dynamic ones the first, whose graph takes other sizes too, with gradients of the same operands."""
    found: dict[object, Job] = {}
    for job in jobs:
        learns = tuple(o is not None and o.requires_grad for o in job.operands)
        found.setdefault((job.function, learns) if job.dynamic else job, job)
    return list(found.values())


def _free_bytes(device: torch.device) -> float:
    return USED_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _prepare() -> None:
    """A worker: it compiles in its own thread, and leaves no choice of a kernel's configuration to others."""
    from torch._inductor import config
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    # Under its own name: graphs are pickled with this method, by name.
    def save(self: AutotuneCache, *_: object, **__: object) -> None:
        pass

    config.compile_threads = 1  # no part of the caches' keys
    AutotuneCache.save = save


def _compile(job: Job, device: str) -> str | None:
    """In a worker: why it did not work, or None."""
    try:
        _call(job, device)
        return None
    except Exception as error:
        return _describe(error)
    finally:
        release()


def _call(job: Job, device: str) -> None:
    operands = [
        o and torch.zeros(o.shape, dtype=o.dtype, device=device).requires_grad_(o.requires_grad) for o in job.operands
    ]
    out = compiled(job.function, job.dynamic)(*operands)
    variables = [operand for operand in operands if operand is not None and operand.requires_grad]
    if variables:
        torch.autograd.grad(out, variables, torch.zeros_like(out))
    if out.is_cuda:
        torch.cuda.synchronize()
