"""A weight that FSDP2 gathered as float8 codes: what the whole parameter is then."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparse24.errors import fail
from sparse24.ops import transpose_fp8

_aten = torch.ops.aten
#: What FSDP2 and `torch.nn.Parameter` do to a tensor before it is the parameter.
_SAME = (_aten.detach.default, _aten.alias.default)


class GatheredWeight(Tensor):
    """Codes [R, C] with one scale, in place of a weight in 16 or 32 bits, whose gradient is in that dtype.

    A float8 step multiplies the codes. All else computes with the numbers that they stand for.

    Attributes
    ----------
    codes : torch.Tensor
        float8_e4m3fn, in memory that FSDP2 gives up after a pass, and fills again for the next one.
    scale : torch.Tensor
        [1], float32.
    transposed : torch.Tensor, optional
        The codes [C, P] of `transpose_fp8`, where FSDP2 gathers for the forward pass alone. They are made where it
        gathers: compilers would move their making into the backward pass.
    """

    codes: Tensor
    scale: Tensor
    transposed: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, transposed: Tensor | None, dtype: torch.dtype) -> "GatheredWeight":
        """Stand for codes."""
        self = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)  # type: ignore[attr-defined]
        self.codes, self.scale, self.transposed = codes, scale, transposed
        return self  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the numbers."""
        whole = func is _aten.as_strided.default and list(args[1]) == list(args[0].shape)
        if whole or func in _SAME:
            w = args[0]
            return cls(w.codes, w.scale, w.transposed, w.dtype)
        args, kwargs = tree_map_only(cls, cls.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def numbers(self) -> Tensor:
        """Return what the codes stand for."""
        return (present(self.codes).float() * self.scale).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Name the tensors of it, for compilers."""
        return ["codes", "scale", *(["transposed"] if self.transposed is not None else ())], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], dtype: torch.dtype, *_: Any) -> "GatheredWeight":
        """Undo that."""
        return cls(inner["codes"], inner["scale"], inner.get("transposed"), dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Say what it is."""
        return f"GatheredWeight({list(self.shape)}, {self.dtype})"


def present(codes: Tensor) -> Tensor:
    """Return codes that FSDP2 has not given up."""
    if not torch.compiler.is_compiling() and codes.untyped_storage().size() < codes.numel():
        what = "weights to be gathered for the backward pass too, or once=True"
        fail("distributed.gather_float8", what, "memory that FSDP2 has given up")
    return codes


def refuse_second_call(weight: Any) -> None:
    """Refuse to compute a network again in the backward pass whose weights are gathered for the forward pass alone."""
    if getattr(getattr(weight, "_local_tensor", None), "gathered_once", False) and in_backward():
        what = "nothing to compute networks again in the backward pass (activation checkpointing) with once=True"
        fail("distributed.gather_float8", what, "a call of one there")


def in_backward() -> bool:
    """Whether a backward pass runs."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transposed_again(codes: Tensor) -> Tensor:
    """Transpose, in the backward pass, the codes that FSDP2 has gathered again."""
    return transpose_fp8(present(codes))
