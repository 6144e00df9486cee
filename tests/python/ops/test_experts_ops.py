"""The products of experts: those of one network, expert by expert, from any offsets."""

import pytest
import torch
from compare import assert_same_bits
from data import normal
from synchronisation import no_synchronisation

import sparse24

BF16 = torch.bfloat16

#: Rows of each expert, and behind the last.
COUNTS = {
    "ragged": ([130, 0, 1, 65, 3], 9),
    "one": ([300], 0),
    "none": ([0, 0, 0], 5),
    "all_on_one": ([0, 0, 700, 0], 0),
    "whole_tiles": ([128, 256, 128], 0),
    "few": ([0, 1, 0, 2, 0, 0, 1, 0], 0),
}


def ends(counts: list[int], device: str) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32).to(device)


class Case:
    """One mixture: rows of no expert hold NaN."""

    def __init__(self, counts, beyond, device, d=96, f=208, out=136, dtype=BF16):
        self.counts, self.offsets = counts, ends(counts, device)
        self.rows, self.used = sum(counts) + beyond, sum(counts)
        experts = len(counts)
        x = normal(self.rows, d, dtype=torch.float32, seed=1)
        x[self.used :] = torch.nan
        self.x = x.to(dtype).to(device)
        self.w1 = (
            (normal(experts * f, d, dtype=torch.float32, seed=2) / d**0.5).view(experts, f, d).to(dtype).to(device)
        )
        self.w2 = (normal(experts * out, f, dtype=torch.float32, seed=3) / f**0.5).view(experts, out, f)
        self.w2 = self.w2.to(dtype).to(device)
        self.row_scale = torch.rand(self.rows, generator=torch.Generator().manual_seed(4)).to(device)

    def each(self):
        begin = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(begin, begin + count)
            begin += count

    def sparse(self):
        values, meta, _ = sparse24.experts_linear_compress(self.x, self.w1, self.offsets)
        return sparse24.experts_mm(values, meta, self.w2.mT, self.offsets, None, None, self.row_scale, rows=self.rows)

    def dense(self):
        y = sparse24.experts_linear_relu2(self.x, self.w1, self.offsets)
        return sparse24.experts_linear(y, self.w2, self.offsets, None, None, self.row_scale)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As two sums of the same products in another order, rounded once."""
    error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20)
    assert error < 4e-3


@pytest.fixture(params=COUNTS)
def case(request, device):
    return Case(*COUNTS[request.param], device)


def test_the_sparse_products_are_those_of_each_expert(poisoned_memory, case):
    out = case.sparse()
    for expert, rows in case.each():
        values, meta, *_ = sparse24.linear_compress(case.x[rows], case.w1[expert], statistics=False)
        expected = sparse24.mm(values, meta, case.w2[expert].t(), case.row_scale[rows])
        close(out[rows], expected)
    assert_same_bits(out[case.used :], torch.zeros_like(out[case.used :]))


def test_the_dense_products_are_those_of_each_expert(poisoned_memory, case):
    out = case.dense()
    y = sparse24.experts_linear_relu2(case.x, case.w1, case.offsets)
    for expert, rows in case.each():
        expected_y = sparse24.linear_relu2(case.x[rows], case.w1[expert], statistics=False)[0]
        close(y[rows], expected_y)
        close(out[rows], (y[rows].float() @ case.w2[expert].float().t()) * case.row_scale[rows, None])
    assert_same_bits(out[case.used :], torch.zeros_like(out[case.used :]))


def test_activations_have_the_padded_rows(device):
    case = Case([130, 0, 1, 65, 3], 0, device)
    values, meta, _ = sparse24.experts_linear_compress(case.x, case.w1, case.offsets)
    assert values.shape == (128 * (199 // 128 + 5), 104)
    whole = sparse24.decompress(values, meta, values.shape[0], 208)
    padded = 0
    for expert, rows in case.each():
        count = rows.stop - rows.start
        one = sparse24.linear_compress(case.x[rows], case.w1[expert], statistics=False)
        close(whole[padded : padded + count], sparse24.decompress(*one[:2], count, 208))
        padded += -(-count // 128) * 128


@pytest.mark.parametrize("seed", range(6))
def test_random_offsets(poisoned_memory, device, seed):
    g = torch.Generator().manual_seed(seed)
    experts = int(torch.randint(1, 40, (), generator=g))
    counts = torch.randint(0, 1 + int(torch.randint(1, 200, (), generator=g)), (experts,), generator=g)
    counts *= torch.rand(experts, generator=g) < 0.7
    f, out = 16 * int(torch.randint(1, 30, (), generator=g)), 8 * int(torch.randint(1, 40, (), generator=g))
    case = Case(counts.tolist(), int(torch.randint(0, 90, (), generator=g)), device, f=f, out=out)
    sparse, dense = case.sparse(), case.dense()
    for expert, rows in case.each():
        y = sparse24.linear_relu2(case.x[rows], case.w1[expert], statistics=False)[0]
        kept = sparse24.decompress(*sparse24.compress(y), *y.shape)
        for actual, activation in ((sparse, kept), (dense, y)):
            close(actual[rows], (activation.float() @ case.w2[expert].float().t()) * case.row_scale[rows, None])
    for actual in (sparse, dense):
        assert not actual[case.used :].any()


def test_offsets_that_do_not_ascend_count_as_those_before(poisoned_memory, device):
    case = Case([100, 0, 50], 20, device)
    expected = case.sparse()
    case.offsets = torch.tensor([100, -7, 150], dtype=torch.int32, device=device)
    assert_same_bits(case.sparse(), expected)
    case.offsets = torch.tensor([100, 100, 9000], dtype=torch.int32, device=device)  # all rows that there are
    assert_same_bits(case.sparse()[:150], expected[:150])


def test_two_runs_give_the_same_bits(device):
    case = Case([130, 0, 1, 65, 3], 9, device)
    assert_same_bits(case.sparse(), case.sparse())
    assert_same_bits(case.dense(), case.dense())


def test_graphs_are_replayed_with_other_offsets(device):
    if device != "cuda":
        pytest.skip("CUDA graphs")
    case = Case([130, 0, 1, 65, 3], 20, device)
    case.sparse()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.sparse()
    for counts in ([0, 0, 199, 0, 0], [40, 50, 60, 40, 29]):
        case.counts = counts
        case.x.nan_to_num_()
        case.offsets.copy_(ends(counts, device))
        graph.replay()
        replayed = out.clone()
        assert_same_bits(replayed, case.sparse())


def test_nothing_waits_on_the_host(device):
    if device != "cuda":
        pytest.skip("synchronisation")
    case = Case([130, 0, 1, 65, 3], 9, device)
    case.sparse(), case.dense()
    with no_synchronisation():
        case.sparse(), case.dense()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"offsets": torch.tensor([5, 9])}, "offsets to be int32, got int64"),
        ({"offsets": torch.tensor([[5, 9]], dtype=torch.int32)}, "offsets to have 1 dimension"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, "offsets to have 1 to 1024 elements, got 0"),
        ({"offsets": torch.zeros(1025, dtype=torch.int32)}, "offsets to have 1 to 1024 elements, got 1025"),
        ({"offsets": torch.tensor([5, 9, 9], dtype=torch.int32)}, "w to have 3 experts"),
        ({"w": torch.zeros(2, 32, 8, dtype=BF16)}, "w to have 16 columns"),
        ({"w": torch.zeros(2, 24, 16, dtype=BF16)}, "w to have a multiple of 16 rows"),
        ({"w": torch.zeros(32, 16, dtype=BF16)}, "w to have 3 dimensions"),
        ({"scale_w": torch.ones(3)}, r"scale_w to be \[2\] or \[2, 32\]"),
        ({"activation": "none"}, "activation to be"),
        ({"threshold": -1.0}, "threshold"),
    ],
)
def test_first_products_refuse(device, change, sentence):
    given = {
        "x": torch.zeros(9, 16, dtype=BF16),
        "w": torch.zeros(2, 32, 16, dtype=BF16),
        "offsets": torch.tensor([5, 9], dtype=torch.int32),
    } | change
    given = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    with pytest.raises(RuntimeError, match=f"sparse24.experts_linear_compress: expected {sentence}"):
        sparse24.experts_linear_compress(**given)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"b": torch.zeros(2, 32, 12, dtype=BF16)}, "b to have a multiple of 8 outputs, got 12"),
        ({"b": torch.zeros(2, 64, 8, dtype=BF16)}, "b to have 32 rows"),
        ({"rows": 300}, "values to have 512 rows"),
        ({"rows": -1}, "rows to be at least 0, got -1"),
        ({"meta": torch.zeros(5, dtype=torch.uint8)}, "meta to have"),
        ({"row_scale": torch.ones(8)}, "row_scale to have 9 elements"),
        ({"scale_b": torch.ones(2, 9)}, r"scale_b to be \[2\] or \[2, 8\]"),
        ({"out_dtype": torch.int32}, "out_dtype to be bfloat16 or float16"),
    ],
)
def test_the_second_product_refuses(device, change, sentence):
    offsets = torch.tensor([5, 9], dtype=torch.int32)
    values, meta, _ = sparse24.experts_linear_compress(
        torch.zeros(9, 16, dtype=BF16), torch.zeros(2, 32, 16, dtype=BF16), offsets
    )
    given = {"values": values, "meta": meta, "b": torch.zeros(2, 32, 8, dtype=BF16), "offsets": offsets, "rows": 9}
    given = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in (given | change).items()}
    with pytest.raises(RuntimeError, match=f"sparse24.experts_mm: expected {sentence}"):
        sparse24.experts_mm(**given)


def test_many_calls_at_the_sizes_of_models_end(device):
    """With last tiles of few rows, which half of a multiprocessor's warps have none of; and with the same bits."""
    if device != "cuda":
        pytest.skip("takes long")
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 900, (128,), generator=g) * (torch.rand(128, generator=g) < 0.9)
    case = Case([1], 0, device)
    rows, case.offsets = int(counts.sum()) + 100, ends(counts.tolist(), device)
    case.rows = rows
    case.x, case.w1, case.w2 = (
        torch.randn(shape, dtype=BF16, device=device) for shape in ((rows, 2688), (128, 1856, 2688), (128, 2688, 1856))
    )
    case.row_scale = torch.rand(rows, device=device)
    same = torch.ones((), dtype=torch.bool, device=device)
    for run, count in ((case.sparse, 100), (case.dense, 30)):
        first = run()
        for _ in range(count):
            same &= (run() == first).all()
    assert bool(same)
