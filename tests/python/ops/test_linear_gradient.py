"""linear_gradient: bit for bit the separate steps, wherever the sums of the product are exact."""

from dataclasses import dataclass

import oracle
import pytest
import torch
from compare import assert_accurate, assert_same_bits
from data import LAYOUTS, activations, integers, normal, relayout, relu2_like
from oracle import FP8, Pattern
from roots import round_to, times_root
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from training_reference import token_order

import sparse24

#: Tokens, D, F: no tokens, tails of groups and tiles in both directions, tokens in multiples of 32, D that is padded,
#: no D at all, no features.
SHAPES = [
    (0, 64, 96),
    (1, 64, 32),
    (2, 8, 16),
    (127, 80, 160),
    (129, 64, 1888),
    (7, 208, 48),
    (32, 24, 48),
    (160, 72, 416),
    (300, 0, 64),
    (64, 0, 32),
    (33, 16, 0),
]
ODD_DEPTHS = [(9, 1, 64), (130, 36, 96), (3, 99, 32), (96, 44, 160)]
META = pytest.mark.parametrize("fp8_meta", [False, True], ids=["own_meta", "fp8_meta"])
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["natural", "interleaved"])
NAMES = ("dh_values", "dh_tokens", "dh_tokens_meta", "y_tokens", "y_tokens_meta", "counts", "y_hot", "dh_hot")


@dataclass
class Problem:
    """Operands whose products and sums are exact in float32."""

    grad: Tensor
    w: Tensor
    values: Tensor
    meta: Tensor
    interleaved: bool = False
    fp8_meta: bool = False
    hot: Tensor | None = None
    roots: bool = False

    def run(self, op=sparse24.linear_gradient, **options) -> tuple[Tensor, ...]:
        options = {"fp8_meta": self.fp8_meta, "hot": self.hot, "roots": self.roots} | options
        return op(self.grad, self.w, self.values, self.meta, self.interleaved, **options)

    @property
    def order(self) -> list[int]:
        """The token of each row of what is compressed along tokens."""
        return token_order(self.grad.shape[0], self.interleaved)

    @property
    def shape(self) -> tuple[int, int]:
        return self.grad.shape[0], self.w.shape[1]

    def dy(self) -> Tensor:
        """Rounded once, on the CPU."""
        product = self.grad.cpu().double() @ self.w.cpu().double() + 0.0  # no negative zeros: sums begin with zero
        return round_to(product.float(), self.grad.dtype)


def problem(
    tokens, depth, features, dtype, device, *, seed=0, specials=False, interleaved=False, fp8_meta=False, roots=False
) -> Problem:
    features = oracle.round_up(features, 32 if fp8_meta else 16)
    grad = integers(tokens, depth, dtype=dtype, limit=2, seed=seed).to(device)
    w = integers(depth, features, dtype=dtype, limit=2, seed=seed + 1).to(device)
    h = activations(tokens, features, dtype, seed=seed + 2, specials=specials)
    activation = "relu" if roots else "relu2"
    values, meta = oracle.compress(h, activation)
    if fp8_meta:  # the same pattern
        meta = oracle.compress_fp8(h, activation=activation)[1]
    return Problem(grad, w, values.to(device), meta.to(device), interleaved, fp8_meta, roots=roots)


