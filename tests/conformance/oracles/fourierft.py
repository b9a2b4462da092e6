"""FourierFT: the transform as a sum of waves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft import FourierFTConfig
from peft.core.layer import BaseTunerLayer

from .row import Row, on_matrix

COUNT, SCALING, SEED = 7, 12.0, 5


@on_matrix
def fourierft(t: dict[str, Tensor], W: Tensor, layer: BaseTunerLayer) -> Tensor:
    out, inp = W.shape[-2:]
    places = torch.randperm(out * inp, generator=torch.Generator().manual_seed(SEED))[:COUNT].tolist()
    row, column = torch.arange(out).double()[:, None], torch.arange(inp).double()
    waves = [torch.cos(2 * math.pi * (at // inp * row / out + at % inp * column / inp)) for at in places]
    return W + SCALING / (out * inp) * torch.einsum("...n,noi->...oi", t["fourierft_spectrum"], torch.stack(waves))


FIELDS = {"n_frequency": COUNT, "scaling": SCALING, "random_loc_seed": SEED, "init_weights": True}
ROWS = {"fourierft": Row(FourierFTConfig, FIELDS, fourierft, prefix="fourierft_", noise=1.0)}
