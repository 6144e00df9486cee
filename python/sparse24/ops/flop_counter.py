"""FLOPs of the products, as `torch.utils.flop_counter` counts them: those of the dense products that they stand for."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch._ops import OpOverloadPacket

_NAME = "torch.utils.flop_counter"
Formula = Callable[..., int]

#: What waits for the counter to be imported.
_waiting: list[tuple[OpOverloadPacket, Formula]] = []


def register(op: OpOverloadPacket, formula: Formula) -> None:
    """Register a formula, now or when the counter is imported: it imports Triton, where there is one."""
    if _NAME in sys.modules:
        sys.modules[_NAME].register_flop_formula(op)(formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting.append((op, formula))


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
                for op, formula in _waiting:
                    module.register_flop_formula(op)(formula)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