def counts_and_hot(p: Problem, y: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last three results, from dense y and dh."""
    if p.hot is None:
        return (y != 0).sum(0, dtype=torch.int32), *(t.new_empty(0, t.shape[0]) for t in (y, dh))
    hot = p.hot.to(y.device)
    highest_before = torch.cat((hot.new_tensor([-1]), hot)).cummax(0).values[:-1]
    bad = ((hot <= highest_before) | (hot >= y.shape[1]))[:, None]
    nan = oracle.from_bits(torch.tensor([oracle._NAN_CODE[y.dtype]]), y.dtype).to(y.device)
    return (
        torch.empty(0, dtype=torch.int32),
        *(torch.where(bad, nan, t.t()[hot.clamp(0, max(y.shape[1] - 1, 0))]) for t in (y, dh)),
    )


def reference(p: Problem) -> tuple[Tensor, ...]:
    """From the definition."""
    pattern = Pattern.of_meta(p.meta, *p.shape, FP8 if p.fp8_meta else p.grad.dtype, -1)
    values = p.values.cpu()
    dh = times_root(pattern.gather(p.dy()), values, p.roots)
    values = round_to(values.float().square(), values.dtype) if p.roots else values
    y, dense_dh = pattern.scatter(values), pattern.scatter(dh)
    along_tokens = *oracle.compress(dense_dh[p.order], dim=-2), *oracle.compress(y[p.order], dim=-2)
    return dh, *along_tokens, *counts_and_hot(p, y, dense_dh)


def composition(p: Problem) -> tuple[Tensor, ...]:
    """From the other ops."""
    dh = times_root(sparse24.compress_like(p.dy().to(p.grad.device), p.meta), p.values)
    dense_dh, dense_y = (sparse24.decompress(t, p.meta, *p.shape) for t in (dh, p.values))
    along_tokens = *sparse24.compress(dense_dh[p.order], dim=-2), *sparse24.compress(dense_y[p.order], dim=-2)
    return dh, *along_tokens, *counts_and_hot(p, dense_y, dense_dh)


def check(p: Problem, expected=reference) -> None:
    for name, actual, wanted in zip(NAMES, p.run(), expected(p), strict=True):
        assert_same_bits(actual, wanted, name)
        assert actual.device == p.grad.device and actual.is_contiguous()


@META
@INTERLEAVED
@pytest.mark.parametrize("specials", [False, True], ids=["finite", "specials"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(poisoned_memory, device, dtype, shape, specials, interleaved, fp8_meta):
    check(problem(*shape, dtype, device, specials=specials, interleaved=interleaved, fp8_meta=fp8_meta))


@META
@INTERLEAVED
@pytest.mark.parametrize("specials", [False, True], ids=["finite", "specials"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_roots(poisoned_memory, device, root_dtype, shape, specials, interleaved, fp8_meta):
    """Of the activation, as training in float16 stores them: y along tokens, hot features and counts are squares."""
    options = {"specials": specials, "interleaved": interleaved, "fp8_meta": fp8_meta, "roots": True}
    p = problem(*shape, root_dtype, device, seed=25, **options)
    check(p)
    p.hot = hot_features(p, "some")
    check(p)
    assert_same_bits(p.run(tokens=False, hot=None)[0], reference(p)[0])


@INTERLEAVED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_separate_ops(poisoned_memory, device, dtype, shape, interleaved):
    check(problem(*shape, dtype, device, seed=3, interleaved=interleaved), composition)


@INTERLEAVED
@pytest.mark.parametrize("shape", ODD_DEPTHS, ids=str)
def test_any_depth(poisoned_memory, device, dtype, shape, interleaved):
    check(problem(*shape, dtype, device, seed=5, interleaved=interleaved))


@META
@INTERLEAVED
def test_without_tokens(poisoned_memory, device, dtype, interleaved, fp8_meta):
    p = problem(129, 64, 160, dtype, device, specials=True, interleaved=interleaved, fp8_meta=fp8_meta)
    dh, *others = p.run(tokens=False)
    assert_same_bits(dh, p.run()[0])
    expected = p.run()[1:]
    assert [t.numel() for t in others] == [0] * 7
    assert [t.dtype for t in others] == [t.dtype for t in expected]


def hot_features(p: Problem, kind: str) -> Tensor:
    """int64: of all features those that `kind` says."""
    features = p.w.shape[1]
    every = torch.arange(features)
    hot = {
        "none": every[:0],
        "last": every[-1:],
        "some": every[torch.rand(features, generator=torch.Generator().manual_seed(features)) < 0.1],
        "all": every,
    }[kind]
    return hot.to(p.grad.device)


@META
@INTERLEAVED
@pytest.mark.parametrize("kind", ["none", "last", "some", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hot_features(poisoned_memory, device, dtype, shape, kind, interleaved, fp8_meta):
    p = problem(*shape, dtype, device, seed=21, specials=True, interleaved=interleaved, fp8_meta=fp8_meta)
    p.hot = hot_features(p, kind)
    check(p)


@META
@INTERLEAVED
@pytest.mark.parametrize("tokens", [1, 37, 64, 160])
def test_hot_features_are_columns_of_the_dense_matrices(device, dtype, tokens, interleaved, fp8_meta):
    """Nothing else depends on them but that the counts are not made."""
    p = problem(tokens, 24, 160, dtype, device, seed=22, interleaved=interleaved, fp8_meta=fp8_meta)
    expected = p.run()[:-3]
    p.hot = hot_features(p, "some")
    *others, counts, y_hot, dh_hot = p.run()
    for name, actual, wanted in zip(NAMES, others, expected, strict=False):
        assert_same_bits(actual, wanted, name)
    assert counts.shape == (0,) and counts.dtype == torch.int32
    for actual, values in ((y_hot, p.values), (dh_hot, others[0])):
        assert_same_bits(actual, sparse24.gather_features(values, p.meta, p.hot, fp8_meta).t())


@META
@INTERLEAVED
@pytest.mark.parametrize("tokens", [37, 96])
def test_hot_indices_that_do_not_ascend_or_are_no_features_give_nan(
    poisoned_memory, device, dtype, tokens, interleaved, fp8_meta
):
    p = problem(tokens, 24, 96, dtype, device, seed=23, interleaved=interleaved, fp8_meta=fp8_meta)
    for hot in (
        [-1, 3, 5, 5, 4, 6, 95, 96],
        [7, 2**40, 8],
        [-(2**63), -5, 0, 2**63 - 1],
        [96],
        [2, 1, 3],
        [0] * 96,
    ):
        p.hot = torch.tensor(hot, device=device)
        check(p)
    *_, y_hot, dh_hot = p.run(hot=torch.tensor([2, 1, 3], device=device))
    for t in (y_hot, dh_hot):
        assert t.isnan().all(1).tolist() == [False, True, False]


def test_strided_hot_features(device):
    p = problem(40, 24, 96, torch.bfloat16, device, seed=24)
    p.hot = torch.arange(96, device=device)[1::3]
    check(p)


@META
def test_any_number_of_tokens(device, fp8_meta):
    """Every tail of a group, and of the metadata's 64 tokens."""
    for tokens in (*range(1, 9), 31, 32, 33, 63, 64, 65, 66, 67):
        for interleaved in (False, True):
            options = {"seed": tokens, "interleaved": interleaved, "fp8_meta": fp8_meta}
            check(problem(tokens, 16, 48, torch.bfloat16, device, **options))


@META
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [37, 64])
def test_layouts(device, dtype, tokens, layout, fp8_meta):
    p = problem(tokens, 64, 96, dtype, device, seed=7, interleaved=True, fp8_meta=fp8_meta)
    p.grad, p.w = relayout(p.grad, layout), relayout(p.w, layout)
    if layout != "expanded":  # values belong to their metadata
        p.values = relayout(p.values, layout)
    p.meta = relayout(p.meta.repeat(2, 1), "strided")[1]
    check(p)


