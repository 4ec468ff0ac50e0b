"""Optimizers and schedules from optax, by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from palign.config.schema import OptimizerConfig
from palign.sharding.rules import path_name

Schedule = Callable[[Any], Any]


def _constant(peak: float, steps: int, floor: float) -> Schedule:
    return optax.constant_schedule(peak)


def _linear(peak: float, steps: int, floor: float) -> Schedule:
    return optax.linear_schedule(peak, 0.0, steps)


def _cosine(peak: float, steps: int, floor: float) -> Schedule:
    return optax.cosine_decay_schedule(peak, steps)


def _cosine_to_floor(peak: float, steps: int, floor: float) -> Schedule:
    return optax.cosine_decay_schedule(peak, steps, alpha=floor)


SCHEDULES: dict[str, Callable[[float, int, float], Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_to_floor": _cosine_to_floor,
}


def _adamw(c: OptimizerConfig, rate: Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decayed, mu_dtype=c.state_dtype)


def _lion(c: OptimizerConfig, rate: Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay, mask=decayed, mu_dtype=c.state_dtype)


def _adafactor(c: OptimizerConfig, rate: Schedule) -> optax.GradientTransformation:
    decay = c.weight_decay or None
    return optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=decay, weight_decay_mask=decayed)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
}


def decayed(params: Any) -> Any:
    """Which parameters weight decay pulls on: all but norm scales and biases (TRL's rule)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).rsplit("/", 1)[-1] not in ("scale", "bias"), params
    )


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """Warm-up from 0 (so the first step's rate is 0 where there is one), then the named schedule to the last step."""
    if config.warmup_ratio is None:
        warmup = int(config.warmup_steps or 0)
    else:
        warmup = round(config.warmup_ratio * num_steps)
    if warmup >= num_steps and warmup > 0:
        raise ValueError(
            f"config.optimizer: {warmup} warm-up steps of a run of {num_steps} leave none at the full rate; lower "
            "warmup_steps or warmup_ratio"
        )
    decay = SCHEDULES[config.schedule](config.learning_rate, num_steps - warmup, config.floor)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), decay], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then the named optimizer under its schedule."""
    rate = learning_rate_schedule(config, num_steps)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), OPTIMIZERS[config.name](config, rate))


def global_norm(tree: Any) -> jax.Array:
    """The norm of all leaves together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
