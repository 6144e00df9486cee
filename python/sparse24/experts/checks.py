"""What `relu2_experts` demands of its arguments."""

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from sparse24 import errors
from sparse24._symbolic import or_false
from sparse24.errors import dtype_name
from sparse24.format import FP8
from sparse24.mlp.checks import resolved_fp8
from sparse24.recipe import Recipe

_WIDE = (torch.float32, torch.bfloat16, torch.float16)

_require_tensor = partial(errors.require_tensor, "relu2_experts")


def check_operands(x: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor, dtype: torch.dtype) -> None:
    """Check what is always there; `dtype` is that of the computation."""
    for name, t in (("x", x), ("w1", w1), ("w2", w2), ("offsets", offsets)):
        _require_tensor(name, t)
    if x.dtype not in _WIDE:
        fail("x to be bfloat16, float16 or (on the CPU) float32", dtype_name(x.dtype))
    if dtype == torch.float32 and x.is_cuda:
        fail("x to be bfloat16 or float16 on CUDA", dtype_name(dtype))
    for name, t, rank in (("x", x, 2), ("w1", w1, 3), ("w2", w2, 3), ("offsets", offsets, 1)):
        if t.dim() != rank:
            fail(f"{name} to have {rank} dimension{'s' * (rank > 1)}", t.dim())
    for name, w in (("w1", w1), ("w2", w2)):
        if w.dtype not in (*_WIDE, FP8):
            fail(f"{name} to be float32, bfloat16, float16 or float8_e4m3fn", dtype_name(w.dtype))
    experts, features, columns = w1.shape
    if experts == 0:
        fail("w1 to have at least 1 expert", 0)
    if x.shape[1] != columns:
        fail(f"x to have {columns} features (columns of w1)", x.shape[1])
    if w2.shape[0] != experts:
        fail(f"w2 to have {experts} experts (those of w1)", w2.shape[0])
    if w2.shape[2] != features:
        fail(f"w2 to have {features} columns (rows of w1)", w2.shape[2])
    if offsets.dtype != torch.int32:
        fail("offsets to be int32", dtype_name(offsets.dtype))
    if offsets.shape[0] != experts:
        fail(f"offsets to have {experts} elements (experts of w1)", offsets.shape[0])
    for name, t in (("w1", w1), ("w2", w2), ("offsets", offsets)):
        _require_device(name, t, x)


def check_row_scale(row_scale: Tensor | None, x: Tensor, dtype: torch.dtype) -> None:
    """Check the factors of the rows."""
    if row_scale is None:
        return
    _require_tensor("row_scale", row_scale)
    if row_scale.dtype not in (torch.float32, x.dtype, dtype):
        of_x = "" if x.dtype == torch.float32 else f" or {dtype_name(x.dtype)} (the dtype of x)"
        fail(f"row_scale to be float32{of_x}", dtype_name(row_scale.dtype))
    if row_scale.dim() != 1 or or_false(row_scale.shape[0] != x.shape[0]):
        fail(f"row_scale to have shape [{x.shape[0]}] (rows of x)", list(row_scale.shape))
    _require_device("row_scale", row_scale, x)


def check_float8(precision: str, w1: Tensor, w2: Tensor, w1_scale: Tensor | None, w2_scale: Tensor | None) -> bool:
    """Resolve `precision`, and check what depends on it."""
    fp8 = resolved_fp8(precision, w1, w2, fail)
    for name, w, scale in (("w1", w1, w1_scale), ("w2", w2, w2_scale)):
        if w.dtype != FP8:
            if scale is not None:
                fail(f"{name}_scale to be None for weights that are not float8_e4m3fn", "a tensor")
            continue
        if scale is None:
            fail(f"{name}_scale to be a tensor for float8 weights", "None")
        _require_tensor(f"{name}_scale", scale)
        if scale.dtype != torch.float32:
            fail(f"{name}_scale to be float32", dtype_name(scale.dtype))
        each, row = [w.shape[0]], [w.shape[0], w.shape[1]]
        if list(scale.shape) not in (each, row):
            fail(f"{name}_scale to have shape {each} or {row} (experts, and rows, of {name})", list(scale.shape))
        _require_device(f"{name}_scale", scale, w)
    if fp8:
        _check_multiples(w1, w2, 16, "for fp8")
    return fp8


def check_columns(w1: Tensor, w2: Tensor, fp8: bool) -> None:
    """Check what torch's grouped products on CUDA want: rows of 16 bytes."""
    if not fp8:
        _check_multiples(w1, w2, 8, "on CUDA")


def _check_multiples(w1: Tensor, w2: Tensor, multiple: int, where: str) -> None:
    rules = (("w1", "columns", w1.shape[2]), ("w1", "rows", w1.shape[1]), ("w2", "rows", w2.shape[1]))
    for name, extent, size in rules:
        if size % multiple != 0:
            fail(f"{name} to have a multiple of {multiple} {extent} {where}", size)


def check_recipe(recipe: Recipe) -> None:
    """Check how the backward pass is to run."""
    if not isinstance(recipe, Recipe):
        fail("recipe to be a sparse24.Recipe", type(recipe).__name__)
    if recipe.double_pruning:
        fail("recipe to prune each weight once", "double_pruning=True")
    if not recipe.reuse_mask:
        fail("recipe to reuse the mask", "reuse_mask=False")


def check_values(offsets: list[int], rows: int) -> None:
    """Check the offsets themselves, where the host knows them."""
    if any(b < a for a, b in zip([0, *offsets], [*offsets, rows], strict=True)):
        fail(f"offsets to ascend from 0 to at most {rows} (rows of x)", offsets)


def refuse_second_derivatives() -> None:
    """Refuse to differentiate a backward pass, of which the pattern is a constant."""
    if torch.is_grad_enabled():
        fail("create_graph to be False (second derivatives are not defined)", True)


def _require_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        fail(f"{name} to be on {x.device} as x is", t.device)


def fail(rule: str, got: object) -> NoReturn:
    """Refuse."""
    errors.fail("relu2_experts", rule, got)
