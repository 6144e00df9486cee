"""The schemas say what the wrappers say: names, order and defaults of arguments. Calls may leave the defaults out."""

import inspect

import pytest
import torch
from compare import assert_same_bits
from data import normal

import sparse24

OPS = sorted(n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("sparse24::"))


@pytest.mark.parametrize("op", OPS)
def test_schemas_are_as_the_wrappers(op):
    schema = getattr(torch.ops.sparse24, op).default._schema
    of_wrapper = [
        (p.name, p.kind == p.KEYWORD_ONLY, p.default)
        for p in inspect.signature(getattr(sparse24, op)).parameters.values()
    ]
    of_schema = [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in schema.arguments
    ]
    assert of_schema == of_wrapper


@pytest.mark.parametrize("op", OPS)
def test_optional_tensors_have_defaults(op):
    for argument in getattr(torch.ops.sparse24, op).default._schema.arguments:
        assert argument.has_default_value() or not str(argument.type).startswith("Optional"), argument.name


def calls(x, w):
    """Every op with as little as it takes."""
    ops = torch.ops.sparse24
    values, meta = ops.compress(x)
    wide, wide_meta, *_ = ops.linear_compress(x, w)
    results = [values, wide, ops.mm(values, meta, w.t()), ops.linear_relu2(x, w)[0], ops.compress_like(x, meta)]
    results.append(ops.decompress(values, meta, *x.shape))
    constant = x.detach()
    results += [ops.compress_fp8(constant)[0], ops.quantize_fp8(constant)[0], ops.feature_counts(values.detach(), meta)]
    features = torch.arange(3, device=x.device)
    results.append(ops.gather_features(values.detach(), meta, features))
    results.append(ops.linear_gradient(constant, w.detach().t(), wide.detach(), wide_meta)[0])
    return results


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_defaults_may_be_left_out(device, compiled):
    x = normal(40, 32, dtype=torch.bfloat16).to(device).requires_grad_()
    w = normal(32, 32, dtype=torch.bfloat16, seed=1).to(device).requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(calls, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else calls
    results = run(x, w)
    grads = torch.autograd.grad(sum(r.float().square().sum() for r in results[:6]), (x, w))
    torch._dynamo.reset()

    values, meta = sparse24.compress(x, "none", -1)
    wide, wide_meta, *_ = sparse24.linear_compress(x, w, None, None, None, None, activation="relu2", scaling="given")
    expected = [values, wide, sparse24.mm(values, meta, w.t(), None, None, None, dim=-1, transpose_out=False)]
    expected += [sparse24.linear_relu2(x, w, None, None, None, None)[0], sparse24.compress_like(x, meta, -1)]
    expected.append(sparse24.decompress(values, meta, 40, 32, -1))
    expected += [sparse24.compress_fp8(x.detach(), None, "none", -1, "row")[0]]
    expected += [sparse24.quantize_fp8(x.detach(), None, "row")[0], sparse24.feature_counts(values, meta, 1024, False)]
    expected.append(sparse24.gather_features(values, meta, torch.arange(3, device=device), False))
    expected.append(sparse24.linear_gradient(x, w.t(), wide, wide_meta, False, True, False, None)[0])
    for a, b in zip(results, expected, strict=True):
        assert_same_bits(a, b)
    right = torch.autograd.grad(sum(r.float().square().sum() for r in expected[:6]), (x, w))
    for a, b in zip(grads, right, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 * b.abs().max().item())
