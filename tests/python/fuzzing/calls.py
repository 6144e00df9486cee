"""One call of an op, and a generator of legal calls for each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from oracle import FP8, meta_bytes, round_up, token_padding

import sparse24
from fuzzing.dice import Dice
from fuzzing.tensors import Draw

ACTIVATIONS = ("none", "relu", "relu2")
#: Of which a first layer may store the roots of the squares, and a gradient take them.
ROOT_DTYPES = (torch.float16, torch.float32)


def schema_of(op: str):
    return getattr(torch.ops.sparse24, op).default._schema


@dataclass
class Call:
    """`args` by name, all of them; tensors as descriptions. `mutations` say what is not as the generator made it."""

    op: str
    args: dict[str, Any]
    wrapped: bool = False  # called as sparse24.<op>, not as torch.ops.sparse24.<op>
    trimmed: bool = False  # defaults are left out
    mutations: tuple[str, ...] = ()
    is_op = True

    @property
    def takes_float32_on_cuda(self) -> bool:
        from fuzzing import pruning

        if self.op == "prune_pack24":
            return pruning.packs_float32_on_cuda(self.args["dtype"])
        return self.op == "densest_features"  # which takes no floats at all

    @property
    def arguments(self) -> list[tuple[str, str]]:
        """Names and types."""
        return [(a.name, str(a.real_type)) for a in schema_of(self.op).arguments]

    def split(self, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments."""
        positional, keywords = [], {}
        for argument in schema_of(self.op).arguments:
            if argument.kwarg_only:
                keywords[argument.name] = values[argument.name]
            else:
                positional.append(values[argument.name])
        for argument in reversed(schema_of(self.op).arguments if self.trimmed else []):
            given = values[argument.name]
            is_default = argument.has_default_value() and _same(given, argument.default_value)
            if argument.kwarg_only and is_default:
                del keywords[argument.name]
            elif not argument.kwarg_only and not is_default:
                break
            elif not argument.kwarg_only:
                positional.pop()
        return positional, keywords

    def run(self, values: dict[str, Any]) -> tuple[Any, ...]:
        positional, keywords = self.split(values)
        function = getattr(sparse24.ops, self.op) if self.wrapped else getattr(torch.ops.sparse24, self.op).default
        out = function(*positional, **keywords)
        return out if isinstance(out, tuple) else () if out is None else (out,)

    def code(self, device: str) -> str:
        """The call as a program, for a PYTHONPATH of python:tests/python."""
        to = "" if device == "cpu" else f', "{device}"'
        lines = ["import torch", "import sparse24", "from fuzzing.tensors import Draw, copy_to", ""]
        names: dict[str, Any] = {}
        for name, value in self.args.items():
            if isinstance(value, Draw):
                made = f"{value!r}.make()"
                lines.append(f"{name} = copy_to({made}{to})" if to and value.device is None else f"{name} = {made}")
                names[name] = _Name(name)
            else:
                names[name] = value
        positional, keywords = self.split(names)
        arguments = [repr(v) for v in positional] + [f"{k}={v!r}" for k, v in keywords.items()]
        function = f"sparse24.{self.op}" if self.wrapped else f"torch.ops.sparse24.{self.op}"
        return "\n".join([*lines, f"print({function}({', '.join(arguments)}))"])


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, (int, str, type(None), torch.dtype)) and a == b


class _Name(str):
    __repr__ = str.__str__


def values_shape(rows: int, cols: int, dtype: torch.dtype, dim: int) -> tuple[int, int]:
    """Of what is stored of X [rows, cols]."""
    if dim == -1:
        return rows, cols // 2
    padded = round_up(rows, token_padding(dtype)) // 2
    return (cols, padded) if dtype == FP8 else (padded, cols)


def alignment(dtype: torch.dtype, dim: int) -> int:
    return 8 if dim == -2 else 32 if dtype == FP8 else 16


