"""Layers whose forward other modules take: what the ``kernels`` package of Hugging Face calls the layers of a kernel.

Such a layer has no state of its own. Its forward runs with the module it is given to as `self`, and reads that module's
children.
"""

from torch import Tensor, nn

from sparse24.mlp import relu2_mlp


class ReLU2MLP(nn.Module):
    """The forward of modules that compute ``down_proj(max(up_proj(x), 0)^2)``.

    Such are the networks of Nemotron, AFM (arcee) and Jais-2 in transformers. Which activation the module has is not
    looked at: `sparse24.convert` finds networks and looks.
    """

    can_torch_compile = True
    has_backward = True

    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Compute `sparse24.relu2_mlp` of the weights and biases of the two children."""
        up, down = self.up_proj, self.down_proj
        return relu2_mlp(x, up.weight, down.weight, up.bias, down.bias)
