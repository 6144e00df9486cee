"""Autocast, which the network follows once and then switches off, and autograd."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switch autocast off, where it is on: the dtypes here are chosen one by one."""
    # Not torch.amp.is_autocast_available: Dynamo of torch 2.11 cannot trace it.
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def without_autograd() -> AbstractContextManager[Any]:
    """Pass autograd by, of calls that nothing differentiates: its kernels cost the host as much as an op."""
    return nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()
