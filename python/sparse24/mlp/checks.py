"""What `relu2_mlp` demands of its arguments."""

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from sparse24 import errors
from sparse24._symbolic import or_false
from sparse24.errors import dtype_name, type_name
from sparse24.format import FP8, up
from sparse24.recipe import Recipe

_ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_require_tensor = partial(errors.require_tensor, "relu2_mlp")


def check_tensors(x: Tensor, w1: Tensor, w2: Tensor) -> None:
    """Check that what has to be a tensor is one, before anything is asked of it."""
    for name, t in (("x", x), ("w1", w1), ("w2", w2)):
        _require_tensor(name, t)


def resolved_fp8(precision: str, w1: Tensor, w2: Tensor, refuse: Callable[[str, object], NoReturn]) -> bool:
    """Resolve `precision` by the dtypes of the weights; `refuse` takes what was expected, and what was got."""
    if not isinstance(precision, str) or precision not in ("auto", "16bit", "fp8"):
        refuse('precision to be "auto", "16bit" or "fp8"', f'"{precision}"')
    if (w1.dtype == FP8) != (w2.dtype == FP8):
        refuse(f"w2 to be {'float8_e4m3fn' if w1.dtype == FP8 else 'of 16 or 32 bits'} as w1 is", dtype_name(w2.dtype))
    if precision == "16bit" and w1.dtype == FP8:
        refuse('precision to be "fp8" or "auto" for float8 weights', '"16bit"')
    return precision == "fp8" or w1.dtype == FP8


def is_fp8(precision: str, w1: Tensor, w2: Tensor, w1_scale: Tensor | None, w2_scale: Tensor | None) -> bool:
    """Resolve `precision`, and check what depends on it."""
    fp8 = resolved_fp8(precision, w1, w2, fail)
    for name, w, scale in (("w1", w1, w1_scale), ("w2", w2, w2_scale)):
        if w.dtype != FP8:
            if scale is not None:
                fail(f"{name}_scale to be None for a weight that is not float8_e4m3fn", "a tensor")
            continue
        if scale is None:
            fail(f"{name}_scale to be a tensor for a float8 weight", "None")
        _require_tensor(f"{name}_scale", scale)
        if scale.dtype != torch.float32:
            fail(f"{name}_scale to be float32", dtype_name(scale.dtype))
        if scale.numel() not in (1, w.shape[0]):
            fail(f"{name}_scale to have 1 or {w.shape[0]} elements (rows of {name})", scale.numel())
        if scale.device != w.device:
            fail(f"{name}_scale to be on {w.device} as {name} is", scale.device)
    if fp8:
        check_fp8_sizes(w1, w2)
    return fp8


def check_fp8_sizes(w1: Tensor, w2: Tensor) -> None:
    """Check that float8 products take the sizes."""
    features, columns = w1.shape
    rules = (("w1", "columns", columns), ("w1", "rows", features), ("w2", "rows", w2.shape[0]))
    for name, extent, size in rules:
        if size % 16 != 0:
            fail(f"{name} to have a multiple of 16 {extent} for fp8", size)


def check_scale_y(scale_y: Tensor | None, tokens: Tensor, fp8: bool) -> None:
    """Check the scale of the activation."""
    if scale_y is None:
        return
    if not fp8:
        fail("scale_y to be None in 16-bit precision", "a tensor")
    _require_tensor("scale_y", scale_y)
    if scale_y.dtype != torch.float32:
        fail("scale_y to be float32", dtype_name(scale_y.dtype))
    if or_false(scale_y.numel() != tokens.shape[0]) and or_false(scale_y.numel() != 1):
        fail(f"scale_y to have 1 or {tokens.shape[0]} elements (tokens)", scale_y.numel())
    if scale_y.device != tokens.device:
        fail(f"scale_y to be on {tokens.device} as x is", scale_y.device)


