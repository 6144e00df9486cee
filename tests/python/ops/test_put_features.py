"""put_features: sums of parts in their rows or columns, and nothing else written; and its errors."""

import pytest
import torch
from compare import assert_same_bits
from data import integers, normal
from torch._dynamo.testing import CompileCounterWithBackend

from sparse24 import put_features

DIMS = pytest.mark.parametrize("dim", [-1, -2], ids=["columns", "rows"])


def reference(out, parts, features, dim):
    """In order, in float32, rounded once; what is no feature is left out."""
    total = torch.zeros(parts.shape[1:])
    for part in parts.cpu().float():
        total += part
    expected, total = out.cpu().clone(), total.to(out.dtype)
    for h, feature in enumerate(features.tolist()):
        if 0 <= feature < out.shape[dim]:
            expected.select(dim, feature).copy_(total.select(dim, h))
    return expected


def problem(rows, columns, count, parts, dtype, device, dim, make=normal):
    out = make(rows, columns, dtype=dtype, seed=1).to(device)
    shape = (rows, count) if dim == -1 else (count, columns)
    added = torch.stack([make(*shape, dtype=dtype, seed=2 + p) for p in range(parts)]) if parts else None
    added = torch.empty(0, *shape, dtype=dtype) if added is None else added
    limit = columns if dim == -1 else rows
    features = torch.randperm(limit, generator=torch.Generator().manual_seed(0))[:count].sort().values
    return out, added.to(device), features.to(device)


@DIMS
@pytest.mark.parametrize("parts", [0, 1, 3, 8])
@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 1, 1), (40, 96, 24), (37, 61, 13), (264, 520, 64)])
def test_equals_the_reference(device, dtype, dim, rows, columns, count, parts):
    out, added, features = problem(rows, columns, count, parts, dtype, device, dim)
    expected = reference(out, added, features, dim)
    assert put_features(out, added, features, dim) is None
    assert_same_bits(out, expected)


@DIMS
def test_nothing_beside_is_written(device, dtype, dim):
    """Out is the middle of its storage, and starts where no 16 bytes do."""
    _, added, features = problem(24, 40, 16, 2, dtype, device, dim)
    storage = torch.full((24 * 40 + 2,), 7.0, device=device, dtype=dtype)
    out = storage[1:-1].view(24, 40)
    expected = reference(out, added, features, dim)
    put_features(out, added, features, dim)
    assert_same_bits(out, expected)
    assert storage[0] == 7 and storage[-1] == 7


@DIMS
def test_views_of_parts(device, dtype, dim):
    out, added, features = problem(24, 40, 16, 4, dtype, device, dim)
    expected = reference(out, added, features, dim)
    for view in (added.mT.contiguous().mT, torch.stack((added, added), 3)[..., 0]):
        again = out.clone()
        put_features(again, view, features.repeat_interleave(2)[::2], dim)
        assert_same_bits(again, expected)


@DIMS
def test_what_is_no_feature_is_left_out(device, dtype, dim):
    out, added, _ = problem(24, 40, 8, 2, dtype, device, dim)
    features = torch.tensor([-1, 0, 3, 39 if dim == -1 else 23, 40, 2**40, -(2**63), 5], device=device)
    expected = reference(out, added, features, dim)
    put_features(out, added, features, dim)
    assert_same_bits(out, expected)


@DIMS
def test_empty(device, dtype, dim):
    for rows, columns, count in ((0, 8, 0), (8, 0, 0), (8, 8, 0)):
        out, added, features = problem(rows, columns, count, 2, dtype, device, dim)
        before = out.clone()
        put_features(out, added, features, dim)
        assert_same_bits(out, before)


@DIMS
def test_opcheck(device, dtype, dim):
    sample = problem(24, 40, 16, 2, dtype, device, dim, integers)
    torch.library.opcheck(torch.ops.sparse24.put_features.default, (*sample, dim))