def _kept(d: Dice, values_contents: str | None = None) -> dict[str, Any]:
    """Values and metadata of dim=-1, the latter perhaps in the layout of float8."""
    dtype, fp8_meta = d.dtype(fp8=True), d.chance(0.3)
    layout = FP8 if fp8_meta else dtype
    rows, cols = d.rows(), d.columns(alignment(layout, -1))
    values = d.draw((rows, cols // 2), dtype, values_contents)
    return {"values": values, "meta": d.meta(meta_bytes(rows, cols, layout, -1)), "fp8_meta": fp8_meta}


def _threshold(d: Dice) -> float:
    return d.choice((0.0, 0.0, 1.0, 0.3, 2.5))


def _activation(d: Dice) -> dict[str, Any]:
    activation = d.choice(ACTIVATIONS)
    return {"activation": activation, "threshold": 0.0 if activation == "none" else _threshold(d)}


def _compress(d: Dice) -> dict[str, Any]:
    dtype, dim = d.dtype(), d.dim()
    x = d.draw((d.rows(), d.columns(alignment(dtype, dim))), dtype)
    return {"x": x, **_activation(d), "dim": dim}


def _compress_fp8(d: Dice) -> dict[str, Any]:
    dim, scaling = d.dim(), d.choice(("row", "tensor"))
    rows, cols = d.rows(), d.columns(alignment(FP8, dim))
    elements = 1 if scaling == "tensor" else rows if dim == -1 else cols
    return {
        "x": d.draw((rows, cols), d.dtype()),
        "scale": d.scale(elements, d.choice(("powers", "small"))) if d.chance(0.5) else None,
        **_activation(d),
        "dim": dim,
        "scaling": scaling,
    }


def _compress_like(d: Dice) -> dict[str, Any]:
    dtype, dim = d.dtype(fp8=True), d.dim()
    rows, cols = d.rows(), d.columns(alignment(dtype, dim))
    return {"x": d.draw((rows, cols), dtype), "meta": d.meta(meta_bytes(rows, cols, dtype, dim)), "dim": dim}


def _decompress(d: Dice) -> dict[str, Any]:
    dtype, dim = d.dtype(fp8=True), d.dim()
    rows, cols = d.rows(), d.columns(alignment(dtype, dim))
    values, meta = d.draw(values_shape(rows, cols, dtype, dim), dtype), d.meta(meta_bytes(rows, cols, dtype, dim))
    return {"values": values, "meta": meta, "rows": rows, "cols": cols, "dim": dim}


def _densest_features(d: Dice) -> dict[str, Any]:
    features = d.choice((d.rows(), d.columns(16), 40 * d.rows()))
    counts = d.draw((features,), torch.int32, d.choice(("counts", "bits", "zeros")))
    return {"counts": counts, "k": d.choice((0, features, d.randint(0, features)))}


def _feature_counts(d: Dice) -> dict[str, Any]:
    return _kept(d) | {"samples": d.choice((1, 15, 16, 17, 100, 1024, 2**31, 2**63 - 1))}


def _gather_features(d: Dice) -> dict[str, Any]:
    kept = _kept(d)
    contents = d.choice(("ascending", "indices", "wild"))
    features = 2 * kept["values"].shape[1]
    count = min(d.rows(), 64, features if contents == "ascending" else 64)
    return kept | {"features": d.draw((count,), torch.int64, contents, limit=features)}


def _mm(d: Dice) -> dict[str, Any]:
    dtype, dim = d.dtype(fp8=True), d.dim()
    rows, cols, n = d.product((0, alignment(dtype, dim), 0))
    m, k = (rows, cols) if dim == -1 else (cols, rows)
    out_dtype = d.choice((None, torch.bfloat16, torch.float16, torch.float32))
    bias_dtype = d.choice((torch.float32, out_dtype or (torch.bfloat16 if dtype == FP8 else dtype)))
    layout = d.choice(("k_major", "permuted", "expanded")) if dtype == FP8 else d.layout()
    if layout == "expanded" and k > 1:
        layout = "expanded_last" if dtype != FP8 else "k_major"
    contents = d.contents()
    return {
        "values": d.draw(values_shape(rows, cols, dtype, dim), dtype, contents),
        "meta": d.meta(meta_bytes(rows, cols, dtype, dim)),
        "b": d.draw((k, n), dtype, "integers" if contents == "integers" else None, layout=layout),
        "scale_a": d.maybe_scale(m),
        "scale_b": d.maybe_scale(n),
        "bias": d.draw((n,), bias_dtype, d.choice(("integers", "normal"))) if d.chance(0.4) else None,
        "dim": dim,
        "out_dtype": out_dtype,
        "transpose_out": d.chance(0.5),
        "interleaved": dim == -2 and d.chance(0.4),
    }


def _put_features(d: Dice) -> dict[str, Any]:
    dtype, dim, parts = d.dtype(), d.dim(), d.choice((0, 1, 1, 2, 3, 8))
    rows, cols = d.rows(), d.rows()
    limit = cols if dim == -1 else rows
    count = d.randint(0, min(limit, 40))
    features = d.draw((count,), torch.int64, "permuted", limit=limit)
    shape = (parts, rows, count) if dim == -1 else (parts, count, cols)
    contents = d.choice(("integers", "normal", "activations", "specials"))
    layout = d.choice(("contiguous", "offset"))
    return {
        "out": d.draw((rows, cols), dtype, layout=layout),
        "parts": d.draw(shape, dtype, contents),
        "features": features,
        "dim": dim,
    }


def _quantize_fp8(d: Dice) -> dict[str, Any]:
    rows, cols, scaling = d.rows(), d.columns(16), d.choice(("row", "tensor"))
    contents = d.choice(("powers", "small"))
    scale = d.scale(rows if scaling == "row" else 1, contents) if d.chance(0.5) else None
    return {"x": d.draw((rows, cols), d.dtype()), "scale": scale, "scaling": scaling}


def _quantize_fp8_predict(d: Dice) -> dict[str, Any]:
    x = d.draw((d.rows(), d.columns(16)), d.dtype())
    return {"x": x, "factor": d.scale(1, d.choice(("powers", "small")))}


def _quantize_fp8_both(d: Dice) -> dict[str, Any]:
    contents, several = d.choice(("powers", "small")), d.chance(0.3)
    count = [d.choice((0, 1, 2, 5))] if several else []
    scale = d.scale(count[0] if several else 1, contents) if d.chance(0.5) else None
    return {"x": d.draw((*count, d.rows(), d.columns(16)), d.dtype()), "scale": scale, "interleaved": d.chance(0.5)}


def _linear(d: Dice, multiples: tuple[int, int], packed: bool = False) -> dict[str, Any]:
    """x, w, scales, bias and the stored type; `multiples` of F for 16-bit and for float8 output. `packed`: w is 2:4."""
    dtype = d.dtype(fp8=True)
    hidden = torch.bfloat16 if dtype == FP8 else dtype
    out_dtype = d.choice((None, hidden, FP8))
    fp8 = (out_dtype or dtype) == FP8
    of_depth = alignment(dtype, -1) if packed else 16 if dtype == FP8 else 0
    tokens, depth, features = d.product((0, of_depth, multiples[fp8]))
    contents = d.contents()
    return {
        "x": d.draw((tokens, depth), dtype, contents),
        "w": d.draw((features, depth // 2 if packed else depth), dtype, "integers" if contents == "integers" else None),
        **({"meta": d.meta(meta_bytes(features, depth, dtype, -1))} if packed else {}),
        "scale_x": d.maybe_scale(tokens),
        "scale_w": d.maybe_scale(features),
        "bias": d.draw((features,), hidden, d.choice(("integers", "normal"))) if d.chance(0.5) else None,
        "scale_out": d.scale(d.choice((1, tokens)), d.choice(("powers", "small"))) if fp8 else None,
        "out_dtype": out_dtype,
        "statistics": d.chance(0.6),
        "activation": d.choice(("relu2", "relu2", "relu")),
        "threshold": _threshold(d),
    }


def _linear_relu2(d: Dice) -> dict[str, Any]:
    return _linear(d, (8, 16))


def _linear_compress(d: Dice, packed: bool = False) -> dict[str, Any]:
    args = _linear(d, (16, 32), packed) | {"scaling": "given"}
    if args["scale_out"] is not None and d.chance(0.4):
        args |= {"scale_out": None, "scaling": "row"}
    return args


def _linear_compress_packed(d: Dice) -> dict[str, Any]:
    return _linear_compress(d, packed=True)


def _linear_gradient(d: Dice) -> dict[str, Any]:
    dtype, fp8_meta, tokens_too = d.dtype(), d.chance(0.3), d.chance(0.8)
    layout = FP8 if fp8_meta else dtype
    tokens, depth, features = d.product((0, 0, alignment(layout, -1)))
    hot = None
    if tokens_too and d.chance(0.4):
        contents = d.choice(("ascending", "ascending", "indices", "wild"))
        hot = d.draw((d.randint(0, min(features, 20)),), torch.int64, contents, limit=features)
    contents = d.contents()
    return {
        "grad": d.draw((tokens, depth), dtype, contents),
        "w": d.draw((depth, features), dtype, "integers" if contents == "integers" else None),
        "values": d.draw((tokens, features // 2), dtype, d.choice(("squares", "squares", "zeros", "specials"))),
        "meta": d.meta(meta_bytes(tokens, features, layout, -1)),
        "interleaved": d.chance(0.5),
        "tokens": tokens_too,
        "fp8_meta": fp8_meta,
        "hot": hot,
        "roots": dtype in ROOT_DTYPES and d.chance(0.3),
    }


def _linear_relu2_gradient(d: Dice) -> dict[str, Any]:
    dtype = d.dtype()
    tokens, depth, features = d.product((0, 0, 8))
    contents = d.contents()
    return {
        "grad": d.draw((tokens, depth), dtype, contents),
        "w": d.draw((depth, features), dtype, "integers" if contents == "integers" else None),
        "y": d.draw((tokens, features), dtype, d.choice(("squares", "squares", "zeros", "specials"))),
        "roots": dtype in ROOT_DTYPES and d.chance(0.3),
    }


#: Of the ops that are made here, how their arguments are, and how often each is tried.
GENERATORS: dict[str, tuple[Callable[[Dice], dict[str, Any]], int]] = {
    "compress": (_compress, 3),
    "compress_fp8": (_compress_fp8, 3),
    "compress_like": (_compress_like, 2),
    "decompress": (_decompress, 2),
    "densest_features": (_densest_features, 1),
    "feature_counts": (_feature_counts, 2),
    "gather_features": (_gather_features, 2),
    "mm": (_mm, 5),
    "put_features": (_put_features, 2),
    "quantize_fp8": (_quantize_fp8, 2),
    "quantize_fp8_both": (_quantize_fp8_both, 2),
    "quantize_fp8_predict": (_quantize_fp8_predict, 1),
    "transpose_fp8": (lambda d: {"values": d.draw((d.rows(), d.columns(16)), FP8)}, 1),
    "linear_relu2": (_linear_relu2, 3),
    "linear_compress": (_linear_compress, 4),
    "linear_compress_packed": (_linear_compress_packed, 2),
    "linear_gradient": (_linear_gradient, 4),
    "linear_relu2_gradient": (_linear_relu2_gradient, 2),
}


def generators() -> dict[str, tuple[Callable[[Dice], dict[str, Any]], int]]:
    """Those of all ops."""
    from fuzzing import experts, few_tokens, gradients_fp8, pruning, steps, whole

    found = dict(GENERATORS)
    for module in (experts, few_tokens, gradients_fp8, pruning, steps, whole):
        found |= module.GENERATORS
    return found


def legal_call(d: Dice) -> Call:
    """A call that an op has to take."""
    of_ops = generators()
    op = d.choices(list(of_ops), [weight for _, weight in of_ops.values()])[0]
    return Call(op, of_ops[op][0](d), wrapped=d.chance(0.3), trimmed=d.chance(0.3))
