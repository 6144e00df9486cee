"""What was built, and where it runs."""

import importlib.util
import os
import platform
import sys
from typing import IO, Any

import torch

from sparse24 import _C


def build_info() -> dict[str, Any]:
    """Tell what this build contains and what it finds.

    Returns
    -------
    dict
        version, cuda (kernels were compiled), cuda_archs, cuda_version (of nvcc), cutlass, compiler, torch_target (the
        oldest torch that loads the op library), torch (the one that is running), device (of this machine).
    """
    return {**_C.build_info(), "torch": torch.__version__, "device": _device()}


def cuda_problem() -> str | None:
    """Why the kernels cannot run on this machine, in one sentence; None if they can."""
    info = _C.build_info()
    if not torch.cuda.is_available():
        return f"torch finds no CUDA device{_why_no_device()}"
    if not info["cuda"]:
        return "this build has no CUDA kernels (SPARSE24_CUDA=OFF, or no nvcc was found)"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"built for sm_{info['cuda_archs']}, this device is sm_{major}{minor}"
    return None


def _why_no_device() -> str:
    if torch.version.cuda is None:
        return f": torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"


def summary() -> str:
    """Tell in words what was built, and what runs on this machine.

    Returns
    -------
    str
        Two sentences.
    """
    info, problem = _C.build_info(), cuda_problem()
    kernels = f"with kernels for sm_{info['cuda_archs']} by CUDA {info['cuda_version']}"
    built = kernels if info["cuda"] else "without kernels"
    runs = "Tensors on its GPU run the kernels, those on the CPU the reference, which is right and slow."
    if problem is not None:
        runs = f"Here every operation runs as its reference on the CPU, which is right and slow: {problem}."
    return f"sparse24 {info['version']} was built {built}. {runs}"


def abilities() -> dict[str, str]:
    """Tell in words what runs on this machine, and what the rest lacks.

    Returns
    -------
    dict
        Sentences, by what they are about: operations on each device, the commands, and their option --plot.
    """
    problem = cuda_problem()

    def needs(package: str) -> str:
        found = importlib.util.find_spec(package) is not None
        return "runs" if found else f"does not run: {package} is not installed"

    return {
        "operations on the GPU": "run as kernels" if problem is None else f"do not run: {problem}",
        "operations on the CPU": "run as the reference: right, and slow",
        "sparse24 demo": "runs" if problem is None else "runs on the CPU, and times nothing",
        "sparse24 analyze": needs("transformers"),
        "sparse24 bench": "runs" if problem is None else "does not run: it measures a GPU",
        "--plot": needs("matplotlib"),
    }


def print_env(file: IO[str] | None = None) -> None:
    """Print `build_info` and the surroundings: what a bug report needs.

    Parameters
    ----------
    file : file object, optional
        Default: standard output.
    """
    facts = {
        **build_info(),
        "torch built for CUDA": torch.version.cuda or "no",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("SPARSE24_")}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {'none' if value == '' else value}", file=file or sys.stdout)


def print_mm_configs(file: IO[str] | None = None) -> None:
    """Print the tile configurations that the sparse GEMM chooses from, by dtype of the values.

    Parameters
    ----------
    file : file object, optional
        Default: standard output.
    """
    columns = ("dtype", "tile M x N x K", "cluster M")
    rows = [
        (dtype, f"{config['tile_m']} x {config['tile_n']} x {config['tile_k']}", str(config["cluster_m"]))
        for dtype in ("bfloat16", "float16", "float8_e4m3fn")
        for config in _C.mm_configs(dtype)
    ]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(map(str.ljust, row, widths)).rstrip(), file=file or sys.stdout)


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs)"
