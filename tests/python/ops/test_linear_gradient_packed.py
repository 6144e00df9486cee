"""linear_gradient_packed: bit for bit linear_gradient of the pruned weight, where the sums of the product are exact."""

import re

import pytest
import torch
from compare import assert_same_bits
from data import DTYPES, activations, integers

import sparse24

NAMES = ("dh", "dh_tokens", "dh_meta", "y_tokens", "y_meta", "counts", "y_hot", "dh_hot")
#: Tokens, D, F: none, one, tails of groups, of tiles and of the metadata's atoms, more than one tile, nothing to sum.
SHAPES = [(0, 32, 64), (1, 32, 32), (37, 48, 96), (130, 64, 160), (259, 32, 480), (512, 1040, 128), (40, 0, 64)]


def operands(device, dtype, tokens, depth, features, fp8_meta=False, roots=False, seed=0):
    """grad, the packed weight, y; and the pruned weight."""
    grad = integers(tokens, depth, dtype=dtype, limit=2, seed=seed).to(device)
    w = integers(depth, features, dtype=dtype, limit=2, seed=seed + 1).to(device)
    packed = sparse24.pack24(w, -2)
    pruned = sparse24.unpack24(*packed, depth, features, -2)
    h = activations(tokens, features, dtype, seed=seed + 2, specials=False).to(device)
    values, meta = sparse24.compress(h, "relu" if roots else "relu2")
    if fp8_meta:
        meta = sparse24.compress_fp8(h, activation="relu2")[1]
    return grad, packed, (values, meta), pruned


def check(device, dtype, shape, *, fp8_meta=False, roots=False, **options):
    grad, packed, y, pruned = operands(device, dtype, *shape, fp8_meta=fp8_meta, roots=roots)
    options |= {"fp8_meta": fp8_meta, "roots": roots}
    expected = sparse24.linear_gradient(grad, pruned, *y, **options)
    actual = sparse24.linear_gradient_packed(grad, *packed, *y, **options)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_same_bits(a, e, name)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_dense_weight(poisoned_memory, device, dtype, shape, interleaved):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is for the CPU only")
    check(device, dtype, shape, interleaved=interleaved)


@pytest.mark.parametrize("options", [{"tokens": False}, {"fp8_meta": True}, {"hot": (0, 5, 6, 95)}], ids=str)
def test_options(poisoned_memory, device, options):
    if "hot" in options:
        options = {"hot": torch.tensor(options["hot"], device=device)}
    for interleaved in (False, True):
        check(device, torch.bfloat16, (131, 32, 96), interleaved=interleaved, **options)


#: Groups of tokens and of features are whole, and counts not wanted: on CUDA one kernel does all.
WHOLE = [(16, 32, 32), (48, 96, 96), (208, 64, 480), (512, 1040, 128)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", WHOLE, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_whole_groups(poisoned_memory, device, dtype, shape, interleaved):
    for roots in {False, dtype == torch.float16}:
        options = {"interleaved": interleaved, "roots": roots}
        for hot in ([], [0, 5, shape[2] - 1], [5, 5, -1, 9], list(range(shape[2]))):
            check(device, dtype, shape, hot=torch.tensor(hot, dtype=torch.int64, device=device), **options)
        check(device, dtype, shape, tokens=False, **options)


def test_many_tiles(cuda):
    """More tiles than multiprocessors, metadata beyond the last feature."""
    for shape in ((2048, 1024, 4128), (4112, 1024, 1664)):
        hot = torch.tensor([1, 77, shape[2] - 1], device=cuda)
        check(cuda, torch.bfloat16, shape, interleaved=True, hot=hot)


def test_roots(device):
    check(device, torch.float16, (131, 32, 96), roots=True)


def test_pruned_weights_multiply_nothing(device):
    """NaN of grad reaches the features whose weight for it was kept, and no others."""
    grad, packed, y, pruned = operands(device, torch.bfloat16, 131, 32, 96)
    keeps = sparse24.unpack24(torch.ones_like(packed[0]), packed[1], 32, 96, -2)[3] != 0
    assert 0 < keeps.sum() < 96
    dy = grad.float() @ pruned.float()
    dy[7] -= grad[7, 3].float() * pruned[3].float()
    dy[7, keeps] = float("nan")
    grad[7, 3] = float("nan")
    kept = sparse24.compress_like(dy.to(torch.bfloat16), y[1]).float()
    expected = (kept * (2 * y[0].float().sqrt())).to(torch.bfloat16).float()
    actual = sparse24.linear_gradient_packed(grad, *packed, *y)[0].float()
    assert torch.equal(actual.isnan(), expected.isnan()) and actual.isnan().any()
    assert_same_bits(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grad": (40, 40)}, r"grad to have a multiple of 16 columns \(bfloat16\), got 40"),
        ({"grad": (40, 64)}, r"w to have 32 columns \(half of those of grad\), got 16"),
        ({"w": (160, 16)}, "w_meta to have 2048 elements"),
        ({"values": (40, 40)}, r"values to have 32 columns \(half the rows of w\), got 40"),
        ({"values": (39, 32)}, r"values to have 40 rows \(rows of grad\), got 39"),
    ],
    ids=str,
)
def test_wrong_sizes(device, changes, sentence):
    grad, (w, w_meta), (values, meta), _ = operands(device, torch.bfloat16, 40, 32, 64)
    arguments = {"grad": grad, "w": w, "w_meta": w_meta, "values": values, "meta": meta}
    arguments |= {name: torch.ones(shape, dtype=torch.bfloat16, device=device) for name, shape in changes.items()}
    with pytest.raises(RuntimeError, match=f"^{re.escape('sparse24.linear_gradient_packed')}: expected {sentence}"):
        sparse24.linear_gradient_packed(*arguments.values())
