"""Modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse24._options import boolean, floating_dtype, whole_number
from sparse24.mlp import Precision, relu2_mlp
from sparse24.mlp.choice import least_when_exact
from sparse24.mlp.inference import inferred, learns
from sparse24.mlp.scale import factor_of
from sparse24.nn import delayed_scales
from sparse24.nn.checked_options import OPTIONS, whole_number_or_none
from sparse24.nn.children import is_moved, layer_problem, run_moved, warn_once
from sparse24.nn.entering_weights import held, hold
from sparse24.nn.experts import ReLU2Experts as ReLU2Experts
from sparse24.nn.quantized_layers import LAYERS, QuantizedLayers
from sparse24.nn.quantized_linear import QuantizedLinear as QuantizedLinear
from sparse24.nn.tracing import as_one_call, is_traced
from sparse24.nn.weight_copies import (
    bytes_of_copies,
    drop_copies,
    follow_traced,
    let_go,
    put_copies,
    renew_when_loaded,
    without_copies,
)
from sparse24.ops.activation import ActivationFunction, threshold_of
from sparse24.recipe import Recipe

#: Options that decide whether steps have delayed scales.
_WANT_SCALES = ("precision", "recipe")


class ReLU2MLP(QuantizedLayers):
    """Squared-ReLU feed-forward network whose activation is 2:4: the module form of `sparse24.relu2_mlp`.

    Its children are plain `torch.nn.Linear` modules under the names that Hugging Face models use, so the state_dict has
    the keys ``up_proj.weight``, ``down_proj.weight`` (and ``.bias``). The forward reads their parameters and does not
    call them. Where that would be wrong, it calls them, dense and in their own precision, with a warning: children that
    are hooked, patched, pruned, parametrised, wrapped (LoRA), or replaced, and distributed or quantised weights. Hooks
    of accelerate that only move inputs are followed instead. When compiled it looks while it is traced, without a
    warning, and Dynamo does not guard on hooks: register them before.

    A state is converted where one side is quantised (`quantize_`) and the other is not: loading quantises float weights
    and dequantises float8 ones.

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
    threshold : float
        As in `sparse24.relu2_mlp`: the activation is zero where the pre-activation does not exceed it.

    Attributes
    ----------
    sparse : bool
        False: it runs dense at the same precision, as in the warm-up of training (`sparse24.Schedule` sets it). It is
        read while tracing: a compiled module is traced once for each of the two.
    delayed_scales : Tensor [4] or None
        A buffer where `precision` and `recipe` say that all six products of a step are float8: see
        `sparse24.relu2_mlp`. It is saved, loaded and copied with the module, and each rank has its own.
    scales_known : bool
        Whether they are used. An eager forward pass finds out by itself. A compiled one does not: it runs with exact
        scales, slower, until the step of an optimizer of torch or `refresh_scales` (which `sparse24.Schedule` calls)
        has found those of a step.
    calls_with_unknown_scales : int
        How many eager forward passes with gradients found that they are not: they look ever more rarely.
    """

    sparse: bool = True
    scales_known: bool = delayed_scales.ATTRIBUTES["scales_known"]
    calls_with_unknown_scales: int = delayed_scales.ATTRIBUTES["calls_with_unknown_scales"]
    _threshold = "0.0"  # of modules that were saved without one
    _copies = None
    _copies_fresh: bool | None = None
    _NAME = "nn.ReLU2MLP"
    _OPTIONS = {
        **OPTIONS,
        "min_tokens": whole_number_or_none,
        "recompute": boolean,
        "scales_known": boolean,
    }

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
        threshold: float = 0,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.min_tokens = min_tokens
        self.recipe = recipe
        self.recompute = recompute
        self.threshold = threshold
        dim, hidden = whole_number("nn.ReLU2MLP", "dim", dim), whole_number("nn.ReLU2MLP", "hidden", hidden)
        dim_out = dim if dim_out is None else whole_number("nn.ReLU2MLP", "dim_out", dim_out)
        bias, dtype = boolean("nn.ReLU2MLP", "bias", bias), floating_dtype("nn.ReLU2MLP", dtype)
        self.up_proj = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim_out, bias=bias, device=device, dtype=dtype)
        delayed_scales.register(self, "delayed_scales", precision, recipe, dim, persistent=True)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. `delayed_scales` are there where precision and recipe, as they are now, want them."""
        super().__setattr__(name, value)
        features = getattr(self._modules.get("up_proj"), "in_features", None) if name in _WANT_SCALES else None
        if features is not None:
            wanted = delayed_scales.wanted(self.precision, self.recipe, features)
            if wanted != (self._buffers.get("delayed_scales") is not None):
                delayed_scales.register(self, "delayed_scales", self.precision, self.recipe, features, persistent=True)
                delayed_scales.forget(self, "delayed_scales")

    @property
    def threshold(self) -> float:
        """What the pre-activation has to exceed, as in `sparse24.relu2_mlp`."""
        return float(self._threshold)

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = repr(threshold_of("nn.ReLU2MLP", value))

    def forward(self, x: Tensor, scale_y: Tensor | None = None) -> Tensor:
        """Compute the network.

        Parameters
        ----------
        x : Tensor [..., D]
            As in `sparse24.relu2_mlp`.
        scale_y : Tensor, optional
            As in `sparse24.relu2_mlp`. Without it, float8 weights bound it (`sparse24.bounding_factor`), and with a
            bias it is computed.

        Returns
        -------
        Tensor [..., D_out]
            Of x's dtype (or the autocast dtype).

        Raises
        ------
        RuntimeError
            ``sparse24.relu2_mlp: expected <argument> <rule>, got <value>``.
        """
        if type(x) is not Tensor and is_traced(x):
            return as_one_call(self, "nn.ReLU2MLP", x, *(() if scale_y is None else (scale_y,)))  # type: ignore[no-any-return]
        up, down = self._modules["up_proj"], self._modules["down_proj"]
        problem = layer_problem("up_proj", up) or layer_problem("down_proj", down)
        moved = is_moved(up)
        if problem is None and moved and up.weight.device != down.weight.device:
            problem = "they are on different devices"
        if problem is not None:
            warn_once(self, f"{type(self).__name__} calls its layers and runs dense: {problem}")
            return self._call_layers(x)
        return run_moved(up, down, x, lambda t: self._run(t, scale_y)) if moved else self._run(x, scale_y)

    def refresh_scales(self) -> bool:
        """Find out whether `delayed_scales` are known, for compiled steps to use them. It waits for the device."""
        return delayed_scales.refresh(self, "delayed_scales")

    def _run(self, x: Tensor, scale_y: Tensor | None) -> Tensor:
        up, down = self._modules["up_proj"], self._modules["down_proj"]
        first, second = self._weights()
        plain = type(x) is Tensor
        b1, b2 = up._parameters.get("bias"), down._parameters.get("bias")  # attributes of modules take the host longer
        learning = not plain or learns(x, first.values, second.values, b1, b2, *(self._adapters() or ()))
        rows = self._rows(first, second) if self._decodes else None
        w1, w2, rows, settled = self._entering(first, second, rows, learning=learning)
        factor = None if first.scale is None else factor_of(up, scale_y)
        # Not the property: Dynamo would evaluate all guards on the module in each call.
        least, threshold = self.min_tokens, float(self._threshold)
        if self._decodes and rows is None and not learning:
            least = least_when_exact(least, x)
        packed = self._packed(x) if settled and self.sparse and not learning else None
        if settled and packed is None and not learning and not torch.compiler.is_compiling():
            out = inferred(
                x,
                first if w1 is first.values else first._replace(values=w1),
                second if w2 is second.values else second._replace(values=w2),
                rows,
                b1,
                b2,
                precision=self.precision,
                recipe=None,
                scale_y=scale_y,
                scale_y_factor=factor,
                threshold=threshold,
                min_tokens=least,
                sparse=self.sparse,
            )
            if out is not None:
                return out
        scales, known = delayed_scales.for_step(self, "delayed_scales")
        return relu2_mlp(
            x,
            w1,
            w2,
            b1,
            b2,
            precision=self.precision,
            w1_scale=first.scale,
            w2_scale=second.scale,
            scale_y=scale_y,
            scale_y_factor=factor,
            min_tokens=least,
            recipe=self.recipe,
            recompute=self.recompute,
            sparse=self.sparse,
            threshold=threshold,
            delayed_scales=scales,
            scales_known=known,
            w2_rows=rows,
            weights_pruned=settled,
            w1_packed=packed,
            adapters=None if settled else self._adapters(),
        )

    def _call_layers(self, x: Tensor) -> Tensor:
        device_type, activation = x.device.type, ActivationFunction("relu2", self.threshold)
        up: Callable[[Tensor], Tensor] = self.up_proj
        down: Callable[[Tensor], Tensor] = self.down_proj
        if self._adapters() or self._is_pruned():
            up, down = self._called_layers()
        # Layers of torch do not cast float32 master weights; autocast does.
        masters = x.dtype in (torch.bfloat16, torch.float16) and any(
            p.dtype == torch.float32 for p in self.parameters()
        )
        if not masters or torch.is_autocast_enabled(device_type):
            return down(activation(up(x)))
        with torch.autocast(device_type, x.dtype):
            return down(activation(up(x)))

    def _layers_problem(self, *, to_follow: bool = True) -> str | None:
        """Why the weights cannot be read; or, `to_follow`, cannot be seen to change."""
        for name in LAYERS:
            child = getattr(self, name)
            problem = layer_problem(name, child)
            if problem is None and to_follow and child.weight.is_inference():
                problem = f"the weight of {name} was made in inference mode"
            if problem is not None:
                return problem
        return None

    @torch.no_grad()
    def prepare_decode_(self) -> "ReLU2MLP":
        """Keep the second weight by neuron as well, so that few tokens run exactly and fast. In place; returns self.

        Calls without gradients and with few tokens (`sparse24.mlp.few_tokens`) then run as `sparse24.relu2_mlp` does
        with `w2_rows`: nothing is pruned, and the rows of neurons that are zero are not read. The copy, a buffer
        ``w2_rows`` [F, D_out] that is not in the state_dict, takes as many bytes as the second weight. None is made
        where the weight is stored so already, as the transpose of a contiguous [F, D_out].

        The copy follows the weight: loading a state, `quantize_`, moving and casting the module make it again at once,
        and a call after the weight was changed in place makes it again first. Changes through ``weight.data`` escape
        that: call `prepare_decode_` again. So they do in a graph that is compiled or captured, which cannot look; but a
        compiled one stops using the copy once an optimizer of torch has made a step, until a call that is not compiled,
        or `prepare_decode_`, has made it again. There is no copy of a weight that replaces another, that FSDP gathers
        for the call, or that was made in inference mode: few tokens then run dense, which prunes nothing either.

        Raises
        ------
        RuntimeError
            A layer is hooked, patched, replaced or distributed, or its weight was made in inference mode, where tensors
            count no changes. Nothing has changed then.
        """
        problem = self._layers_problem()
        if problem is not None:
            raise RuntimeError(
                f"sparse24.nn.ReLU2MLP: expected layers whose weights can be copied to decode with, got: {problem}"
            )
        self._decodes = True
        put_copies(self)
        renew_when_loaded(self)
        return self

    _follow_traced = follow_traced

    def __getstate__(self):
        return without_copies(self, self.__dict__)

    def __setstate__(self, state):
        super().__setstate__(state)
        delayed_scales.watch(self, "delayed_scales")
        put_copies(self)

    def _apply(self, fn, recurse=True):
        before, masks = self._buffers.get("delayed_scales"), held(self)
        drop_copies(self)
        let_go(self)
        super()._apply(fn, recurse)
        delayed_scales.keep(self, "delayed_scales", before)
        hold(self, masks)
        put_copies(self)
        return self

    def extra_repr(self) -> str:
        """Name what differs from the default."""
        options = {"min_tokens": self.min_tokens, "recipe": self.recipe, "recompute": self.recompute or None}
        options["threshold"] = self.threshold or None
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        adapters = self._adapters()
        if adapters is not None:
            given.append(f"adapters of rank {adapters[1].shape[0]}")
        if self._decodes:
            given.append(f"decode ({bytes_of_copies(self) / 1e6:.1f} MB of copies)")
        return ", ".join([f"precision={self.precision}", *given])
