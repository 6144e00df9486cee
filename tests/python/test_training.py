"""Training with 2:4 activations: gradients, what is saved between the passes, compilation, and the dense phases."""

import pytest
import torch
import torch.nn.functional as F
import training_reference as reference
from compare import assert_accurate, assert_same_bits
from data import integers, normal
from oracle import FP8, Pattern, quantize_fp8
from torch.utils._python_dispatch import TorchDispatchMode

import sparse24
from sparse24 import Recipe, Schedule
from sparse24.training import SAC_SAVE_OPS

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

D, HIDDEN, OUT = 64, 160, 48
NAMES = ("x", "w1", "w2", "b1", "b2")
DENSE_DW = Recipe(weight_gradients="dense")
RECIPES = {
    "default": None,
    "natural": Recipe(permute_tokens=False),
    "no split": Recipe(dense_features=0.0),
    "all features": Recipe(dense_features=1.0),
    "residual": Recipe(residual=True),
    "natural residual": Recipe(permute_tokens=False, dense_features=0.0, residual=True),
    "dense": DENSE_DW,
    "no reuse": Recipe(reuse_mask=False),
    "no reuse, dense": Recipe(reuse_mask=False, weight_gradients="dense"),
}


def exact_operands(tokens, dtype, device):
    """x, w1, w2, b1, b2 and a gradient of small integers: every sum of products of the step is exact."""
    shapes = ((tokens, 8), (HIDDEN, 8), (24, HIDDEN), (HIDDEN,), (24,), (tokens, 24))
    return [integers(*s, dtype=dtype, limit=1, seed=i).to(device) for i, s in enumerate(shapes)]


def operands(tokens, dtype, device, out=OUT):
    """Normal numbers; the shift of b1 leaves 30 % of the activation."""
    shapes = ((tokens, D), (HIDDEN, D), (out, HIDDEN), (HIDDEN,), (out,), (tokens, out))
    x, w1, w2, b1, b2, grad = (normal(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes))
    leaves = x, w1 / D**0.5, w2 / HIDDEN**0.5, 0.3 * b1 - 0.5, b2, grad
    return [t.to(device, dtype) for t in leaves]


def run(leaves, grad, *, needed=NAMES, **options):
    """The output, and the gradients of the leaves."""
    leaves = [t.detach().clone().requires_grad_(name in needed) for name, t in zip(NAMES, leaves, strict=True)]
    out = sparse24.relu2_mlp(*leaves, min_tokens=0, **options)
    out.backward(grad)
    return out.detach(), *(t.grad for t in leaves)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("tokens", [1, 7, 64, 511])
def test_every_recipe_exactly(device, dtype, tokens, recipe):
    *leaves, grad = exact_operands(tokens, dtype, device)
    expected = reference.step(*leaves, grad, recipe or Recipe())
    for fused in (True, False):
        out, *grads = run(leaves, grad, recipe=recipe, fused=fused)
        assert_same_bits(out + 0.0, expected.out.to(dtype) + 0.0)
        for name, actual, exact in zip(NAMES, grads, expected.grads, strict=True):
            assert_same_bits(actual + 0.0, exact.float().to(dtype) + 0.0, name)


def test_recipes_differ(device):
    """The masks matter for these numbers; without a mask along tokens neither groups nor features do."""
    *leaves, grad = exact_operands(511, torch.bfloat16, device)
    grads = {name: run(leaves, grad, recipe=recipe)[1:] for name, recipe in RECIPES.items()}
    for name in ("default", "natural", "no split", "no reuse"):
        for other in ("default", "natural", "no split", "no reuse", "dense"):
            assert name == other or not torch.equal(grads[name][1], grads[other][1]), f"{name} is {other}"
    for name in ("residual", "natural residual", "all features"):
        for actual, exact in zip(grads[name], grads["dense"], strict=True):
            assert_same_bits(actual + 0.0, exact + 0.0, name)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("recipe", ["default", "residual", "dense"])
