"""The step whose six products are float8: against the same quantisation in plain torch, and its delayed scales."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_reference as reference
from compare import assert_same_bits
from oracle import FP8, Pattern, quantize_fp8
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from training_reference import HIDDEN, NAMES, OUT, D, operands, run

import sparse24
from sparse24 import Recipe
from sparse24.mlp.step_fp8 import next_scales

# Dynamo makes an instance of torch.autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

RECIPE = Recipe(fp8_weight_gradients=True)
RECIPES = {
    "default": RECIPE,
    "natural": Recipe(fp8_weight_gradients=True, permute_tokens=False),
    "no split": Recipe(fp8_weight_gradients=True, dense_features=0.0),
    "all dense": Recipe(fp8_weight_gradients=True, dense_features=1.0),
}


def rounded(t, scale=None):
    """t with the rounding of fp8 and one scale, exact or given, in float32."""
    q, scale = quantize_fp8(t, scale, "tensor")
    return (q.float() * scale).to(t.device)


def mask_of(x, w1, b1, scales):
    """What the forward keeps, and the scale of y."""
    scale_x, scale_y = (None, None) if scales is None else (scales[:1], scales[1:2])
    q, s = sparse24.quantize_fp8(x, scale_x, "tensor")
    q1, s1 = sparse24.quantize_fp8(w1, None, "tensor")
    if scale_y is None:
        scale_y = sparse24.linear_compress(q, q1, s, s1, b1, torch.ones_like(s))[3] / 448
    values, meta, *_ = sparse24.linear_compress(q, q1, s, s1, b1, scale_y)
    mask = Pattern.of_meta(meta, len(x), HIDDEN, FP8, -1).mask().to(x.device)
    return mask, sparse24.decompress(values, meta, len(x), HIDDEN).float() * scale_y


def plain(leaves, grad, recipe, scales=None):
    """The same step in plain torch, in float32."""
    x, w1, w2, b1, b2 = leaves
    mask, y = mask_of(x, w1, b1, scales)
    of_grad, of_dh = (None, None) if scales is None else (scales[2:3], scales[3:])
    xq, w1q, w2q, gq = (
        rounded(x, None if scales is None else scales[:1]),
        rounded(w1),
        rounded(w2),
        rounded(grad, of_grad),
    )
    dh = rounded((gq @ w2q).to(torch.bfloat16).float() * 2 * y.sqrt() * mask, of_dh)
    hot = reference.hot_features(y, recipe.hot_features(HIDDEN))
    y_tokens, dh_tokens = (reference.operand_over_tokens(t.to(torch.bfloat16), recipe, hot).float() for t in (y, dh))
    out = y @ w2q.t() + b2.float()
    return out, dh @ w1q, dh_tokens.t() @ xq, gq.t() @ y_tokens, dh.sum(0), grad.float().sum(0)


def exact(leaves, grad, recipe, mask, y_like):
    """In float64 with the forward's mask, and nothing pruned along tokens."""
    x, w1, w2, b1, b2, g = (t.double() for t in (*leaves, grad))
    h = F.linear(x, w1, b1).relu()
    y, dh = h.square() * mask, (g @ w2) * (2 * h) * mask
    return F.linear(y, w2, b2), dh @ w1, dh.t() @ x, g.t() @ y, dh.sum(0), g.sum(0)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("tokens", [1, 7, 129, 257])
def test_it_is_the_documented_step(device, tokens, recipe):
    """Within the rounding of the results, where nothing is at the edge of two codes."""
    *leaves, grad = operands(tokens, torch.bfloat16, device)
    actual, expected = run(leaves, grad, precision="fp8", recipe=recipe), plain(leaves, grad, recipe)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        error = (a.float() - e).norm() / e.norm()
        # Sums in another order round dy, and with it a few codes of dh, the other way: those are 1/16 apart.
        assert a.dtype == torch.bfloat16 and error <= (4e-3 if name in ("out", "w2", "b2") else 4e-2), (name, error)


@pytest.mark.parametrize("tokens", [1, 7, 129, 257])
def test_the_dense_phase_is_the_documented_step(device, tokens):
    """All six products of float8 codes, nothing pruned."""
    *leaves, grad = operands(tokens, torch.bfloat16, device)
    x, w1, w2, b1, b2 = leaves
    h = (rounded(x) @ rounded(w1).t() + b1.float()).relu().to(torch.bfloat16).float()
    y, gq = rounded(h.square()), rounded(grad)
    dh = rounded((gq @ rounded(w2)).to(torch.bfloat16).float() * 2 * y.sqrt())
    expected = (
        y @ rounded(w2).t() + b2.float(),
        dh @ rounded(w1),
        dh.t() @ rounded(x),
        gq.t() @ y,
        dh.sum(0),
        grad.sum(0),
    )
    actual = run(leaves, grad, precision="fp8", recipe=RECIPE, sparse=False)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        error = (a.float() - e.float()).norm() / e.float().norm()
        assert a.dtype == torch.bfloat16 and error <= 4e-2, (name, error)


