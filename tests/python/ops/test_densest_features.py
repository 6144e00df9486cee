"""densest_features: the first k of a stable sort, for any counts; and its errors."""

import pytest
import torch
from synchronisation import no_synchronisation
from torch._dynamo.testing import CompileCounter

import sparse24

LIMITS = torch.iinfo(torch.int32)


def by_sorting(counts, k):
    """The k largest, of equals the lower: stable, where topk is not."""
    return counts.sort(descending=True, stable=True).indices[:k].sort().values


def some(kind, features, seed=0):
    """Counts of a kind: int32 [features]."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit, low=0):
        return torch.randint(low, limit, (features,), generator=generator)

    if kind == "extremes":
        counts = torch.tensor([LIMITS.max, LIMITS.max - 1, LIMITS.min, LIMITS.min + 1, -1, 0, 1])[below(7)]
    else:
        counts = {
            "tokens": lambda: below(2**14) >> below(13),  # most features are used by few tokens
            "few": lambda: below(7) * 65537,  # equals in every block of features
            "equal": lambda: torch.full((features,), 5),
            "any": lambda: below(LIMITS.max + 1, LIMITS.min),
            "ascending": lambda: torch.arange(features),
        }[kind]()
    return counts.to(torch.int32)


@pytest.mark.parametrize("kind", ["tokens", "few", "equal", "any", "extremes", "ascending"])
@pytest.mark.parametrize("features", [1, 31, 33, 1024, 5000, 32768, 32769, 100003])
def test_equals_a_stable_sort(poisoned_memory, device, kind, features):
    counts = some(kind, features)
    for k in sorted({0, 1, features // 20, features // 2, features - 1, features}):
        got = sparse24.densest_features(counts.to(device), k)
        assert got.dtype == torch.int64 and got.device.type == device and got.is_contiguous()
        assert torch.equal(got.cpu(), by_sorting(counts, k)), k


def test_no_features(device):
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert sparse24.densest_features(none, 0).shape == (0,)


def test_strided_counts(device):
    counts = some("tokens", 3000).to(device).reshape(1000, 3)
    for column in (counts[:, 1], counts[0].expand(3), counts[7:8, 0].expand(50)):
        k = len(column) // 2
        assert torch.equal(sparse24.densest_features(column, k), sparse24.densest_features(column.clone(), k))


def test_is_deterministic(device):
    counts = some("few", 20000).to(device)
    first = sparse24.densest_features(counts, 1000)
    assert all(torch.equal(sparse24.densest_features(counts, 1000), first) for _ in range(20))


@pytest.mark.parametrize("kind", ["tokens", "few", "any"])
def test_cuda_equals_cpu(cuda, kind):
    counts = some(kind, 65536, seed=3)
    got = sparse24.densest_features(counts.to(cuda), 3277)
    assert torch.equal(got.cpu(), sparse24.densest_features(counts, 3277))


def test_needs_no_synchronisation(cuda):
    counts = some("tokens", 16384).to(cuda)
    sparse24.densest_features(counts, 819)
    with no_synchronisation():
        sparse24.densest_features(counts, 819)


def test_compiles_for_any_number_of_features(device):
    """One graph: the shape of the result is k, and nothing depends on the counts."""
    frames = CompileCounter()
    compiled = torch.compile(
        lambda counts: sparse24.densest_features(counts, counts.shape[0] // 4),
        backend=frames,
        fullgraph=True,
        dynamic=True,
    )
    for features in (100, 260, 1000):
        counts = some("tokens", features).to(device)
        assert torch.equal(compiled(counts).cpu(), by_sorting(counts.cpu(), features // 4))
    assert frames.frame_count == 1


ERRORS = {
    "rank": (lambda c: (c.reshape(2, 8), 1), r"counts to have 1 dimension, got 2 with shape \(2, 8\)"),
    "scalar": (lambda c: (c[0], 0), r"counts to have 1 dimension, got 0 with shape \(\)"),
    "int64": (lambda c: (c.long(), 1), "counts to be int32, got int64"),
    "float32": (lambda c: (c.float(), 1), "counts to be int32, got float32"),
    "too many": (lambda c: (c[:1].expand(2**31), 1), r"counts to have sizes below 2\^31, got \(2147483648\)"),
    "negative k": (lambda c: (c, -1), r"k to be at least 0 and at most 16 \(elements of counts\), got -1"),
    "large k": (lambda c: (c, 17), r"k to be at least 0 and at most 16 \(elements of counts\), got 17"),
    "k of nothing": (lambda c: (c[:0], 1), r"k to be at least 0 and at most 0 \(elements of counts\), got 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(checked_device, name):
    arguments, sentence = ERRORS[name]
    with pytest.raises(RuntimeError, match=rf"^sparse24\.densest_features: expected {sentence}"):
        sparse24.densest_features(*arguments(some("tokens", 16).to(checked_device)))