@pytest.mark.parametrize("tokens", [1, 7, 257])
def test_accuracy(device, dtype, recipe, tokens, fused):
    """Twice the error of torch in the same dtype, against float64, all with the same masks."""
    recipe = RECIPES[recipe] or Recipe()
    *leaves, grad = operands(tokens, dtype, device)
    x, w1, w2, b1, _ = leaves
    if fused:
        values, meta, *_ = sparse24.linear_compress(x, w1, bias=b1)
    else:
        values, meta = sparse24.compress(F.linear(x, w1, b1), "relu2")
    mask = Pattern.of_meta(meta, tokens, HIDDEN, dtype, -1).mask().to(device)
    y = sparse24.decompress(values, meta, tokens, HIDDEN)
    dh = ((grad @ w2).float() * 2 * y.float().sqrt()).to(dtype)
    hot = reference.hot_features(y, recipe.hot_features(HIDDEN))
    kept = [(reference.operand_over_tokens(a, recipe, hot) == a) for a in (y, dh)]

    def dense(to):
        x, w1, w2, b1, b2, g = (t.to(to) for t in (*leaves, grad))
        h = F.linear(x, w1, b1).relu()
        y = h.square() * mask
        dh = (g @ w2) * (2 * h) * mask
        dw1, dw2 = (dh * kept[1]).t() @ x, g.t() @ (y * kept[0])
        return F.linear(y, w2, b2), dh @ w1, dw1, dw2, dh.sum(0), g.sum(0)

    actual = run(leaves, grad, recipe=recipe, fused=fused)
    for name, a, t, e in zip(("out", *NAMES), actual, dense(dtype), dense(torch.float64), strict=True):
        assert_accurate(a, t, e, 4 * e.abs().max().float(), name)


def test_dropped_entries_get_no_gradient(device):
    """One token, equal features: of four the first two carry the gradient."""
    x, w1 = torch.ones(1, 16, device=device), torch.full((32, 16), 0.25, device=device)
    x, w1, w2 = (t.to(torch.bfloat16).requires_grad_() for t in (x, w1, torch.ones(8, 32, device=device)))
    sparse24.relu2_mlp(x, w1, w2, min_tokens=0).sum().backward()
    kept = torch.tensor([True, True, False, False] * 8, device=device)
    assert torch.equal(w1.grad.abs().sum(1) > 0, kept) and torch.equal(w2.grad.abs().sum(0) > 0, kept)
    assert (x.grad == 16 * 8 * 8 * 0.25).all()  # 16 features, dy2 = 8, 2 h = 8, w1 = 0.25


def test_given_hot_features(device):
    """They need not be the densest ones, as long as their number is right."""
    *leaves, grad = exact_operands(511, torch.bfloat16, device)
    hot = list(range(HIDDEN - 1, HIDDEN - 65, -1))
    expected = reference.step(*leaves, grad, Recipe(), hot).grads
    given = torch.tensor(hot, device=device)
    for name, actual, exact in zip(NAMES, run(leaves, grad, hot_features=given)[1:], expected, strict=True):
        assert_same_bits(actual + 0.0, exact.float().to(torch.bfloat16) + 0.0, name)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize(
    "needed", [("x",), ("w1",), ("w2",), ("b1",), ("b2",), ("x", "w2", "b2"), ("w1", "b1")], ids=str
)
def test_only_what_is_needed(device, needed, precision):
    *leaves, grad = operands(65, torch.bfloat16, device)
    everything = run(leaves, grad, precision=precision)
    for name, actual, expected in zip(
        ("out", *NAMES), run(leaves, grad, needed=needed, precision=precision), everything, strict=True
    ):
        if name == "out" or name in needed:
            assert_same_bits(actual, expected, name)
        else:
            assert actual is None


