"""Why a cell is not "yes": what the mathematics, or the method's definition, forbids.

Each line: methods and columns as shell patterns with commas between, and the reason. The first line that fits counts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

PROMPTS = "prompt_tuning, prefix_tuning, p_tuning, multitask_prompt_tuning, cpt, cartridge"
INPUT_PROMPTS = "prompt_tuning, p_tuning, multitask_prompt_tuning, cpt"
BASE_WEIGHT = "lora:pissa*, lora:olora, lora:orthogonal, lora:corda, lora:lora_ga, lora:loftq, lora:eva"
LAYERS = ", ".join(["Linear", "Conv*", "Embedding", "MultiheadAttention", "LayerNorm", "BatchNorm1d", "Parameter*"])
WEIGHTS = ", ".join(
    [
        "merge*", "safe merge", "unmerge*", "convert to LoRA", "add_weighted_adapter", "DoRA*", "bias",
        "per-module pattern", "layer_replication", "PeftMixedModel", "two active together",
    ]
)  # fmt: skip

REASONS: list[tuple[str, str, str]] = [
    (f"{PROMPTS}, adaption_prompt", LAYERS, "Works on a whole language model, not on a layer."),
    ("lora:alora, lora:arrow, xlora, shadow", LAYERS, "Tried on a language model: what it does depends on the text."),
    ("ln_tuning", LAYERS, "Its targets are normalisations."),
    ("*", "LayerNorm, BatchNorm1d", "A normalisation has no matrix; LN tuning trains it."),
    (f"{PROMPTS}, adaption_prompt", WEIGHTS, "Adds tokens or attention, and no weight, so there is nothing to merge."),
    (INPUT_PROMPTS, "base output at init, mixed batch*", "Virtual tokens in front of the text lengthen the output."),
    ("prefix_tuning, cartridge", "base output at init", "The model attends to the new keys from the start."),
    ("c3a, fourierft, vblora, unilora", "base output at init", "The method's definition starts away from the base."),
    ("lora:loftq", "base output at init", "It starts at the quantised base and a correction of its error."),
    ("ln_tuning", "two active together", "Copies of one layer cannot both be used."),
    ("ln_tuning", "convert to LoRA, add_weighted_adapter, DoRA*", "Replaces a normalisation; there is no update."),
    ("ln_tuning, trainable_tokens", "per-module pattern", "It has no setting that one module could have."),
    ("ia3, oft*, boft, hra, road*, miss:bat", "DoRA*", "DoRA works over updates that are added to the weight."),
    ("trainable_tokens", "DoRA*, bias", "Rows of a table are replaced; there is no update, and no bias."),
    ("lora:dora", "DoRA*", "The row is DoRA itself."),
    ("lora:lora_bias", "DoRA*", "The paper has no bias of the update: whether the magnitude scales it is open."),
    ("lora:lora_bias", "Embedding, Parameter*", "The layer has no bias that could hold it."),
    (BASE_WEIGHT, "Conv2d grouped", "LoRA's factors read all channels there; the start has no such kernel."),
    ("poly, lora:alora, lora:arrow, xlora", "merge*, safe merge, unmerge*, convert to LoRA, add_weighted_adapter",
     "The update depends on the input (or the task), so no weight holds it."),
    ("poly", "MultiheadAttention, Parameter*", "The module reads one weight for the batch; Poly has one a sample."),
    ("poly", "DoRA*", "The magnitude belongs to one weight; Poly has another for each sample."),
]  # fmt: skip


def reason(row: str, column: str) -> str | None:
    """Why a method has no ability; None if nothing forbids it."""

    def fits(name: str, patterns: str) -> bool:
        return any(fnmatchcase(name, p.strip()) for p in patterns.split(","))

    return next((text for rows, columns, text in REASONS if fits(row, rows) and fits(column, columns)), None)
