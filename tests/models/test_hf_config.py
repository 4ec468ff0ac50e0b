"""`config.json` in both spellings, as published models have it, and what is refused."""

import copy
import json

import pytest

from palign.config.schema import ModelConfig, RopeScaling
from palign.config.shapes import LLAMA2_13B, LLAMA3_8B, QWEN25_0_5B
from palign.models.hf_config import computed, from_hf, to_hf
from tests.models.test_hf import HF, MODELS
from tests.trees import TINY

# As these models' own files have it, keys that say nothing here left out.
LLAMA_31_8B = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, attention_dropout=0.0,
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009], hidden_act="silu", hidden_size=4096,
    intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500000.0,
    rope_scaling=dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.43.0.dev0", vocab_size=128256,
)  # fmt: skip
LLAMA_2_13B = dict(
    _name_or_path="meta-llama/Llama-2-13b-hf", architectures=["LlamaForCausalLM"], model_type="llama",
    bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=5120, intermediate_size=13824,
    max_position_embeddings=4096, num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=40,
    pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False, vocab_size=32000,
)  # fmt: skip
QWEN_25_05B = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", hidden_size=896,
    intermediate_size=4864, max_position_embeddings=32768, max_window_layers=24, num_attention_heads=14,
    num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768,
    tie_word_embeddings=True, use_mrope=False, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
GEMMA_3_1B = dict(
    architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", attention_bias=False,
    attn_logit_softcapping=None, cache_implementation="hybrid", final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912, num_attention_heads=4,
    num_hidden_layers=26, num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
    rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
    vocab_size=262144,
)  # fmt: skip
GEMMA_3_1B_MODEL = dict(
    vocab_size=262144, num_layers=26, dim=1152, num_heads=4, num_key_heads=1, head_dim=256, hidden_dim=6912,
    activation="gelu_tanh", norm_offset=1.0, norms_per_layer=4, qk_norm=True, embedding_scale=1152**0.5,
    query_scale=1 / 16, windows=(512, 512, 512, 512, 512, 0), rope_bases=(1e4, 1e4, 1e4, 1e4, 1e4, 1e6),
)  # fmt: skip


def with_scaling(model):
    scalings = {"rope_scalings": tuple(RopeScaling(**scaling) for scaling in model.get("rope_scalings", ({},)))}
    return ModelConfig(**(model | scalings))


@pytest.mark.parametrize(
    ("given", "model"),
    [
        (LLAMA_31_8B, LLAMA3_8B),
        (LLAMA_2_13B, LLAMA2_13B),
        (QWEN_25_05B, QWEN25_0_5B),
        (GEMMA_3_1B, GEMMA_3_1B_MODEL),
    ],
    ids=lambda x: x.get("model_type", ""),
)
def test_published_models_are_read(given, model):
    assert computed(from_hf(given).model) == computed(with_scaling(model))


def given(name):
    return json.loads((HF / name / "config.json").read_text())


def as_transformers_4(config):
    """The same in the older spelling."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = copy.deepcopy(config["rope_parameters"])
    if "full_attention" in rope:
        old |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "layer_types": config["layer_types"]}
        rope = rope["full_attention"]
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": "float32"}
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    return old


@pytest.mark.parametrize("name", MODELS)
def test_both_spellings_are_the_same_model_and_so_is_what_is_written(name):
    described = from_hf(given(name))
    assert from_hf(as_transformers_4(given(name))) == described
    family, written = to_hf(described.model)
    assert family is described.family and computed(from_hf(written).model) == computed(described.model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama2", {"architectures": ["FalconForCausalLM"]}, r"'FalconForCausalLM'\]: palign reads LlamaForCausalLM, "),
        ("llama2", {"architectures": None}, "architectures = None: expected a list of one name"),
        ("llama2", {"model_type": "qwen2"}, "model_type = 'qwen2': a LlamaForCausalLM has 'llama'"),
        ("llama2", {"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map.*does not know this setting"),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config.*does not know this setting"),
        ("llama2", {"sliding_window": 5}, "sliding_window.*does not know this setting"),
        ("llama2", {"attention_bias": True}, "attention_bias = True: palign computes attention_bias = False only"),
        ("llama2", {"mlp_bias": True}, "mlp_bias = True: palign computes"),
        ("llama2", {"attention_dropout": 0.1}, "attention_dropout = 0.1: palign computes attention_dropout = 0.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: palign computes"),
        ("llama2", {"hidden_act": "relu"}, "hidden_act = 'relu': palign computes silu and gelu_pytorch_tanh"),
        ("llama2", {"hidden_act": ["silu"]}, "hidden_act"),
        ("llama3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn': palign computes default, linear,"),
        ("llama3", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ("llama3", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor = 0: expected a number above 0"),
        ("llama3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: no setting of"),
        ("llama3", {"rope_parameters": 3}, "rope_scaling = 3: expected a group"),
        ("llama2", {"hidden_size": "8"}, "hidden_size = '8': expected a whole number above 0"),
        ("llama2", {"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0: expected a whole number"),
        ("llama2", {"vocab_size": True}, "vocab_size = True: expected a whole number"),
        ("llama2", {"vocab_size": 2**40}, "vocab_size = 1099511627776: expected a whole number"),
        ("llama2", {"hidden_size": None}, "hidden_size = None: expected a whole number"),
        ("llama2", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: expected true or false"),
        ("llama2", {"num_key_value_heads": 3}, "num_key_heads = 3: expected a divisor"),
        (
            "qwen2",
            {"layer_types": ["full_attention"]},
            "layer_types = .*: expected 'full_attention' or 'sliding_attention' for each of 2",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention", "linear_attention"]},
            "layer_types = .*: expected 'full_attention' or",
        ),
        ("llama_reward", {"id2label": {"0": "a", "1": "b"}}, "id2label = .*: a reward model has one label"),
        ("llama_reward", {"id2label": None}, "a reward model has one label"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        from_hf(given(name) | change)
    assert "\n" not in str(raised.value)


def test_a_missing_size_is_named():
    for key in ("hidden_size", "vocab_size", "num_hidden_layers"):
        with pytest.raises(ValueError, match=f"^{key} is missing"):
            from_hf({name: value for name, value in given("llama2").items() if name != key})


def test_a_model_that_no_architecture_computes_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"the nearest is LlamaForCausalLM, which differs in config.model.norms"):
        to_hf(ModelConfig(vocab_size=50, norms_per_layer=4))
    with pytest.raises(ValueError, match=r"the nearest is Qwen2ForCausalLM, which differs in config.model.qk_norm"):
        to_hf(ModelConfig(vocab_size=50, attention_bias=True, qk_norm=True, windows=(3, 0)))
    assert to_hf(TINY)[0].causal == "LlamaForCausalLM"
