"""Diffusion models and pipelines of a few thousand numbers, made from configurations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>", "d</w>", "e</w>", "f</w>"]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that a seed decides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], Any]) -> Any:
    """The same weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return make().eval()


def unet() -> nn.Module:
    """Convolutions and attention."""
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def flux() -> nn.Module:
    """Double and single blocks."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[2, 2, 4],
    )


def sd3() -> nn.Module:
    """Two streams of attention."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )


def pixart() -> nn.Module:
    """A plain diffusion transformer."""
    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )


INPUTS: dict[str, dict[str, Any]] = {
    "unet": {"sample": random(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": random(1, 5, 16)},
    "flux": {
        "hidden_states": random(1, 4, 16),
        "encoder_hidden_states": random(1, 3, 16),
        "pooled_projections": random(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": random(4, 3).abs(),
        "txt_ids": torch.zeros(3, 3),
    },
    "sd3": {
        "hidden_states": random(1, 4, 8, 8),
        "encoder_hidden_states": random(1, 3, 16),
        "pooled_projections": random(1, 32),
        "timestep": torch.tensor([5]),
    },
    "pixart": {
        "hidden_states": random(1, 4, 8, 8),
        "encoder_hidden_states": random(1, 3, 16),
        "timestep": torch.tensor([5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
}
MODELS: dict[str, Callable[[], nn.Module]] = {"unet": unet, "flux": flux, "sd3": sd3, "pixart": pixart}


def network(kind: str) -> Any:
    """A denoising model."""
    return seeded(MODELS[kind])


def denoised(model: Any, kind: str) -> Tensor:
    """What a model says."""
    with torch.no_grad():
        return model(**INPUTS[kind]).sample


def clip(projects: bool = False) -> Any:
    """A text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return seeded(lambda: (CLIPTextModelWithProjection if projects else CLIPTextModel)(config))


def t5() -> Any:
    """The other text encoder."""
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return seeded(lambda: T5EncoderModel(config))


def words() -> Any:
    """A tokenizer of eight words."""
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(WORDS)}, merges=[], model_max_length=16)


TARGETS = {
    "unet": ["to_q", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in", "time_emb_proj"],
    "flux": ["to_q", "add_v_proj", "proj_mlp", "proj_out", "ff.net.0.proj"],
    "sd3": ["to_q", "to_out.0", "ff.net.2", "pos_embed.proj"],
    "pixart": ["to_k", "to_out.0", "proj", "linear_1"],
}


def factors(model: Any, seed: int, r: int = 2, of: Any = ".*") -> dict[str, Tensor]:
    """A LoRA file's tensors, by their names in diffusers, for modules that `TARGETS` ends in."""
    made, plain = {}, type(model).__name__.lower()
    kind = next(kind for kind in TARGETS if plain.startswith(kind))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(tuple(TARGETS[kind])) and re.search(of, name):
            out, *rest = module.weight.shape
            ones = [1] * (len(rest) - 1)
            made[f"{name}.lora_A.weight"] = random(r, *rest, seed=seed + len(made)) / 2
            made[f"{name}.lora_B.weight"] = random(out, r, *ones, seed=seed + 1 + len(made)) / 2
    return made


def added(model: Any, *updates: tuple[dict[str, Tensor], Any]) -> Any:
    """A plain model with the sum of (tensors, scale or scale by name of module) in its weights."""
    with torch.no_grad():
        for state, scale in updates:
            for name in state:
                if name.endswith(".lora_A.weight"):
                    module = name.removesuffix(".lora_A.weight")
                    a, b = state[name], state[f"{module}.lora_B.weight"]
                    how_much = scale(module) if callable(scale) else scale
                    weight = model.get_submodule(module).weight
                    weight += how_much * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    return model


def pipeline(kind: str = "unet") -> Any:
    """Everything that turns words into a picture."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    vae = seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4,),
            norm_num_groups=2,
            latent_channels=4,
            sample_size=8,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            shift_factor=0.0,
            scaling_factor=1.0,
        )
    )
    parts: dict[str, Any] = {"vae": vae, "text_encoder": clip(kind == "sd3"), "tokenizer": words()}
    if kind == "unet":
        parts |= {"safety_checker": None, "feature_extractor": None, "scheduler": DDIMScheduler(clip_sample=False)}
        made = StableDiffusionPipeline(unet=network("unet"), requires_safety_checker=False, **parts)
    elif kind == "flux":
        more = {"text_encoder_2": t5(), "tokenizer_2": words(), "scheduler": scheduler}
        made = FluxPipeline(transformer=network("flux"), **parts, **more)
    else:
        more = {"text_encoder_2": clip(True), "tokenizer_2": words(), "scheduler": scheduler}
        more |= {"text_encoder_3": t5(), "tokenizer_3": words()}
        made = StableDiffusion3Pipeline(transformer=network("sd3"), **parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


def said(pipe: Any, **more: Any) -> Tensor:
    """The picture for a few words."""
    generator = torch.Generator().manual_seed(0)
    picture = pipe(
        "a b", num_inference_steps=2, generator=generator, output_type="np", height=8, width=8, **more
    ).images
    return torch.as_tensor(picture)
