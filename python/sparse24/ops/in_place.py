"""What torch's own in-place ops do for autograd, for `put_features`: the only op that writes to an argument."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse24 import _library  # noqa: F401  (registers the ops)
from sparse24.errors import fail
from sparse24.ops.forward_mode import refuse_tangents

_put_features = torch.ops.sparse24.put_features.default
# As long as it lives, its registrations do.
_kernels = torch.library.Library("sparse24", "FRAGMENT")


def _autograd(keyset: Any, out: Tensor, parts: Tensor, features: Tensor, dim: int) -> None:
    """Refuse what would need a gradient."""
    refuse_tangents("put_features", (out, parts))
    if torch.is_grad_enabled():
        for name, t in (("out", out), ("parts", parts)):
            if t is not None and t.requires_grad:  # None is what the op refuses
                _refuse(f"{name} not to require a gradient where gradients are recorded", "one that does")
    with torch._C._AutoDispatchBelowAutograd():
        _put_features.redispatch(keyset & torch._C._after_autograd_keyset, out, parts, features, dim)


def _version(keyset: Any, out: Tensor, parts: Tensor, features: Tensor, dim: int) -> None:
    """Tell whoever saved `out` that it has changed."""
    if out is not None and out.is_inference() and not torch.is_inference_mode_enabled():
        _refuse("out to be no inference tensor outside of torch.inference_mode", "one")
    _put_features.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, out, parts, features, dim)
    torch.autograd.graph.increment_version(out)  # not where it has refused


def _negative(keyset: Any, out: Tensor, parts: Tensor, features: Tensor, dim: int) -> None:
    """Give `parts` their sign; torch's fallback is for ops that return what they wrote to."""
    if out.is_neg():
        _refuse("out to be no view with its sign pending (is_neg)", "one")
    _put_features(out, parts.resolve_neg(), features, dim)


def _refuse(rule: str, got: object) -> NoReturn:
    fail("put_features", rule, got)


def register() -> None:
    """Register all of them."""
    for key, kernel in (("Autograd", _autograd), ("ADInplaceOrView", _version), ("Negative", _negative)):
        _kernels.impl("put_features", kernel, key, with_keyset=True)