@INTERLEAVED
@pytest.mark.parametrize("tokens", [40, 96])
def test_nan_of_a_token_stays_there(device, dtype, tokens, interleaved):
    p = problem(tokens, 64, 96, dtype, device, seed=9, interleaved=interleaved)
    p.grad[3, 5] = torch.nan
    check(p)


@INTERLEAVED
@pytest.mark.parametrize("tokens", [37, 64])
def test_does_not_read_behind_the_gradient(device, dtype, tokens, interleaved):
    """NaN behind the last token and the last of its columns, in the same storage."""
    p = problem(tokens, 24, 96, dtype, device, seed=12, interleaved=interleaved)
    grad = p.grad
    storage = grad.new_full((tokens + 64, 32), torch.nan)
    for view in (storage.view(-1)[: tokens * 24].view(tokens, 24), storage[:tokens, :24]):
        storage.fill_(torch.nan)
        p.grad = view.copy_(grad)
        check(p)


def test_overflow(device):
    """dy and dh beyond float16 are infinite; infinity times the root of zero is NaN."""
    p = problem(5, 16, 32, torch.float16, device, seed=10)
    p.grad.fill_(128)
    p.w.fill_(128)
    check(p)
    assert p.run()[0].isnan().any()


@pytest.mark.parametrize("roots", [False, True], ids=["squares", "roots"])
def test_every_root_is_rounded_to_nearest(device, dtype, roots):
    """All numbers that y can be, subnormals and infinity among them; or all that are given instead of roots."""
    if dtype == torch.float32 or (roots and dtype != torch.float16):
        pytest.skip("too many, or no roots")
    y = oracle.from_bits(torch.arange(2**15), dtype)
    largest = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    y = y[: largest + 1]
    y = torch.nn.functional.pad(y, (0, -len(y) % 128)).reshape(-1, 16)  # the kept values of 32 features
    meta = oracle.compress(torch.zeros(y.shape[0], 32, dtype=dtype))[1]
    grad = torch.ones(y.shape[0], 8, dtype=dtype)
    w = torch.zeros(8, 32, dtype=dtype)
    w[0] = 1.25
    check(Problem(grad.to(device), w.to(device), y.to(device), meta.to(device), roots=roots))


