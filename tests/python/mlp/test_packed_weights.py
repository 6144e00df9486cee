"""2:4 weights in products with a dense operand, which multiply them packed: the bits of pruning and a dense product."""

import packed_calls
import pytest
import torch
from compare import assert_same_bits
from data import integers
from packed_calls import OUT, D, F, operands
from training_reference import NAMES, run

import sparse24
from sparse24 import Recipe, prune24
from sparse24.mlp import kept_weights

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

CHOICES = ("up", "both")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    packed_calls.always(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    return packed_calls.spied(monkeypatch)


def pruned(leaves, choice):
    x, w1, w2, *biases = leaves
    return [x, prune24(w1, -1), prune24(w2, 0) if choice == "both" else w2, *biases]


def assert_same(actual, expected):
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        assert_same_bits(a + 0.0, e + 0.0, name)


@pytest.mark.parametrize("which", CHOICES)
@pytest.mark.parametrize("tokens", [133, 512])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": True},
        {"threshold": 2.0},
        {"further": {"residual": True}},
        {"further": {"weight_gradients": "dense"}},
        {"further": {"reuse_mask": False}},
        {"precision": "fp8"},
        {"precision": "fp8", "recompute": True},
        {"precision": "fp8", "further": {"fp8_weight_gradients": True}},
        {"precision": "fp8", "recompute": True, "further": {"fp8_weight_gradients": True}},
    ],
    ids=str,
)
def test_as_in_two_steps(poisoned_memory, device, dtype, calls, which, tokens, options):
    *leaves, grad = operands(tokens, dtype, device)
    further = options.pop("further", {}) if "further" in (options := dict(options)) else {}
    actual = run(leaves, grad, recipe=Recipe(sparse_weights=which, **further), **options)
    float8, both = "fp8_weight_gradients" in further, which == "both"
    assert "linear_compress_packed" in calls
    assert ("linear_gradient_packed" in calls) == (both and not float8 and "reuse_mask" not in further)
    assert ("linear_gradient_fp8_packed" in calls) == (both and float8)
    calls.clear()
    assert_same(actual, run(pruned(leaves, which), grad, recipe=Recipe(**further), **options))
    assert not calls


@pytest.mark.parametrize("needed", [("x",), ("w1",), ("w2", "b1"), ("x", "w2")], ids=str)
def test_only_some_gradients(device, needed):
    *leaves, grad = operands(133, torch.bfloat16, device)
    recipe = Recipe(sparse_weights="both")
    actual = run(leaves, grad, needed=needed, recipe=recipe)
    expected = run(pruned(leaves, "both"), grad, needed=needed)
    for a, e in zip(actual, expected, strict=True):
        assert a is None and e is None or torch.equal(a, e)


def test_masters_are_pruned_before_they_are_rounded(device):
    *leaves, grad = operands(133, torch.float32, "cpu")
    x, *masters = [t.to(device) for t in leaves]
    masters[0][:, 1] = masters[0][:, 0] * (1 + 2**-12)  # equal in 16 bits
    grad = grad.to(device, torch.bfloat16)

    def step(masters, recipe):
        masters = [t.detach().clone().requires_grad_() for t in masters]
        out = sparse24.relu2_mlp(x.bfloat16(), *masters, recipe=recipe, min_tokens=0)
        out.backward(grad)
        return out.detach(), *(t.grad for t in masters)

    _, *dense = pruned([x, *masters], "both")
    actual = step(masters, Recipe(sparse_weights="both"))
    assert {t.dtype for t in actual[1:]} == {torch.float32}
    for a, e in zip(actual, step(dense, None), strict=True):
        assert_same_bits(a + 0.0, e + 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "masters"])
@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}], ids=str)
def test_packed_once_a_step(device, calls, dtype, options):
    """From the step after the first that accumulated; the bits of a training that keeps nothing."""
    recipe = Recipe(sparse_weights="both", fp8_weight_gradients="precision" in options)

    def train(keeps):
        torch.manual_seed(0)
        mlp = sparse24.nn.ReLU2MLP(D, F, OUT, device=device, dtype=dtype, recipe=recipe, min_tokens=0, **options)
        optimizer = torch.optim.SGD(mlp.parameters(), lr=1e-2)
        packings = []
        for step in range(3):
            for batch in range(3):
                calls.clear()
                x = integers(64, D, dtype=torch.bfloat16, seed=3 * step + batch).to(device)
                mlp(x).sum().backward()
                packings.append(sum("prune" in name for name in calls))
                if not keeps:
                    kept_weights._kept.clear()
            optimizer.step()
            optimizer.zero_grad()
        return packings, [p.detach() for p in mlp.parameters()]

    # float8 codes of masters are packed of what is pruned of them before.
    passes = 4 if options and dtype == torch.float32 else 2
    packings, parameters = train(True)
    assert packings == [passes * n for n in (1, 1, 0, 1, 0, 0, 1, 0, 0)]
    kept_weights._accumulating = False
    assert not kept_weights._kept
    packings, expected = train(False)
    assert packings == [passes] * 9
    for a, e in zip(parameters, expected, strict=True):
        assert_same_bits(a, e)


