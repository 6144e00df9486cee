"""Copies of weights in a form that inference wants, beside the weights: by neuron, or in float8.

They are buffers of the module outside of its state_dict, and follow the weights. Whoever uses them asks first whether
something was written to the weights, which count their versions, and then they are made again. They are of no use
where the weights are other tensors than then: replaced, or gathered by FSDP for a while, without a new version.

A compiled graph cannot ask. It is asked for while it is traced, and guards on what is known of optimizers.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sparse24._optimizer_steps import after_each_step
from sparse24._symbolic import exporting
from sparse24.mlp.kept_weights import forget
from sparse24.nn.children import warn_once


class Copies(NamedTuple):
    """What to make: the copies by the names of their buffers, and the weights that they are of."""

    make: Callable[[], Mapping[str, Tensor]]
    sources: tuple[Tensor, ...]


class _Seen(NamedTuple):
    """A weight as it was: which tensor, and what it held.

    Its memory is what is referred to, not the tensor. torch swaps no tensor to which there are weak references, as it
    does where a layer is loaded or cast; an identity alone may come again, but not that of memory that is referred to.
    """

    tensor: int
    base: int
    storage: StorageWeakRef  # keeps the address beside it from being that of another one
    address: int
    version: int
    pointer: int

    @staticmethod
    def of(t: Tensor) -> "_Seen":
        storage = StorageWeakRef(t.untyped_storage())
        return _Seen(id(t), id(t._base), storage, storage.cdata, t._version, t.data_ptr())

    def is_still(self, t: Tensor) -> bool:
        """Whether nothing was written to the tensor, which is the same."""
        return (
            t.data_ptr() == self.pointer and t._version == self.version and t.untyped_storage()._cdata == self.address
        )


class Record:
    """What the weights were when the copies were made.

    Attributes
    ----------
    fresh : bool
        False if an optimizer has changed the weights since, or they are others. It is kept in the module, as
        ``_copies_fresh``, None without copies: that is all of a record that graphs read, see `numbered` of conversions.
    stepped : bool
        Whether an optimizer that has them has made a step since, which fused ones write without a new version; or they
        are `outdate`d.
    calls : dict
        What calls with the copies can be compared with by the next ones: whoever makes them knows what they are.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], sources: tuple[Tensor, ...]) -> None:
        self._module = weakref.ref(module)
        self.fresh, self.stepped, self.names = True, False, names
        self.calls: dict[Any, Any] = {}
        self.seen = tuple(map(_Seen.of, sources))
        _live.add(self)
        after_each_step(_after_step)

    @property
    def fresh(self) -> bool:
        """Whether the copies may be used."""
        module: Any = self._module()
        return module is not None and module._copies_fresh is True

    @fresh.setter
    def fresh(self, value: bool) -> None:
        module = self._module()
        if module is not None and module.__dict__.get("_copies_fresh") is not value:  # a write has guards evaluated
            module.__dict__["_copies_fresh"] = value

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether the copies are of these tensors, whatever these held."""
        return len(self.seen) == len(sources) and all(
            seen.tensor == id(t) for seen, t in zip(self.seen, sources, strict=True)
        )

    def holds(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether the copies are of these tensors as they are now."""
        found = self.seen
        if self.stepped or not found or len(found) != len(sources):
            return False
        for i, t in enumerate(sources):  # not `all`, whose generator takes the host as long again; nor a strict `zip`
            seen = found[i]
            if seen.tensor != id(t) or not seen.is_still(t):
                return False
        return True

    def look(self, stepped: set[int]) -> None:
        """Look what a step of an optimizer, which has these tensors, has done to the weights."""
        if any(seen.tensor in stepped or seen.base in stepped for seen in self.seen):
            self.fresh, self.stepped = False, True
        elif self.fresh:
            module = self._module()
            there = {} if module is None else {id(t): t for t in (*module.parameters(), *module.buffers())}
            self.fresh = all(seen.tensor in there and seen.is_still(there[seen.tensor]) for seen in self.seen)


_live: "weakref.WeakSet[Record]" = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer) -> None:
    stepped = {id(t) for group in optimizer.param_groups for t in group["params"]}
    for record in list(_live):
        record.look(stepped)


