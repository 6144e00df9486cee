"""What outputs of an FFN forward must be, in float64 on a sample of their rows.

Rows are tokens, which do not depend on each other: some rows of every tile tell as much as all of them, and float64
products of all would take longer than everything that is timed. That all rows are written is checked on all.
"""

from __future__ import annotations

import torch

import sparse24
from sparse24.bench import reference

# Rows that are compared: at 65,536 tokens four of every 128, the rows of a tile.
ROWS = 2048
# Relative errors of a correct variant: bf16 rounds the activation and the result, fp8 the activation to 3 bits.
BOUNDS = {"bf16": 1e-2, "fp8": 1e-1}


def sampled_rows(tokens: int, *, device: torch.device, seed: int, count: int = ROWS) -> torch.Tensor:
    """One random row of each of `count` stretches of equal length; all rows if there are no more than that."""
    if tokens <= count:
        return torch.arange(tokens, device=device)
    edges = torch.arange(count + 1, dtype=torch.int64) * tokens // count
    places = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (edges[:-1] + (places * edges.diff()).long()).to(device)


def expect_rows(output: torch.Tensor, rows: torch.Tensor, expected: torch.Tensor, limit: float) -> float:
    """The relative error of these rows of a bf16 or float8 `output`, all of which is finite (NaN was not written)."""
    # float8 has no isfinite; bfloat16 holds all of its values.
    output = output.to(torch.bfloat16)
    unwritten = int((~torch.isfinite(output)).any(dim=1).sum())
    if unwritten:
        raise reference.Unverified(f"expected finite values, got others in {unwritten} of {output.shape[0]} rows")
    return reference.expect_error(output[rows], expected, limit)


class Expected:
    """The float64 results of one precision: what the dense second GEMM gives, and the sparse one.

    Parameters
    ----------
    dtype : {"bf16", "fp8"}
    pre_activation : torch.Tensor
        [tokens, d_ff], the first GEMM's 16-bit output.
    w2 : torch.Tensor
        [d_model, d_ff], the second weight as this precision stores it, dequantised.
    b2 : torch.Tensor or None
        The second bias.
    rows : torch.Tensor
        Which tokens are compared.
    """

    def __init__(
        self, dtype: str, pre_activation: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor | None, rows: torch.Tensor
    ) -> None:
        y = reference.relu2(pre_activation[rows])
        bias = 0 if b2 is None else b2.double()
        self.rows = rows
        self.limit = BOUNDS[dtype]
        self.rival: float | None = None
        self.dense = reference.product(y, w2.t()) + bias
        self.sparse = reference.product(reference.prune24(y, -1), w2.t()) + bias
        self.pruning_error = reference.relative_error(self.sparse, self.dense)

    def check_dense(self, output: torch.Tensor) -> dict[str, float]:
        error = expect_rows(output, self.rows, self.dense, self.limit)
        self.rival = error if self.rival is None else self.rival
        return {"rel_error": error}

    def check_sparse(self, output: torch.Tensor, rival: Expected | None = None) -> dict[str, float]:
        """At most twice the error of the first dense variant: of this precision, or where another has ours' scales."""
        error = (rival or self).rival
        return self._pruned(output, self.limit if error is None else 2 * error + reference.ABSOLUTE_SLACK)

    def check_sparse_rival(self, output: torch.Tensor) -> dict[str, float]:
        return self._pruned(output, self.limit)

    def _pruned(self, output: torch.Tensor, limit: float) -> dict[str, float]:
        error = expect_rows(output, self.rows, self.sparse, limit)
        return {"rel_error": error, "pruning_error": self.pruning_error}


def check_kept(
    values: torch.Tensor, meta: torch.Tensor, shape: torch.Size, rows: torch.Tensor, y: torch.Tensor, limit: float
) -> dict[str, float]:
    """Kept values of an activation of `shape` against float64 y, its `rows`, at their own places.

    Those places must hold the energy of the two largest. `y` is in the units of the values.
    """
    ones = torch.ones(values.shape, device=values.device).to(values.dtype)
    places = sparse24.decompress(ones, meta, *shape).bfloat16()[rows].double()
    best = reference.prune24(y, -1).square().sum()
    share = ((y * places).square().sum() / best).item()
    if not share > 1 - 1e-3:
        raise reference.Unverified(f"expected the kept entries to hold the energy of the two largest, got {share:.6f}")
    return {"rel_error": expect_rows(sparse24.decompress(values, meta, *shape), rows, y * places, limit)}
