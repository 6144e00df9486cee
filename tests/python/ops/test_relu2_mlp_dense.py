"""relu2_mlp_dense: what its two products give; rows that do not depend on others; data that is replayed; errors."""

import pytest
import torch
from compare import assert_same_bits
from data import LAYOUTS, integers, normal, relayout
from fuzzing.rounding import product, round_to
from oracle import FP8
from torch import Tensor

import sparse24

BF16 = torch.bfloat16
#: T, D, F, D_out; T from one to the most of a call on CUDA, on both sides of where another kernel takes over.
SHAPES = [
    (1, 16, 16, 1),
    (8, 416, 528, 136),
    (9, 80, 304, 77),
    (15, 48, 32, 3),
    (16, 1024, 256, 64),
    (17, 160, 144, 40),
    (32, 96, 1008, 520),
    (33, 208, 304, 8),
    (63, 2080, 160, 16),
    (64, 528, 704, 104),
    (65, 64, 4112, 528),
    (100, 4096, 80, 24),
    (128, 272, 2608, 1040),
    # On a GPU: tiles of 192 rows and several of them a block, in both products; a ring that goes around often.
    (16, 48, 30000, 56),
    (70, 32, 60000, 16),
    (33, 12000, 64, 12),
    (12, 32, 32, 9000),
    (128, 16, 64, 20000),
    # On an H200, from 65 tokens on: tiles of 64, 80, 96, 128, 144, 176 and 192 rows; slices of K, some of them empty.
    (66, 32, 8000, 8),
    (68, 16, 80, 1664),
    (90, 32, 10000, 80),
    (128, 32, 12000, 16),
    (72, 32, 16384, 16),
    (127, 32, 18432, 8),
    (65, 32, 21504, 8),
    (128, 32, 25344, 8),
    (128, 16, 160, 3072),
    (96, 16, 32, 4097),
    (65, 16, 288, 2560),
    (77, 16, 16, 12672),
]
SCALES = ("computed", "one", "each", "factor")


def network(
    shape, dtype: torch.dtype, device: str, *, fp8=False, scale="computed", seed=0
) -> tuple[Tensor | None, ...]:
    """Small integers, scales that are powers of two: every sum is exact, as are the codes of x."""
    tokens, depth, features, out = shape
    x = integers(tokens, depth, dtype=dtype, limit=1, seed=seed)
    x[:, :1] = 7  # amax 7 is a scale of 2^-6
    w1 = integers(features, depth, dtype=torch.float32, limit=1, seed=seed + 1)
    w2 = integers(out, features, dtype=torch.float32, limit=1, seed=seed + 2)
    hidden = BF16 if fp8 else dtype
    # So much below zero that few neurons are active, and small.
    b1 = integers(features, dtype=torch.float32, limit=2, seed=seed + 3) - 7 - 1.5 * depth**0.5
    b2 = integers(out, dtype=torch.float32, limit=9, seed=seed + 4)
    w1_scale = w2_scale = scale_y = factor = None
    if fp8:
        generator = torch.Generator().manual_seed(seed)
        w1_scale = torch.exp2(torch.randint(-2, 1, (features,), generator=generator).float())
        w2_scale = torch.exp2(torch.randint(-2, 3, (out,), generator=generator).float())
        scale_y = {"one": torch.ones(1), "each": torch.exp2(torch.arange(tokens) % 3)}.get(scale)
        factor = torch.full((1,), 2.0**-8) if scale == "factor" else None
    w_dtype = FP8 if fp8 else dtype
    all_of_it = x, w1.to(w_dtype), w2.to(w_dtype), b1.round().to(hidden), b2.to(dtype if out % 2 else torch.float32)
    return tuple(None if t is None else t.to(device) for t in (*all_of_it, w1_scale, w2_scale, scale_y, factor))


