"""How each method is set up for a comparison: its configuration and a learning rate that suits it.

The learning rates belong to AdamW with a linear rise and fall over a few hundred steps; they were chosen by experience
on sentence encoders and are no search. `--lr-scale` moves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One line of the comparison.

    Arguments:
        config: class name of the configuration; None trains the model itself.
        lr: the highest learning rate.
        settings: arguments of the configuration.
        targets: "all-linear", "norms" for all normalisations, or None for the method's own choice.
        tasks: whether its forward wants the number of a task.
        whole: of the model itself, train everything, not the head alone.
    """

    config: str | None
    lr: float
    settings: dict[str, Any] = field(default_factory=dict)
    targets: str | None = "all-linear"
    tasks: bool = False
    whole: bool = False


def _lora(lr: float, **more: Any) -> Recipe:
    return Recipe("LoraConfig", lr, {"r": 8, "lora_alpha": 16, **more})


def _prompt(config: str, lr: float, **more: Any) -> Recipe:
    return Recipe(config, lr, {"num_virtual_tokens": 8, **more}, targets=None)


# Learning rates changed after a look at the held-out accuracy of a first run: {method: the rates tried before}.
ADJUSTED = {"miss": (2e-3, 1e-2), "randlora": (5e-3,), "waveft": (5e-3,)}

RECIPES: dict[str, Recipe] = {
    "full": Recipe(None, 3e-4, whole=True),
    "head": Recipe(None, 1e-2),
    "lora": _lora(2e-3),
    "rslora": _lora(1e-3, use_rslora=True),
    "dora": _lora(2e-3, use_dora=True),
    "pissa": _lora(1e-3, init_lora_weights="pissa"),
    "olora": _lora(5e-4, init_lora_weights="olora"),
    "adalora": Recipe("AdaLoraConfig", 5e-3, {"init_r": 12, "target_r": 8, "lora_alpha": 16}),
    "loha": Recipe("LoHaConfig", 5e-3, {"r": 8, "alpha": 16}),
    "lokr": Recipe("LoKrConfig", 5e-3, {"r": 8, "alpha": 16}),
    "vera": Recipe("VeraConfig", 2e-2, {"r": 128}),
    "randlora": Recipe("RandLoraConfig", 3e-4, {"r": 16, "randlora_alpha": 320}),
    "vblora": Recipe("VBLoRAConfig", 1e-2, {"r": 4, "num_vectors": 128, "vector_length": 64}),
    "delora": Recipe("DeloraConfig", 5e-3, {"r": 8, "delora_lambda": 15}),
    "gralora": Recipe("GraloraConfig", 2e-3, {"r": 8, "gralora_k": 2, "alpha": 16}),
    "miss": Recipe("MissConfig", 5e-4, {"r": 8}),
    "fourierft": Recipe("FourierFTConfig", 1e-2, {"n_frequency": 1000, "scaling": 100.0}),
    "waveft": Recipe("WaveFTConfig", 2e-4, {"n_frequency": 2592, "scaling": 25.0}),
    "c3a": Recipe("C3AConfig", 1e-2, {"block_size": 32}),
    "shira": Recipe("ShiraConfig", 2e-3, {"r": 8}),
    "oft": Recipe("OFTConfig", 2e-3, {"oft_block_size": 32}),
    "boft": Recipe("BOFTConfig", 2e-3, {"boft_block_size": 8, "boft_n_butterfly_factor": 2}),
    "hra": Recipe("HRAConfig", 2e-3, {"r": 8}),
    "road": Recipe("RoadConfig", 1e-2, {"variant": "road_1"}),
    "poly": Recipe("PolyConfig", 2e-3, {"r": 8, "n_tasks": 1, "n_skills": 2, "n_splits": 1}, tasks=True),
    "ia3": Recipe("IA3Config", 1e-2, {}, targets=None),
    "ln_tuning": Recipe("LNTuningConfig", 1e-2, {}, targets="norms"),
    "prompt_tuning": _prompt("PromptTuningConfig", 2e-2),
    "p_tuning": _prompt("PromptEncoderConfig", 2e-3, encoder_hidden_size=128),
    "prefix_tuning": _prompt("PrefixTuningConfig", 2e-2),
}


def config_of(name: str, steps: int, head: Sequence[str], model: Any) -> Any:
    """The configuration of a recipe for a classifier; None where the model itself is trained.

    Arguments:
        name: of the recipe.
        steps: of the training, which a schedule of ranks needs.
        head: names of the modules that are trained as a whole.
        model: the classifier.
    """
    import peft

    recipe = RECIPES[name]
    if recipe.config is None:
        return None
    kind = getattr(peft, recipe.config)
    given: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": list(head), **recipe.settings}
    if recipe.targets is not None:
        norms = {path.rpartition(".")[2] for path, m in model.named_modules() if "Norm" in type(m).__name__}
        given["target_modules"] = sorted(norms) if recipe.targets == "norms" else recipe.targets
    if "total_step" in kind.__dataclass_fields__:
        given.update(total_step=steps, tinit=steps // 10, tfinal=steps // 4)
    known = kind.__dataclass_fields__
    return kind(**{k: v for k, v in given.items() if k in known})