@pytest.mark.parametrize("delayed", [False, True], ids=["exact", "delayed"])
def test_errors_are_those_of_dense_float8(device, delayed):
    """Against float64 with the mask fixed: at most 1.1 of the error of dense products of the same operands."""
    *leaves, grad = operands(512, torch.bfloat16, device)
    recipe = RECIPES["all dense"]
    scales = torch.zeros(4, device=device) if delayed else None
    if delayed:
        run(leaves, grad, precision="fp8", recipe=recipe, delayed_scales=scales, scales_known=False)
    used = None if scales is None else scales.clone()
    mask, _ = mask_of(*leaves[:2], leaves[3], used)
    x, w1, w2, b1, _ = leaves
    h = (rounded(x) @ rounded(w1).t() + b1.float()).relu().to(torch.bfloat16)
    y = rounded((h.float().square() * mask).to(torch.bfloat16))
    dh = rounded(((rounded(grad) @ rounded(w2)).to(torch.bfloat16).float() * 2 * h.float() * mask).to(torch.bfloat16))
    dense = y @ rounded(w2).t(), dh @ rounded(w1), dh.t() @ rounded(x), rounded(grad).t() @ y
    actual = run(leaves, grad, precision="fp8", recipe=recipe, delayed_scales=scales)
    truth = exact(leaves, grad, recipe, mask, None)
    for name, a, d, e in zip(("out", *NAMES), actual, dense, truth, strict=False):
        if name == "out":
            continue
        error, of_dense = ((t.double() - e).norm() / e.norm() for t in (a, d))
        assert error <= 1.1 * of_dense, (name, error.item(), of_dense.item())


def test_next_scales():
    used, amax = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([448.0, 0.448, 4.48, 0.0])
    expected = torch.tensor([2.0, 0.5, 0.02, 0.0])  # twice the largest, half of what it was, nothing known
    torch.testing.assert_close(next_scales(used, amax), expected)
    assert next_scales(used, torch.tensor([torch.inf, torch.nan, 0.0, torch.inf])).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_next_scales_are_quotients(device, compiled):
    """Those of the op of a pass to the bit, which an inverse of 448 that is rounded does not give."""
    g = torch.Generator().manual_seed(0)
    amax = torch.randn(100_000, generator=g).abs() * 2.0 ** torch.randint(-40, 40, (100_000,), generator=g)
    expected = torch.from_numpy(amax.numpy() / np.float32(448) * np.float32(2))
    assert (amax * torch.tensor(1 / 448) * 2 != expected).any()
    backend = "aot_eager" if device == "cpu" else "inductor"
    follow = torch.compile(next_scales, backend=backend) if compiled else next_scales
    assert_same_bits(follow(torch.zeros_like(amax).to(device), amax.to(device)), expected)


def steps(ffn, device, count=4, jump=None, tokens=64):
    """Outputs, gradients and scales of a few steps of different data; from step `jump` on they are 100 times as large.

    ffn takes x, w1, w2, b1, b2, the scales and whether they are known.
    """
    scales, found = torch.zeros(4, device=device), []
    for step in range(count):
        *leaves, grad = operands(tokens, torch.bfloat16, device)
        factor = 100.0 if jump is not None and step >= jump else 1.0 + 0.125 * step
        leaves = [t.detach().clone().requires_grad_() for t in (leaves[0] * factor**0.5, *leaves[1:])]
        out = ffn(*leaves, scales, step > 0)
        out.backward(grad * factor)
        found.append((out.detach(), *(t.grad for t in leaves), scales.clone()))
    return found


def network(x, w1, w2, b1, b2, scales, known, **options):
    options = {"precision": "fp8", "recipe": RECIPE, "min_tokens": 0} | options
    return sparse24.relu2_mlp(x, w1, w2, b1, b2, delayed_scales=scales, scales_known=known, **options)


def assert_same_steps(actual, expected):
    for step, (one, other) in enumerate(zip(actual, expected, strict=True)):
        for name, a, e in zip(("out", *NAMES, "scales"), one, other, strict=True):
            assert_same_bits(a, e, f"{name} of step {step}")


def test_the_first_step_is_exact_and_the_next_follow(device):
    found = steps(network, device)
    alone = steps(lambda *a: network(*a[:5], None, False), device)
    for a, e in zip(found[0][:-1], alone[0][:-1], strict=True):
        assert_same_bits(a, e)
    assert (found[0][-1] > 0).all()
    for one, other in zip(found[1:], alone[1:], strict=True):
        for a, e in zip(one[1:4], other[1:4], strict=True):
            assert (a.float() - e.float()).norm() <= 0.12 * e.float().norm()


