"""The squared-ReLU feed-forward network, put together from the ops.

    values, meta = 2:4 of max(x @ w1.T + b1, 0)^2    one kernel: `linear_compress`
    out = 2:4 @ w2.T + b2                            sparse GEMM: `mm`

Then the activation is never stored dense; in fp8 `quantize_fp8` of x comes before, and unless the activation's scale
is given, one pass over the compressed values converts them. Without fusion a dense GEMM and a pass over its result
(`compress`, `compress_fp8`) take the first line's place. The backward pass is in `sparse24.mlp.backward`.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24._autocast import without_autocast, without_autograd
from sparse24._options import boolean, whole_number
from sparse24._symbolic import known, or_true
from sparse24.format import FEATURES, FP8
from sparse24.mlp.arguments import DENSE, PLAIN, Arguments, Packed, Plan, Weight
from sparse24.mlp.checks import (
    check_adapters,
    check_delayed_scales,
    check_operands,
    check_packed,
    check_scale_y,
    check_scale_y_factor,
    check_tensors,
    check_training,
    check_w2_rows,
    fail,
    is_fp8,
)
from sparse24.mlp.choice import DEFAULT_MIN_PRODUCTS as DEFAULT_MIN_PRODUCTS
from sparse24.mlp.choice import FEW_TOKENS as FEW_TOKENS
from sparse24.mlp.choice import few_tokens as few_tokens
from sparse24.mlp.choice import may_be_few, runs_dense_few, runs_few
from sparse24.mlp.choice import pays as pays
from sparse24.mlp.float8 import float8_weight, linear_fp8
from sparse24.mlp.forward import activation, output
from sparse24.mlp.function import FeedForward
from sparse24.mlp.inference import dense
from sparse24.mlp.inference import learns as differentiated
from sparse24.mlp.packed_weights import Packs, entering, packed_pays, with_adapters
from sparse24.mlp.step_fp8 import FeedForwardFp8, has_products, of_step, runs_float8
from sparse24.mlp.step_fp8_whole import WholeStepFp8, runs_whole
from sparse24.mlp.transforms import run_few_transformed, run_transformed
from sparse24.mlp.usual_step import stepped
from sparse24.mlp.weights import check_groups, pruned_weights
from sparse24.ops import quantize_fp8, relu2_mlp_dense, relu2_mlp_few
from sparse24.ops.activation import RELU2, ActivationFunction, threshold_of
from sparse24.ops.few_tokens import MAX_TOKENS
from sparse24.ops.forward_mode import in_forward_mode, in_torch_func, is_mapped_alone
from sparse24.recipe import Recipe

Precision = Literal["auto", "16bit", "fp8"]

_DEFAULT_RECIPE = Recipe()


def relu2_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    precision: Precision = "auto",
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    scale_y: Tensor | None = None,
    scale_y_factor: Tensor | None = None,
    min_tokens: int | None = None,
    fused: bool = True,
    recipe: Recipe | None = None,
    hot_features: Tensor | None = None,
    recompute: bool = False,
    sparse: bool = True,
    threshold: float = 0,
    w2_rows: Tensor | None = None,
    delayed_scales: Tensor | None = None,
    scales_known: bool = True,
    weights_pruned: bool = False,
    w1_packed: tuple[Tensor, ...] | None = None,
    adapters: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``max(x @ w1.T + b1, 0)^2 @ w2.T + b2`` with the activation pruned to 2:4 along its features.

    Of each four neighbouring features of a token the two largest are kept. Where 90 % are zeros, independent of each
    other, that drops 1 % of the non-zeros, at random initialisation 19 %. Trained layers differ: train dense first, and
    measure each with `sparse24.activation_stats`.

    It runs dense, at the same precision and without pruning, where the sparse product does not pay or does not fit:
    with too few tokens (`min_tokens`), and where F is not a multiple of 16 (16-bit) or 32 (fp8); and with `sparse`
    False, which is the warm-up of training.

    Parameters
    ----------
    x : Tensor [..., D]
        bfloat16 or float16; on the CPU also float32, which the float32 reference ops serve. Under autocast x, weights
        and biases are cast to the autocast dtype, on every device. Any rank from 1, any number of tokens.
    w1 : Tensor [F, D]
        As `torch.nn.Linear` stores it. Any floating dtype: a float32 master weight is cast to x's dtype, and gets its
        gradient in float32. float8_e4m3fn needs `w1_scale`.
    w2 : Tensor [D_out, F]
        Likewise.
    b1, b2 : Tensor [F], Tensor [D_out], optional
        Biases.
    precision : {"auto", "16bit", "fp8"}
        "16bit" computes in x's dtype. "fp8" quantises x, the activation and (unless they are float8) the weights to
        float8_e4m3fn with one scale per row, by the largest magnitude; the pre-activation in between is rounded to
        bfloat16. "auto" is "fp8" for float8 weights, else "16bit". Quantise weights once for inference
        (`sparse24.quantize_fp8`, `sparse24.nn.ReLU2MLP.quantize_`): in the call it costs a pass over both.
    w1_scale, w2_scale : Tensor, optional
        Dequantising multipliers of float8 weights, float32, one per row or a single one.
    scale_y : Tensor, optional
        fp8 only: the dequantising multiplier of the activation, float32, one per token or a single one (see `scale_out`
        of `sparse24.linear_compress`). What exceeds 448 times it saturates. Default: computed per token, which costs a
        pass over the activation.
    scale_y_factor : Tensor [1], optional
        fp8 only, instead of `scale_y`: predict it as ``factor * |x_t|^2`` (`sparse24.quantize_fp8_predict`), which
        costs nothing. `sparse24.bounding_factor` gives one with which nothing saturates.
    min_tokens : int, optional
        Fewer tokens run dense. Default: 0 on the CPU; on CUDA so many that the second GEMM has
        `sparse24.mlp.DEFAULT_MIN_PRODUCTS` multiply-adds, such as 299 tokens in 16 bits for D = 4096 and F = 16384;
        fp8 with a scale per row runs sparse up to `sparse24.mlp.FEW_TOKENS` tokens too. `sparse24.mlp.pays` tells which
        a call runs. The comparison is a Python one on shapes: constant for static shapes, guards for dynamic ones.
        A compiled graph for a number that depends on data (``x[mask]``) runs sparse.
    fused : bool
        True: the first GEMM writes the (compressed) activation itself, and the dense one never reaches memory. False:
        GEMM, then a compressing pass, which is slower but for some sizes of fp8. In sparse fp8 with neither `scale_y`
        nor `scale_y_factor` that saves one rounding of the activation, to bfloat16.
    recipe : Recipe, optional
        What is sparse beside the activation: the products over tokens of the backward pass, and the weights. Default:
        ``Recipe()``.
    hot_features : Tensor [H], optional
        int64: the features whose weight gradients are dense, H = ``recipe.hot_features(F)``. They may be those of an
        earlier step. Nothing can refuse what lies on a device: repeated indices and those that are not from 0 to F - 1
        give their places to the lowest features that are not among the others. Default: chosen in the backward pass,
        from counts in a sample of tokens, without synchronisation.
    recompute : bool
        Save x and the weights only, and run the first GEMM again in the backward pass. The same bits; dense in 16 bits
        the same up to the rounding of one product.
    sparse : bool
        False: dense at the same precision, with weights that are not pruned.
    threshold : float
        Finite, from 0: the activation is zero where the pre-activation does not exceed it, ``y = h^2 where h >
        threshold``; so is the gradient. What is kept is not shifted. It is compared in float32 with h as it is rounded.
    w2_rows : Tensor [F, D_out], optional
        w2 once more, by neuron: ``w2.t().contiguous()``, float8 (with `w2_scale`) where w2 is, else of any floating
        dtype. With it, few tokens without gradients run through `sparse24.relu2_mlp_few`: exactly, in x's dtype,
        whatever `sparse` and `min_tokens` say, and without reading the rows of neurons that are zero. Up to
        `sparse24.mlp.few_tokens` tokens are few on CUDA, 64 on the CPU; what lies between those two numbers runs dense.
        Nothing can tell whether it holds what w2 does: keep them equal.
    delayed_scales : Tensor [4], optional
        Where all six products of a training step are float8 (`Recipe.fp8_weight_gradients`): the scales of x, y, the
        output's gradient and that of the pre-activation, float32. They are used, and the backward pass replaces them by
        those of the next step: twice what the largest magnitudes ask for, and not less than half of what they were.
        What exceeds them saturates, until the next step has followed. Default: exact scales, for which both dense
        products run twice. `sparse24.nn.ReLU2MLP` keeps such a tensor.
    scales_known : bool
        False: `delayed_scales` are only written, and this call's are exact: the first step.
    weights_pruned : bool
        Where `recipe` has 2:4 weights: w1, w2 and `w2_rows` are as they enter the products, and are not pruned again.
        Nothing tells whether that is so.
    w1_packed : tuple of Tensor, optional
        With `weights_pruned`: w1 once more, the values and metadata that `sparse24.prune_pack24` makes of it. The first
        product multiplies them where that is faster. Nothing can tell whether they are w1's. Without gradients in 16
        bits adapters may be a part of w1, but not of what is packed: `sparse24.mlp.packed_weights` has their columns
        beside it, and a third tensor is the right one, [rank, D].
    adapters : tuple of Tensor, optional
        The first weight is ``w1 + left @ right`` of these, left [F, rank] and right [rank, D], both of w1's dtype; w1
        alone is pruned. Where the pruned weight is packed, in 16 bits, left is packed beside it and ``x @ right.T``
        stands beside x: one product with float32 sums. Otherwise their sum is multiplied, of both in the dtype of the
        step.

    Returns
    -------
    Tensor [..., D_out]
        Of x's dtype (or the autocast dtype).

    Raises
    ------
    RuntimeError
        ``sparse24.relu2_mlp: expected <argument> <rule>, got <value>``. fp8 needs D, F and D_out to be multiples of 16.

    Notes
    -----
    Differentiable once with respect to x, weights and biases. Where it runs sparse, four of the six GEMMs of a training
    step are sparse::

        y2  = 2:4 of max(x @ w1.T + b1, 0)^2         its pattern is used everywhere: dropped entries get no gradient
        dy2 = grad @ w2                              dense; dy1 = dy2 * 2 sqrt(y2)
        out = y2 @ w2.T, dx = dy1 @ w1               sparse along features
        dw2 = grad.T @ y2, dw1 = dy1.T @ x           sparse along tokens: `Recipe` says what that drops

    In float16 the roots ``max(x @ w1.T + b1, 0)`` are kept instead of their squares, dense too: below 1e-2 squares have
    few digits there, and below 2e-4 none, which would be the derivative's. One pass over what is kept squares it.

    Of the hidden layer the values and their metadata are saved: 1.125 bytes per feature and token in 16 bits and 0.625
    in fp8, where an unfused dense network saves 4. Sums over tokens are in float32, and every gradient is rounded once
    to x's dtype.

    In fp8 y2 is, in the backward pass, the dequantised activation rounded to x's dtype, in dw2 and in the root. dx is a
    float8 product of dy1 (one scale per token) and w1 (one per column). The rest is in x's dtype, and the derivative of
    rounding is taken as 1. float8 weights get no gradient. Where weight gradients are float8 too
    (`Recipe.fp8_weight_gradients`, the default from D = 768 on), every operand has one scale, in both passes.

    Derivatives beyond that of a backward pass: where it runs dense in bfloat16 or float32 without `recompute`, all that
    torch has, forward mode without a compiler. Elsewhere second derivatives (``create_graph=True``) and forward mode
    raise. `torch.func.grad`, `vjp`, `jacrev` and `vmap` give what a backward pass gives, samples one after another;
    inside of one compiled graph (``fullgraph=True``) these derivatives raise too.

    Source: Haziza et al. 2025, arXiv 2503.16672.
    """
    if delayed_scales is not None and scales_known is True and precision == "fp8" and not torch.compiler.is_compiling():
        usual = w1_scale is w2_scale is scale_y is scale_y_factor is hot_features is w2_rows is w1_packed is None
        if usual and adapters is None and fused is True and recompute is False and type(weights_pruned) is bool:
            made = stepped(x, w1, w2, b1, b2, delayed_scales, recipe, min_tokens, sparse, threshold)
            if made is not None:
                return made
    check_tensors(x, w1, w2)
    device_type = x.device.type
    autocast = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    check_operands(x, w1, w2, b1, b2, dtype)
    fp8 = is_fp8(precision, w1, w2, w1_scale, w2_scale)
    if min_tokens is not None and not (isinstance(min_tokens, (int, torch.SymInt)) and min_tokens >= 0):
        min_tokens = whole_number("relu2_mlp", "min_tokens", min_tokens)
    recipe = _DEFAULT_RECIPE if recipe is None else recipe
    check_training(recipe, hot_features, w1, fp8, recompute)
    if not type(fused) is type(recompute) is type(sparse) is type(scales_known) is type(weights_pruned) is bool:
        flags = {"fused": fused, "recompute": recompute, "sparse": sparse, "scales_known": scales_known}
        for name, flag in {**flags, "weights_pruned": weights_pruned}.items():
            boolean("relu2_mlp", name, flag)
    above = threshold_of("relu2_mlp", threshold)
    if adapters is not None:
        check_adapters(adapters, w1, w1_packed)
    if recipe.sparse_weights != "none":
        check_groups(recipe, w1, w2)
    double_pruned = sparse and recipe.double_pruning
    compiling = torch.compiler.is_compiling()
    transformed = in_torch_func() or (not compiling and in_forward_mode())
    tokens = x.unsqueeze(0) if x.dim() == 1 else x if x.dim() == 2 and not compiling else x.flatten(0, -2)
    # While compiling always: Dynamo knows what requires a gradient in torch.func of results alone.
    tokens = tokens.to(dtype) if compiling or x.dtype != dtype else tokens
    learns = differentiated(tokens, w1, w2, b1, b2, *(adapters or ()))
    # All six products of a step that learns both weights are to be float8.
    six_float8 = fp8 and recipe.has_fp8_weight_gradients(w1.shape[1])
    steps_in_float8 = six_float8 and learns and w1.requires_grad and w2.requires_grad
    inference = not (learns or transformed)
    check_scale_y(scale_y, tokens, fp8)
    check_scale_y_factor(scale_y_factor, scale_y, tokens, fp8)
    check_delayed_scales(delayed_scales, tokens)
    if w1_packed is not None:
        check_packed(w1_packed, w1)
    exactly = few = False  # where few tokens are
    if w2_rows is not None:
        check_w2_rows(w2_rows, w2)
        exactly = inference or not (learns or compiling or in_forward_mode()) and is_mapped_alone(x, w1, w2, b1, b2)
        few = exactly and runs_few(tokens.shape[0], *w2_rows.shape, fp8=w1_scale is not None, is_cuda=x.is_cuda)
    if min_tokens is not None:
        enough = or_true(tokens.shape[0] >= min_tokens)
    else:
        one_scale = w2_scale is not None and scale_y is not None and w2_scale.numel() == scale_y.numel() == 1
        kinds = {"fp8": fp8, "one_scale": one_scale, "step": steps_in_float8}
        enough = not x.is_cuda or pays(tokens.shape[0], w1.shape[0], w2.shape[0], **kinds)
    if exactly and enough:
        enough = not may_be_few(tokens.shape[0])

    stored, packs, first_packed, second_packed, right = (w1, w2), Packs(), None, None, None
    packs_codes = False, False
    prunes: tuple[int | None, int | None] = (None, None)
    pruned = recipe.weight_groups() if sparse and not weights_pruned else (None, None)
    sparse = sparse and enough and w1.shape[0] % FEATURES[fp8] == 0
    if pruned != (None, None):
        if transformed or recipe.double_pruning or w1_scale is not None or w2_scale is not None:
            w1, w2, w2_rows = pruned_weights(recipe, Weight(w1, w1_scale), Weight(w2, w2_scale), w2_rows)
            w1 = with_adapters(w1, adapters)
        else:
            own = scale_y is None and scale_y_factor is None
            float8 = steps_in_float8 and sparse and own and has_products(recipe)  # where `runs_float8` will say so
            if sparse and fused:
                kinds = {"fp8": fp8, "float8_step": float8, "learns": learns}
                packs = Packs.of(recipe, tokens.shape[0], w1, w2, adapters, **kinds)
                packs_codes = packs.first and fp8, packs.second and float8
            if float8 and w1.dtype == w2.dtype == dtype and adapters is None:
                prunes = pruned[0], None if pruned[1] is None else -2
            else:
                of_16 = Packs(packs.first and not fp8, packs.second and not float8)
                entered = entering(recipe, w1, w2, w2_rows, dtype, of_16, adapters)
                w1, w2, w2_rows, first_packed, second_packed, right = entered
    elif adapters is not None:
        w1 = with_adapters(w1, adapters)
    elif w1_packed is not None and sparse and fused and not transformed:
        if w1_packed[0].dtype == (FP8 if fp8 else dtype) and packed_pays(w1_packed, tokens):
            first_packed, right = Packed(*w1_packed[:2]), (*w1_packed[2:], None)[0]
    if adapters is not None:
        stored = w1, w2  # what is kept for the micro-batches of a step follows the weights alone
    if few:
        if w1_scale is None:
            w1, w2_rows = _cast(w1, dtype), _cast(w2_rows, dtype)
        b1, b2 = _cast(b1, dtype), _cast(b2, dtype)
        with without_autograd():
            run_few = run_few_transformed if transformed else relu2_mlp_few
            return run_few(_cast(x, dtype), w1, w2_rows, b1, b2, w1_scale, w2_scale, above)
    free = inference and fused and (min_tokens is None or not sparse)
    if free and type(w1) in PLAIN and type(w2) in PLAIN and fp8 == (w1_scale is not None):
        sizes = tokens.shape[0], w1.shape[1], *w2.t().shape
        if runs_dense_few(*sizes, fp8=fp8, is_cuda=x.is_cuda) and fp8 == (w2_scale is not None):
            w1, w2 = (w1, w2) if fp8 else (_cast(w1, dtype), _cast(w2, dtype))
            b1, b2 = _cast(b1, torch.bfloat16 if fp8 else dtype), _cast(b2, dtype)
            scales = w1_scale, w2_scale, scale_y, scale_y_factor
            with without_autograd():
                return relu2_mlp_dense(_cast(x, dtype), w1, w2, b1, b2, *scales, above)
    plain = inference and not enough and min_tokens is None and known(tokens.shape[0] <= MAX_TOKENS)
    if plain:
        fused = fused and fp8  # torch's functions are the faster ones
    # Differentiable casts: float32 master weights get float32 gradients.
    w1 = w1 if w1_scale is not None else _cast(w1, dtype)
    w2 = w2 if w2_scale is not None else _cast(w2, dtype)
    b1, b2 = _cast(b1, torch.bfloat16 if fp8 else dtype), _cast(b2, dtype)
    roots = learns and dtype == torch.float16 and not fp8
    function = RELU2 if above == 0 else ActivationFunction("relu2", above)
    recipe = recipe if sparse else DENSE
    again = recompute or not recipe.reuse_mask
    plan = Plan(function, fp8, sparse, fused, roots, again, six_float8, double_pruned, *packs_codes, prunes)
    as_one = learns and (fp8 or sparse or recompute or roots or double_pruned)
    if transformed:
        if not (fp8 or sparse):  # torch's ops, which have all derivatives
            plan, as_one, transformed = Plan(function), False, False
        elif compiling and as_one:  # Dynamo would make a second derivative zero
            fail("no derivative of torch.func inside of torch.compile with fullgraph=True", "one")
    scales = w1_scale, w2_scale, scale_y, scale_y_factor
    packed = *(first_packed or (None, None)), right, *(second_packed or (None, None))
    arguments = Arguments(tokens, w1, w2, b1, b2, *scales, hot_features, *packed, plan, recipe)
    if learns and not compiling and torch.jit.is_tracing():  # its check calls again, without gradients
        fail("no gradients where torch.jit.trace runs (torch.no_grad)", "tensors that require one")
    with without_autocast(device_type):
        if transformed and not compiling:
            out = run_transformed(*arguments)
        elif plain and not (fp8 or compiling or torch.jit.is_tracing()) and above == 0 and tokens.shape[1] > 0:
            with without_autograd():
                out = dense(tokens, w1, w2, b1, b2)
        elif as_one and runs_float8(arguments):
            step = of_step(arguments, delayed_scales, scales_known, stored, pruned)
            out = WholeStepFp8.apply(*step) if runs_whole(step) else FeedForwardFp8.apply(*step)
        elif as_one:
            out = FeedForward.apply(*arguments)
        else:
            with without_autograd() if inference else nullcontext():
                out = output(arguments, activation(arguments))
    if x.dim() == 2:
        return out
    # Nothing else holds `out`: as a view FSDP2 would warn of it, where the network is wrapped on its own.
    return torch.ops.aten._unsafe_view.default(out, (*x.shape[:-1], w2.shape[0]))


def up_projection(
    x: Tensor, w1: Tensor, b1: Tensor | None = None, *, fp8: bool = False, w1_scale: Tensor | None = None
) -> Tensor:
    """Compute the pre-activation [T, F] of x [T, D]: the first GEMM of `relu2_mlp` alone.

    For analysis and verification: `relu2_mlp` computes exactly this without fusion, and with it the same up to the
    order of summation.
    """
    if not fp8:
        return F.linear(x, w1.to(x.dtype), _cast(b1, x.dtype))
    w1 = w1 if w1_scale is not None else w1.to(x.dtype)
    return linear_fp8(*quantize_fp8(x), *float8_weight(Weight(w1, w1_scale)), b1)


def _cast(t: Any, dtype: torch.dtype) -> Any:
    return t if t is None or t.dtype == dtype else t.to(dtype)
