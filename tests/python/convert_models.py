"""Feed-forward networks as other projects write them, and what each computes with a 2:4 activation, in plain torch."""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from data import generator
from oracle import Pattern
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparse24
from sparse24.analyze import top2_mask

D, HIDDEN = 64, 160

#: The names of the two layers that occur in the wild.
PAIRS = (
    ("c_fc", "c_proj"),
    ("fc", "proj"),
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("linear_fc1", "linear_fc2"),
    ("linear_1", "linear_2"),
    ("key", "value"),
)

#: Nothing is pruned along tokens: gradients are those of the dense network with a mask on its activation.
EXACT = sparse24.ConvertConfig(min_tokens=0, recipe=sparse24.Recipe(weight_gradients="dense"))


def relu2(h: Tensor) -> Tensor:
    return F.relu(h).square()


class CastLinear(nn.Linear):
    """float32 master weights, cast in each call to the dtype of the activations."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Wrapper(nn.Module):
    """Of an adapter library: the layer is inside."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x)


class SquaredReLU(nn.Module):
    def forward(self, x):
        return relu2(x)


class Inline(nn.Module):
    """Layers under any two names, and an activation that only the forward knows."""

    def __init__(self, names=("c_fc", "c_proj"), *, bias=False, linear=nn.Linear, activation=relu2, d=D, hidden=HIDDEN):
        super().__init__()
        self.names = names
        self.activation = activation
        setattr(self, names[0], linear(d, hidden, bias=bias))
        setattr(self, names[1], linear(hidden, d, bias=bias))

    def forward(self, x):
        up, down = (getattr(self, name) for name in self.names)
        return down(self.activation(up(x)))


class WithModule(nn.Module):
    """The activation is a child, between layers named as in Hugging Face models."""

    def __init__(self, act=None, *, bias=False):
        super().__init__()
        self.up_proj = nn.Linear(D, HIDDEN, bias=bias)
        self.act_fn = SquaredReLU() if act is None else act
        self.down_proj = nn.Linear(HIDDEN, D, bias=bias)

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class BothParameters(nn.Module):
    """Both weights are parameters [hidden, d], the second is used transposed, and starts at zero."""

    def __init__(self, d=D, hidden=HIDDEN):
        super().__init__()
        self.c_fc = nn.Parameter(torch.randn(hidden, d, generator=generator(1)) / d**0.5)
        self.c_proj = nn.Parameter(torch.zeros(hidden, d))

    def forward(self, x):
        return F.linear(relu2(F.linear(x, self.c_fc.type_as(x))), self.c_proj.T.type_as(x))


class Stack(nn.Module):
    """Networks with residual connections, as blocks have them."""

    def __init__(self, *networks):
        super().__init__()
        self.layers = nn.ModuleList(networks)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter other numbers, zeros included."""
    for i, p in enumerate(module.parameters()):
        with torch.no_grad():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator(100 + i)) * scale)
    return module


def read(module: nn.Module, names) -> list[Tensor | None]:
    """w1, b1, w2 and b2, the weights as `torch.nn.Linear` stores them."""
    up, down = (getattr(module, name) for name in names)
    if isinstance(up, Tensor):
        return [up, None, down.t(), None]
    return [up.weight, up.bias, down.weight, down.bias]


def masked(module: nn.Module, names, x: Tensor) -> Tensor:
    """What a network computes if of each four neighbours in its activation the two largest are kept."""
    w1, b1, w2, b2 = (None if t is None else t.to(x.dtype) for t in read(module, names))
    y = relu2(F.linear(x, w1, b1))
    return F.linear(y * kept(y, x, w1, b1), w2, b2)


@torch.no_grad()
def kept(y: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """True at the two largest of four; on CUDA by the fused kernel, whose order of summation decides near ties."""
    if not x.is_cuda:
        return top2_mask(y)
    meta = sparse24.linear_compress(x.flatten(0, -2), w1, bias=b1)[1]
    mask = Pattern.of_meta(meta, y.numel() // y.shape[-1], y.shape[-1], x.dtype, -1).mask()
    return mask.to(x.device).reshape(y.shape)


@contextmanager
def masked_class(kind: type[nn.Module], names):
    """Every module of a class computes `masked`."""
    before = kind.forward
    kind.forward = lambda self, x: masked(self, names, x)
    try:
        yield
    finally:
        kind.forward = before


@contextmanager
def masked_experts(kind: type[nn.Module]):
    """Every module of a class of experts computes `masked` for each choice of its router."""

    def forward(self, x, index, factors):
        out = x.new_zeros(x.shape, dtype=factors.dtype)
        for expert in range(len(self.up_proj)):
            token, choice = torch.where(index == expert)
            w1, w2 = self.up_proj[expert], self.down_proj[expert]
            y = relu2(F.linear(x[token], w1))
            y = F.linear(y * kept(y, x[token], w1, None), w2) * factors[token, choice, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out.to(x.dtype)

    before = kind.forward
    kind.forward = forward
    try:
        yield
    finally:
        kind.forward = before


class CountOps(TorchDispatchMode):
    """Count calls of the sparse GEMM: for inference it is inside of the op of the whole network."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    @property
    def sparse(self) -> int:
        return self.calls["sparse24.mm.default"] + self.calls["sparse24.relu2_mlp_sparse.default"]

    @property
    def experts(self) -> int:
        """Those of experts on the CPU, whose products are inside of one op."""
        return self.calls["sparse24_reference.relu2_experts.default"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def gradients(module: nn.Module, call, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters for a loss that weighs every output differently."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = call(x)
    weights = torch.randn(out.shape, generator=generator(7)).to(out)
    (out * weights).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_near(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> None:
    """Equal to a share of the largest entry; what has no gradient has none on both sides."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e is None:
            assert a is None, i
            continue
        assert a.dtype == e.dtype and a.shape == e.shape, i
        error, largest = (a - e).abs().max().item(), e.abs().max().item()
        assert error <= tolerance * largest, f"result {i}: error {error:.2e}, largest {largest:.2e}"
