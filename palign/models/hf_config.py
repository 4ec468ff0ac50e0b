"""`config.json` of a Hugging Face model to a `ModelConfig`, and back.

Read are the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`, `layer_types`);
written are the keys that both understand. A key that is neither read, nor known to change nothing, nor at the value
that palign computes, is refused by name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from palign.config.schema import ModelConfig, RopeScaling
from palign.models.hf_families import FAMILIES, Family

# Keys that all architectures read -> field of ModelConfig.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_key_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embedding",
}
CAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "final_softcap"}
READ = {*FIELDS, "architectures", "model_type", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters"}
DEFAULTS: dict[str, Any] = {
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

# Keys that would change what is computed -> the only value that palign computes.
EXPECTED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
}
# Keys that change nothing here: about files and software, about training or generating in transformers.
UNREAD = {
    *("transformers_version", "torch_dtype", "dtype", "is_llama_config", "transformers.js_config", "unsloth_fixed"),
    *("initializer_range", "pretraining_tp", "max_position_embeddings", "use_cache", "cache_implementation"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "output_attentions", "output_hidden_states"),
    *("return_dict", "problem_type", "num_logits_to_keep", "unsloth_version"),
}

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"

# Type of rotary scaling -> its keys -> field of RopeScaling.
SCALINGS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
}
RUN_FIELDS = ("vocab_multiple", "param_dtype", "dtype", "scan_layers", "remat")  # how, not what is computed


class Described(NamedTuple):
    """What a `config.json` says."""

    family: Family
    model: ModelConfig

    @property
    def architecture(self) -> str:
        """The name that transformers has for it."""
        return self.family.classifier if self.model.value_head else self.family.causal


def from_hf(given: Mapping[str, Any]) -> Described:
    """Reads the content of a `config.json`.

    Raises:
        ValueError: an architecture or a setting that palign does not compute, or a value that cannot be.
    """
    family, labels = _find_family(given)
    _check_keys(given, family, classifies=labels > 0)
    values = {**DEFAULTS, **family.defaults, **given}
    sizes = {field: _value(values, key, type(getattr(ModelConfig(), field))) for key, field in FIELDS.items()}
    kinds = _layer_kinds(values, family, sizes["num_layers"])
    ropes = {kind: _rope(values, family, kind) for kind in set(kinds)}
    window = _window(values, family)
    settings = dict(
        sizes,
        activation=_activation(values, family),
        windows=shortest(window if kind == SLIDING else 0 for kind in kinds),
        rope_bases=shortest(ropes[kind][0] for kind in kinds),
        rope_scalings=shortest(ropes[kind][1] for kind in kinds),
        value_head=labels,
        **family.settings,
    )
    if labels:
        settings["tie_embedding"] = True  # there is no other vocabulary to project on
    if "query_pre_attn_scalar" in family.keys:
        settings["embedding_scale"] = sizes["dim"] ** 0.5
        settings["query_scale"] = _value(values, "query_pre_attn_scalar", float) ** -0.5
        settings |= {f: None if values.get(key) is None else _value(values, key, float) for key, f in CAPS.items()}
    return Described(family, ModelConfig(**settings))


def _find_family(given: Mapping[str, Any]) -> tuple[Family, int]:
    """The family, and how many labels a classifier has; 0 is a language model."""
    named = given.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        raise ValueError(f"architectures = {_short(named)}: expected a list of one name")
    family = next((family for family in FAMILIES if named[0] in (family.causal, family.classifier)), None)
    if family is None:
        known = ", ".join(f"{family.causal}, {family.classifier}" for family in FAMILIES)
        raise ValueError(f"architectures = {_short(named)}: palign reads {known}")
    if given.get("model_type") != family.model_type:
        raise ValueError(f"model_type = {_short(given.get('model_type'))}: a {named[0]} has {family.model_type!r}")
    if named[0] == family.causal:
        return family, 0
    labels = given.get("id2label") or {"0": "", "1": ""}  # transformers leaves it out where there are two
    if not isinstance(labels, dict) or len(labels) != 1:
        raise ValueError(f"id2label = {_short(labels)}: a reward model has one label")
    return family, 1


def _check_keys(given: Mapping[str, Any], family: Family, *, classifies: bool) -> None:
    read = READ | set(family.keys) | ({"id2label", "label2id", "num_labels"} if classifies else set())
    for key, value in given.items():
        if key in read or key in UNREAD or key.startswith("_") or value is None:
            continue
        if key not in EXPECTED:
            raise ValueError(
                f"{_short(key)} = {_short(value)}: palign does not know this setting of a {family.causal} and cannot "
                "tell whether it changes what the model computes; remove the key if it does not"
            )
        if value != EXPECTED[key]:
            raise ValueError(f"{key} = {_short(value)}: palign computes {key} = {EXPECTED[key]} only")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _value(values: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of a type; null follows from others where it may stand."""
    if key not in values:
        raise ValueError(f"{key} is missing")
    value = values[key]
    if value is None and key == "num_key_value_heads":
        return _value(values, "num_attention_heads", int)
    if value is None and key == "head_dim":
        return _value(values, "hidden_size", int) // _value(values, "num_attention_heads", int)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{key} = {_short(value)}: expected true or false")
        return value
    whole = kind is int
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (right and 0 < value < 2**31):
        raise ValueError(f"{key} = {_short(value)}: expected a {'whole number' if whole else 'number'} above 0")
    return kind(value)