@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}, {"recompute": True}], ids=str)
def test_no_tokens(device, options):
    *leaves, grad = operands(0, torch.bfloat16, device)
    _, dx, *others = run(leaves, grad, **options)
    assert dx.shape == (0, D) and all((g == 0).all() for g in others)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_expanded_gradients(device, precision):
    """The gradient of a sum is one number with strides of zero; that of a slice is not contiguous."""
    *leaves, grad = operands(65, torch.bfloat16, device)
    ones = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    wide = torch.zeros(65, 2 * OUT, dtype=torch.bfloat16, device=device)
    wide[:, ::2] = grad
    for odd, plain in ((ones.expand(65, OUT), ones.repeat(65, OUT)), (wide[:, ::2], grad)):
        for actual, expected in zip(*(run(leaves, g, precision=precision) for g in (odd, plain)), strict=True):
            assert_same_bits(actual, expected)


def test_shapes_and_layouts(device):
    """x [2, 3, 5, D] and a transposed one get gradients of their shape."""
    *leaves, grad = operands(30, torch.bfloat16, device)
    _, dx, dw1, *_ = run(leaves, grad)
    x, grad = leaves[0].reshape(2, 3, 5, D), grad.reshape(2, 3, 5, OUT)
    for change in (lambda t: t, lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)):
        _, moved, dw1_moved, *_ = run([change(x), *leaves[1:]], change(grad))
        assert_same_bits(moved.reshape(30, D), dx)
        assert_same_bits(dw1_moved, dw1)


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_float32_weights(device, precision):
    """Master weights get the gradients of their casts, in float32."""
    *leaves, grad = operands(65, torch.float32, device)
    x, grad = leaves[0].to(torch.bfloat16), grad.to(torch.bfloat16)
    half = run([t.to(torch.bfloat16) for t in leaves], grad, precision=precision)
    master = run([x, *leaves[1:]], grad, precision=precision)
    assert [t.dtype for t in master] == [torch.bfloat16] * 2 + [torch.float32] * 4
    for actual, expected in zip(master, half, strict=True):
        assert_same_bits(actual, expected.to(actual.dtype))


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_autocast(device, precision):
    """As if cast by hand, wherever the backward pass runs."""
    *leaves, grad = operands(65, torch.float32, device)
    half = [t.to(torch.bfloat16) for t in leaves]
    expected = run(half, grad.to(torch.bfloat16), precision=precision)
    for inside in (False, True):
        inputs = [t.clone().requires_grad_() for t in leaves]
        with torch.autocast(device, torch.bfloat16):
            out = sparse24.relu2_mlp(*inputs, min_tokens=0, precision=precision)
        with torch.autocast(device, torch.float16, enabled=inside):
            out.backward(grad.to(torch.bfloat16))
        assert_same_bits(out, expected[0])
        for t, g in zip(inputs, expected[1:], strict=True):
            assert_same_bits(t.grad, g.float())


