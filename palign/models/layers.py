"""The parts of the decoder.

Suffixes name the axes, letters of einsums too: R rows, T tokens, D width, H heads, J key heads, E head width,
F feed-forward width, V vocabulary.

Parameters are plain arrays without partition boxes; which mesh axis cuts them is decided from their path
(`palign.sharding.rules`). A weight is gathered over `fsdp` explicitly, in the compute dtype, where it is used; what the
mesh axis `tensor` cuts stays cut, weights and activations alike, and sums over a cut axis are added up between devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from palign.config.schema import ModelConfig
from palign.sharding.rules import in_use

ACTIVATIONS: dict[str, Callable] = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


class RMSNorm(nn.Module):
    """`x / rms(x) * (offset + scale)` over the last axis, in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        """Normalises `x [..., D]`; the dtype stays."""
        offset = self.config.norm_offset
        start = nn.initializers.constant(1.0 - offset)
        scale = self.param("scale", start, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.norm_epsilon)
        scale = (offset + scale.astype(jnp.float32)).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`einsum(equation, x, kernel)`.

    The kernel's cotangent is an einsum with the result in the kernel's own layout. What JAX derives is the transpose of
    one, for which XLA on a CPU transposes the cotangent in memory first: a fifth of a feed-forward part's time.
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation, x, kernel):
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _product_backward(equation, saved, cotangent):
    x, kernel = saved
    operands, result = equation.split("->")
    of_x, of_kernel = operands.split(",")
    return (
        jnp.einsum(f"{result},{of_kernel}->{of_x}", cotangent, kernel),
        jnp.einsum(f"{of_x},{result}->{of_kernel}", x, cotangent),
    )


product.defvjp(_product_forward, _product_backward)


class Linear(nn.Module):
    """`einsum(equation, x, kernel) + bias`; the kernel's first `num_in` axes are summed over."""

    config: ModelConfig
    equation: str
    shape: tuple[int, ...]
    dtype: Any
    num_in: int = 1
    bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        """Applies the kernel to `x`."""
        start = nn.initializers.variance_scaling(
            self.init_scale,
            "fan_in",
            "truncated_normal",
            in_axis=range(self.num_in),
            out_axis=range(self.num_in, len(self.shape)),
        )
        param_dtype = jnp.dtype(self.config.param_dtype)
        kernel = self.param("kernel", start, self.shape, param_dtype)
        operands, result = self.equation.split("->")
        letters = operands.split(",")[1]
        kernel = in_use(kernel, letters, self.dtype)
        y = in_use(product(self.equation, x, kernel), result)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros_init(), self.shape[self.num_in :], param_dtype)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y + in_use(self._low_rank(x, letters), result) if self.has_variable("params", "lora_a") else y

    def _low_rank(self, x, letters):
        """`(x A) B`, of the factors that `palign.models.lora` lays beside a frozen kernel; k is their rank."""
        a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
        low = jnp.tensordot(x, in_use(a, letters[: self.num_in] + "k"), axes=self.num_in)
        return jnp.tensordot(low, in_use(b, "k" + letters[self.num_in :]), axes=1)


class Rotation(NamedTuple):
    """The rotary embedding's turn of every token, in float32."""

    cos: jax.Array  # [..., R, T, E / 2]
    sin: jax.Array


def make_rotation(position_RT: jax.Array, inverse_frequency: np.ndarray) -> Rotation:
    """All of a model's: of `inverse_frequency [F, E / 2]` they are `[F, R, T, E / 2]`.

    They are made once, before the layers: inside, a compiler may well take every sine again for each head.
    """
    angle = position_RT.astype(jnp.float32)[None, :, :, None] * jnp.asarray(inverse_frequency)[:, None, None]
    return Rotation(in_use(jnp.cos(angle), "nrte"), in_use(jnp.sin(angle), "nrte"))


def rotate(x_RTHE: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotary position embedding, the halves of each head's width being the two coordinates."""
    cos, sin = (table[:, :, None] for table in rotation)
    first, second = jnp.split(x_RTHE.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_RTHE.dtype)


class Attention(nn.Module):
    """Grouped-query attention; who sees whom is the business of `attend`."""

    config: ModelConfig
    dtype: Any
    attend: Callable

    @nn.compact
    def __call__(self, x_RTD, layer, cache, context, rotations):
        """Returns the attended values and what `attend` keeps of this layer's keys and values."""
        c = self.config
        width = c.head_width

        def project(name, equation, heads):
            return Linear(c, equation, (c.dim, heads, width), self.dtype, bias=c.attention_bias, name=name)(x_RTD)

        q = project("query", "rtd,dhe->rthe", c.num_heads)
        k, v = (project(name, "rtd,dje->rtje", c.num_key_heads) for name in ("key", "value"))
        if c.qk_norm:
            q, k = RMSNorm(c, name="query_norm")(q), RMSNorm(c, name="key_norm")(k)
        rotation = jax.tree.map(lambda table: table[layer.rotary], rotations)
        q, k = rotate(q, rotation), rotate(k, rotation)
        scale = width**-0.5 if c.query_scale is None else c.query_scale
        out, kept = self.attend(q, k, v, layer.window, cache, context, scale=scale, softcap=c.attention_softcap)
        shape = (c.num_heads, width, c.dim)
        output = Linear(c, "rthe,hed->rtd", shape, self.dtype, num_in=2, init_scale=0.5 / c.num_layers, name="output")(
            out
        )
        return output, kept


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_RTD):
        """Applies the block's feed-forward part."""
        c = self.config
        gate = Linear(c, "rtd,df->rtf", (c.dim, c.hidden_dim), self.dtype, name="gate")(x_RTD)
        up = Linear(c, "rtd,df->rtf", (c.dim, c.hidden_dim), self.dtype, name="up")(x_RTD)
        down = Linear(c, "rtf,fd->rtd", (c.hidden_dim, c.dim), self.dtype, init_scale=0.5 / c.num_layers, name="down")
        return down(ACTIVATIONS[c.activation](gate) * up)


class Block(nn.Module):
    """One decoder layer: a norm before each part, and with four norms a layer also one after."""

    config: ModelConfig
    dtype: Any
    attend: Callable

    @nn.compact
    def __call__(self, x_RTD, layer, cache, context, rotations):
        """Returns `(x, kept)`, the shape that a scan over layers wants."""
        c = self.config

        def post(name, y):
            return RMSNorm(c, name=name)(y) if c.norms_per_layer == 4 else y

        y = RMSNorm(c, name="attention_norm")(x_RTD)
        y, kept = Attention(c, self.dtype, self.attend, name="attention")(y, layer, cache, context, rotations)
        x_RTD = x_RTD + post("attention_post_norm", y)
        y = GatedMLP(c, self.dtype, name="mlp")(RMSNorm(c, name="mlp_norm")(x_RTD))
        return x_RTD + post("mlp_post_norm", y), kept
