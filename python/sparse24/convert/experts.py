"""The experts of a mixture: two three-dimensional weights, and a forward of tokens, their experts and their factors.

That is the interface of transformers (`NemotronHExperts` and others). As for a single network a replica with random
weights says what they compute. The router, and experts that all tokens share, are other modules.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse24.convert.call import arguments_of
from sparse24.convert.conversion import Layer
from sparse24.convert.layers import NAMES, is_called
from sparse24.convert.problems import module_problem
from sparse24.convert.reason import Mismatch
from sparse24.convert.replica import Network, device_of, make_replica, put, run
from sparse24.convert.seen import difference, look
from sparse24.nn.children import weight_problem

#: Largest error, in units of the same sum of magnitudes.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_OTHER = "it does not compute the sum of w W2[e] relu(W1[e] x)^2 over the experts of a token"
_OTHER_NUMBER = "it computes something else for another number of tokens"
#: Tokens of a trial, those of further ones, and experts of each token.
_TOKENS, _FURTHER, _CHOICES = 24, (1, 1000), 2
#: Of inputs: what clips large numbers is something else, and sums of larger squares overflow in float16.
_LARGE = {torch.float16: 8.0}


def experts_of(module: nn.Module) -> tuple[str, str] | None:
    """Name the two weights [E, F, D] and [E, D_out, F] of a module that is called with tokens, experts and factors."""
    owned = {name: p for name, p in module._parameters.items() if p is not None}
    if len(owned) != 2 or any(is_lazy(p) or p.dim() != 3 for p in owned.values()) or not is_called(module):
        return None
    try:
        arguments = arguments_of(type(module).forward)
    except (TypeError, ValueError):  # a forward without a signature
        return None
    if len(arguments.required) != 2 or len(arguments.positional) < 3:  # beside the tokens
        return None
    first, second = owned
    return (second, first) if (second, first) in NAMES else (first, second)


def examine_experts(module: nn.Module, up: str, down: str) -> tuple[Network | None, str, bool]:
    """Tell what such a module computes, why it cannot be converted, and whether it counts."""
    is_named = (up, down) in NAMES
    w1, w2 = module._parameters[up], module._parameters[down]
    reason = module_problem(module) or weight_problem(up, w1) or weight_problem(down, w2)  # type: ignore[arg-type]
    reason = reason or difference(module, look(module)) or _further(module, up, down)
    for name, w in ((up, w1), (down, w2)):
        if not reason and w.dtype not in (torch.float32, torch.bfloat16, torch.float16):  # type: ignore[union-attr]
            reason = f"the weight of {name} is {str(w.dtype).removeprefix('torch.')}"  # type: ignore[union-attr]
    if reason:
        return None, reason, is_named
    (experts, f, d), (others, d_out, f_down) = w1.shape, w2.shape  # type: ignore[union-attr]
    if (experts, f) != (others, f_down) or experts == 0:
        return None, f"the sizes of {up} {list(w1.shape)} and {down} {list(w2.shape)} do not fit", is_named  # type: ignore
    found = _probe(module, Network(Layer(up), Layer(down), d, f, d_out, experts=experts))
    if isinstance(found, Mismatch):
        return None, found.reason, is_named
    return found, "", True


def _further(module: nn.Module, up: str, down: str) -> str | None:
    tensors = [name for name, _ in module.named_parameters() if name not in (up, down)]
    tensors += [name for name, _ in module.named_buffers()]
    return f"it has parameters or buffers beside its two weights ({', '.join(tensors[:3])})" if tensors else None


def _probe(module: nn.Module, network: Network) -> Network | Mismatch:
    """Try it in the most precise dtype that it runs in: in evaluation, and in training if it is in training."""
    own = module._parameters[network.up.name].dtype  # type: ignore[union-attr]
    error: Exception | None = None
    for dtype in (torch.float64, own):
        try:
            wrong = [_is_other(module, network.smaller(), dtype, training, _TOKENS) for training in (False, True)]
        except Exception as caught:  # of the module, and it may be anything
            error = error or caught
            continue
        if wrong[0] or (wrong[1] and module.training):
            return Mismatch(_OTHER, False)
        if any(_differs(module, network.smaller(), dtype, tokens) for tokens in _FURTHER):
            return Mismatch(_OTHER_NUMBER, False)
        return replace(network, in_training=not wrong[1])
    text = str(error).partition("\n")[0]
    return Mismatch(f"its forward does not run: {type(error).__name__}: {text}", False)


def _differs(module: nn.Module, network: Network, dtype: torch.dtype, tokens: int) -> bool:
    """Whether it computes something else for another number of tokens; what it refuses says nothing."""
    try:
        return _is_other(module, network, dtype, False, tokens)
    except Exception:  # of the module, and it may be anything
        return False


def _is_other(module: nn.Module, network: Network, dtype: torch.dtype, training: bool, tokens: int) -> bool:
    """Whether a replica with random weights, the first of them positive, gives anything else than the experts would."""
    device, experts = device_of(module), network.experts or 0
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    w1 = normal(experts, network.f, network.d).abs() / network.d
    w2 = normal(experts, network.d_out, network.f)
    x = normal(tokens, network.d)
    x[::4] = -x[::4].abs()  # all of their hidden layer is negative: exact zeros come out
    x[1::4] *= _LARGE.get(dtype, 2.0**52)
    x[2::8] *= _LARGE.get(dtype, 64.0)
    choices = min(_CHOICES, experts)
    index = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)])
    factors = normal(tokens, choices).abs()
    replica = make_replica(module)
    put(replica, network.up.name, w1.to(device))
    put(replica, network.down.name, w2.to(device))
    out = run(replica, x.to(device, copy=True), training, further=(index.to(device), factors.to(device)))
    if not isinstance(out, Tensor) or out.shape != (tokens, network.d_out):
        return True
    wide = [t.double() for t in (x, w1, w2, factors)]
    expected, scale = _expected(*wide, index)
    # Experts that many tokens choose are summed in any order, and each product may be rounded.
    return not bool(((out.double().cpu() - expected).abs() <= _TOLERANCE[dtype] * scale).all())


def _expected(x: Tensor, w1: Tensor, w2: Tensor, factors: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the sum over the experts of each token, and that of the magnitudes."""
    sums = []
    for sign in (1, 0):
        total = x.new_zeros(len(x), w2.shape[1])
        for k in range(index.shape[1]):
            first, second = w1[index[:, k]], w2[index[:, k]]
            h = torch.einsum("td,tfd->tf", x, first)
            y = h.clamp(min=0).square() if sign else torch.einsum("td,tfd->tf", x.abs(), first).square() * (h > 0)
            total += factors[:, k, None] * torch.einsum("tf,tnf->tn", y, second if sign else second.abs())
        sums.append(total)
    return sums[0], sums[1]
