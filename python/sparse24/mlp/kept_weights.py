"""What products take of weights, float8 codes in both orders or packed 2:4, made once for all micro-batches of a step.

A weight that has a gradient when it is used again is accumulating one, so that it is not to change before the optimizer
has seen it. What is made of it is then kept, from the first micro-batch of the steps after the first one that
accumulated; a training that never accumulates keeps nothing, and needs no memory for it. So do weights that FSDP2
gathers, whose gradients are elsewhere.

What is kept is of a tensor, its version and its address: whatever writes to the weight or replaces its memory makes
them anew. A step of any optimizer of torch drops all of it, since fused ones write without a new version. Steps by hand
write through ``weight.data``, where nothing is seen, but then they zero the gradient: one that is not as the last
backward pass left it is of another step. Only what is written so between the micro-batches of a step is not seen. What
is traced or captured makes it in each call: its weights may change with nobody asking.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from sparse24._optimizer_steps import after_each_step
from sparse24.mlp.arguments import PLAIN, Packed
from sparse24.mlp.gathered_weight import GatheredWeight
from sparse24.ops import prune_pack_fp8_both, prune_quantize_fp8_both, quantize_fp8_both
from sparse24.ops.forward_mode import in_torch_func


class BothOrders(NamedTuple):
    """The codes of a weight and its transpose, with one scale; that which products take so is packed.

    Without the transpose the backward pass makes it, of codes that FSDP2 gathers again.
    """

    values: Tensor | Packed
    transposed: Tensor | Packed | None
    scale: Tensor


class _Kept(NamedTuple):
    state: tuple[Any, ...]
    form: Any
    beside: Callable[[], Tensor | None]  # what the weight was packed together with

    def is_of(self, state: tuple[Any, ...], beside: Tensor | None) -> bool:
        return self.state == state and self.beside() is beside


class _Left(NamedTuple):
    hook: RemovableHandle
    gradient: int = 0  # its identity
    version: int = -1


#: Of each weight its forms, by what they are.
_kept = WeakIdKeyDictionary()
_accumulating = False
#: Of each weight what `keeps` told of a version of it.
_told = WeakIdKeyDictionary()
#: Of each weight its gradient as the last backward pass left it, and the hook that looks.
_left = WeakIdKeyDictionary()


def both_orders(
    w: Tensor, prune: int | None = None, scale: Tensor | None = None, *, packs: int | None = None
) -> BothOrders:
    """Quantise a weight, pruned along a dimension; `packs`: pack what is 2:4 along that one, before or by that.

    Those of experts have three dimensions, and a scale each.
    """
    if packs is not None:
        values, meta, other, scale, _ = prune_pack_fp8_both(w, scale, packs)
        packed = Packed(values, meta)
        return BothOrders(packed, other, scale) if packs == -1 else BothOrders(other, packed, scale)
    if prune is None:
        values, transposed, scale, _ = quantize_fp8_both(w, scale)
    else:
        values, transposed, scale, _ = prune_quantize_fp8_both(w, scale, prune)
    return BothOrders(values, transposed, scale)


def codes_of(
    stored: Tensor, cast: Tensor, dim: int | None = None, prune: int | None = None, *, packs: int | None = None
) -> BothOrders | None:
    """Give the codes of a weight in the dtype of the step, kept or made; None where the step is to make them.

    `dim`: along which dimension the weight was pruned, if it was. `prune`: along which it is to be. `packs`: along
    which they are packed.
    """
    if type(stored) is GatheredWeight and dim is None and prune is None and stored.dtype == cast.dtype:
        return BothOrders(stored.codes, stored.transposed, stored.scale)

    def make() -> BothOrders:
        return both_orders(cast, prune, packs=packs)

    codes: BothOrders | None = kept_form(stored, cast.dtype, ("codes", dim, prune, packs), make)
    return codes


def kept_form(
    stored: Tensor, dtype: torch.dtype, what: Hashable, make: Callable[[], Any], beside: Tensor | None = None
) -> Any:
    """Give a form of a weight in the dtype of the step, kept or made; None where it is not to be kept.

    `beside`: a parameter that is a part of the form too.
    """
    global _accumulating
    if torch.compiler.is_compiling() or not may_accumulate(stored):  # most training: nothing else is asked
        return None
    if not _may_keep(stored) or not (beside is None or _may_keep(beside)):
        return None
    _accumulating = _accumulating or stored.grad is not None
    if not _accumulating:
        return None
    accumulates = _is_as_left(stored) and (beside is None or _is_as_left(beside))
    state = _state(stored, dtype) + (() if beside is None else _state(beside, dtype))
    forms = {name: kept for name, kept in _kept.get(stored, {}).items() if kept.is_of(state, beside)}
    found = forms.pop(what, None) if accumulates else None
    if found is None:
        forms.pop(what, None)
        _kept[stored] = forms  # what is dropped goes before others take its memory's place
        with torch.no_grad():
            found = _Kept(state, make(), _nothing if beside is None else weakref.ref(beside))
        after_each_step(_drop_all)
        for w in (stored,) if beside is None else (stored, beside):
            _watch_gradient(w)
    _kept[stored] = {**forms, what: found}
    return found.form


def may_accumulate(*stored: Tensor) -> bool:
    """Tell whether forms of weights may be kept: a training accumulates, or has begun to."""
    if _accumulating:
        return True
    for w in stored:
        if w.is_leaf and w.grad is not None:
            return True
    return False


def keeps(stored: Tensor) -> bool:
    """Tell whether forms of a weight are kept: a call that makes one serves others after it, or is served.

    It is the same until the weight changes, because what is computed again in a backward pass has to run as it did.
    """
    global _accumulating
    if not _may_keep(stored):
        return False
    _accumulating = _accumulating or stored.grad is not None
    version, told = _told.get(stored, (None, False))
    if version != stored._version:
        told = _accumulating
        _told[stored] = stored._version, told
        after_each_step(_drop_all)
    return bool(told)


def forget(stored: Tensor) -> None:
    """Drop what is kept of a weight."""
    _kept.pop(stored, None)
    _told.pop(stored, None)
    left = _left.pop(stored, None)
    if left is not None:
        left.hook.remove()


def _nothing() -> None:
    return None


def _drop_all(_optimizer: torch.optim.Optimizer) -> None:
    _kept.clear()
    _told.clear()
    for left in list(_left.values()):
        left.hook.remove()
    _left.clear()


def _watch_gradient(w: Tensor) -> None:
    """See to it that `_is_as_left` can tell, from the next backward pass on."""
    if w not in _left:
        _left[w] = _Left(w.register_post_accumulate_grad_hook(_look))


def _look(w: Tensor) -> None:
    if w in _left and w.grad is not None:
        _left[w] = _left[w]._replace(gradient=id(w.grad), version=w.grad._version)


def _is_as_left(w: Tensor) -> bool:
    """Whether a weight accumulates: nothing has touched its gradient since a backward pass added to it."""
    left = _left.get(w)
    return left is not None and w.grad is not None and (left.gradient, left.version) == (id(w.grad), w.grad._version)


def _may_keep(w: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(w) not in PLAIN:
        return False
    if not (w.is_leaf and w.requires_grad) or w.is_inference() or in_torch_func():
        return False
    return not (w.is_cuda and torch.cuda.is_current_stream_capturing())


def _state(w: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """Give what a weight is, and the stream: on another one what is made of it may not be there yet."""
    stream = torch.cuda.current_stream(w.device).cuda_stream if w.is_cuda else 0
    return w._version, w.data_ptr(), w.shape, w.stride(), dtype, stream
