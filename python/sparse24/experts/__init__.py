"""Squared-ReLU experts: many feed-forward networks, each for its own rows of one matrix.

    y = 2:4 of max(x @ w1[e].T, 0)^2         e is the expert of the row
    out = row_scale * (y @ w2[e].T)

On CUDA all experts run together, and where their rows begin is data that the host never reads. On the CPU they run one
after another, as `relu2_mlp` (`sparse24.experts.reference`).
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from sparse24._autocast import without_autocast, without_autograd
from sparse24._options import boolean
from sparse24._symbolic import or_true
from sparse24.experts.arguments import Arguments
from sparse24.experts.checks import check_columns, check_float8, check_operands, check_recipe, check_row_scale, fail
from sparse24.experts.choice import pays, trains_in_float8
from sparse24.experts.forward import activation, output
from sparse24.experts.function import Experts
from sparse24.experts.products import readable
from sparse24.experts.pruning import pruned
from sparse24.experts.reference import options_of, relu2_experts_reference
from sparse24.experts.step_fp8 import ExpertsFp8, of_step, runs_float8
from sparse24.format import FEATURES, FP8
from sparse24.mlp import Precision
from sparse24.mlp.arguments import Plan
from sparse24.mlp.kept_weights import keeps
from sparse24.ops.activation import RELU2
from sparse24.ops.forward_mode import in_torch_func, refuse_tangents
from sparse24.recipe import Recipe

_DEFAULT_RECIPE = Recipe()


def relu2_experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    *,
    row_scale: Tensor | None = None,
    precision: Precision = "auto",
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    recipe: Recipe | None = None,
    sparse: bool = True,
) -> Tensor:
    """``row_scale * (max(x @ w1[e].T, 0)^2 @ w2[e].T)``, e the expert of each row, with the activation pruned to 2:4.

    What ``relu2_mlp(x[a:b], w1[e], w2[e], min_tokens=0)`` gives for the rows a to b of each expert, times their
    factors. The host does not wait for the device and never learns how many rows an expert has: a call can be captured
    in a CUDA graph and replayed with other offsets.

    On CUDA it runs dense, at the same precision and without pruning, with few rows per expert on average
    (`sparse24.experts.pays`), and where F is not a multiple of 16 (16-bit) or 32 (fp8); and with `sparse` False.

    Training in fp8 quantises the weights in each step, or once for all micro-batches whose gradients accumulate; a byte
    of each weight is held for the backward pass. On CUDA a call with gradients whose products gain less than that takes
    runs in 16 bits instead: with few rows per expert (`sparse24.experts.trains_in_float8`), dense, or in float16.

    Parameters
    ----------
    x : Tensor [S, D]
        Rows sorted by expert. bfloat16 or float16; on the CPU also float32. Under autocast x and the weights are cast
        to the autocast dtype.
    w1 : Tensor [E, F, D]
        The first weights, each as `torch.nn.Linear` stores it. Any floating dtype: float32 master weights are cast to
        x's dtype, and get their gradients in float32. float8_e4m3fn needs `w1_scale`.
    w2 : Tensor [E, D_out, F]
        The second weights, likewise.
    offsets : Tensor [E]
        int32, on x's device: where the rows of each expert end, as `offs` of torch._grouped_mm. They ascend, and an
        expert without rows repeats the number before it. Rows from the last one on belong to no expert: they give
        zeros and get gradients of zero, and may hold anything, NaN too, in x and in the gradient. On the CPU other
        offsets are refused. On CUDA nothing can refuse them, and what they give is not defined.
    row_scale : Tensor [S], optional
        A factor for each row of the result, such as the router's weight: float32 or of x's dtype. Rows are multiplied
        before they are rounded, or once more after it.
    precision : {"auto", "16bit", "fp8"}
        As in `sparse24.relu2_mlp`.
    w1_scale : Tensor [E, F] or [E], optional
        Dequantising multipliers of float8 weights, float32: one for each row, or one for each expert.
    w2_scale : Tensor [E, D_out] or [E], optional
        Likewise.
    recipe : Recipe, optional
        How the backward pass treats the direction of the rows; groups of them are formed within an expert. Default:
        ``Recipe()``. `reuse_mask` must be True. Weights that it makes 2:4 are pruned in each call, and multiplied as
        dense matrices. On CUDA the products over rows are dense and exact.
    sparse : bool
        False: dense at the same precision.

    Returns
    -------
    Tensor [S, D_out]
        Of x's dtype (or the autocast dtype).

    Raises
    ------
    RuntimeError
        ``sparse24.relu2_experts: expected <argument> <rule>, got <value>``. D, F and D_out have to be multiples of 16
        in fp8, and of 8 on CUDA.

    Notes
    -----
    Differentiable once with respect to x, w1, w2 and row_scale; float8 weights get no gradient. An expert without rows
    gets zeros. On CUDA float16 goes through torch's products for it, which wait for the device.

    Examples
    --------
    >>> x, offsets = torch.randn(6, 8), torch.tensor([4, 4, 6], dtype=torch.int32)
    >>> w1, w2 = torch.randn(3, 32, 8), torch.randn(3, 8, 32)
    >>> out = sparse24.relu2_experts(x, w1, w2, offsets)
    >>> torch.testing.assert_close(out[:4], sparse24.relu2_mlp(x[:4], w1[0], w2[0]))
    """
    scales = {"w1_scale": w1_scale, "w2_scale": w2_scale}
    return experts_network(
        x, w1, w2, offsets, row_scale=row_scale, precision=precision, **scales, recipe=recipe, sparse=sparse
    )


def experts_network(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    *,
    row_scale: Tensor | None,
    precision: Precision,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    recipe: Recipe | None,
    sparse: bool,
    min_rows: int | None = None,
) -> Tensor:
    """Run `relu2_experts`; with `min_rows` it is that number of rows from which it runs sparse on CUDA."""
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else getattr(x, "dtype", None)
    check_operands(x, w1, w2, offsets, dtype)
    check_row_scale(row_scale, x, dtype)
    fp8 = check_float8(precision, w1, w2, w1_scale, w2_scale)
    recipe = _DEFAULT_RECIPE if recipe is None else recipe
    check_recipe(recipe)
    if type(sparse) is not bool:
        boolean("relu2_experts", "sparse", sparse)
    stored: tuple[Tensor, Tensor] | None = w1, w2
    if recipe.sparse_weights != "none" and sparse:
        w1, w2 = pruned(recipe.sparse_weights, w1, w2, w2_scale)
        stored = None  # what is kept follows the weights alone
    if in_torch_func():
        fail("no transform of torch.func (relu2_mlp has them)", "one")
    if not torch.compiler.is_compiling():
        refuse_tangents("relu2_experts", (x, w1, w2, row_scale))
        if torch.jit.is_tracing():
            fail("no torch.jit.trace (torch.export has them)", "one")

    x, w1, w2 = (t if t.dtype in (dtype, FP8) else t.to(dtype) for t in (x, w1, w2))
    recorded = torch.is_grad_enabled()
    needed = [recorded and t is not None and t.requires_grad for t in (x, w1, w2, row_scale)]
    experts, features, _ = w1.shape
    with without_autocast(device_type):
        if not x.is_cuda:
            operands = x, w1, w2, row_scale, offsets, w1_scale, w2_scale
            return relu2_experts_reference(*operands, fp8, sparse, *options_of(recipe), needed)
        check_columns(w1, w2, fp8)
        x, w1, w2 = readable(x), readable(w1), readable(w2)
        learns, tensors = any(needed), (x, w1, w2, row_scale, offsets, w1_scale, w2_scale)

        def planned(fp8: bool) -> Arguments:
            runs_sparse = sparse and features % FEATURES[fp8] == 0 and _enough(x.shape[0], experts, fp8, min_rows)
            plan = Plan(RELU2, fp8, runs_sparse, roots=learns and dtype == torch.float16 and not fp8)
            return Arguments(*tensors, plan)

        arguments = planned(fp8)
        if fp8 and learns and w1_scale is None:
            kept = stored is not None and all(keeps(w) for w in stored)
            if runs_float8(arguments) and trains_in_float8(x.shape[0], experts, kept=kept):
                return ExpertsFp8.apply(*of_step(arguments, stored))
            arguments = planned(fp8=False)
        return grouped(arguments, learns)


def _enough(rows: int, experts: int, fp8: bool, min_rows: int | None) -> bool:
    return pays(rows, experts, fp8=fp8) if min_rows is None else or_true(rows >= min_rows)


def grouped(arguments: Arguments, learns: bool) -> Tensor:
    """Run all experts together."""
    if learns:
        return Experts.apply(*arguments)
    with nullcontext() if torch.compiler.is_compiling() else without_autograd():
        return output(arguments, activation(arguments))
