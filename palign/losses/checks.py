"""What every loss does before its formula: upcast, take log-ratios, refuse wrong shapes and impossible numbers."""

import math
import numbers

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def as_float(values: Array) -> Float[Array, "..."]:
    """Return `values` in at least float32: bf16, f16 and integers are raised, f32 and f64 are kept."""
    values = jnp.asarray(values)
    wide = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize >= 4
    return values if wide else values.astype(jnp.float32)


def log_ratios(policy_logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `rho = policy_logps - ref_logps` in nats; no gradient reaches the reference."""
    return as_float(policy_logps) - jax.lax.stop_gradient(as_float(ref_logps))


def margins(ratios: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """Return chosen minus rejected: `h = rho_w - rho_l`."""
    return ratios[:, 0] - ratios[:, 1]


def check_pairs(loss: str, **arrays: Array) -> None:
    """Raise ValueError, naming the loss and the argument, unless every array is `[B, 2]` with the same B."""
    for name, array in arrays.items():
        shape = jnp.shape(array)
        chex.assert_shape(
            array,
            (None, 2),
            custom_message=f"{loss}: {name} has shape {list(shape)}; expected [B, 2] with column 0 = chosen, "
            "column 1 = rejected. Sum token log-probs over the response first (losses.dense.sequence_logps)",
            exception_type=ValueError,
        )
    check_same_shape(loss, **arrays)


def check_lists(loss: str, valid: Bool[Array, "B K"], **arrays: Array) -> None:
    """Raise ValueError unless every array is `[B, K]`, the same for all, and `valid` is boolean of that shape."""
    for name, array in arrays.items():
        chex.assert_rank(
            array,
            2,
            custom_message=f"{loss}: {name} has shape {list(jnp.shape(array))}; expected [B, K], one row per prompt",
            exception_type=ValueError,
        )
    check_mask(loss, "valid", valid)
    check_same_shape(loss, **arrays, valid=valid)


def check_same_shape(loss: str, **arrays: Array) -> None:
    """Raise ValueError unless all arrays have one shape: silent broadcasting would hide a transposed argument."""
    shapes = ", ".join(f"{name} {list(jnp.shape(array))}" for name, array in arrays.items())
    chex.assert_equal_shape(
        list(arrays.values()),
        custom_message=f"{loss}: all shapes must be equal, got {shapes}",
        exception_type=ValueError,
    )


def check_mask(loss: str, name: str, mask: Bool[Array, "*shape"]) -> None:
    """Raise ValueError unless `mask` is boolean: 0/1 numbers invite `mask * x`, where `inf * 0` is NaN."""
    dtype = jnp.result_type(mask)
    chex.assert_type(
        mask,
        bool,
        custom_message=f"{loss}: {name} has dtype {dtype}; expected bool (True = keep), for example {name} != 0",
        exception_type=ValueError,
    )


def check_positive(loss: str, **values: float | Float[Array, ""]) -> None:
    """Raise ValueError if a plain number is not finite and above zero; traced values cannot be looked at."""
    for name, value in values.items():
        if isinstance(value, numbers.Real) and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{loss}: {name} is {value}; expected a finite number above 0")
