"""Devices and dtypes of the suite: every test of an op runs on the CPU and, where there is a GPU, on it."""

import os

# cuBLAS is deterministic, which `poisoned_memory` turns on, only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
import torch.distributed as dist
from data import DTYPES

from sparse24.mlp import choice

# The tensors are small: a second thread gains little, and waits long for the first where the machine is busy.
torch.set_num_threads(1)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
#: Of two processes: on the CPU, and on a GPU each.
BACKENDS = [
    pytest.param("gloo", marks=needs_gloo),
    pytest.param("nccl", marks=[pytest.mark.gpu, needs_gpus]),
]
#: Of one process.
ONE_PROCESS = [pytest.param("gloo", marks=needs_gloo), pytest.param("nccl", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture(params=["cpu", "meta", CUDA])
def checked_device(request) -> str:
    """Where wrong arguments are refused: on every device, and in the same words by the fake functions."""
    return request.param


@pytest.fixture(params=[CUDA])
def cuda(request) -> str:
    """The device of tests that are about CUDA only."""
    return request.param


@pytest.fixture
def not_by_few_tokens(monkeypatch) -> None:
    """On CUDA as on the CPU: no dense network runs as `relu2_mlp_dense`, for what is about the other ways."""
    monkeypatch.setattr(choice, "_dense", {})
    monkeypatch.setattr(choice, "_found", {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=DTYPES, ids=_name)
def dtype(request, device) -> torch.dtype:
    """float32, bfloat16, float16."""
    if device == "cuda" and request.param == torch.float32:
        pytest.skip("float32 is for the CPU only")
    return request.param


@pytest.fixture(params=(torch.float16, torch.float32), ids=_name)
def root_dtype(request, device) -> torch.dtype:
    """What roots of the activation can be stored as."""
    if device == "cuda" and request.param == torch.float32:
        pytest.skip("float32 is for the CPU only")
    return request.param


@pytest.fixture(params=(*DTYPES, torch.float8_e4m3fn), ids=_name)
def values_dtype(request, device) -> torch.dtype:
    """What values can be stored as."""
    if device == "cuda" and request.param == torch.float32:
        pytest.skip("float32 is for the CPU only")
    return request.param


@pytest.fixture(params=[-1, -2], ids=["features", "tokens"])
def dim(request) -> int:
    return request.param


@pytest.fixture(params=["none", "relu", "relu2"])
def activation(request) -> str:
    return request.param


@pytest.fixture
def poisoned_memory():
    """Every fresh tensor holds NaN (bytes: 255), so that what an op does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="module", params=ONE_PROCESS)
def alone(request) -> str:
    """What one process uses that is a group by itself."""
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """What two processes of a program that is started by itself use: on the CPU, or on a GPU each."""
    return request.param


@pytest.fixture(scope="session", params=BACKENDS)
def ranks(request, tmp_path_factory):
    """Two processes for the functions of `distributed_worker`."""
    from distributed_worker import Ranks

    ranks = Ranks(tmp_path_factory.mktemp("ranks"), request.param)
    yield ranks
    ranks.close()
