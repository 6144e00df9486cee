"""mm of interleaved tokens with b in the order of tokens: every bit of the product with an interleaved b."""

import pytest
import torch
from compare import assert_same_bits
from data import integers, k_major, normal, relayout, unaligned
from oracle import FP8
from product import compressed
from torch._dynamo.testing import CompileCounterWithBackend
from training_reference import token_order

import sparse24

#: Tokens: fewer than a group, every remainder, tails of the tiles and of the metadata's blocks.
TOKENS = (1, 2, 3, 4, 5, 8, 31, 32, 63, 64, 66, 68, 127, 128, 129, 300, 1028)
#: Layouts of b [K, N]; fp8 has those that are K-major.
LAYOUTS = {
    "contiguous": lambda b: b.contiguous(),
    "sliced": lambda b: relayout(b, "sliced"),
    "offset": lambda b: relayout(b, "offset"),
    "strided": lambda b: relayout(b, "strided"),
    "rows": lambda b: b.repeat_interleave(2, 0)[::2],
    "expanded": lambda b: b[:, :1].expand(b.shape),
    "equal rows": lambda b: b[:1].expand(b.shape),
    "k-major": k_major,
    "k-sliced": lambda b: relayout(b.t(), "sliced").t(),
    "k-offset": lambda b: relayout(b.t(), "offset").t(),
}


def operands(tokens, features, n, dtype, device):
    """Values, metadata and b: small integers, whose products have exact sums in every order."""
    x = integers(tokens, features, dtype=torch.bfloat16 if dtype == FP8 else dtype).to(device)
    b = integers(tokens, n, dtype=dtype, seed=1).to(device)
    return *compressed(x, dtype, -2), k_major(b) if dtype == FP8 else b


def interleaved(b):
    rows = b.cpu()[token_order(b.shape[0], True)].to(b.device)
    return k_major(rows) if b.dtype == FP8 else rows


def check(values, meta, b, *scales_and_bias, **options):
    expected = sparse24.mm(values, meta, interleaved(b), *scales_and_bias, dim=-2, **options)
    actual = sparse24.mm(values, meta, b, *scales_and_bias, dim=-2, interleaved=True, **options)
    assert_same_bits(actual, expected)
    assert actual.is_contiguous()


