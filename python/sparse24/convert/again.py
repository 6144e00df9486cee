"""A call with few tokens like one before it: what held then is compared, and not found out again.

A step of decoding makes such a call in each layer, and there the host counts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse24.convert.conversion import Conversion, Weights
from sparse24.convert.weights import ADAPTERS
from sparse24.mlp.choice import few_tokens
from sparse24.ops.few_tokens import MAX_TOKENS
from sparse24.ops.forward_mode import in_forward_mode, in_torch_func

_op = torch.ops.sparse24.relu2_mlp_few


class FewCall(NamedTuple):
    """What ran: `relu2_mlp_few` with a copy of the second weight by neuron."""

    layers: tuple[nn.Module, nn.Module]
    parameters: tuple[int | None, ...]  # the identity of each of both: weight, bias
    dtypes: tuple[torch.dtype, torch.dtype]  # of x, and of the first weight as it is stored
    place: tuple[torch.device, int]  # and the index of the device
    width: int
    most: int  # elements of x
    first: Tensor | None  # a float8 copy of the first weight
    scales: tuple[Tensor | None, Tensor | None]
    rows: Tensor
    threshold: float


def remember(
    module: Any, conversion: Conversion, x: Tensor, first: Weights, second: Weights, rows: Tensor, threshold: float
) -> None:
    """Keep what a call ran with; `first` and `second` are as they enter, with nothing added or pruned."""
    layers = module._modules.get(conversion.up.name), module._modules.get(conversion.down.name)
    stored = first.stored, second.stored
    record = module._copies
    if record is None or any(
        layer is None or layer._parameters.get("weight") is not t for layer, t in zip(layers, stored, strict=True)
    ):
        return
    width, d_ff, d_out = conversion.sizes
    most = few_tokens(d_ff, d_out, fp8=first.scale is not None) if x.is_cuda else MAX_TOKENS
    record.call = FewCall(
        layers,  # type: ignore[arg-type]
        tuple(None if t is None else id(t) for t in (first.stored, first.bias, second.stored, second.bias)),
        (x.dtype, first.stored.dtype),
        (x.device, x.get_device()),
        width,
        most * width,
        None if first.weight is first.stored else first.weight,
        (first.scale, second.scale),
        rows,
        threshold,
    )


def run_again(module: Any, conversion: Conversion, x: Any) -> Tensor | None:
    """Run a call as the one that was kept, if it is alike; the children are as at conversion."""
    record = module.__dict__.get("_copies")
    call: FewCall | None = None if record is None else record.call
    if call is None or torch.is_grad_enabled() or type(x) is not Tensor:
        return None
    up, down = call.layers
    modules = module._modules
    if modules.get(conversion.up.name) is not up or modules.get(conversion.down.name) is not down:
        return None
    of_up, of_down = up._parameters, down._parameters
    w1, b1, w2, b2 = of_up.get("weight"), of_up.get("bias"), of_down.get("weight"), of_down.get("bias")
    for t, seen in zip((w1, b1, w2, b2), call.parameters, strict=True):
        if seen != (None if t is None else id(t)):
            return None
    device, place = call.place
    if (
        w1 is None
        or w2 is None
        or ADAPTERS[0] in module._parameters
        or x.dtype != call.dtypes[0]
        or w1.dtype != call.dtypes[1]
        or x.get_device() != place
        or w1.get_device() != place
        or not 0 < x.numel() <= call.most
        or x.shape[-1:] != (call.width,)
        or "_hf_hook" in up.__dict__
        or not record.holds((w2,) if call.first is None else (w1, w2))
        or torch.is_autocast_enabled(device.type)
        or in_torch_func()
        or in_forward_mode()
        or torch.jit.is_tracing()  # which compares the calls of a module by their lines
    ):
        return None
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, w1 if call.first is None else call.first, call.rows, b1, b2, *call.scales, call.threshold)