def _activation(values: Mapping[str, Any], family: Family) -> str:
    key = "hidden_activation" if "hidden_activation" in family.keys else "hidden_act"
    if values[key] not in list(ACTIVATIONS):
        raise ValueError(f"{key} = {_short(values[key])}: palign computes {' and '.join(ACTIVATIONS)}")
    return ACTIVATIONS[values[key]]


def _window(values: Mapping[str, Any], family: Family) -> int:
    off = "use_sliding_window" in family.keys and not _value(values, "use_sliding_window", bool)
    return 0 if off or values.get("sliding_window") is None else _value(values, "sliding_window", int)


def _layer_kinds(values: Mapping[str, Any], family: Family, num_layers: int) -> list[str]:
    """Which kind of attention every layer has."""
    if (kinds := values.get("layer_types")) is not None:
        right = isinstance(kinds, list) and len(kinds) == num_layers
        if not right or any(kind not in (FULL, SLIDING) for kind in kinds):
            raise ValueError(
                f"layer_types = {_short(kinds)}: expected {FULL!r} or {SLIDING!r} for each of {num_layers} layers"
            )
        return kinds
    if "max_window_layers" in family.keys and values["max_window_layers"] != 0:
        first = _value(values, "max_window_layers", int)
        return [SLIDING if layer >= first else FULL for layer in range(num_layers)]
    if family.full_every:
        key = "sliding_window_pattern"
        every = _value(values, key, int) if values.get(key) is not None else family.full_every
        return [SLIDING if (layer + 1) % every else FULL for layer in range(num_layers)]
    return [SLIDING if "sliding_window" in family.keys else FULL] * num_layers


def _rope(values: Mapping[str, Any], family: Family, kind: str) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary embedding in layers of one kind."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    own_base = kind == SLIDING and "rope_local_base_freq" in family.keys
    if isinstance(given, dict) and given.keys() & {FULL, SLIDING}:
        given = given.get(kind) or {}
    elif own_base:
        given = {}  # transformers 4 stretches full attention only
    if not isinstance(given, dict):
        raise ValueError(f"rope_scaling = {_short(given)}: expected a group of keys")
    name = given.get("rope_type", given.get("type", "default"))
    if name not in list(SCALINGS):
        raise ValueError(f"rope_type = {_short(name)}: palign computes {', '.join(SCALINGS)}")
    if extra := sorted(given.keys() - SCALINGS[name].keys() - {"rope_theta", "rope_type", "type"}):
        raise ValueError(f"rope_parameters: {extra[0]} = {_short(given[extra[0]])}: no setting of rope_type {name!r}")
    fields = {key: (field, type(getattr(RopeScaling(), field))) for key, field in SCALINGS[name].items()}
    stretched = {field: _value(given, key, kind) for key, (field, kind) in fields.items()}
    if "rope_theta" in given:
        return _value(given, "rope_theta", float), RopeScaling(**stretched)
    return _value(values, "rope_local_base_freq" if own_base else "rope_theta", float), RopeScaling(**stretched)