def assert_is_its_products(got: Tensor, operands, threshold: float = 0.0) -> None:
    """With the activation that the first one gives, the second one within the rounding of its sums."""
    x, w1, w2, b1, b2, w1_scale, w2_scale, scale_y, factor = operands
    fp8, scale_x = w1.dtype == FP8, None
    hidden = BF16 if fp8 else x.dtype
    if fp8 and factor is not None:
        x, scale_x, scale_y = sparse24.quantize_fp8_predict(x, factor)
    elif fp8:
        x, scale_x = sparse24.quantize_fp8(x)
    cpu = [None if t is None else t.cpu() for t in (x, w1, scale_x, w1_scale, b1, w2, w2_scale, b2, scale_y)]
    x, w1, scale_x, w1_scale, b1, w2, w2_scale, b2, scale_y = cpu
    h = product(x, w1.t(), scale_x, w1_scale, b1)
    root = h.rounded(hidden).float()
    y = torch.where(root <= threshold, 0, root).square()
    if fp8 and scale_y is None:
        y, scale_y = sparse24.quantize_fp8(y.to(hidden))
    elif fp8:
        y = sparse24.quantize_fp8(y, scale_y.reshape(-1, 1).expand(len(y), 1).contiguous())[0]
    else:
        y = round_to(y, hidden)
    assert got.is_contiguous()
    product(y, w2.t(), scale_y, w2_scale, b2).check(got.cpu())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bits(poisoned_memory, device, dtype, shape):
    threshold = 2.5 if shape[0] % 2 else 0.0
    operands = network(shape, dtype, device)
    got = sparse24.relu2_mlp_dense(*operands, threshold)
    assert_is_its_products(got, operands, threshold)
    assert_same_bits(sparse24.relu2_mlp_dense(*operands, threshold), got)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [(shape, SCALES[i % 4]) for i, shape in enumerate(SHAPES)] + [((40, 208, 176, 24), scale) for scale in SCALES],
    ids=str,
)
def test_float8(poisoned_memory, device, dtype, shape, scale):
    operands = network(shape, dtype, device, fp8=True, scale=scale)
    got = sparse24.relu2_mlp_dense(*operands, 0.25)
    assert_is_its_products(got, operands, 0.25)
    assert_same_bits(sparse24.relu2_mlp_dense(*operands, 0.25), got)


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("shape", [(16, 512, 1024, 256), (128, 1664, 6656, 416), (50, 256, 18432, 64)], ids=str)
def test_is_accurate(device, dtype, shape, fp8):
    tokens, depth, features, out = shape
    x = normal(tokens, depth, dtype=dtype).to(device)
    w1 = (normal(features, depth, dtype=torch.float32, seed=1) * depth**-0.5).to(dtype).to(device)
    w2 = (normal(out, features, dtype=torch.float32, seed=2) * features**-0.5).to(dtype).to(device)
    exact = torch.relu(x.double() @ w1.double().t()).square() @ w2.double().t()
    if not fp8:
        got, error = sparse24.relu2_mlp_dense(x, w1, w2), max(2 * torch.finfo(dtype).eps, 1e-6)
    else:
        (q1, s1), (q2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
        got, error = sparse24.relu2_mlp_dense(x, q1, q2, None, None, s1, s2), 0.06
    assert (got.double() - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
def test_rows_are_independent(device, dtype, fp8):
    """Of other tokens, and of their number."""
    shapes = (128, 528), (1200, 528), (272, 1200)
    x, w1, w2 = (normal(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes))
    scales = ()
    if fp8:
        (w1, s1), (w2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
        scales = None, None, s1, s2
    got = sparse24.relu2_mlp_dense(x, w1, w2, *scales)
    assert got.any(1).all()
    for first, count in ((0, 1), (127, 1), (7, 2), (11, 8), (5, 16), (21, 17), (17, 33), (0, 64), (60, 65), (0, 127)):
        rows = x[first : first + count].clone()
        assert_same_bits(sparse24.relu2_mlp_dense(rows, w1, w2, *scales), got[first : first + count])


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("tokens", [4, 20, 40, 100])
def test_nan_and_infinity(device, dtype, tokens, fp8):
    """They stay in their rows."""
    operands = list(network((tokens, 64, 96, 40), dtype, device, fp8=fp8, scale="one"))
    got = sparse24.relu2_mlp_dense(*operands)
    operands[0][1, 3], operands[0][2, 5] = torch.nan, torch.inf
    with_them = sparse24.relu2_mlp_dense(*operands)
    assert with_them[1].isnan().all() and not with_them[2].isfinite().all()
    others = [t for t in range(tokens) if t not in (1, 2)]
    assert_same_bits(with_them[others], got[others])


def test_weights_that_are_not_finite(device, dtype):
    x, w1, w2, b1, b2, *_ = network((20, 64, 96, 40), dtype, device)
    b1 = b1.abs() + 100  # all are active
    got = sparse24.relu2_mlp_dense(x, w1, w2, b1, b2)
    w2[7, 3] = torch.nan
    with_nan = sparse24.relu2_mlp_dense(x, w1, w2, b1, b2)
    assert with_nan[:, 7].isnan().all()
    others = [c for c in range(40) if c != 7]
    assert_same_bits(with_nan[:, others], got[:, others])
    w1[5] = torch.nan
    assert sparse24.relu2_mlp_dense(x, w1, w2, b1, b2).isnan().all()


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 2, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions(device, shape):
    x = normal(*shape, dtype=BF16).to(device)
    w1, w2 = normal(96, 64, dtype=BF16, seed=1).to(device), normal(40, 96, dtype=BF16).to(device)
    got = sparse24.relu2_mlp_dense(x, w1, w2)
    assert got.shape == (*shape[:-1], 40)
    assert_same_bits(got.reshape(-1, 40), sparse24.relu2_mlp_dense(x.reshape(-1, 64), w1, w2))


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "float8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout, fp8):
    operands = network((33, 208, 160, 40), BF16, device, fp8=fp8, scale="each")
    strange = [relayout(t, layout) if t is not None and t.dim() == 2 else t for t in operands]
    plain = [None if t is None else t.contiguous() for t in strange]
    assert_same_bits(sparse24.relu2_mlp_dense(*strange), sparse24.relu2_mlp_dense(*plain))


@pytest.mark.parametrize("scale", ["factor", "computed", "16 bits"])
@pytest.mark.parametrize("tokens", [3, 20, 100])
def test_cuda_graph_with_new_data(cuda, tokens, scale):
    """Dependent launches behind each other, whose blocks count what is done."""
    fp8 = scale != "16 bits"
    operands = network((tokens, 512, 1024, 512), BF16, cuda, fp8=fp8, scale=scale)
    x, others = operands[0], operands[1:]

    def layers(out: Tensor) -> Tensor:
        for _ in range(3):
            out = sparse24.relu2_mlp_dense(out, *others)
            out = out / out.abs().amax().clamp(min=1)
        return out

    layers(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers(x)
    for seed in range(4):
        x.copy_(normal(tokens, 512, dtype=BF16, seed=seed))
        graph.replay()
        assert_same_bits(out, layers(x))


def test_weights_written_just_before(cuda):
    """Weights are read ahead, but not before what is in front of the op is complete."""
    x, w1, w2, *_ = network((40, 1024, 4096, 1024), BF16, cuda)
    (q1, s1), (q2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    expected = sparse24.relu2_mlp_dense(x, w1, w2), sparse24.relu2_mlp_dense(x, q1, q2, None, None, s1, s2)
    for _ in range(20):
        late = [torch.empty_like(t) for t in (w1, w2, q1, q2)]
        for t, source in zip(late, (w1, w2, q1, q2), strict=True):
            t.copy_(source)
        assert_same_bits(sparse24.relu2_mlp_dense(x, *late[:2]), expected[0])
        late[2].copy_(q1)
        assert_same_bits(sparse24.relu2_mlp_dense(x, *late[2:], None, None, s1, s2), expected[1])


def test_refuses_a_backward_pass(device):
    x = torch.ones(2, 16, dtype=BF16, device=device, requires_grad=True)
    w = torch.ones(16, 16, dtype=BF16, device=device)
    with pytest.raises(RuntimeError, match=r"^sparse24\.relu2_mlp_dense: expected no backward pass"):
        sparse24.relu2_mlp_dense(x, w, w).sum().backward()


@pytest.mark.parametrize(
    ("fp8", "change", "sentence"),
    [
        (False, (0, lambda t: t[0, 0]), "x to have at least 1 dimension, got 0 with shape ()"),
        (False, (1, lambda t: t.half()), "w1 to be bfloat16 (the dtype of x) or float8_e4m3fn, got float16"),
        (False, (1, lambda t: t[1:]), "w1 to have a multiple of 8 rows (bfloat16), got 63"),
        (True, (1, lambda t: t[8:]), "w1 to have a multiple of 16 rows (float8_e4m3fn), got 56"),
        (False, (2, lambda t: t[:, 8:]), "w2 to have 64 columns (rows of w1), got 56"),
        (False, (3, lambda t: t.float()), "b1 to be bfloat16, got float32"),
        (True, (5, lambda t: None), "w1_scale to be a tensor (w1 is float8_e4m3fn), got None"),
        (True, (7, lambda t: torch.ones(23)), "scale_y to have 1 or 24 elements (tokens of x), got 23"),
        (True, (8, lambda t: torch.ones(1)), "scale_y_factor to be None beside scale_y, got a tensor"),
    ],
)
def test_refusals(fp8, change, sentence):
    """In the same words where it is traced."""
    arguments = list(network((24, 64, 64, 16), BF16, "cpu", fp8=fp8, scale="one"))
    at, value = change
    arguments[at] = value(arguments[at])
    for there in (arguments, [None if t is None else t.to("meta") for t in arguments]):
        with pytest.raises(RuntimeError) as info:
            sparse24.relu2_mlp_dense(*there)
        assert f"sparse24.relu2_mlp_dense: expected {sentence}" in str(info.value)


def test_refused_columns_and_threshold():
    x, w1, w2, *_ = network((24, 64, 64, 16), BF16, "cpu")
    with pytest.raises(RuntimeError, match=r"expected x to have a multiple of 8 columns \(bfloat16 weights\), got 63"):
        sparse24.relu2_mlp_dense(x[:, 1:], w1[:, 1:], w2)
    with pytest.raises(RuntimeError, match="expected threshold to be finite and at least 0"):
        sparse24.relu2_mlp_dense(x, w1, w2, threshold=-1)


def test_too_many_tokens(cuda):
    x, w = torch.ones(3, 43, 16, dtype=BF16, device=cuda), torch.ones(16, 16, dtype=BF16, device=cuda)
    sentence = "x to have at most 128 rows on a CUDA device, got 129"
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp_dense: expected {sentence}"):
        sparse24.relu2_mlp_dense(x, w, w)
