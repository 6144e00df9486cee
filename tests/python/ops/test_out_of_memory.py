"""An allocation that fails inside an op: the op, the bytes, and an error that handlers of torch's catch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse24

GIB = 2**30


def refused(call, op: str, bytes_: int, device: str) -> None:
    with pytest.raises(torch.OutOfMemoryError) as error:
        call()
    sentence = f"sparse24.{op}: out of memory: {bytes_} bytes asked for on {device}"
    assert str(error.value).startswith(sentence), error.value
    assert isinstance(error.value, RuntimeError)


def huge(device: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A matrix that takes no memory itself."""
    return torch.zeros(1, dtype=dtype, device=device).expand(rows, columns)


def conversions(device: str) -> None:
    """The first tensor that each op makes is beyond any memory: 2 TiB of 16 bits, 1 TiB of bytes."""
    x = huge(device, 2**20, 2**20)
    for name in ("compress", "compress_fp8", "quantize_fp8"):
        bytes_ = 2**40 if name in ("compress", "quantize_fp8") else 2**39
        refused(lambda name=name: getattr(sparse24, name)(x), name, bytes_, device)
        refused(lambda name=name: getattr(torch.ops.sparse24, name)(x), name, bytes_, device)
    w = huge(device, 2**20, 64)
    refused(lambda: sparse24.linear_relu2(w, w), "linear_relu2", 2**41, device)
    with pytest.raises(torch.OutOfMemoryError, match="^sparse24.linear_compress: out of memory: "):
        sparse24.relu2_mlp(w, w, w.t(), min_tokens=0)
    if device != "cpu":  # there it is the same code, and Dynamo would be imported by a process of its own
        compiled = torch.compile(lambda x: sparse24.compress(x, "relu2"), backend="aot_eager", fullgraph=True)
        refused(lambda: compiled(x), "compress", 2**40, device)
    # The device is as good as before.
    assert sparse24.compress(huge(device, 8, 32))[0].sum() == 0


def copies_and_buffers() -> None:
    """On the CPU: copies of operands, and what the reference needs beside its results."""
    counts = huge("cpu", 2**31 - 1, 1, torch.int32)[:, 0]
    refused(lambda: sparse24.densest_features(counts, 1), "densest_features", 4 * (2**31 - 1), "cpu")
    x, w = torch.zeros(1, 2**14, dtype=torch.bfloat16), torch.zeros(2**14, 2**15, dtype=torch.bfloat16)
    kept, meta = sparse24.compress(x)
    refused(lambda: sparse24.mm(kept, meta, w), "mm", 2**31, "cpu")
    refused(lambda: sparse24.linear_relu2(x, w.view(2**15, 2**14)), "linear_relu2", 2**31, "cpu")


def test_cuda(cuda):
    conversions("cuda:0")


def test_cpu():
    """In a process whose address space has an end."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",  # stacks of threads take addresses too
        "PYTHONPATH": os.pathsep.join([str(Path(sparse24.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def limited_main() -> None:
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIB, used + 2 * GIB))
    torch.set_num_threads(1)
    conversions("cpu")
    copies_and_buffers()


if __name__ == "__main__":
    limited_main()
