"""Types of the compiled module."""

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    version: str
    cuda: bool
    cuda_archs: str
    cuda_version: str
    cutlass: str
    compiler: str
    torch_target: str

class GemmConfig(TypedDict):
    tile: str
    tile_m: int
    tile_n: int
    tile_k: int
    cluster_m: int
    cluster_n: int
    swizzle: int
    raster: str
    splits: int
    splits_last_wave: bool
    divides: bool  # the older name
    text: str

class Multiples(TypedDict):
    features: int
    features_of_tokens: int
    tokens: int
    meta_rows: int
    meta_columns: int

class CostRow(TypedDict):
    product: str
    bits: int
    tile: str
    field: str
    value: float
    record: str

class FewTokensRow(TypedDict):
    bits: int
    d_model: int
    d_ff: int
    tokens: int
    dense: int
    record: str

class _CostModel:
    def __init__(self, rows: list[CostRow]) -> None: ...
    def predicted_us(self, product: str, dtype: str, m: int, n: int, k: int, config: dict[str, Any]) -> float: ...
    def fastest(
        self, product: str, dtype: str, m: int, n: int, k: int, configs: list[dict[str, Any]]
    ) -> GemmConfig: ...

version: str
largest_e4m3: float

def build_info() -> BuildInfo: ...
def mm_configs(dtype: str) -> list[GemmConfig]: ...
def select_mm_config(dtype: str, m: int, n: int, k: int, sm_count: int) -> GemmConfig: ...
def linear_configs(dtype: str, compress: bool) -> list[GemmConfig]: ...
def select_linear_config(dtype: str, m: int, n: int, k: int, sm_count: int, compress: bool) -> GemmConfig: ...
def multiples(dtype: str) -> Multiples: ...
def cost_rows() -> list[CostRow]: ...
def few_tokens_rows() -> list[FewTokensRow]: ...
def meta_bytes(rows: int, cols: int, dtype: str, dim: int = -1) -> int: ...
def unpack_meta(meta: NDArray[Any], rows: int, cols: int, dtype: str, dim: int = -1) -> NDArray[np.uint8]: ...
def pack_meta(nibbles: NDArray[Any], rows: int, cols: int, dtype: str, dim: int = -1) -> NDArray[np.uint8]: ...
def unchanged(facts: tuple[tuple[Any, ...], ...], /) -> bool: ...
def class_version(kind: type, /) -> int: ...
