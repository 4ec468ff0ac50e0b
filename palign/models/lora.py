"""Low-rank adapters (LoRA): a frozen base, and two small factors for each chosen kernel.

The factors are a parameter tree of their own, `lora_a` and `lora_b` where the base has `kernel`; the trained model is
`W + (alpha / rank) A B`. While training the product is never formed: the factors are laid beside the frozen kernels
(`attach`) and each layer adds `(x A) B` to `x W`, inside the scan over layers. For use elsewhere they are added to the
kernels once (`merge`).

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, equation 3.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from palign.config.schema import LoraConfig
from palign.models.protocol import LanguageModel, Params

NUM_IN = {"output": 2}  # axes of a kernel that are summed over, behind the layers'; 1 of those not named here


def add_lora(lm: LanguageModel, config: LoraConfig) -> LanguageModel:
    """The same model, whose `init` gives what is trained: the factors, and a value head where there is one."""

    def init(key: jax.Array) -> Params:
        shapes = flatten_dict(jax.eval_shape(lm.init, key))
        kernels = [path for path in sorted(shapes) if path[-1] == "kernel" and path[-2] in config.targets]
        trained: dict[tuple[str, ...], Any] = {}
        for i, path in enumerate(kernels):
            a, b = _new_factors(jax.random.fold_in(key, i), shapes[path].shape, NUM_IN.get(path[-2], 1), config.rank)
            trained |= {(*path[:-1], "lora_a"): a, (*path[:-1], "lora_b"): b}
        head = {"value_head": lm.init(key)["value_head"]} if lm.values else {}
        return unflatten_dict(trained) | head

    return lm._replace(init=init)


def _new_factors(key: jax.Array, shape: tuple[int, ...], num_in: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """Factors `[L, in, rank]` and `[L, rank, out]` of a kernel `[L, in, out]`; B is 0, so that nothing changes yet."""
    layers, inner, outer = shape[:1], shape[1 : 1 + num_in], shape[1 + num_in :]
    bound = 1 / math.sqrt(math.prod(inner))
    a = jax.random.uniform(key, (*layers, *inner, rank), jnp.float32, -bound, bound)
    return a, jnp.zeros((*layers, rank, *outer), jnp.float32)


def attach(base: Params, factors: Params, config: LoraConfig) -> Params:
    """The base with the factors beside its kernels, B scaled: parameters of the trained model.

    Args:
        base: frozen; no gradient goes to it.
        factors: a tree that `add_lora`'s `init` gives.
        config: rank and alpha.
    """
    scale = config.alpha / config.rank
    scaled = {path: x * scale if path[-1] == "lora_b" else x for path, x in flatten_dict(factors).items()}
    return unflatten_dict(flatten_dict(jax.lax.stop_gradient(base)) | scaled)


def merge(base: Params, factors: Params, config: LoraConfig) -> Params:
    """The trained model without factors: float32 kernels `W + (alpha / rank) A B`, all else as in the base.

    Args:
        base: as in `attach`.
        factors: as in `attach`.
        config: rank and alpha.
    """
    merged = flatten_dict(attach(base, factors, config))
    for path in [path for path in merged if path[-1] == "lora_a"]:
        a, b = merged.pop(path), merged.pop((*path[:-1], "lora_b"))
        kernel = merged[*path[:-1], "kernel"]
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest"))(a, b)
        merged[*path[:-1], "kernel"] = kernel.astype(jnp.float32) + product
    return jax.tree.map(lambda x: x.astype(jnp.float32), unflatten_dict(merged))


__all__ = ["add_lora", "attach", "merge"]
