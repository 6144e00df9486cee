"""The gradients of experts: those of one network, expert by expert, from any offsets."""

import pytest
import torch
from compare import assert_same_bits
from data import normal
from synchronisation import no_synchronisation
from test_experts_ops import BF16, COUNTS, Case, close

import sparse24


class Backward(Case):
    """A mixture with a gradient of its output, before the factors."""

    def __init__(self, counts, beyond, device, **sizes):
        super().__init__(counts, beyond, device, **sizes)
        grad = normal(self.rows, self.w2.shape[1], dtype=torch.float32, seed=5)
        grad[self.used :] = torch.nan
        self.grad = grad.to(self.x.dtype).to(device)
        self.values, self.meta, _ = sparse24.experts_linear_compress(self.x, self.w1, self.offsets)

    def gradient(self, row_scale=None, dense=True):
        return sparse24.experts_linear_gradient(
            self.grad, self.w2, self.values, self.meta, self.offsets, row_scale, dense=dense
        )

    def padded(self):
        """Each expert with its rows and the padded ones."""
        begin = 0
        for expert, rows in self.each():
            count = rows.stop - rows.start
            yield expert, rows, slice(begin, begin + count)
            begin += -(-count // 128) * 128


@pytest.fixture(params=COUNTS)
def case(request, device):
    return Backward(*COUNTS[request.param], device)


def test_they_are_those_of_each_expert(poisoned_memory, case):
    kept, dh, y, products = case.gradient()
    for expert, rows, padded in case.padded():
        count, features = rows.stop - rows.start, case.w2.shape[2]
        values, meta, *_ = sparse24.linear_compress(case.x[rows], case.w1[expert], statistics=False)
        assert_same_bits(values, case.values[padded])
        expected = sparse24.linear_gradient(case.grad[rows], case.w2[expert], values, meta, tokens=False)[0]
        close(kept[padded], expected)
        assert_same_bits(dh[rows], sparse24.decompress(kept[padded].contiguous(), meta, count, features))
        assert_same_bits(y[rows], sparse24.decompress(values, meta, count, features))
        dy = (case.grad[rows].float() @ case.w2[expert].float()).to(BF16)
        expected = (y[rows].float() * dy.float()).sum(1)
        assert (products[rows] - expected).norm() <= 4e-3 * expected.norm()
    assert_same_bits(products[case.used :], torch.zeros_like(products[case.used :]))


def test_factors_multiply_what_has_been_differentiated(poisoned_memory, case):
    kept, dh, y, products = case.gradient(case.row_scale)
    plain_kept, plain_dh, plain_y, plain_products = case.gradient()
    assert_same_bits(products, plain_products)
    for _, rows, padded in case.padded():
        factors = case.row_scale[rows, None]
        close(dh[rows], plain_dh[rows].float() * factors)
        close(kept[padded], plain_kept[padded].float() * factors)
        assert_same_bits(y[rows], (plain_y[rows].float() * factors).to(BF16))


def test_dense_matrices_may_be_left_out(case):
    kept, dh, y, products = case.gradient(case.row_scale, dense=False)
    assert dh.shape == y.shape == (0, case.w2.shape[2])
    expected = case.gradient(case.row_scale)
    assert_same_bits(products, expected[3])
    for *_, padded in case.padded():
        assert_same_bits(kept[padded], expected[0][padded])


@pytest.mark.parametrize("columns", [96, 256, 1024])
@pytest.mark.parametrize("counts", COUNTS)
def test_weights_in_their_own_order_are_multiplied(poisoned_memory, device, counts, columns):
    """The gradient of x takes the first weights as the forward pass has them, in tiles of 192 or 256 columns."""
    case = Backward(*COUNTS[counts], device, d=columns)
    kept, dh, *_ = case.gradient()
    dx = sparse24.experts_mm(kept, case.meta, case.w1, case.offsets, rows=case.rows)
    for expert, rows in case.each():
        close(dx[rows], dh[rows].float() @ case.w1[expert].float())
    assert_same_bits(dx[case.used :], torch.zeros_like(dx[case.used :]))


def test_two_runs_give_the_same_bits(device):
    case = Backward([130, 0, 1, 65, 3], 0, device)
    (_, *one), (_, *other) = case.gradient(case.row_scale), case.gradient(case.row_scale)
    for a, b in zip(one, other, strict=True):
        assert_same_bits(a, b)


def test_nothing_waits_on_the_host(device):
    if device != "cuda":
        pytest.skip("synchronisation")
    case = Backward([130, 0, 1, 65, 3], 9, device)
    case.gradient()
    with no_synchronisation():
        case.gradient(case.row_scale)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"grad": torch.zeros(9, 12, dtype=BF16)}, "w to have 12 rows"),
        ({"w": torch.zeros(2, 8, 40, dtype=BF16)}, "w to have a multiple of 16 columns"),
        ({"w": torch.zeros(2, 8, 32)}, "w to be bfloat16"),
        ({"w": torch.zeros(3, 8, 32, dtype=BF16)}, "w to have 2 experts"),
        ({"values": torch.zeros(128, 16, dtype=BF16)}, "values to have 256 rows"),
        ({"values": torch.zeros(256, 24, dtype=BF16)}, "values to have 16 columns"),
        ({"meta": torch.zeros(5, dtype=torch.uint8)}, "meta to have"),
        ({"row_scale": torch.ones(8)}, "row_scale to have 9 elements"),
        ({"offsets": torch.tensor([5, 9])}, "offsets to be int32, got int64"),
    ],
)
def test_it_refuses(device, change, sentence):
    offsets = torch.tensor([5, 9], dtype=torch.int32)
    values, meta, _ = sparse24.experts_linear_compress(
        torch.zeros(9, 16, dtype=BF16), torch.zeros(2, 32, 16, dtype=BF16), offsets
    )
    given = {"grad": torch.zeros(9, 8, dtype=BF16), "w": torch.zeros(2, 8, 32, dtype=BF16)}
    given |= {"values": values, "meta": meta, "offsets": offsets} | change
    given = {name: t.to(device) for name, t in given.items()}
    with pytest.raises(RuntimeError, match=f"sparse24.experts_linear_gradient: expected {sentence}"):
        sparse24.experts_linear_gradient(**given)
