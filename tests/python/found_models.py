"""Networks whose layers have other names than usual, and modules that are none."""

import torch
import torch.nn.functional as F
from convert_models import HIDDEN, D, SquaredReLU, relu2
from torch import nn


class TwoLayers(nn.Module):
    """Layers of any two names, in any order."""

    def __init__(self, names=("w1", "w2"), *, d=D, hidden=HIDDEN, d_out=None, bias=(True, True), reverse=False):
        super().__init__()
        self.names, self.activation = names, relu2
        layers = [nn.Linear(d, hidden, bias[0]), nn.Linear(hidden, d if d_out is None else d_out, bias[1])]
        pairs = list(zip(names, layers, strict=True))
        for name, layer in reversed(pairs) if reverse else pairs:
            setattr(self, name, layer)

    def forward(self, x):
        up, down = (getattr(self, name) for name in self.names)
        return down(self.activation(up(x)))


class InList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)])
        self.activation = relu2

    def forward(self, x):
        return self.layers[1](self.activation(self.layers[0](x)))


class Parameters(nn.Module):
    """Weights are parameters, either of which may be stored as it multiplies from the right."""

    def __init__(self, up_transposed, down_transposed):
        super().__init__()
        self.transposed, self.activation = (up_transposed, down_transposed), relu2
        self.w_in = nn.Parameter(torch.randn((D, HIDDEN) if up_transposed else (HIDDEN, D)))
        self.w_out = nn.Parameter(torch.randn((HIDDEN, D) if down_transposed else (D, HIDDEN)))

    def forward(self, x):
        up, down = self.transposed
        return self.activation(x @ (self.w_in if up else self.w_in.t())) @ (self.w_out if down else self.w_out.t())


class WithBiases(Parameters):
    """Biases are parameters too, of either layer or of both, in any order."""

    def __init__(self, which, hidden=HIDDEN, transposed=(False, False)):
        super().__init__(*transposed)
        if hidden != HIDDEN:
            self.w_in, self.w_out = (nn.Parameter(torch.randn(hidden, hidden)) for _ in range(2))
        sizes = {"b_in": hidden, "b_out": D}
        for name in which:
            setattr(self, name, nn.Parameter(torch.randn(sizes[name])))

    def forward(self, x):
        up, down = self.transposed
        h = F.linear(x, self.w_in.t() if up else self.w_in, getattr(self, "b_in", None))
        return F.linear(self.activation(h), self.w_out.t() if down else self.w_out, getattr(self, "b_out", None))


class Shifted(WithBiases):
    """Its parameters have the sizes of biases."""

    def forward(self, x):
        return super().forward(x + self.b_out)


class LearnedScale(Parameters):
    def __init__(self):
        super().__init__(False, False)
        self.b_out = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return super().forward(x) * self.b_out


class WithThird(WithBiases):
    def __init__(self, which):
        super().__init__(which)
        self.third = nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return super().forward(x) + self.third


class Optional(TwoLayers):
    def forward(self, x, mask=None):
        out = super().forward(x)
        return out if mask is None else out * mask


class WithMask(TwoLayers):
    def forward(self, x, mask):
        out = super().forward(x)
        return out if mask is None else out * mask


class Scaled(TwoLayers):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Attention(nn.Module):
    """Two layers, whose sizes fit in the other order."""

    def __init__(self, d=D):
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class ReLUSquared(SquaredReLU):
    """Under the name that x-transformers has for it."""


def feed_forward(dropout=0.0):
    """As x-transformers builds it."""
    up = nn.Sequential(nn.Linear(D, HIDDEN), ReLUSquared())
    return nn.Sequential(up, nn.Dropout(dropout), nn.Linear(HIDDEN, D, bias=False))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(D, 4, HIDDEN, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
