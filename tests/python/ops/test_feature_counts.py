"""feature_counts: non-zeros of the sampled tokens, exact, for every type and layout; and its errors."""

import pytest
import torch
from data import activations, relayout
from oracle import FP8, round_up
from test_decompress import numbers, random_pattern
from test_gather_features import meta_options
from torch._dynamo.testing import CompileCounter
from training_reference import sampled_tokens

import sparse24

META = pytest.mark.parametrize("fp8_meta", [False, True], ids=["own_meta", "fp8_meta"])


def some(tokens, features, values_dtype, fp8_meta=False, seed=0):
    """Values with zeros of both signs, NaN and infinities, metadata, the dense matrix, and the options of the op."""
    layout, options = meta_options(fp8_meta, values_dtype)
    features = round_up(features, 32 if layout == FP8 else 16)
    meta, pattern = random_pattern(tokens, features, layout, -1, seed=seed)
    values = numbers(tokens, features // 2, values_dtype, seed=seed + 1)
    return values, meta, pattern.scatter(values).float(), options


def by_definition(dense, samples=1024):
    return (dense[sampled_tokens(len(dense), samples)] != 0).sum(0, dtype=torch.int32)


#: Tokens, F: no tokens, no features, parts of a block, of the metadata's 64 and 128, as many as are sampled, and more.
SHAPES = [(0, 64), (33, 0), (1, 32), (15, 96), (16, 32), (129, 112), (1000, 80), (1024, 32), (1025, 96), (3001, 1856)]


@META
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(poisoned_memory, device, values_dtype, shape, fp8_meta):
    values, meta, dense, options = some(*shape, values_dtype, fp8_meta)
    values, meta = values.to(device), meta.to(device)
    for samples in (1, 16, 17, 100, 1000):
        got = sparse24.feature_counts(values, meta, samples, **options)
        assert got.dtype == torch.int32 and got.device.type == device and got.is_contiguous()
        assert torch.equal(got.cpu(), by_definition(dense, samples)), samples
    assert torch.equal(sparse24.feature_counts(values, meta, **options).cpu(), by_definition(dense))


@META
def test_as_many_samples_as_tokens_are_exact(device, values_dtype, fp8_meta):
    values, meta, dense, options = some(2003, 96, values_dtype, fp8_meta, seed=3)
    exact = (dense != 0).sum(0, dtype=torch.int32)
    for samples in (2003, 2**40, 2**63 - 1):
        got = sparse24.feature_counts(values.to(device), meta.to(device), samples, **options)
        assert torch.equal(got.cpu(), exact)


def test_small_example(device):
    """48 tokens, of which the blocks 0 and 1 are sampled; kept zeros of both signs do not count, NaN does."""
    x = torch.zeros(48, 16, dtype=torch.bfloat16)
    x[:, 1], x[40:, 2], x[3, 6], x[5, 8] = 1, 1, torch.nan, -0.0
    values, meta = sparse24.compress(x.to(device))
    assert sparse24.feature_counts(values, meta, 32).tolist() == [0, 32, 0, 0, 0, 0, 1, *[0] * 9]
    assert sparse24.feature_counts(values, meta).tolist() == [0, 48, 8, 0, 0, 0, 1, *[0] * 9]


def test_choose_the_densest_features(device):
    """What it is for."""
    x = activations(5000, 256, torch.bfloat16, specials=False)
    x[:, 7::9] = x[:, 7::9].abs() + 1
    values, meta = sparse24.compress(x.to(device), "relu2")
    hot = sparse24.densest_features(sparse24.feature_counts(values, meta), 28)
    assert hot.tolist() == list(range(7, 256, 9))


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_layouts(device, values_dtype, layout):
    values, meta, _, _ = some(129, 96, values_dtype)
    values, meta = relayout(values.to(device), layout), meta.to(device)
    expected = sparse24.feature_counts(values.clone(memory_format=torch.contiguous_format), meta)
    assert torch.equal(sparse24.feature_counts(values, relayout(meta.repeat(2, 1), "strided")[1]), expected)


@META
@pytest.mark.parametrize("values_dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_cuda_equals_cpu(cuda, values_dtype, fp8_meta):
    values, meta, _, options = some(8191, 4096, values_dtype, fp8_meta, seed=5)
    for samples in (1024, 8191):
        expected = sparse24.feature_counts(values, meta, samples, **options)
        assert torch.equal(sparse24.feature_counts(values.to(cuda), meta.to(cuda), samples, **options).cpu(), expected)


def test_compiles_for_any_size(device):
    frames = CompileCounter()
    op = lambda v, m: sparse24.feature_counts(v, m, v.shape[0] // 2)  # noqa: E731
    compiled = torch.compile(op, backend=frames, fullgraph=True, dynamic=True)
    for tokens, features in ((64, 96), (127, 160), (193, 1856)):
        values, meta, dense, _ = some(tokens, features, torch.bfloat16)
        got = compiled(values.to(device), meta.to(device))
        assert torch.equal(got.cpu(), by_definition(dense, tokens // 2))
    assert frames.frame_count == 1


@pytest.mark.parametrize("samples", [0, -5])
def test_tracing_fails_where_running_would(samples):
    values, meta = (torch.empty(n, dtype=t, device="meta") for n, t in (((48, 32), torch.half), (1024, torch.uint8)))
    with pytest.raises(RuntimeError, match=rf"feature_counts: expected samples to be 1 or more, got {samples}"):
        sparse24.feature_counts(values, meta, samples)
