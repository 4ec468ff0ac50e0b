"""The architectures of Hugging Face models that palign computes: what each fixes, and its names.

A row says which settings of `ModelConfig` the architecture stands for, which keys of `config.json` it reads beside
those that all read, what they are where the file leaves them out, and which tensor holds which parameter.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Path of a parameter -> name of its tensor, {} being the layer's number.
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "unembedding": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
    "value_head/kernel": "score.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/query/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/key/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/value/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/output/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attention/query_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/key_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
}
# With four norms a layer, `post_attention_layernorm` is one after attention and no longer the one before the MLP.
FOUR_NORMS = {
    "layers/attention_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}

QWEN_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
QWEN_DEFAULTS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
GEMMA_KEYS = (
    "sliding_window",
    "layer_types",
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
GEMMA_SETTINGS = {"norm_offset": 1.0, "norms_per_layer": 4}
GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


class Family(NamedTuple):
    """One architecture.

    Attributes:
        causal: the name in `architectures` of a language model.
        classifier: of the same with a value head in place of the vocabulary: a reward model.
        model_type: the key of that name.
        settings: what the architecture fixes of `ModelConfig`.
        keys: which keys of `config.json` it reads beside those that all read.
        defaults: keys that a file may leave out, with the values that they then have.
        full_every: where the file does not name the kind of every layer, every so many-th is not windowed; 0: none.
        names: path of a parameter -> name of its tensor.
    """

    causal: str
    classifier: str
    model_type: str
    settings: Mapping[str, Any] = {}
    keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}
    full_every: int = 0
    names: Mapping[str, str] = NAMES


FAMILIES = (
    Family("LlamaForCausalLM", "LlamaForSequenceClassification", "llama", defaults={"num_key_value_heads": None}),
    Family(
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        "mistral",
        keys=("sliding_window",),
        defaults={"sliding_window": 4096},
    ),
    Family(
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        "qwen2",
        settings={"attention_bias": True},
        keys=QWEN_KEYS,
        defaults=QWEN_DEFAULTS,
    ),
    Family(
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        "qwen3",
        settings={"qk_norm": True},
        keys=QWEN_KEYS,
        defaults={**QWEN_DEFAULTS, "head_dim": 128},
    ),
    Family(
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        "gemma2",
        settings=GEMMA_SETTINGS,
        keys=GEMMA_KEYS,
        defaults={**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        full_every=2,
        names=NAMES | FOUR_NORMS,
    ),
    Family(
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        "gemma3_text",
        settings={**GEMMA_SETTINGS, "qk_norm": True},
        keys=(*GEMMA_KEYS, "rope_local_base_freq", "sliding_window_pattern"),
        defaults={**GEMMA_DEFAULTS, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
        full_every=6,
        names=NAMES | FOUR_NORMS,
    ),
)
