"""The environment variables that switch the plugin of vLLM."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from sparse24.errors import fail


@dataclass(frozen=True)
class Settings:
    """How networks run.

    Attributes
    ----------
    min_tokens : int or None
        ``SPARSE24_VLLM_MIN_TOKENS``: calls with fewer tokens run vLLM's own products. Not set: as `sparse24.mlp.pays`
        says on CUDA, and on a CPU, where ours are slow, all calls.
    dense : tuple of str
        ``SPARSE24_VLLM_DENSE``: patterns of names of modules, separated by commas, that stay as they are, such as
        ``model.layers.0.mlp`` or ``*.layers.1?.*``.
    """

    min_tokens: int | None = None
    dense: tuple[str, ...] = ()

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] = os.environ) -> "Settings | None":
        """Read them; None is off, which is the default: ``SPARSE24_VLLM`` is 0, empty, or not set."""
        switch = variables.get("SPARSE24_VLLM", "")
        if switch not in ("", "0", "1"):
            fail("vllm", "SPARSE24_VLLM to be 0 or 1", f'"{switch}"')
        if switch != "1":
            return None
        tokens = variables.get("SPARSE24_VLLM_MIN_TOKENS", "").strip()
        if tokens and not tokens.isdecimal():
            fail("vllm", "SPARSE24_VLLM_MIN_TOKENS to be a whole number from 0", f'"{tokens}"')
        patterns = (pattern.strip() for pattern in variables.get("SPARSE24_VLLM_DENSE", "").split(","))
        return cls(int(tokens) if tokens else None, tuple(filter(None, patterns)))

    def keeps_dense(self, name: str) -> bool:
        """Whether the module of this name is to stay as it is."""
        return any(fnmatchcase(name, pattern) for pattern in self.dense)

    def as_dict(self) -> dict[str, object]:
        """Name what a cache of compiled graphs has to know, as JSON has it."""
        return {**asdict(self), "dense": list(self.dense)}
