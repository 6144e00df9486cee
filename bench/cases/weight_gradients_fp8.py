"""Weight gradients as float8 products, which training does not use: as ops they do not pay, the product alone would.

Beside the bf16 product of a race of gemm_training.py: the float8 product alone ("sparse_fp8"), and with all that it
needs and bf16 does not ("sparse_fp8_composed"), from what the other products have: the kept values along features are
decompressed and compressed along tokens with a scale per feature, and the other operand is quantised K-major. Groups
are of neighbouring tokens.
"""

from __future__ import annotations

import torch

import sparse24
from sparse24.bench import reference
from sparse24.bench.harness import Case

#: Three bits of mantissa on either side.
BOUND = 8e-2


def cases(race: str, kept: torch.Tensor, meta: torch.Tensor, b: torch.Tensor, *, transpose: bool) -> list[Case]:
    """For ``A.T @ b`` [F, N], or its transpose: A [T, F] given by its kept values along features, b [T, N]."""
    shape = b.shape[0], 2 * kept.shape[1]

    def operands() -> tuple[torch.Tensor, ...]:
        values, own_meta, scale = sparse24.compress_fp8(sparse24.decompress(kept, meta, *shape), dim=-2)
        b_values, b_scale = sparse24.quantize_fp8(b.t().contiguous())
        return values, own_meta, b_values.t(), scale, b_scale.t()

    def product(*of: torch.Tensor) -> torch.Tensor:
        return sparse24.mm(*of, dim=-2, out_dtype=torch.bfloat16, transpose_out=transpose)

    prepared = operands()

    def check(output: torch.Tensor) -> dict[str, float]:
        own = sparse24.compress(sparse24.decompress(kept, meta, *shape), dim=-2)
        exact = reference.product(sparse24.decompress(*own, *shape, -2).t(), b)
        return {"rel_error": reference.expect_error(output, exact.t() if transpose else exact, BOUND)}

    return [
        Case("sparse_fp8", "fp8", lambda _: product(*prepared), check, "part", race),
        Case("sparse_fp8_composed", "fp8", lambda _: product(*operands()), check, "part", race),
    ]
