"""The networks: relu2_mlp, ReLU2MLP and what convert makes of a module, forward and backward."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from oracle import FP8
from torch import Tensor, nn

import sparse24
from fuzzing.calls import Call
from fuzzing.contract import FLOATS, FLOATS_AND_FP8, Check, Unsettled, is_huge, is_ordinary, need, tensor, word
from fuzzing.dice import Dice
from fuzzing.few_tokens import MOST
from fuzzing.network_reference import Reference
from sparse24 import Recipe

#: The arguments of relu2_mlp and what they are, as mutations.py wants to know it.
SIGNATURE = [
    *((name, "Tensor") for name in ("x", "w1", "w2")),
    *((name, "Optional[Tensor]") for name in ("b1", "b2")),
    ("precision", "str"),
    *((name, "Optional[Tensor]") for name in ("w1_scale", "w2_scale", "scale_y", "scale_y_factor")),
    ("min_tokens", "int"),
]
RECIPES = (
    *(None, Recipe(), Recipe(weight_gradients="dense"), Recipe(residual=True), Recipe(dense_features=0.5)),
    *(Recipe(permute_tokens=False, dense_features=0.0), Recipe(reuse_mask=False)),
    *(Recipe(fp8_weight_gradients=True), Recipe(fp8_weight_gradients=True, permute_tokens=False, dense_features=0.0)),
)
#: Of the norm of a result, how much it may be off: a rounding may decide which of two features is kept.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
_TOLERANCE_FP8 = 0.25
_LEAVES = ("x", "w1", "w2", "b1", "b2")


class Plain(nn.Module):
    """The network as users write it."""

    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up_proj, self.down_proj = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)).square())


@dataclass
class Network(Call):
    """`learns`: gradients are among the results. `route`: "function", "module", "converted" or "checkpoint".

    `by_neuron`: the function is given `w2_rows`, too. `delayed`: a step before leaves the scales of this one.
    """

    learns: bool = False
    route: str = "function"
    by_neuron: bool = False
    delayed: bool = False
    is_op = False

    @property
    def takes_float32_on_cuda(self) -> bool:
        return self.route == "converted"  # which runs as before conversion then

    @property
    def arguments(self) -> list[tuple[str, str]]:
        return SIGNATURE if self.route in ("function", "checkpoint") else []

    def run(self, values: dict[str, Any]) -> tuple[Tensor, ...]:
        leaves = {}
        for name in _LEAVES if self.learns else ():
            t = values[name]
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != FP8:
                leaves[name] = t.detach().requires_grad_()
        out = getattr(self, f"_{self.route}")(values | leaves)
        if not leaves or not out.requires_grad:
            return (out.detach(),)
        # Weights with which every output counts differently.
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)

    def _function(self, values: dict[str, Any]) -> Tensor:
        w2, further = values["w2"], {}  # of another rank or none, where that is what the call has wrong
        if self.by_neuron and isinstance(w2, Tensor):
            further["w2_rows"] = (w2.t() if w2.dim() <= 2 else w2).contiguous()
        if self.delayed:
            scales = torch.zeros(4, device=values["x"].device)
            first = sparse24.relu2_mlp(**values, delayed_scales=scales, scales_known=False)
            if first.requires_grad:
                first.backward(torch.linspace(-1, 1, first.numel(), device=first.device).view_as(first).to(first.dtype))
                for t in values.values():
                    if isinstance(t, Tensor):
                        t.grad = None
            further |= {"delayed_scales": scales, "scales_known": bool((scales > 0).all())}
        return sparse24.relu2_mlp(**values, **further)

    def _checkpoint(self, values: dict[str, Any]) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda x: sparse24.relu2_mlp(**(values | {"x": x})), values["x"], use_reentrant=False
        )

    def _layers(self, values: dict[str, Any]) -> list[nn.Linear]:
        layers = []
        for weight, bias in (("w1", "b1"), ("w2", "b2")):
            w, b = values[weight], values[bias]
            layer = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, device="meta", dtype=w.dtype)
            layer._parameters |= {"weight": w, "bias": b}
            layers.append(layer)
        return layers

    def _module(self, values: dict[str, Any]) -> Tensor:
        w1, w2 = values["w1"], values["w2"]
        options = {name: values[name] for name in ("precision", "min_tokens", "recipe", "recompute")}
        module = sparse24.nn.ReLU2MLP(w1.shape[1], w1.shape[0], w2.shape[0], device="meta", **options)
        module.up_proj, module.down_proj = self._layers(values)
        module.sparse = values["sparse"]
        return module(values["x"])

    def _converted(self, values: dict[str, Any]) -> Tensor:
        module = Plain(*self._layers(values))
        dtype = {"auto": "auto", "16bit": "bf16", "fp8": "fp8"}[values["precision"]]
        options = {name: values[name] for name in ("min_tokens", "recipe", "recompute")}
        report = sparse24.convert(module, sparse24.ConvertConfig(dtype=dtype, **options), quiet=True)
        assert report.converted == [""] and not report.skipped, f"not converted: {report.skipped}"
        return module(values["x"])

    def code(self, device: str) -> str:
        """The call as a program, for a PYTHONPATH of python:tests/python."""
        return (
            "from torch import *\nimport torch\nfrom sparse24 import Recipe\nfrom fuzzing.networks import Network\n"
            "from fuzzing.tensors import Draw, copy_to\n\n"
            f"call = {self!r}\n"
            "values = {name: v.make() if isinstance(v, Draw) else v for name, v in call.args.items()}\n"
            f'values = {{name: copy_to(v, "{device}") if isinstance(v, Tensor) else v for name, v in values.items()}}\n'
            "print(call.run(values))"
        )


def legal_network(d: Dice) -> Network:
    """A call that has to work."""
    route = d.weighted({"function": 6, "checkpoint": 1, "module": 2, "converted": 1})
    plain = route in ("module", "converted")
    dtype, precision = d.dtype(), d.choice(("auto", "16bit", "fp8"))
    float8 = not plain and d.chance(0.15)
    precision = "auto" if float8 else precision
    fp8 = float8 or precision == "fp8"
    leading = d.choice(((), (d.rows(),), (d.rows(),), (2, 3), (1, 2, 5), (3, 0)))
    tokens = math.prod(leading)
    hidden = d.columns(32 if fp8 else 16 if route == "converted" else d.choice((8, 16)))
    depth, out = (d.columns(16 if fp8 else 4) for _ in range(2))
    if route == "converted":  # nothing is what networks without features are converted to
        hidden, depth, out = hidden or 32, depth or 32, out or 32
    weights = FP8 if float8 else dtype if d.chance(0.7) or d.device == "cuda" and plain else torch.float32
    biased = d.chance(0.5)
    given = d.choice(("none", "one", "each", "factor")) if fp8 and not plain else "none"
    args = {
        "x": d.draw((*leading, depth), dtype, "normal", layout="contiguous" if not leading else None),
        "w1": d.draw((hidden, depth), weights, "normal" if float8 else "weights"),
        "w2": d.draw((out, hidden), weights, "normal" if float8 else "weights"),
        "b1": d.draw((hidden,), weights if not float8 else dtype, "normal") if biased else None,
        "b2": d.draw((out,), weights if not float8 else dtype, "normal") if biased else None,
        "precision": precision,
        "w1_scale": d.scale(hidden, "small") if float8 else None,
        "w2_scale": d.scale(out, "small") if float8 else None,
        "scale_y": d.scale(1 if given == "one" else tokens, "small") if given in ("one", "each") else None,
        "scale_y_factor": d.scale(1, "ones") if given == "factor" else None,
        "min_tokens": d.choice((0, 0, None, 5, 10**6)),
        "fused": plain or d.chance(0.7),
        "recipe": d.choice([r for r in RECIPES if not fp8 or r is None or r.reuse_mask]),
        "recompute": d.chance(0.2),
        "sparse": route == "converted" or d.chance(0.85),
    }
    further = {name: route == "function" and d.chance(0.3) for name in ("by_neuron", "delayed")}
    return Network("relu2_mlp", args, route=route, learns=d.chance(0.6), **further)


def rule(call: Network, values: dict[str, Any], device: str) -> Check | None:
    """As the rules of contract.py."""
    tensors = [t for t in values.values() if isinstance(t, Tensor)]
    if any(t._is_zerotensor() or t.is_neg() or is_huge(t) or max(t.shape, default=0) > 2**31 for t in tensors):
        raise Unsettled
    x, w1, w2, b1, b2 = (values[name] for name in _LEAVES)
    precision, min_tokens = values["precision"], values["min_tokens"]
    tensor(x, None, FLOATS)
    need(x.dim() >= 1)
    tensor(w1, 2, FLOATS_AND_FP8)
    tensor(w2, 2, FLOATS_AND_FP8)
    need(x.shape[-1] == w1.shape[1] and w2.shape[1] == w1.shape[0], "sizes")
    for bias, w in ((b1, w1), (b2, w2)):
        if bias is not None:
            tensor(bias, 1, FLOATS)
            need(bias.shape[0] == w.shape[0], "bias")
    word(precision, ("auto", "16bit", "fp8"))
    float8 = w1.dtype == FP8
    need(float8 == (w2.dtype == FP8) and not (float8 and precision == "16bit"), "float8 weights")
    for scale, w in ((values["w1_scale"], w1), (values["w2_scale"], w2)):
        need((scale is not None) == float8, "scale of a weight")
        _one_or(scale, w.shape[0])
    fp8 = float8 or precision == "fp8"
    need(not fp8 or all(size % 16 == 0 for size in (*w1.shape, w2.shape[0])), "multiples for fp8")
    tokens = math.prod(x.shape[:-1])
    scale_y, factor = values["scale_y"], values["scale_y_factor"]
    need(fp8 or scale_y is None and factor is None, "scale_y in 16 bits")
    need(scale_y is None or factor is None, "scale_y and its factor")
    _one_or(scale_y, tokens)
    _one_or(factor, 1)
    if not (min_tokens is None or isinstance(min_tokens, int) and not isinstance(min_tokens, bool)):
        raise Unsettled
    need(min_tokens is None or min_tokens >= 0, "min_tokens")
    finite = all(bool(t.float().isfinite().all()) and not bool((t.float().abs() > 1e3).any()) for t in tensors)
    if not finite or not is_ordinary(values["w1_scale"], values["w2_scale"], scale_y, factor):
        return None
    return lambda results: _check(call, values, fp8, results, device)


def _one_or(scale: Any, elements: int) -> None:
    if scale is not None:
        tensor(scale, None, [torch.float32])
        need(math.prod(scale.shape) in (1, elements), "elements of a scale")


def _check(call: Network, values: dict[str, Any], fp8: bool, results, device: str) -> None:
    x = values["x"]
    assert results[0].shape == (*x.shape[:-1], values["w2"].shape[0]) and results[0].dtype == x.dtype
    tokens, (out, hidden) = math.prod(x.shape[:-1]), values["w2"].shape
    min_tokens, sparse = values["min_tokens"], values["sparse"]
    if device == "cuda" and x.dtype == torch.float32:  # converted, which runs as it did before
        fp8 = sparse = False
    elif min_tokens is None and device == "cuda":
        return  # whichever is faster
    if call.by_neuron and not call.learns and tokens <= MOST:  # exactly, or dense
        sparse = False
    sparse = sparse and tokens >= (min_tokens or 0) and hidden % (32 if fp8 else 16) == 0
    learning = [n for n in _LEAVES if isinstance(values[n], Tensor) and values[n].dtype != FP8]
    # Masters are cast before they are multiplied: what is left of them decides which of a group are the largest.
    wide = {n: (values[n].to(x.dtype) if n in ("w1", "w2") else values[n]).detach().double() for n in learning}
    wide["x"] = wide["x"].reshape(tokens, x.shape[-1])
    for name in ("w1", "w2"):
        if name not in wide:
            wide[name] = (values[name].double() * values[f"{name}_scale"].double().reshape(-1, 1)).detach()
    for t in wide.values():
        t.requires_grad_(call.learns)
    tolerance = _TOLERANCE_FP8 if fp8 else _TOLERANCE[x.dtype]
    reference = Reference(wide, sparse, x.dtype, fp8, tolerance)
    saturates = values["scale_y"] is not None or values["scale_y_factor"] is not None  # given without regard to y
    if not saturates:
        reference.out.check(results[0].reshape(tokens, out), tolerance, "the output")
    if len(results) == 1:
        return
    grad = torch.linspace(-1, 1, results[0].numel(), dtype=torch.float64).reshape(tokens, out)
    recipe = values["recipe"] or Recipe()
    exact = not sparse or recipe.weight_gradients == "dense" or recipe.residual
    expected = reference.gradients(grad, learning)
    for name, got in zip(learning, results[1:], strict=True):
        assert got.shape == values[name].shape and got.dtype == values[name].dtype, f"gradient of {name}"
        compared = not saturates and recipe.reuse_mask and (exact or name in ("x", "b1", "b2"))
        allowed = 2 * tolerance if compared else None
        expected[name].check(got.reshape(expected[name].exact.shape), allowed, f"the gradient of {name}")