def shortest(values: Any) -> tuple[Any, ...]:
    """The shortest pattern whose repetition over the layers gives these values."""
    values = tuple(values)
    for length in range(1, len(values)):
        if all(value == values[i % length] for i, value in enumerate(values)):
            return values[:length]
    return values


def computed(model: ModelConfig) -> ModelConfig:
    """What a model computes, each in one form: two configs of the same function become equal."""

    def over_layers(pattern: Sequence[Any]) -> tuple[Any, ...]:
        return shortest(pattern[layer % len(pattern)] for layer in range(model.num_layers))

    plain: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in RUN_FIELDS}
    scalings = [scaling if scaling.factor != 1.0 else RopeScaling() for scaling in over_layers(model.rope_scalings)]
    return dataclasses.replace(
        model,
        **plain,
        head_dim=model.head_width,
        windows=over_layers(model.windows),
        rope_bases=over_layers(model.rope_bases),
        rope_scalings=tuple(scalings),
        query_scale=model.head_width**-0.5 if model.query_scale is None else model.query_scale,
        tie_embedding=model.tie_embedding or model.value_head > 0,
    )


def to_hf(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The architecture that computes what a model computes, and the keys of its `config.json`.

    Raises:
        ValueError: none does.
    """
    nearest, fewest = "", len(dataclasses.fields(ModelConfig))
    for family in FAMILIES:
        written = _write(model, family)
        read, wanted = (dataclasses.asdict(computed(m)) for m in (from_hf(written).model, model))
        different = [name for name in wanted if read[name] != wanted[name]]
        if not different:
            return family, written
        if len(different) < fewest:
            nearest, fewest = f"{family.causal}, which differs in config.model.{', '.join(different)}", len(different)
    raise ValueError(f"no architecture of transformers computes what this model does; the nearest is {nearest}")


def _write(model: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of a family that come nearest to a model."""
    model = computed(model)
    windows = [model.windows[layer % len(model.windows)] for layer in range(model.num_layers)]
    bases = dict(zip(windows, _over(model.rope_bases, windows), strict=True))
    scalings = dict(zip(windows, _over(model.rope_scalings, windows), strict=True))
    wide, narrow = min(windows), max(windows)  # 0 is unlimited
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == model.activation)
    written: dict[str, Any] = {
        "architectures": [family.classifier if model.value_head else family.causal],
        "model_type": family.model_type,
        **{key: getattr(model, field) for key, field in FIELDS.items()},
        "hidden_act": activation,
        "rope_theta": bases[wide],
        "rope_scaling": _write_scaling(scalings[wide]),
    }
    if model.value_head:
        written |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    own: dict[str, Any] = {
        "sliding_window": narrow or None,
        "use_sliding_window": narrow > 0,
        "max_window_layers": model.num_layers,
        "layer_types": [SLIDING if window else FULL for window in windows],
        "hidden_activation": activation,
        "query_pre_attn_scalar": max(1, round((model.query_scale or 1.0) ** -2)),
        "rope_local_base_freq": bases[narrow],
        **{key: getattr(model, field) for key, field in CAPS.items()},
    }
    return written | {key: own[key] for key in family.keys if key in own}


def _over(pattern: Sequence[Any], layers: Sequence[Any]) -> list[Any]:
    return [pattern[i % len(pattern)] for i in range(len(layers))]


def _write_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.factor == 1.0:
        return None
    name = "llama3" if scaling.original_length else "linear"
    return {"rope_type": name} | {key: getattr(scaling, field) for key, field in SCALINGS[name].items()}
