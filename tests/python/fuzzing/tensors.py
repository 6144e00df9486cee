"""Tensors that are described before they are made: a description prints as the code that makes it again."""

import math
from dataclasses import dataclass

import torch
from data import activations, generator, integers
from oracle import round_up
from torch import Tensor

#: How a tensor lies in memory. What surrounds it in its storage is poison: bytes of 255, which are NaN.
LAYOUTS = ("contiguous", "permuted", "sliced", "strided", "gaps", "offset", "expanded", "expanded_last", "k_major")

#: The legal nibbles of metadata.
_NIBBLES = torch.tensor([4, 8, 12, 9, 13, 14], dtype=torch.uint8)
#: What no index should be.
_WILD = torch.tensor([-1, -(2**63), 2**63 - 1, 2**31, 2**32, 2**32 + 1, -(2**31), 2**62, -(2**32), 2**40])


@dataclass(frozen=True)
class Draw:
    """A tensor. `limit` is the first index that is too large; `form` is what kind of a tensor it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    contents: str = "normal"
    layout: str = "contiguous"
    seed: int = 0
    limit: int = 0
    form: str = "plain"
    device: str | None = None

    def make(self) -> Tensor:
        """On the CPU, or on `device`."""
        shape = _without_expanded(self.shape, self.layout)
        t = lay_out(_fill(shape, self), self.shape, self.layout)
        return _FORMS[self.form](t) if self.device is None else t.to(self.device)


def _fill(shape: tuple[int, ...], d: Draw) -> Tensor:
    """A contiguous tensor of some contents."""
    count, g = math.prod(shape), generator(d.seed)
    if d.contents in ("zeros", "ones"):
        return torch.full(shape, float(d.contents == "ones")).to(d.dtype)
    if d.contents == "integers":
        return integers(*shape, dtype=d.dtype, seed=d.seed)
    if d.contents == "normal":
        return torch.randn(shape, generator=g).to(d.dtype)
    if d.contents == "weights":
        return (torch.randn(shape, generator=g) * max((shape or (1,))[-1], 1) ** -0.5).to(d.dtype)
    if d.contents == "squares":
        return torch.randn(shape, generator=g).clamp(min=0).square().to(d.dtype)
    if d.contents in ("activations", "specials"):
        flat = activations.__wrapped__(1, count, d.dtype, seed=d.seed, specials=d.contents == "specials")
        return flat.reshape(shape)
    if d.contents == "powers":
        return torch.exp2(torch.randint(-3, 4, shape, generator=g).float()).to(d.dtype)
    if d.contents == "small":  # scales with which something saturates, and that are no powers of two
        return (torch.rand(shape, generator=g) * 0.1 + 0.001).to(d.dtype)
    if d.contents == "hostile":  # scales
        chosen = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, 1e-39, -1.0, 3e38, 1.0, 1.2e-38])
        return chosen[torch.randint(0, len(chosen), shape, generator=g)].to(d.dtype)
    if d.contents == "pattern":
        low, high = (_NIBBLES[torch.randint(0, 6, shape, generator=g)] for _ in range(2))
        return low | high << 4
    if d.contents == "ascending":
        return torch.randperm(d.limit, generator=g)[:count].sort().values.reshape(shape)
    if d.contents == "ends":
        return torch.randint(0, d.limit + 1, (count,), generator=g).sort().values.reshape(shape).to(d.dtype)
    if d.contents == "permuted":
        return torch.randperm(d.limit, generator=g)[:count].reshape(shape)
    if d.contents == "indices":
        return torch.randint(0, max(d.limit, 1), shape, generator=g)
    if d.contents == "wild":  # indices, of which a third are none
        wild = torch.cat([_WILD, torch.tensor([d.limit, d.limit + 1, -d.limit])])
        chosen = wild[torch.randint(0, len(wild), shape, generator=g)]
        usable = torch.randint(0, max(d.limit, 1), shape, generator=g)
        return torch.where(torch.randint(0, 3, shape, generator=g) == 0, chosen, usable).to(d.dtype)
    if d.contents == "counts":
        return (torch.randint(0, 2**14, shape, generator=g) >> torch.randint(0, 13, shape, generator=g)).to(d.dtype)
    assert d.contents == "bits", d.contents
    if d.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=g).bool()
    octets = torch.randint(0, 256, (count * d.dtype.itemsize,), generator=g, dtype=torch.uint8)
    return octets.view(d.dtype).reshape(shape)


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    octets = torch.full((math.prod(shape) * dtype.itemsize,), 1 if dtype == torch.bool else 255, dtype=torch.uint8)
    return octets.view(dtype).reshape(shape)


def _without_expanded(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape of what is expanded, which is what takes memory."""
    if layout == "broadcast":
        return tuple(min(size, 1) for size in shape)
    at = {"expanded": 0, "expanded_last": len(shape) - 1}.get(layout)
    return tuple(min(size, 1) if i == at else size for i, size in enumerate(shape))


def lay_out(t: Tensor, shape: tuple[int, ...], layout: str) -> Tensor:
    """The contiguous t in a layout, with shape `shape`."""
    if layout in ("expanded", "expanded_last", "broadcast"):
        return t.expand(shape)
    if t.dim() == 0 or layout == "contiguous":
        return t
    if layout == "permuted":
        order = list(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)
    if layout == "offset":  # contiguous, but not aligned
        target = _poisoned((t.numel() + 1,), t.dtype)[1:].view(t.shape)
    elif layout == "sliced":
        target = _poisoned(tuple(size + 16 for size in t.shape), t.dtype)
        for axis, size in enumerate(t.shape):
            target = target.narrow(axis, 8, size)
    elif layout == "strided":
        target = _poisoned((*t.shape[:-1], 2 * t.shape[-1]), t.dtype)[..., ::2]
    elif layout == "gaps":
        target = _poisoned((2 * t.shape[0], *t.shape[1:]), t.dtype)[1::2]
    else:
        assert layout == "k_major", layout
        if t.dim() != 2:
            return t
        step = max(16 // t.element_size(), 1)
        target = _poisoned((t.shape[1], round_up(t.shape[0], step)), t.dtype)[:, : t.shape[0]].t()
    return target.copy_(t)


def storage_of(t: Tensor) -> Tensor:
    """All of a tensor's storage, as bytes; none of a tensor that has none."""
    if t.layout != torch.strided or t._is_zerotensor():
        return torch.empty(0, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def copy_to(t: Tensor, device: str) -> Tensor:
    """A copy with the same strides, the same offset and the same surroundings."""
    if device == "meta":
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    if t.layout != torch.strided:
        return t.to(device, copy=True)
    if t._is_zerotensor():  # it has no storage
        return torch._efficientzerotensor(t.shape, dtype=t.dtype, device=device)
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device, copy=True)
    copied = flat.as_strided(t.shape, t.stride(), t.storage_offset())
    return torch._neg_view(copied) if t.is_neg() else copied


def _requiring(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.is_floating_point())


def _negated(t: Tensor) -> Tensor:
    """t by its numbers, with a storage that holds the opposite ones."""
    if not t.is_floating_point() or t.dtype.itemsize == 1:
        return t
    negative = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if t._is_zerotensor() else (-t)
    return torch._neg_view(negative)


def _sparse(t: Tensor) -> Tensor:
    """``t.to_sparse()``, which torch has not for every dtype; it warns unless checks are asked for this way."""
    there = t.to(torch.complex128) != 0
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor(there.nonzero().t(), t[there], t.shape)


_FORMS = {
    "plain": lambda t: t,
    "parameter": _requiring,
    "negated": _negated,
    "zerotensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "sparse": _sparse,
}
