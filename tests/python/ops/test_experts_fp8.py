"""The products of experts in float8: those of each expert, with scales by row or one for each weight."""

import pytest
import torch
from compare import assert_same_bits
from oracle import FP8
from test_experts_ops import COUNTS, Case, close

import sparse24


def quantized(w: torch.Tensor, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, N, K] with their scales [E, N] or [E]."""
    amax = w.abs().float().amax(2 if scaling == "row" else (1, 2))
    scale = amax / 448
    return (w.float() / scale.view(*scale.shape, *(1,) * (3 - scale.dim()))).to(FP8), scale


class Float8(Case):
    def __init__(self, counts, beyond, device, scaling="row", out=136):
        super().__init__(counts, beyond, device, d=96, f=224, out=out)
        self.qx, self.scale_x = sparse24.quantize_fp8(self.x)
        (self.q1, self.scale1), (self.q2, self.scale2) = quantized(self.w1, scaling), quantized(self.w2, scaling)

    def first(self):
        return self.qx, self.q1, self.offsets, self.scale_x, self.scale1

    def weight(self, which: int, expert: int) -> torch.Tensor:
        q, scale = ((self.q1, self.scale1), (self.q2, self.scale2))[which]
        return q[expert].float() * scale[expert].reshape(-1, 1)

    def hidden(self, expert: int, rows: slice) -> torch.Tensor:
        x = self.qx[rows].float() * self.scale_x[rows].view(-1, 1)
        return (x @ self.weight(0, expert).t()).to(torch.bfloat16).relu().float().square().to(torch.bfloat16)


@pytest.fixture(params=COUNTS)
def counts(request):
    return COUNTS[request.param]


@pytest.mark.parametrize("out", [136, 1024], ids=["tiles_of_192", "tiles_of_256"])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_2_4_products_are_those_of_each_expert(poisoned_memory, device, counts, scaling, out):
    case = Float8(*counts, device, scaling, out)
    values, meta, scale = sparse24.experts_linear_compress(*case.first())
    assert values.dtype == FP8
    assert scale.shape == (values.shape[0], 1)
    out = sparse24.experts_mm(
        values, meta, case.q2.mT, case.offsets, scale, case.scale2, case.row_scale, rows=case.rows
    )
    assert out.dtype == torch.bfloat16
    whole = sparse24.decompress(values, meta, values.shape[0], 224).float() * scale
    begin = 0
    for expert, rows in case.each():
        padded = slice(begin, begin + rows.stop - rows.start)
        begin += -(-(rows.stop - rows.start) // 128) * 128
        y = case.hidden(expert, rows)
        kept = sparse24.decompress(*sparse24.compress(y), *y.shape).float()
        assert (whole[padded] - kept).norm() < 4e-2 * kept.norm()
        close(out[rows], (whole[padded] @ case.weight(1, expert).t()) * case.row_scale[rows, None])
    assert_same_bits(out[case.used :], torch.zeros_like(out[case.used :]))


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_dense_products_are_those_of_each_expert(poisoned_memory, device, counts, scaling):
    case = Float8(*counts, device, scaling)
    y = sparse24.experts_linear_relu2(*case.first())
    assert y.dtype == torch.bfloat16
    q, scale = sparse24.quantize_fp8(y)
    out = sparse24.experts_linear(q, case.q2, case.offsets, scale, case.scale2, case.row_scale)
    for expert, rows in case.each():
        close(y[rows], case.hidden(expert, rows))
        dense = q[rows].float() * scale[rows].view(-1, 1)
        close(out[rows], (dense @ case.weight(1, expert).t()) * case.row_scale[rows, None])
    assert_same_bits(out[case.used :], torch.zeros_like(out[case.used :]))
