"""Derivatives beyond a backward pass: right, or refused on every way to ask for them."""

import pytest
import torch
import torch.autograd.forward_ad as fw
from compare import assert_same_bits
from data import normal, relu2_like
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from training_reference import HIDDEN, D, operands

import sparse24
from sparse24 import Recipe

# Dynamo makes an instance of every autograd function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

NO_SECOND = r"^sparse24\.relu2_mlp: expected create_graph to be False \(second derivatives are not defined\), got True$"
NO_FORWARD = r"sparse24\.{}: expected no forward-mode derivative \(jvp, jacfwd and hessian are not defined\), got one"
WAYS = {
    "sparse": {},
    "fp8": {"precision": "fp8"},
    "fp8 dense": {"precision": "fp8", "sparse": False},
    "recompute": {"recompute": True},
    "dense recompute": {"sparse": False, "recompute": True},
    "no reuse": {"recipe": Recipe(reuse_mask=False)},
    "residual": {"recipe": Recipe(residual=True)},
    "dense gradients": {"recipe": Recipe(weight_gradients="dense")},
    "unfused": {"fused": False},
}
SPARSE_WAYS = [name for name in WAYS if name != "dense recompute"]


class Network(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.up_proj = nn.Linear(D, HIDDEN, bias=False, device=device, dtype=torch.bfloat16)
        self.down_proj = nn.Linear(HIDDEN, D, bias=False, device=device, dtype=torch.bfloat16)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)).square())


def network(name, device):
    """ReLU2MLP, or a converted module, that runs sparse."""
    torch.manual_seed(0)
    if name == "module":
        return sparse24.nn.ReLU2MLP(D, HIDDEN, device=device, dtype=torch.bfloat16, min_tokens=0)
    model = nn.Sequential(Network(device))
    sparse24.convert(model, sparse24.ConvertConfig(min_tokens=0), quiet=True)
    return model[0]


def leaves_of(device, tokens=8):
    x, w1, w2, *_ = operands(tokens, torch.bfloat16, device, out=D)
    return x, w1, w2


LOSSES = {
    "sum": lambda x, out: out.sum(),
    "square": lambda x, out: out.square().sum(),
    "product": lambda x, out: (x * out).sum(),
    "residual": lambda x, out: (x + out).sum() + (x**3).sum(),
}


@pytest.mark.parametrize("needed", ["x", "weights", "all"])
@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_are_refused(device, way, needed):
    """Before anything can use a first derivative without its graph."""
    x, *weights = leaves_of(device)
    learning = [x] if needed == "x" else weights if needed == "weights" else [x, *weights]
    for t in learning:
        t.requires_grad_()
    for loss in LOSSES.values():
        value = loss(x, sparse24.relu2_mlp(x, *weights, min_tokens=0, **WAYS[way]))
        with pytest.raises(RuntimeError, match=NO_SECOND):
            torch.autograd.grad(value, learning, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match=NO_SECOND):
            value.backward(create_graph=True)


@pytest.mark.parametrize("name", ["module", "converted"])
def test_modules_refuse_second_derivatives(device, name):
    model = network(name, device)
    x = leaves_of(device)[0].requires_grad_()
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        with pytest.raises(RuntimeError, match=NO_SECOND):
            torch.autograd.grad(run(x).sum(), x, create_graph=True)
    for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        with pytest.raises(RuntimeError, match=NO_SECOND):
            function(lambda x: model(x).square().sum(), x, torch.ones_like(x))


