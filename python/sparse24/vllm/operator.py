"""The op that stands in vLLM's graphs: opaque to its compiler, so that the number of tokens decides at each call.

vLLM traces a model once, for any number of tokens, and drops guards: a comparison of tokens in traced code would hold
for ever. What depends on it stands in an op, as vLLM's own attention and experts do, and in captured CUDA graphs each
size keeps what ran when it was captured.
"""

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from sparse24.vllm.network import Network

_NAME = "sparse24_network"


def call(network: Network, key: str, x: Tensor, scale_x: Tensor | None, with_bias: bool) -> Tensor:
    """Put the op into the graph that is being traced, or call it."""
    op = getattr(torch.ops.vllm, _NAME)
    return op(x, scale_x, network.d_out, network.dtype, with_bias, _encode_layer_name(key))


def define() -> None:
    """Define the op, once in a process."""
    if not hasattr(torch.ops.vllm, _NAME):
        direct_register_custom_op(op_name=_NAME, op_func=_run, fake_impl=_fake)


def _run(
    x: Tensor, scale_x: Tensor | None, d_out: int, dtype: torch.dtype, with_bias: bool, layer_name: LayerNameType
) -> Tensor:
    # Names are those of one engine: two models in a process have their own tables.
    network = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return network(x, scale_x, with_bias)


def _fake(
    x: Tensor, scale_x: Tensor | None, d_out: int, dtype: torch.dtype, with_bias: bool, layer_name: LayerNameType
) -> Tensor:
    return x.new_empty((x.shape[0], d_out), dtype=dtype)
