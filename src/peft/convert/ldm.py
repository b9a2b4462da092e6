"""The names that the original code of Stable Diffusion (and sd-scripts for its XL) gives the modules of a UNet.

    input_blocks.N.0 resnet, .1 attention;  middle_block.0, .1, .2;  output_blocks.N.0, .1, then the upsampler

N counts the resnets, and the downsamplers among the input blocks, from the first to the last block. So the names follow
from the structure of the UNet, which its modules' names in diffusers tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ..core.entries import join

WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_names(modules: Collection[str]) -> dict[str, str]:
    """{name in the original code: name in diffusers} of a UNet's modules; nothing for other models."""
    if "conv_in" not in modules or not any(m.startswith("down_blocks.") for m in modules):
        return {}
    places = dict(_places(modules))
    found = {old: new for new, old in WHOLE.items() if new in modules}
    for module in modules:
        home = next((p for p in places if f"{module}.".startswith(p + ".")), None)
        if home is not None:
            rest = module[len(home) + 1 :]
            found[join(places[home], RESNET.get(rest, rest) if ".resnets." in home else rest)] = module
    return found


def _places(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """(prefix in diffusers, prefix in the original code) of every resnet, attention and change of size."""
    n = 1
    for block in _numbered(modules, "down_blocks"):
        for j in _numbers(modules, f"{block}.resnets"):
            yield f"{block}.resnets.{j}", f"input_blocks.{n}.0"
            yield f"{block}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        if _numbers(modules, f"{block}.downsamplers"):
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
            n += 1
    for old, new in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{new}", f"middle_block.{old}"
    n = 0
    for block in _numbered(modules, "up_blocks"):
        attends = bool(_numbers(modules, f"{block}.attentions"))
        for j in _numbers(modules, f"{block}.resnets"):
            yield f"{block}.resnets.{j}", f"output_blocks.{n}.0"
            yield f"{block}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        yield f"{block}.upsamplers.0", f"output_blocks.{n - 1}.{1 + attends}"


def _numbered(modules: Collection[str], name: str) -> list[str]:
    return [f"{name}.{i}" for i in _numbers(modules, name)]


def _numbers(modules: Collection[str], name: str) -> list[int]:
    """The numbers of a list's items."""
    rest = {m[len(name) + 1 :].partition(".")[0] for m in modules if m.startswith(name + ".")}
    return sorted(int(r) for r in rest if r.isdigit())
