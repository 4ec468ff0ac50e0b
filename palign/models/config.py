"""What follows from a `ModelConfig`: per-layer tables, padded sizes, the compute dtype."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palign.config.schema import ModelConfig, RopeScaling

NO_WINDOW = 2**30


class LayerTables(NamedTuple):
    """What differs between layers, as arrays that the scan over layers carries."""

    window: np.ndarray  # [L] int32, how far back a query sees
    rotary: np.ndarray  # [L] int32, which of the model's rotary embeddings


def layer_tables(config: ModelConfig) -> tuple[LayerTables, np.ndarray]:
    """What differs between layers; the patterns in the config repeat over the layers.

    Returns:
        The tables, and the inverse frequencies of the model's different rotary embeddings, `[F, head_dim / 2]` float32.
    """

    def of_layer(pattern, layer):
        return pattern[layer % len(pattern)]

    windows = [of_layer(config.windows, layer) or NO_WINDOW for layer in range(config.num_layers)]
    frequencies = []
    for layer in range(config.num_layers):
        base = of_layer(config.rope_bases, layer)
        frequency = base ** (-np.arange(0, config.head_width, 2) / config.head_width)
        frequencies.append(scale_frequencies(frequency, of_layer(config.rope_scalings, layer)))
    different, rotary = np.unique(np.asarray(frequencies, np.float32), axis=0, return_inverse=True)
    return LayerTables(np.asarray(windows, np.int32), rotary.reshape(-1).astype(np.int32)), different


def scale_frequencies(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretches rotary frequencies to a longer context.

    All are divided by `factor`, except (when `original_length` is set, as Llama 3 does) those that turn more than
    `high_frequency_factor` times within the original context, which stay, with a linear blend down to
    `low_frequency_factor` turns.
    """
    if scaling.factor == 1.0:
        return frequency
    if not scaling.original_length:
        return frequency / scaling.factor
    turns = scaling.original_length * frequency / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    keep = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return frequency * (keep + (1.0 - keep) / scaling.factor)


def padded_vocabulary(config: ModelConfig) -> int:
    """The vocabulary rounded up to `vocab_multiple`; the extra logits are masked everywhere."""
    return -(-config.vocab_size // config.vocab_multiple) * config.vocab_multiple


def dtype_on(device: jax.Device) -> str:
    """What `auto` is on a device: bfloat16 on TPUs and on GPUs of compute capability 8 and up, else float32."""
    modern_gpu = device.platform == "gpu" and float(getattr(device, "compute_capability", "0")) >= 8
    return "bfloat16" if device.platform == "tpu" or modern_gpu else "float32"


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type to compute in; `auto` is that of this process's devices."""
    return jnp.dtype(dtype_on(jax.devices()[0]) if config.dtype == "auto" else config.dtype)