@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(poisoned_memory, device, values_dtype, tokens):
    for features, n in ((72, 13), (136, 264)):
        check(*operands(tokens, features, n, values_dtype, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [64, 67])
def test_layouts_of_b(device, values_dtype, tokens, layout):
    if values_dtype == FP8 and not layout.startswith("k-"):
        pytest.skip("fp8 is K-major only")
    for n in (72, 13, 1):
        values, meta, b = operands(tokens, 96, n, values_dtype, device)
        check(values, meta, LAYOUTS[layout](b))


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_everything_else_stays_as_it_is(device, values_dtype, out_dtype, transpose_out):
    for tokens in (66, 128):
        values, meta, b = operands(tokens, 96, 40, values_dtype, device)
        scale_a = torch.exp2(integers(96, dtype=torch.float32, limit=2)).to(device)
        bias = integers(40, dtype=torch.float32, seed=3).to(device)
        options = {"out_dtype": out_dtype, "transpose_out": transpose_out}
        check(values, meta, b, **options)
        check(relayout(values, "strided"), unaligned(meta), b, scale_a, scale_a[:40], bias, **options)


def test_real_numbers(device, values_dtype):
    """The order of the sums is that of the interleaved product too."""
    for tokens in (200, 202):
        x = normal(tokens, 96, dtype=torch.bfloat16 if values_dtype == FP8 else values_dtype).to(device)
        b = normal(tokens, 40, dtype=values_dtype, seed=1).to(device)
        check(*compressed(x, values_dtype, -2), k_major(b) if values_dtype == FP8 else b)


def test_small_example(device, dtype):
    """Eight tokens in groups 0, 2, 4, 6 and 1, 3, 5, 7, of which the first two are kept."""
    x = torch.zeros(8, 8, device=device, dtype=dtype)
    x[[0, 1, 4, 5], 0] = 1
    b = torch.tensor([[1], [2], [4], [8], [16], [32], [64], [128]], device=device, dtype=dtype)
    values, meta = sparse24.compress(x, dim=-2)
    assert sparse24.mm(values, meta, b, dim=-2, interleaved=True)[:, 0].tolist() == [1 + 4 + 2 + 8, *[0] * 7]


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
def test_empty(poisoned_memory, device, values_dtype, transpose_out):
    for tokens, features, n in ((0, 64, 8), (64, 0, 8), (64, 64, 0), (0, 0, 0), (0, 64, 0)):
        check(*operands(tokens, features, n, values_dtype, device), transpose_out=transpose_out)


@pytest.mark.parametrize("tokens", [61, 64])
def test_does_not_read_behind_b(device, values_dtype, tokens):
    """NaN behind the last token and the last column, in the same storage."""
    values, meta, b = operands(tokens, 96, 13, values_dtype, device)
    expected = sparse24.mm(values, meta, b, dim=-2, interleaved=True)
    for transposed in (False, True):
        if values_dtype == FP8 and not transposed:
            continue
        storage = torch.full((32, 96) if transposed else (96, 32), torch.nan, device=device).to(values_dtype)
        view = (storage.t() if transposed else storage)[:tokens, :13]
        view.copy_(b)
        assert_same_bits(sparse24.mm(values, meta, view, dim=-2, interleaved=True), expected)


@pytest.mark.parametrize("tokens", [64, 66])
def test_a_column_does_not_see_the_others(device, dtype, tokens):
    values, meta, b = operands(tokens, 96, 33, dtype, device)
    expected = sparse24.mm(values, meta, b, dim=-2, interleaved=True)
    b[:, :16] = torch.nan
    b[:, 17:] = torch.nan
    assert_same_bits(sparse24.mm(values, meta, b, dim=-2, interleaved=True)[:, 16], expected[:, 16])


def test_is_deterministic(device, values_dtype):
    x = normal(300, 264, dtype=torch.bfloat16 if values_dtype == FP8 else values_dtype).to(device)
    b = k_major(normal(300, 136, dtype=values_dtype, seed=1).to(device))
    values, meta = compressed(x, values_dtype, -2)
    first, *others = (sparse24.mm(values, meta, b, dim=-2, interleaved=True) for _ in range(4))
    for other in others:
        assert_same_bits(other, first)


# ---- gradients -------------------------------------------------------------------------------------------------------


def natural(values, meta, b, bias, **options):
    return sparse24.mm(values, meta, b, bias=bias, interleaved=True, **options)


def composed(values, meta, b, bias, **options):
    return sparse24.mm(values, meta, b[token_order(b.shape[0], True)], bias=bias, **options)


@pytest.mark.parametrize("transpose_out", [False, True], ids=["mn", "nm"])
@pytest.mark.parametrize("tokens", [3, 36, 39])
def test_gradients(device, dtype, tokens, transpose_out):
    """Those of the product with b interleaved before it."""
    values, meta, b = operands(tokens, 96, 20, dtype, device)
    bias = integers(20, dtype=dtype, seed=2).to(device)
    grad = integers(*((20, 96) if transpose_out else (96, 20)), dtype=dtype, seed=3).to(device)

    def gradients(product):
        leaves = [t.detach().requires_grad_() for t in (values, b, bias)]
        out = product(leaves[0], meta, *leaves[1:], dim=-2, transpose_out=transpose_out)
        return torch.autograd.grad(out, leaves, grad)

    for actual, expected in zip(gradients(natural), gradients(composed), strict=True):
        assert_same_bits(actual + 0.0, expected + 0.0)


def test_second_derivatives():
    values, meta, b = operands(10, 16, 6, torch.float32, "cpu")
    bias = integers(6, dtype=torch.float32, seed=2)

    def second(product):
        leaves = [t.detach().requires_grad_() for t in (values, b, bias)]
        out = product(leaves[0], meta, *leaves[1:], dim=-2).square().sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for actual, expected in zip(second(natural), second(composed), strict=True):
        assert torch.equal(actual, expected)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def test_one_dynamic_graph_for_all_sizes(device):
    """Forward and backward, also where the number of tokens is no multiple of four."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x, b):
        values, meta = sparse24.compress(x, dim=-2)
        return sparse24.mm(values, meta, b, dim=-2, transpose_out=True, interleaved=True).square().sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (64, 127, 194, 8):
        x = integers(tokens, 96, dtype=torch.bfloat16, seed=tokens).to(device).requires_grad_()
        b = integers(tokens, 48, dtype=torch.bfloat16, seed=1).to(device).requires_grad_()
        for actual, expected in zip(
            torch.autograd.grad(compiled(x, b), (x, b)), torch.autograd.grad(loss(x, b), (x, b)), strict=True
        ):
            assert_same_bits(actual, expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_another_dim_fails_while_tracing(device):
    values, meta = sparse24.compress(torch.ones(8, 16, device=device, dtype=torch.bfloat16))
    b = torch.ones(16, 8, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(sparse24.mm, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sparse24.mm: expected dim to be -2 with interleaved=True, got -1"):
        compiled(values, meta, b, interleaved=True)
    torch._dynamo.reset()
