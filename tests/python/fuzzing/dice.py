"""Random choices, each named by what it is for."""

import random
from collections.abc import Sequence

import torch
from oracle import FP8

from fuzzing.tensors import LAYOUTS, Draw

#: Around every multiple that something is padded to or tiled by, and odd ones.
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 36, 63, 64, 65, 100, 127, 128, 129, 130, 192, 255, 257)
FEW = (1, 2, 3, 4, 5, 6, 8, 9, 11)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ALL_DTYPES = (
    *FLOATS,
    FP8,
    *(torch.float64, torch.float8_e5m2, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bool, torch.complex64),
)
#: Multiply-adds of a product: the reference is slow.
MOST_PRODUCTS = 1_500_000


class Dice(random.Random):
    """Choices for one set of arguments, on a device."""

    def __init__(self, seed: int, index: int, device: str) -> None:
        super().__init__(f"{seed}:{index}")
        self.device = device

    def chance(self, share: float) -> bool:
        return self.random() < share

    def weighted(self, shares: dict) -> object:
        return self.choices(list(shares), list(shares.values()))[0]

    def rows(self) -> int:
        if self.chance(0.06):
            return 0
        return self.randint(258, 1100) if self.chance(0.03) else self.choice(ROWS)

    def columns(self, multiple: int) -> int:
        if self.chance(0.04):
            return 0
        return multiple * (self.randint(12, 70) if self.chance(0.06) else self.choice(FEW))

    def product(self, multiples: tuple[int, int, int]) -> tuple[int, int, int]:
        """Three sizes of a product; a multiple of 0 asks for rows."""
        while True:
            sizes = tuple(self.columns(m) if m else self.rows() for m in multiples)
            if sizes[0] * sizes[1] * sizes[2] <= MOST_PRODUCTS:
                return sizes

    def dim(self) -> int:
        return self.choice((-1, -2))

    def dtype(self, fp8: bool = False) -> torch.dtype:
        """One that an op takes; rarely, on CUDA, float32, which no kernel takes."""
        options = (*FLOATS, FP8) if fp8 else FLOATS
        if self.device == "cuda" and not self.chance(0.02):
            options = [dtype for dtype in options if dtype != torch.float32]
        return self.choice(options)

    def contents(self) -> str:
        shares = {"integers": 35, "normal": 20, "activations": 20, "specials": 10, "bits": 10, "zeros": 3, "ones": 2}
        return self.weighted(shares)

    def layout(self, rank: int = 2) -> str:
        if self.chance(0.5):
            return "contiguous"
        return self.choice(LAYOUTS if rank > 1 else ("offset", "sliced", "strided", "expanded"))

    def draw(self, shape: Sequence[int], dtype: torch.dtype, contents: str | None = None, **options) -> Draw:
        contents = self.contents() if contents is None else contents
        layout = options.pop("layout", None) or self.layout(len(shape))
        if contents in ("ascending", "permuted") and layout.startswith("expanded"):
            layout = "strided"  # each index once
        return Draw(tuple(shape), dtype, contents, layout, self.getrandbits(31), **options)

    def meta(self, size: int) -> Draw:
        return self.draw((size,), torch.uint8, "pattern")

    def scale(self, elements: int, contents: str = "powers", layout: str | None = None) -> Draw:
        """In any shape with so many elements."""
        shape = self.choice(((elements,), (elements, 1), (1, elements)) if elements != 1 else ((), (1,), (1, 1)))
        return self.draw(shape, torch.float32, contents, layout=layout)

    def maybe_scale(self, elements: int) -> Draw | None:
        """None, one for all, or one for each."""
        kind = self.choice(("none", "none", "one", "each"))
        return None if kind == "none" else self.scale(1 if kind == "one" else elements)
