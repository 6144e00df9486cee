"""What each op must refuse and what it must return otherwise, in plain torch on the CPU.

A rule is a function of an op's arguments: it raises `Refused` where the op has to refuse, `Unsettled` where it may do
either, and otherwise returns a function that checks results, or None where nothing is promised of them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
from compare import assert_same_bits
from oracle import FP8, Pattern, meta_bytes
from torch import Tensor
from training_reference import sampled_tokens, token_order

from fuzzing.calls import ACTIVATIONS, Call, alignment, values_shape
from fuzzing.tensors import copy_to

Check = Callable[[Sequence[Tensor]], None]

LARGEST = 2**31 - 1
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOATS_AND_FP8 = (*FLOATS, FP8)


class Refused(Exception):
    """The op has to say no."""


class Unsettled(Exception):
    """The op may say no, or go on: it may not crash."""


def need(condition: bool, rule: str = "") -> None:
    if not condition:
        raise Refused(rule)


def tensor(t: Any, rank: int | None = None, dtypes: Sequence[torch.dtype] | None = None) -> None:
    need(isinstance(t, Tensor), "a tensor")
    need(dtypes is None or t.dtype in dtypes, "dtype")
    need(rank is None or t.dim() == rank, "rank")
    need(rank is None or all(size <= LARGEST for size in t.shape), "sizes")


def integer(value: Any) -> int:
    if isinstance(value, bool):
        raise Unsettled
    need(isinstance(value, int) and -(2**63) <= value < 2**63, "int")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unsettled  # torch takes the truth of many things
    return value


def word(value: Any, allowed: Sequence[str]) -> str:
    need(isinstance(value, str) and value in allowed, "word")
    return value


def dim_of(value: Any) -> int:
    need(integer(value) in (-1, -2), "dim")
    return value


def one_of_scale(scale: Any, elements: int, one_allowed: bool) -> None:
    """An optional float32 scale."""
    if scale is not None:
        tensor(scale, None, [torch.float32])
        count = math.prod(scale.shape)
        need(count == elements or one_allowed and count == 1, "elements of a scale")


def metadata(meta: Any, rows: int, cols: int, dtype: torch.dtype, dim: int) -> None:
    tensor(meta, 1, [torch.uint8])
    need(math.prod(meta.shape) == meta_bytes(rows, cols, dtype, dim), "bytes of metadata")


def out_dtype_of(value: Any, allowed: Sequence[torch.dtype]) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        raise Unsettled  # torch's own numbers of dtypes
    need(value is None or value in allowed, "out_dtype")


def is_huge(t: Tensor | None) -> bool:
    """Expanded, and more than anyone wants to look at."""
    return t is not None and math.prod(t.shape) > 2**22


def is_legal_meta(meta: Tensor) -> bool:
    if is_huge(meta):
        return False
    nibbles = torch.cat([meta & 15, meta >> 4])
    return bool(((nibbles & 3) < (nibbles >> 2)).all())


def is_ordinary(*scales: Tensor | None) -> bool:
    """Positive, finite, and with a finite inverse."""
    tiny, largest = torch.finfo(torch.float32).tiny, 1e30
    return all(s is None or not is_huge(s) and bool(((s >= tiny) & (s <= largest)).all()) for s in scales)


def same_bits(expected: Callable[[], Sequence[Tensor]]) -> Check:
    def check(actual: Sequence[Tensor]) -> None:
        wanted = expected()
        assert len(actual) == len(wanted), f"{len(actual)} results instead of {len(wanted)}"
        for i, (a, w) in enumerate(zip(actual, wanted, strict=True)):
            assert_same_bits(a, w, f"result {i}")

    return check


def threshold_of(value: Any, activation: str = "relu2") -> float:
    if not isinstance(value, float):
        raise Unsettled  # torch takes other numbers too
    need(0 <= value < math.inf and (activation != "none" or value == 0), "threshold")
    return value


def compress(x, activation, dim, threshold) -> Check:
    word(activation, ACTIVATIONS)
    threshold_of(threshold, activation)
    dim_of(dim)
    tensor(x, 2, FLOATS)
    need(x.shape[1] % alignment(x.dtype, dim) == 0, "columns")
    return same_bits(lambda: oracle.compress(oracle.above(x, threshold, activation), activation, dim))


def compress_fp8(x, scale, activation, dim, scaling, threshold) -> Check | None:
    word(activation, ACTIVATIONS)
    threshold_of(threshold, activation)
    word(scaling, ("row", "tensor"))
    dim_of(dim)
    tensor(x, 2, FLOATS)
    need(x.shape[1] % alignment(FP8, dim) == 0, "columns")
    one_of_scale(scale, 1 if scaling == "tensor" else x.shape[0] if dim == -1 else x.shape[1], False)
    if is_huge(scale):
        return None
    return same_bits(
        lambda: oracle.compress_fp8(oracle.above(x, threshold, activation), scale, activation, dim, scaling)
    )


def compress_like(x, meta, dim) -> Check | None:
    dim_of(dim)
    tensor(x, 2, FLOATS_AND_FP8)
    need(x.shape[1] % alignment(x.dtype, dim) == 0, "columns")
    metadata(meta, *x.shape, x.dtype, dim)
    if is_huge(meta):
        return None
    return same_bits(lambda: [Pattern.of_meta(meta, *x.shape, x.dtype, dim).gather(x)])


def decompress(values, meta, rows, cols, dim) -> Check | None:
    dim_of(dim)
    tensor(values, 2, FLOATS_AND_FP8)
    need(0 <= integer(rows) <= LARGEST and 0 <= integer(cols) <= LARGEST, "rows and cols")
    need(cols % alignment(values.dtype, dim) == 0, "cols")
    need(tuple(values.shape) == values_shape(rows, cols, values.dtype, dim), "shape of values")
    metadata(meta, rows, cols, values.dtype, dim)
    if is_huge(meta):
        return None
    return same_bits(lambda: [Pattern.of_meta(meta, rows, cols, values.dtype, dim).scatter(values)])


def densest_features(counts, k) -> Check:
    tensor(counts, 1, [torch.int32])
    need(0 <= integer(k) <= counts.shape[0], "k")
    return same_bits(lambda: [counts.sort(descending=True, stable=True).indices[:k].sort().values])


def kept(values, meta, fp8_meta) -> Callable[[], Tensor] | None:
    """Of values and metadata along features: the dense matrix, or None for more metadata than anyone reads."""
    tensor(values, 2, FLOATS_AND_FP8)
    layout = FP8 if flag(fp8_meta) else values.dtype
    rows, cols = values.shape[0], 2 * values.shape[1]
    need(cols % alignment(layout, -1) == 0, "columns")
    metadata(meta, rows, cols, layout, -1)
    return None if is_huge(meta) else lambda: Pattern.of_meta(meta, rows, cols, layout, -1).scatter(values)


def feature_counts(values, meta, samples, fp8_meta) -> Check | None:
    dense = kept(values, meta, fp8_meta)
    need(integer(samples) >= 1, "samples")
    if dense is None or values.shape[0] > 2**22:
        return None
    tokens = sampled_tokens(values.shape[0], min(samples, max(values.shape[0], 1)))
    return same_bits(lambda: [(dense().float()[tokens] != 0).sum(0, dtype=torch.int32)])


def columns_or_nan(dense: Tensor, features: Tensor, bad: Tensor) -> Tensor:
    """``dense[:, features]``, NaN where `bad`."""
    codes = oracle.bits(dense)
    nan = oracle.bits(torch.tensor([torch.nan]).to(dense.dtype)) if dense.dtype == FP8 else None
    code = int(nan) if nan is not None else oracle._NAN_CODE[dense.dtype]
    if dense.shape[1] == 0:
        chosen = codes.new_zeros(dense.shape[0], len(features))
    else:
        chosen = codes[:, features.clamp(0, dense.shape[1] - 1)]
    return oracle.from_bits(torch.where(bad, code, chosen.to(torch.int64)), dense.dtype)


def gather_features(values, meta, features, fp8_meta) -> Check | None:
    dense = kept(values, meta, fp8_meta)
    tensor(features, 1, [torch.int64])
    if dense is None:
        return None
    bad = (features < 0) | (features >= 2 * values.shape[1])
    return same_bits(lambda: [columns_or_nan(dense(), features, bad)])


def put_features(out, parts, features, dim) -> Check | None:
    dim_of(dim)
    tensor(out, 2, FLOATS)
    tensor(parts, 3, [out.dtype])
    tensor(features, 1, [torch.int64])
    need(out.is_contiguous(), "contiguous")
    count = features.shape[0]
    rows, columns = (out.shape[0], count) if dim == -1 else (count, out.shape[1])
    need(tuple(parts.shape[1:]) == (rows, columns), "shape of parts")
    if is_huge(features) or len(set(features.tolist())) != count:
        return None
    limit = out.shape[dim]

    def expected() -> list[Tensor]:
        total = torch.zeros(rows, columns)
        for part in parts:
            total = total + part.float()
        nan = torch.where(total.isnan(), oracle._NAN_CODE[out.dtype], oracle.bits(total.to(out.dtype)).to(torch.int64))
        inside = ((features >= 0) & (features < limit)).nonzero().flatten()
        rounded = oracle.from_bits(nan, out.dtype).index_select(dim, inside)
        return [out.detach().clone().index_copy_(dim, features[inside], rounded)]

    return same_bits(expected)


def quantize_fp8(x, scale, scaling) -> Check | None:
    word(scaling, ("row", "tensor"))
    tensor(x, 2, FLOATS)
    need(x.shape[1] % 16 == 0, "columns")
    one_of_scale(scale, 1 if scaling == "tensor" else x.shape[0], False)
    return None if is_huge(scale) else same_bits(lambda: oracle.quantize_fp8(x, scale, scaling))


def transpose_fp8(values) -> Check | None:
    tensor(values, 2, (FP8,))
    need(values.shape[1] % 16 == 0, "columns")

    def expected() -> list[Tensor]:
        transposed = torch.zeros(values.shape[1], oracle.round_up(values.shape[0], 32), dtype=torch.uint8)
        transposed[:, : values.shape[0]] = oracle.bits(values).t()
        return [transposed.view(oracle.FP8)]

    return same_bits(expected)


def quantize_fp8_both(x, scale, interleaved) -> Check | None:
    tensor(x)
    several = x.dim() == 3
    tensor(x, 3 if several else 2, FLOATS)
    need(x.shape[-1] % 16 == 0, "columns")
    need(not several or x.shape[0] <= 65535, "matrices")
    one_of_scale(scale, x.shape[0] if several else 1, False)
    flag(interleaved)

    def expected_of(x: Tensor, scale: Tensor | None) -> list[Tensor]:
        order = token_order(x.shape[0], interleaved)
        q, used = oracle.quantize_fp8(x, scale, "tensor")
        transposed = oracle.bits(q)[order].t().contiguous().view(oracle.FP8)
        largest = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).max() if x.numel() else torch.zeros(())
        return [q, transposed, used, largest.reshape(1)]

    def check_one(x: Tensor, scale: Tensor | None, results: Sequence[Tensor]) -> None:
        values, transposed, *others = results
        assert tuple(transposed.shape) == (x.shape[1], oracle.round_up(x.shape[0], 32))
        same_bits(lambda: expected_of(x, scale))([values, transposed[:, : x.shape[0]], *others])
        padding = transposed[:, x.shape[0] :].float()  # zeros, which a negative scale makes negative ones
        assert not padding.isnan().any() and not padding.any(), "padding"
        negative = scale is not None and bool((scale < 0).any())
        assert negative or not padding.signbit().any(), "padding"

    def check(results: Sequence[Tensor]) -> None:
        if not several:
            return check_one(x, scale, results)
        assert all(t.shape[0] == x.shape[0] for t in results)
        for i in range(x.shape[0]):
            of_matrix = None if scale is None else scale.reshape(-1)[i : i + 1]
            check_one(x[i], of_matrix, [*(t[i] for t in results[:2]), *(t[i : i + 1] for t in results[2:])])

    return None if is_huge(scale) else check


def quantize_fp8_predict(x, factor) -> Check | None:
    tensor(x, 2, FLOATS)
    need(x.shape[1] % 16 == 0, "columns")
    tensor(factor)
    one_of_scale(factor, 1, False)

    def expected() -> list[Tensor]:
        q, scale = oracle.quantize_fp8(x, None, "row")
        # Multiples of 2^-18 below 2^53: float64 adds them exactly. NaN counts as 480.
        squares = q.double().nan_to_num(nan=480.0).square().sum(1, keepdim=True)
        predicted = squares.float() * scale * scale * factor.reshape(())
        smallest = torch.finfo(torch.float32).tiny
        predicted = torch.where(predicted < smallest, smallest, predicted)
        predicted = torch.where(predicted.isnan(), torch.nan, predicted)  # one code
        return [q, scale, torch.where(squares == 0, 1.0, predicted)]

    return same_bits(expected)


def rule_of(call: Call, values: dict[str, Any], device: str) -> Check | None:
    """Apply the rule of an op, on a device."""
    from fuzzing import experts, experts_gradients, few_tokens, gradients_fp8, networks, products, pruning, steps, whole

    tensors = [v for v in values.values() if isinstance(v, Tensor)]
    if any(t.layout != torch.strided for t in tensors):
        raise Refused("a strided tensor") if call.is_op else Unsettled
    places = {device if described_on is None else described_on for described_on in _places(call)}
    if "meta" in places:
        raise Unsettled
    if isinstance(call, networks.Network):
        check = networks.rule(call, values, device)
    else:
        on_device, elsewhere = (
            (whole, steps),
            (products, experts, experts_gradients, few_tokens, gradients_fp8, pruning),
        )
        module = next((module for module in (*on_device, *elsewhere) if hasattr(module, call.op)), None)
        function = getattr(module, call.op, None) or globals()[call.op]
        if module in on_device:
            function = functools.partial(function, device)
        if call.op == "put_features" and any(t.requires_grad or t.is_neg() or t._is_zerotensor() for t in tensors):
            raise Unsettled  # what may be written to is a matter of autograd too
        check = function(**{name: _plain(v, device) for name, v in values.items()})
    need(len(places) <= 1, "one device")
    first = next(iter(tensors))
    need(places != {"cuda"} or first.dtype != torch.float32 or call.takes_float32_on_cuda, "no float32 on CUDA")
    if places == {"cuda"} and call.op in experts.GENERATORS:
        experts.on_cuda(first, values)
    if places == {"cuda"} and call.is_op and hasattr(few_tokens, call.op):
        need(math.prod(first.shape[:-1]) <= few_tokens.MOST, "few tokens on CUDA")
    if places == {"cuda"} and call.op == "linear_compress_packed" and values["out_dtype"] not in (None, first.dtype):
        raise Unsettled  # no kernel has pairs of types, and where nothing is computed none is asked for
    return check


def _plain(value: Any, device: str) -> Any:
    """A tensor on the CPU that holds its own numbers, as an op on a device has them.

    Who negates is torch, before an op of this library: the sign of NaN turns on the CPU, while CUDA has one code for
    every NaN that it negates.
    """
    if not isinstance(value, Tensor):
        return value
    if value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype)
    return copy_to(value, device).resolve_neg().cpu() if value.is_neg() else value


def _places(call: Call) -> list[str | None]:
    return [value.device for value in call.args.values() if hasattr(value, "make")]