def test_second_derivatives_are_refused(device):
    *leaves, grad = operands(8, torch.bfloat16, device)
    x = leaves[0].requires_grad_()
    (dx,) = torch.autograd.grad(sparse24.relu2_mlp(*leaves, min_tokens=0), x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_reruns_have_the_same_bits(device, poisoned_memory):
    *leaves, grad = operands(257, torch.bfloat16, device)
    for options in ({}, {"recipe": RECIPES["residual"]}, {"precision": "fp8"}):
        first, *others = (run(leaves, grad, **options) for _ in range(3))
        assert all(t.isfinite().all() for t in first)
        for other in others:
            for actual, expected in zip(other, first, strict=True):
                assert_same_bits(actual, expected)


# ---- fp8 -------------------------------------------------------------------------------------------------------------


def dequantised(t):
    """t with the rounding of fp8 and one scale per row, in float32."""
    q, scale = quantize_fp8(t)
    return (q.float() * scale).to(t.device)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", ["sparse", "dense", "scale_y"])
@pytest.mark.parametrize("tokens", [1, 129])
def test_fp8_accuracy(device, tokens, kind, fused):
    """Twice the error of the same quantisation in plain torch, against float64 with the same mask."""
    *leaves, grad = operands(tokens, torch.bfloat16, device)
    x, w1, w2, b1, b2 = leaves
    scale_y = torch.full((1,), 0.05, device=device) if kind == "scale_y" else None
    mask = torch.ones(tokens, HIDDEN, device=device)
    if kind != "dense":
        (q, s), (q1, s1) = sparse24.quantize_fp8(x), sparse24.quantize_fp8(w1)
        if fused:
            meta = sparse24.linear_compress(q, q1, s, s1, b1, scaling="row")[1]
        else:
            meta = sparse24.compress_fp8(sparse24.mlp.up_projection(x, w1, b1, fp8=True), None, "relu2")[1]
        mask = Pattern.of_meta(meta, tokens, HIDDEN, FP8, -1).mask().float().to(device)

    def plain():
        y1 = (dequantised(x) @ dequantised(w1).t() + b1.float()).to(torch.bfloat16).float()
        y = y1.relu().square() * mask
        y = dequantised(y) if scale_y is None else (y / scale_y).clamp(max=448).to(FP8).float() * scale_y
        dh = ((grad @ w2).float() * 2 * y.sqrt()).to(torch.bfloat16)
        out = y @ dequantised(w2).t() + b2.float()
        dx = dequantised(dh) @ dequantised(w1.t()).t()
        return out, dx, dh.t() @ x, grad.t() @ y.to(torch.bfloat16), dh.float().sum(0), grad.float().sum(0)

    def exact():
        x, w1, w2, b1, b2, g = (t.double() for t in (*leaves, grad))
        h = F.linear(x, w1, b1).relu()
        y, dh = h.square() * mask, (g @ w2) * (2 * h) * mask
        return F.linear(y, w2, b2), dh @ w1, dh.t() @ x, g.t() @ y, dh.sum(0), g.sum(0)

    options = {"precision": "fp8", "recipe": DENSE_DW, "fused": fused, "scale_y": scale_y, "sparse": kind != "dense"}
    actual = run(leaves, grad, **options)
    for name, a, t, e in zip(("out", *NAMES), actual, plain(), exact(), strict=True):
        assert a.dtype == torch.bfloat16
        assert_accurate(a, t.to(torch.bfloat16), e, 4 * e.abs().max().float(), name)


def test_fp8_weights_pass_gradients_on(device):
    """A frozen float8 network: x and the biases get the gradients of its dequantised weights."""
    *leaves, grad = operands(65, torch.bfloat16, device)
    x, w1, w2, b1, b2 = leaves
    (q1, s1), (q2, s2) = sparse24.quantize_fp8(w1), sparse24.quantize_fp8(w2)
    inputs = [t.clone().requires_grad_() for t in (x, b1, b2)]
    out = sparse24.relu2_mlp(inputs[0], q1, q2, *inputs[1:], w1_scale=s1, w2_scale=s2, min_tokens=0)
    out.backward(grad)
    # Quantising a dequantised weight again changes nothing but the last bits of its scale.
    wide = [(q.float() * s).to(torch.bfloat16) for q, s in ((q1, s1), (q2, s2))]
    expected = run([x, *wide, b1, b2], grad, precision="fp8")
    for t, e in zip(inputs, (expected[1], *expected[4:]), strict=True):
        assert (t.grad - e).abs().max() <= 0.05 * e.abs().max() and t.grad.abs().max() > 0


def test_fp8_recipe_prunes_along_tokens(device):
    """The default recipe is the dense products with the mask along tokens of the dequantised activation."""
    *leaves, grad = operands(257, torch.bfloat16, device)
    recipe = Recipe(dense_features=0.0)
    (q, s), (q1, s1) = sparse24.quantize_fp8(leaves[0]), sparse24.quantize_fp8(leaves[1])
    values, meta, scale, *_ = sparse24.linear_compress(q, q1, s, s1, leaves[3], scaling="row")
    y = (sparse24.decompress(values, meta, 257, HIDDEN).float() * scale).to(torch.bfloat16)
    kept = reference.operand_over_tokens(y, recipe, [])
    assert not torch.equal(kept, y)
    actual = run(leaves, grad, precision="fp8", recipe=recipe, fused=True)[3]
    exact = grad.double().t() @ kept.double()
    assert_accurate(actual, grad.t() @ kept, exact, 4 * exact.abs().max().float())


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(function, inputs):
    """Bytes of all distinct tensors saved for the backward pass, but for the inputs."""
    known, saved = {t.data_ptr() for t in inputs}, {}

    def pack(t):
        if t.data_ptr() not in known:
            saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return sum(saved.values()), out


def test_memory_between_the_passes(device):
    """Per feature and token: 1.125 bytes in bf16 and 0.625 in fp8, where the unfused dense network has 4."""
    tokens, hidden = 256, 1024
    x = normal(tokens, D, dtype=torch.bfloat16).to(device).requires_grad_()
    w1, w2 = (normal(*s, dtype=torch.bfloat16, seed=1).to(device).requires_grad_() for s in ((hidden, D), (D, hidden)))
    inputs, cells = (x, w1, w2), tokens * hidden
    dense, _ = saved_bytes(lambda: F.linear(F.linear(x, w1).relu().square(), w2), inputs)
    assert dense == 4 * cells
    sixteen, _ = saved_bytes(lambda: sparse24.relu2_mlp(*inputs, min_tokens=0), inputs)
    assert sixteen == 1.125 * cells <= 0.30 * dense
    for fused in (True, False):
        eight, _ = saved_bytes(
            lambda f=fused: sparse24.relu2_mlp(*inputs, min_tokens=0, precision="fp8", fused=f), inputs
        )
        assert eight == 0.625 * cells + 4 * tokens <= 0.16 * dense
    for options in ({}, {"precision": "fp8"}, {"sparse": False}, {"precision": "fp8", "sparse": False}):
        nothing, out = saved_bytes(
            lambda o=options: sparse24.relu2_mlp(*inputs, min_tokens=0, recompute=True, **o), inputs
        )
        assert nothing == 0 and out.requires_grad


def test_x_is_saved_for_w1_only(device):
    """Frozen weights: x itself is not needed in the backward pass."""
    *leaves, _ = operands(65, torch.bfloat16, device)
    x = leaves[0].requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        sparse24.relu2_mlp(*leaves, min_tokens=0)
    assert x.data_ptr() not in seen and seen


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_recomputation_has_the_same_bits(device, precision, fused, sparse):
    """Of the dense network in 16 bits, torch's own backward pass rounds elsewhere where it is not fused."""
    *leaves, grad = (exact_operands if not sparse else operands)(64, torch.bfloat16, device)
    options = {"precision": precision, "fused": fused, "sparse": sparse}
    if precision == "fp8":
        *leaves, grad = operands(64, torch.bfloat16, device)
    for actual, expected in zip(
        run(leaves, grad, recompute=True, **options), run(leaves, grad, **options), strict=True
    ):
        assert_same_bits(actual + 0.0, expected + 0.0)


class Calls(TorchDispatchMode):
    """Counts the calls of each op."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function] = self.count.get(function, 0) + 1
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing(device):
    """The GEMM is not repeated where its op is in the policy's set, and the gradients are the same bits."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    *leaves, grad = operands(64, torch.bfloat16, device)
    expected = run(leaves, grad)

    def contexts(ops):
        def policy(ctx, op, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    for ops, repeated in ((SAC_SAVE_OPS, 1), (frozenset(), 2)):
        inputs = [t.clone().requires_grad_() for t in leaves]

        def ffn(*t):
            return sparse24.relu2_mlp(*t, min_tokens=0)

        with Calls() as calls:
            checkpoint(ffn, *inputs, use_reentrant=False, context_fn=lambda o=ops: contexts(o)).backward(grad)
        assert calls.count[torch.ops.sparse24.linear_compress.default] == repeated
        for t, g in zip(inputs, expected[1:], strict=True):
            assert_same_bits(t.grad, g)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counter():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("recipe", [None, Recipe(residual=True)], ids=["default", "residual"])
def test_compiled_training(device, dynamic, precision, recipe, counter):
    """One graph per size; with dynamic shapes one for all."""
    options = {"precision": precision, "recipe": recipe, "min_tokens": 0}
    compiled = torch.compile(
        lambda *t: sparse24.relu2_mlp(*t, **options), backend=counter, fullgraph=True, dynamic=dynamic
    )
    sizes = (80, 128, 80) if not dynamic else (80, 127, 196, 513)
    for tokens in sizes:
        *leaves, grad = operands(tokens, torch.bfloat16, device)
        inputs = [t.clone().requires_grad_() for t in leaves]
        compiled(*inputs).backward(grad)
        for t, g in zip(inputs, run(leaves, grad, precision=precision, recipe=recipe)[1:], strict=True):
            assert_same_bits(t.grad, g)
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_compiled_memory(device, precision, recompute):
    """What the compiler keeps between the passes: 2:4 values and metadata; with `recompute`, nothing of that size."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    kept = []

    def forward_graph(module, inputs):
        results = [n.meta["val"] for n in module.graph.find_nodes(op="output")[0].args[0] if hasattr(n, "meta")]
        kept.append([r for r in results if isinstance(r, torch.Tensor)])
        return make_boxed_func(module.forward)

    def backward_graph(module, inputs):
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    m = sparse24.nn.ReLU2MLP(
        D, 1024, precision=precision, recompute=recompute, min_tokens=0, device=device, dtype=torch.bfloat16
    )
    backend = aot_autograd(
        fw_compiler=forward_graph, bw_compiler=backward_graph, partition_fn=min_cut_rematerialization_partition
    )
    x = normal(640, D, dtype=torch.bfloat16).to(device).requires_grad_()
    compiled = torch.compile(m, backend=backend, fullgraph=True)
    compiled(x).sum().backward()
    # All that has one entry for each token and feature, or each group of four of them.
    large = sum(t.numel() * t.element_size() for t in kept[0] if t.numel() >= 640 * 1024 // 8)
    assert large == (0 if recompute else (0.625 if precision == "fp8" else 1.125) * 640 * 1024)
    grads = x.grad, m.up_proj.weight.grad, m.down_proj.weight.grad
    x.grad = m.up_proj.weight.grad = m.down_proj.weight.grad = None
    m(x).sum().backward()
    for actual, t in zip(grads, (x, m.up_proj.weight, m.down_proj.weight), strict=True):
        assert_same_bits(actual, t.grad)
    torch._dynamo.reset()


# ---- phases ----------------------------------------------------------------------------------------------------------


def network(device, layers=3, **options):
    torch.manual_seed(0)
    ffns = [
        sparse24.nn.ReLU2MLP(D, HIDDEN, device=device, dtype=torch.bfloat16, min_tokens=0, **options)
        for _ in range(layers)
    ]
    return torch.nn.Sequential(*ffns)


def test_phases_of_a_schedule():
    schedule = Schedule(10, dense_warmup_steps=3, dense_final_steps=2)
    assert [schedule.is_sparse(step) for step in range(10)] == [False] * 3 + [True] * 5 + [False] * 2
    assert [Schedule(1200).is_sparse(step) for step in (0, 999, 1000, 1199)] == [False, False, True, True]
    assert not any(Schedule(4, 3, 2).is_sparse(step) for step in range(4))


def test_schedule_sets_modules(device):
    model = network(device)
    x = normal(65, D, dtype=torch.bfloat16).to(device)
    converted = model[1]._modules["down_proj"]
    converted._sparse24_converted = True
    results = {}
    for step in range(4):
        sparse = Schedule(4, dense_warmup_steps=1, dense_final_steps=1).apply(model, step)
        assert sparse == (step in (1, 2)) == converted.sparse == model[0].sparse == model[2].sparse
        results.setdefault(sparse, []).append(model(x))
    y = x
    for m in model:
        y = F.linear(sparse24.linear_relu2(y, m.up_proj.weight)[0], m.down_proj.weight)
    assert_same_bits(results[False][0], y)
    y = x
    for m in model:
        y = sparse24.mm(*sparse24.linear_compress(y, m.up_proj.weight)[:2], m.down_proj.weight.t())
    assert_same_bits(results[True][0], y)
    assert not torch.equal(*(results[sparse][1] for sparse in (False, True)))


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_one_graph_per_phase(device, counter, precision):
    """Also with a recipe object for each layer; going back to a phase costs nothing."""
    model = network(device, precision=precision)
    for m in model:
        m.recipe = Recipe(dense_features=0.1)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = normal(64, D, dtype=torch.bfloat16).to(device)
    frames = []
    for step in range(9):
        Schedule(9, dense_warmup_steps=3, dense_final_steps=3).apply(compiled, step)
        compiled(x).sum().backward()
        frames.append(counter.frame_count)
    assert frames == [1] * 3 + [2] * 6


def test_layers_share_a_graph(device, counter):
    """Compiled one by one, with equal recipes that are different objects."""
    x = normal(64, D, dtype=torch.bfloat16).to(device)
    for m in network(device):
        m.recipe = Recipe(residual=True)
        m.compile(backend=counter, fullgraph=True)
        m(x).sum().backward()
    assert counter.frame_count == 1


def test_training_lowers_the_loss(device):
    """Dense, then sparse, in both precisions."""
    for precision in ("16bit", "fp8"):
        model = network(device, precision=precision, layers=2)
        x, target = (normal(256, D, dtype=torch.bfloat16, seed=s).to(device) for s in (0, 5))
        optimizer, schedule = torch.optim.SGD(model.parameters(), lr=0.5), Schedule(12, dense_warmup_steps=4)
        losses = []
        for step in range(12):
            schedule.apply(model, step)
            loss = F.mse_loss(model(x).float(), target.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[3] < losses[0] and losses[11] < losses[4], losses


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSALS = {
    "recipe": ({"recipe": {"residual": True}}, "recipe to be a sparse24.Recipe, got dict"),
    "fp8": (
        {"precision": "fp8", "recipe": Recipe(reuse_mask=False)},
        "recipe to reuse the mask in fp8 precision, got reuse_mask=False",
    ),
    "dtype": ({"hot_features": torch.zeros(64)}, "hot_features to be int64, got float32"),
    "count": (
        {"hot_features": torch.zeros(16, dtype=torch.int64)},
        r"hot_features to have shape \[64\] .*, got \[16\]",
    ),
    "rank": (
        {"hot_features": torch.zeros(1, 64, dtype=torch.int64)},
        r"hot_features to have shape \[64\] .*, got \[1, 64\]",
    ),
    "device": (
        {"hot_features": torch.zeros(64, dtype=torch.int64, device="meta")},
        "hot_features to be on .* as w1 is, got meta",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(device, name):
    options, sentence = REFUSALS[name]
    *leaves, _ = operands(8, torch.bfloat16, device)
    with pytest.raises(RuntimeError, match=rf"^sparse24\.relu2_mlp: expected {sentence}"):
        sparse24.relu2_mlp(*leaves, **options)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Recipe(weight_gradients="exact"), 'Recipe: expected weight_gradients to be .*, got "exact"'),
        (lambda: Recipe(dense_features=1.5), "Recipe: expected dense_features to be from 0 to 1, got 1.5"),
        (lambda: Recipe(dense_features=-0.1), "Recipe: expected dense_features to be from 0 to 1, got -0.1"),
        (lambda: Schedule(-1), "Schedule: expected total_steps to be at least 0, got -1"),
        (lambda: Schedule(1, -2), "Schedule: expected dense_warmup_steps to be at least 0, got -2"),
        (lambda: Schedule(1, 0, -3), "Schedule: expected dense_final_steps to be at least 0, got -3"),
        (
            lambda: Schedule(1).apply(torch.nn.Linear(2, 2), 0),
            "Schedule: expected model to have ReLU2MLP or converted modules, got Linear",
        ),
    ],
)
def test_refusals_of_options(make, sentence):
    with pytest.raises(RuntimeError, match=rf"^sparse24\.{sentence}$"):
        make()


@pytest.mark.parametrize(
    ("share", "features", "count"),
    [(0.05, 3072, 192), (0.05, 160, 64), (0.05, 32, 32), (0.0, 4096, 0), (1.0, 100, 100)],
)
def test_number_of_dense_features(share, features, count):
    assert Recipe(dense_features=share).hot_features(features) == count
