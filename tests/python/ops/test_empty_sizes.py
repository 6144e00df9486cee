"""Every op with every size that can be zero: the shapes of the fake functions, the numbers of the CPU."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from data import integers
from oracle import FP8, meta_bytes, round_up
from torch import Tensor

import sparse24

BF16 = torch.bfloat16
FLOAT8 = {"float8": FP8, "bfloat16": BF16}


@dataclass
class Call:
    """An op with tensors on the CPU; `changed`: the argument that it writes to."""

    op: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    changed: int | None = None

    def run(self, device: str) -> tuple[Tensor, ...]:
        args = [a.to(device).clone() if isinstance(a, Tensor) else a for a in self.args]
        out = getattr(torch.ops.sparse24, self.op).default(*args, **self.options)
        if self.changed is not None:
            return (args[self.changed],)
        return out if isinstance(out, tuple) else (out,)


def numbers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return integers(*shape, dtype=dtype)


def positions(rows: int, cols: int, dtype: torch.dtype, dim: int = -1) -> Tensor:
    return torch.full((meta_bytes(rows, cols, dtype, dim),), 0x44, dtype=torch.uint8)


def kept(rows: int, cols: int, dtype: torch.dtype, dim: int = -1) -> Tensor:
    if dim == -1:
        return numbers(rows, cols // 2, dtype=dtype)
    padded = round_up(rows, 32 if dtype == FP8 else 4) // 2
    return numbers(cols, padded, dtype=dtype) if dtype == FP8 else numbers(padded, cols, dtype=dtype)


def calls() -> dict[str, Call]:
    """By name: the op, and the sizes in its order."""
    out = {}

    def add(op: str, name: object, *args: Any, changed: int | None = None, **options: Any) -> None:
        out[f"{op}-{name}"] = Call(op, args, options, changed)

    for dim in (-1, -2):
        for r, c in ((0, 64), (5, 0), (0, 0)):
            name = f"{r}x{c}-dim{dim}"
            add("compress", name, numbers(r, c), "relu2", dim)
            for scaling in ("row", "tensor"):
                count = (r if dim == -1 else c) if scaling == "row" else 1
                for given, scale in (("computed", None), ("given", torch.full((count,), 0.5))):
                    add("compress_fp8", f"{name}-{scaling}-{given}", numbers(r, c), scale, "none", dim, scaling)
            for dtype_name, dtype in FLOAT8.items():
                of_dtype = f"{name}-{dtype_name}"
                meta = positions(r, c, dtype, dim)
                add("compress_like", of_dtype, numbers(r, c, dtype=dtype), meta, dim)
                add("decompress", of_dtype, kept(r, c, dtype, dim), meta, r, c, dim)
        for m, k, n in ((0, 64, 8), (32, 0, 8), (32, 64, 0), (0, 0, 8), (32, 0, 0), (0, 64, 0), (0, 0, 0)):
            r, c = (m, k) if dim == -1 else (k, m)
            for dtype_name, dtype in FLOAT8.items():
                b = numbers(n, k, dtype=dtype).t()
                operands = kept(r, c, dtype, dim), positions(r, c, dtype, dim), b
                for transpose_out in (False, True):
                    add(
                        "mm",
                        f"{m}x{k}x{n}-dim{dim}-{dtype_name}" + "-transposed" * transpose_out,
                        *operands,
                        torch.ones(m, 1),
                        torch.ones(n),
                        numbers(n),
                        dim=dim,
                        transpose_out=transpose_out,
                    )
    for r, c in ((0, 64), (64, 0), (0, 0)):
        for dim in (-1, -2):
            add("prune_pack24", f"{r}x{c}-dim{dim}", numbers(r, c), dim)
            add("prune_quantize_fp8_both", f"{r}x{c}-dim{dim}", numbers(r, c), None, dim)
            add("prune_pack24", f"{r}x{c}-dim{dim}-master", numbers(r, c, dtype=torch.float32), dim, dtype=BF16)
            add("prune_pack_fp8_both", f"{r}x{c}-dim{dim}", numbers(r, c), None, dim)
    for r, c in ((0, 64), (5, 0), (0, 0)):
        for scaling in ("row", "tensor"):
            scale = torch.full((r if scaling == "row" else 1,), 0.5)
            add("quantize_fp8", f"{r}x{c}-{scaling}-computed", numbers(r, c), None, scaling)
            add("quantize_fp8", f"{r}x{c}-{scaling}-given", numbers(r, c), scale, scaling)
        add("quantize_fp8_predict", f"{r}x{c}", numbers(r, c), torch.ones(1))
        add("transpose_fp8", f"{r}x{c}", numbers(r, c, dtype=FP8))
        for interleaved in (False, True):
            for given, scale in (("computed", None), ("given", torch.full((1,), 0.5))):
                add("quantize_fp8_both", f"{r}x{c}-{interleaved}-{given}", numbers(r, c), scale, interleaved)
        for fp8_meta in (False, True):
            operands = kept(r, c, BF16), positions(r, c, FP8 if fp8_meta else BF16)
            name = f"{r}x{c}" + "-fp8_meta" * fp8_meta
            add("feature_counts", name, *operands, 16, fp8_meta)
            for features in ([], [0, 3, -1, 2**40]):
                indices = torch.tensor(features, dtype=torch.int64)
                add("gather_features", f"{name}-{len(features)}", *operands, indices, fp8_meta)
    add("gather_features", "5x64-0", kept(5, 64, BF16), positions(5, 64, BF16), torch.zeros(0, dtype=torch.int64))
    for features, k in ((0, 0), (9, 0)):
        add("densest_features", f"{features}-{k}", torch.ones(features, dtype=torch.int32), k)
    for t, d, f in ((0, 16, 64), (5, 0, 64), (5, 16, 0), (0, 0, 64), (5, 0, 0), (0, 16, 0), (0, 0, 0)):
        name = f"{t}x{d}x{f}"
        for statistics in (False, True):
            options = {"statistics": statistics}
            of_name = name + "-statistics" * statistics
            add("linear_relu2", of_name, numbers(t, d), numbers(f, d), None, None, numbers(f), None, **options)
            add("linear_compress", of_name, numbers(t, d), numbers(f, d), None, None, numbers(f), None, **options)
            operand = kept(f, d, BF16), positions(f, d, BF16), None, None, numbers(f), None
            add("linear_compress_packed", of_name, numbers(t, d), *operand, **options)
            fp8 = numbers(t, d, dtype=FP8), numbers(f, d, dtype=FP8), torch.ones(t), torch.ones(f), numbers(f)
            for given, scale in (("one", torch.ones(1)), ("each", torch.ones(t))):
                add("linear_relu2", f"{of_name}-float8-{given}", *fp8, scale, **options)
                add("linear_compress", f"{of_name}-float8-{given}", *fp8, scale, **options)
            add("linear_compress", f"{of_name}-float8-row", *fp8, None, scaling="row", **options)
        add("linear_relu2_gradient", name, numbers(t, d), numbers(d, f), numbers(t, f).abs())
        both, scales = (numbers(t, d, dtype=FP8), numbers(f, d, dtype=FP8)), [torch.ones(1)] * 4
        add("linear_relu2_gradient_fp8", name, *both, numbers(t, f).abs().to(FP8), *scales)
        for interleaved in (False, True):
            for hot in (None, [], [0, 3][: 2 if f else 0]):
                indices = None if hot is None else torch.tensor(hot, dtype=torch.int64)
                of_name = f"{name}-{None if hot is None else len(hot)}-{interleaved}"
                y = kept(t, f, FP8).to(BF16).abs().to(FP8), positions(t, f, FP8)
                add("linear_gradient_fp8", of_name, *both, *y, *scales, interleaved, indices)
                packed = numbers(t, 2 * d, dtype=FP8), kept(f, 2 * d, FP8), positions(f, 2 * d, FP8)
                add("linear_gradient_fp8_packed", of_name, *packed, *y, *scales, interleaved, indices)
            for tokens, hot in ((False, None), (True, None), (True, []), (True, [0, 3][: 2 if f else 0])):
                indices = None if hot is None else torch.tensor(hot, dtype=torch.int64)
                of_name = f"{name}-{tokens}-{None if hot is None else len(hot)}" + "-interleaved" * interleaved
                operands = numbers(t, d), numbers(d, f), kept(t, f, BF16).abs(), positions(t, f, BF16)
                add("linear_gradient", of_name, *operands, interleaved, tokens, False, indices)
                packed = operands[0], kept(f, d, BF16), positions(f, d, BF16), *operands[2:]
                add("linear_gradient_packed", of_name, *packed, interleaved, tokens, False, indices)
        add("mm_active", name, numbers(t, d), numbers(d, f), None, numbers(f))
        add("mm_active", f"{name}-float8", numbers(t, d), numbers(d, f, dtype=FP8), torch.ones(f), numbers(f))
        for outputs in (0, 8):
            biases = numbers(f), numbers(outputs)
            add("relu2_mlp_few", f"{name}-{outputs}", numbers(t, d), numbers(f, d), numbers(f, outputs), *biases)
            of_name, weights = f"{name}-{outputs}", (numbers(f, d), numbers(outputs, f))
            for op in ("relu2_mlp_sparse", "relu2_mlp_dense"):
                add(op, of_name, numbers(t, d), *weights, *biases)
            scales = torch.ones(f), torch.ones(outputs)
            for kind, scale_y in (("row", ()), ("given", (torch.ones(t),)), ("factor", (None, torch.ones(1)))):
                float8 = [w.to(FP8) for w in weights]
                for op in ("relu2_mlp_sparse", "relu2_mlp_dense"):
                    add(op, f"{of_name}-float8-{kind}", numbers(t, d), *float8, *biases, *scales, *scale_y)
    scales, weights = torch.full((4,), 0.5), (numbers(64, 32), numbers(16, 64))
    for sparse in (True, False):
        add("relu2_mlp_fp8", f"0-{sparse}", numbers(0, 32), *weights, scales, numbers(64), None, sparse=sparse)
        codes = [numbers(*s).to(FP8) for s in ((32, 0), (32, 64), (64, 32), (0, 32 if sparse else 64))]
        meta = positions(0, 64, FP8) if sparse else torch.zeros(0, dtype=torch.uint8)
        saved = *codes, meta, torch.full((7, 4), 0.5)
        options = {"dense_features": 32, "sparse": sparse} if sparse else {"sparse": sparse}
        add("relu2_mlp_fp8_gradients", f"0-{sparse}", numbers(0, 16), *saved, scales, **options)
    offsets = torch.tensor([3, 5], dtype=torch.int32)
    for t, f in ((0, 64), (5, 0), (0, 0)):
        for op in ("experts_linear_relu2", "experts_linear_compress"):
            add(op, f"{t}x{f}", numbers(t, 16), numbers(2, f, 16), offsets)
        add("experts_linear", f"{t}x{f}", numbers(t, 16), numbers(2, f, 16), offsets)
        a = numbers(256 if t else 0, 32), positions(256 if t else 0, 64, BF16)
        add("experts_mm", f"{t}x{f}", *a, numbers(2, f, 64).mT, offsets, rows=t)
        of_f = numbers(256 if t else 0, f // 2), positions(256 if t else 0, f, BF16)
        add(
            "experts_linear_gradient", f"{t}x{f}", numbers(t, 16), numbers(2, 16, f), *of_f, offsets, numbers(t).float()
        )
        add("experts_weight_gradient", f"{t}x{f}", numbers(t, 16), numbers(t, f), offsets)
    for dim in (-1, -2):
        for rows, cols, parts, count in (
            (0, 8, 2, 3),
            (8, 0, 2, 3),
            (8, 8, 0, 3),
            (8, 8, 2, 0),
            (0, 0, 0, 0),
            (8, 8, 0, 0),
        ):
            shape = (parts, rows, count) if dim == -1 else (parts, count, cols)
            features = torch.arange(count)
            name = f"{rows}x{cols}-{parts}x{count}-dim{dim}"
            add("put_features", name, numbers(rows, cols), numbers(*shape), features, dim, changed=0)
    return out


CALLS = calls()


def test_every_op_is_there():
    ops = {name.removeprefix("sparse24::") for name in torch._C._dispatch_get_all_op_names() if "sparse24::" in name}
    assert {call.op for call in CALLS.values()} == ops


@pytest.mark.parametrize("name", CALLS)
def test_empty(poisoned_memory, device, name):
    call = CALLS[name]
    results, expected = call.run(device), call.run("cpu")
    for result, reference in zip(results, expected, strict=True):
        assert_same_bits(result, reference)
    if device == "cuda":
        torch.cuda.synchronize()  # what is wrong shows in this test
    for result in results:  # nothing that was not written
        assert not result.float().isnan().any() or call.op == "gather_features"


@pytest.mark.parametrize("options", [{}, {"sparse": False}, {"fused": False}], ids=str)
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_empty_network(device, precision, options, tokens):
    """No tokens, no features in, between or out: sums of nothing are zero, forwards and backwards."""
    for d, f, d_out in itertools.product((0, 32), (0, 64), (0, 32)):
        if tokens * d * f * d_out:
            continue
        shapes = (tokens, d), (f, d), (d_out, f)
        leaves = [numbers(*shape).to(device).requires_grad_() for shape in shapes]
        y = sparse24.relu2_mlp(*leaves, precision=precision, min_tokens=0, **options)
        assert y.shape == (tokens, d_out) and not y.any()
        for gradient, shape in zip(torch.autograd.grad(y.float().sum(), leaves), shapes, strict=True):
            assert gradient.shape == shape and not gradient.any()
