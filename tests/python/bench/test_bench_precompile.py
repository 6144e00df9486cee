"""What worker processes compile before a bench is what the bench then asks for; no failure of theirs stops it."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[3] / "bench"

#: A bench at its smoke sizes, but compiled.
COMPILED_BENCH = """
import sys
sys.path.insert(0, {bench!r})
import {name} as bench
import harness, options, sizes
from torch._dynamo.utils import counters

def parse(*arguments):
    found, args = options.parse(*arguments)
    found.smoke, found.quick = False, True
    return found, args

if __name__ == "__main__":
    harness.parse = parse
    sizes.QUICK, bench.SIZES, bench.OTHER_ZEROS = sizes.SMOKE[1:], [(128, 64, 512)], []
    extra = dict(arguments=bench.arguments) if hasattr(bench, "arguments") else dict()
    harness.main({name!r}, bench.problems, "", sys.argv[1:], compilations=bench.compilations, **extra)
    print("AOT", counters["aot_autograd"]["autograd_cache_hit"])
"""

FAILING_JOBS = """
import os, sys, torch
sys.path.insert(0, {bench!r})
from precompile import Job, Operand, run

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


def run(script, folder, *arguments):
    file = folder / "script.py"
    file.write_text(script)
    # An empty cache: without vectors the compiler is not tried on every instruction set first.
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, file, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Of FFNs that are autograd functions themselves torch keeps the graphs, but not what AOTAutograd makes of them.
@pytest.mark.parametrize(
    ("name", "zeros", "jobs", "graphs", "aot"),
    [("ffn_forward", ["--zeros", "0.9"], 5, 5, 5), ("ffn_training", [], 3, 6, 1)],
)
def test_a_bench_compiles_nothing_that_workers_compiled(tmp_path, name, zeros, jobs, graphs, aot):
    script = COMPILED_BENCH.format(bench=str(BENCH), name=name)
    printed = run(script, tmp_path, "--device", "cpu", "--smoke", "--workers", "2", "--budget", "300", *zeros)
    assert f"\n{jobs} functions compiled in " in printed and ", 0 of them not verified" in printed
    assert f"\n{graphs} graphs found, 0 compiled" in printed
    assert int(printed.split("\nAOT ")[1]) >= aot


def test_failures_are_told_and_left_to_the_bench(tmp_path):
    printed = run(FAILING_JOBS.format(bench=str(BENCH)), tmp_path)
    assert "left to the bench: broken 8: " in printed and "left to the bench: fatal 8: BrokenProcessPool" in printed
    assert "\n1 functions compiled in " in printed


@pytest.fixture
def precompile(monkeypatch):
    """The module, with threads for processes."""
    monkeypatch.syspath_prepend(str(BENCH))
    import precompile

    monkeypatch.setattr(precompile, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    return precompile


def test_jobs_that_run_fit_in_memory(precompile, monkeypatch, capsys):
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
    sizes = [60, 60, 30, 5, 5, 5, 5, 300]  # the last one has the memory to itself
    jobs = [precompile.Job(function, (), size) for function, size in zip((len, abs, *[max] * 6), sizes, strict=True)]
    precompile.run(jobs, 3, torch.device("cpu"), 100)
    assert len(peak) == 5 and max(number for _, number in peak) == 3  # three of 5 bytes are the same job
    assert all(total <= free or number == 1 for total, number in peak)
    peak.clear()
    precompile.run(jobs, 3, torch.device("cpu"), 0)
    assert not peak and "0 functions compiled in 0.0 s, 5 not started" in capsys.readouterr().out


def test_one_dynamic_graph_is_for_all_sizes(precompile):
    operands = [(precompile.Operand((n, 8)),) for n in (4, 4, 5)]
    for dynamic, distinct in ((False, 2), (True, 1)):
        jobs = [precompile.Job(abs, some, dynamic=dynamic) for some in operands]
        assert precompile._distinct(jobs) == jobs[::2][:distinct]
