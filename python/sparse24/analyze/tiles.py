"""Features that neighbouring tokens light together: what a tile of a GEMM needs, and what decoding a few reads."""

import torch
from torch import Tensor


class Tiles:
    """Counts of the features that at least one token of a tile lights. Tiles go on from one call to the next.

    Parameters
    ----------
    size : int
        Tokens of a tile.
    features : int
        Features of the activation.
    device : device
        Of the activation.
    """

    def __init__(self, size: int, features: int, device: torch.device) -> None:
        self.size, self.features = size, features
        self._whole = self._begun = 0  # tiles that are complete, and tokens of the one that is not
        self._active = torch.zeros((), dtype=torch.int64, device=device)  # of those that are complete
        self._lit = torch.zeros(features, dtype=torch.bool, device=device)  # by the other

    def add(self, nonzero: Tensor, columns: slice) -> None:
        """Add some features of the next tokens, [T, columns]."""
        first = nonzero[: self.size - self._begun]
        lit = self._lit[columns] | first.any(0)
        if self._begun + len(first) == self.size:
            rest = nonzero[len(first) :]
            tiles, width = len(rest) // self.size, nonzero.shape[1]
            whole = rest[: tiles * self.size].view(tiles, self.size, width).any(1)
            self._active += lit.count_nonzero() + whole.count_nonzero()
            lit = rest[tiles * self.size :].any(0)
        self._lit[columns] = lit

    def end(self, tokens: int) -> None:
        """End a part of so many tokens, of which all features were added."""
        tiles, self._begun = divmod(self._begun + tokens, self.size)
        self._whole += tiles

    def share(self) -> float:
        """Give the mean share of the features that a tile lights, of whole tiles. Fewer tokens than one are one."""
        tiles, active = (self._whole, self._active) if self._whole else (1, self._lit.count_nonzero())
        return int(active) / (tiles * self.features) if self.features else 0.0
