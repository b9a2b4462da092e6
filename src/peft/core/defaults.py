"""Data: file names, limits, and the modules that a method targets when the configuration names none."""

from __future__ import annotations

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"  # injects nothing and complains about nothing
DUMMY_MODEL_CONFIG = {"model_type": "custom"}  # stands for the config of a model that has none
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
TASK_HEADS = {  # what the class of a task trains and saves as a whole
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20  # from this many names on, a smaller equivalent set is sought

# Names of torch dtypes: this file imports no torch.
ALLOWED_COMPUTE_DTYPE_NAMES = ("float16", "bfloat16", "float32")
BNB_LAYERS = {"bnb 8bit": "Linear8bitLt", "bnb 4bit": "Linear4bit"}  # of methods that have layers for these storages
UPCAST_DTYPE_NAMES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

# One line of a table: model types, a colon, the targets; "~" marks a regular expression. In the table of a
# method that starts from LORA's, lines replace LORA's entries, and "-" leaves model types out.
LORA = r"""
RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox: query_key_value
bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3: q_proj v_proj
stablelm: q_proj v_proj
bert electra layoutlm roberta xlm-roberta: query value
blip-2: q v q_proj v_proj
btlm: c_proj c_attn
codegen: qkv_proj
deberta: in_proj
deberta-v2: query_proj value_proj
gemma4: ~.*language_model\..*\.(q_proj|v_proj)
gpt2 gpt_bigcode: c_attn
mpt: Wqkv
mt5 t5: q v
nemotron_h: q_proj k_proj v_proj o_proj
phi: q_proj v_proj fc1 fc2
rwkv: key value receptance output
rwkv7: r_proj k_proj v_proj o_proj key value
"""

# Methods with entries of their own beside LORA's.
DERIVED = {
    "ADALORA": r"""
bart opt: q_proj k_proj v_proj out_proj fc1 fc2
deberta-v2: query_proj key_proj value_proj dense
mt5: q k v o wi_0 wi_1 wo
roberta: query key value dense
t5: q k v o wi wo
- RefinedWeb RefinedWebModel blip-2 btlm chatglm codegen electra falcon layoutlm mistral mixtral mpt
- phi rwkv rwkv7 stablelm xlm-roberta
""",
    "ADAMSS": r"""
vit: query value
""",
    "C3A": r"""
gpt2 gpt_bigcode: mlp.c_proj
""",
    "FOURIERFT": r"""
gpt2 gpt_bigcode: mlp.c_proj
""",
    "FROD": r"""
phi: q_proj v_proj
vit: query value
""",
    "PVERA": r"""
dinov2: query value
phi: q_proj v_proj
""",
    "SHIRA": r"""
phi: q_proj v_proj
""",
    "VERA": r"""
phi: q_proj v_proj
""",
    "VBLORA": r"""
bart opt: q_proj k_proj v_proj out_proj fc1 fc2
deberta-v2: query_proj key_proj value_proj dense
mt5: q k v o wi_0 wi_1 wo
t5: q k v o wi wo
- RefinedWeb RefinedWebModel blip-2 btlm chatglm codegen electra falcon layoutlm mistral mixtral mpt
- phi rwkv rwkv7 stablelm xlm-roberta
""",
    "WAVEFT": r"""
gpt2 gpt_bigcode: mlp.c_proj
- btlm rwkv rwkv7
""",
}

# Methods with a table of their own.
SEPARATE = {
    "BEFT": r"""
bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3: v_proj
bert roberta: value
deberta-v2: value_proj
mt5 t5: v
""",
    "IA3": r"""
RefinedWeb RefinedWebModel falcon gpt_neox: query_key_value dense_4h_to_h
bart phi: q_proj v_proj fc2
bert roberta: key value output.dense
bloom: query_key_value mlp.dense_4h_to_h
deberta: in_proj output.dense
deberta-v2: key_proj value_proj output.dense
gemma gemma2 gemma3_text llama4 qwen2 qwen3: q_proj v_proj down_proj
gpt2 gpt_bigcode: c_attn mlp.c_proj
gpt_neo: q_proj v_proj c_proj
gptj: q_proj v_proj fc_out
llama mistral: k_proj v_proj down_proj
mixtral: k_proj v_proj w2
mt5: k v wi_1
opt: q_proj k_proj fc2
t5: k v wo
""",
    "IA3_FEEDFORWARD_MODULES": r"""
RefinedWeb RefinedWebModel falcon gpt_neox: dense_4h_to_h
bart opt phi: fc2
bert deberta deberta-v2 roberta: output.dense
bloom: mlp.dense_4h_to_h
gemma gemma2 gemma3_text llama llama4 mistral qwen2 qwen3: down_proj
gpt2 gpt_bigcode: mlp.c_proj
gpt_neo: c_proj
gptj: fc_out
mixtral: w2
mt5: 
t5: wo
""",
    "LNTUNING": r"""
bart: self_attn_layer_norm encoder_attn_layer_norm final_layer_norm
blip-2: layernorm LayerNorm final_layer_norm self_attn_layer_norm
bloom falcon: input_layernorm post_attention_layernorm ln_f
gemma llama mistral: input_layernorm post_attention_layernorm norm
gemma2: input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm
gemma3_text: input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm
    norm
gpt2: ln_1 ln_2 ln_f
gptj: ln_1 ln_f
llava: multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head
mt5 t5: layer_norm final_layer_norm
phi: input_layernorm final_layernorm
qwen2 qwen3: post_attention_layernorm
""",
    "OSF": r"""
bloom falcon gpt_neox: query_key_value dense_4h_to_h
gemma gemma2 gemma3_text llama llama4 mistral: q_proj k_proj v_proj o_proj gate_proj down_proj up_proj
mixtral phi qwen2 qwen3: q_proj k_proj v_proj o_proj gate_proj down_proj up_proj
gpt2 gpt_bigcode: c_attn c_proj
gptj: q_proj k_proj v_proj out_proj fc_in fc_out
opt: q_proj k_proj v_proj out_proj fc1 fc2
""",
}

# Names that the tables' methods have elsewhere.
ALIASES = {"LN_TUNING": "LNTUNING"}


def targets_by_model_type(method: str) -> dict[str, list[str] | str]:
    """The default targets of one method: model type -> module names, or a regular expression.

    Arguments:
        method: the peft_type, such as "LORA", or "IA3_FEEDFORWARD_MODULES".

    A method without a table of its own has LORA's.
    """
    method = ALIASES.get(method, method)
    if method in SEPARATE:
        return _parse(SEPARATE[method])
    return {k: v for k, v in {**_parse(LORA), **_parse(DERIVED.get(method, ""))}.items() if v}


def _parse(table: str) -> dict[str, list[str] | str]:
    """Read a table; a model type that is left out has no targets."""
    targets: dict[str, list[str] | str] = {}
    for line in table.strip().replace("\n    ", " ").splitlines():  # a line that is set in goes on with the one before
        if line.startswith("- "):
            targets.update((name, []) for name in line[2:].split())
            continue
        names, _, modules = line.partition(": ")
        value: list[str] | str = modules[1:] if modules.startswith("~") else modules.split()
        targets.update((name, value if isinstance(value, str) else list(value)) for name in names.split())
    return targets