def put_copies(module: Any) -> None:
    """Make the copies that `_what_to_copy` of a module tells: in place where there are some, which graphs may hold."""
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first switches gradients on
        found: Copies | None = module._what_to_copy()
        if found is None or _is_gathered(module) or any(t.is_meta or t.is_inference() for t in found.sources):
            drop_copies(module)
            if found is not None and any(t.is_inference() for t in found.sources):
                warn_once(
                    module, "no copies of weights are kept that were made in inference mode: they count no changes"
                )
            return
        made = found.make()
        record = module.__dict__.get("_copies")
        for name in () if record is None else set(record.names) - made.keys():  # of which none is needed any more
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        for name, value in made.items():
            old = module._buffers.get(name)
            if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
                old.copy_(value)
            else:
                module._buffers[name] = value.clone(memory_format=torch.contiguous_format)
                module._non_persistent_buffers_set.add(name)
        module.__dict__["_copies"] = Record(module, tuple(made), found.sources)


def _is_gathered(module: nn.Module) -> bool:
    """Whether FSDP gathers weights for each call: without a new version, and into memory that it has used before."""
    return any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules())


def let_go(module: nn.Module) -> None:
    """Let go of the weights before they are replaced: torch swaps no tensor to which there are weak references."""
    for t in module.parameters():
        forget(t)


def renew_when_loaded(module: nn.Module) -> None:
    """Have the copies made again whenever a state was loaded."""
    if _after_loading not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_after_loading)


def stop_renewing(module: nn.Module) -> None:
    """Undo `renew_when_loaded`."""
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _after_loading]:
        del hooks[key]


def _after_loading(module: Any, _keys: Any) -> None:
    put_copies(module)


def outdate(module: nn.Module) -> None:
    """Have the copies made again before they are used: what is made of the weights is something else now."""
    record = module.__dict__.get("_copies")
    if record is not None:
        record.fresh, record.stepped = False, True


def drop_copies(module: nn.Module) -> None:
    """Remove them."""
    record = module.__dict__.pop("_copies", None)
    module.__dict__.pop("_copies_fresh", None)
    for name in () if record is None else record.names:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)


def follow(module: Any, sources: tuple[Tensor, ...]) -> bool:
    """Whether there are copies that hold what the weights do, made again where these have changed in place.

    While a compiler traces, it is what `follow_traced` of the module's class found.
    """
    if torch.compiler.is_compiling():
        if module._copies_fresh is not None:
            module._follow_traced()
        return bool(module._copies_fresh)
    record = module._copies
    if record is None:
        return False
    if record.holds(sources):
        record.fresh = True  # they may have been others for a while
        return True
    return _renewed(module, record, sources)


def _renewed(module: Any, record: Record, sources: tuple[Tensor, ...]) -> bool:
    if not record.is_of(sources):
        record.fresh = False
        return False
    put_copies(module)
    return module._copies is not None


def _follow_traced(module: Any) -> bool:
    """Follow while a graph is traced: a method of the modules, which runs there and then and leaves no trace."""
    record = module._copies
    if record.fresh and not exporting():  # there weights are fake
        sources = module._what_to_copy().sources
        if not record.holds(sources):
            _renewed(module, record, sources)
    return True


# As `torch.compiler.assume_constant_result` marks it, which takes seconds to import. Dynamo finds it by its name.
_follow_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
follow_traced = _follow_traced


def bytes_of_copies(module: nn.Module) -> int:
    """Count what they take."""
    record = module.__dict__.get("_copies")
    return sum(module._buffers[name].nbytes for name in (() if record is None else record.names))


def without_copies(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Give the state of a module for a copy or a file: copies of the weights are made again from these."""
    record = module.__dict__.get("_copies")
    if record is None:
        return state
    state = {name: value for name, value in state.items() if name not in ("_copies", "_copies_fresh")}
    state["_buffers"] = {name: t for name, t in state["_buffers"].items() if name not in record.names}
    state["_non_persistent_buffers_set"] = state["_non_persistent_buffers_set"] - set(record.names)
    return state


def is_by_neuron(w: Tensor) -> bool:
    """Whether a second weight [D_out, F] is stored [F, D_out] already, so that it needs no copy."""
    return w.stride(0) == 1 and w.stride(1) == w.shape[0]
