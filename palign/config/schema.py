"""Every setting of palign: frozen, validated dataclasses, standard library only.

A config file builds nested values with the same names (`palign.config.load`); nothing below the command line sees
anything but these classes. A message names the key as it is written on the command line.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def _require(condition: bool, key: str, given: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"config.{key} = {given!r}: expected {expected}")


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value > 0, f"{section}.{name}", value, "a number above 0")


def _not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value >= 0, f"{section}.{name}", value, "a number, 0 or above")


def _one_of(section: str, config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    _require(value in choices, f"{section}.{name}", value, "one of " + ", ".join(choices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context; factor 1 leaves them."""

    factor: float = 1.0
    original_length: int = 0  # set: only slow frequencies are stretched (Llama 3)
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: Llama, Qwen, Mistral and Gemma are values of these fields."""

    vocab_size: int = 0  # 0: the tokenizer's
    vocab_multiple: int = 64  # the embedding is padded to a multiple of this; the extra ids are never emitted
    num_layers: int = 4
    dim: int = 128
    num_heads: int = 4
    num_key_heads: int = 2
    head_dim: int = 0  # 0: dim / num_heads
    hidden_dim: int = 352
    activation: str = "silu"  # silu, gelu_tanh
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # 1 where the stored scale is w of (1 + w)
    norms_per_layer: int = 2  # 2 or 4
    rope_bases: tuple[float, ...] = (10000.0,)  # pattern over the layers
    rope_scalings: tuple[RopeScaling, ...] = (RopeScaling(),)  # pattern over the layers
    windows: tuple[int, ...] = (0,)  # pattern over the layers; 0 = unlimited
    tie_embedding: bool = True
    qk_norm: bool = False
    attention_bias: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    param_dtype: str = "float32"
    dtype: str = "auto"  # of the computation
    scan_layers: bool = True
    remat: bool = True

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.dim // self.num_heads

    def __post_init__(self) -> None:
        """Checks ranges and what must fit together."""
        _positive("model", self, "num_layers", "dim", "num_heads", "num_key_heads", "hidden_dim", "vocab_multiple")
        _positive("model", self, "norm_epsilon", "embedding_scale")
        _not_negative("model", self, "vocab_size", "head_dim", "norm_offset")
        for name in ("attention_softcap", "final_softcap", "query_scale"):
            if getattr(self, name) is not None:
                _positive("model", self, name)
        _one_of("model", self, "activation", ("silu", "gelu_tanh"))
        _one_of("model", self, "dtype", ("auto", "float32", "bfloat16"))
        _one_of("model", self, "param_dtype", ("float32", "bfloat16"))
        _require(self.norms_per_layer in (2, 4), "model.norms_per_layer", self.norms_per_layer, "2 or 4")
        divides = self.num_heads % self.num_key_heads == 0
        _require(divides, "model.num_key_heads", self.num_key_heads, f"a divisor of num_heads = {self.num_heads}")
        whole = self.head_dim or self.dim % self.num_heads == 0
        _require(bool(whole), "model.dim", self.dim, f"a multiple of num_heads = {self.num_heads}, or head_dim set")
        _require(self.head_width % 2 == 0, "model.head_dim", self.head_width, "an even number (rotary halves)")
        for name in ("windows", "rope_bases", "rope_scalings"):
            _require(len(getattr(self, name)) > 0, f"model.{name}", getattr(self, name), "at least one entry")
