"""Every option of the command line, declared once: name, type, default, help and the group it is shown in.

The command line, its `--help` and the checks are made from these dataclasses; scripts fill them in directly.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

GROUPS = DATA, METHOD, TRAINING, RUN = "Model and data", "Method", "Training", "Run"
ARGUMENT = ("ARGUMENT",)  # in place of flags: the value stands by itself


def option(help: str, group: str, default: Any = MISSING, *flags: str) -> Any:
    """A dataclass field with its help text; required without `default`; `flags` if they differ from the name."""
    return field(default=default, metadata={"help": help, "group": group, "flags": flags})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What every command that reads examples needs."""

    data: str = option("A .jsonl, .csv or .parquet file, or a hub data set (ORG/NAME or ORG/NAME:split).", DATA)
    prompt_column: str | None = option("Column of the prompt. Default: found by name.", DATA, None)
    answer_column: str | None = option("Column of the answer. Default: found by name.", DATA, None)
    text_column: str | None = option("Column of whole texts, instead of prompt and answer.", DATA, None)
    template: str | None = option(
        "What surrounds a prompt: text with {prompt} in it, or 'chat' for the tokenizer's template. "
        "Kept with the adapter.",
        DATA,
        None,
    )
    max_length: int = option("Longest example in tokens; longer prompts lose their beginning.", DATA, 512)
    batch: int = option("Examples per step and device.", TRAINING, 8)
    dtype: str = option("Of the base model: auto, fp32 or bf16. Adapters are fp32.", RUN, "auto")


AS_TRAINED = "Base model's weights as in `peft train`, or none. Default: as the adapter was trained."


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Options of `peft train`."""

    model: str = option("Folder of a transformers model, or its hub id.", DATA)
    output: Path = option("Folder for the adapter, its log and the loss curve.", RUN)  # noqa: RUF009
    eval_data: str | None = option("Held-out examples, measured before and after.", DATA, None)
    eval_split: str | None = option("Hold out a part: a fraction (0.1), or a split of the hub data set.", DATA, None)
    method: str = option("Fine-tuning method.", METHOD, "lora")
    r: int = option("Rank of the update.", METHOD, 8, "--r", "--rank")
    alpha: float | None = option("Scale of the update is alpha / r. Default: 2 x r.", METHOD, None)
    target: str = option("Layers to adapt: all-linear, or names with commas (q_proj,v_proj).", METHOD, "all-linear")
    dropout: float = option("Dropout before the update.", METHOD, 0.0)
    dora: bool = option("Learn magnitude and direction apart (DoRA).", METHOD, False, "--dora")
    rslora: bool = option("Scale by alpha / sqrt(r) instead of alpha / r.", METHOD, False, "--rslora")
    init: str = option("First weights: default, gaussian, orthogonal, pissa, pissa_niter_N, olora.", METHOD, "default")
    epochs: float | None = option("Passes over the data. Default: 1, if --steps is not given.", TRAINING, None)
    steps: int | None = option("Number of optimizer steps, instead of --epochs.", TRAINING, None)
    grad_accum: int = option("Batches per optimizer step.", TRAINING, 1)
    lr: float = option("Highest learning rate (cosine decay).", TRAINING, 2e-4)
    warmup: float = option("Rising part: a fraction of the steps if below 1, else a number of steps.", TRAINING, 0.1)
    seed: int = option("Fixes the order of the examples, the first weights and dropout.", TRAINING, 0)
    quantize: str | None = option(
        "Base model's weights in few bits (QLoRA): nf4, fp4, int8 (bitsandbytes), int8-torchao, int4-torchao, "
        "float8-torchao, hqq4, hqq8.",
        TRAINING,
        None,
    )
    gradient_checkpointing: bool = option(
        "Less memory, a third more time.", TRAINING, False, "--gradient-checkpointing"
    )
    resume: bool = option("Insist on a saved state (without it, one is used if present).", RUN, False, "--resume")
    overwrite: bool = option("Start again where OUTPUT holds an earlier run.", RUN, False, "--overwrite")
    dry_run: bool = option("Print the plan and the trainable parameters, then stop.", RUN, False, "--dry-run")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(DataOptions):
    """Options of `peft eval`."""

    adapter: Path = option("Folder written by `peft train` or `save_pretrained`.", DATA)  # noqa: RUF009
    model: str | None = option("Base model. Default: the one named in the adapter.", DATA, None)
    limit: int | None = option("Use only the first examples.", DATA, None)
    batch: int = option("Examples at a time on each device.", RUN, 8)
    quantize: str | None = option(AS_TRAINED, RUN, None)
    base_only: bool = option("Measure the base model without the adapter.", RUN, False, "--base-only")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `peft generate`."""

    adapter: Path = option("Folder written by `peft train` or `save_pretrained`.", DATA)  # noqa: RUF009
    prompt: str = option("The prompt; - reads it from standard input.", DATA)
    model: str | None = option("Base model. Default: the one named in the adapter.", DATA, None)
    template: str | None = option("As in `peft train`. Default: the one kept with the adapter.", DATA, None)
    max_new_tokens: int = option("Longest answer in tokens.", RUN, 64)
    temperature: float = option("0 takes the likeliest token; higher values sample.", RUN, 0.0)
    seed: int = option("Fixes sampling.", RUN, 0)
    dtype: str = option("Of the base model: auto, fp32 or bf16.", RUN, "auto")
    quantize: str | None = option(AS_TRAINED, RUN, None)
    base_only: bool = option("Answer with the base model, to compare.", RUN, False, "--base-only")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of `peft compare`."""

    model: str = option("Folder of a transformers encoder, or its hub id.", DATA)
    data: str = option("Labelled texts: a .jsonl, .csv or .parquet file, or a hub data set.", DATA)
    output: Path = option("Folder for the results; finished methods are not run again.", RUN)  # noqa: RUF009
    eval_data: str | None = option("Held-out texts.", DATA, None)
    eval_split: float = option("Without --eval-data: the share of the texts to hold out.", DATA, 0.2)
    text_column: str | None = option("Column of the texts. Default: found by name.", DATA, None)
    label_column: str | None = option("Column of the classes. Default: found by name.", DATA, None)
    max_length: int = option("Longest text in tokens; the rest is cut off.", DATA, 64)
    methods: str = option("Names with commas, or all. The frozen probe is always there.", METHOD, "all")
    lr_scale: float = option("Multiplies the learning rate of every method.", TRAINING, 1.0)
    steps: int = option("Optimizer steps of each method.", TRAINING, 250)
    batch: int = option("Texts per step.", TRAINING, 32)
    seed: int = option("Fixes the order of the texts, the first weights and dropout.", TRAINING, 0)
    dtype: str = option("Of the base model: auto, fp32 or bf16.", RUN, "fp32")
    report: Path | None = option("Markdown file for the table. Default: OUTPUT/comparison.md.", RUN, None)  # noqa: RUF009
    overwrite: bool = option("Forget the results in OUTPUT.", RUN, False, "--overwrite")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `peft convert`."""

    adapter: Path = option("An adapter's folder, or a file of kohya or diffusers.", DATA, MISSING, *ARGUMENT)  # noqa: RUF009
    to: str = option("Format: lora, peft, kohya, diffusers, vllm, sglang, lorax or gguf.", RUN)
    out: Path = option("Folder or file to write.", RUN)  # noqa: RUF009
    source: str | None = option("Format of ADAPTER. Default: told by its tensors.", DATA, None, "--from")
    base: Path | None = option("Folder of the base model, where names or updates depend on it.", DATA, None)  # noqa: RUF009
    component: str | None = option("Model of a pipeline: unet, transformer, text_encoder ...", DATA, None)
    rank: str | None = option(
        "To write an update as a LoRA: its rank (16), or the share of its squared norm to keep (0.9999).", METHOD, None
    )
    drop: bool = option("Leave out what the format cannot hold, and name it.", RUN, False, "--drop")
    overwrite: bool = option("Replace files that exist.", RUN, False, "--overwrite")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `peft inspect`."""

    adapter: str = option("An adapter's folder, or its hub id.", DATA, MISSING, *ARGUMENT)
    json: bool = option("Print all of it as JSON.", RUN, False, "--json")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `peft check`."""

    adapter: str = option("An adapter's folder, or its hub id.", DATA, MISSING, *ARGUMENT)
    base: Path = option("Folder of the base model; no weight of it is read.", DATA)  # noqa: RUF009
    json: bool = option("Print all of it as JSON.", RUN, False, "--json")


