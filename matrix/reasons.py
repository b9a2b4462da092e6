"""Why a cell is not "yes": what the mathematics, or the method's definition, forbids.

Each line: methods and columns as shell patterns with commas between, and the reason. The first line that fits counts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

PROMPTS = "prompt_tuning, prefix_tuning, p_tuning, multitask_prompt_tuning, cpt, cartridge"
IN_FRONT = "prompt_tuning, p_tuning, multitask_prompt_tuning, cpt"
CACHED = "prefix_tuning, cartridge"
WHOLE = f"{PROMPTS}, adaption_prompt"
LAYERS = "Linear, Conv*, Embedding, MultiheadAttention, LayerNorm, BatchNorm1d, Parameter*"
UNCUT = "lora:pissa*, lora:olora, lora:orthogonal, lora:corda, lora:lora_ga, lora:loftq"
MERGING = "merge*, safe merge, unmerge*, convert to LoRA, add_weighted_adapter"
WEIGHTS = f"{MERGING}, DoRA*, bias, per-module pattern, layer_replication"
FILES = "save/load, low_cpu_mem_usage, hotswap, modules_to_save, per-module pattern, two adapters*"

REASONS: list[tuple[str, str, str]] = [
    (WHOLE, LAYERS, "Works on a whole language model, not on a layer."),
    ("lora:alora, lora:arrow, xlora, shadow", LAYERS, "Tried on a language model: what it does depends on the text."),
    ("ln_tuning", LAYERS, "Its targets are normalisations."),
    ("*", "LayerNorm, BatchNorm1d", "A normalisation has no matrix; LN tuning trains it."),
    (WHOLE, WEIGHTS, "Adds tokens, keys and values, or attention, and no weight."),
    (IN_FRONT, "base output at init", "Virtual tokens in front of the text lengthen the output."),
    (CACHED, "base output at init", "The model attends to the new keys from the start."),
    ("c3a, fourierft, vblora, unilora", "base output at init", "The method's definition starts away from the base."),
    ("lora:loftq", "base output at init", "It starts at the quantised base and a correction of its error."),
    ("lora:loftq", "*(bitsandbytes), *(torchao), hqq",
     "It quantises a dense base itself; replace_lora_weights_loftq starts on one that is quantised already."),
    ("lora:lora_ga", "*(bitsandbytes), *(torchao), hqq",
     "It starts from the gradient of the weight, and integers have none; measure on a base in floating point."),
    ("lora:kasa", "base output at init", "It starts without the least directions of the base."),
    ("lora:kasa", "two active together", "Each would take the same part out of the base."),
    ("ln_tuning", "two active together", "Copies of one layer cannot both be used."),
    ("ln_tuning", "convert to LoRA, DoRA*", "Replaces a normalisation; there is no matrix."),
    ("trainable_tokens", LAYERS, "Its targets have a row for each token: embeddings and linear layers."),
    ("trainable_tokens", "two active together", "Both adapters of the experiment set the same rows."),
    ("trainable_tokens", "DoRA*, bias", "Rows are replaced; there is no update, and no bias."),
    ("ln_tuning, trainable_tokens", "per-module pattern", "It has no setting that one module could have."),
    ("ia3, oft*, boft, hra, road*, miss:bat", "DoRA*", "DoRA works over updates that are added to the weight."),
    ("beft", "DoRA*", "Biases are learnt; there is no update of the weight."),
    ("unilora", "per-module pattern", "All layers share one vector out together, so its settings hold for all."),
    ("lora:dora", "DoRA*", "The row is DoRA itself."),
    (
        "lily", "MultiheadAttention, Parameter*",
        "The router reads the layer's input, which these modules do not hand to a weight.",
    ),
    ("lily", "mixed batch*", "Its router's mean is over the samples that run together; alone, a sample has another."),
    (
        "poly, lily, lora:alora, lora:arrow, xlora, shadow", "DoRA*",
        "Its W' differs from token to token, so there is no one norm.",
    ),
    (
        "beft, lora:lora_bias", "Parameter*",
        "Its module multiplies the parameter by itself: the product that a bias is added to is out of reach.",
    ),
    (
        "lora:corda", "Parameter*",
        "Its module multiplies the parameter by itself: the inputs that errors are weighed by are out of sight.",
    ),
    (UNCUT, "Conv2d grouped", "LoRA's factors read all channels there; the start has no such kernel."),
    (
        "poly, lily, lora:alora, lora:arrow, xlora, shadow", MERGING,
        "The update depends on the input (or the task), so no weight holds it.",
    ),
    ("lora:arrow, xlora", "base output at init", "It is built of trained experts."),
    ("xlora", "bias, layer_replication", "Biases and repeated layers are the experts' own, from their configurations."),
    ("xlora", "two*, mixed batch*, delete_adapter, hotswap",
     "One gate speaks for all experts of the model; the experts themselves switch, mix and swap."),
    ("lora:arrow, xlora", f"{FILES}, trains, bf16, fp16, gradient*, PeftMixedModel",
     "It is built of saved adapters; the router of Arrow has no weights of its own."),
]  # fmt: skip

# What the mathematics allows and this release does not do; these cells count as "no".
GAPS: list[tuple[str, str, str]] = []


def reason(row: str, column: str, lines: list[tuple[str, str, str]] = REASONS) -> str | None:
    """Why a method has no ability; None if nothing forbids it."""

    def fits(name: str, patterns: str) -> bool:
        return any(fnmatchcase(name, p.strip()) for p in patterns.split(","))

    return next((text for rows, columns, text in lines if fits(row, rows) and fits(column, columns)), None)
