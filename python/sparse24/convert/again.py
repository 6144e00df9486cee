"""A call for inference like one before it: what held then is compared, and not found out again.

A step of decoding makes such a call in each layer, and there the host counts. In a model all of it comes from cold
caches, so there is little of it: one function compares what is known of the module.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse24._C import unchanged
from sparse24.convert.conversion import Conversion, Weights
from sparse24.convert.seen import trains
from sparse24.convert.unchanged import Facts, facts_of
from sparse24.format import FP8
from sparse24.ops.few_tokens import relu2_mlp_few
from sparse24.ops.forward_mode import in_forward_mode
from sparse24.ops.network import relu2_mlp_dense, relu2_mlp_sparse

# Looked up once: torch has thousands of names, and in a model their places in its dictionary are cold.
_is_grad_enabled, _is_inference_mode_enabled = torch.is_grad_enabled, torch.is_inference_mode_enabled
_is_autocast_enabled, _tracing_state = torch.is_autocast_enabled, torch._C._get_tracing_state
_is_in_torch_func, _BelowAutograd = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd
#: What is called in the end, by the functions that call it.
_BELOW: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    relu2_mlp_few: torch.ops.sparse24.relu2_mlp_few.default._op,
    relu2_mlp_sparse: torch.ops.sparse24.relu2_mlp_sparse.default._op,
    relu2_mlp_dense: torch.ops.sparse24.relu2_mlp_dense.default._op,
}
#: Shapes of x that are kept, of a module: as many as there are batches of few tokens.
_MOST = 64


class KeptCall(NamedTuple):
    """What ran: an op, with copies of the weights."""

    op: Callable[..., Tensor]
    state: dict[str, Any]  # the module's: a replica's is another one
    facts: Facts
    up: dict[str, Tensor]  # parameters of the layers
    down: dict[str, Tensor]
    dtypes: tuple[torch.dtype, torch.dtype]  # of x, and of the first weight as it is stored
    place: tuple[str, int]  # the type of the device and its index
    first: Tensor | None  # a float8 copy of the first weight
    second: Tensor
    others: tuple[Any, ...] | None  # biases and what is behind them, up to the last that is not as if left out


def remember(
    module: Any,
    conversion: Conversion,
    x: Tensor,
    first: Weights,
    second: Weights,
    op: Callable[..., Tensor],
    operand: Tensor,
    others: tuple[Any, ...],
) -> None:
    """Keep what `inferred` ran with; `first` and `second` are as they enter, with nothing added or pruned."""
    record = module._copies
    layers = module._modules.get(conversion.up.name), module._modules.get(conversion.down.name)
    stored = first.stored, second.stored
    if record is None or any(
        layer is None or layer._parameters.get("weight") is not t for layer, t in zip(layers, stored, strict=True)
    ):
        return
    few = op is relu2_mlp_few
    if not few and (
        FP8 in (first.stored.dtype, second.stored.dtype) or (op is relu2_mlp_sparse and first.scale is None)
    ):
        return
    facts = facts_of(module, conversion, () if few else ("sparse",))
    if facts is None or not record.holds(stored[1:] if first.weight is first.stored else stored):
        return
    while others and (others[-1] is None or (not isinstance(others[-1], Tensor) and others[-1] == 0)):
        others = others[:-1]  # each argument takes the host as long as a check
    if len(record.calls) == _MOST:
        record.calls.clear()
    record.calls[x.shape] = KeptCall(
        _BELOW[op],
        module.__dict__,
        facts,
        *(layer._parameters for layer in layers),  # type: ignore[union-attr]
        (x.dtype, first.stored.dtype),
        (x.device.type, x.get_device()),
        None if first.weight is first.stored else first.weight,
        operand,
        others or None,
    )


def run_again(module: Any, conversion: Conversion, x: Any) -> Tensor | None:
    """Run a call as the one that was kept, if it is alike."""
    state = module.__dict__
    record = state.get("_copies")
    if record is None or type(x) is not Tensor or _is_grad_enabled():
        return None
    call: KeptCall | None = record.calls.get(x.shape)
    if call is None or call.state is not state or not unchanged(call.facts):
        return None
    w1, first = call.up["weight"], call.first
    device, place = call.place
    if (
        x.dtype != call.dtypes[0]
        or w1.dtype != call.dtypes[1]
        or x.get_device() != place
        or w1.get_device() != place
        or record.stepped
        or not record.seen[-1].is_still(call.down["weight"])
        or not (first is None or record.seen[0].is_still(w1))
        or _is_autocast_enabled(device)
        or _is_in_torch_func()
        or in_forward_mode()
        or _tracing_state() is not None  # of torch.jit, which compares calls of a module by their lines
        or (not conversion.in_training and trains(module))
    ):
        return None
    w1 = w1 if first is None else first
    others = call.others
    if _is_inference_mode_enabled():  # below autograd already
        return call.op(x, w1, call.second) if others is None else call.op(x, w1, call.second, *others)
    with _BelowAutograd():
        return call.op(x, w1, call.second) if others is None else call.op(x, w1, call.second, *others)
