"""What the tests of storages share: classes under foreign names, and modules around one layer."""

import torch
from torch import nn


def qualified(kind, module, name):
    """Give a class the full name under which a library would have it."""
    kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
    return kind


class Net(nn.Module):
    """One layer, called `layer`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def same_state(one, other):
    """Whether two state dicts hold the same bits under the same names."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(bits(one[k]), bits(other[k])) for k in one
    )


def bits(t):
    """A tensor as bytes."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8)
