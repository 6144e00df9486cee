"""The gradients of experts from float8 operands: those of what the codes say, from any offsets."""

import pytest
import torch
from compare import assert_same_bits
from data import normal
from oracle import FP8
from synchronisation import no_synchronisation
from test_experts_fp8 import Float8
from test_experts_ops import COUNTS, close

import sparse24

BF16 = torch.bfloat16


class Backward(Float8):
    """A mixture with a gradient of its output, and second weights that are K-major for it."""

    def __init__(self, counts, beyond, device, scaling="row"):
        super().__init__(counts, beyond, device)
        grad = normal(self.rows, self.w2.shape[1], dtype=torch.float32, seed=5)[:, :128]
        grad[self.used :] = torch.nan
        self.grad, self.scale_grad = sparse24.quantize_fp8(grad.to(BF16).to(device))
        self.values, self.meta, self.scale_y = sparse24.experts_linear_compress(*self.first())
        _, self.transposed, self.scale_w, _ = sparse24.quantize_fp8_both(self.w2[:, :128].contiguous())
        if scaling == "row":
            experts, features, _ = self.transposed.shape
            more = torch.rand(experts, features, generator=torch.Generator().manual_seed(6)) + 0.5
            self.scale_w = self.scale_w[:, None] * more.to(device)

    def scales(self):
        return self.scale_grad, self.scale_w, self.scale_y

    def gradient(self, row_scale=None, dense=True):
        of_y = self.values, self.meta, self.offsets
        return sparse24.experts_linear_gradient(
            self.grad, self.transposed.mT, *of_y, row_scale, *self.scales(), dense=dense
        )

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Kept values at their places, [padded rows, F]."""
        rows, columns = values.shape[0], 2 * values.shape[1]
        every = torch.arange(columns, device=values.device)
        return sparse24.gather_features(values, self.meta, every, fp8_meta=True).view(rows, columns)

    def parts(self):
        """Of each expert its rows and its padded ones, y as it is multiplied, and dy in float32."""
        begin = 0
        # In place as in training: a product with the scale that is rounded once.
        y = self.whole(self.values.to(BF16).mul_(self.scale_y))
        for expert, rows in self.each():
            count = rows.stop - rows.start
            padded = slice(begin, begin + count)
            begin += -(-count // 128) * 128
            w = self.transposed[expert].float() * self.scale_w[expert].reshape(-1, 1)
            grad = self.grad[rows].float() * self.scale_grad[rows].view(-1, 1)
            yield rows, padded, y[padded], grad @ w.t()


@pytest.fixture(params=COUNTS)
def counts(request):
    return COUNTS[request.param]


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("factors", [True, False], ids=["factors", "plain"])
def test_they_are_those_of_the_codes(poisoned_memory, device, counts, scaling, factors):
    case = Backward(*counts, device, scaling)
    row_scale = case.row_scale if factors else None
    kept, dh, y, products = case.gradient(row_scale)
    assert {t.dtype for t in (kept, dh, y)} == {BF16}
    whole = case.whole(kept)
    for rows, padded, of_y, dy in case.parts():
        factor = case.row_scale[rows, None] if factors else torch.ones_like(dy[:, :1])
        close(dh[rows], factor * dy * 2 * of_y.float().sqrt())
        assert_same_bits(dh[rows], whole[padded])
        assert_same_bits(y[rows], (of_y.float() * factor).to(BF16))
        expected = (of_y.float() * dy).sum(1)
        assert (products[rows] - expected).norm() <= 8e-3 * expected.norm()
    assert_same_bits(products[case.used :], torch.zeros_like(products[case.used :]))


def test_dense_matrices_may_be_left_out(device, counts):
    case = Backward(*counts, device)
    kept, dh, y, products = case.gradient(case.row_scale, dense=False)
    assert dh.shape == y.shape == (0, 224)
    expected = case.gradient(case.row_scale)
    assert_same_bits(products, expected[3])
    for _, padded, *_ in case.parts():
        assert_same_bits(kept[padded], expected[0][padded])


def test_it_multiplies_weights_in_any_order(device):
    case = Backward([130, 0, 1, 65, 3], 0, device)
    expected = case.gradient()
    case.transposed = case.transposed.mT.contiguous().mT
    for a, b in zip(case.gradient()[1:], expected[1:], strict=True):
        assert_same_bits(a, b)


def test_the_gradient_of_x_is_a_float8_product(poisoned_memory, device, counts):
    """The metadata of the forward pass is that of dh, once it is quantised."""
    case = Backward(*counts, device)
    kept, dh, *_ = case.gradient(case.row_scale)
    codes, scale = sparse24.quantize_fp8(kept)
    _, transposed, scale_w, _ = sparse24.quantize_fp8_both(case.w1)
    dx = sparse24.experts_mm(codes, case.meta, transposed.mT, case.offsets, scale, scale_w, rows=case.rows)
    for expert, rows in case.each():
        expected = dh[rows].float() @ case.w1[expert].float()
        assert (dx[rows].float() - expected).norm() < 6e-2 * expected.norm()
    assert_same_bits(dx[case.used :], torch.zeros_like(dx[case.used :]))


def test_nothing_waits_on_the_host(cuda):
    case = Backward([130, 0, 1, 65, 3], 9, cuda)
    case.gradient()
    with no_synchronisation():
        case.gradient(case.row_scale)


@pytest.mark.parametrize("rows", [384, 70])
def test_many_calls_in_a_row(cuda, rows):
    """What waits for the wrong phase of a barrier does so once in a hundred calls (docs/log/083)."""
    experts, hidden, out = 128, 1856, 2688
    offsets = ((torch.arange(experts) + 1) * rows + torch.arange(experts) % 7 - 3).int().to(cuda)
    total = int(offsets[-1])
    x, grad = (sparse24.quantize_fp8(normal(total, out, dtype=BF16, seed=i).to(cuda))[0] for i in (1, 2))
    w1 = torch.randint(-8, 8, (experts, hidden, out), device=cuda).to(FP8)
    values, meta, scale_y = sparse24.experts_linear_compress(x, w1, offsets)
    first = None
    for _ in range(120):
        results = sparse24.experts_linear_gradient(grad, w1.mT, values, meta, offsets, None, None, None, scale_y)
        first = first or results
    for a, b in zip(results[1:], first[1:], strict=True):
        assert torch.equal(a[:total], b[:total])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scale_y": torch.ones(9)}, "scale_y to have 256 elements .rows of values., got 9"),
        ({"scale_grad": torch.ones(4)}, "scale_grad to have 1 or 9 elements .rows of grad., got 4"),
        ({"scale_w": torch.ones(3)}, "scale_w to be .2. or .2, 32., got .3."),
        ({"scale_w": torch.ones(2, dtype=BF16)}, "scale_w to be float32, got bfloat16"),
        ({"w": torch.zeros(2, 16, 32, dtype=BF16)}, "w to be float8_e4m3fn .the dtype of grad., got bfloat16"),
        ({"grad": torch.zeros(9, 24).to(FP8), "w": torch.zeros(2, 24, 32).to(FP8)}, "grad to have a multiple of 16"),
        ({"w": torch.zeros(2, 16, 48).to(FP8)}, "w to have a multiple of 32 columns .float8_e4m3fn., got 48"),
        ({"grad": torch.zeros(9, 16, dtype=BF16), "w": torch.zeros(2, 16, 32, dtype=BF16)}, "values to be bfloat16"),
    ],
)
def test_it_refuses(checked_device, change, sentence):
    offsets = torch.tensor([5, 9], dtype=torch.int32)
    values, meta, scale = sparse24.experts_linear_compress(
        torch.zeros(9, 16).to(FP8), torch.zeros(2, 32, 16).to(FP8), offsets
    )
    given = {"grad": torch.zeros(9, 16).to(FP8), "w": torch.zeros(2, 16, 32).to(FP8)}
    given |= {"values": values, "meta": meta, "offsets": offsets, "scale_y": scale} | change
    given = {name: t.to(checked_device) for name, t in given.items()}
    with pytest.raises(RuntimeError, match=f"sparse24.experts_linear_gradient: expected {sentence}"):
        sparse24.experts_linear_gradient(**given)


def test_scales_are_those_of_float8(checked_device):
    offsets = torch.tensor([5, 9], dtype=torch.int32)
    values, meta, _ = sparse24.experts_linear_compress(
        torch.zeros(9, 16, dtype=BF16), torch.zeros(2, 32, 16, dtype=BF16), offsets
    )
    given = torch.zeros(9, 8, dtype=BF16), torch.zeros(2, 8, 32, dtype=BF16), values, meta, offsets, None, torch.ones(1)
    with pytest.raises(RuntimeError, match="expected scales of the operands to be None without float8, got a tensor"):
        sparse24.experts_linear_gradient(*(t if t is None else t.to(checked_device) for t in given))