def test_it_recovers_from_a_jump_in_one_step(device):
    """The step of the jump saturates; the one after it has followed."""
    found = steps(network, device, 5, jump=2)
    alone = steps(lambda *a: network(*a[:5], None, False), device, 5, jump=2)

    def error(step, place):
        a, e = found[step][place].float(), alone[step][place].float()
        return (a - e).norm() / e.norm()

    assert error(2, 3) > 0.5 and found[2][3].isfinite().all()
    assert error(3, 3) < 0.12 and error(4, 3) < 0.12


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_are_the_same(device, backend):
    if backend == "inductor" and device == "cpu":
        pytest.skip("aot_eager traces the same")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    assert_same_steps(steps(torch.compile(network, backend=counter, fullgraph=True), device), steps(network, device))
    assert counter.frame_count == 2  # the first step, and the others


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "marked"])
def test_compiled_for_any_number_of_tokens(device, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in (64, 96, 131, 200):
        assert_same_steps(steps(compiled, device, 2, tokens=tokens), steps(network, device, 2, tokens=tokens))
    # Both forms of a step, and each once more where sizes become symbols.
    assert counter.frame_count <= 4


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_checkpointed_step_uses_the_scales_of_its_forward(device, compiled):
    torch._dynamo.reset()

    def checkpointed(*args):
        return checkpoint(network, *args, use_reentrant=False)

    ffn = torch.compile(checkpointed, backend="aot_eager", fullgraph=True) if compiled else checkpointed
    assert_same_steps(steps(ffn, device), steps(network, device))


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_recomputed_steps_are_the_same(device, sparse):
    again = steps(lambda *a: network(*a, recompute=True, sparse=sparse), device)
    assert_same_steps(again, steps(lambda *a: network(*a, sparse=sparse), device))


@pytest.mark.parametrize("count", [10388, 10389])
def test_the_default_threshold_is_that_of_a_step(device, count):
    """100e9 multiply-adds of 3008 x 3200: up to that many a step with six float8 products runs dense on CUDA."""
    x, w1, w2 = (torch.randn(s, device=device).to(torch.bfloat16) for s in ((count, 16), (3200, 16), (3008, 3200)))
    if device == "cpu":
        x, w2 = x[:32], w2[:16].contiguous()
    x, w1, w2 = (t.requires_grad_() for t in (x, w1, w2))
    sparse = device == "cpu" or count * 3008 * 3200 >= 100e9
    options = {"precision": "fp8", "recipe": RECIPE}
    expected = sparse24.relu2_mlp(x, w1, w2, sparse=sparse, min_tokens=0, **options)
    assert_same_bits(sparse24.relu2_mlp(x, w1, w2, **options), expected)
    assert not torch.equal(sparse24.relu2_mlp(x, w1, w2, sparse=not sparse, min_tokens=0, **options), expected)


def test_features_that_no_sparse_kernel_takes(device):
    """Multiples of 16 that are not of 32 run dense, in the first weight and in the second."""
    x, w1, w2, _, _, grad = operands(65, torch.bfloat16, device)
    x, w1, w2 = (t.requires_grad_() for t in (x, w1[:144].clone(), w2[:, :144].clone()))
    options = {"precision": "fp8", "min_tokens": 0}
    one = torch.autograd.grad(sparse24.relu2_mlp(x, w1, w2, recipe=RECIPE, **options), (x, w1, w2), grad)
    other = torch.autograd.grad(sparse24.relu2_mlp(x, w1, w2, **options), (x, w1, w2), grad)
    for a, e in zip(one, other, strict=True):
        assert (a.float() - e.float()).norm() <= 0.12 * e.float().norm()


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["saved", "recompute"])
def test_two_forward_passes_before_their_backward_passes(device, options):
    """As in a pipeline: each keeps the scales that it used."""
    *leaves, grad = operands(64, torch.bfloat16, device)
    scales = torch.full((4,), 0.05, device=device)
    expected = run(leaves, grad, precision="fp8", recipe=RECIPE, delayed_scales=scales.clone())
    made = [[t.clone().requires_grad_() for t in leaves] for _ in range(2)]
    outs = [network(*of_one, scales, True, **options) for of_one in made]
    for out in outs:
        out.backward(grad)
    for of_one in made:
        for t, e in zip(of_one, expected[1:], strict=True):
            assert_same_bits(t.grad, e)


def test_steps_repeat_to_the_bit(device):
    assert_same_steps(steps(network, device, tokens=259), steps(network, device, tokens=259))


