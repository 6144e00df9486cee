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


def test_roots(device):
    check(device, torch.float16, (131, 32, 96), roots=True)


def test_nan_of_a_token_is_its_own(device):
    grad, packed, y, pruned = operands(device, torch.bfloat16, 131, 32, 96)
    grad[7, 3] = float("nan")
    actual = sparse24.linear_gradient_packed(grad, *packed, *y)[0]
    expected = sparse24.linear_gradient(grad, pruned, *y)[0]
    assert_same_bits(actual, expected)


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
