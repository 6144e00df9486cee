"""Threads of the CPU ops: as many as torch's, fewer where one cannot start; results do not depend on them."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from samples import CASES

import sparse24

#: Counts threads that are started, and refuses them from a certain one on, as at a limit of processes.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
static int left = -1, started;
void arm(int n) { left = n; started = 0; }
int count(void) { return started; }
int pthread_create(pthread_t* t, const pthread_attr_t* a, void* (*f)(void*), void* x) {
  static int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  if (!real) real = (int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*))dlsym(RTLD_NEXT, "pthread_create");
  if (left == 0) return EAGAIN;
  if (left > 0) --left;
  ++started;
  return real(t, a, f, x);
}
"""  # noqa: E501


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype not in (torch.float16, torch.bfloat16)], ids=str)
def test_results_do_not_depend_on_the_number(case):
    """Here of every op, which at this size starts no thread; of large ones in `shim_main`."""
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(case.make("cpu").run())
    finally:
        torch.set_num_threads(1)
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_threads_that_cannot_start(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, shim = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    built = subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, source, "-ldl"], capture_output=True, text=True)
    if built.returncode != 0:
        pytest.skip(f"the compiler does not work: {built.stderr.splitlines()[:1]}")
    environment = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(sparse24.__file__).parents[1]), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    run = subprocess.run([sys.executable, __file__, shim], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def shim_main(path: str) -> None:
    """Run large ops under the shim."""
    shim = ctypes.CDLL(path)
    x, w = torch.randn(2048, 512), torch.randn(512, 512)
    kept, meta = sparse24.compress(x)
    calls = {
        "compress": lambda: sparse24.compress(x, "relu2"),
        "compress along tokens": lambda: sparse24.compress(x, "relu2", -2),
        "compress_fp8": lambda: sparse24.compress_fp8(x, scaling="tensor"),
        "quantize_fp8": lambda: sparse24.quantize_fp8(x),
        "mm": lambda: (sparse24.mm(kept, meta, w),),
        "linear_compress": lambda: sparse24.linear_compress(x, w),
        "linear_gradient": lambda: sparse24.linear_gradient(x, w, kept, meta),
    }
    for name, call in calls.items():
        torch.set_num_threads(1)
        shim.arm(-1)
        expected = call()
        assert shim.count() == 0, name
        for threads, may_start in ((2, -1), (4, -1), (4, 0), (4, 2)):
            torch.set_num_threads(threads)
            shim.arm(may_start)
            actual = call()
            started = shim.count()
            shim.arm(-1)
            if may_start < 0:  # an op may have several steps
                assert started > 0 and started % (threads - 1) == 0, (name, threads, started)
            torch.set_num_threads(1)
            for a, b in zip(actual, expected, strict=True):
                assert_same_bits(a, b)


if __name__ == "__main__":
    shim_main(sys.argv[1])
