"""Why a file of one library does not give the same in the other: where one contradicts itself, or knows more.

Each line: methods and places as shell patterns with commas between, and the reason. The first that fits counts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

CONVOLUTIONS = "Conv1d, Conv2d*, Conv3d"

REASONS: list[tuple[str, str, str]] = [
    ("oft*", CONVOLUTIONS, "There the forward of a convolution is not that of its merged weight; here it is."),
    ("oft:coft", "*", "There a forward projects the trained tensors anew, which rounds them once more."),
    ("boft, hra", "Conv2d dilated", "There dilation is ignored."),
    ("lora:lora_bias", "MultiheadAttention", "There the bias of the update is saved and has no effect."),
    ("lora:pissa*, lora:olora", "Embedding", "There an embedding starts as with True, whatever the start is called."),
    ("lora:olora", "Conv1D*", "There the start is that of the transposed weight, so that the model is changed by it."),
    (
        "lora:pissa_niter*", "*",
        "There the first factors are drawn anew at each load, and saved nowhere: the file holds half of the answer.",
    ),
    (
        "lora:corda, lora:lora_ga", "*",
        "There the first factors come from data at each load; here they are in the file as well.",
    ),
    ("lora:eva", "Parameter*", "There the file names the parameter's module as a layer, and loads nowhere."),
    ("xlora", "*", "There an X-LoRA model is not the same after loading."),
]  # fmt: skip


def reason(method: str, where: str) -> str | None:
    """Why this method differs at this place; None if it must be the same."""

    def fits(name: str, patterns: str) -> bool:
        return any(fnmatchcase(name, p.strip()) for p in patterns.split(","))

    return next((text for rows, places, text in REASONS if fits(method, rows) and fits(where, places)), None)
