"""FLOPs of the products, as `torch.utils.flop_counter` counts them: those of the dense products that they stand for."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch

_NAME = "torch.utils.flop_counter"


def _linear(x: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``x @ w.T``."""
    return 2 * x[0] * x[1] * w[0]


def _gradient(grad: torch.Size, w: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """Count ``grad @ w``."""
    return 2 * grad[0] * grad[1] * w[1]


def _mm(_values: torch.Size, _meta: torch.Size, b: torch.Size, *_args: Any, out_shape: Any, **_kwargs: Any) -> int:
    """Count ``A @ b`` with the dense A."""
    return 2 * b[0] * prod(out_shape)


def register() -> None:
    """Register the formulas, now or when the counter is imported: it imports Triton, where there is one."""
    if _NAME in sys.modules:
        _register(sys.modules[_NAME])
    else:
        sys.meta_path.insert(0, _Finder())


def _register(flop_counter: ModuleType) -> None:
    ops = torch.ops.sparse24
    for targets, formula in (
        ([ops.linear_compress, ops.linear_relu2], _linear),
        ([ops.linear_gradient, ops.linear_relu2_gradient], _gradient),
        ([ops.mm], _mm),
    ):
        flop_counter.register_flop_formula(targets)(formula)


class _Finder(MetaPathFinder):
    """Finds the counter as Python does, and once."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
