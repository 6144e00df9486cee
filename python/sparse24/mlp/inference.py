"""The network for inference as modules call it: with as little on the host as the checks allow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparse24._autocast import without_autograd
from sparse24.format import FEATURES
from sparse24.mlp.arguments import PLAIN, Weight
from sparse24.mlp.choice import leaves_open, may_be_few, pays, runs_dense_few, runs_few
from sparse24.ops.activation import RELU2
from sparse24.ops.few_tokens import MAX_TOKENS, relu2_mlp_few
from sparse24.ops.forward_mode import in_forward_mode, in_torch_func
from sparse24.ops.network import relu2_mlp_dense, relu2_mlp_sparse
from sparse24.recipe import Recipe

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def learns(*tensors: Tensor | None) -> bool:
    """Whether a call with these is differentiated."""
    if torch.is_grad_enabled():
        for t in tensors:  # `any` with a generator takes the host twice as long
            if t is not None and t.requires_grad:
                return True
    return False


def inferred(
    x: Tensor,
    first: Weight,
    second: Weight,
    rows: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    *,
    precision: str,
    recipe: Recipe | None,
    scale_y: Tensor | None,
    scale_y_factor: Tensor | None,
    threshold: float,
    min_tokens: int | None,
    sparse: bool,
    ran: Callable[[Callable[..., Tensor], Tensor, tuple[Any, ...]], None] | None = None,
) -> Tensor | None:
    """Compute what `relu2_mlp` does, where that is one op, or dense with few tokens, and nothing has to be cast.

    None otherwise, for whatever reason: then `relu2_mlp` is to be called. The same of what does not fit, which it
    refuses in its own words.

    Parameters
    ----------
    x : Tensor
        A plain tensor; the call is not differentiated, and not traced.
    first, second : Weight
        w1 and w2, with their scales where they are float8.
    rows : Tensor, optional
        `w2_rows`, with the scale of the second weight.
    b1, b2, precision, recipe, scale_y, scale_y_factor, threshold, min_tokens, sparse
        As in `relu2_mlp`.
    ran
        Is told which op ran, where one did: with x and w1, the second weight that it got, and what came behind that.
    """
    w1, w2 = first.values, second.values
    dtype, device = x.dtype, x.device.type
    fp8 = first.scale is not None
    if (
        dtype not in _DTYPES
        or device not in ("cpu", "cuda")
        or torch.is_autocast_enabled(device)
        or (dtype == torch.float32 and x.is_cuda)
        or fp8 != (second.scale is not None)
        or precision == ("16bit" if fp8 else "fp8")
        or (recipe is not None and recipe.sparse_weights != "none")
        or x.is_nested
        or not (scale_y is None or (fp8 and isinstance(scale_y, Tensor)))
    ):
        return None
    if not fp8 and not (w1.dtype == w2.dtype == dtype and (rows is None or rows.dtype == dtype)):
        return None
    if (b1 is not None and b1.dtype != dtype) or (b2 is not None and b2.dtype != dtype):
        return None
    place = x.get_device()
    if w1.get_device() != place or w2.get_device() != place or (rows is not None and rows.get_device() != place):
        return None
    d_ff, d = w1.shape
    if d == 0 or x.dim() == 0 or x.shape[-1] != d or in_torch_func() or in_forward_mode():
        return None
    tokens, d_out = x.numel() // d, w2.shape[0]
    few = rows is not None and may_be_few(tokens)
    if few and runs_few(tokens, d_ff, d_out, fp8=fp8, is_cuda=x.is_cuda):
        further = b1, b2, first.scale, second.scale, threshold
        with without_autograd():
            out = relu2_mlp_few(x, w1, rows, *further)
        if ran is not None:
            ran(relu2_mlp_few, rows, further)
        return out

    if tokens == 0 or x.dim() == 1 or w2.shape[1] != d_ff:
        return None
    if fp8:
        if d % 16 or d_out % 16 or (b1 is not None and dtype != torch.bfloat16) or not _is_number(scale_y, place):
            return None
    elif scale_y is not None or scale_y_factor is not None:
        return None
    further = b1, b2, first.scale, second.scale, scale_y, scale_y_factor, threshold
    if leaves_open(tokens, min_tokens, sparse) and runs_dense_few(tokens, d, d_ff, d_out, fp8=fp8, is_cuda=x.is_cuda):
        with without_autograd():
            out = relu2_mlp_dense(x, w1, w2, *further)
        if ran is not None:
            ran(relu2_mlp_dense, w2, further)
        return out
    if min_tokens is not None:
        enough = tokens >= min_tokens
    else:
        one_scale = scale_y is not None and second.scale is not None and second.scale.numel() == 1
        enough = not x.is_cuda or pays(tokens, d_ff, d_out, fp8=fp8, one_scale=one_scale)
    if few or not enough:
        if fp8 or enough or min_tokens is not None or tokens > MAX_TOKENS or threshold != 0:
            return None
        return dense(x, w1, w2, b1, b2)
    if sparse is not True or d_ff % FEATURES[fp8] != 0:
        return None
    with without_autograd():
        out = relu2_mlp_sparse(x, w1, w2, *further)
    if ran is not None:
        ran(relu2_mlp_sparse, w2, further)
    return out


def dense(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> Tensor:
    """Compute the network with few tokens by torch's functions, without gradients.

    On CUDA torch has a product with the ReLU behind it: then one kernel squares, in place of two that read and write
    the activation. Weights of other types get the usual ones, and modes that look at operators: those that count FLOPs.
    """
    tokens = x.numel() // w1.shape[1]
    usual = type(w1) not in PLAIN or torch._C._len_torch_dispatch_stack() > 0
    if not x.is_cuda or tokens <= _FEWEST or usual:
        return linear(RELU2(linear(x, w1, b1)), w2, b2)
    rows = x if x.dim() == 2 else x.reshape(tokens, w1.shape[1])
    root = torch._addmm_activation(_no_bias(w1) if b1 is None else b1, rows, w1.t())
    out = linear(root.square(), w2, b2)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], w2.shape[0])


#: Up to so many tokens torch's plain product is another kernel, and none was measured with the ReLU behind it.
_FEWEST = 8
_zeros: dict[tuple[int, torch.dtype, int], Tensor] = {}


def _no_bias(w1: Tensor) -> Tensor:
    """Return zeros for the rows of w1, made once: a kernel that fills them takes as long as what is saved."""
    key = w1.shape[0], w1.dtype, w1.get_device()
    found = _zeros.get(key)
    if found is None:
        found = w1.new_zeros(w1.shape[0])
        if not torch.cuda.is_current_stream_capturing():  # a graph fills them only when it is replayed
            torch.cuda.current_stream(w1.device).synchronize()  # other streams find them filled
            _zeros[key] = found
    return found


def _is_number(scale: Tensor | None, place: int) -> bool:
    """Whether a scale is missing, or one float32 number on the device."""
    if scale is None:
        return True
    if not isinstance(scale, Tensor) or scale.is_nested:
        return False
    return scale.numel() == 1 and scale.dtype == torch.float32 and scale.get_device() == place