def check_scale_y_factor(factor: Tensor | None, scale_y: Tensor | None, x: Tensor, fp8: bool) -> None:
    """Check the factor that predicts the scale of the activation."""
    if factor is None:
        return
    if not fp8:
        fail("scale_y_factor to be None in 16-bit precision", "a tensor")
    if scale_y is not None:
        fail("scale_y_factor to be None where scale_y is given", "a tensor")
    _require_tensor("scale_y_factor", factor)
    if factor.dtype != torch.float32:
        fail("scale_y_factor to be float32", dtype_name(factor.dtype))
    if factor.numel() != 1:
        fail("scale_y_factor to have 1 element", factor.numel())
    if factor.device != x.device:
        fail(f"scale_y_factor to be on {x.device} as x is", factor.device)


def check_operands(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, dtype: torch.dtype) -> None:
    """Check ranks, sizes, dtypes and devices of everything but the scales."""
    if x.dtype not in _ACTIVATION_DTYPES:
        fail("x to be bfloat16, float16 or (on the CPU) float32", dtype_name(x.dtype))
    if dtype == torch.float32 and x.is_cuda:
        fail("x to be bfloat16 or float16 on CUDA", dtype_name(dtype))
    if x.dim() < 1:
        fail("x to have at least 1 dimension", x.dim())
    for name, w in (("w1", w1), ("w2", w2)):
        if w.dim() != 2:
            fail(f"{name} to have 2 dimensions", w.dim())
        if w.dtype not in (*_ACTIVATION_DTYPES, FP8):
            fail(f"{name} to be float32, bfloat16, float16 or float8_e4m3fn", dtype_name(w.dtype))
    (features, columns), (out, w2_columns) = w1.shape, w2.shape  # a shape is made anew each time
    if x.shape[-1] != columns:
        fail(f"x to have {columns} features (columns of w1)", x.shape[-1])
    if w2_columns != features:
        fail(f"w2 to have {features} columns (rows of w1)", w2_columns)
    for name, bias, owner, rows in (("b1", b1, "w1", features), ("b2", b2, "w2", out)):
        if bias is None:
            continue
        _require_tensor(name, bias)
        if bias.dim() != 1 or bias.shape[0] != rows:
            fail(f"{name} to have shape [{rows}] (rows of {owner})", list(bias.shape))
        if bias.dtype not in _ACTIVATION_DTYPES:
            fail(f"{name} to be float32, bfloat16 or float16", dtype_name(bias.dtype))
    device = x.device
    for name, t in (("w1", w1), ("w2", w2), ("b1", b1), ("b2", b2)):
        if t is not None and t.device != device:
            fail(f"{name} to be on {device} as x is", t.device)


def check_delayed_scales(scales: Tensor | None, x: Tensor) -> None:
    """Check the scales of steps whose products are all float8."""
    if scales is None:
        return
    _require_tensor("delayed_scales", scales)
    if scales.dim() != 1 or scales.shape[0] != 4:
        fail("delayed_scales to have shape [4] (of x, y and two gradients)", list(scales.shape))
    if scales.dtype != torch.float32:
        fail("delayed_scales to be float32", dtype_name(scales.dtype))
    if scales.requires_grad:
        fail("delayed_scales to require no gradient", "one that does")
    if scales.stride(0) == 0:
        fail("delayed_scales to have four elements in memory, which are written", "an expanded one")
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()) and scales.is_inference():
        fail("delayed_scales to be made outside of inference mode, where they can be written", "one made in it")
    if scales.device != x.device:
        fail(f"delayed_scales to be on {x.device} as x is", scales.device)


def check_w2_rows(rows: Tensor, w2: Tensor) -> None:
    """Check the second weight by neuron against the weight itself."""
    _require_tensor("w2_rows", rows)
    if rows.dim() != 2 or rows.shape[0] != w2.shape[1] or rows.shape[1] != w2.shape[0]:
        fail(f"w2_rows to have shape {[w2.shape[1], w2.shape[0]]} (that of w2.t())", list(rows.shape))
    if rows.dtype not in (*_ACTIVATION_DTYPES, FP8):
        fail("w2_rows to be float32, bfloat16, float16 or float8_e4m3fn", dtype_name(rows.dtype))
    if (rows.dtype == FP8) != (w2.dtype == FP8):
        fail(
            f"w2_rows to be {'float8_e4m3fn' if w2.dtype == FP8 else 'of 16 or 32 bits'} as w2 is",
            dtype_name(rows.dtype),
        )
    if rows.device != w2.device:
        fail(f"w2_rows to be on {w2.device} as w2 is", rows.device)


