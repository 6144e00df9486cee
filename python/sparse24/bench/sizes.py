"""The feed-forward networks that are measured: sizes of real models, and sweeps over the number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """T tokens through [d_model -> d_ff -> d_model]; `model` has such an FFN, with `bias` or without."""

    tokens: int
    d_model: int
    d_ff: int
    model: str = ""
    bias: bool = False


LARGE = (
    Size(8192, 4096, 16384, "Persimmon-8B"),
    Size(16384, 4096, 21504, "Nemotron-H-8B"),
    Size(32768, 1664, 6656, "nanochat d26"),
    Size(16384, 2560, 18432, "AFM-4.5B"),
)
# With fewer and fewer tokens 2:4 has less and less to save.
SWEEP_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
SWEEP = tuple(Size(tokens, 4096, 16384) for tokens in SWEEP_TOKENS)
NARROW = tuple(Size(tokens, 1664, 6656) for tokens in SWEEP_TOKENS)
# FFNs of models that use squared ReLU. Tokens: one device's batch in training for nanochat (32,768), Megatron's
# micro-batch for Nemotron-4 (16,384; with 8-way tensor parallelism each GPU holds an eighth of d_ff), for the experts
# of a mixture their share of a prefill of 32,768 tokens, else a long prefill. Persimmon-8B has biases too: without them
# it is the FFN that every other file measures. An eighth of Nemotron-Nano-9B-v2's d_ff, 1960, is not a multiple of 16,
# so it runs dense.
USERS = (
    *LARGE,
    Size(32768, 768, 3072, "nanochat d12, modded-nanogpt"),
    Size(32768, 1280, 5120, "nanochat d20"),
    Size(32768, 2048, 8192, "nanochat d32"),
    Size(16384, 6144, 24576, "Nemotron-4 15B"),
    Size(8192, 8192, 30720, "Nemotron-H-47B"),
    Size(8192, 3072, 9216, "Nemotron-Mini-4B"),
    Size(8192, 4480, 15680, "Nemotron-Nano-9B-v2"),
    Size(8192, 3328, 26624, "Jais-2-8B", bias=True),
    Size(16384, 6144, 3072, "Nemotron-4 15B, TP8"),
    Size(8192, 3072, 12288, "Nemotron-H-4B"),
    Size(8192, 5120, 20480, "Nemotron-Nano-12B-v2"),
    Size(32768, 1536, 6144, "nanochat d24"),
    Size(32768, 2176, 8704, "nanochat d34"),
    Size(32768, 1024, 4096, "modded-nanogpt medium"),
    Size(8192, 8192, 32768, "Nemotron-H-56B"),
    Size(8192, 8192, 4096, "Nemotron-H-56B, TP8"),
    Size(8192, 1024, 3584, "NeoMME-260M"),
    Size(8192, 2048, 9216, "Cosmos3-Edge"),
    Size(32768, 2688, 3712, "Nemotron-3 Nano, shared expert"),
    Size(1536, 2688, 1856, "Nemotron-3 Nano, one expert"),
    Size(32768, 4096, 5376, "Nemotron-3 Super, shared expert"),
    Size(1408, 1024, 2688, "Nemotron-3 Super, one expert"),
    Size(32768, 8192, 10240, "Nemotron-3 Ultra, shared expert"),
    Size(1408, 2048, 5120, "Nemotron-3 Ultra, one expert"),
)
#: Of a step in training, (T, D, F).
TRAINING = (
    (16384, 4096, 16384),
    (32768, 1664, 6656),
    (16384, 2560, 18432),
    (8192, 4096, 16384),
    (4096, 4096, 16384),
    (65536, 1664, 6656),
)
#: What `sparse24 bench --preset` measures: FFNs of these models.
PRESETS = {
    "nanochat": ("nanochat d12, modded-nanogpt", "nanochat d20", "nanochat d26", "nanochat d32"),
    "nemotron": ("Nemotron-Mini-4B", "Nemotron-H-8B", "Nemotron-4 15B", "Nemotron-H-47B"),
    "nemotron3": (
        "Nemotron-3 Nano, shared expert",
        "Nemotron-3 Super, shared expert",
        "Nemotron-3 Ultra, shared expert",
    ),
    "afm": ("AFM-4.5B",),
    "jais2": ("Jais-2-8B",),
    "persimmon": ("Persimmon-8B",),
    "modded-nanogpt": ("nanochat d12, modded-nanogpt", "modded-nanogpt medium"),
}
SETS = {"large": LARGE, "sweep": SWEEP, "users": USERS, "narrow": NARROW}
SMOKE = (Size(48, 64, 128), Size(33, 64, 96, "smoke", bias=True))
QUICK = (LARGE[0], LARGE[2], SWEEP[2])
USUAL_ZEROS = 0.9


def chosen(names: Iterable[str]) -> list[tuple[str, Size]]:
    """The sizes of these sets with the set's name, in order; of equal T, D, F the first."""
    first: dict[tuple[int, ...], tuple[str, Size]] = {}
    for name in names:
        for size in SETS[name]:
            first.setdefault(size[:3], (name, size))
    return list(first.values())


def preset(name: str) -> list[Size]:
    """The sizes of a preset."""
    by_model = {size.model: size for size in USERS}
    return [by_model[model] for model in PRESETS[name]]


def with_zeros(sizes: Sequence[tuple[str, Size]], shares: Sequence[float]) -> list[tuple[str, Size, float]]:
    """Every size at 90 % zeros (at the first share if 90 % is not among them); then the large ones at the others."""
    usual = USUAL_ZEROS if USUAL_ZEROS in shares else shares[0]
    large = {size[:3] for size in LARGE + SMOKE}
    others = [share for share in shares if share != usual]
    order = [(name, size, usual) for name, size in sizes]
    return order + [(name, size, share) for share in others for name, size in sizes if size[:3] in large]
