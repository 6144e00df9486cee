"""Copies of weights in the form that inference wants, beside the weights themselves: by neuron, or in float8.

They are buffers of the module outside of its state_dict, and follow the weights: whoever uses them asks first whether
the weights have changed in place, by their version counters, and then they are made again. Weights that are other
tensors than at that time (sharded, or replaced) make them useless.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Sources = tuple[Tensor, ...]

_live: "weakref.WeakSet[WeightCopies]" = weakref.WeakSet()


class WeightCopies:
    """What a module's copies were made of.

    A copy of it knows nothing: copied modules make theirs again.

    Attributes
    ----------
    fresh : bool
        False once an optimizer has changed the weights since. Compiled graphs guard on it, because they cannot look at
        version counters.
    """

    def __init__(self) -> None:
        self.fresh = False
        self.seen: tuple[tuple[Any, int, int], ...] = ()
        _live.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCopies, ()

    def note(self, sources: Sources) -> None:
        """Take the copies for those of `sources` as they are now."""
        self.seen = tuple((weakref.ref(t), _version(t), t.data_ptr()) for t in sources)
        self.fresh = True

    def unchanged(self, sources: Sources) -> bool:
        """Whether nothing has been written to `sources` since."""
        return len(self.seen) == len(sources) and all(
            ref() is t and t._version == version and t.data_ptr() == pointer
            for (ref, version, pointer), t in zip(self.seen, sources, strict=True)
        )

    def are_of(self, sources: Sources) -> bool:
        """Whether they are of these tensors, whatever these held then."""
        return len(self.seen) == len(sources) and all(
            ref() is t for (ref, *_), t in zip(self.seen, sources, strict=True)
        )


def versions_problem(weight: Tensor) -> str | None:
    """Why changes of a weight would go unseen."""
    return "made in inference mode, where tensors count no versions" if weight.is_inference() else None


@torch.no_grad()
def put_copies(module: nn.Module, copies: WeightCopies, made: Mapping[str, Tensor], sources: Sources) -> None:
    """Make `made`, of `sources`, the copies of a module: in place where there are some, which graphs may have captured."""
    with torch.inference_mode(False):
        for name, value in made.items():
            old = module._buffers.get(name)
            if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
                old.copy_(value)
            else:
                module._buffers[name] = value.detach().clone(memory_format=torch.contiguous_format)
                module._non_persistent_buffers_set.add(name)
    copies.note(sources)
    _watch_optimizers()


def drop_copies(module: nn.Module, names: tuple[str, ...]) -> None:
    """Remove them."""
    for name in names:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)


def bytes_of(module: nn.Module, names: tuple[str, ...]) -> int:
    """Count what they take."""
    found = [module._buffers.get(name) for name in names]
    return sum(t.numel() * t.element_size() for t in found if t is not None)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


_watching: list[Any] = []


def _watch_optimizers() -> None:
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_after_step))


def _after_step(*_: Any) -> None:
    for copies in list(_live):
        if copies.fresh and any((t := ref()) is None or _version(t) != version for ref, version, _ in copies.seen):
            copies.fresh = False
