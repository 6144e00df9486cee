"""Sample inputs of every op, for the tests that ask the same of all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from data import DTYPES, activations, integers, k_major, normal, relayout
from oracle import FP8
from torch import Tensor

import sparse24

ROWS, COLS, N = 37, 96, 24


@dataclass
class Sample:
    """One call of an op."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def overload(self) -> Callable[..., Any]:
        return getattr(torch.ops.sparse24, self.op).default

    def run(self) -> tuple[Tensor, ...]:
        out = self.overload(*self.args, **self.kwargs)
        return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class Case:
    """A way to make a sample. `dtype` is that of the values, or of the counts."""

    op: str
    dtype: torch.dtype
    dim: int
    differentiable: bool = True
    fp8_meta: bool = False
    interleaved: bool = False
    hot: bool = False
    roots: bool = False
    threshold: float = 0.0
    w_dtype: torch.dtype | None = None  # of the weights, where it is not `dtype`

    def __str__(self) -> str:
        name = f"{self.op}-{str(self.dtype).removeprefix('torch.')}-dim{self.dim}"
        return (
            name
            + "-fp8_meta" * self.fp8_meta
            + "-interleaved" * self.interleaved
            + "-hot" * self.hot
            + "-roots" * self.roots
            + "-threshold" * (self.threshold > 0)
            + "-float8_weights" * (self.w_dtype is not None)
        )

    def make(self, device: str, layout: str = "contiguous", requires_grad: bool = False, seed: int = 0) -> Sample:
        if self.op == "densest_features":
            counts = integers(ROWS, COLS, dtype=self.dtype, seed=seed).to(device)
            return Sample(self.op, (relayout(counts, layout)[:, 3], 5))
        fp8 = self.dtype == FP8
        x = activations(ROWS, COLS, torch.bfloat16 if fp8 else self.dtype, seed=seed, specials=False).to(device)

        def laid_out(t: Tensor) -> Tensor:
            return relayout(t, layout).detach().requires_grad_(requires_grad)

        if self.op == "compress":
            return Sample("compress", (laid_out(x), "relu2", self.dim), self._options())
        if self.op == "compress_fp8":
            return Sample("compress_fp8", (laid_out(x), None, "relu2", self.dim, "row"), self._options())
        if self.op == "quantize_fp8":
            return Sample("quantize_fp8", (laid_out(x), None, "row"))
        if self.op == "quantize_fp8_both":
            return Sample("quantize_fp8_both", (laid_out(x), None, self.interleaved))
        if self.op == "transpose_fp8":
            return Sample("transpose_fp8", (laid_out(sparse24.quantize_fp8(x)[0]),))
        if self.op == "prune_pack24":
            w = sparse24.quantize_fp8(x)[0] if fp8 else x
            return Sample("prune_pack24", (laid_out(w[: ROWS // 16 * 16]), self.dim), {"dtype": w.dtype})
        if self.op == "prune_quantize_fp8_both":
            return Sample(self.op, (laid_out(x[: ROWS // 4 * 4]), None, self.dim))
        if self.op == "prune_pack_fp8_both":
            return Sample(self.op, (laid_out(x[: ROWS // 32 * 32, : x.shape[1] // 32 * 32]), None, self.dim))
        if self.op in ("linear_gradient_fp8", "linear_gradient_fp8_packed", "linear_relu2_gradient_fp8"):
            return self._gradient_fp8(device, layout, x, seed)
        if self.op.startswith("experts_"):
            return self._experts(device, laid_out, seed)
        if self.op in ("linear_relu2", "linear_compress"):
            return self._linear(device, laid_out, seed)
        if self.op == "linear_compress_packed":
            return self._packed(device, laid_out, seed)
        if self.op in ("linear_gradient", "linear_gradient_packed"):
            return self._gradient(device, laid_out, x, seed)
        if self.op == "linear_relu2_gradient":
            root = torch.relu(x)
            y = laid_out(root if self.roots else root.square())
            return Sample(self.op, (*self._product(device, laid_out, seed), y, self.roots))
        if self.op == "mm_active":
            w = normal(COLS, N, dtype=torch.float32, seed=seed + 1).to(self.w_dtype or self.dtype).to(device)
            scale = torch.full((N,), 0.5, device=device) if self.w_dtype else None
            bias = normal(N, dtype=torch.float32, seed=seed + 2).to(device)
            return Sample(self.op, (laid_out(torch.relu(x)), relayout(w, layout), scale, bias))
        if self.op == "relu2_mlp_few":
            return self._few(device, laid_out, seed)
        if self.op in ("relu2_mlp_sparse", "relu2_mlp_dense"):
            few = self._few(device, laid_out, seed).args
            w2 = relayout(few[2].t().contiguous(), layout)
            if self.w_dtype is None:
                return Sample(self.op, (*few[:2], w2))
            bias = few[3].to(torch.bfloat16)
            scale = None if self.roots else torch.full((1,), 4.0, device=device)
            return Sample(self.op, (*few[:2], w2, bias, None, few[5], few[6].repeat(N), scale, None, 1.5))
        if self.op in ("relu2_mlp_fp8", "relu2_mlp_fp8_gradients"):
            return self._step_fp8(device, layout, seed)
        values, meta = (sparse24.compress_fp8 if fp8 else sparse24.compress)(x, dim=self.dim)[:2]
        if self.op == "decompress":
            return Sample("decompress", (laid_out(values), meta, ROWS, COLS, self.dim))
        if self.op == "feature_counts":
            pattern = sparse24.compress_fp8(x)[1] if self.fp8_meta else meta
            return Sample("feature_counts", (laid_out(values), pattern, 16, self.fp8_meta))
        if self.op == "gather_features":
            pattern = sparse24.compress_fp8(x)[1] if self.fp8_meta else meta
            features = torch.tensor([5, 95, 0, 5], device=device)
            return Sample("gather_features", (laid_out(values), pattern, features, self.fp8_meta))
        if self.op == "compress_like":
            y = x if not fp8 else sparse24.quantize_fp8(x)[0]
            return Sample("compress_like", (laid_out(y), meta, self.dim))
        assert self.op == "mm"
        m, k = (ROWS, COLS) if self.dim == -1 else (COLS, ROWS)
        b = normal(k, N, dtype=self.dtype, seed=seed + 1).to(device)
        b = k_major(b) if fp8 else laid_out(b)
        scale_a = torch.full((m, 1), 0.5, device=device)
        scale_b = torch.full((1, N), 2.0, device=device)
        out_dtype = torch.bfloat16 if fp8 else self.dtype
        bias = normal(N, dtype=out_dtype, seed=seed + 2).to(device).requires_grad_(requires_grad)
        values = values if fp8 else laid_out(values)
        options = {"dim": self.dim, "transpose_out": self.dim == -2, "interleaved": self.interleaved}
        return Sample("mm", (values, meta, b, scale_a, scale_b, bias), options)

    def _linear(self, device: str, laid_out: Callable[[Tensor], Tensor], seed: int) -> Sample:
        """Small integers, so that devices and layouts agree in every bit."""
        fp8 = self.dtype == FP8
        hidden = torch.bfloat16 if fp8 else self.dtype
        x = laid_out(integers(ROWS, 48, dtype=self.dtype, seed=seed).to(device))
        w = laid_out(integers(COLS, 48, dtype=self.dtype, seed=seed + 1).to(device))
        bias = integers(COLS, dtype=hidden, seed=seed + 2).to(device).requires_grad_(x.requires_grad)
        scale_x = torch.full((ROWS, 1), 0.5, device=device)
        scale_w = torch.full((COLS,), 2.0, device=device)
        if not fp8:
            options = self._options() | ({"activation": "relu"} if self.roots else {})
            return Sample(self.op, (x, w, scale_x, scale_w, bias, None), options)
        if self.op == "linear_compress":
            return Sample(self.op, (x, w, scale_x, scale_w, bias, None), self._options() | {"scaling": "row"})
        scale_out = torch.full((ROWS, 1), 0.25, device=device)
        return Sample(self.op, (x, w, scale_x, scale_w, bias, scale_out), self._options())

    def _experts(self, device: str, laid_out: Callable[[Tensor], Tensor], seed: int) -> Sample:
        """Small integers, as in `_linear`; rows of every expert and of none, but for what leaves them unwritten."""
        x = laid_out(integers(ROWS, 48, dtype=self.dtype, seed=seed).to(device))
        w = laid_out(integers(3 * COLS, 48, dtype=self.dtype, seed=seed + 1).to(device)).view(3, COLS, 48)
        beyond = self.op not in ("experts_linear_relu2", "experts_linear_compress")
        offsets = torch.tensor([5, 5, 30 if beyond else ROWS], dtype=torch.int32, device=device)
        scale_x, scale_w = torch.full((ROWS, 1), 0.5, device=device), torch.full((3,), 2.0, device=device)
        if not beyond:
            return Sample(self.op, (x, w, offsets, scale_x, scale_w), self._options())
        row_scale = torch.full((ROWS,), 0.25, device=device)
        if self.op == "experts_linear":
            return Sample(self.op, (x, w, offsets, scale_x, scale_w, row_scale))
        if self.op == "experts_weight_gradient":
            b = laid_out(integers(ROWS, N, dtype=self.dtype, seed=seed + 2).to(device))
            return Sample(self.op, (x, b, offsets))
        values, meta, scale = sparse24.experts_linear_compress(x.detach(), w.detach(), offsets)
        if self.op == "experts_linear_gradient":
            n = 2 * N if self.dtype == FP8 else N
            grad = laid_out(integers(ROWS, n, dtype=self.dtype, seed=seed + 2).to(device))
            w2 = laid_out(integers(3 * n, COLS, dtype=self.dtype, seed=seed + 3).to(device)).view(3, n, COLS)
            scales = (0.5 * row_scale, scale_w, scale) if self.dtype == FP8 else ()
            return Sample(self.op, (grad, w2, laid_out(values), meta, offsets, row_scale, *scales))
        b = laid_out(integers(3 * N, COLS, dtype=self.dtype, seed=seed + 2).to(device)).view(3, N, COLS).mT
        return Sample(self.op, (laid_out(values), meta, b, offsets, None, scale_w, row_scale), {"rows": ROWS})

    def _packed(self, device: str, laid_out: Callable[[Tensor], Tensor], seed: int) -> Sample:
        """Small integers, as in `_linear`."""
        fp8 = self.dtype == FP8
        x = laid_out(integers(ROWS, 64, dtype=self.dtype, seed=seed).to(device))
        w = integers(COLS, 64, dtype=torch.bfloat16 if fp8 else self.dtype, seed=seed + 1).to(device)
        one = torch.ones(1, device=device)
        values, meta = sparse24.pack24_fp8(w, one, scaling="tensor")[:2] if fp8 else sparse24.pack24(w)
        bias = integers(COLS, dtype=w.dtype, seed=seed + 2).to(device)
        scale_out = torch.full((ROWS, 1), 0.25, device=device) if fp8 else None
        return Sample(self.op, (x, laid_out(values), meta, 0.5 * one, 2 * one, bias, scale_out), self._options())

    def _options(self) -> dict[str, Any]:
        return {"threshold": self.threshold} if self.threshold else {}

    def _few(self, device: str, laid_out: Callable[[Tensor], Tensor], seed: int) -> Sample:
        """Small integers, as in `_linear`."""
        x, w1 = (integers(n, 48, dtype=self.dtype, seed=seed + n).to(device) for n in (ROWS, COLS))
        w2_rows = integers(COLS, N, dtype=self.dtype, seed=seed + 1).to(device)
        if self.w_dtype is None:
            return Sample(self.op, (laid_out(x), laid_out(w1), laid_out(w2_rows)))
        scales = torch.full((COLS,), 2.0, device=device), torch.full((1,), 0.5, device=device)
        bias = integers(COLS, dtype=self.dtype, seed=seed + 2).to(device)
        return Sample(self.op, (laid_out(x), w1.to(self.w_dtype), w2_rows.to(self.w_dtype), bias, None, *scales, 1.5))

    def _gradient(self, device: str, laid_out: Callable[[Tensor], Tensor], x: Tensor, seed: int) -> Sample:
        values, meta = sparse24.compress(x, "relu" if self.roots else "relu2")
        pattern = sparse24.compress_fp8(x, activation="relu2")[1] if self.fp8_meta else meta
        operands = self._product(device, laid_out, seed)
        if self.op == "linear_gradient_packed":
            operands = operands[0], *sparse24.pack24(operands[1], -2)
        hot = torch.tensor([0, 5, 6, 95], device=device) if self.hot else None
        return Sample(
            self.op, (*operands, laid_out(values), pattern, self.interleaved, True, self.fp8_meta, hot, self.roots)
        )

    def _gradient_fp8(self, device: str, layout: str, x: Tensor, seed: int) -> Sample:
        """Small integers, as in `_linear`."""
        one = torch.ones(1, device=device)
        values, meta, scale = sparse24.compress_fp8(x, None, "relu2", scaling="tensor")
        grad, w = (integers(n, 48, dtype=FP8, seed=seed + n).to(device) for n in (ROWS, COLS))
        if self.op == "linear_relu2_gradient_fp8":
            y, scale = sparse24.quantize_fp8(torch.relu(x).square(), None, "tensor")
            return Sample(self.op, (*(relayout(t, layout) for t in (grad, w, y)), one, one, scale, 32 * one))
        hot = torch.tensor([0, 5, 6, 95], device=device) if self.hot else None
        w_meta = ()
        if self.op == "linear_gradient_fp8_packed":
            grad = integers(ROWS, 64, dtype=FP8, seed=seed + 3).to(device)
            weight = integers(64, COLS, dtype=torch.bfloat16, seed=seed + 4).to(device)
            w, *w_meta = sparse24.prune_pack_fp8_both(weight, one, -2)[:2]
        grad, w, values = (relayout(t, layout) for t in (grad, w, values))
        return Sample(self.op, (grad, w, *w_meta, values, meta, one, one, scale, 32 * one, self.interleaved, hot))

    def _step_fp8(self, device: str, layout: str, seed: int) -> Sample:
        """Small integers, as in `_linear`."""
        x, w1 = (integers(n, 48, dtype=self.dtype, seed=seed + n).to(device) for n in (ROWS, COLS))
        w2, grad = (integers(*s, dtype=self.dtype, seed=seed + 1).to(device) for s in ((48, COLS), (ROWS, 48)))
        scales = torch.tensor([0.5, 32.0, 0.5, 64.0], device=device)
        how = not self.roots, self.interleaved
        if self.op == "relu2_mlp_fp8":
            x, w1, w2 = (relayout(t, layout) for t in (x, w1, w2))
            return Sample(self.op, (x, w1, w2, scales, None, None, None, None, *how))
        _, *saved, places = sparse24.relu2_mlp_fp8(x, w1, w2, scales, sparse=how[0], interleaved=how[1])
        grad, *codes = (relayout(t, layout) for t in (grad, *saved[:4]))
        return Sample(self.op, (grad, *codes, saved[4], places, scales, None, 64 * how[0], *how))

    def _product(self, device: str, laid_out: Callable[[Tensor], Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """grad and w: small integers, as in `_linear`."""
        grad = laid_out(integers(ROWS, 48, dtype=self.dtype, seed=seed).to(device))
        return grad, laid_out(integers(48, COLS, dtype=self.dtype, seed=seed + 1).to(device))


PACKED_FP8 = "linear_gradient_fp8_packed"


def _cases() -> list[Case]:
    cases = []
    for dim in (-1, -2):
        for op in ("compress", "compress_like", "decompress", "mm"):
            cases += [Case(op, dtype, dim) for dtype in DTYPES]
        for op in ("compress_fp8", "compress_like", "decompress", "mm"):
            cases.append(Case(op, FP8, dim, differentiable=False))
    for op in ("feature_counts", "gather_features"):
        cases += [Case(op, dtype, -1, differentiable=False) for dtype in (*DTYPES, FP8)]
    cases.append(Case("densest_features", torch.int32, -1, differentiable=False))
    for op in ("linear_relu2", "linear_compress"):
        cases += [Case(op, dtype, -1, differentiable=dtype != FP8) for dtype in (*DTYPES, FP8)]
    cases += [Case("prune_pack24", dtype, -1, differentiable=False) for dtype in (*DTYPES, FP8)]
    cases += [Case("prune_pack24", dtype, -2, differentiable=False) for dtype in DTYPES]
    cases += [Case("prune_quantize_fp8_both", dtype, d, differentiable=False) for dtype in DTYPES for d in (-1, -2)]
    cases += [Case("prune_pack_fp8_both", dtype, d, differentiable=False) for dtype in DTYPES for d in (-1, -2)]
    cases += [Case("linear_compress_packed", dtype, -1, differentiable=False) for dtype in (*DTYPES, FP8)]
    cases += [Case("linear_gradient_packed", dtype, -1, differentiable=False) for dtype in DTYPES]
    for op in ("linear_gradient", "linear_relu2_gradient"):
        cases += [Case(op, dtype, -1, differentiable=False) for dtype in DTYPES]
    products = "experts_linear_relu2", "experts_linear_compress", "experts_linear", "experts_mm"
    for op in (*products, "experts_linear_gradient", "experts_weight_gradient"):
        cases += [Case(op, dtype, -1, differentiable=False) for dtype in DTYPES]
    cases.append(Case("experts_linear_gradient", FP8, -1, differentiable=False))
    for op in ("mm_active", "relu2_mlp_few", "relu2_mlp_sparse", "relu2_mlp_dense"):
        for w_dtype in (None, FP8):
            cases += [Case(op, dtype, -1, differentiable=False, w_dtype=w_dtype) for dtype in DTYPES]
    for op in ("feature_counts", "gather_features", "linear_gradient"):
        cases += [Case(op, dtype, -1, differentiable=False, fp8_meta=True) for dtype in DTYPES]
    cases += [Case("mm", dtype, -2, differentiable=dtype != FP8, interleaved=True) for dtype in (*DTYPES, FP8)]
    for options in ({"interleaved": True}, {"hot": True}):
        cases += [Case("linear_gradient", dtype, -1, differentiable=False, **options) for dtype in DTYPES]
    for op in ("quantize_fp8_both", "linear_gradient_fp8"):
        cases += [Case(op, FP8, -1, differentiable=False, interleaved=order) for order in (False, True)]
    cases.append(Case("transpose_fp8", FP8, -1, differentiable=False))
    cases += [Case(op, FP8, -1, differentiable=False, hot=True) for op in ("linear_gradient_fp8", PACKED_FP8)]
    cases.append(Case(PACKED_FP8, FP8, -1, differentiable=False, interleaved=True))
    cases.append(Case("linear_relu2_gradient_fp8", FP8, -1, differentiable=False))
    for op in ("relu2_mlp_fp8", "relu2_mlp_fp8_gradients"):  # roots: dense
        for options in ({}, {"interleaved": True}, {"roots": True}):
            cases += [Case(op, dtype, -1, differentiable=False, **options) for dtype in DTYPES]
    for dtype in (torch.float16, torch.float32):
        for op in ("linear_relu2", "linear_compress"):
            cases.append(Case(op, dtype, -1, roots=True))
        for op in ("linear_gradient", "linear_relu2_gradient"):
            cases.append(Case(op, dtype, -1, differentiable=False, roots=True))
    for dtype in DTYPES:
        cases += [Case(op, dtype, -1, threshold=0.75) for op in ("compress", "linear_relu2", "linear_compress")]
    for op in ("compress_fp8", "linear_relu2", "linear_compress"):
        cases.append(Case(op, FP8, -1, differentiable=False, threshold=0.75))
    return [*cases, Case("quantize_fp8", FP8, -1, differentiable=False)]


CASES = _cases()


def make_or_skip(case: Case, device: str, *args: Any, **kwargs: Any) -> Sample:
    """The sample, where the device has the dtype."""
    import pytest

    on_cuda = device.startswith("cuda")
    if on_cuda and case.dtype == torch.float32:
        pytest.skip("float32 is for the CPU only")
    if on_cuda and case.op.startswith("experts_") and case.dtype == torch.float16:
        pytest.skip("float16 is for the CPU only")
    if on_cuda and case.op in ("experts_linear_compress", "experts_linear_gradient"):
        pytest.skip("padding is not written; test_experts_ops.py compares what is")
    return case.make(device, *args, **kwargs)
