"""What variants are called in tables and drawings, and their colours: one meaning each, everywhere."""

from __future__ import annotations

from typing import NamedTuple

OURS = "#2f6fde"


class Variant(NamedTuple):
    """What a variant is called in a legend, and its colour."""

    name: str
    colour: str


#: Greys are dense in 16 bits, ochres in fp8, green is cuSPARSELt, blues are ours, violets ours in part.
VARIANTS = {
    "eager": Variant("torch, eager", "#d5dae0"),
    "torch_compile": Variant("torch.compile", "#9aa5b1"),
    "torch.matmul": Variant("torch.matmul (cuBLAS)", "#9aa5b1"),
    "module_dense": Variant("ReLU2MLP run dense, backward not fused", "#6f7b88"),
    "fused_dense": Variant("fused dense", "#4a5561"),
    "scaled_mm_row": Variant("torch._scaled_mm by row, compiled", "#f0c27b"),
    "scaled_mm_tensor": Variant("torch._scaled_mm by tensor, compiled", "#d98a1f"),
    "scaled_mm_static": Variant("torch._scaled_mm, given scales, compiled", "#b36b0e"),
    "_scaled_mm row-wise": Variant("torch._scaled_mm by row", "#f0c27b"),
    "_scaled_mm tensor-wise": Variant("torch._scaled_mm by tensor", "#d98a1f"),
    "fused_dense_fp8": Variant("fused dense, fp8", "#8a5a12"),
    "cusparselt": Variant("cuSPARSELt", "#4b9b6e"),
    "cuSPARSELt": Variant("cuSPARSELt", "#4b9b6e"),
    "sparse24": Variant("sparse24", OURS),
    "sparse24.mm": Variant("sparse24.mm", OURS),
    "sparse24.mm row-wise": Variant("sparse24.mm", OURS),
    "sparse24_fused": Variant("sparse24, exact scales", "#8db4f5"),
    "sparse24_compiled": Variant("sparse24, compiled", "#5b8fe8"),
    "sparse24_up": Variant("sparse24, w1 2:4", "#2a9d8f"),
    "sparse24_up_row": Variant("sparse24, w1 2:4, scales of rows", "#8fd3cb"),
    "sparse24_both": Variant("sparse24, w1 and w2 2:4", "#14564f"),
    "sparse24_adapters": Variant("sparse24, w1 and w2 2:4, adapters", "#8a6d3b"),
    "sparse24_fallback": Variant("sparse24 run dense, as by default", "#c9b6ee"),
    "sparse24_no_split": Variant("sparse24, no dense features", "#12408f"),
    "sparse24_dense_dw": Variant("sparse24, dense weight gradients", "#bcd3fa"),
    "sparse24_fp8": Variant("sparse24, fp8", "#5b2fa8"),
    "sparse24_fp8_compiled": Variant("sparse24, fp8, compiled", "#5b2fa8"),
    "sparse24_fp8_16bit_dw": Variant("sparse24, forward and dx in fp8", "#7b4fd0"),
}


def drawn_as(name: str, dtype: str) -> str:
    """The variant whose colour a variant has: that of fused dense depends on the precision."""
    return "fused_dense_fp8" if (name, dtype) == ("fused_dense", "fp8") else name


def variant(name: str) -> Variant:
    """A variant that has no name here is drawn under its own."""
    return VARIANTS.get(name) or Variant(name.lstrip("_"), "#d45087")
