"""Products over the rows of each expert: those of one expert after the other, from any offsets."""

import pytest
import torch
from compare import assert_same_bits
from data import normal
from synchronisation import no_synchronisation
from test_experts_ops import BF16, COUNTS, close, ends

import sparse24


def operands(counts, beyond, device, m=208, n=136, dtype=BF16):
    """Two matrices, NaN in rows of no expert, with the offsets and the rows of each expert."""
    rows, used = sum(counts) + beyond, sum(counts)
    a, b = (normal(rows, columns, dtype=torch.float32, seed=seed) for columns, seed in ((m, 1), (n, 2)))
    a[used:] = b[used:] = torch.nan
    offsets = ends(counts, device)
    slices = [slice(end - count, end) for count, end in zip(counts, offsets.tolist(), strict=True)]
    return a.to(dtype).to(device), b.to(dtype).to(device), offsets, slices


def check(a, b, offsets, slices):
    result = sparse24.experts_weight_gradient(a, b, offsets)
    assert result.shape == (len(slices), a.shape[1], b.shape[1])
    for expert, rows in enumerate(slices):
        if rows.start == rows.stop:
            assert_same_bits(result[expert], torch.zeros_like(result[expert]))
        else:
            close(result[expert], a[rows].float().t() @ b[rows].float())


@pytest.mark.parametrize("counts", COUNTS)
def test_they_are_those_of_each_expert(poisoned_memory, device, counts):
    check(*operands(*COUNTS[counts], device))


@pytest.mark.parametrize("seed", range(6))
def test_random_offsets(poisoned_memory, device, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    counts = torch.randint(0, 1 + draw(1, 700), (draw(1, 30),), generator=g)
    counts *= torch.rand(len(counts), generator=g) < 0.7
    check(*operands(counts.tolist(), draw(0, 90), device, m=8 * draw(1, 60), n=8 * draw(1, 60)))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 383, 384, 385])
def test_rows_of_a_neighbour_are_in_no_sum(device, rows):
    """Its first rows are copied with the last ones of an expert, and may be NaN."""
    a, b, offsets, slices = operands([rows, 100], 0, device)
    expected = sparse24.experts_weight_gradient(a, b, offsets)[0]
    for t in (a, b):
        changed = t.clone()
        changed[slices[1]] = torch.nan
        given = (changed, b) if t is a else (a, changed)
        result = sparse24.experts_weight_gradient(*given, offsets)
        assert_same_bits(result[0], expected)
        assert result[1].isnan().all()


def test_offsets_that_descend_or_leave_the_rows(device):
    a, b, *_ = operands([90, 60], 0, device)
    wild = torch.tensor([90, 20, 2**30, -5], dtype=torch.int32, device=device)
    tame = torch.tensor([90, 90, 150, 150], dtype=torch.int32, device=device)
    assert_same_bits(sparse24.experts_weight_gradient(a, b, wild), sparse24.experts_weight_gradient(a, b, tame))


def test_other_orders_of_elements(device):
    a, b, offsets, _ = operands([90, 60], 0, device)
    strided = torch.stack((b, b), dim=2)[..., 0]
    expected = sparse24.experts_weight_gradient(a, b, offsets)
    assert_same_bits(sparse24.experts_weight_gradient(a.t().contiguous().t(), strided, offsets), expected)


def test_nothing_waits_on_the_host(device):
    if device != "cuda":
        pytest.skip("synchronisation")
    a, b, offsets, _ = operands([130, 0, 1, 65, 3], 9, device)
    sparse24.experts_weight_gradient(a, b, offsets)
    with no_synchronisation():
        sparse24.experts_weight_gradient(a, b, offsets)


@pytest.mark.parametrize("experts, m, n", [(128, 1856, 2688), (128, 2688, 1856), (300, 2688, 1024)])
def test_sizes_of_models(device, experts, m, n):
    """Many tiles for each multiprocessor, and many numbers of rows."""
    if device != "cuda":
        pytest.skip("takes long")
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 400, (experts,), generator=g) * (torch.rand(experts, generator=g) < 0.9)
    _, _, offsets, slices = operands(counts.tolist(), 100, device, m=8, n=8)
    a, b = (torch.randn(int(counts.sum()) + 100, columns, dtype=BF16, device=device) for columns in (m, n))
    first = sparse24.experts_weight_gradient(a, b, offsets)
    for expert in range(0, experts, 9):
        rows = slices[expert]
        close(first[expert], a[rows].float().t() @ b[rows].float())
    for _ in range(20):
        assert_same_bits(sparse24.experts_weight_gradient(a, b, offsets), first)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"a": torch.zeros(9, 12, dtype=BF16)}, "a to have a multiple of 8 columns, got 12"),
        ({"b": torch.zeros(9, 4, dtype=BF16)}, "b to have a multiple of 8 columns, got 4"),
        ({"b": torch.zeros(8, 16, dtype=BF16)}, "b to have 9 rows"),
        ({"b": torch.zeros(9, 16)}, "b to be bfloat16"),
        ({"a": torch.zeros(9, 16, dtype=torch.int8)}, "a to be"),
        ({"offsets": torch.tensor([5, 9])}, "offsets to be int32, got int64"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, "offsets to have 1 to 1024 elements, got 0"),
    ],
)
def test_it_refuses(device, change, sentence):
    given = {"a": torch.zeros(9, 16, dtype=BF16), "b": torch.zeros(9, 8, dtype=BF16)}
    given |= {"offsets": torch.tensor([5, 9], dtype=torch.int32)} | change
    given = {name: t.to(device) for name, t in given.items()}
    with pytest.raises(RuntimeError, match=f"sparse24.experts_weight_gradient: expected {sentence}"):
        sparse24.experts_weight_gradient(**given)
