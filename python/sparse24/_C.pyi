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

class _Config(TypedDict):
    tile_m: int
    tile_n: int
    tile_k: int
    cluster_m: int
    swizzle: int
    raster: str
    text: str

class LinearConfig(_Config):
    cluster_n: int
    divides: bool

class MmConfig(_Config):
    splits: int

version: str

def build_info() -> BuildInfo: ...
def mm_configs(dtype: str) -> list[MmConfig]: ...
def select_mm_config(dtype: str, m: int, n: int, k: int, sm_count: int) -> MmConfig: ...
def select_linear_config(dtype: str, m: int, n: int, k: int, sm_count: int, compress: bool) -> LinearConfig: ...
def meta_bytes(rows: int, cols: int, dtype: str, dim: int = -1) -> int: ...
def unpack_meta(meta: NDArray[Any], rows: int, cols: int, dtype: str, dim: int = -1) -> NDArray[np.uint8]: ...
def pack_meta(nibbles: NDArray[Any], rows: int, cols: int, dtype: str, dim: int = -1) -> NDArray[np.uint8]: ...
