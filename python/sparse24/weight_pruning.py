"""How 2:4 weights are trained: softened, by masks that stay for some steps, and with a decay of what is pruned."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse24._options import boolean, finite_number, one_of, whole_number
from sparse24.errors import dtype_name, fail, type_name
from sparse24.format import FP8
from sparse24.mlp.weights import kept24, masked, prune24, soft_scale, soft_threshold24
from sparse24.nn import entering_weights
from sparse24.schedule import feed_forwards


class WeightPruning:
    """Train the 2:4 weights of a model's networks: which entries are kept for how long, and what the others do.

    A recipe with `sparse_weights` alone chooses the two largest magnitudes of each group anew in every step. This
    object adds what the literature has found to help. It holds no weights; call `step` before each step, after
    `sparse24.Schedule.apply`, and with a decay `decay_` after the backward passes.

    Parameters
    ----------
    model : Module
        With `sparse24.nn.ReLU2MLP` modules or converted ones, of which some have a recipe with 2:4 weights. Experts are
        settled, decay and count as flipped, but are pruned anew in each step, without thresholds.
    soft : bool
        The weights enter as `sparse24.soft_threshold24`, with a scale that is found in the first sparse step and stays
        (S-STE). What is pruned then leaves and comes at zero: no step jumps.
    refresh_steps : int
        So many sparse steps a mask stays; 0: as it was in the first sparse step, for good (SLoPe).
    decay : float
        What is pruned is pulled to zero with this factor, so that masks settle (SR-STE, FST): see `decay_`.
    decay_of : {"gradients", "weights"}
        "gradients": it is added to the gradient, which Adam then normalises (FST's masked decay).
        "weights": the weights shrink by it directly, times the learning rate.
    settle : bool
        The first dense step after sparse ones starts with the network that they trained: see `settle_`. False: with the
        weights as they are, of which half never entered a product, and a softened rest is another.

    Attributes
    ----------
    steps : int
        Sparse steps so far.

    Raises
    ------
    RuntimeError
        ``sparse24.WeightPruning: expected <argument> <rule>, got <value>``.

    Notes
    -----
    Masks are a byte an entry, whole on each rank of FSDP2. With neither a soft threshold nor kept masks, none are
    stored.

    Sources: S-STE: Hu et al. 2024, arXiv 2409.09099; SR-STE: Zhou et al. 2021, arXiv 2102.04010; FST: Hu et al. 2024,
    arXiv 2404.01847; SLoPe: Mozaffari et al. 2024, arXiv 2405.16325.

    Examples
    --------
    >>> pruning = sparse24.WeightPruning(model)
    >>> for step in range(schedule.total_steps):
    ...     schedule.apply(model, step)
    ...     pruning.step()
    ...     train_one_step(model)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        soft: bool = False,
        refresh_steps: int = 1,
        decay: float = 0.0,
        decay_of: Literal["gradients", "weights"] = "gradients",
        settle: bool = True,
    ) -> None:
        self.soft = boolean("WeightPruning", "soft", soft)
        self.refresh_steps = whole_number("WeightPruning", "refresh_steps", refresh_steps)
        if self.soft and self.refresh_steps != 1:
            fail("WeightPruning", "refresh_steps to be 1 with a soft threshold", refresh_steps)
        if not isinstance(model, nn.Module):
            fail("WeightPruning", "model to be a torch.nn.Module", type_name(model))
        self.decay = finite_number("WeightPruning", "decay", decay)
        self.decay_of = one_of("WeightPruning", "decay_of", decay_of, ("gradients", "weights"))
        self.settle = boolean("WeightPruning", "settle", settle)
        self.steps = 0
        self._begun = False
        self._model = model
        self._networks = [network for module in feed_forwards(model) for network in _pruned_layers(module)]
        self._seen: dict[int, Tensor] = {}
        if not self._networks:
            what = "model to have ReLU2MLP or converted modules with 2:4 weights"
            fail("WeightPruning", what, f"none in {type(model).__name__} (their recipes have no sparse_weights)")
        if (self.soft or self.refresh_steps != 1) and all(layer.experts for layer in self._networks):
            what = "neither soft nor refresh_steps for experts, which are pruned anew in each step"
            fail("WeightPruning", what, "soft=True" if self.soft else f"refresh_steps={self.refresh_steps}")
        if any(layer.stored().parameter.dtype == FP8 for layer in self._networks):
            fail("WeightPruning", "model to have weights that can be trained", "float8 ones")
        if self.settle:
            self._writers()

    def step(self) -> None:
        """Prepare the next step: find masks and scales, if it is a sparse one and they are due; or settle."""
        networks = self._pruned()
        if not any(layer.module.sparse for layer in networks):
            if self._begun and self.settle:
                self.settle_()
            return
        first, self._begun, self.steps = not self._begun, True, self.steps + 1
        due = first or (self.refresh_steps > 1 and (self.steps - 1) % self.refresh_steps == 0)
        for layer in networks:
            if layer.experts:
                continue
            if self.soft and first:
                entering_weights.put(layer.module, layer.names[1], soft_scale(layer.whole(), layer.dim))
            if self.refresh_steps != 1 and due:
                entering_weights.put(layer.module, layer.names[0], kept24(layer.whole(), layer.dim))

    def _pruned(self) -> list["_Layer"]:
        """Give the layers that still are: a module may be reverted, merged, or have got another recipe since."""
        return [layer for layer in self._networks if layer.is_pruned()]

    @torch.no_grad()
    def settle_(self) -> None:
        """Write the weights as they enter the products into the parameters, and forget masks and scales. In place.

        The network is the same then, dense or sparse. What was pruned is zero, and learns again in a dense phase. The
        optimizer's state stays. A sparse phase that follows finds masks and scales anew. Networks may share a weight
        that all of them prune, along the same groups.
        """
        for layer in self._writers():
            layer.stored().parameter.copy_(layer.as_stored(layer.entering()))
        for layer in self._networks:
            entering_weights.drop(layer.module, layer.names)
        self._begun = False

    def _writers(self) -> list["_Layer"]:
        """Give one layer for each parameter that is pruned, and see to it that what shares it is pruned alike."""
        sharing: dict[int, list[_Layer]] = {}
        for layer in self._pruned():
            sharing.setdefault(_memory(layer.stored().parameter), []).append(layer)
        parameters = [p for module in self._model.modules() for p in module._parameters.values() if p is not None]
        users = Counter(map(_memory, parameters))
        for memory, layers in sharing.items():
            if users[memory] > len(layers) or len({layer.groups() for layer in layers}) > 1:
                what = "weights that are written to to be pruned alike wherever they are shared (or settle=False)"
                fail("WeightPruning", what, "tied ones")
        return [layers[0] for layers in sharing.values()]

    @torch.no_grad()
    def decay_(self, learning_rate: float = 1.0) -> None:
        """Apply the decay of what is pruned: after the backward passes and the clipping, before the optimizer's step.

        Parameters
        ----------
        learning_rate : float
            With decay_of="weights": that of the step.
        """
        learning_rate = finite_number("WeightPruning", "learning_rate", learning_rate)
        if not self.decay:
            return
        sparse = [layer for layer in self._pruned() if layer.module.sparse]
        once = {(_memory(layer.stored().parameter), layer.groups()): layer for layer in sparse}  # where it is shared
        for layer in once.values():
            w = layer.stored().parameter
            rest = torch.where(layer.as_stored(layer.keep()), torch.zeros_like(w), w)
            if self.decay_of == "weights":
                w.sub_(rest, alpha=self.decay * learning_rate)
            elif w.grad is not None:
                w.grad.add_(rest.to(w.grad.dtype), alpha=self.decay)

    @torch.no_grad()
    def flip_rate(self) -> float:
        """Tell which share of the entries is pruned now and was not at the last call, or the other way round.

        It waits for the device, and keeps a mask of every weight from one call to the next. 0 at the first call. FST
        takes it for the health of a run: it should rise, then fall as masks settle.
        """
        flips, entries = [], 0
        for number, layer in enumerate(self._networks):
            if not layer.is_pruned():
                continue
            keep = layer.keep()
            before = self._seen.get(number)
            if before is not None:
                flips.append((keep != before).sum())
                entries += keep.numel()
            self._seen[number] = keep.clone()
        return (torch.stack([count.cpu() for count in flips]).sum() / entries).item() if flips else 0.0

    def remove(self) -> None:
        """Remove masks and scales: from then on the recipe alone prunes."""
        for layer in self._networks:
            entering_weights.drop(layer.module, layer.names)
        self.steps, self._begun = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs: the steps, masks and scales."""
        buffers = [
            {name: layer.module._buffers[name] for name in layer.names if name in layer.module._buffers}
            for layer in self._networks
        ]
        return {"steps": self.steps, "begun": self._begun, "buffers": buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up again, of the same model."""
        if not isinstance(state, Mapping):
            fail("WeightPruning", "a state that state_dict gave", type_name(state))
        missing = [name for name in ("steps", "buffers") if state.get(name) is None]
        if missing:
            fail("WeightPruning", "a state that state_dict gave", f"one without {missing[0]}")
        if len(state["buffers"]) != len(self._networks):
            fail("WeightPruning", f"a state of {len(self._networks)} weights", len(state["buffers"]))
        for layer, buffers in zip(self._networks, state["buffers"], strict=True):
            wanted = dict(zip(layer.names, ((torch.bool, layer.shape()), (torch.float32, [1])), strict=True))
            for name, value in buffers.items():
                if name not in wanted:
                    fail("WeightPruning", f"a state of {' and '.join(wanted)}", name)
                dtype, shape = wanted[name]
                if list(value.shape) != shape:
                    fail("WeightPruning", f"a state of weights of shape {shape}", list(value.shape))
                if value.dtype != dtype:
                    fail("WeightPruning", f"{name} to be {dtype_name(dtype)}", dtype_name(value.dtype))
        self.steps, self._begun = state["steps"], state.get("begun", state["steps"] > 0)
        for layer, buffers in zip(self._networks, state["buffers"], strict=True):
            entering_weights.drop(layer.module, set(layer.names) - buffers.keys())
            for name, value in buffers.items():
                entering_weights.put(layer.module, name, value.to(layer.stored().parameter.device))