def check_packed(packed: tuple[Tensor, ...], w1: Tensor) -> None:
    """Check the first weight packed against the weight itself."""
    if not isinstance(packed, (tuple, list)) or len(packed) not in (2, 3):
        fail("w1_packed to be a tuple of 2 or 3 tensors", type_name(packed))
    for name, t in zip(("values", "metadata", "the right adapter"), packed, strict=False):
        _require_tensor(f"{name} of w1_packed", t)
        if t.device != w1.device:
            fail(f"{name} of w1_packed to be on {w1.device} as w1 is", t.device)
    rows, columns = w1.shape
    if len(packed) == 3:
        right = packed[2]
        if right.dim() != 2 or right.shape[1] != columns:
            fail(f"the right adapter of w1_packed to have shape [rank, {columns}]", list(right.shape))
        columns += 2 * up(right.shape[0], 8)
    values = packed[0]
    if values.dim() != 2 or values.shape[0] != rows or values.shape[1] * 2 != columns:
        fail(f"values of w1_packed to have shape {[rows, columns // 2]}", list(values.shape))


def check_adapters(adapters: tuple[Tensor, Tensor], w1: Tensor, packed: tuple[Tensor, ...] | None) -> None:
    """Check the low-rank addition to the first weight."""
    if not isinstance(adapters, (tuple, list)) or len(adapters) != 2:
        fail("adapters to be a tuple of 2 tensors", type_name(adapters))
    if packed is not None:
        fail("w1_packed to be None with adapters, or to have them packed", "adapters beside it")
    if w1.dtype == FP8:
        fail("w1 to be of 16 or 32 bits with adapters", dtype_name(w1.dtype))
    for name, t in zip(("left", "right"), adapters, strict=True):
        _require_tensor(f"the {name} adapter", t)
        if t.dtype != w1.dtype:
            fail(f"the {name} adapter to be {dtype_name(w1.dtype)} as w1 is", dtype_name(t.dtype))
        if t.device != w1.device:
            fail(f"the {name} adapter to be on {w1.device} as w1 is", t.device)
    left, right = adapters
    if left.dim() != 2 or left.shape[0] != w1.shape[0]:
        fail(f"the left adapter to have shape [{w1.shape[0]}, rank]", list(left.shape))
    if right.dim() != 2 or right.shape[0] != left.shape[1] or right.shape[1] != w1.shape[1]:
        fail(f"the right adapter to have shape {[left.shape[1], w1.shape[1]]}", list(right.shape))


def check_training(recipe: Recipe, hot_features: Tensor | None, w1: Tensor, fp8: bool, recompute: bool) -> None:
    """Check what only the backward pass uses."""
    if not isinstance(recipe, Recipe):
        fail("recipe to be a sparse24.Recipe", type(recipe).__name__)
    if fp8 and not recipe.reuse_mask:
        fail("recipe to reuse the mask in fp8 precision", "reuse_mask=False")
    if recipe.double_pruning and (fp8 or recompute or not recipe.reuse_mask):
        what = "fp8" if fp8 else "recompute" if recompute else "reuse_mask=False"
        fail("neither fp8, recompute nor reuse_mask=False with double_pruning", what)
    if hot_features is None:
        return
    _require_tensor("hot_features", hot_features)
    if hot_features.dtype != torch.int64:
        fail("hot_features to be int64", dtype_name(hot_features.dtype))
    count = recipe.hot_features(w1.shape[0])
    if hot_features.dim() != 1 or hot_features.shape[0] != count:
        fail(f"hot_features to have shape [{count}] (recipe.hot_features(F))", list(hot_features.shape))
    if hot_features.device != w1.device:
        fail(f"hot_features to be on {w1.device} as w1 is", hot_features.device)


def fail(rule: str, got: object) -> NoReturn:
    """Refuse."""
    errors.fail("relu2_mlp", rule, got)