def test_compiled_second_derivatives_are_refused(device):
    """By torch, as those of any network."""
    torch._dynamo.reset()
    x, w1, w2 = (t.requires_grad_() for t in leaves_of(device))
    compiled = torch.compile(lambda *t: sparse24.relu2_mlp(*t, min_tokens=0), fullgraph=True, backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(x, w1, w2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(first.square().sum(), x)
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_second_derivatives_of_the_dense_phase(fused):
    """They are those of the dense network."""
    x, w1, w2 = (t.float().requires_grad_() for t in leaves_of("cpu"))

    def second(function):
        first = torch.autograd.grad(function(x, w1, w2).square().sum(), (x, w1, w2), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, w1, w2))

    actual = second(lambda *t: sparse24.relu2_mlp(*t, sparse=False, fused=fused))
    expected = second(lambda x, w1, w2: torch.relu(x @ w1.t()).square() @ w2.t())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


# ---- torch.func ------------------------------------------------------------------------------------------------------


def loss_of(options):
    def loss(x, w1, w2):
        return sparse24.relu2_mlp(x, w1, w2, min_tokens=0, **options).float().square().sum()

    return loss


def backward(loss, *leaves):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("way", SPARSE_WAYS)
def test_torch_func_has_the_gradients_of_backward(device, way):
    loss = loss_of(WAYS[way])
    leaves = leaves_of(device, tokens=33)
    expected = backward(loss, *leaves)
    _, pull = vjp(loss, *leaves)
    one = torch.ones((), device=device)
    for actual in (grad(loss, argnums=(0, 1, 2))(*leaves), pull(one), jacrev(loss, argnums=(0, 1, 2))(*leaves)):
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("way", SPARSE_WAYS)
def test_samples_of_vmap(device, way):
    """Outputs, gradients of each sample, and the gradient of all: as one after another."""
    loss = loss_of(WAYS[way])
    _, w1, w2 = leaves_of(device)
    samples = torch.stack([normal(9, D, dtype=torch.bfloat16, seed=s).to(device) for s in range(3)])
    expected = [backward(loss, x, w1, w2) for x in samples]
    each = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(samples, w1, w2)
    for a, e in zip(each, zip(*expected, strict=True), strict=True):
        assert_same_bits(a, torch.stack(e))
    assert_same_bits(
        vmap(loss, in_dims=(0, None, None))(samples, w1, w2), torch.stack([loss(x, w1, w2) for x in samples])
    )
    together = grad(lambda x: vmap(loss, in_dims=(0, None, None))(x, w1, w2).sum())(samples)
    assert_same_bits(together, torch.stack([e[0] for e in expected]))


@pytest.mark.parametrize("name", ["module", "converted"])
def test_functional_call(device, name):
    model = network(name, device)
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    x = leaves_of(device, tokens=17)[0]

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).float().square().sum()

    loss(dict(model.named_parameters()), x).backward()
    for key, actual in grad(loss)(parameters, x).items():
        assert_same_bits(actual, model.get_parameter(key).grad)
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x[None])
    for key, actual in each.items():
        assert_same_bits(actual[0], model.get_parameter(key).grad)


@pytest.mark.parametrize("way", SPARSE_WAYS)
def test_torch_func_refuses_second_derivatives(device, way):
    loss = loss_of(WAYS[way])
    x, w1, w2 = leaves_of(device)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        grad(lambda x: grad(loss)(x, w1, w2).square().sum())(x)
    with pytest.raises(RuntimeError, match=NO_FORWARD.format("relu2_mlp")):
        hessian(loss)(x, w1, w2)


def test_torch_func_of_the_dense_phase():
    """Everything, by torch's own ops."""
    leaves = tuple(t.float() for t in leaves_of("cpu"))
    tangents = tuple(torch.ones_like(t) for t in leaves)
    ours = lambda *t: sparse24.relu2_mlp(*t, sparse=False).square().mean()  # noqa: E731
    torchs = lambda x, w1, w2: (torch.relu(x @ w1.t()).square() @ w2.t()).square().mean()  # noqa: E731

    def dual(loss):
        with fw.dual_level():
            return fw.unpack_dual(loss(*map(fw.make_dual, leaves, tangents))).tangent

    for of in (
        lambda f: grad(f)(*leaves),
        lambda f: jvp(f, leaves, tangents)[1],
        lambda f: jacfwd(f)(*leaves),
        lambda f: grad(lambda x: grad(f)(x, *leaves[1:]).square().sum())(leaves[0]),
        lambda f: vmap(grad(f), in_dims=(0, None, None))(leaves[0][:, None], *leaves[1:]),
        dual,
    ):
        torch.testing.assert_close(of(ours), of(torchs))


def test_compiled_torch_func(device):
    """One graph of it is refused; with graph breaks it runs as without a compiler."""
    torch._dynamo.reset()
    loss = loss_of({})
    x, w1, w2 = leaves_of(device)
    expected = backward(loss, x, w1, w2)[0]
    assert_same_bits(torch.compile(lambda x: grad(loss)(x, w1, w2), backend="aot_eager")(x), expected)
    torch._dynamo.reset()
    whole = torch.compile(lambda x: grad(loss)(x, w1, w2), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="expected no derivative of torch.func inside of torch.compile"):
        whole(x)
    torch._dynamo.reset()