@dataclass(frozen=True, kw_only=True)
class ForesightOptions:
    """What `peft plan` and `peft estimate` have in common."""

    model: str = option(
        "Folder of a transformers model, or its hub id; its configuration is read, no weight.", DATA, MISSING, *ARGUMENT
    )
    adapter: str | None = option("Folder of an adapter, whose configuration is taken.", METHOD, None)
    method: str | None = option("Any method: lora, ia3, oft ... Default: lora.", METHOD, None)
    target: str | None = option("Layers to adapt, as in `peft train`. Default: the usual ones.", METHOD, None)
    setting: list[str] | None = option(  # noqa: RUF009
        "A further setting of the method, NAME=VALUE, such as r=16 or use_dora=true; repeat it for more.",
        METHOD,
        None,
        "--set",
    )
    json: bool = option("Print all of it as JSON.", RUN, False, "--json")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(ForesightOptions):
    """Options of `peft plan`."""


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(ForesightOptions):
    """Options of `peft estimate`."""

    batch: int = option("Examples per step.", TRAINING, 1)
    seq: int = option("Tokens of each.", TRAINING, 512)
    optimizer: str = option("adamw, sgd, adamw_8bit or adafactor.", TRAINING, "adamw")
    gradient_checkpointing: bool = option(
        "Compute activations again in the backward pass.", TRAINING, False, "--gradient-checkpointing"
    )
    inference: bool = option("Of a forward in evaluation.", RUN, False, "--inference")
    dtype: str = option("Of the base model: auto (the model's own), fp32, bf16 or fp16.", RUN, "auto")
    quantize: str | None = option("Base model's weights in few bits: nf4, fp4 or int8.", RUN, None)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of `peft merge`."""

    base: Path = option("Folder of the base model, in safetensors.", DATA)  # noqa: RUF009
    adapter: list[str] = option("Folder of an adapter; give several in the order of merging.", DATA)  # noqa: RUF009
    out: Path = option("New folder for the merged model.", RUN)  # noqa: RUF009
    weight: list[float] | None = option("Multiplies what an adapter adds; one for each.", METHOD, None)  # noqa: RUF009