class _Layer:
    """One 2:4 weight of a module: a parameter, and in which orientation it enters the products."""

    def __init__(self, module: Any, index: int, dim: int) -> None:
        self.module, self.index, self.dim = module, index, dim
        self.experts = self.stored().parameter.dim() == 3
        self.names = entering_weights.KEEP[index], entering_weights.SOFT[index]

    def is_pruned(self) -> bool:
        """Whether the module's recipe says so as it did."""
        return any((self.index, self.dim) == way for way in _ways(self.module))

    def stored(self) -> entering_weights.Stored:
        """Look it up: it may have been replaced."""
        found: entering_weights.Stored = self.module._stored_weights()[self.index]
        return found

    def whole(self) -> Tensor:
        """Return all of it, also where it is sharded, as it enters."""
        w, transposed = self.stored()
        w = w.detach()
        w = w.full_tensor() if hasattr(w, "full_tensor") else w
        return w.t() if transposed else w

    def groups(self) -> int:
        """Tell how far apart in memory the entries of a group are, which tied weights prune alike or not."""
        w, transposed = self.stored()
        return (w.t() if transposed else w).stride(self.dim)

    def shape(self) -> list[int]:
        """Return that of all of it, as it enters."""
        w, transposed = self.stored()
        return list(w.shape[::-1] if transposed else w.shape)

    def keep(self) -> Tensor:
        """Tell which entries the next step keeps."""
        kept = self.module._buffers.get(entering_weights.KEEP[self.index])
        return kept24(self.whole(), self.dim) if kept is None else kept

    def entering(self) -> Tensor:
        """Give the whole weight as a sparse step multiplies it."""
        keep, scale = (self.module._buffers.get(name) for name in self.names)
        w = self.whole()
        if scale is not None:
            return soft_threshold24(w, self.dim, scale)
        return prune24(w, self.dim) if keep is None else masked(w, keep)

    def as_stored(self, whole: Tensor) -> Tensor:
        """Lay a matrix as the parameter lies: transposed, sharded."""
        w, transposed = self.stored()
        whole = whole.t() if transposed else whole
        if not hasattr(w, "full_tensor"):
            return whole
        from torch.distributed.tensor import distribute_tensor  # heavy

        return distribute_tensor(whole, w.device_mesh, w.placements)


def _memory(w: Tensor) -> int:
    """Tell parameters apart: tied ones may be several of the same memory."""
    plain = type(w) in (Tensor, nn.Parameter) and not w.is_meta and w.numel() > 0
    return w.data_ptr() if plain else id(w)


def _ways(module: Any) -> list[tuple[int, int]]:
    """Tell which weights of a module are pruned, and along which dimension."""
    recipe = module._recipe_in_use() if hasattr(module, "_recipe_in_use") else None  # one that was reverted has none
    if recipe is None or recipe.sparse_weights == "none":
        return []
    experts = [stored.parameter.dim() == 3 for stored in module._stored_weights()]
    dims = (-1 - i if experts[i] and dim is not None else dim for i, dim in enumerate(recipe.weight_groups()))
    return [(i, dim) for i, dim in enumerate(dims) if dim is not None]


def _pruned_layers(module: Any) -> list[_Layer]:
    layers = [_Layer(module, index, dim) for index, dim in _ways(module)]
    return [layer for layer in layers if not (layer.experts and layer.stored().parameter.dtype == FP8)]