# ---- the ops ---------------------------------------------------------------------------------------------------------


def op_calls(device):
    """A function of one tensor for each op, and that tensor."""
    x = relu2_like(32, 64, torch.bfloat16, seed=1).to(device)
    w = normal(32, 64, dtype=torch.bfloat16, seed=2).to(device)
    values, meta = sparse24.compress(x)
    y = torch.relu(x).square()
    features = torch.arange(4, device=device)
    factor = torch.ones(1, device=device)
    out = torch.zeros(8, 8, dtype=torch.bfloat16, device=device)
    return {
        "compress": (lambda t: sparse24.compress(t, "relu2")[0], x),
        "compress_fp8": (lambda t: sparse24.compress_fp8(t)[2], x),
        "compress_like": (lambda t: sparse24.compress_like(t, meta), x),
        "decompress": (lambda t: sparse24.decompress(t, meta, 32, 64), values),
        "feature_counts": (lambda t: sparse24.feature_counts(t, meta).float(), values),
        "gather_features": (lambda t: sparse24.gather_features(t, meta, features), values),
        "mm": (lambda t: sparse24.mm(values, meta, t), w.t()),
        "linear_compress": (lambda t: sparse24.linear_compress(x, t)[0], w),
        "linear_relu2": (lambda t: sparse24.linear_relu2(t, w)[0], x),
        "linear_gradient": (lambda t: sparse24.linear_gradient(t, w, values, meta)[0], x[:, :32]),
        "linear_relu2_gradient": (lambda t: sparse24.linear_relu2_gradient(x[:, :32], w, t), y),
        "quantize_fp8": (lambda t: sparse24.quantize_fp8(t)[1], x),
        "quantize_fp8_predict": (lambda t: sparse24.quantize_fp8_predict(t, factor)[1], x),
        "put_features": (lambda t: sparse24.put_features(out, t, features, -1), out[:, :4][None]),
    }


@pytest.mark.parametrize("op", op_calls("cpu"))
def test_ops_refuse_forward_mode(device, op):
    function, argument = op_calls(device)[op]
    tangent = torch.ones_like(argument)

    def dual():
        with fw.dual_level():
            function(fw.make_dual(argument, tangent))

    for ask in (
        dual,
        torch.no_grad()(dual),
        lambda: jvp(function, (argument,), (tangent,)),
        lambda: jacfwd(function)(argument),
    ):
        with pytest.raises(RuntimeError, match="^" + NO_FORWARD.format(op)):
            ask()
    with fw.dual_level():
        function(argument)  # nothing dual


@pytest.mark.parametrize("learning", [False, True], ids=["constant weights", "learning weights"])
@pytest.mark.parametrize("way", WAYS)
def test_networks_refuse_forward_mode(device, way, learning):
    x, w1, w2 = leaves_of(device)
    if way == "dense recompute":
        pytest.skip("torch's own ops have it")
    for t in (w1, w2):
        t.requires_grad_(learning)

    def run(x):
        return sparse24.relu2_mlp(x, w1, w2, min_tokens=0, **WAYS[way])

    tangent = torch.ones_like(x)
    with pytest.raises(RuntimeError, match="^" + NO_FORWARD.format("relu2_mlp")), fw.dual_level():
        run(fw.make_dual(x, tangent))
    for ask in (lambda: jvp(run, (x,), (tangent,)), lambda: jvp(vmap(run), (x[None],), (tangent[None],))):
        with pytest.raises(RuntimeError, match="^" + NO_FORWARD.format("relu2_mlp")):
            ask()


@pytest.mark.parametrize("op", ["compress", "mm", "linear_compress", "linear_relu2", "decompress", "quantize_fp8"])
def test_ops_refuse_derivatives_of_torch_func(device, op):
    function, argument = op_calls(device)[op]
    with pytest.raises(RuntimeError, match=rf"^sparse24\.{op}: expected no derivative of torch\.func"):
        grad(lambda t: function(t).float().sum())(argument)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ops_under_vmap(device):
    function, argument = op_calls(device)["linear_compress"]
    batch = torch.stack((argument, 2 * argument))
    assert_same_bits(vmap(function)(batch), torch.stack([function(t) for t in batch]))