def test_small_example(device):
    """Four tokens of one feature: y = 1, 4, 9, 16 and dy = 8, 4, 1, 1, so dh = 16, 16, 6, 8."""
    h = torch.zeros(4, 16, device=device, dtype=torch.bfloat16)
    h[:, 0] = torch.tensor([1.0, 2, 3, 4])
    values, meta = sparse24.compress(h, "relu2")
    grad = torch.tensor([[8.0], [4], [1], [1]], device=device, dtype=torch.bfloat16)
    w = torch.zeros(1, 16, device=device, dtype=torch.bfloat16)
    w[0, 0] = 1
    dh, dh_tokens, dh_meta, y_tokens, y_meta, counts, *_ = sparse24.linear_gradient(grad, w, values, meta)
    assert dh[:, 0].tolist() == [16, 16, 6, 8] and dh.count_nonzero() == 4
    assert dh_tokens[:, 0].tolist() == [16, 16] and dh_meta[0].item() & 0xF == 0 | 1 << 2
    assert y_tokens[:, 0].tolist() == [9, 16] and y_meta[0].item() & 0xF == 2 | 3 << 2
    assert counts.tolist() == [4, *[0] * 15]
    hot = torch.tensor([0, 9], device=device)
    *_, counts, y_hot, dh_hot = sparse24.linear_gradient(grad, w, values, meta, hot=hot)
    assert counts.tolist() == []
    assert y_hot.tolist() == [[1, 4, 9, 16], [0] * 4] and dh_hot.tolist() == [[16, 16, 6, 8], [0] * 4]


