"""Fake functions on sizes that are not known, and on devices that are not here.

What they refuse is in the tests of errors, which run on the meta device too.
"""

import pytest
import torch
from samples import CASES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import sparse24

BF16, U8, FP8 = torch.bfloat16, torch.uint8, torch.float8_e4m3fn


def network(tokens: int, fp8: bool) -> list[torch.Tensor]:
    """Every op, on fresh tensors with `tokens` rows."""
    ops = torch.ops.sparse24
    x, w = torch.empty(tokens, 64, dtype=BF16), torch.empty(96, 64, dtype=BF16)
    grad, hot = torch.empty(tokens, 32, dtype=BF16), torch.empty(8, dtype=torch.int64)
    if fp8:
        q, scale, predicted = ops.quantize_fp8_predict(x, torch.empty(1))
        qw, w_scale = ops.quantize_fp8(w)
        values, meta, _, *_ = ops.linear_compress(q, qw, scale, w_scale, None, predicted)
        y = ops.linear_relu2(q, qw, scale, w_scale, None, predicted)[0]
        along = ops.compress_fp8(x, None, "relu2", -2)
    else:
        values, meta, *_ = ops.linear_compress(x, w)
        y = ops.linear_relu2(x, w)[0]
        along = ops.compress(x, "relu2", -2)
    w2 = torch.empty(32, 96, dtype=values.dtype)
    out = ops.mm(values, meta, w2.t(), torch.empty(tokens, 1))
    right = torch.empty(32, tokens, dtype=along[0].dtype).t()
    gradients = ops.mm(along[0], along[1], right, dim=-2)
    dense = ops.decompress(values, meta, tokens, 96)
    like = ops.compress_like(dense, meta)
    counts = ops.feature_counts(values, meta)
    some = ops.gather_features(values, meta, ops.densest_features(counts, 8))
    kept = torch.empty(tokens, 48, dtype=BF16)
    back = ops.linear_gradient(grad, torch.empty(32, 96, dtype=BF16), kept, meta, fp8_meta=fp8, hot=hot)
    dense_back = ops.linear_relu2_gradient(grad, torch.empty(32, 96, dtype=BF16), torch.empty(tokens, 96, dtype=BF16))
    given = ops.quantize_fp8(x, torch.empty(tokens, 1))
    ops.put_features(torch.empty(8, tokens, dtype=BF16), torch.empty(2, 4, tokens, dtype=BF16), hot[:4], -2)
    few = ops.mm_active(torch.empty(tokens, 96, dtype=BF16), torch.empty(96, 32, dtype=FP8 if fp8 else BF16))
    small = ops.relu2_mlp_few(x.view(tokens, 1, 64), w, torch.empty(96, 32, dtype=FP8 if fp8 else BF16))
    weights = [t.to(FP8 if fp8 else BF16) for t in (w, torch.empty(32, 96))]
    scales = (torch.empty(96), torch.empty(32), torch.empty(tokens)) if fp8 else ()
    whole = ops.relu2_mlp_sparse(x.view(tokens, 1, 64), *weights, None, None, *scales)
    whole_dense = ops.relu2_mlp_dense(x.view(tokens, 1, 64), *weights, None, None, *scales)
    both = ops.quantize_fp8_both(grad, None, True)
    eight, one = torch.empty(tokens, 48, dtype=FP8), torch.empty(1)
    scales = one, one, one, one
    pattern = ops.compress_fp8(x.new_empty(tokens, 96), None)[1]
    back_fp8 = ops.linear_gradient_fp8(both[0], torch.empty(96, 32, dtype=FP8), eight, pattern, *scales, True, hot)
    dense_fp8 = ops.linear_relu2_gradient_fp8(both[0], torch.empty(96, 32, dtype=FP8), eight.repeat(1, 2), *scales)
    some_fp8 = *both, *back_fp8, *dense_fp8
    return [
        few,
        small,
        whole,
        whole_dense,
        values,
        y,
        out,
        gradients,
        dense,
        like,
        counts,
        some,
        *back,
        dense_back,
        *given,
        *some_fp8,
    ]


@pytest.mark.parametrize("fp8", [False, True], ids=["sixteen_bit", "fp8"])
def test_unbacked_sizes(fp8):
    """No rule asks a size that is known at run time only for its value."""
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        tokens = shape_env.create_unbacked_symint()
        torch._check(tokens >= 0)
        results = network(tokens, fp8)
    assert all(isinstance(r, torch.Tensor) for r in results)
    assert results[4].shape[0] is tokens or results[4].shape[0] == tokens
    assert not shape_env.guards


@pytest.mark.parametrize("op, wrong, beside", [
    ("compress", lambda x, v, m: (x.float(),), None),
    ("compress_fp8", lambda x, v, m: (x, torch.ones(8)), ("scale", "x")),
    ("quantize_fp8", lambda x, v, m: (x, torch.ones(8)), ("scale", "x")),
    ("quantize_fp8_both", lambda x, v, m: (x, torch.ones(1)), ("scale", "x")),
    ("quantize_fp8_predict", lambda x, v, m: (x, torch.ones(1)), ("factor", "x")),
    ("compress_like", lambda x, v, m: (x, on_cpu(m)), ("meta", "x")),
    ("decompress", lambda x, v, m: (v, on_cpu(m), 8, 32), ("meta", "values")),
    ("feature_counts", lambda x, v, m: (v, on_cpu(m)), ("meta", "values")),
    ("gather_features", lambda x, v, m: (v, m, torch.ones(2).long()), ("features", "values")),
    ("mm", lambda x, v, m: (v, m, on_cpu(x.t())), ("b", "values")),
    ("mm", lambda x, v, m: (v, m, x.t(), torch.ones(1)), ("scale_a", "values")),
    ("put_features", lambda x, v, m: (x, torch.ones(1, 8, 2), torch.ones(2).long(), -1), ("parts", "out")),
    ("linear_relu2", lambda x, v, m: (x, on_cpu(x)), ("w", "x")),
    ("linear_compress", lambda x, v, m: (x, torch.cat([x, x]), None, torch.ones(1)), ("scale_w", "x")),
    ("linear_gradient", lambda x, v, m: (x, on_cpu(x.t()), v, m), ("w", "grad")),
    ("linear_relu2_gradient", lambda x, v, m: (x, on_cpu(x.t()), x), ("w", "grad")),
])  # fmt: skip
def test_another_device(op, wrong, beside):
    """Tensors of two devices, and float32 on CUDA, without a GPU. `beside`: an argument, and the one it belongs to."""
    with FakeTensorMode(), pytest.raises(RuntimeError) as error:
        x = torch.empty(8, 32, dtype=BF16, device="cuda")
        values, meta = torch.empty(8, 16, dtype=BF16, device="cuda"), torch.empty(1024, dtype=U8, device="cuda")
        getattr(sparse24, op)(*wrong(x, values, meta))
    sentence = "x to be bfloat16 or float16 on a CUDA device, got float32"
    if beside is not None:
        sentence = f"{beside[0]} to be on cuda:0 (the device of {beside[1]}), got cpu"
    assert str(error.value).splitlines()[0] == f"sparse24.{op}: expected {sentence}"


def on_cpu(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype in (BF16, FP8)], ids=str)
def test_known_sizes_leave_no_guards(case):
    """Rules on numbers are checked at once."""
    shape_env = ShapeEnv()
    sample = case.make("cpu")
    with FakeTensorMode(shape_env=shape_env, static_shapes=True) as mode:
        convert = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        sample.overload(*map(convert, sample.args), **sample.kwargs)
    assert not shape_env.guards
