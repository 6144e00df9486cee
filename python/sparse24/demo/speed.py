"""Times of one FFN forward at sizes of real models, dense and 2:4, on the current GPU."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sparse24.demo.verify import Check, verify_ffn
from sparse24.mlp import relu2_mlp, up_projection
from sparse24.ops import quantize_fp8

_FP8 = torch.float8_e4m3fn
_ROUNDS = 15


@dataclass(frozen=True)
class Shape:
    """Tokens and sizes of one FFN."""

    name: str
    tokens: int
    dim: int
    hidden: int


SHAPES = (
    Shape("few tokens", 512, 4096, 16384),
    Shape("nanochat d26", 32768, 1664, 6656),
    Shape("AFM-4.5B", 16384, 2560, 18432),
    Shape("Persimmon-8B", 8192, 4096, 16384),
    Shape("Nemotron-H-8B", 8192, 4096, 21504),
)

VARIANTS = (
    "bf16 eager",
    "bf16 compiled",
    "bf16 2:4",
    "fp8 compiled",
    "fp8 2:4",
)


@dataclass(frozen=True)
class Timing:
    """Medians in ms by variant; None where a variant did not run."""

    shape: Shape
    zeros: float
    ms: dict[str, float | None]
    checks: list[Check]
    notes: list[str]

    def as_dict(self) -> dict:
        """For JSON."""
        return {**asdict(self.shape), "zeros": self.zeros, "median_ms": self.ms, "notes": self.notes}


@torch.no_grad()
def measure(shape: Shape, seed: int) -> Timing:
    """Verify 2:4 at this size, then time all variants on the same data."""
    x, w1, w2 = _operands(shape, seed)
    zeros = float((up_projection(x[:256], w1) <= 0).float().mean())
    checks = list(verify_ffn(x, w1, w2, rows=slice(0, 256)))
    variants, notes = _variants(x, w1, w2)
    checks += _dense_checks(variants)
    times = _interleaved_medians(variants) if all(check.passed for check in checks) else {}
    return Timing(shape, zeros, {name: times.get(name) for name in VARIANTS}, checks, notes)


def _operands(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 operands whose pre-activation is negative for 90 % of the entries: N(-1.28, 1).

    64 inputs are one and their weights carry the mean, so that no bias is needed.
    """
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * std

    x = normal(shape.tokens, shape.dim, std=1.0)
    w1 = normal(shape.hidden, shape.dim, std=shape.dim**-0.5)
    x[:, :64] = 1.0
    w1[:, :64] = -1.2816 / 64
    return x, w1, normal(shape.dim, shape.hidden, std=shape.hidden**-0.5)


def _variants(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """Make what is compared. fp8 weights are quantised beforehand, activations inside."""
    q1, s1 = quantize_fp8(w1)
    q2, s2 = quantize_fp8(w2)
    variants: dict[str, Callable[[], Tensor]] = {
        "bf16 eager": lambda: _dense(x, w1, w2),
        "bf16 2:4": lambda: relu2_mlp(x, w1, w2, precision="16bit", min_tokens=0),
        "fp8 2:4": lambda: relu2_mlp(x, q1, q2, w1_scale=s1, w2_scale=s2, min_tokens=0),
    }
    notes = []
    compiled = torch.compile(_dense, dynamic=False)
    compiled_fp8 = torch.compile(_dense_fp8, dynamic=False)
    optional: dict[str, Callable[[], Tensor]] = {
        "bf16 compiled": lambda: compiled(x, w1, w2),
        "fp8 compiled": lambda: compiled_fp8(x, q1, s1.t(), q2, s2.t()),
    }
    for name, run in optional.items():
        try:
            run()
        except Exception as error:  # a machine without Triton or a C compiler: the other columns still stand
            notes.append(f"{name} did not run: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            variants[name] = run
    return variants, notes


def _dense(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return torch.relu(x @ w1.t()).square() @ w2.t()


def _dense_fp8(x: Tensor, q1: Tensor, s1: Tensor, q2: Tensor, s2: Tensor) -> Tensor:
    """Dense fp8 with one scale per row, in plain torch: torch.compile fuses relu2, maximum and conversion."""
    y2 = torch.relu(_scaled_mm(x, q1, s1)).float().square()
    return _scaled_mm(y2, q2, s2)


def _scaled_mm(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    scale = (x.abs().amax(dim=1, keepdim=True).float() / 448.0).clamp(min=1e-12)
    quantized = (x.float() * (1.0 / scale)).clamp(-448.0, 448.0).to(_FP8)
    return torch._scaled_mm(
        quantized, w.t(), scale_a=scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _dense_checks(variants: dict[str, Callable[[], Tensor]]) -> Iterator[Check]:
    """Check that the baselines are close to eager bf16, as far as their precision goes.

    fp8 has errors of 3 % per operand, which the small positive tail of the pre-activation and the square amplify.
    """
    expected = variants["bf16 eager"]().float()
    for name, tolerance in (("bf16 compiled", 0.01), ("fp8 compiled", 0.25)):
        if name in variants:
            error = float((variants[name]().float() - expected).norm() / expected.norm())
            yield Check(f"{name}, relative to eager", error, tolerance)


def _interleaved_medians(variants: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median ms by CUDA events. Variants take turns, so that a change of clocks meets all of them."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in variants}
    for round_ in range(_ROUNDS + 3):
        for name, run in variants.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # The GPU is kept busy while the host enqueues: launch gaps are not part of the figure.
            torch.cuda._sleep(1_000_000)
            start.record()
            run()
            end.record()
            if round_ >= 3:  # after warming up
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: float(torch.tensor([start.elapsed_time(end) for start, end in pairs]).median())
        for name, pairs in events.items()
    }
