"""Modules."""

import torch
from torch import Tensor, nn

from sparse24._bounding_factor import bounding_factor, factor_of
from sparse24.mlp import Precision, relu2_mlp
from sparse24.ops import quantize_fp8
from sparse24.training import Recipe


class ReLU2MLP(nn.Module):
    """Squared-ReLU feed-forward network whose activation is 2:4: the module form of `sparse24.relu2_mlp`.

    Its children are plain `torch.nn.Linear` modules under the names that Hugging Face models use, so the state_dict has
    the keys ``up_proj.weight``, ``down_proj.weight`` (and ``.bias``). The forward reads their parameters and does not
    call them: hooks on the children do not run.

    Parameters
    ----------
    dim : int
        Input features D.
    hidden : int
        Hidden features F. Sparse where F is a multiple of 16 (fp8: 32), dense otherwise.
    dim_out : int, optional
        Output features; default `dim`.
    bias : bool
        Whether both layers have a bias.
    precision : {"auto", "16bit", "fp8"}
        As in `sparse24.relu2_mlp`.
    device, dtype
        Of the parameters.
    min_tokens : int, optional
        As in `sparse24.relu2_mlp`: with fewer tokens it runs dense.
    recipe, recompute
        Options of the backward pass, as in `sparse24.relu2_mlp`.

    Attributes
    ----------
    sparse : bool
        False: it runs dense at the same precision, as in the warm-up of training (`sparse24.Schedule` sets it). It is
        read while tracing: a compiled module is traced once for each of the two.
    """

    sparse: bool = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        dim_out: int | None = None,
        bias: bool = False,
        precision: Precision = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        min_tokens: int | None = None,
        recipe: Recipe | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if precision not in ("auto", "16bit", "fp8"):
            raise RuntimeError(
                f'sparse24.nn.ReLU2MLP: expected precision to be "auto", "16bit" or "fp8", got "{precision}"'
            )
        self.precision = precision
        self.min_tokens = min_tokens
        self.recipe = recipe
        self.recompute = recompute
        self.up_proj = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim if dim_out is None else dim_out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, scale_y: Tensor | None = None) -> Tensor:
        """Compute [..., D_out] of x [..., D]; `scale_y` as in `sparse24.relu2_mlp`.

        Without it, float8 weights bound it (`sparse24.bounding_factor`), and with a bias it is computed.
        """
        up, down = self.up_proj, self.down_proj
        return relu2_mlp(
            x,
            up.weight,
            down.weight,
            up.bias,
            down.bias,
            precision=self.precision,
            w1_scale=getattr(up, "weight_scale", None),
            w2_scale=getattr(down, "weight_scale", None),
            scale_y=scale_y,
            scale_y_factor=factor_of(up, scale_y),
            min_tokens=self.min_tokens,
            recipe=self.recipe,
            recompute=self.recompute,
            sparse=self.sparse,
        )

    @torch.no_grad()
    def quantize_(self) -> "ReLU2MLP":
        """Replace the weights by float8_e4m3fn with one scale per row, for inference. In place; returns the module.

        The children become `QuantizedLinear`: buffers ``weight``, ``weight_scale`` and ``scale_y_factor`` instead of a
        parameter. There is no way back, and float8 weights get no gradient.
        """
        if self.precision == "16bit":
            raise RuntimeError(
                'sparse24.nn.ReLU2MLP: expected precision to be "auto" or "fp8" to quantise, got "16bit"'
            )
        for name in ("up_proj", "down_proj"):
            child = getattr(self, name)
            if not isinstance(child, QuantizedLinear):
                setattr(self, name, QuantizedLinear(child))
        return self

    def extra_repr(self) -> str:
        """Name what differs from the default."""
        options = {"min_tokens": self.min_tokens, "recipe": self.recipe, "recompute": self.recompute or None}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        return ", ".join([f"precision={self.precision}", *given])


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is float8_e4m3fn [out, in] with float32 scales [out].

    `scale_y_factor` [1] is `sparse24.bounding_factor` of both: whoever replaces them has to replace it.

    Moving the model to another device moves them; casting the model (``.bfloat16()``, ``.to(dtype)``) leaves them as
    they are, since a float8 weight means nothing without its scale.
    """

    weight: Tensor
    weight_scale: Tensor
    scale_y_factor: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        if weight.is_cuda and weight.dtype == torch.float32:
            weight = weight.to(torch.bfloat16)  # the kernels have no float32
        values, scale = quantize_fp8(weight)
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale.reshape(-1))
        self.register_buffer("scale_y_factor", bounding_factor(values, scale))
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Dequantise and multiply in x's dtype: for inspection, not for speed."""
        weight = (self.weight.float() * self.weight_scale.unsqueeze(1)).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def __getstate__(self):
        # Plain pickling of torch does not know float8 (torch.save does): the weight travels as bytes.
        weight = self._buffers["weight"].view(torch.uint8)
        return {**self.__dict__, "_buffers": {**self._buffers, "weight": weight}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._buffers["weight"] = self._buffers["weight"].view(torch.float8_e4m3fn)

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers[name] for name in ("weight", "weight_scale", "scale_y_factor")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, float8_e4m3fn"