def test_a_changed_weight_is_packed_again(device, calls):
    mlp = sparse24.nn.ReLU2MLP(D, F, OUT, device=device, dtype=torch.bfloat16, recipe=Recipe(sparse_weights="up"))
    mlp.min_tokens = 0
    x = integers(64, D, dtype=torch.bfloat16).to(device)
    for _ in range(3):
        mlp(x).sum().backward()
    calls.clear()
    with torch.no_grad():
        mlp.up_proj.weight.mul_(-1)
    out = mlp(x)
    assert calls.count("prune_pack24") == 1
    kept_weights._kept.clear()
    assert_same_bits(out, mlp(x))


def test_what_is_saved(device):
    """Of w2 the packed form alone, in 9 of 16 parts of the bytes; of w1 the pruned one."""

    def saved(recipe, **options):
        *leaves, _ = operands(133, torch.bfloat16, device)
        leaves = [t.requires_grad_() for t in leaves]
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            sparse24.relu2_mlp(*leaves, min_tokens=0, recipe=recipe, **options)
        return [tuple(t.shape) for t in kept.values()]

    assert (OUT, F) in saved(Recipe())
    shapes = saved(Recipe(sparse_weights="both"))
    assert (OUT, F) not in shapes and (F, OUT // 2) in shapes and (F, D // 2) not in shapes
    shapes = saved(Recipe(sparse_weights="both", fp8_weight_gradients=True), precision="fp8")
    assert (F, OUT) not in shapes and (F, OUT // 2) in shapes and (D, F) in shapes and (F, D // 2) not in shapes


def test_sizes_without_a_kernel_are_multiplied_dense(device, calls):
    *leaves, grad = operands(133, torch.bfloat16, device, d=24)
    actual = run(leaves, grad, recipe=Recipe(sparse_weights="up"))
    assert not calls
    assert_same(actual, run(pruned(leaves, "up"), grad))


@pytest.mark.parametrize("which", CHOICES)
@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}], ids=str)
def test_compiled(device, which, options):
    torch._dynamo.reset()
    *leaves, grad = operands(96, torch.bfloat16, device)
    recipe = Recipe(sparse_weights=which)
    compiled = torch.compile(sparse24.relu2_mlp, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in leaves]
    out = compiled(*leaves, recipe=recipe, min_tokens=0, **options)
    actual = out.detach(), *torch.autograd.grad(out, leaves, grad)
    assert_same(actual, run(leaves, grad, recipe=recipe, **options))
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
@pytest.mark.parametrize("quantised", [False, True])
def test_modules_keep_it_packed_for_inference(device, calls, precision, quantised):
    """`prune_weights_` packs the first weight once; calls follow the weight, and the dense phase does not use it."""
    options = {"precision": "fp8"} if precision == "fp8" or quantised else {}
    torch.manual_seed(0)
    mlp = sparse24.nn.ReLU2MLP(D, F, OUT, device=device, dtype=torch.bfloat16, min_tokens=0, **options)
    x = integers(133, D, dtype=torch.bfloat16).to(device)
    mlp.prune_weights_("both")
    if quantised:
        mlp.quantize_()

    def check():
        first, second = mlp.up_proj, mlp.down_proj
        scales = {"w1_scale": first.weight_scale, "w2_scale": second.weight_scale} if quantised else {}
        factor = {"scale_y_factor": first.scale_y_factor} if quantised else {}
        expected = sparse24.relu2_mlp(x, first.weight, second.weight, min_tokens=0, **options, **scales, **factor)
        calls.clear()
        out = mlp(x)
        packed = precision == "16bit" and not options or quantised
        assert calls.count("linear_compress_packed") == packed
        error = (out.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-2

    with torch.no_grad():
        check()
        if not quantised:
            mlp.up_proj.weight.copy_(prune24(torch.randn_like(mlp.up_proj.weight)))
            check()
        calls.clear()
        mlp.sparse = False
        mlp(x)
    assert not calls


@pytest.mark.parametrize("precision", ["16bit", "fp8"])
def test_converted_modules_keep_it_packed(device, calls, precision):
    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = torch.nn.Linear(D, F, bias=False), torch.nn.Linear(F, OUT, bias=False)

        def forward(self, x):
            return self.down_proj(torch.relu(self.up_proj(x)).square())

    torch.manual_seed(0)
    mlp = MLP().to(device, torch.bfloat16).eval()
    x = integers(133, D, dtype=torch.bfloat16).to(device)
    dtype = "bf16" if precision == "16bit" else "fp8"
    config = sparse24.ConvertConfig(sparse_weights="up", dtype=dtype, min_tokens=0)
    sparse24.convert(mlp, config, quiet=True)
    with torch.no_grad():
        for _ in range(2):
            out = mlp(x)
            expected = sparse24.relu2_mlp(
                x, prune24(mlp.up_proj.weight), mlp.down_proj.weight, min_tokens=0, precision=precision
            )
            assert calls.count("linear_compress_packed") == 1
            assert (out.double() - expected.double()).norm() < 1e-2 * expected.double().norm()
            mlp.up_proj.weight.mul_(-1)
            calls.clear()
