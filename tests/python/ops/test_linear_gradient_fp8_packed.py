"""linear_gradient_fp8_packed: bit for bit linear_gradient_fp8 of the pruned weight, where sums are exact."""

import re

import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, activations, integers, relayout
from oracle import FP8

import sparse24

NAMES = (
    *("dh_values", "dh_tokens", "dh_tokens_meta", "y_tokens", "y_tokens_meta", "y_hot", "dh_hot"),
    *("amax", "saturated"),
)
#: Tokens, D, F: none, one, tails of groups, of tiles and of the metadata's atoms, nothing to sum, no features; and
#: those of which one kernel does all.
SHAPES = [
    (0, 32, 64),
    (1, 32, 32),
    (37, 96, 96),
    (130, 160, 160),
    (259, 64, 480),
    (512, 1056, 224),
    (40, 0, 64),
    (33, 32, 0),
    (64, 96, 96),
    (448, 32, 288),
]
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["natural", "interleaved"])


def operands(device, tokens, depth, features, seed=0):
    """grad, the packed weight, y, the four scales; and the codes of the pruned weight, [F, D]."""
    grad = integers(tokens, depth, dtype=FP8, limit=3, seed=seed).to(device)
    w = integers(depth, features, dtype=torch.bfloat16, limit=3, seed=seed + 1).to(device)
    one, scale_y = torch.ones(1, device=device), torch.tensor([0.3], device=device)
    values, meta, codes, *_ = sparse24.prune_pack_fp8_both(w, one, -2)
    h = activations(tokens, features, torch.bfloat16, seed=seed + 2, specials=False).to(device)
    y = sparse24.compress_fp8(h, scale_y, "relu2", scaling="tensor")[:2]
    scales = (0.75 * one, 1.25 * one, scale_y, 0.02 * one)
    return grad, (values, meta), y, scales, codes.float().t().contiguous().to(FP8)


def check(device, shape, *options):
    grad, packed, y, scales, pruned = operands(device, *shape)
    expected = sparse24.linear_gradient_fp8(grad, pruned, *y, *scales, *options)
    actual = sparse24.linear_gradient_fp8_packed(grad, *packed, *y, *scales, *options)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_same_bits(a, e, name)


@INTERLEAVED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_weight(poisoned_memory, device, shape, interleaved):
    check(device, shape, interleaved)


@INTERLEAVED
@pytest.mark.parametrize("tokens", [1, 30, 128, 261])
def test_dense_features(poisoned_memory, device, tokens, interleaved):
    for hot in ([], [0], [3, 4, 66, 127, 159], list(range(160)), [5, 5, -1, 160, 9, 2**40]):
        check(device, (tokens, 32, 160), interleaved, torch.tensor(hot, dtype=torch.int64, device=device))


def test_many_tiles(cuda):
    """More tiles than multiprocessors, metadata beyond the last feature."""
    for tokens, features in ((2048, 4128), (4100, 1664)):
        check(cuda, (tokens, 1024, features), True, torch.tensor([1, 77, features - 1], device=cuda))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    grad, (w, w_meta), (values, meta), scales, _ = operands(device, 21, 96, 96, seed=4)
    expected = sparse24.linear_gradient_fp8_packed(grad, w, w_meta, values, meta, *scales, True)
    if layout != "expanded":
        grad, w, values = (relayout(t, layout) for t in (grad, w, values))
        actual = sparse24.linear_gradient_fp8_packed(grad, w, w_meta, values, meta, *scales, True)
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            assert_same_bits(a, e, name)


def test_pruned_weights_multiply_nothing(device):
    """NaN of grad reaches the features whose weight for it was kept, and no others."""
    grad, (w, w_meta), y, scales, pruned = operands(device, 64, 32, 96, seed=7)
    kept = sparse24.decompress(torch.ones_like(w.float()).to(FP8), w_meta, 96, 32).float() != 0
    grad[3, 5] = torch.nan
    dh = sparse24.linear_gradient_fp8_packed(grad, w, w_meta, *y, *scales)[0]
    expected = sparse24.linear_gradient_fp8(grad, pruned, *y, *scales)[0]
    dense, wrong = (sparse24.decompress(t, y[1], 64, 96).float() for t in (dh, expected))
    assert not dense[3, ~kept[:, 5]].isnan().any() and dense[3, kept[:, 5]].isnan().any()
    others = torch.arange(64, device=device) != 3
    assert torch.equal(dense[others], wrong[others]) and wrong[3, ~kept[:, 5]].isnan().any()


def test_errors(checked_device):
    def made(*shape, dtype=FP8):
        return torch.ones(*shape, device=checked_device).to(dtype)

    grad, (w, w_meta), (values, meta), scales, _ = operands("cpu", 4, 32, 64)
    good = [t.to(checked_device) for t in (grad, w, w_meta, values, meta, *scales)]
    wrong = {
        "grad to be float8_e4m3fn, got bfloat16": (0, made(4, 32, dtype=torch.bfloat16)),
        "grad to have a multiple of 32 columns, got 48": (0, made(4, 48)),
        "w to have 16 columns (half of those of grad), got 32": (1, made(64, 32)),
        "w to have a multiple of 32 rows, got 48": (1, made(48, 16)),
        f"w_meta to have {len(w_meta)} elements": (2, good[2][:-1]),
        "values to have 32 columns (half the rows of w), got 16": (3, made(4, 16)),
        f"meta to have {len(meta)} elements": (4, good[4][:-1]),
        "scale_dh to have 1 element (one scale), got 4": (8, made(4, dtype=torch.float32)),
    }
    for rule, (place, value) in wrong.items():
        args = [*good]
        args[place] = value
        with pytest.raises(RuntimeError, match=re.escape(f"sparse24.linear_gradient_fp8_packed: expected {rule}")):
            sparse24.linear_gradient_fp8_packed(*args)