def test_float32_masters_and_autocast(device):
    """Weights and their gradients in float32, and the numbers of 16-bit weights."""
    *leaves, grad = operands(65, torch.bfloat16, device)
    expected = run(leaves, grad, precision="fp8", recipe=RECIPE)
    masters = [t.float().requires_grad_() for t in leaves]
    with torch.autocast(device, torch.bfloat16):
        out = sparse24.relu2_mlp(*masters, precision="fp8", recipe=RECIPE, min_tokens=0)
    out.backward(grad)
    for t, e in zip(masters, expected[1:], strict=True):
        assert t.grad.dtype == torch.float32
        assert_same_bits(t.grad.to(torch.bfloat16), e)


@pytest.mark.parametrize("needed", [("w1", "w2"), ("x", "w1"), ("x", "w2"), ("x",), ("x", "w1", "w2", "b1", "b2")])
def test_frozen_parts(device, needed):
    """Where a weight is frozen the step is that of 16-bit weight gradients, and leaves no scales."""
    *leaves, grad = operands(65, torch.bfloat16, device)
    scales = torch.zeros(4, device=device)
    options = {"precision": "fp8", "needed": needed}
    actual = run(leaves, grad, recipe=RECIPE, delayed_scales=scales, scales_known=False, **options)
    both = "w1" in needed and "w2" in needed
    expected = run(leaves, grad, recipe=RECIPE if both else Recipe(), **options)
    for name, a, e in zip(NAMES, actual[1:], expected[1:], strict=True):
        assert (a is None) == (name not in needed)
        if a is not None:
            assert_same_bits(a, e, name)
    assert bool((scales > 0).all()) == both


def test_given_dense_features(device):
    *leaves, grad = operands(100, torch.bfloat16, device)
    hot = torch.arange(64, device=device).flip(0)
    first = run(leaves, grad, precision="fp8", recipe=RECIPE, hot_features=hot)
    again = run(leaves, grad, precision="fp8", recipe=RECIPE, hot_features=hot.sort().values)
    for a, e in zip(first, again, strict=True):
        assert_same_bits(a, e)


def test_no_tokens(device):
    *leaves, grad = operands(0, torch.bfloat16, device)
    for t in run(leaves, grad, precision="fp8", recipe=RECIPE)[1:]:
        assert t.count_nonzero() == 0


def saved_bytes(run, leaves):
    """What autograd holds of a forward pass beside the leaves."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(*leaves)
    for leaf in leaves:
        saved.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def fp8_network(*operands):
    return sparse24.relu2_mlp(*operands, precision="fp8", recipe=RECIPE, min_tokens=0)


def test_it_saves_codes(device):
    """Between the passes: of x one byte a number, of the hidden layer 0.625, of the weights their transposes."""
    tokens = 96
    *leaves, _ = operands(tokens, torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in leaves]
    saved = saved_bytes(fp8_network, leaves)
    meta = 128 * 256 // 8  # with its padding
    codes = D * tokens + tokens * HIDDEN // 2 + D * HIDDEN + HIDDEN * reference_padded(OUT)
    assert saved <= codes + meta + 64


def test_the_hidden_layer_takes_a_sixth_of_a_dense_one(device):
    """At most 0.16 of what an unfused network in bfloat16 saves of it."""
    d, hidden, tokens = 32, 1024, 1024
    g = torch.Generator().manual_seed(0)
    shapes = (tokens, d), (hidden, d), (d, hidden)
    leaves = [torch.randn(s, generator=g).to(device, torch.bfloat16).requires_grad_() for s in shapes]
    ours = saved_bytes(fp8_network, leaves)
    dense = saved_bytes(lambda x, w1, w2: F.linear(F.linear(x, w1).relu().square(), w2), leaves)
    assert dense == 4 * tokens * hidden
    assert ours - d * tokens - 2 * d * hidden - 64 <= 0.16 * dense


def reference_padded(rows):
    return -(-rows // 32) * 32


def test_cuda_graph(cuda):
    """A captured step reads and writes the scales: each replay uses those of the one before."""
    *leaves, grad = operands(256, torch.bfloat16, cuda)
    leaves = [t.requires_grad_() for t in leaves]
    scales = torch.full((4,), 0.05, device=cuda)

    def step():
        return torch.autograd.grad(network(*leaves, scales, True), leaves, grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = scales.clone()
    with torch.cuda.graph(graph):
        found = step()
    scales.copy_(before)
    for _ in range(3):
        expected_scales = scales.clone()
        graph.replay()
        of_graph = [t.clone() for t in found], scales.clone()
        scales.copy_(expected_scales)
        for a, e in zip(of_graph[0], step(), strict=True):
            assert_same_bits(a, e)
        assert_same_bits(of_graph[1], scales)
