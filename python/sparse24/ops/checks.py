"""What the fake functions check: the rules and sentences of the adapters in C++ (cpp/torch/tensor.cpp), for tracing.

A rule on a symbolic size becomes a guard, or an assertion at run time where the size is known only then, so rules are
stated with `torch._check` and never with ``and``, ``or`` and ``if``, which ask for a value.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparse24.errors import dtype_name as name_of
from sparse24.errors import type_name
from sparse24.format import FP8, VALUES, Operand, feature_alignment

_LARGEST = 2**31 - 1

#: A rule on sizes; symbolic where they are.
Condition: TypeAlias = bool | torch.SymBool


def expect(ok: Condition, op: str, rule: str, got: object) -> None:
    """Refuse unless `ok`: ``sparse24.<op>: expected <rule>, got <got>``."""
    torch._check(ok, lambda: f"sparse24.{op}: expected {rule}, got {got}")


def either(*conditions: Condition) -> Condition:
    """``or`` that asks no symbolic condition for its value."""
    if any(condition is True for condition in conditions):
        return True
    unknown = [condition for condition in conditions if condition is not False]
    result = unknown.pop() if unknown else False
    for condition in unknown:
        result = result | condition
    return result


def listed(sizes: Any) -> str:
    """Sizes or strides as the adapters print them."""
    return f"({', '.join(map(str, sizes))})"


def check_dim(op: str, dim: int) -> None:
    """Check which dimension the groups lie along."""
    expect(dim in (-1, -2), op, "dim to be -1 or -2", dim)


def check_scaling(op: str, scaling: str) -> None:
    """Check how many scales there are."""
    expect(scaling in ("row", "tensor"), op, 'scaling to be "row" or "tensor"', f'"{scaling}"')


def check_dtype(op: str, name: str, t: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Check that t is of one of the allowed dtypes, of which CUDA devices do not have float32."""
    on_gpu = t.device.type == "cuda"
    usable = [dtype for dtype in allowed if not (on_gpu and dtype == torch.float32)]
    *first, last = map(name_of, usable)
    names = f"{', '.join(first)} or {last}" if first else last
    expect(t.dtype in usable, op, f"{name} to be {names}{' on a CUDA device' * on_gpu}", name_of(t.dtype))


def check_same_dtype(op: str, name: str, t: Tensor, of: str, reference: Tensor) -> None:
    """Check that t is of the dtype of `reference`."""
    rule = f"{name} to be {name_of(reference.dtype)} (the dtype of {of})"
    expect(t.dtype == reference.dtype, op, rule, name_of(t.dtype))


def check_exact_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    """Check that t is of `dtype`."""
    expect(t.dtype == dtype, op, f"{name} to be {name_of(dtype)}", name_of(t.dtype))


def check_sizes(op: str, name: str, t: Tensor, rank: int) -> None:
    """Rank, and no size that the kernels' coordinates do not hold."""
    check_tensor(op, name, t)
    rule = f"{name} to have {rank} dimension{'s' * (rank != 1)}"
    expect(t.dim() == rank, op, rule, f"{t.dim()} with shape {listed(t.shape)}")
    for size in t.shape:
        if isinstance(size, int):  # no guard for what is true of every tensor that there is
            expect(size <= _LARGEST, op, f"{name} to have sizes below 2^31", listed(t.shape))


def check_tensor(op: str, name: str, t: object) -> None:
    """Check that t is a tensor."""
    expect(isinstance(t, Tensor), op, f"{name} to be a Tensor", type_name(t))


def check_device(op: str, name: str, t: Tensor, of: str, reference: Tensor) -> None:
    """Check that t is a tensor, where `reference` is."""
    check_tensor(op, name, t)
    expect(t.device == reference.device, op, f"{name} to be on {reference.device} (the device of {of})", t.device)


def check_columns(op: str, name: str, cols: int, dtype: torch.dtype, dim: int) -> None:
    """`dtype`: that of the values."""
    multiple = feature_alignment(dtype, dim)
    rule = f"{name} to have a multiple of {multiple} columns ({name_of(dtype)} values, dim={dim})"
    expect(cols % multiple == 0, op, rule, cols)


def check_meta(op: str, meta: Tensor, a: Operand, name: str = "meta") -> None:
    """Check the metadata of `a`."""
    check_exact_dtype(op, name, meta, torch.uint8)
    expect(meta.dim() == 1, op, f"{name} to have 1 dimension", f"{meta.dim()} with shape {listed(meta.shape)}")
    rule = f"{name} to have {a.meta_bytes} elements (a sparse operand of {a.m} x {a.k} in {name_of(a.dtype)})"
    expect(meta.shape[0] == a.meta_bytes, op, rule, meta.shape[0])


def check_kept(op: str, values: Tensor, meta: Tensor, fp8_meta: bool) -> Operand:
    """Check values and metadata of dim=-1, and return their operand with the dtype that the metadata is of."""
    check_sizes(op, "values", values, 2)
    check_dtype(op, "values", values, VALUES)
    dtype = FP8 if fp8_meta else values.dtype
    multiple = feature_alignment(dtype, -1) // 2
    what = "fp8_meta=True" if fp8_meta else name_of(values.dtype)
    rule = f"values to have a multiple of {multiple} columns ({what})"
    expect(values.shape[1] % multiple == 0, op, rule, values.shape[1])
    a = Operand(values.shape[0], 2 * values.shape[1], dtype, -1)
    check_device(op, "meta", meta, "values", values)
    check_meta(op, meta, a)
    return a


def check_scale(op: str, name: str, scale: Tensor, elements: int, meaning: str, *, one_allowed: bool = True) -> None:
    """Check a float32 scale of so many elements, or of one where that is allowed."""
    check_exact_dtype(op, name, scale, torch.float32)
    count = scale.numel()
    single = isinstance(elements, int) and elements == 1
    some = "1 or " if one_allowed and not single else ""
    rule = f"{name} to have {some}{elements} element{'s' * (not single)} ({meaning})"
    expect(either(count == elements, one_allowed and count == 1), op, rule, count)


def check_given_scale(op: str, scale: Tensor | None, scaling: str, rows: int, meaning: str, x: Tensor) -> None:
    """Check the scale argument of the conversions to float8."""
    if scale is None:
        return
    check_device(op, "scale", scale, "x", x)
    elements, meaning = (rows, meaning) if scaling == "row" else (1, 'scaling="tensor"')
    check_scale(op, "scale", scale, elements, meaning, one_allowed=False)


def check_optional_scale(
    op: str, name: str, scale: Tensor | None, elements: int, meaning: str, of: str, reference: Tensor
) -> None:
    """Check a scale that may be missing: one element, or one for each row or column."""
    if scale is not None:
        check_device(op, name, scale, of, reference)
        check_scale(op, name, scale, elements, meaning)


def check_vector(op: str, name: str, t: Tensor, elements: int, meaning: str) -> None:
    """Check rank and size."""
    check_sizes(op, name, t, 1)
    expect(t.shape[0] == elements, op, f"{name} to have {elements} elements ({meaning})", t.shape[0])


def new_scale(x: Tensor, scaling: str, rows: int) -> Tensor:
    """Make the scale that a conversion to float8 returns."""
    return x.new_empty((rows, 1) if scaling == "row" else (1,), dtype=torch.float32)
