"""gather_features: columns of the dense matrix, bit for bit."""

import pytest
import torch
from compare import assert_same_bits
from oracle import FP8
from test_decompress import numbers, random_pattern

import sparse24


def meta_options(fp8_meta, values_dtype):
    """The type whose layout the metadata has, and the options that say so."""
    return (FP8, {"fp8_meta": True}) if fp8_meta else (values_dtype, {})


def some(count, features, seed=0):
    return torch.randint(0, features, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (3, 96), (33, 1856), (129, 160), (8191, 32)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 300])
@pytest.mark.parametrize("fp8_meta", [False, True], ids=["own_meta", "fp8_meta"])
def test_equals_columns_of_decompress(poisoned_memory, device, values_dtype, shape, count, fp8_meta):
    layout, options = meta_options(fp8_meta, values_dtype)
    meta, pattern = random_pattern(*shape, layout, -1)
    values = pattern.gather(numbers(*shape, values_dtype))
    features = some(count, shape[1])
    got = sparse24.gather_features(values.to(device), meta.to(device), features.to(device), **options)
    # As integers: torch selects no columns of float8 tensors.
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values_dtype.itemsize]
    assert_same_bits(got, pattern.scatter(values).view(integers).index_select(1, features).view(values_dtype))
    assert got.is_contiguous()


def test_all_features_in_order_are_decompress(device, values_dtype):
    meta, pattern = random_pattern(40, 96, values_dtype, -1, seed=1)
    values, meta = pattern.gather(numbers(40, 96, values_dtype)).to(device), meta.to(device)
    every = torch.arange(96, device=device)
    assert_same_bits(sparse24.gather_features(values, meta, every), sparse24.decompress(values, meta, 40, 96))


@pytest.mark.parametrize("fp8_meta", [False, True], ids=["own_meta", "fp8_meta"])
def test_indices_outside_give_nan(device, values_dtype, fp8_meta):
    layout, options = meta_options(fp8_meta, values_dtype)
    meta, pattern = random_pattern(20, 32, layout, -1)
    values, meta = pattern.gather(numbers(20, 32, values_dtype)).to(device), meta.to(device)
    features = torch.tensor([-1, 3, 32, 2**40, -(2**63)], device=device)
    got = sparse24.gather_features(values, meta, features, **options)
    assert got[:, [0, 2, 3, 4]].float().isnan().all()
    assert_same_bits(got[:, 1:2], sparse24.gather_features(values, meta, features[1:2], **options))


def test_strided_features(device):
    meta, pattern = random_pattern(16, 32, torch.bfloat16, -1)
    values, meta = pattern.gather(numbers(16, 32, torch.bfloat16)).to(device), meta.to(device)
    features = some(10, 32).to(device)
    assert_same_bits(
        sparse24.gather_features(values, meta, features[::2]),
        sparse24.gather_features(values, meta, features[::2].contiguous()),
    )


@pytest.mark.parametrize("values_dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("fp8_meta", [False, True], ids=["own_meta", "fp8_meta"])
def test_cuda_equals_cpu(cuda, values_dtype, fp8_meta):
    layout, options = meta_options(fp8_meta, values_dtype)
    meta, _ = random_pattern(2047, 4096, layout, -1)
    values, features = numbers(2047, 2048, values_dtype, seed=3), some(320, 4096)
    expected = sparse24.gather_features(values, meta, features, **options)
    assert_same_bits(sparse24.gather_features(values.to(cuda), meta.to(cuda), features.to(cuda), **options), expected)