@DIMS
def test_compiled(device, dim):
    """One dynamic graph, in which the mutation is seen by what comes after it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(x, parts, features):
        out = x * 2
        put_features(out, parts, features, dim)
        return out + 1

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for rows, columns, count in ((24, 40, 16), (32, 56, 8)):
        x, parts, features = problem(rows, columns, count, 2, torch.bfloat16, device, dim)
        before = x.clone()
        assert_same_bits(compiled(x, parts, features), function(x, parts, features))
        assert_same_bits(x, before)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def good(device):
    return problem(24, 40, 16, 2, torch.bfloat16, device, -1)


ERRORS = {
    "out rank": (lambda o, p, f: (o[0], p, f, -1), "out to have 2 dimensions", "1"),
    "out dtype": (lambda o, p, f: (o.int(), p, f, -1), "out to be bfloat16, float16 or float32", "int32"),
    "out strides": (lambda o, p, f: (o.t(), p, f, -1), "out to be contiguous", r"strides \(1, 40\)"),
    "parts rank": (lambda o, p, f: (o, p[0], f, -1), "parts to have 3 dimensions", "2"),
    "parts dtype": (lambda o, p, f: (o, p.half(), f, -1), "parts to be bfloat16 (the dtype of out)", "float16"),
    "parts rows": (lambda o, p, f: (o, p[:, 1:], f, -1), "parts to have 24 rows (rows of out)", "23"),
    "parts columns": (lambda o, p, f: (o, p[..., 1:], f, -1), "parts to have 16 columns (elements of features)", "15"),
    "rows of rows": (lambda o, p, f: (o, p, f, -2), "parts to have 16 rows (elements of features)", "24"),
    "features rank": (lambda o, p, f: (o, p, f[None], -1), "features to have 1 dimension", "2"),
    "features dtype": (lambda o, p, f: (o, p, f.int(), -1), "features to be int64", "int32"),
    "dim": (lambda o, p, f: (o, p, f, 0), "dim to be -1 or -2", "0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(checked_device, name):
    change, rule, value = ERRORS[name]
    if checked_device == "cuda":
        rule = rule.replace("bfloat16, float16 or float32", "bfloat16 or float16 on a CUDA device")
    out, parts, features = good(checked_device)
    before, version = out.clone(), out._version
    with pytest.raises(RuntimeError) as error:
        put_features(*change(out, parts, features))
    assert out._version == version
    first_line = str(error.value).splitlines()[0]
    assert first_line.startswith(f"sparse24.put_features: expected {rule}"), first_line
    assert f"got {value.replace(chr(92), '')}" in first_line, first_line
    if checked_device != "meta":
        assert_same_bits(out, before)


# ---- as index_copy_ --------------------------------------------------------------------------------------------------


def test_who_saved_out_is_told(device):
    out, parts, features = good(device)
    before = out._version
    weight = torch.ones_like(out).requires_grad_()
    product = weight * out
    put_features(out[:, :], parts, features, -1)
    assert out._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        put_features(out, parts, features, -1)
    assert out._version == before + 2


@pytest.mark.parametrize("name", ["out", "parts"])
def test_gradients_are_refused(device, name):
    out, parts, features = good(device)
    {"out": out, "parts": parts}[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^sparse24.put_features: expected {name} not to require a gradient"):
        put_features(out, parts, features, -1)
    if name == "out":  # no leaf
        with pytest.raises(RuntimeError, match="^sparse24.put_features: expected out not to require a gradient"):
            torch.ops.sparse24.put_features(out * 1, parts, features, -1)
    expected = reference(out.detach(), parts.detach(), features, -1)
    with torch.no_grad():
        put_features(out, parts, features, -1)
    assert_same_bits(out.detach(), expected)


def test_inference_tensors(device):
    _, parts, features = good(device)
    with torch.inference_mode():
        out = torch.zeros(24, 40, dtype=torch.bfloat16, device=device)
        put_features(out, parts, features, -1)
    with pytest.raises(RuntimeError, match="^sparse24.put_features: expected out to be no inference tensor"):
        put_features(out, parts, features, -1)


def test_overlapping_memory(device):
    """Dense tensors that share memory with out are refused; others are read before anything is written."""
    storage = normal(3, 24, 40, dtype=torch.bfloat16).to(device)
    features = torch.arange(40, device=device)
    for parts in (storage[:2], storage[1:], storage.mT[1:2].mT):
        with pytest.raises(RuntimeError, match="^sparse24.put_features: expected parts not to share memory with out"):
            put_features(storage[1], parts, features, -1)
    for parts in (storage[::2], storage[1, :1].expand(2, 24, 40)):
        out = storage.clone()
        again = parts if parts.stride(1) == 0 else out[::2]
        expected = reference(out[1], again, features, -1)
        put_features(out[1], again, features, -1)
        assert_same_bits(out[1], expected)
    put_features(storage[0], storage[1:], features, -1)
    indices = torch.arange(12, device=device)
    with pytest.raises(RuntimeError, match="^sparse24.put_features: expected features not to share memory with out"):
        out = indices.view(torch.bfloat16).view(4, 12)
        put_features(out, torch.zeros(1, 4, 12, dtype=torch.bfloat16, device=device), indices, -1)
    with pytest.raises(RuntimeError, match="^sparse24.put_features: expected out to be contiguous"):
        put_features(storage[0, :1].expand(24, 40), storage[1:], features, -1)


def test_negative_views(device):
    out, parts, features = good(device)
    expected = reference(out, -parts, features, -1)
    with pytest.raises(RuntimeError, match="^sparse24.put_features: expected out to be no view with its sign pending"):
        put_features(torch._neg_view(out), parts, features, -1)
    put_features(out, torch._neg_view(parts), features, -1)
    assert_same_bits(out, expected)