@INTERLEAVED
def test_what_it_is_for(device, interleaved):
    """The three gradients of the network, from its results and the sparse products."""
    x = normal(64, 32, dtype=torch.bfloat16, seed=1).to(device)
    w1 = normal(96, 32, dtype=torch.bfloat16, seed=2).div(4).to(device)
    w2 = normal(32, 96, dtype=torch.bfloat16, seed=3).div(4).to(device)
    grad = normal(64, 32, dtype=torch.bfloat16, seed=4).to(device)
    values, meta, *_ = sparse24.linear_compress(x, w1)
    hot = sparse24.densest_features(sparse24.feature_counts(values, meta), 5)
    dh, dh_tokens, dh_meta, y_tokens, y_meta, _, y_hot, dh_hot = sparse24.linear_gradient(
        grad, w2, values, meta, interleaved, hot=hot
    )
    dense_y = sparse24.decompress(values, meta, 64, 96).float()
    dense_dh = torch.where(dense_y != 0, (grad.float() @ w2.float()) * 2 * dense_y.sqrt(), 0)
    pruned = [torch.empty(64, 96, device=device) for _ in range(2)]
    for natural, v, m in zip(pruned, (dh_tokens, y_tokens), (dh_meta, y_meta), strict=True):
        natural[token_order(64, interleaved)] = sparse24.decompress(v, m, 64, 96, -2).float()
    over_tokens = {"dim": -2, "interleaved": interleaved}
    for actual, expected in (
        (sparse24.mm(dh, meta, w1), dense_dh @ w1.float()),
        (sparse24.mm(dh_tokens, dh_meta, x, **over_tokens), pruned[0].t() @ x.float()),
        (sparse24.mm(y_tokens, y_meta, grad, transpose_out=True, **over_tokens), grad.float().t() @ pruned[1]),
        (dh_hot @ x, dense_dh[:, hot].t() @ x.float()),
        (grad.t() @ y_hot.t(), grad.float().t() @ dense_y[:, hot]),
    ):
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("depth", [64, 1000])
def test_accuracy(device, dtype, depth):
    """Real numbers: as near to float64 as twice torch's error in the same precision."""
    grad = normal(129, depth, dtype=dtype, seed=14).to(device)
    w = normal(depth, 96, dtype=torch.float32, seed=15).div(depth**0.5).to(dtype).to(device)
    values, meta = sparse24.compress(relu2_like(129, 96, dtype, seed=16).to(device), "relu2")
    root = 2 * sparse24.decompress(values, meta, 129, 96).double().sqrt()
    torchs = ((grad @ w).float() * root.float()).to(dtype)
    exact, magnitude = grad.double() @ w.double() * root, grad.double().abs() @ w.double().abs() * root
    dh = sparse24.linear_gradient(grad, w, values, meta)[0]
    assert_accurate(sparse24.decompress(dh, meta, 129, 96), torchs, exact, magnitude)


@META
@pytest.mark.parametrize("kind", [None, "some"], ids=["counts", "hot"])
def test_one_dynamic_graph_for_all_sizes(device, kind, fp8_meta):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sparse24.linear_gradient, backend=counter, fullgraph=True, dynamic=True)
    for tokens, depth, features in ((64, 40, 96), (127, 24, 160), (193, 48, 1856)):
        p = problem(tokens, depth, features, torch.bfloat16, device, fp8_meta=fp8_meta)
        p.hot = None if kind is None else hot_features(p, kind)
        for actual, expected in zip(p.run(compiled), p.run(), strict=True):
            assert_same_bits(actual, expected)
            assert actual.stride() == expected.stride()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_there_is_no_backward_pass(device):
    p = problem(4, 8, 16, torch.bfloat16, device)
    dh = sparse24.linear_gradient(p.grad.requires_grad_(), p.w, p.values, p.meta)[0]
    with pytest.raises(RuntimeError, match=r"sparse24.linear_gradient: expected no backward pass .*, got one"):
        dh.sum().backward()


def test_wrong_shapes_fail_while_tracing(device):
    compiled = torch.compile(sparse24.linear_gradient, backend="eager", fullgraph=True)
    p = problem(4, 8, 16, torch.bfloat16, device)
    with pytest.raises(Exception, match=r"sparse24.linear_gradient: expected w to have 8 rows .*got 6"):
        compiled(p.grad, p.w[:6], p.values, p.meta)
    torch._dynamo.reset()
    with pytest.raises(
        Exception, match=r"sparse24.linear_gradient: expected tokens to be True where hot is given, got"
    ):
        compiled(p.grad, p.w, p.values, p.meta, tokens=False, hot=torch.arange(3, device=device))
    torch._dynamo.reset()
