"""The delayed scales of a module whose training step is float8 throughout: a buffer, and what the host knows of it.

The buffer [4] is float32 whatever the module is cast to, and zeros until a backward pass has written it: 0 is a scale
that is not known. While there is one, steps use exact scales. Whether there is one the host has to read from the
device. An eager forward pass does so until all are known, and ever more rarely: where no step writes them, as with one
frozen weight, they never are. What is traced or captured cannot, and takes what was known before: `refresh` reads for
it, which `sparse24.Schedule` calls, and the steps of torch's optimizers do.

Each rank keeps its own scales: gradients of different batches saturate at different magnitudes, and nothing is gained
by waiting for the others. DDP broadcasts buffers unless it is told not to; the room above the largest magnitude of a
step before covers the difference of ranks.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparse24._optimizer_steps import after_each_step
from sparse24.mlp import Precision
from sparse24.mlp.gathered_weight import in_backward
from sparse24.recipe import Recipe

#: What modules have beside the buffer, and its default: whether all of its scales are known, and how many eager forward
#: passes with gradients found that they were not.
ATTRIBUTES = {"scales_known": False, "calls_with_unknown_scales": 0}


#: Modules whose scales nobody has found to be known: the name of the buffer, and after how many steps of optimizers.
_unknown: WeakKeyDictionary[nn.Module, tuple[str, int]] = WeakKeyDictionary()
#: Of modules whose scales are not known: the version of the scales at first, that and the weights' when no pass was
#: open, and the eager forward passes since then.
_passes: WeakKeyDictionary[nn.Module, tuple[int, int, int, int]] = WeakKeyDictionary()


def wanted(precision: Precision, recipe: Recipe | None, features: int) -> bool:
    """Tell whether the steps of a network of so many input features use delayed scales."""
    return precision == "fp8" and (Recipe() if recipe is None else recipe).has_fp8_weight_gradients(features)


def register(
    module: Any, name: str, precision: Precision, recipe: Recipe | None, features: int, *, persistent: bool
) -> None:
    """Give a module the buffer if its steps use one, on the device of its first parameter."""
    parameter = next(module.parameters(), None)
    scales = (
        torch.zeros(4, device=None if parameter is None else parameter.device)
        if wanted(precision, recipe, features)
        else None
    )
    module.register_buffer(name, scales, persistent=persistent)
    _passes.pop(module, None)
    watch(module, name)


def watch(module: Any, name: str) -> None:
    """Have steps of optimizers look for the scales of a module that may not be known: a new one, or a copy."""
    if module._buffers.get(name) is not None and not module.scales_known:
        _unknown[module] = name, 0
        after_each_step(_look)


def _look(_optimizer: torch.optim.Optimizer) -> None:
    """Look, ever more rarely, whether a step of training has written the scales: compiled ones do not look."""
    if torch.compiler.is_compiling():
        return
    for module, (name, steps) in list(_unknown.items()):
        scales = module._buffers.get(name)
        if scales is None or module.scales_known:
            del _unknown[module]
        elif not (scales.is_cuda and torch.cuda.is_current_stream_capturing()):
            _unknown[module] = name, steps + 1
            if steps & (steps + 1) == 0:
                refresh(module, name)


def refresh(module: Any, name: str) -> bool:
    """Read from the device whether all scales are known, and remember it. It waits for the device."""
    scales = getattr(module, name, None)
    known = scales is not None and not scales.is_meta and bool((scales > 0).all())
    if known and not module.scales_known:
        module.scales_known = True
    elif module.scales_known and not known:  # of a state from before the first step
        forget(module, name)
    return known


def for_step(module: Any, name: str) -> tuple[Tensor | None, bool]:
    """Give the arguments `delayed_scales` and `scales_known` of `sparse24.relu2_mlp` for the next call."""
    scales = module._buffers.get(name)
    if scales is None or scales.is_meta:  # weights may have got memory without it
        return None, False
    known = module.scales_known
    if not known and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        capturing = scales.is_cuda and torch.cuda.is_current_stream_capturing()
        # What is computed again in a backward pass has the scales of the first time, or none as then.
        if not capturing and not in_backward() and not _others_are_open(module, scales):
            module.calls_with_unknown_scales += 1
            calls = module.calls_with_unknown_scales
            known = calls & (calls - 1) == 0 and refresh(module, name)
    return scales, known


def _others_are_open(module: nn.Module, scales: Tensor) -> bool:
    """Count a forward pass, and tell whether the backward pass of an earlier one may be still to come.

    As in a pipeline, where that one would be computed again with scales that it did not have. A backward pass writes
    the scales: as long as none has, there is nothing to find. A pass that has none is over once the weights change.
    """
    if scales.is_inference():  # which count no changes
        return False
    now = scales._version
    of_weights = sum(0 if p.is_inference() else p._version for p in module.parameters())
    first, closed, weights, passes = _passes.get(module, (now, now, of_weights, 0))
    if of_weights != weights or now - closed >= passes:
        closed, passes = now, 0
    _passes[module] = first, closed, of_weights, passes + 1
    return passes > 0 and now != first


def keep(module: nn.Module, name: str, before: Tensor | None) -> None:
    """After `module._apply`: float32 and the same scales, whatever it has done to them; zeros instead of none."""
    after = module._buffers.get(name)
    if before is None or after is None or after is before:
        return
    if not before.is_meta:
        module._buffers[name] = before.to(after.device)
        return
    module._buffers[name] = torch.zeros(4, device=after.device)
    forget(module, name)


def forget(module: Any, name: str) -> None:
    """Begin anew with scales that are zeros again: steps look for them as those of a new module do."""
    for attribute, default in ATTRIBUTES.items():
        setattr(module, attribute, default)
    _passes.pop(module, None)
    watch(module, name)
