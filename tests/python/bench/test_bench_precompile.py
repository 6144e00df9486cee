"""What worker processes compile before a bench is what the bench then asks for; no failure of theirs stops it."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import benches
import pytest
import torch

from bench.cases import ffn_forward, ffn_training
from sparse24.bench import harness, options, precompile, sizes

SMOKE = ("--device", "cpu", "--smoke")

#: Nothing is compiled: each function runs as it is.
FAILING_JOBS = """
import os, torch
from sparse24.bench import precompile
from sparse24.bench.precompile import Job, Operand, run

precompile.compiled = lambda function, dynamic: function

def sound(x):
    return x + 1

def broken(x):
    raise ValueError("as expected")

class Fatal:
    __name__ = "fatal"

    def __reduce__(self):
        return os._exit, (3,)

if __name__ == "__main__":
    run([Job(f, (Operand((8,)),)) for f in (broken, sound, Fatal())], 1, torch.device("cpu"), 100)
"""


class Graphs:
    """In place of a compiler: the functions and operands that it is asked for. What it gives runs as it is."""

    def __init__(self):
        self.seen = set()

    def __call__(self, function, dynamic=False):
        def run(*operands):
            kinds = [o if o is None else (*o.shape, *o.stride(), o.dtype, o.requires_grad) for o in operands]
            # A dynamic graph takes all sizes.
            self.seen.add((function, dynamic, len(kinds) if dynamic else tuple(kinds)))
            return function(*operands)

        return run


@pytest.mark.parametrize("bench, arguments, most", [(ffn_forward, ["--zeros", "0.9"], 5), (ffn_training, [], 4)])
def test_a_bench_compiles_nothing_that_workers_do_not(tmp_path, monkeypatch, bench, arguments, most):
    """What the jobs call is what the bench calls: function by function, and operand by operand."""
    monkeypatch.setattr(sizes, "QUICK", sizes.SMOKE[1:])
    monkeypatch.setattr(ffn_training, "SIZES", [(128, 64, 512)])
    monkeypatch.setattr(ffn_training, "OTHER_ZEROS", [])
    parse = options.parse

    def not_smoke(*given):
        found, args = parse(*given)
        found.smoke, found.quick = False, True
        return found, args

    of_jobs, of_bench = Graphs(), Graphs()

    def run_jobs(jobs, workers, device, seconds):
        monkeypatch.setattr(precompile, "compiled", of_jobs)
        for job in precompile._distinct(jobs):
            assert precompile._compile(job, str(device)) is None
        monkeypatch.setattr(precompile, "compiled", of_bench)

    monkeypatch.setattr(harness, "parse", not_smoke)
    monkeypatch.setattr(precompile, "run", run_jobs)
    printed = benches.run(bench.__name__.rpartition(".")[2], *SMOKE, "--workers", "2", *arguments)
    assert ", 0 of them not verified" in printed
    assert of_bench.seen and of_bench.seen <= of_jobs.seen and len(of_jobs.seen) == most


def test_failures_are_told_and_left_to_the_bench(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(FAILING_JOBS)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    assert (
        "left to the bench: broken 8: ValueError: as expected" in printed
        and "left to the bench: fatal 8: BrokenProcessPool" in printed
    )
    assert "\n1 functions compiled in " in printed


@pytest.fixture
def threads(monkeypatch):
    """For processes."""
    monkeypatch.setattr(precompile, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))


def test_jobs_that_run_fit_in_memory(threads, monkeypatch, capsys):
    free, running, peak, lock = 100.0, [], [], threading.Lock()

    def compile_job(job, _):
        with lock:
            running.append(job.bytes)
            peak.append((sum(running), len(running)))
        time.sleep(0.02)
        with lock:
            running.remove(job.bytes)

    monkeypatch.setattr(precompile, "WORKER_BYTES", 0)
    monkeypatch.setattr(precompile, "_free_bytes", lambda _: free)
    monkeypatch.setattr(precompile, "_compile", compile_job)
    held = [60, 60, 30, 5, 5, 5, 5, 300]  # the last one has the memory to itself
    jobs = [precompile.Job(function, (), size) for function, size in zip((len, abs, *[max] * 6), held, strict=True)]
    precompile.run(jobs, 3, torch.device("cpu"), 100)
    assert len(peak) == 5 and max(number for _, number in peak) == 3  # three of 5 bytes are the same job
    assert all(total <= free or number == 1 for total, number in peak)
    peak.clear()
    precompile.run(jobs, 3, torch.device("cpu"), 0)
    assert not peak and "0 functions compiled in 0.0 s, 5 not started" in capsys.readouterr().out


def test_one_dynamic_graph_is_for_all_sizes():
    operands = [(precompile.Operand((n, 8)),) for n in (4, 4, 5)]
    for dynamic, distinct in ((False, 2), (True, 1)):
        jobs = [precompile.Job(abs, some, dynamic=dynamic) for some in operands]
        assert precompile._distinct(jobs) == jobs[::2][:distinct]
