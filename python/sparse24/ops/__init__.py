"""The ops: typed wrappers of ``torch.ops.sparse24`` with their documentation, one module a family.

A module has the wrappers, the fake functions (shapes, strides and dtypes for tracing) and the backward formulas of its
ops, and registers them (`sparse24.ops.registration`, which says what a new op takes).

``compress`` sees X [R, C] as the sparse operand A [M, K] of a matrix product:

=======  ==========================  =========  ==================  =====================================
dim      groups of four              A          product of `mm`     values
=======  ==========================  =========  ==================  =====================================
-1       ``X[r, 4g .. 4g+3]``        X          ``X @ b``           [R, C/2]
-2       ``X[4g .. 4g+3, c]``        X.T        ``X.T @ b``         16-bit and float32: [up(R, 4)/2, C];
                                                                    fp8: [C, up(R, 32)/2]
=======  ==========================  =========  ==================  =====================================

Rows R are arbitrary: for dim=-2 they are padded with zeros. Columns C must be a multiple of 16 (32 for fp8 values) for
dim=-1 and of 8 for dim=-2. ``meta`` is a 1-dimensional uint8 tensor in the order that the hardware reads; it belongs to
M, K, dim and the width of the values.

Every op runs on CUDA (compute capability 9.0) and on the CPU. The bits are the same but for what is a product: those of
`mm` and the ops named ``linear_*`` differ by the order of summation, and what is made of their sums is the same given
the same sums. float32 is for the CPU only. Inputs that are not contiguous or not 16-byte aligned are copied. Wrong
arguments raise RuntimeError: ``sparse24.<op>: expected <argument> <rule>, got <value>``, while tracing too. What is no
tensor at all gets that sentence from these functions; ``torch.ops`` has torch's own, but for None beside a tensor. An
allocation that fails raises torch.OutOfMemoryError, on both devices and however the op was called:
``sparse24.<op>: out of memory: <N> bytes asked for on <device>``. On the CPU the ops take as many threads as
``torch.get_num_threads()`` says.

A given scale that an op divides by counts as the smallest normal float32 number where its magnitude is below that: 0,
which ``amax / 448`` of zeros is, and subnormal numbers. Its inverse is then finite, as that of computed scales. Every
other scale counts as it is: a negative one turns the signs of what is stored, and what is stored with NaN or an
infinity decodes to NaN. The scale that an op returns is the one that was used.

Metadata from elsewhere than from the ops may hold anything. No op then leaves its memory, and all that decode it agree:
of a group's two values the first lies at i0 and the second at i1 (the bits of a nibble are ``i0 | i1 << 2``), and if
both lie at the same place the first counts. `mm` is for metadata that the ops made: of a nibble without i0 < i1 the
tensor cores make undefined numbers.

Source: Haziza et al. 2025, "Accelerating Transformer Inference and Training with 2:4 Activation Sparsity",
arXiv 2503.16672.
"""

# ruff: noqa: F403

from sparse24.ops import functions
from sparse24.ops.arguments import Activation, Dim, Scaling
from sparse24.ops.functions import *
from sparse24.ops.linear import OutputScaling

__all__ = ["Activation", "Dim", "OutputScaling", "Scaling"]
__all__ += functions.__all__
